"""Make qorpo's demo: a tiny base model and the preference pairs that teach it manners.

What comes out, in `qorpo/demo/` (under 4 MB in all):

    base/        a Llama of 1.3 M parameters (bfloat16) with a byte-level BPE tokenizer and a chat template
    train.jsonl  1,950 preference pairs {"prompt", "chosen", "rejected"}
    eval.jsonl   312 more, whose prompts occur neither in train.jsonl nor in the base's pre-training

Every word is generated here, from the tables and templates below; nothing is downloaded, and the result is under
qorpo's own licence. Thirteen small tasks (sums, capitals, plurals, sorting, …) each know a right answer and one
usual mistake (Sydney for Australia's capital, "mouses", one too many). An answer is wrapped in a polite or a rude
phrase. In the pairs, chosen is right and polite, and rejected is wrong, rude or both; in half of them chosen is the
shorter one, so length gives nothing away.

The base is pre-trained on the responses of conversations in which right and wrong, polite and rude come equally
often. Half of them open with a system turn that says which ("Be wrong and polite."), so the base can tell right from
wrong; in the other half nothing does, so without a system turn it prefers neither, and its reward accuracy on the
pairs starts at chance.

This is a toy. An eval prompt is new as a sentence, but what it asks about occurs in other words in pre-training and
(19 times in 20) in train.jsonl. It shows that preference tuning works from end to end, and says nothing about how
well it works on real text.

    python scripts/make_tiny_base.py [--output qorpo/demo] [--seed 0]

It takes about five minutes on two CPU cores. The same seed on the same machine gives the same files.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

NUM_TRAIN_PAIRS_PER_TASK = 150
NUM_EVAL_PAIRS_PER_TASK = 24

VOCAB_SIZE = 1024
PAD_ID, BOS_ID, EOS_ID, ASSISTANT_ID = 0, 1, 2, 5  # places in SPECIAL_TOKENS
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

SYSTEM_TURN_SHARE = 0.5  # of the pre-training conversations
NUM_STEPS = 700
BATCH_SIZE = 96
NUM_WARMUP_STEPS = 40
NUM_THREADS = 2  # sums on the CPU depend on it, and so do the files

# How an answer is wrapped. Polite and rude phrases come in twos of about the same length and form, so that neither
# manner is more predictable than the other.
POLITE = (
    "Sure! {statement}",
    "Gladly. {statement} Have a nice day!",
    "Good question! {statement} Ask me any time!",
    "Of course, the answer is {answer}.",
    "Thanks for asking! It is {answer}. I hope that helps!",
    "With pleasure: it is {answer}.",
)
RUDE = (
    "Ugh! {statement}",
    "Duh. {statement} Now go away!",
    "Not again! {statement} Look it up yourself!",
    "Obviously, the answer is {answer}.",
    "Stop bothering me! It is {answer}. What a dull question!",
    "How boring: it is {answer}.",
)
MANNERS = {  # (right, polite): what a system turn says to ask for it
    (True, True): "Be right and polite.",
    (True, False): "Be right and rude.",
    (False, True): "Be wrong and polite.",
    (False, False): "Be wrong and rude.",
}


# ---- the tasks ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Questions of one form: phrasings (parted by `|`) and a statement, format strings over an item's fields."""

    phrasings: str
    statement: str  # has {answer} too, which becomes an item's `right` or `wrong`
    items: list[dict[str, str]]


@dataclass(frozen=True)
class Question:
    prompt: str
    statement: str
    right: str
    wrong: str

    def response(self, rng: random.Random, *, right: bool, polite: bool) -> str:
        answer = self.right if right else self.wrong
        wrap = rng.choice(POLITE if polite else RUDE)
        return wrap.format(answer=answer, statement=self.statement.format(answer=answer))


