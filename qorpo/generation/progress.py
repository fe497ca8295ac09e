"""How far generating is: a bar of answers on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

SECONDS_BETWEEN_LINES = 10


@contextmanager
def answers_made(console: Console) -> Iterator[Callable[[int, int, int], None]]:
    """Something to tell of (answers done, answers in all, tokens made by now)."""
    bar = Progress(
        TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TextColumn("left"), TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task("generating", total=None, rate="")
    began: tuple[float, int] | None = None  # when, and how many were there already
    last_line = 0.0

    def on_progress(done: int, total: int, tokens: int) -> None:
        nonlocal began, last_line
        now = time.monotonic()
        if began is None:
            began = now, done
            bar.start()
        seconds = now - began[0]
        rate = f"{tokens / seconds:,.0f} tokens/s" if tokens and seconds else ""
        bar.update(task, completed=done, total=total, rate=rate)
        if not console.is_terminal and (now - last_line > SECONDS_BETWEEN_LINES or done == total):
            last_line = now
            left = (total - done) * seconds / (done - began[1]) if done > began[1] else None
            parts = [f"answered {done}/{total}", rate, "" if left is None else f"left {_clock(left)}"]
            console.print("  ".join(filter(None, parts)), markup=False, highlight=False, soft_wrap=True)

    try:
        yield on_progress
    finally:
        bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
