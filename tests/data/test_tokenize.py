"""The boundary, the stop token, BOS, cutting and counting, over the kinds of template and tokenizer there are."""

import time
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from qorpo.data.chat_format import BOS_TEMPLATE, PLAIN_TEMPLATE, ChatFormat
from qorpo.data.counts import DataReport
from qorpo.data.records import PairSet, PreferencePair
from qorpo.data.sources import load_pairs
from qorpo.data.tokenize import Limits, tokenize_pairs
from qorpo.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared base model is not beside the checkout"
)

CORPUS = ["Hello there, what is a colour? Red is a colour. Green tea is a drink; hi, hello, I think so."] * 4
ROOMY = {"max_length": 512, "max_prompt_length": 256}

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{{ '<start_of_turn>' + m['role'].replace('assistant', 'model') + '\n' "
    "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = MISTRAL.replace("m['content'] + eos_token", "m['content'] | trim + ' ' + eos_token")
# Writes the stop on a line of its own, and an open thought before the answer, as reasoning models do.
THINKING = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{{ '<think></think>' }}"
    "{% endif %}{{ m['content'] + '\n<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
CHANNELS = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}{% if m['role'] == 'assistant' %}{{ '<|im_start|>' }}"
    "{% endif %}{{ m['content'] + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Qwen-2.5's, which speaks for a system that says nothing; Llama-3.1's, which says the date.
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    + CHATML
)
DATED = (
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday is ' + strftime_now('%Y') + '<|eot_id|>' }}"
    + LLAMA3.removeprefix("{{ bos_token }}")
)
# Qwen-3's: thoughts of earlier turns go, those of the last answer are set apart.
FORGETFUL = (
    "{% for m in messages %}{% set c = m['content'] %}{% if m['role'] == 'assistant' and '</think>' in c %}"
    "{% if loop.last %}{% set c = '<think>\n' + c.split('</think>')[0].split('<think>')[-1].strip() + '\n</think>\n\n' "
    "+ c.split('</think>')[-1].strip() %}{% else %}{% set c = c.split('</think>')[-1].strip() %}{% endif %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNLABELLED = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"

SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
]
SPECIAL += ["<start_of_turn>", "<end_of_turn>"]