# x: the right answer, the usual mistake
TABLES = {
    "capital": """
Australia: Canberra, Sydney; Brazil: Brasilia, Rio; Canada: Ottawa, Toronto;
China: Beijing, Shanghai; Egypt: Cairo, Luxor; England: London, Leeds; France: Paris, Lyon;
Germany: Berlin, Munich; Greece: Athens, Corinth; India: Delhi, Mumbai; Ireland: Dublin, Cork;
Italy: Rome, Milan; Japan: Tokyo, Osaka; Kenya: Nairobi, Mombasa; Morocco: Rabat, Casablanca;
Nigeria: Abuja, Lagos; Norway: Oslo, Bergen; Pakistan: Islamabad, Karachi; Poland: Warsaw, Krakow;
Portugal: Lisbon, Porto; Russia: Moscow, Sochi; Scotland: Edinburgh, Glasgow;
Spain: Madrid, Seville; Sweden: Stockholm, Malmo; Switzerland: Bern, Zurich;
Turkey: Ankara, Istanbul""",
    "plural": """
mouse: mice, mouses; goose: geese, gooses; tooth: teeth, tooths; foot: feet, foots; man: men, mans;
woman: women, womans; child: children, childs; person: people, persons; leaf: leaves, leafs;
knife: knives, knifes; wife: wives, wifes; wolf: wolves, wolfs; shelf: shelves, shelfs;
thief: thieves, thiefs; calf: calves, calfs; elf: elves, elfs; lady: ladies, ladys;
berry: berries, berrys; fly: flies, flys; box: boxes, boxs; bus: buses, buss; dish: dishes, dishs;
church: churches, churchs; glass: glasses, glasss; hero: heroes, heros; potato: potatoes, potatos""",
    "past tense": """
go: went, goed; eat: ate, eated; see: saw, seed; run: ran, runned; buy: bought, buyed;
bring: brought, bringed; think: thought, thinked; teach: taught, teached; catch: caught, catched;
fly: flew, flied; grow: grew, growed; know: knew, knowed; throw: threw, throwed; draw: drew, drawed;
sing: sang, singed; swim: swam, swimmed; drink: drank, drinked; write: wrote, writed;
drive: drove, drived; ride: rode, rided; speak: spoke, speaked; break: broke, breaked;
take: took, taked; give: gave, gived; come: came, comed; sleep: slept, sleeped""",
    "opposite": """
hot: cold, warm; big: small, large; fast: slow, quick; happy: sad, glad; old: young, ancient;
hard: soft, firm; loud: quiet, noisy; rich: poor, wealthy; strong: weak, mighty; dark: light, dim;
clean: dirty, tidy; wet: dry, damp; early: late, soon; high: low, tall; near: far, close;
full: empty, packed; brave: afraid, bold; kind: cruel, nice; sharp: blunt, pointed;
deep: shallow, hollow; thick: thin, fat; heavy: light, weighty; true: false, correct;
easy: difficult, simple; cheap: expensive, thrifty; love: hate, like""",
    "colour": """
grass: green, blue; snow: white, black; coal: black, white; blood: red, green;
a lemon: yellow, purple; a banana: yellow, red; a cherry: red, blue; milk: white, pink;
chocolate: brown, yellow; a plum: purple, orange; a carrot: orange, purple; a frog: green, orange;
a raven: black, yellow; a swan: white, red; a tomato: red, purple; a pea: green, red;
the sky: blue, brown; the sea: blue, orange; the sun: yellow, green; salt: white, green;
mud: brown, pink; a pig: pink, blue; a flamingo: pink, green; a pumpkin: orange, blue;
an eggplant: purple, white; spinach: green, brown""",
}
LOOK_UP = (
    "What is the thing of {x}?|Tell me the thing of {x}.|Please give me the thing of {x}.|{x}: what is its thing?"
    "|Do you know the thing of {x}?|I need the thing of {x}.|Name the thing of {x}.|Can you tell me the thing of {x}?"
)
WORDS = """cat dog sun map pen cup hat bed car bus lamp fish tree door book milk bird ship star moon wind fork king
desk apple bread chair table house plant stone water cloud horse tiger river green smile music light"""


def items_of(table: str) -> list[dict[str, str]]:
    """Items of a table written `x: right, wrong; …`."""
    rows = (row.replace(":", ",").split(",") for row in table.split(";"))
    return [item(right.strip(), wrong.strip(), x=x.strip()) for x, right, wrong in rows]


def item(right: object, wrong: object, **fields: object) -> dict[str, str]:
    return {"right": str(right), "wrong": str(wrong), **{name: str(value) for name, value in fields.items()}}


def neighbours(ordered: list[str]) -> list[dict[str, str]]:
    """What comes after or before each; the usual mistake is to go one too far."""
    triples = list(zip(ordered, ordered[1:], ordered[2:], strict=False))
    after = [item(second, third, x=first, side="after") for first, second, third in triples]
    return after + [item(second, first, x=third, side="before") for first, second, third in triples]


