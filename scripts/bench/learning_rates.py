"""Which learning rate an objective's adapters take: short runs from the same start, one a rate, scored on held-out pairs.

    nice python scripts/bench/learning_rates.py --base BASE --train pairs.train.jsonl --eval pairs.eval.jsonl \
        --objectives orpo,sft,dpo --rates 1e-4,3e-4,1e-3,3e-3 [--output FILE]

A line an objective: what the held-out pairs score at the start and at each rate's end, and the rate with the best of the
objective's own headline (its loss). It is where `train.learning_rate: auto` comes from for adapters.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _record import add_output_option, count, emit

from qorpo import train
from qorpo.recipe import OBJECTIVES

METRICS = ("loss", "nll", "log_odds_ratio", "rewards/accuracies", "chosen_logps", "rejected_logps")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="demo", help="a model folder, or demo")
    parser.add_argument("--train", default="demo", help="a file of pairs, or demo")
    parser.add_argument("--eval", default="demo:eval", help="a file of pairs, or demo:eval")
    parser.add_argument("--objectives", default="orpo,sft", help=f"of {', '.join(OBJECTIVES)}")
    parser.add_argument("--rates", default="1e-4,3e-4,1e-3,3e-3")
    parser.add_argument("--steps", type=count, default=60)
    parser.add_argument("--pairs-per-step", type=count, default=8)
    parser.add_argument("--max-length", type=count, default=192)
    parser.add_argument("--quantization", choices=["nf4", "none"], default="none")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=count, default=1)
    add_output_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = ("steps", "pairs_per_step", "max_length", "quantization", "seed")
    settings = {name: getattr(options, name) for name in names}
    settings |= {"base": Path(options.base).name, "train": Path(options.train).name}
    for objective in options.objectives.split(","):
        rates = [float(rate) for rate in options.rates.split(",")]
        figures = measure(options, objective, rates)
        emit("learning_rates", settings | {"objective": objective}, figures, "cpu", options.output)


def measure(options: argparse.Namespace, objective: str, rates: list[float]) -> dict[str, Any]:
    """Held-out metrics at the start and at the end by rate, and the best rate by the objective's headline."""
    start, ends = {}, {}
    for rate in rates:
        with tempfile.TemporaryDirectory() as scratch:
            result = train(recipe_of(options, objective, rate, Path(scratch) / "run"))
        headline = result.trainer.objective.headline
        start, ends[rate] = (held_out(result.evaluations[step], headline) for step in (0, options.steps))
    sign = 1 if headline.lower_is_better else -1
    best = min(rates, key=lambda rate: sign * ends[rate][headline.metric])
    return {"start": start, "ends": {f"{rate:g}": ends[rate] for rate in rates}, "best_rate": best}


def held_out(metrics: dict[str, float], headline: Any) -> dict[str, float]:
    names = dict.fromkeys([headline.metric, *METRICS])
    return {name: metrics[f"eval_{name}"] for name in names if f"eval_{name}" in metrics}


def recipe_of(options: argparse.Namespace, objective: str, rate: float, output: Path) -> dict[str, Any]:
    return {
        "model": {"path": options.base, "quantization": options.quantization},
        "data": {
            "train": options.train, "eval": options.eval, "max_length": options.max_length,
            "max_prompt_length": options.max_length // 2,
        },
        "objective": {"name": objective},
        "train": {
            "pairs_per_step": options.pairs_per_step, "max_steps": options.steps, "eval_every": options.steps,
            "save_every": options.steps, "learning_rate": rate, "seed": options.seed, "report_to": [],
        },
        "output": str(output),
    }  # fmt: skip


if __name__ == "__main__":
    main()
