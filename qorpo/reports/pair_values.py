"""Each held-out pair's own figures at one evaluation, which intervals need: means alone have none.

Legend: P groups (pairs), N responses a group.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from qorpo.data.groups import Group
from qorpo.intervals import Interval, interval, resampled_means
from qorpo.storage import write_text

logger = logging.getLogger(__name__)

HELD_OUT = "held_out"  # in a run's folder, a file an evaluation
RESAMPLES = 2000  # a page has dozens of intervals
MOST_PROMPTS = 5_000  # beyond it the mean is as good as normal, and resampling is slow
Z = 1.96


def held_out_file(run: Path, step: int) -> Path:
    return run / HELD_OUT / f"step-{step}.json"


@dataclass(frozen=True)
class PairValues:
    """Metrics of each group at one step, in the order of the evaluation data.

    sources: where each group came from (file and line). prompts: a number for each group's prompt; groups of one prompt
    share it. lengths: tokens of each response, as `Group.learned_lengths`. metrics: (P,) by name.
    """

    sources: Sequence[str]
    prompts: Sequence[int]
    lengths: Sequence[Sequence[int]]  # (P, N)
    metrics: Mapping[str, Sequence[float]]

    @classmethod
    def of(cls, groups: Sequence[Group], metrics: Mapping[str, Sequence[float]]) -> "PairValues":
        numbers: dict[tuple[int, ...], int] = {}
        return cls(
            [group.source for group in groups],
            [numbers.setdefault(tuple(group.prompt_ids), len(numbers)) for group in groups],
            [group.learned_lengths[1:] for group in groups],
            metrics,
        )

    def write(self, path: Path) -> None:
        """As JSON, to six significant digits, whole or not at all. Raises OSError."""
        content = {
            "sources": list(self.sources),
            "prompts": list(self.prompts),
            "lengths": [list(each) for each in self.lengths],
            "metrics": {
                name: [float(f"{value:.6g}") for value in values] for name, values in self.metrics.items()
            },
        }
        write_text(path, json.dumps(content) + "\n")

    @classmethod
    def read(cls, path: Path) -> "PairValues | None":
        """None where there is no such file; and, with a warning, where it can't be read."""
        if not path.is_file():
            return None
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            values = cls(
                list(map(str, found["sources"])),
                list(map(int, found["prompts"])),
                [tuple(map(int, lengths)) for lengths in found["lengths"]],
                {str(name): list(map(float, column)) for name, column in found["metrics"].items()},
            )
            count = len(values.sources)
            if not count or {len(values.prompts), len(values.lengths)} != {count}:
                raise ValueError("lists of different lengths")
            if len({len(lengths) for lengths in values.lengths}) != 1:
                raise ValueError("different numbers of responses")
            if any(len(column) != count for column in values.metrics.values()):
                raise ValueError("lists of different lengths")
            return values
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning("%s: can't be read (%s), and is left out", path, reason)
            return None

    def __len__(self) -> int:
        return len(self.sources)

    @cached_property
    def _counts(self) -> np.ndarray:
        """(prompts,) groups of each prompt."""
        return np.bincount(self._numbers).astype(np.float64)

    @cached_property
    def _numbers(self) -> np.ndarray:
        """(P,) prompts, numbered without gaps."""
        return np.unique(np.asarray(self.prompts), return_inverse=True)[1]

    def interval(self, values_P: np.ndarray) -> Interval:
        """The mean of (P,) with its 95% interval over prompts: groups of one prompt stay together.

        A bootstrap, always drawn by the same seed; of very many prompts the normal interval.
        """
        mean = float(values_P.mean())
        sums, counts = np.bincount(self._numbers, weights=values_P).astype(np.float64), self._counts
        if len(sums) > MOST_PROMPTS:
            half = Z * float(np.sqrt(((sums - counts * mean) ** 2).sum())) / len(values_P)
            return Interval(mean, mean - half, mean + half)
        samples = resampled_means(sums[:, None], counts[:, None], resamples=RESAMPLES)
        return interval(mean, samples[:, 0])

    def of_metric(self, name: str) -> Interval | None:
        """A metric's mean; None where it is not there or no number."""
        values_P = np.asarray(self.metrics.get(name, ()), float)
        if not len(values_P) or not np.isfinite(values_P).all():
            return None
        share = len(self._counts) / (
            len(self._counts) + Z**2
        )  # Wilson's bound, where all pairs are right, or wrong
        if name.endswith("accuracies") and (values_P == values_P[0]).all():
            return Interval(values_P[0], share, 1.0) if values_P[0] else Interval(0.0, 0.0, 1 - share)
        return self.interval(values_P)

    def change(self, before: "PairValues | None", name: str) -> Interval | None:
        """How much a metric is above what it was `before`, pair by pair; None where the pairs are not the same ones."""
        if before is None or not self.has_same_pairs(before):
            return None
        if name not in self.metrics or name not in before.metrics:
            return None
        difference_P = np.asarray(self.metrics[name]) - np.asarray(before.metrics[name])
        return self.interval(difference_P) if np.isfinite(difference_P).all() else None

    def has_same_pairs(self, other: "PairValues") -> bool:
        return list(self.sources) == list(other.sources)
