"""SFT beside ORPO with λ 0 on the same pairs: the same model in the end, without the rejected answers' time.

    python scripts/bench/sft.py --base BASE --train pairs.train.jsonl --eval pairs.eval.jsonl [--output FILE]

One line: tokens a step and pairs per second of each (the median of alternating rounds), their negative log-likelihood at
the end, and what SFT did to held-out chosen and rejected answers (the paper's Fig. 3), with 95% intervals over prompts.
"""

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from _record import add_output_option, count, emit
from _training import Clock
from compare_runs import difference, score

from qorpo import Trainer
from qorpo.build import chat_format_of, load_data
from qorpo.data.groups import row_tokens
from qorpo.model.load import load_model
from qorpo.objectives.orpo import Orpo
from qorpo.recipe import load_recipe

OBJECTIVES: dict[str, dict[str, Any]] = {"sft": {"name": "sft"}, "orpo": {"name": "orpo", "lambda": 0.0}}
SPEED_FROM = 2  # the first steps warm up caches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="demo", help="a model folder, or demo")
    parser.add_argument("--train", default="demo", help="a file of pairs, or demo")
    parser.add_argument("--eval", default="0.1", help="a file of pairs, or a fraction of train")
    parser.add_argument("--steps", type=count, default=60)
    parser.add_argument("--pairs-per-step", type=count, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-length", type=count, default=512)
    parser.add_argument("--quantization", choices=["nf4", "none"], default="none")
    parser.add_argument("--rounds", type=count, default=3)
    parser.add_argument("--threads", type=count, default=2)
    add_output_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    rounds = [{name: run(options, name) for name in OBJECTIVES} for _ in range(options.rounds)]
    sft, orpo = rounds[0]["sft"], rounds[0]["orpo"]
    speeds = {name: [each[name]["pairs_per_second"] for each in rounds] for name in OBJECTIVES}
    ratios = [a / b for a, b in zip(speeds["sft"], speeds["orpo"], strict=True)]
    pairs, before, after = sft["eval_pairs"], sft["before"], sft["after"]
    prompts = [pair.prompt_ids for pair in pairs]
    figures = {
        "pairs": {name: each["train_pairs"] for name, each in rounds[0].items()},
        "tokens": {name: each["tokens"] for name, each in rounds[0].items()},
        "tokens_ratio": orpo["tokens"] / sft["tokens"],
        "pairs_per_second": {name: statistics.median(values) for name, values in speeds.items()},
        "speed_ratio": statistics.median(ratios),
        "speed_ratios": ratios,
        "train_nll": {name: each["train_nll"] for name, each in rounds[0].items()},
        "eval_nll": {name: float(each["after"]["nll"].mean()) for name, each in rounds[0].items()},
        "sft_start": {name: float(before[name].mean()) for name in ("chosen_logps", "rejected_logps")},
        "sft_change": {
            name: difference(after[name], before[name], prompts)
            for name in ("chosen_logps", "rejected_logps", "log_odds_ratio")
        },
    }
    settings = {
        name: getattr(options, name)
        for name in ("steps", "pairs_per_step", "learning_rate", "max_length", "quantization", "rounds")
    }
    settings |= {
        "base": Path(options.base).name,
        "train": Path(options.train).name,
        "prompts": len(set(prompts)),
    }
    emit("sft", settings, figures, "cpu", options.output)


def run(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """One training run, with what held-out pairs score before and after it."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = {
            "model": {"path": options.base, "quantization": options.quantization},
            "data": {
                "train": options.train, "eval": _number(options.eval), "max_length": options.max_length,
                "max_prompt_length": options.max_length // 2,
            },
            "objective": OBJECTIVES["orpo"],
            "train": {
                "pairs_per_step": options.pairs_per_step, "max_steps": options.steps, "eval_every": options.steps,
                "save_every": options.steps, "learning_rate": options.learning_rate, "report_to": [],
            },
            "output": str(Path(scratch) / "run"),
        }  # fmt: skip
        pairs = load_recipe(recipe)
        held_out = load_data(pairs, chat_format_of(pairs)).eval
        assert held_out is not None
        wanted = load_recipe(recipe | {"objective": OBJECTIVES[name]})
        chat = chat_format_of(wanted)
        data = load_data(wanted, chat)
        model = load_model(options.base, quantization=options.quantization)
        clock = Clock("cpu")
        trainer = Trainer(model, chat.tokenizer, wanted, data.train, progress=clock)
        before = score(trainer.session.scorer, held_out.groups, Orpo())
        means = trainer.train()
        after = score(trainer.session.scorer, held_out.groups, Orpo())
        steps = [trainer.groups_of_step(step) for step in range(SPEED_FROM, options.steps)]
    tokens = sum(row_tokens(group) for groups in steps for group in groups)
    (start, _), (end, _) = clock.step_ends[SPEED_FROM - 1], clock.step_ends[-1]
    return {
        "train_pairs": len(data.train.groups),
        "eval_pairs": held_out.groups,
        "tokens": tokens,
        "pairs_per_second": sum(map(len, steps)) / (end - start),
        "train_nll": means["nll"],
        "before": before,
        "after": after,
    }


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


if __name__ == "__main__":
    main()
