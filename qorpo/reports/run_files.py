"""A run's folder read for a report: finished, still going, or with what a kill left torn."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qorpo.build import build_objective
from qorpo.data.counts import DataReport
from qorpo.errors import RunError
from qorpo.objectives.base import Objective
from qorpo.printable import printable
from qorpo.recipe import Recipe, load_recipe
from qorpo.reports.pair_values import PairValues, held_out_file
from qorpo.storage import read_note

logger = logging.getLogger(__name__)

EVAL = "eval_"
TEMPLATE = "chat_template.jinja"
Row = dict[str, float]  # metrics by name


@dataclass(frozen=True)
class RunFiles:
    """What a run's folder says so far.

    steps, evaluations: metrics by step, ascending; evaluations without their prefix, the start's at 0.
    unread_lines: lines of metrics.jsonl that are no metrics.
    """

    path: Path
    recipe: Recipe
    steps: dict[int, Row]
    evaluations: dict[int, Row]
    data: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    unread_lines: int = 0

    @property
    def name(self) -> str:
        return printable(self.path.name)

    @cached_property
    def objective(self) -> Objective:
        return build_objective(self.recipe.objective)

    @property
    def last_step(self) -> int:
        return max([0, *self.steps, *self.evaluations])

    @cached_property
    def total_steps(self) -> int | None:
        """None where the run has not told yet how many steps an epoch has."""
        settings = self.recipe.train
        if settings.max_steps:
            return settings.max_steps
        for step, row in self.steps.items():
            if row.get("epoch", 0) > 0:
                return max(1, round(float(settings.epochs) * round(step / row["epoch"])))
        return None

    @property
    def is_finished(self) -> bool:
        return any((self.path / name).is_dir() for name in ("adapter", "model"))

    @cached_property
    def kept_step(self) -> int | None:
        """The step with the best evaluation by the objective's headline, which the run keeps; None without any."""
        best = None
        for step in self.evaluations:
            value, so_far = self.headline_at(step), None if best is None else self.headline_at(best)
            if math.isfinite(value) and self.objective.headline.is_better(value, so_far):
                best = step
        return best

    def headline_at(self, step: int) -> float:
        """The evaluation's figure that counts; NaN where there is none."""
        return self.evaluations.get(step, {}).get(self.objective.headline.metric, math.nan)

    def data_report(self, name: str) -> DataReport | None:
        """What became of the records: of "train", "eval", or "split_from", both before the split."""
        found = self.data.get(name)
        try:
            return DataReport.from_dict(found) if found else None
        except (TypeError, AttributeError):  # of another version
            return None

    def values_at(self, step: int) -> PairValues | None:
        """Each held-out pair's figures, where the run wrote them at this step."""
        if step not in self._values:
            self._values[step] = PairValues.read(held_out_file(self.path, step))
        return self._values[step]

    @cached_property
    def _values(self) -> dict[int, PairValues | None]:
        return {}

    @property
    def chat_template(self) -> str | None:
        """The template that was written with the result."""
        for path in (self.path / "adapter" / TEMPLATE, self.path / "model" / TEMPLATE):
            if path.is_file():
                return path.read_text(encoding="utf-8", errors="replace")
        return None


def read_run(path: Path) -> RunFiles:
    """Raises RunError where the folder holds no run; RecipeError where its recipe can't be read."""
    path = path.expanduser().absolute()
    recipe = path / "recipe.yaml"
    if not recipe.is_file():
        raise RunError(f"{path}: holds no run (no recipe.yaml); give the folder that a recipe's output names")
    steps: dict[int, Row] = {}
    evaluations: dict[int, Row] = {}
    unread = 0
    for row in _rows(path / "metrics.jsonl"):
        if row is None:
            unread += 1
            continue
        step = int(row.pop("step"))
        if any(name.startswith(EVAL) for name in row):
            evaluations[step] = without_prefix(row)
        else:
            steps[step] = row
    if unread:
        logger.warning("%s: %d lines can't be read, and are left out", path / "metrics.jsonl", unread)
    notes = {
        name: (read_note(path / f"{name}.json") if (path / f"{name}.json").exists() else None) or {}
        for name in ("data", "environment")
    }
    return RunFiles(
        path, load_recipe(recipe), dict(sorted(steps.items())), dict(sorted(evaluations.items())),
        **notes, unread_lines=unread,
    )  # fmt: skip


def without_prefix(row: Mapping[str, float]) -> Row:
    """An evaluation's metrics by their own names."""
    return {name.removeprefix(EVAL): value for name, value in row.items()}


def _rows(path: Path) -> Iterator[dict[str, float] | None]:
    """Each line's numbers; None for a line that is no metrics, but for a last one that is still being written."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    for line in lines:
        try:
            row = json.loads(line)
            if not all(type(value) in (int, float) for value in row.values()) or row["step"] < 0:
                raise ValueError("no line of metrics")
            int(row["step"])
            yield {name: float(value) for name, value in row.items()}
        except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError):
            if line is not lines[-1] or line.endswith(b"\n"):
                yield None
