"""What a person reads at a run's end. It makes lines; the command line prints them."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

# The metrics that a person looks at first, in this order; those of an objective's own follow in its order.
FIRST = (
    "loss", "nll", "odds_ratio_loss", "log_odds_ratio", "rewards/accuracies", "rewards/margins", "chosen_logps",
    "rejected_logps",
)  # fmt: skip


def closing(result: Any) -> list[str]:
    """What a finished run (a `TrainResult`) made of the model, and what can be done with it.

    The held-out metrics at the start, at the best and at the end stand side by side, and beside them the last step's.
    """
    best = result.best_step
    lines = [f"{result.trained.name}: {result.trained}"]
    columns = {}
    if result.evaluations:
        last = max(result.evaluations)
        titles = {0: "held-out start", last: "held-out end"}
        if best is not None:
            which = "the start (step 0)" if best == 0 else f"step {best} of {result.steps}"
            metric = result.trainer.objective.headline.metric
            lines.append(f"kept: {which}, the best by held-out {metric}")
            titles = {0: "held-out start", best: f"best (step {best})"} | titles
        columns = {
            title: {name.removeprefix("eval_"): value for name, value in result.evaluations[step].items()}
            for step, title in titles.items()
            if step in result.evaluations
        }
    if result.stopped_early:
        lines.append(result.stopped_early)
    lines += _table(columns | {"last step": result.last_step})
    if result.report:
        lines += ["", result.verdict, f"report: {result.report}"]
    if result.warning:
        return [*lines, "", result.warning]
    return [*lines, "", "next:", *(f"  {command}" for command in _next_commands(result))]


def _table(columns: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A line for each name with its value in every column that has one."""
    known = dict.fromkeys(name for column in columns.values() for name in column)
    names = [name for name in FIRST if name in known] + [name for name in known if name not in FIRST]
    rows = [["", *columns]]
    for name in names:
        rows.append([name, *(figure(column[name]) if name in column else "" for column in columns.values())])
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table's rows as lines: the first column to the left, the others to the right."""
    first, *others = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join([name.ljust(first), *map(str.rjust, values, others)]).rstrip() for name, *values in rows
    ]


def figure(value: float) -> str:
    """A number to four significant digits: 0.2910, 1.2e-05, 5953."""
    return f"{value:#.4g}".rstrip(".") if 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"


def _next_commands(result: Any) -> list[str]:
    run, length = shlex.quote(str(result.output)), result.trainer.recipe.train
    if result.stopped_early:
        longer = "early_stopping=null"
    else:
        longer = f"max_steps={2 * result.steps}" if length.max_steps else f"epochs={length.epochs + 1:g}"
    go_on = f"qorpo train {run}/recipe.yaml --resume train.{longer}   # to train on"
    talk = f"qorpo chat {run}   # ask it something"
    if result.trainer.recipe.tuning == "full":
        return [talk, go_on]
    return [talk, f"qorpo merge {run} --output {run}-merged   # one model, in the base's weights", go_on]
