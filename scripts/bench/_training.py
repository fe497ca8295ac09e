"""A run of qorpo on pairs that are tokens already, each step on the clock: what the training benchmarks share."""

import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import qorpo
from qorpo.data.groups import Group, TokenizedData
from qorpo.recipe import load_recipe
from qorpo.training.progress import Progress

LORA = {"rank": 16, "alpha": 32, "targets": "all-linear"}


@dataclass(frozen=True)
class Run:
    trainer: qorpo.Trainer
    step_ends: list[tuple[float, float]]  # seconds on the clock, and the processors' spent on this process
    losses: list[float]


def train(
    model: Any,
    tokenizer: Any,
    pairs: TokenizedData,
    *,
    steps: int,
    pairs_per_step: int,
    recipe: Mapping[str, Mapping[str, Any]],
) -> Run:
    """Train on the pairs in their order, from the first again where they end.

    Args:
        recipe: sections of a recipe, with what differs from its defaults.
    """
    longest = max(map(longest_sequence, pairs.groups))
    with tempfile.TemporaryDirectory() as scratch:
        settings: dict[str, Any] = {
            "model": {"path": "bench"},
            "data": {"train": "bench", "max_length": longest, "max_prompt_length": longest - 1},
            "lora": LORA,
            "train": {
                "pairs_per_step": pairs_per_step,
                "max_steps": steps,
                "save_every": steps,
                "log_every": steps,
                "report_to": [],
            },
            "output": str(Path(scratch) / "run"),
        }
        for name, section in recipe.items():
            settings[name] = {**settings.get(name, {}), **section}
        clock = Clock(model.device.type)
        trainer = InOrder(model, tokenizer, load_recipe(settings), pairs, progress=clock)
        trainer.train()
        lines = trainer.folder.metrics.read_text(encoding="utf-8").splitlines()
    return Run(trainer, clock.step_ends, [json.loads(line)["loss"] for line in lines])


class InOrder(qorpo.Trainer):
    def groups_of_step(self, step: int) -> list[Group]:
        size = self.recipe.train.pairs_per_step
        return [
            self.train_pairs[place % len(self.train_pairs)] for place in range(step * size, (step + 1) * size)
        ]


class Clock(Progress):
    """When each step ended, the device's work included."""

    def __init__(self, device: str):
        self.device = device
        self.step_ends: list[tuple[float, float]] = []

    def step(self, done_steps: int) -> None:
        self.step_ends.append(now(self.device))


def now(device: str) -> tuple[float, float]:
    """Seconds, and the processors' seconds spent on this process, which others' load disturbs less."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def longest_sequence(pair: Group) -> int:
    """Tokens of the prompt with the longer answer."""
    prompt, *answers = pair.lengths
    return prompt + max(answers)