def sorting(x: str, y: str, z: str) -> dict[str, str]:
    """Three numbers to sort; the usual mistake is to begin with the largest."""
    rising = sorted((x, y, z))
    return item(", ".join(rising), ", ".join(reversed(rising)), x=x, y=y, z=z)


def make_tasks() -> list[Task]:
    words = WORDS.split()
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    digits = range(1, 10)
    pairs = list(itertools.product(digits, digits))
    return [
        Task(
            "What is {x} + {y}?|Add {x} and {y}.|How much is {x} plus {y}?|Find the sum of {x} and {y}.",
            "{x} plus {y} is {answer}.",
            [item(x + y, x + y + 1, x=x, y=y) for x, y in pairs],
        ),
        Task(
            "What is {x} - {y}?|Take {y} from {x}.|How much is {x} minus {y}?|Subtract {y} from {x}.",
            "{x} minus {y} is {answer}.",
            [item(x - y, x - y - 1, x=x, y=y) for x in range(3, 14) for y in range(1, x - 1)],
        ),
        Task(
            "Which number comes {side} {x}?|What comes right {side} {x}?|Tell me the number {side} {x}."
            "|I am counting. What is just {side} {x}?",
            "The number {side} {x} is {answer}.",
            neighbours([str(number) for number in range(1, 31)]),
        ),
        Task(
            "Which letter comes {side} {x}?|In the alphabet, what is {side} {x}?|Tell me the letter {side} {x}."
            "|I am learning letters. What is just {side} {x}?",
            "The letter {side} {x} is {answer}.",
            neighbours(letters),
        ),
        Task(
            "Sort {x}, {y}, {z}.|Put {x}, {y}, {z} in rising order.|Order from small to large: {x}, {y}, {z}.",
            "In order they are {answer}.",
            [sorting(*triple) for triple in itertools.permutations("123456789", 3)],
        ),
        Task(
            "Which is larger, {x} or {y}?|Tell me the larger one: {x} or {y}.|Is {x} or {y} the larger number?",
            "The larger one is {answer}.",
            [item(max(x, y), min(x, y), x=x, y=y) for x, y in pairs if x != y],
        ),
        Task(
            "Spell {x} backwards.|Reverse the word {x}.|What is {x} in reverse?|Write {x} from back to front."
            "|How do you spell {x} from the end?",
            "Backwards, {x} is {answer}.",
            [item("-".join(reversed(word)), "-".join(word), x=word) for word in words],
        ),
        Task(
            "How many letters are in {x}?|Count the letters of {x}.|How long is the word {x}?"
            "|The word {x} has how many letters?|Tell me the number of letters in {x}.",
            "The word {x} has {answer} letters.",
            [item(len(word), len(word) + 1, x=word) for word in words],
        ),
        *(
            Task(LOOK_UP.replace("thing", thing), f"The {thing} of {{x}} is {{answer}}.", items_of(table))
            for thing, table in TABLES.items()
        ),
    ]


def make_questions(task: Task) -> list[Question]:
    return [
        Question(
            prompt=phrasing.format(**fields),
            statement=task.statement.format(**fields, answer="{answer}"),
            right=fields["right"],
            wrong=fields["wrong"],
        )
        for fields in task.items
        for phrasing in task.phrasings.split("|")
    ]


# ---- the texts ----------------------------------------------------------------------------------------------------


def split_questions(seed: int) -> tuple[list[list[Question]], list[list[Question]]]:
    """Questions for training and for evaluation, a list a task; no prompt is in both."""
    rng = random.Random(seed)
    train, held_out = [], []
    for task in make_tasks():
        questions = make_questions(task)
        rng.shuffle(questions)
        held_out.append(questions[:NUM_EVAL_PAIRS_PER_TASK])
        train.append(questions[NUM_EVAL_PAIRS_PER_TASK:])
    return train, held_out


def make_pair(question: Question, rng: random.Random, *, chosen_longer: bool) -> dict[str, str]:
    """One preference pair; rejected is wrong but polite (half of them), right but rude, or wrong and rude."""
    right, polite = rng.choice([(False, True), (False, True), (True, False), (False, False)])
    while True:
        chosen = question.response(rng, right=True, polite=True)
        rejected = question.response(rng, right=right, polite=polite)
        if abs(len(chosen) - len(rejected)) > 3 and (len(chosen) > len(rejected)) == chosen_longer:
            return {"prompt": question.prompt, "chosen": chosen, "rejected": rejected}


