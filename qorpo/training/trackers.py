"""What a run reports to beside its own files (TensorBoard, W&B, …), through accelerate."""

import contextlib
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator

from qorpo.training.run_folder import RunFolder

SECONDS_FOR_THREADS = 1.0


class Trackers:
    """The trackers that an accelerator was made with. A failed write of theirs ends the run with one message."""

    def __init__(self, accelerator: Accelerator, folder: RunFolder):
        self.accelerator, self.folder = accelerator, folder

    @contextmanager
    def open(self, recipe: dict[str, Any]) -> Iterator[None]:
        """Begin to report, and close the trackers at the end, also of a run that failed."""
        with _failed_threads() as failed:
            if self.accelerator.log_with:
                with self.folder.writing():
                    self.accelerator.init_trackers("qorpo", _flat(recipe))
            try:
                yield
            except BaseException:
                with contextlib.suppress(Exception):  # the first error is the one to tell
                    self.accelerator.end_training()
                raise
            with self.folder.writing():
                self.accelerator.end_training()
                if failed:
                    raise failed[0]

    def log(self, metrics: dict[str, float], step: int) -> None:
        with self.folder.writing():
            self.accelerator.log(metrics, step=step)


@contextmanager
def _failed_threads() -> Iterator[list[OSError]]:
    """Failed writes of threads, such as TensorBoard's, which otherwise print a traceback."""
    failed: list[OSError] = []
    before, running = threading.excepthook, set(threading.enumerate())

    def note(thread: threading.ExceptHookArgs) -> None:
        if isinstance(thread.exc_value, OSError):
            failed.append(thread.exc_value)
        else:
            before(thread)

    threading.excepthook = note
    try:
        yield failed
    except BaseException:
        end = time.monotonic() + SECONDS_FOR_THREADS  # one that fails now still prints
        for thread in set(threading.enumerate()) - running:
            thread.join(max(0.0, end - time.monotonic()))
        raise
    finally:
        threading.excepthook = before


def _flat(nested: dict[str, Any]) -> dict[str, Any]:
    """Keys by dotted path, values that every tracker takes."""
    flat = {}
    for section, value in nested.items():
        for name, entry in value.items() if isinstance(value, dict) else [("", value)]:
            flat[f"{section}.{name}".rstrip(".")] = (
                entry if isinstance(entry, int | float | str) else str(entry)
            )
    return flat
