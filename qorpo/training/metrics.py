"""What a run measures: each step's figures and the evaluations, written down, told, and read back on resume."""

import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import psutil
import torch

from qorpo.data.groups import Group, row_tokens
from qorpo.engine.distributed import gathered
from qorpo.errors import RunError
from qorpo.training.progress import Progress
from qorpo.training.run_folder import RunFolder


class Metrics:
    """A run's figures, from the device to metrics.jsonl, the trackers and the person.

    A step's stay on the device until they are written: one wait for it an interval, none a step.

    Args:
        track: hands metrics of a step to the trackers.
    """

    def __init__(
        self,
        folder: RunFolder,
        progress: Progress,
        track: Callable[[dict[str, float], int], None],
        device: torch.device,
    ):
        self.folder, self.progress, self.track, self.device = folder, progress, track, device
        self.last_step: dict[str, float] = {}
        self.evaluations: dict[int, dict[str, float]] = {}  # by step, the start's at 0
        self._clear()

    def _clear(self) -> None:
        """Forget the steps so far: they are on disk."""
        self._unwritten: list[Mapping[str, Any]] = []
        self._groups = self._tokens = 0
        self._seconds = 0.0

    def add_step(self, groups: Sequence[Group], figures: Mapping[str, Any], seconds: float) -> None:
        """One more step: its groups, its figures by name (numbers or tensors of one element), and its time."""
        self._unwritten.append(figures)
        self._speed_name = speed_name(groups)
        self._groups += len(groups)
        self._tokens += sum(map(row_tokens, groups))
        self._seconds += seconds

    def write_steps(self, last: int, steps_per_epoch: int) -> None:
        """Write the steps added since the last time, a line each, of which `last` is the number of the last.

        Raises:
            RunError: where one's loss or gradient is no number.
        """
        if not self._unwritten:
            return
        figures = self._read()
        rows: list[dict[str, Any]] = [
            {"step": step, "epoch": step / steps_per_epoch, **row}
            for step, row in enumerate(figures, start=last - len(figures) + 1)
        ]
        self.folder.append_metrics(rows)
        self._clear()
        for row in rows:
            self.track(_without_step(row), row["step"])
        for row in rows:
            if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
                raise _diverged(row["step"], f"loss {row['loss']}, gradient norm {row['grad_norm']}")
        self.last_step = _without_step(rows[-1])
        self.progress.logged(last, {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]})

    def _read(self) -> list[dict[str, float]]:
        """The figures of each step, with the speeds of them all."""
        started = time.perf_counter()
        names = list(self._unwritten[0])
        entries = [
            torch.as_tensor(gathered(figures[name]), dtype=torch.float64, device=self.device)
            for figures in self._unwritten
            for name in names
        ]
        values = torch.stack(entries).view(-1, len(names)).tolist()
        seconds = self._seconds + time.perf_counter() - started
        speeds = {
            "tokens_per_second": self._tokens / seconds,
            self._speed_name: self._groups / seconds,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        return [dict(zip(names, row, strict=True)) | speeds for row in values]

    def write_evaluation(self, step: int, metrics: dict[str, float]) -> None:
        """Raises RunError where its loss is no number."""
        self.folder.append_metrics([{"step": step, **metrics}])
        self.track(metrics, step)
        self.progress.evaluated(step, metrics)
        if not math.isfinite(metrics["eval_loss"]):
            raise _diverged(step, f"evaluation loss {metrics['eval_loss']}")
        self.evaluations[step] = metrics

    def read_back(self, last: int) -> None:
        """Go on after the step `last`, -1 for nothing: later lines are dropped, those before known again."""
        self.folder.cut_metrics(last)
        self.folder.wait()  # until the main rank has
        for row in self.folder.read_metrics():
            if "eval_loss" in row:
                self.evaluations[row["step"]] = _without_step(row)
            else:
                self.last_step = _without_step(row)


def _without_step(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name != "step"}


def _diverged(step: int, figures: str) -> RunError:
    return RunError(
        f"step {step}: {figures}: training has diverged; lower train.learning_rate or raise train.warmup_ratio, "
        "and start anew"
    )


def speed_name(groups: Sequence[Group]) -> str:
    """What the number of groups a second is called: pairs are what most people have."""
    return "pairs_per_second" if len(groups[0].responses) == 2 else "groups_per_second"


def why_early(
    evaluations: Mapping[int, Any],
    best_step: int | None,
    step: int,
    total_steps: int,
    patience: int | None,
    metric: str,
) -> str | None:
    """Why a run ends before its last step, by `train.early_stopping`; None where it does not."""
    since = [at for at in evaluations if best_step is not None and at > best_step]
    if patience is None or len(since) < patience or step == total_steps:
        return None
    return (
        f"stopped after step {step} of {total_steps}: {len(since)} evaluations in a row with no better {metric} than step "
        f"{best_step} has (train.early_stopping: {patience})"
    )


def peak_memory_gib(device: torch.device) -> float:
    """The most memory reserved on a CUDA device so far, else this process's peak resident set, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