def byte_level(template=None, adds_bos=False, special=SPECIAL, **names):
    """A byte-level BPE tokenizer, as GPT-2, Llama-3 and Qwen have."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    if adds_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    names = {"bos_token": "<s>", "eos_token": "</s>"} | names
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, **names)


def sentencepiece_like(template=None):
    """A BPE tokenizer that puts a space before every text, as those of Llama-2 and Mistral do."""
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    core.train_from_iterator(
        [word for line in CORPUS for word in line.split()],
        trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, chat_template=template, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def turn(role, content):
    return {"role": role, "content": content}


def pair(
    chosen="Red is a colour.", rejected="I think so", prompt="what is a colour?", source="a:1", before=()
):
    return PreferencePair((*before, turn("user", prompt)), chosen, rejected, source)


def tokenize_one(chat_format, each, **lengths):
    (tokens,), _ = tokenize_pairs([each], chat_format, Limits(**(ROOMY | lengths)))
    return tokens


def drop_reasons(chat_format, *pairs, **lengths):
    """The reasons that pairs are dropped for, beside one that is kept."""
    kept, report = tokenize_pairs([pair(), *pairs], chat_format, Limits(**(ROOMY | lengths)))
    assert report.read == len(pairs) + 1
    assert report.kept == len(kept)
    return report.dropped


# name: (tokenizer, template handed in, stop token, the prompt's text, the chosen response's text with its stop)
PLAIN_PROMPT = "User: what is a colour?\n\nAssistant:"
FORMATS = {
    "chatml": (
        lambda: byte_level(CHATML),
        None,
        "<|im_end|>",
        "<|im_start|>user\nwhat is a colour?<|im_end|>\n<|im_start|>assistant\n",
        "Red is a colour.<|im_end|>",
    ),
    "chatml handed in, tokenizer adds BOS": (
        lambda: byte_level(LLAMA3, adds_bos=True),
        CHATML,
        "<|im_end|>",
        "<|im_start|>user\nwhat is a colour?<|im_end|>\n<|im_start|>assistant\n",
        "Red is a colour.<|im_end|>",
    ),
    "chatml, its tokens unknown to the tokenizer": (
        lambda: byte_level(CHATML, special=["<s>", "</s>"]),
        None,
        "</s>",
        "<|im_start|>user\nwhat is a colour?<|im_end|>\n<|im_start|>assistant\n",
        "Red is a colour.</s>",
    ),
    "llama-3, tokenizer and template add BOS": (
        lambda: byte_level(LLAMA3, adds_bos=True),
        None,
        "<|eot_id|>",
        "<s><|start_header_id|>user<|end_header_id|>\n\nwhat is a colour?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Red is a colour.<|eot_id|>",
    ),
    "gemma": (
        lambda: byte_level(GEMMA),
        None,
        "<end_of_turn>",
        "<s><start_of_turn>user\nwhat is a colour?<end_of_turn>\n<start_of_turn>model\n",
        "Red is a colour.<end_of_turn>",
    ),
    "mistral": (
        lambda: byte_level(MISTRAL, adds_bos=True),
        None,
        "</s>",
        "<s>[INST] what is a colour? [/INST]",
        " Red is a colour.</s>",
    ),
    "llama-2": (
        lambda: byte_level(LLAMA2, adds_bos=True),
        None,
        "</s>",
        "<s>[INST] what is a colour? [/INST]",
        " Red is a colour. </s>",
    ),
    "thinking": (
        lambda: byte_level(THINKING),
        None,
        "<|eot_id|>",
        "<|user|>what is a colour?\n<|eot_id|><|assistant|>",
        "<think></think>Red is a colour.\n<|eot_id|>",
    ),
    "channels": (
        lambda: byte_level(CHANNELS),
        None,
        "</s>",
        "<|user|>what is a colour?</s><|assistant|>",
        "<|im_start|>Red is a colour.</s>",
    ),
    "a default system turn": (
        lambda: byte_level(DEFAULT_SYSTEM),
        None,
        "<|im_end|>",
        "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nwhat is a colour?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "Red is a colour.<|im_end|>",
    ),
    "the date": (
        lambda: byte_level(DATED),
        None,
        "<|eot_id|>",
        f"<s><|start_header_id|>system<|end_header_id|>\n\nToday is {time.strftime('%Y')}<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nwhat is a colour?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "Red is a colour.<|eot_id|>",
    ),
    "unlabelled": (
        lambda: byte_level(UNLABELLED),
        None,
        "</s>",
        "what is a colour?\n",
        "Red is a colour.</s>",
    ),
    "plain, no pad": (byte_level, None, "</s>", PLAIN_PROMPT, " Red is a colour.</s>"),
    "plain, pad is EOS": (
        lambda: byte_level(pad_token="</s>"),
        None,
        "</s>",
        PLAIN_PROMPT,
        " Red is a colour.</s>",
    ),
    "plain, tokenizer adds BOS": (
        lambda: byte_level(adds_bos=True),
        None,
        "</s>",
        "<s>" + PLAIN_PROMPT,
        " Red is a colour.</s>",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_boundary_stop_and_bos(name):
    make, handed, stop, prompt_text, chosen_text = FORMATS[name]
    tokenizer = make()
    chat_format = ChatFormat(tokenizer, handed)
    tokens = tokenize_one(chat_format, pair())

    def decode(ids):
        return tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    assert tokenizer.decode(chat_format.stop_token_id) == stop
    # What the model will be given to answer.
    given = tokenizer.apply_chat_template(
        [turn("user", "what is a colour?")], add_generation_prompt=True, return_dict=False
    )
    assert list(tokens.prompt_ids) == given
    assert decode(tokens.prompt_ids) == prompt_text
    assert decode(tokens.responses[0]) == chosen_text
    for response in (tokens.responses[0], tokens.responses[1]):
        assert response[-1] == chat_format.stop_token_id
        assert response.count(chat_format.stop_token_id) == 1
        assert tokenizer.bos_token_id not in response
    assert tokens.prompt_ids.count(tokenizer.bos_token_id) == prompt_text.count("<s>")
    assert not tokens.cut[1]
    assert not tokens.cut[2]


@pytest.mark.parametrize("name", FORMATS)
def test_a_response_is_tokenized_apart_from_its_prompt(name):
    """The same answer has the same tokens after any prompt, even one it would merge with."""
    make, handed, *_ = FORMATS[name]
    chat_format = ChatFormat(make(), handed)
    one, other = (tokenize_one(chat_format, pair(prompt=prompt)) for prompt in ("hello", "what is a colou"))
    assert one.responses[0] == other.responses[0]
    assert one.prompt_ids != other.prompt_ids


def test_no_token_spans_the_boundary():
    tokenizer = byte_level(
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{{ eos_token if not add_generation_prompt }}"
    )
    tokens = tokenize_one(ChatFormat(tokenizer), pair(prompt="Hel", chosen="lo there"))
    together = tokenizer("Hello there", add_special_tokens=False)["input_ids"]
    assert len(together) < len(tokens.prompt_ids) + len(tokens.responses[0]) - 1  # together they would merge
    assert list(tokens.prompt_ids) == tokenizer("Hel", add_special_tokens=False)["input_ids"]
    assert list(tokens.responses[0][:-1]) == tokenizer("lo there", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("template", "first"),
    [(CHATML, "Hello"), (MISTRAL, "▁Hello"), (None, "▁Hello")],
    ids=["after a newline", "after a space", "plain"],
)
def test_a_tokenizer_that_puts_a_space_first_puts_none_in_a_response(template, first):
    tokenizer = sentencepiece_like(template)
    assert tokenizer.tokenize("Hello there", add_special_tokens=False)[0] == "▁Hello"  # the fixture does it
    tokens = tokenize_one(ChatFormat(tokenizer), pair("Hello there", "\nhi"))
    assert tokenizer.convert_ids_to_tokens(tokens.responses[0]) == [first, "▁there", "</s>"]
    assert tokenizer.convert_ids_to_tokens(tokens.responses[1])[-3:] == ["<0x0A>", "hi", "</s>"]


def test_a_response_that_would_merge_with_what_is_put_before_it_is_tokenized_alone():
    tokenizer = sentencepiece_like(CHATML)
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    tokens = tokenize_one(ChatFormat(tokenizer), pair("\nhi"))
    assert list(tokens.responses[0][:-1]) == tokenizer("\nhi", add_special_tokens=False)["input_ids"]


def test_the_plain_template_writes_whole_conversations():
    tokenizer = byte_level()
    ChatFormat(tokenizer)
    conversation = [
        turn("system", "Be brief."),
        turn("user", "hi"),
        turn("assistant", "hello"),
        turn("user", "so?"),
    ]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert text == "System: Be brief.\n\nUser: hi\n\nAssistant: hello</s>\n\nUser: so?\n\nAssistant:"


@pytest.mark.parametrize(
    ("tokenizer", "handed", "saved"),
    [
        (byte_level(CHATML), None, CHATML),
        (byte_level(CHATML), LLAMA3, LLAMA3),
        (byte_level(), None, PLAIN_TEMPLATE),
        (byte_level(adds_bos=True), None, BOS_TEMPLATE + PLAIN_TEMPLATE),
    ],
)
def test_the_template_is_saved_with_the_tokenizer(tmp_path, tokenizer, handed, saved):
    chat_format = ChatFormat(tokenizer, handed)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.chat_template == saved
    assert tokenize_one(ChatFormat(again), pair()) == tokenize_one(chat_format, pair())


def test_named_templates_keep_their_names():
    tokenizer = byte_level({"default": CHATML, "tool_use": LLAMA3})
    assert ChatFormat(tokenizer).stop_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert set(tokenizer.chat_template) == {"default", "tool_use"}


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "channels"])
@pytest.mark.parametrize("spelled", ["</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<s>"])
def test_special_tokens_spelled_in_an_answer_are_text(name, spelled):
    make, handed, *_ = FORMATS[name]
    chat_format = ChatFormat(make(), handed)
    answer = f"Hello {spelled} there"
    tokens = tokenize_one(chat_format, pair(chosen=answer, rejected=answer + spelled))
    special = set(chat_format.tokenizer.all_special_ids) | {chat_format.stop_token_id}
    for response in (tokens.responses[0], tokens.responses[1]):
        assert special.isdisjoint(response[:-1])
        assert response[-1] == chat_format.stop_token_id
    assert answer in chat_format.tokenizer.decode(tokens.responses[0])


def test_special_tokens_of_the_template_stay_tokens_in_a_response():
    chat_format = ChatFormat(byte_level(CHANNELS))
    assert tokenize_one(chat_format, pair()).responses[0][0] == SPECIAL.index("<|im_start|>")


@pytest.mark.parametrize("spelled", ["</s>", "<|eot_id|>"])
def test_special_tokens_that_cannot_be_told_from_the_template_s_drop_the_pair(spelled):
    chat_format = ChatFormat(byte_level(CHANNELS))
    assert drop_reasons(chat_format, pair(chosen=f"a {spelled} b")) == {"special_token_in_response": 1}


def test_a_stop_token_that_cannot_be_spelled_drops_the_pair():
    tokenizer = byte_level(CHATML, special=["<s>", "</s>"])
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False)])
    chat_format = ChatFormat(tokenizer)
    assert chat_format.stop_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert drop_reasons(chat_format, pair(rejected="a<|im_end|>b")) == {"special_token_in_response": 1}


def test_cutting_to_the_token():
    chat_format = ChatFormat(byte_level(CHATML, pad_token="</s>"))
    whole = tokenize_one(chat_format, pair())
    size, long, short = len(whole.prompt_ids), len(whole.responses[0]), len(whole.responses[1])
    assert short < long - 1

    fits = tokenize_one(chat_format, pair(), max_length=size + long, max_prompt_length=size)
    assert fits == whole
    for room in (long - 1, short + 1, 1 + short // 2):
        cut = tokenize_one(chat_format, pair(), max_length=size + room, max_prompt_length=size)
        assert cut.prompt_ids == whole.prompt_ids
        assert cut.responses[0] == whole.responses[0][:room]
        assert cut.cut[1]
        assert chat_format.stop_token_id not in cut.responses[0]
        assert cut.responses[1] == whole.responses[1][:room]
        assert cut.cut[2] == (room < short)


def test_a_cut_response_is_never_empty():
    chat_format = ChatFormat(byte_level(CHATML))
    size = len(tokenize_one(chat_format, pair()).prompt_ids)
    tokens = tokenize_one(chat_format, pair(), max_length=size + 1, max_prompt_length=size)
    assert (len(tokens.responses[0]), len(tokens.responses[1])) == (1, 1)


def test_drops_are_counted_and_the_report_carried_on():
    chat_format = ChatFormat(byte_level(GEMMA))
    size = len(tokenize_one(chat_format, pair()).prompt_ids)
    pairs = [
        pair(source="a:1"),
        pair(prompt="what is a colour? " * 2, source="a:2"),
        pair(before=(turn("system", "S"),), prompt="?", source="a:3"),
        pair("Red is a colour. Green tea", "Red is a colour. Hello", source="a:4"),
        pair("Red", "I think so, hello there, hello", source="a:5"),
    ]
    loaded = PairSet(pairs, DataReport(kept=5, dropped={"empty": 2}, noted={"role_label_in_response": 1}))
    kept, report = tokenize_pairs(loaded, chat_format, Limits(size + 6, size))
    assert [tokens.source for tokens in kept] == ["a:1", "a:5"]
    assert report.dropped == {"empty": 2, "prompt_too_long": 1, "template_refused": 1, "same_after_cut": 1}
    assert report.examples["template_refused"] == ["a:3"]
    assert report.read == 7
    assert report.kept == 2
    assert report.noted == {"role_label_in_response": 1}
    assert report.cut == {"prompt": 0, "chosen": 1, "rejected": 1}
    assert [tokens.cut[2] for tokens in kept] == [False, True]
    lengths = [len(tokens.responses[0]) for tokens in kept]
    assert report.tokens["chosen"] == {"total": sum(lengths), "mean": sum(lengths) / 2, "max": max(lengths)}
    assert report.tokens["prompt"] == {"total": 2 * size, "mean": size, "max": size}
    assert loaded.report.as_dict()["kept"] == 5  # the loading's own report stays as it was
    assert loaded.report.dropped == {"empty": 2}


def test_a_long_prompt_may_keep_its_end():
    chat_format = ChatFormat(byte_level("{{ bos_token }}" + CHATML))
    bos = chat_format.tokenizer.bos_token_id
    whole = tokenize_one(chat_format, pair(prompt="tea " * 50)).prompt_ids
    assert whole[0] == bos
    limits = {"max_length": 40, "max_prompt_length": 20}
    assert drop_reasons(chat_format, pair(prompt="tea " * 50), **(limits | {"max_prompt_length": 30}))
    tokens = tokenize_one(chat_format, pair(prompt="tea " * 50), long_prompts="keep_end", **limits)
    assert tokens.prompt_ids == (bos, *whole[-19:])
    assert tokens.cut[0]
    # Without a BOS the end is all.
    chat_format = ChatFormat(byte_level(CHATML))
    whole = tokenize_one(chat_format, pair(prompt="tea " * 50)).prompt_ids
    tokens = tokenize_one(chat_format, pair(prompt="tea " * 50), long_prompts="keep_end", **limits)
    assert tokens.prompt_ids == whole[-20:]
    assert not tokenize_one(chat_format, pair(), long_prompts="keep_end").cut[0]


def test_a_pair_with_a_long_answer_may_be_dropped():
    chat_format = ChatFormat(byte_level(CHATML))
    long = pair(rejected="tea " * 50)
    size = len(tokenize_one(chat_format, pair()).prompt_ids)
    limits = {"max_length": size + 30, "max_prompt_length": size}
    assert tokenize_one(chat_format, long, **limits).cut[2]
    assert drop_reasons(chat_format, long, long_responses="drop", **limits) == {"response_too_long": 1}


def test_a_prompt_of_just_the_limit_is_kept():
    chat_format = ChatFormat(byte_level(CHATML))
    size = len(tokenize_one(chat_format, pair()).prompt_ids)
    tokenize_one(chat_format, pair(), max_length=64, max_prompt_length=size)
    with pytest.raises(
        DataError, match=r"0 usable pairs left as tokens: read 1, dropped 1 prompt_too_long; look at"
    ):
        tokenize_one(chat_format, pair(), max_length=64, max_prompt_length=size - 1)


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m['content']", "m['content'] | upper"),
        CHATML.replace("{% for m in messages %}", "{% for m in messages %}{{ messages | length }}"),
    ],
    ids=["rewrites the answer", "rewrites the prompt"],
)
def test_templates_that_do_not_hold_prompt_and_answer(template):
    with pytest.raises(DataError, match="not as its prompt and the answer"):
        ChatFormat(byte_level(template))


@pytest.mark.parametrize(
    "template",
    [
        CHATML.replace("m['content']", "m['content'] | replace('colour', 'color')"),
        CHATML.replace(
            "{% for m in messages %}", "{% for m in messages %}{{ '#' if messages | length > 3 }}"
        ),
    ],
    ids=["rewrites some answers", "rewrites some prompts"],
)
def test_rows_that_a_template_rewrites_are_dropped(template):
    chat_format = ChatFormat(byte_level(template))
    three = (turn("user", "hi"), turn("assistant", "hello"))
    kept, report = tokenize_pairs([pair("Green", "tea"), pair(before=three)], chat_format, Limits(**ROOMY))
    assert [len(kept), report.dropped] == [1, {"template_mismatch": 1}]


def test_a_template_that_forgets_thoughts_writes_the_last_answer_s_or_drops_it():
    chat_format = ChatFormat(byte_level(FORGETFUL))
    decode = chat_format.tokenizer.decode
    before = (turn("user", "hello"), turn("assistant", "<think>what</think>hi"))
    thought = "<think>\nhello\n</think>\n\nRed is a colour."
    tokens = tokenize_one(chat_format, pair(chosen=thought, before=before))
    assert decode(tokens.prompt_ids).startswith(
        "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nhi<|im_end|>\n"
    )
    assert decode(tokens.responses[0]) == thought + "<|im_end|>"
    # It would write these otherwise than they are.
    assert drop_reasons(chat_format, pair(chosen="<think>a</think>Red")) == {"template_mismatch": 1}


def test_answers_are_trimmed_where_the_template_trims():
    trimmed, whole = ChatFormat(byte_level(LLAMA3)), ChatFormat(byte_level(CHATML))
    padded = pair(chosen=" Red is a colour.\n")
    assert tokenize_one(trimmed, padded).responses[0] == tokenize_one(trimmed, pair()).responses[0]
    assert whole.tokenizer.decode(tokenize_one(whole, padded).responses[0]) == " Red is a colour.\n<|im_end|>"


def test_answers_equal_in_tokens_are_the_same():
    core = Tokenizer(
        models.WordLevel({"<unk>": 0, "</s>": 1, "red": 2, "tea": 3, "User:": 4}, unk_token="<unk>")
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    chat_format = ChatFormat(
        PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", unk_token="<unk>")
    )
    kept, report = tokenize_pairs([pair("red", "tea"), pair("blue", "green")], chat_format, Limits(**ROOMY))
    assert [len(kept), report.dropped] == [1, {"same": 1}]


def test_a_tokenizer_without_any_stop_is_refused():
    with pytest.raises(DataError, match=r"no EOS token.*set eos_token in tokenizer_config\.json"):
        ChatFormat(byte_level(eos_token=None))
    # The template's own end of turn is enough.
    assert ChatFormat(byte_level(CHATML, eos_token=None)).stop_token_id == SPECIAL.index("<|im_end|>")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}", "can't write a question and its answer"),
        ("{{ raise_exception('no roles') }}", r"can't write a question and its answer \(no roles\)"),
        ("{{ messages[0]['content'] }}", "not as its prompt and the answer"),
        (
            CHATML.replace("{% if add_generation_prompt %}", "{% if false %}"),
            r"no generation prompt: '<\|im_start\|>assistant\\n' would be learned",
        ),
    ],
)
def test_unusable_templates_say_why(template, said):
    with pytest.raises(DataError, match=rf"{said}.*model\.chat_template"):
        ChatFormat(byte_level(), template)


@pytest.mark.parametrize(("max_length", "max_prompt_length"), [(8, 8), (8, 9), (8, 0)])
def test_lengths_that_leave_no_response_are_refused(max_length, max_prompt_length):
    with pytest.raises(DataError, match=r"data\.max_prompt_length \(\d\) must be at least 1 and below"):
        Limits(max_length, max_prompt_length)


def test_batches_keep_pairs_and_places_together(monkeypatch):
    chat_format = ChatFormat(byte_level(GEMMA))
    pairs = []
    for n in range(23):
        before = (turn("system", "S"),) if n % 5 == 1 else ()
        chosen = f"Red {n} </s>" if n % 3 == 0 else f"Red {n}"
        pairs.append(pair(chosen, f"tea {n}", f"hello {n}", source=f"a:{n}", before=before))
    whole, report = tokenize_pairs(pairs, chat_format, Limits(**ROOMY))
    monkeypatch.setattr("qorpo.data.tokenize.PAIRS_PER_BATCH", 4)
    assert tokenize_pairs(PairSet(pairs, DataReport(kept=23)), chat_format, Limits(**ROOMY)) == (
        whole,
        report,
    )
    assert [tokens.source for tokens in whole] == [f"a:{n}" for n in range(23) if n % 5 != 1]
    for tokens in whole:
        n = tokens.source.removeprefix("a:")
        prompt, chosen, rejected = map(
            chat_format.tokenizer.decode, (tokens.prompt_ids, tokens.responses[0], tokens.responses[1])
        )
        assert f"hello {n}<" in prompt
        assert chosen.startswith(f"Red {n}")
        assert rejected == f"tea {n}<end_of_turn>"


@needs_shared
def test_real_pairs_with_a_real_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "base")
    pairs = load_pairs(SHARED / "data" / "hh_format" / "sample.jsonl.gz")
    kept, report = tokenize_pairs(pairs, ChatFormat(tokenizer), Limits(512, 256))
    assert report.read == 326
    assert report.kept == len(kept)
    by_source = {each.source: each for each in pairs}
    for tokens in kept:
        assert len(tokens.prompt_ids) <= 256
        assert tokenizer.decode(tokens.prompt_ids).endswith("<|assistant|>\n")
        for ids, cut, text in (
            (tokens.responses[0], tokens.cut[1], by_source[tokens.source].chosen),
            (tokens.responses[1], tokens.cut[2], by_source[tokens.source].rejected),
        ):
            assert len(tokens.prompt_ids) + len(ids) <= 512
            assert ids.count(tokenizer.eos_token_id) == (not cut)
            if not cut:
                assert tokenizer.decode(ids) == text + "</s>"
