"""What a run measures: each step's figures, and the evaluations."""

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import psutil
import torch

from qorpo.data.pack import row_tokens
from qorpo.data.tokenize import TokenizedPair
from qorpo.engine.distributed import gathered


class StepMetrics:
    """Each step's figures, kept on the device until they are read: one wait for it an interval, none a step."""

    def __init__(self, device: torch.device):
        self.device = device
        self.clear()

    def clear(self) -> None:
        """Forget the steps so far: they are on disk."""
        self._figures: list[Mapping[str, Any]] = []
        self._pairs = self._tokens = 0
        self._seconds = 0.0

    def __bool__(self) -> bool:
        return bool(self._figures)

    def add(self, pairs: Sequence[TokenizedPair], figures: Mapping[str, Any], seconds: float) -> None:
        """One more step: its pairs, its figures by name (numbers or tensors of one element), and its time."""
        self._figures.append(figures)
        self._pairs += len(pairs)
        self._tokens += sum(map(row_tokens, pairs))
        self._seconds += seconds

    def read(self) -> list[dict[str, float]]:
        """The figures of the steps added since they were cleared, each with the speeds of them all."""
        started = time.perf_counter()
        names = list(self._figures[0])
        entries = [
            torch.as_tensor(gathered(figures[name]), dtype=torch.float64, device=self.device)
            for figures in self._figures
            for name in names
        ]
        values = torch.stack(entries).view(-1, len(names)).tolist()
        seconds = self._seconds + time.perf_counter() - started
        speeds = {
            "tokens_per_second": self._tokens / seconds,
            "pairs_per_second": self._pairs / seconds,
            "peak_memory_gib": peak_memory_gib(self.device),
        }
        return [dict(zip(names, row, strict=True)) | speeds for row in values]


def peak_memory_gib(device: torch.device) -> float:
    """The most memory reserved on a CUDA device so far, else this process's peak resident set, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**30
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset / 2**30
    import resource  # not on Windows

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
