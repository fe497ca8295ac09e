"""SIGTERM and Ctrl-C end a run between two steps, with a checkpoint, never in the middle of one."""

import logging
import signal
import threading
import time
from types import FrameType
from typing import Any

from qorpo.engine.distributed import Ranks

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Within this, a second signal is the same one: a terminal and torchrun both send Ctrl-C to each process.
SECONDS_OF_ONE = 1.0


class StopSignals:
    """While it is entered a first signal is noted in `received`, and the run looks; a second one ends it at once.

    Only the main thread may hear of signals; in another one they do what they did before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._received_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def agreed(self, ranks: Ranks, waited: bool) -> signal.Signals | None:
        """The signal that came to this rank or another; None where the run goes on.

        Several ranks agree only where they have `waited` for the device anyway.
        """
        if ranks.count == 1:
            return self.received
        if not waited or ranks.all_are(self.received is None):
            return None
        return self.received or signal.SIGTERM

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number), now
            again = "; Ctrl-C again ends it at once" if number == signal.SIGINT else ""
            logger.warning("%s: the run ends after this step, with a checkpoint%s", self.received.name, again)
        elif now - self._received_at > SECONDS_OF_ONE:
            self.__exit__()
            signal.raise_signal(number)
