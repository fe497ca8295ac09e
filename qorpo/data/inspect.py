"""What a person wants to know of preference data before a GPU hour is spent on it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from qorpo.data.prepare import PreparedData
from qorpo.data.token_table import TokenizedPairs
from qorpo.data.tokenize import ChatFormat, TokenizedPair

SIDES = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts of one side: percentiles, and how many pairs have from edges[i] to below edges[i + 1]."""

    mean: float
    p50: int
    p90: int
    p99: int
    max: int
    edges: list[int]
    counts: list[int]


@dataclass(frozen=True, slots=True)
class Statistics:
    """A set of tokenized pairs in numbers.

    `row_tokens` are the tokens to compute with each prompt once, `separate_tokens` with it twice. `chosen_longer`,
    `equally_long`: shares of the pairs, by tokens; a chosen side that is mostly longer teaches length.
    """

    pairs: int
    lengths: dict[str, Lengths]
    row_tokens: int
    separate_tokens: int
    chosen_longer: float
    equally_long: float

    @property
    def saved_by_sharing(self) -> float:
        """The share of tokens that need not be computed."""
        return 1 - self.row_tokens / self.separate_tokens


def statistics(pairs: TokenizedPairs) -> Statistics:
    lengths = pairs.lengths()
    prompt, chosen, rejected = lengths.T
    # Powers of two, the same for all sides, so that they can be compared at a glance.
    first = int(np.log2(lengths.min()))
    edges = 2 ** np.arange(first, int(np.log2(lengths.max())) + 2)
    return Statistics(
        pairs=len(lengths),
        lengths={name: _lengths(counts, edges) for name, counts in zip(SIDES, lengths.T, strict=True)},
        row_tokens=int(lengths.sum()),
        separate_tokens=int(lengths.sum() + prompt.sum()),
        chosen_longer=round(float((chosen > rejected).mean()), 4),
        equally_long=round(float((chosen == rejected).mean()), 4),
    )


def _lengths(counts: np.ndarray, edges: np.ndarray) -> Lengths:
    p50, p90, p99 = map(int, np.percentile(counts, (50, 90, 99), method="nearest"))
    histogram, _ = np.histogram(counts, edges)
    return Lengths(
        round(float(counts.mean()), 1), p50, p90, p99, int(counts.max()), edges.tolist(), histogram.tolist()
    )


class Span(NamedTuple):
    """Consecutive tokens of one kind as text; `learned`: the loss is over them."""

    text: str
    kind: Literal["prompt", "chosen", "rejected", "special"]
    learned: bool


class ShownPair(NamedTuple):
    """A pair as the model sees it."""

    source: str
    prompt: list[Span]
    chosen: list[Span]
    rejected: list[Span]
    cut: list[str]  # the sides that were cut


def show_pairs(
    pairs: Sequence[TokenizedPair], count: int, chat_format: ChatFormat, *, learn_prompt: bool = False
) -> list[ShownPair]:
    """`count` pairs, evenly from the first to the last, decoded with their special tokens visible."""
    tokenizer = chat_format.tokenizer
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {chat_format.stop_token_id, *tokenizer.all_special_ids}

    def spans(ids: Sequence[int], kind: Any, learned: bool) -> Iterator[Span]:
        run: list[int] = []
        for token in ids:
            if token in special:
                if run:
                    yield Span(tokenizer.decode(run), kind, learned)
                    run = []
                yield Span(tokenizer.decode([token]), "special", learned)
            else:
                run.append(token)
        if run:
            yield Span(tokenizer.decode(run), kind, learned)

    def shown(pair: TokenizedPair) -> ShownPair:
        prompt, chosen, rejected = (
            list(spans(getattr(pair, f"{side}_ids"), side, learn_prompt or side != "prompt"))
            for side in SIDES
        )
        cut = [side for side in SIDES if getattr(pair, f"{side}_cut")]
        return ShownPair(pair.source, prompt, chosen, rejected, cut)

    count = min(count, len(pairs))
    places = np.linspace(0, len(pairs) - 1, count).astype(int).tolist() if count else []
    return [shown(pairs[place]) for place in places]


def as_dict(data: PreparedData, shown: Sequence[ShownPair] = ()) -> dict[str, Any]:
    """Reports, statistics and shown pairs as plain JSON values; a shown side is its text."""
    values = data.as_dict()
    for name, side in (("train", data.train), ("eval", data.eval)):
        if side is not None:
            found = statistics(side.pairs)  # type: ignore[arg-type]
            values[name] |= {
                "statistics": asdict(found) | {"saved_by_sharing": round(found.saved_by_sharing, 4)}
            }
    values["shown"] = [
        {"source": pair.source, "cut": pair.cut}
        | {side: "".join(span.text for span in getattr(pair, side)) for side in SIDES}
        for pair in shown
    ]
    return values
