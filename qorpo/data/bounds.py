"""Running what others wrote within bounds of time and memory: in a process of its own, or, at a lower price, in this one."""

import contextlib
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

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


class OutOfBoundsError(Exception):
    """What others wrote took more time or memory than it may."""


@contextlib.contextmanager
def within_bounds() -> Iterator[None]:
    """Ends a block after SECONDS of this process's own time, or where it takes MOST_BYTES more memory, in some 20 µs.

    Time is bounded in the main thread alone, where Python handles signals, and only between two of Python's steps.
    Nothing is bounded where the system has no such limits (Windows; macOS has the time alone).

    Raises:
        OutOfBoundsError: then.
    """
    is_timed = hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
    with contextlib.ExitStack() as stack:
        stack.callback(_cap_memory())
        if is_timed:
            stack.callback(signal.signal, signal.SIGVTALRM, signal.signal(signal.SIGVTALRM, _time_is_up))
            stack.callback(signal.setitimer, signal.ITIMER_VIRTUAL, 0)
            signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        try:
            yield
        except MemoryError:
            raise OutOfBoundsError from None


def _time_is_up(*_: Any) -> None:
    raise OutOfBoundsError


def _cap_memory() -> Callable[[], None]:
    """Let this process take MOST_BYTES more than it has; returns what takes that back."""
    try:
        import resource

        with open("/proc/self/statm", "rb", buffering=0) as file:
            has = int(file.read(64).split()[0]) * resource.getpagesize()
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        if soft == resource.RLIM_INFINITY or soft > has + MOST_BYTES:
            resource.setrlimit(resource.RLIMIT_AS, (has + MOST_BYTES, hard))
            return lambda: resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    except (ImportError, OSError, ValueError):
        pass
    return lambda: None


def _limit() -> None:
    import resource

    import psutil

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    most = psutil.Process().memory_info().vms + MOST_BYTES
    with contextlib.suppress(ValueError, OSError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
