"""Tasks of lm-evaluation-harness (ARC, MMLU, HellaSwag, …; the paper's Table 9), by its Python API on a loaded model."""

import copy
import logging
import os
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qorpo.errors import DataError
from qorpo.evaluation.extra import needed
from qorpo.evaluation.results import Figure
from qorpo.intervals import Interval
from qorpo.out_of_memory import is_out_of_memory


def load_tasks(names: Sequence[str], folder: str | os.PathLike[str] | None = None) -> Any:
    """The harness' tasks or groups of these names, with their data.

    Args:
        folder: where tasks of one's own are, as YAML; the harness' are known without.

    Raises:
        DataError: for an unknown name, and data that can't be reached.
    """
    tasks = needed("lm_eval.tasks", "lm-eval")
    if folder is not None and not Path(folder).expanduser().is_dir():
        raise DataError(
            f"--task-folder {folder}: is no folder; give the one that holds the tasks' YAML files"
        )
    with _quiet():
        manager = tasks.TaskManager(include_path=None if folder is None else str(Path(folder).expanduser()))
        known = set(manager.all_tasks)
        if unknown := [name for name in names if name not in known]:
            raise DataError(
                f"lm-eval: unknown task {', '.join(unknown)}; `lm-eval ls tasks` lists the harness', and --task-folder "
                "takes your own"
            )
        try:
            return manager.load(list(names))
        except Exception as error:  # of datasets, the hub's client, or a task's own code
            if is_out_of_memory(error):
                raise
            raise DataError(
                f"lm-eval: {', '.join(names)}: can't be loaded ({_first_line(error)}); is its data set in reach or "
                "in the cache?"
            ) from error


def run_tasks(
    model: Any, tokenizer: Any, tasks: Any, *, limit: int | None = None, batch_size: int = 8
) -> dict[str, Figure]:
    """Every metric of every task and group, as `task metric`; intervals from the harness' standard errors.

    The chat template is applied, with few-shot examples as earlier turns, where the tokenizer has one.

    Args:
        model: of transformers, or PEFT's on one.
        limit: the first so many documents of each task.
    """
    harness = needed("lm_eval", "lm-eval")
    wrapper = needed("lm_eval.models.huggingface", "lm-eval").HFLM
    has_template = bool(tokenizer.chat_template)
    with _quiet():
        # A copy, since the harness sets padding aside in it.
        wrapped = wrapper(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        found = harness.evaluate(
            wrapped, tasks, limit=limit, log_samples=False,
            apply_chat_template=has_template, fewshot_as_multiturn=has_template,
        )  # fmt: skip
    return {
        f"{task} {name}": Figure(_with_interval(value, values.get(_error_of(metric))))
        for task, values in found["results"].items()
        for metric, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and "_stderr" not in metric
        if "," in metric
        for name in [metric.removesuffix(",none").replace(",", " ")]
    }


def _error_of(metric: str) -> str:
    name, _, filter_name = metric.partition(",")
    return f"{name}_stderr,{filter_name}"


def _with_interval(value: float, error: Any) -> Interval:
    if not isinstance(error, int | float):  # "N/A"
        return Interval(float(value))
    return Interval(float(value), float(value) - 1.96 * error, float(value) + 1.96 * error)


@contextmanager
def _quiet() -> Any:
    """Without the harness' running commentary; its errors are still said."""
    theirs = logging.getLogger("lm_eval")
    level = theirs.level
    theirs.setLevel(logging.ERROR)
    try:
        yield
    finally:
        theirs.setLevel(level)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
