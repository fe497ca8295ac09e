"""Running what others wrote within bounds of time and memory, in a process of its own."""

import contextlib
import os
import time
import warnings
from collections.abc import Callable

SECONDS = 5
MOST_BYTES = 1 << 30
# A process that computes ends by its processor time. One that waits, for a lock that another thread held, never would.
SECONDS_ON_THE_CLOCK = 60


def stays_within_bounds(task: Callable[[], object]) -> bool:
    """Whether a task ends within SECONDS of processor time and MOST_BYTES more memory, by an error or not.

    It runs in a copy of this process, so what it does is not seen here. True where the system can't fork.
    """
    if not hasattr(os, "fork"):
        return True
    with warnings.catch_warnings():  # that there are threads: the child uses none of what they hold
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            _limit()
            with contextlib.suppress(Exception):
                try:
                    task()
                except MemoryError:
                    os._exit(1)
            code = 0
        finally:
            os._exit(code)
    started = time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        if time.monotonic() - started > SECONDS_ON_THE_CLOCK:
            os.kill(child, 9)
        time.sleep(0.002)


def _limit() -> None:
    import resource

    import psutil

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    most = psutil.Process().memory_info().vms + MOST_BYTES
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
