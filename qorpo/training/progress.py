"""What a run tells while it goes: a bar with time left on a terminal, a line a log interval elsewhere."""

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

WIDTH = 100  # of a line, in columns
# (metric, label, format), in the order a person reads them: what no longer fits a line is left out from the end.
SHOWN = (
    ("loss", "loss", ".4f"),
    ("rewards/accuracies", "accuracy", ".3f"),
    ("log_odds_ratio", "log odds", "+.3f"),
    ("learning_rate", "lr", ".1e"),
    ("pairs_per_second", "pairs/s", ",.1f"),
    ("groups_per_second", "groups/s", ",.1f"),
)
SHOWN_HELD_OUT = (
    ("loss", "loss", ".4f"),
    ("rewards/accuracies", "accuracy", ".3f"),
    ("log_odds_ratio", "log odds", "+.3f"),
    ("chosen_logps", "chosen", ".3f"),
    ("rejected_logps", "rejected", ".3f"),
    ("nll", "nll", ".4f"),
)


class Progress:
    """The silent one, and what the others answer to."""

    def scored(self, done_groups: int, total_groups: int) -> None:
        """Before training, so many groups are scored for the reference."""

    def start(self, done_steps: int, total_steps: int) -> None:
        """Training begins, or goes on, after `done_steps` of `total_steps`."""

    def step(self, done_steps: int) -> None:
        """A step is done."""

    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        """A log interval is over; `metrics` are its means."""

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """An evaluation is done; its metrics carry an `eval_` prefix."""

    def close(self) -> None:
        """Training is over, however it ended."""


class ConsoleProgress(Progress):
    """Writes to a console: a bar where it is a terminal, plain lines where it is not."""

    def __init__(self, console: Console):
        self.console = console
        self.total_steps = 0
        self.tenths_scored = 0
        self.started_at = 0.0
        self.started_with = 0
        self.bar = Bar(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[figures]}"),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip
        self.task = self.bar.add_task("training", total=None, figures="")

    def scored(self, done_groups: int, total_groups: int) -> None:
        self.bar.start()
        self.bar.update(self.task, description="reference", total=total_groups, completed=done_groups)
        tenths = 10 * done_groups // total_groups
        if tenths > self.tenths_scored and not self.console.is_terminal:
            self._line(f"reference: {done_groups:,} of {total_groups:,} rows are scored")
        self.tenths_scored = tenths

    def start(self, done_steps: int, total_steps: int) -> None:
        self.total_steps, self.started_at, self.started_with = total_steps, time.monotonic(), done_steps
        self.bar.start()
        self.bar.reset(self.task, description="training", total=total_steps, completed=done_steps, figures="")

    def step(self, done_steps: int) -> None:
        self.bar.update(self.task, completed=done_steps)

    def logged(self, step: int, metrics: Mapping[str, float]) -> None:
        if self.console.is_terminal:
            self.bar.update(self.task, figures=_figures(metrics, SHOWN[:3]))
        else:
            self._figures_line(step, "", metrics, SHOWN, f"left {self._time_left(step)}")

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        plain = {name.removeprefix("eval_"): value for name, value in metrics.items()}
        self._figures_line(step, "held out: ", plain, SHOWN_HELD_OUT)

    def close(self) -> None:
        self.bar.stop()

    def _figures_line(
        self,
        step: int,
        what: str,
        metrics: Mapping[str, float],
        shown: Sequence[tuple[str, str, str]],
        end: str = "",
    ) -> None:
        """One line of at most WIDTH columns."""
        start = f"step {step:,}/{self.total_steps:,}  {what}"
        room = WIDTH - len(start) - (len(end) + 2 if end else 0)
        while shown and len(_figures(metrics, shown)) > room:
            shown = shown[:-1]
        text = start + _figures(metrics, shown) + (f"  {end}" if end else "")
        self._line(text)

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        rate = (time.monotonic() - self.started_at) / max(step - self.started_with, 1)
        minutes, seconds = divmod(round(rate * (self.total_steps - step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}"


def _figures(metrics: Mapping[str, float], shown: Sequence[tuple[str, str, str]]) -> str:
    return "  ".join(f"{label} {metrics[name]:{form}}" for name, label, form in shown if name in metrics)
