"""How far a mean is to be trusted: intervals by a bootstrap over prompts, since what belongs to one prompt varies together.

Legend: P values, C prompts (clusters), R resamples, K statistics.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 10_000
LEVEL = 0.95
DRAWN_AT_ONCE = 1 << 22  # indices in memory, 8 bytes each

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """A figure with its 95% interval, where one is known, in the figure's own unit."""

    value: float
    low: float | None = None
    high: float | None = None

    @property
    def ends(self) -> tuple[float, float] | None:
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def is_above_zero(self) -> bool:
        return self.low is not None and self.low > 0

    @property
    def is_below_zero(self) -> bool:
        return self.high is not None and self.high < 0


def mean_interval(
    values_P: ArrayLike, prompts_P: Sequence[Hashable] | None = None, *, seed: int = 0, level: float = LEVEL
) -> Interval:
    """The mean over values, with its percentile interval over resampled prompts (Efron 1979).

    For a paired comparison of two models, give each value's difference.

    Args:
        values_P: finite numbers, at least one.
        prompts_P: what each value belongs to; values of one prompt are drawn together. None: each to its own.
    """
    values = np.asarray(values_P, dtype=np.float64)
    sums_C, counts_C = by_prompt(values, range(len(values)) if prompts_P is None else prompts_P)
    samples = resampled_means(sums_C[:, None], counts_C[:, None], seed=seed)
    return interval(float(values.mean()), samples[:, 0], level=level)


def by_prompt(values_P: Floats, prompts_P: Sequence[Hashable]) -> tuple[Floats, Floats]:
    """(C,) sums of each prompt's values and (C,) how many it has, prompts in order of their first value."""
    places: dict[Hashable, int] = {}
    place_P = np.array([places.setdefault(prompt, len(places)) for prompt in prompts_P])
    sums_C = np.bincount(place_P, weights=values_P).astype(np.float64)
    return sums_C, np.bincount(place_P).astype(np.float64)


def resampled_means(
    sums_CK: Floats, counts_CK: Floats, *, resamples: int = RESAMPLES, seed: int = 0
) -> Floats:
    """(R, K) means of K statistics over prompts drawn with replacement, the same prompts for each of the K.

    Args:
        sums_CK: what each prompt adds to a statistic.
        counts_CK: over how many values; a statistic's mean is the ratio of both sums.
    """
    prompts = len(sums_CK)
    generator = np.random.default_rng(seed)
    at_once = max(1, DRAWN_AT_ONCE // prompts)
    means = []
    for start in range(0, resamples, at_once):
        drawn_RC = generator.integers(prompts, size=(min(at_once, resamples - start), prompts))
        means.append(
            np.stack([_ratio(drawn_RC, *each) for each in zip(sums_CK.T, counts_CK.T, strict=True)], 1)
        )
    return np.concatenate(means)


def _ratio(drawn_RC: NDArray[np.int64], sums_C: Floats, counts_C: Floats) -> Floats:
    return sums_C[drawn_RC].sum(1) / counts_C[drawn_RC].sum(1)


def interval(value: float, samples_R: Floats, *, level: float = LEVEL) -> Interval:
    """A figure with the middle `level` of its resampled values."""
    low, high = np.quantile(samples_R, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
