"""How long the pairs of a benchmark are, and random tokens of these lengths.

The published datasets are not fetched. Each mix is a model of one: log-normal draws by a fixed seed, around stated
medians, cut at MOST_TOKENS. UltraFeedback's are about those of its binarized form; HH-RLHF's follow from a median
sequence of 186 tokens with 2.15 times as much prompt as answer (Wang and Hegde 2024, arXiv 2410.20305). The spreads are
guesses. A mix without spread holds pairs of one length.
"""

import random
from typing import NamedTuple

from qorpo.data.counts import DataReport
from qorpo.data.groups import Group, GroupLengths, TokenizedData

MOST_TOKENS = 4000
"""Of a prompt or an answer."""

FIRST_TOKEN = 3
"""Those below have a meaning of their own in `_models.plain_tokenizer`."""


class LogNormal(NamedTuple):
    median: float  # tokens
    spread: float = 0.0  # standard deviation of their logarithm

    def draw(self, source: random.Random) -> float:
        return min(source.lognormvariate(0, self.spread) * self.median, MOST_TOKENS)


class Mix(NamedTuple):
    prompt: LogNormal
    chosen: LogNormal
    rejected: LogNormal
    pairs_per_step: int = 8
    microbatch_tokens: int | str = "auto"  # qorpo's


MIXES = {
    "ultrafeedback": Mix(LogNormal(75, 1.1), LogNormal(300, 0.7), LogNormal(240, 0.8)),
    "hh-rlhf": Mix(LogNormal(127, 0.9), LogNormal(59, 0.8), LogNormal(59, 0.8)),
    "long-prompt": Mix(LogNormal(2000, 0.2), LogNormal(200, 0.5), LogNormal(200, 0.5)),
    # Two sequences of 2,048 tokens that share one: the most that such a pair can need.
    "pair-2x2048": Mix(LogNormal(1), LogNormal(2047), LogNormal(2047), pairs_per_step=1),
    # One row, of 8 pairs.
    "packed-8192": Mix(LogNormal(256), LogNormal(384), LogNormal(384), microbatch_tokens=8192),
}


def draw_lengths(mix: Mix, count: int) -> list[GroupLengths]:
    """The same in every call; fewer are the first of more."""
    source = random.Random(0)
    return [tuple(max(1, round(side.draw(source))) for side in mix[:3]) for _ in range(count)]


def random_pairs(lengths: list[GroupLengths], vocab_size: int) -> TokenizedData:
    """Pairs of random tokens, the same in every call."""
    source = random.Random(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(source.choices(range(FIRST_TOKEN, vocab_size), k=count))

    pairs = [Group.of(map(tokens, each), f"random:{number}") for number, each in enumerate(lengths)]
    return TokenizedData(pairs, DataReport(kept=len(pairs)))
