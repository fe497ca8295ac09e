"""A recipe's values tried in turn: `qorpo sweep`. Each combination is a run of its own, and a page compares them."""

import gc
import itertools
import logging
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from qorpo.engine.distributed import this_process
from qorpo.errors import RecipeError, RunError
from qorpo.recipe import Recipe, load_recipe
from qorpo.reports.run_files import read_run
from qorpo.reports.write import write_report
from qorpo.storage import Lock, make_folder, read_note, write_json
from qorpo.training.progress import Progress
from qorpo.training.run import merge_saved, train
from qorpo.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

MOST_RUNS = 100
PLAN = "sweep.json"  # what the folder is a sweep of, and which of its runs were ended early
NAME = "report.html"


@dataclass(frozen=True)
class SweepResult:
    """What a sweep left behind."""

    output: Path
    runs: list[Path]
    stopped: dict[str, str]  # runs that were ended early, by name, and why
    report: Path | None
    verdicts: list[str]


class _HopelessError(Exception):
    """Ends a run from its progress; the message says why."""


class _Judge(Progress):
    """Ends a run whose held-out figure is worse than the median of the runs before it at the same step (the median
    rule of Vizier, Golovin et al. 2017)."""

    def __init__(
        self, inner: Progress, metric: str, lower_is_better: bool, others: Sequence[dict[int, float]]
    ):
        self.inner, self.metric, self.lower_is_better, self.others = inner, metric, lower_is_better, others
        self.scored, self.start, self.step = inner.scored, inner.start, inner.step  # type: ignore[method-assign]
        self.logged, self.close = inner.logged, inner.close  # type: ignore[method-assign]

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:  # type: ignore[override]
        self.inner.evaluated(step, metrics)
        value = metrics.get(f"eval_{self.metric}", math.nan)
        seen = sorted(run[step] for run in self.others if step in run)
        if step == 0 or len(seen) < 2:
            return
        median = seen[(len(seen) - 1) // 2] if not self.lower_is_better else seen[len(seen) // 2]
        if (value > median) if self.lower_is_better else (value < median):
            raise _HopelessError(
                f"held-out {self.metric} {value:.4f} at step {step} is worse than the {median:.4f} of the runs before it"
            )


def sweep(
    recipe: str,
    changes: Sequence[str],
    *,
    stop_early: bool = False,
    progress: Progress | None = None,
) -> SweepResult:
    """Train a recipe once for each combination of values, one after another, and compare the runs.

    Runs that are finished are left as they are, and one that was broken off goes on: the same command again ends the
    sweep. The folder is the recipe's `output`, each run's a folder in it.

    Args:
        changes: `key.sub=value`; of one with several values, `objective.lambda=0.1,0.5`, each is tried.
        stop_early: end a run that is worse than the median of those before it, at the same step.

    Raises:
        RecipeError: where nothing is to be tried, or a combination makes no recipe. RunError: where the folder holds
            another sweep, or several processes are to run one.
    """
    if this_process().num_processes > 1:
        raise RunError("a sweep runs in one process; start each run of it by torchrun")
    fixed, tried = _parted(changes)
    base = load_recipe(recipe, fixed)
    output = Path(base.output).expanduser()
    recipes = {
        name: load_recipe(recipe, [*fixed, *own, f"output={output / name}"]) for name, own in tried.items()
    }
    if stop_early and base.data.eval is None:
        raise RecipeError("--stop-early compares held-out figures; set data.eval, for example to 0.02")
    plan = {"recipe": base.to_dict(), "runs": {name: list(own) for name, own in tried.items()}}
    with Lock(output):
        _check_same(output, plan)
        stopped = (
            dict((read_note(output / PLAN) or {}).get("stopped") or {}) if (output / PLAN).exists() else {}
        )
        folder = RunFolder(output)
        with folder.writing():
            make_folder(output)
            write_json(output / PLAN, {**plan, "stopped": stopped})
        metric, lower = _judged_by(base, tried)
        curves: list[dict[int, float]] = []
        for number, (name, each) in enumerate(recipes.items(), start=1):
            logger.info("run %d of %d: %s", number, len(recipes), name)
            if name not in stopped:
                judge = _Judge(progress or Progress(), metric, lower, curves) if stop_early else progress
                try:
                    _run(each, judge)
                except _HopelessError as reason:
                    logger.info("%s: ended early: %s", name, reason)
                    stopped[name] = str(reason)
                    with folder.writing():
                        write_json(output / PLAN, {**plan, "stopped": stopped})
            curves.append(_curve(output / name, metric))
        return _compared(output, list(recipes), stopped)


def _parted(changes: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """The changes that all runs share, and for each run, by its folder's name, its own."""
    fixed, tried = [], []
    for change in changes:
        key, equals, values = change.partition("=")
        parts = [part.strip() for part in values.split(",")]
        if equals and len(parts) > 1 and not values.strip().startswith(("[", "{", '"', "'")):
            if len(set(parts)) < len(parts) or "" in parts:
                raise RecipeError(f"{change!r}: each value once, and none empty, such as {key}=0.1,0.5")
            tried.append([f"{key.strip()}={part}" for part in parts])
        else:
            fixed.append(change)
    if not tried:
        raise RecipeError("nothing to try; give a key several values, such as objective.lambda=0.1,0.5,1.0")
    combinations = list(itertools.product(*tried))
    if len(combinations) > MOST_RUNS:
        raise RecipeError(f"{len(combinations):,} runs; {MOST_RUNS} at most: give fewer values")
    names = {"-".join(_short(change) for change in own): list(own) for own in combinations}
    if len(names) < len(combinations):
        raise RecipeError("two runs would have one name; give values that differ in letters or digits")
    return fixed, names


def _short(change: str) -> str:
    """What a run's folder says of a change: objective.lambda=0.1 is lambda_0.1."""
    key, _, value = change.partition("=")
    plain = "".join(letter if letter.isalnum() or letter in ".+" else "_" for letter in value)
    return f"{key.rpartition('.')[2]}_{plain}"[:80]


def _check_same(output: Path, plan: dict) -> None:
    """Raises RunError where the folder holds something else than this sweep."""
    if not (output / PLAN).exists():
        if (output / "recipe.yaml").exists():
            raise RunError(f"output: {output} holds a run; give the sweep another output")
        return
    saved = read_note(output / PLAN)
    if saved is not None and {name: saved.get(name) for name in plan} != plan:
        raise RunError(
            f"output: {output} holds another sweep; give the same values and recipe to go on with it, or another output"
        )


def _run(recipe: Recipe, progress: Progress | None) -> None:
    """To its end; nothing where it has come there before. What it held is given back, so that the next one has it."""
    folder = RunFolder(recipe.output)
    is_there = folder.recipe.exists()
    if is_there and any((folder.path / name).is_dir() for name in ("adapter", "model")):
        merge_saved(load_recipe(folder.recipe), recipe)  # the same run, or it raises
        return
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        train(recipe, resume=is_there, progress=progress)
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _judged_by(recipe: Recipe, tried: dict[str, list[str]]) -> tuple[str, bool]:
    """The held-out metric by which runs are compared, and whether less is better.

    Losses of different objectives are not of one kind; accuracies are.
    """
    differ = any(change.startswith("objective.") for own in tried.values() for change in own)
    return ("rewards/accuracies", False) if differ and recipe.objective.name != "sft" else ("loss", True)


def _curve(run: Path, metric: str) -> dict[int, float]:
    found = read_run(run).evaluations
    return {step: row[metric] for step, row in found.items() if metric in row}


def _compared(output: Path, names: list[str], stopped: dict[str, str]) -> SweepResult:
    runs = [output / name for name in names]
    try:
        report, verdicts = write_report(runs, output / NAME)
    except Exception as error:  # the runs are there; a page that can't be drawn takes nothing from them
        again = " ".join(shlex.quote(str(run)) for run in runs)
        logger.warning("the page could not be drawn (%s); `qorpo report %s` tries again", error, again)
        return SweepResult(output, runs, stopped, None, [])
    return SweepResult(output, runs, stopped, report, verdicts)
