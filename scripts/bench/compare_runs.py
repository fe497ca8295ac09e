"""Do two runs differ on held-out pairs, and did each differ from its base? A paired bootstrap over prompts says.

Both runs must have the same base and evaluation pairs. Each pair is scored by run A, run B and the base alone; prompts
(not pairs: one prompt's pairs go together) are resampled, and the interval is the middle 95% of the resampled means.

    python scripts/bench/compare_runs.py runs/lambda-1 runs/lambda-0 [--output FILE]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _record import add_output_option, emit
from peft import PeftModel

from qorpo.build import build_objective, chat_format_of, load_data
from qorpo.data.groups import Group
from qorpo.engine.step import score_groups
from qorpo.intervals import mean_interval
from qorpo.model.load import load_model
from qorpo.model.scoring import Scorer
from qorpo.model.selfcheck import make_scorer
from qorpo.objectives.base import Objective
from qorpo.recipe import load_recipe

ROW_TOKENS = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run_a", type=Path)
    parser.add_argument("run_b", type=Path)
    add_output_option(parser)
    args = parser.parse_args()

    recipe = load_recipe(args.run_a / "recipe.yaml")
    objective = build_objective(recipe.objective)
    pairs = load_data(recipe, chat_format_of(recipe)).eval.groups
    model = load_model(recipe.model.path, quantization=recipe.model.quantization)
    model = PeftModel.from_pretrained(model, args.run_a / "adapter", adapter_name="a")
    model.load_adapter(args.run_b / "adapter", adapter_name="b")
    scorer = make_scorer(model, recipe.model.attention)

    scores = {}
    for run in ("a", "b"):
        model.set_adapter(run)
        scores[run] = score(scorer, pairs, objective)
    with model.disable_adapter():
        scores["base"] = score(scorer, pairs, objective)

    prompts = [pair.prompt_ids for pair in pairs]
    figures = {
        f"{first}-{second}": {
            name: difference(scores[first][name], scores[second][name], prompts) for name in objective.metrics
        }
        for first, second in (("a", "b"), ("a", "base"), ("b", "base"))
    }
    means = {
        run: {name: float(values[name].mean()) for name in objective.metrics}
        for run, values in scores.items()
    }
    settings = {"a": str(args.run_a), "b": str(args.run_b), "pairs": len(pairs), "prompts": len(set(prompts))}
    emit("compare_runs", settings, {"means": means, "differences": figures}, model.device.type, args.output)


def score(scorer: Scorer, pairs: Sequence[Group], objective: Objective) -> dict[str, np.ndarray]:
    """Every metric of every pair, (P,) each."""
    device = scorer.model.device
    scorer.eval()
    with scorer.packed_attention():
        found = score_groups(scorer, pairs, objective, microbatch_tokens=ROW_TOKENS, device=device)
    return {name: values.numpy() for name, values in found.items()}


def difference(first_P: np.ndarray, second_P: np.ndarray, prompts: list[tuple[int, ...]]) -> dict[str, float]:
    """Mean over pairs, with the 95% interval over resampled prompts."""
    found = mean_interval(first_P - second_P, prompts)
    return {"mean": found.value, "low": found.low, "high": found.high}


if __name__ == "__main__":
    main()
