"""Run folders as training leaves them, made without training: figures of one's own choice, for reports."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qorpo.recipe import load_recipe
from qorpo.reports.pair_values import PairValues, held_out_file

PAIR_METRICS = (
    "loss",
    "nll",
    "log_odds_ratio",
    "chosen_logps",
    "rejected_logps",
    "rewards/accuracies",
    "rewards/margins",
)
DATA = {
    "train": {
        "read": 1020, "kept": 1000, "dropped": {"empty": 15, "tie": 5}, "noted": {"duplicate": 2},
        "examples": {"empty": ["a.jsonl:3"], "tie": ["a.jsonl:9"], "duplicate": ["a.jsonl:11"]}, "sources": [],
        "cut": {"prompt": 0, "chosen": 7, "rejected": 0},
        "tokens": {name: {"total": 1000, "mean": 10.5, "max": 40} for name in ("prompt", "chosen", "rejected")},
    },
    "eval": None, "split_from": None, "eval_prompts_in_train": 0,
}  # fmt: skip


def make_run(
    folder: Path,
    *,
    steps: int = 40,
    evaluations: Mapping[int, Mapping[str, float]] | None = None,
    values: Mapping[int, PairValues] | None = None,
    finished: bool = True,
    recipe: Mapping[str, Any] | None = None,
    **files: Any,
) -> Path:
    """A run whose training loss falls smoothly; its evaluations are those given, else the means of `values`.

    files: data and environment, in place of the usual ones.
    """
    folder.mkdir(parents=True)
    settings = {
        "model": {"path": "demo"},
        "data": {"train": "demo"},
        "train": {"max_steps": steps},
        "output": str(folder),
    }
    (folder / "recipe.yaml").write_text(
        load_recipe({**settings, **(recipe or {})}).to_yaml(), encoding="utf-8"
    )
    if evaluations is None:
        evaluations = {
            step: {name: float(np.mean(column)) for name, column in found.metrics.items()}
            for step, found in (values or {}).items()
        }
    rows = []
    for step in range(steps + 1):
        if step:
            rows.append({"step": step, "epoch": step / steps, **training_row(step / steps)})
        if step in evaluations:
            rows.append(
                {"step": step, **{f"eval_{name}": value for name, value in evaluations[step].items()}}
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "data.json").write_text(json.dumps(files.get("data", DATA)), encoding="utf-8")
    environment = {
        "device": "cpu, 2 cores",
        "qorpo": "0.1.0",
        "packages": {"torch": "2.13.0"},
        "processes": 1,
    }
    (folder / "environment.json").write_text(
        json.dumps(files.get("environment", environment)), encoding="utf-8"
    )
    for step, found in (values or {}).items():
        held_out_file(folder, step).parent.mkdir(exist_ok=True)
        found.write(held_out_file(folder, step))
    if finished:
        (folder / "adapter").mkdir()
    return folder


def training_row(done: float) -> dict[str, float]:
    return {
        "loss": 1.0 - 0.6 * done + 0.05 * math.sin(40 * done), "nll": 0.5 - 0.2 * done, "log_odds_ratio": 2 * done,
        "chosen_logps": -0.5 + 0.2 * done, "rejected_logps": -0.5 - done, "rewards/accuracies": 0.5 + done / 2,
        "rewards/margins": done, "grad_norm": 1.0 - done / 2, "learning_rate": 1e-4 * (1 - done),
        "tokens_per_second": 4000.0, "pairs_per_second": 32.0, "peak_memory_gib": 1.5,
    }  # fmt: skip


def pair_values(
    count: int = 100, *, loss: float = 1.0, accuracy: float = 0.5, chosen: float = -0.5, seed: int = 0,
    lengths: Sequence[Sequence[int]] | None = None,
) -> PairValues:  # fmt: skip
    """Values that scatter around these means, the same way for one seed; two pairs a prompt."""
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=count)
    noise -= noise.mean()
    right = np.zeros(count)
    right[: round(accuracy * count)] = 1
    columns = {
        "loss": loss + 0.2 * noise, "nll": -chosen + 0.1 * noise, "log_odds_ratio": 4 * (accuracy - 0.5) + 0.3 * noise,
        "chosen_logps": chosen - 0.1 * noise, "rejected_logps": chosen - 1.0 + 0.1 * noise,
        "rewards/accuracies": right, "rewards/margins": 0.1 + 0.05 * noise,
    }  # fmt: skip
    return PairValues(
        [f"eval.jsonl:{number}" for number in range(1, count + 1)],
        [number // 2 for number in range(count)],
        lengths or [(10 + number % 3, 10 + number % 5) for number in range(count)],
        {name: columns[name].tolist() for name in PAIR_METRICS},
    )
