"""Bootstrap intervals: they cover, they keep a prompt's values together, and a paired one is narrower."""

import math

import numpy as np
import pytest

from qorpo import intervals
from qorpo.intervals import by_prompt, mean_interval, resampled_means


def slow_means(values, prompts, seed, resamples):
    """The plain way: for every resample, the values of each drawn prompt, one after another."""
    names = list(dict.fromkeys(prompts))
    drawn = np.random.default_rng(seed).integers(len(names), size=(resamples, len(names)))
    means = []
    for row in drawn:
        taken = [
            value
            for place in row
            for value, prompt in zip(values, prompts, strict=True)
            if prompt == names[place]
        ]
        means.append(sum(taken) / len(taken))
    return means


def test_resampled_means_equal_the_slow_twin():
    values, prompts = np.array([1.0, 2.0, 4.0, 8.0, 16.0]), ["a", "b", "a", "c", "a"]
    sums, counts = by_prompt(values, prompts)
    fast = resampled_means(sums[:, None], counts[:, None], resamples=200, seed=7)
    assert fast[:, 0] == pytest.approx(slow_means(values, prompts, 7, 200), abs=1e-12)


def test_what_is_drawn_at_once_changes_nothing(monkeypatch):
    values = np.random.default_rng(0).normal(size=50)
    whole = mean_interval(values)
    monkeypatch.setattr(intervals, "DRAWN_AT_ONCE", 1234)
    assert mean_interval(values) == whole


def test_the_interval_is_the_normal_one_for_many_values():
    values = np.random.default_rng(1).normal(2.0, 3.0, size=2000)
    found = mean_interval(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(2000)
    assert found.value == pytest.approx(values.mean(), abs=1e-12)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_95_percent_of_intervals_cover_the_mean(monkeypatch):
    monkeypatch.setattr(intervals.resampled_means, "__kwdefaults__", {"resamples": 1000, "seed": 0})
    generator = np.random.default_rng(2)
    found = [mean_interval(generator.exponential(size=80), seed=trial) for trial in range(300)]
    covered = sum(each.low <= 1.0 <= each.high for each in found) / len(found)
    assert 0.90 <= covered <= 0.98  # a percentile interval of 80 skewed values covers a little less


def test_copies_under_one_prompt_make_no_interval_narrower():
    values = np.random.default_rng(3).normal(size=60)
    alone = mean_interval(values)
    copied = mean_interval(np.repeat(values, 5), np.repeat(np.arange(60), 5).tolist())
    as_if_independent = mean_interval(np.repeat(values, 5))
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high), abs=1e-12)
    assert as_if_independent.high - as_if_independent.low < 0.6 * (copied.high - copied.low)


def test_a_paired_difference_is_narrower_than_either():
    generator = np.random.default_rng(4)
    easy = generator.normal(size=200)
    before, after = easy + 0.1 * generator.normal(size=200), easy + 0.1 * generator.normal(size=200) + 0.1
    apart, paired = mean_interval(after), mean_interval(after - before)
    assert paired.low > 0
    assert paired.high - paired.low < 0.25 * (apart.high - apart.low)


def test_one_value_and_equal_values_have_no_width():
    for values in ([3.0], [3.0] * 9):
        found = mean_interval(values)
        assert (found.value, found.low, found.high) == (3.0, 3.0, 3.0)


def test_the_seed_decides():
    values = np.random.default_rng(5).normal(size=30)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1) != mean_interval(values, seed=2)
