"""How far a merge is: a bar of bytes on a terminal, a line every tenth elsewhere where that takes a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

WORTH_A_LINE = 10**9


@contextmanager
def bytes_written(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Something to tell of (bytes done, bytes in all)."""
    bar = Progress(
        TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    task = bar.add_task("merging")
    tenths = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal tenths
        bar.update(task, completed=done, total=total)
        if not console.is_terminal and total > WORTH_A_LINE and done * 10 // total > tenths:
            tenths = done * 10 // total
            console.print(f"merged {tenths * 10}% of {total / 1e9:.2f} GB", highlight=False, soft_wrap=True)
        if done == total:
            bar.stop()

    try:
        yield on_progress
    finally:
        bar.stop()