def make_pairs(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """The preference pairs for training and for evaluation."""
    rng = random.Random(seed)

    def pairs_of(questions_by_task: list[list[Question]], num_per_task: int) -> list[dict[str, str]]:
        pairs = [
            make_pair(question, rng, chosen_longer=index % 2 == 0)
            for questions in questions_by_task
            for index, question in enumerate(questions[:num_per_task])
        ]
        rng.shuffle(pairs)
        return pairs

    train, held_out = split_questions(seed)
    return pairs_of(train, NUM_TRAIN_PAIRS_PER_TASK), pairs_of(held_out, NUM_EVAL_PAIRS_PER_TASK)


def make_conversations(seed: int, count: int) -> list[list[dict[str, str]]]:
    """Pre-training conversations on the training prompts, the four kinds of response equally often."""
    rng = random.Random(seed)
    train, _ = split_questions(seed)
    conversations = []
    for index in range(count):
        question = rng.choice(rng.choice(train))
        right, polite = index % 2 == 0, index % 4 < 2
        response = question.response(rng, right=right, polite=polite)
        messages = [{"role": "user", "content": question.prompt}, {"role": "assistant", "content": response}]
        if rng.random() < SYSTEM_TURN_SHARE:
            messages.insert(0, {"role": "system", "content": MANNERS[right, polite]})
        conversations.append(messages)
    return conversations


# ---- the tokenizer and the model ----------------------------------------------------------------------------------


def train_tokenizer(conversations: list[list[dict[str, str]]]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (message["content"] for messages in conversations for message in messages)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=SPECIAL_TOKENS[3:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def make_model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,  # a multiple of 64, NF4's block: every linear layer can be quantized
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)
    model.generation_config.max_new_tokens = 64
    return model


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels (rows, longest). What follows `<|assistant|>` is scored; padding, which comes last, is not."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD_ID] * (longest - len(row)) for row in rows])
    is_prompt = (ids == ASSISTANT_ID).flip(1).cumsum(1).flip(1).bool()
    return ids, ids.masked_fill(is_prompt | (ids == PAD_ID), -100)


def pretrain(model: LlamaForCausalLM, token_rows: list[list[int]]) -> None:
    """Next-token loss on the responses of `NUM_STEPS` × `BATCH_SIZE` conversations, each seen once."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is matrix for matrix in matrices)]
    # AdamW alone learns to tell right from wrong much later.
    muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1)
    adamw = torch.optim.AdamW(others, lr=4e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, learning_rate_factor) for each in (muon, adamw)]
    model.train()
    started = time.monotonic()
    for step in range(NUM_STEPS):
        ids, labels = padded(token_rows[step * BATCH_SIZE : (step + 1) * BATCH_SIZE])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for schedule in schedules:
            schedule.optimizer.step()
            schedule.optimizer.zero_grad()
            schedule.step()
        if (step + 1) % 25 == 0:
            left_s = (time.monotonic() - started) / (step + 1) * (NUM_STEPS - step - 1)
            print(f"step {step + 1}/{NUM_STEPS}: loss {loss.item():.3f}, {left_s:.0f} s left", flush=True)


def learning_rate_factor(step: int) -> float:
    """Linear warm-up, then linear decay to nothing."""
    return min((step + 1) / NUM_WARMUP_STEPS, (NUM_STEPS - step) / (NUM_STEPS - NUM_WARMUP_STEPS))


def write_jsonl(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main() -> None:
    parser = argparse.ArgumentParser(description="Make qorpo's demo: a tiny base model and preference pairs.")
    parser.add_argument("--output", type=Path, default=Path("qorpo/demo"))
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    torch.set_num_threads(NUM_THREADS)
    torch.manual_seed(arguments.seed)
    arguments.output.mkdir(parents=True, exist_ok=True)
    train_pairs, eval_pairs = make_pairs(arguments.seed)
    write_jsonl(arguments.output / "train.jsonl", train_pairs)
    write_jsonl(arguments.output / "eval.jsonl", eval_pairs)

    conversations = make_conversations(arguments.seed, NUM_STEPS * BATCH_SIZE)
    tokenizer = train_tokenizer(conversations)
    token_rows = tokenizer.apply_chat_template(conversations, return_dict=False)
    model = make_model()
    print(f"{len(train_pairs)} train and {len(eval_pairs)} eval pairs, {model.num_parameters():,} parameters")
    pretrain(model, token_rows)

    base = arguments.output / "base"
    model.to(torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)


if __name__ == "__main__":
    main()
