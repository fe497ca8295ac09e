"""The demo's base model and preference pairs, as they lie in the repository."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "qorpo" / "demo"
BASE = DEMO / "base"
MAX_BYTES = 4_000_000


def read_pairs(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DEMO / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tiny_base", ROOT / "scripts" / "make_tiny_base.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_everything_is_small():
    files = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES


def test_pairs_are_well_formed_and_split_by_prompt():
    train, held_out = read_pairs("train.jsonl"), read_pairs("eval.jsonl")
    assert len(train) >= 1500
    assert len(held_out) >= 240
    for pair in train + held_out:
        assert pair.keys() == {"prompt", "chosen", "rejected"}
        assert all(pair.values())
        assert pair["chosen"] != pair["rejected"]
    assert not {pair["prompt"] for pair in train} & {pair["prompt"] for pair in held_out}


@pytest.mark.parametrize("name", ["train.jsonl", "eval.jsonl"])
def test_length_gives_nothing_away(name: str, tokenizer: PreTrainedTokenizerBase):
    pairs = read_pairs(name)
    chosen, rejected = (
        tokenizer([pair[side] for pair in pairs]).input_ids for side in ("chosen", "rejected")
    )
    num_longer = sum(len(c) > len(r) for c, r in zip(chosen, rejected, strict=True))
    assert 0.45 <= num_longer / len(pairs) <= 0.55


def test_committed_pairs_are_what_the_script_makes(script: ModuleType):
    assert (
        script.make_pairs(0) == script.make_pairs(0) == (read_pairs("train.jsonl"), read_pairs("eval.jsonl"))
    )


def test_base_never_saw_an_eval_prompt(script: ModuleType):
    conversations = script.make_conversations(0, 2000)
    seen = {message["content"] for messages in conversations for message in messages}
    assert not seen & {pair["prompt"] for pair in read_pairs("eval.jsonl")}


def test_special_tokens_and_template(tokenizer: PreTrainedTokenizerBase):
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    messages = [{"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "<|user|>\nHi</s>\n<|assistant|>\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text


@torch.no_grad()
def test_base_loads_and_prefers_neither_side(tokenizer: PreTrainedTokenizerBase):
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    assert model.num_parameters() < 1_600_000
    pairs = read_pairs("eval.jsonl")

    def average_logps(side: str) -> torch.Tensor:
        """Average log-likelihood of each response's tokens, stop token included."""
        prompts = tokenizer.apply_chat_template(
            [[{"role": "user", "content": pair["prompt"]}] for pair in pairs],
            add_generation_prompt=True,
            return_dict=False,
        )
        responses = tokenizer([pair[side] + tokenizer.eos_token for pair in pairs]).input_ids
        longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        ids = torch.zeros(len(pairs), longest, dtype=torch.long)
        scored = torch.zeros(len(pairs), longest, dtype=torch.bool)
        for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            end = len(prompt) + len(response)
            ids[row, :end] = torch.tensor(prompt + response)
            scored[row, len(prompt) : end] = True
        logps = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
        return (logps * scored[:, 1:]).sum(1) / scored.sum(1)

    chosen, rejected = average_logps("chosen"), average_logps("rejected")
    assert 0.4 <= (chosen > rejected).double().mean() <= 0.6
    assert chosen.mean() > -1.0  # it knows the tasks: about 7 when untrained
