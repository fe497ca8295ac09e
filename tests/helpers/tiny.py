"""A tiny random base model, pairs to train it on, and what tests of whole runs do with them again and again."""

import copy
import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|start|>{{ message['role'] }}
{{ message['content'] }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant
{% endif -%}"""

THINGS = ("sky", "sea", "grass", "snow", "coal", "blood", "sand", "rust", "milk", "ink")
QUESTIONS = (
    "What colour is the {}?",
    "Tell me about the {}.",
    "Have you ever seen the {}?",
    "Why do people love the {}?",
)


def preference_records() -> list[dict[str, str]]:
    """40 pairs with a prompt each: a chosen answer that says something, a rejected one that refuses."""
    return [
        {
            "prompt": question.format(thing),
            "chosen": f"The {thing} is a fine thing" + ", and there is more to say" * (index % 3) + ".",
            "rejected": "No." if index % 2 else f"I do not know what {thing} means, so I will not say.",
        }
        for index, (question, thing) in enumerate(
            (question, thing) for question in QUESTIONS for thing in THINGS
        )
    ]


def write_records(path: Path, records: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def make_tokenizer() -> Any:
    """Byte-level BPE of about 300 tokens, with a chat template; no token is set aside for padding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([text for record in preference_records() for text in record.values()], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_base(folder: Path, **changes: Any) -> Path:
    """A random Llama of two layers in bfloat16, saved as a model folder with its tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.1,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**settings | changes)).to(torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def short_recipe(base: Path, pairs: Path, output: Path) -> dict[str, Any]:
    """8 steps in NF4 with paged 8-bit AdamW, no tracker; a second on one core."""
    return {
        "model": {"path": str(base)},
        "lora": {"rank": 4, "alpha": 8},
        "data": {"train": str(pairs), "max_length": 128, "max_prompt_length": 64},
        "train": {
            "pairs_per_step": 10,
            "max_steps": 8,
            "learning_rate": 0.005,
            "eval_every": 2,
            "save_every": 2,
            "log_every": 2,
            "report_to": [],
        },
        "output": str(output),
    }


def changed(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A copy of a recipe's mapping with keys set by their path, two underscores for the dot: `train__seed=1`."""
    recipe = copy.deepcopy(recipe)
    for path, value in changes.items():
        section, _, key = path.rpartition("__")
        (recipe.setdefault(section, {}) if section else recipe)[key] = value
    return recipe


def read_metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
