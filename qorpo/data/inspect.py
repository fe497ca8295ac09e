"""What a person wants to know of preference data before a GPU hour is spent on it."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from qorpo.data.chat_format import ChatFormat
from qorpo.data.groups import Group, part_names
from qorpo.data.prepare import PreparedData
from qorpo.data.token_table import ArrowGroups


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
    """A set of groups in numbers.

    `row_tokens` are the tokens to compute with each prompt once, `separate_tokens` with it before each response.
    `chosen_longer`, `equally_long`: shares of the pairs, by tokens; a chosen side that is mostly longer teaches
    length. None where a prompt has one response.
    """

    pairs: int
    lengths: dict[str, Lengths]
    row_tokens: int
    separate_tokens: int
    chosen_longer: float | None
    equally_long: float | None

    @property
    def saved_by_sharing(self) -> float:
        """The share of tokens that need not be computed."""
        return 1 - self.row_tokens / self.separate_tokens


def statistics(groups: ArrowGroups) -> Statistics:
    lengths = groups.lengths()
    prompt, *responses = lengths.T
    # Powers of two, the same for all sides, so that they can be compared at a glance.
    first = int(np.log2(lengths.min()))
    edges = 2 ** np.arange(first, int(np.log2(lengths.max())) + 2)
    return Statistics(
        pairs=len(lengths),
        lengths={
            name: _lengths(counts, edges)
            for name, counts in zip(part_names(lengths.shape[1] - 1), lengths.T, strict=True)
        },
        row_tokens=int(lengths.sum()),
        separate_tokens=int(lengths.sum() + (len(responses) - 1) * prompt.sum()),
        chosen_longer=_share(responses[0] > responses[1]) if len(responses) == 2 else None,
        equally_long=_share(responses[0] == responses[1]) if len(responses) == 2 else None,
    )


def _share(flags: np.ndarray) -> float:
    return round(float(flags.mean()), 4)


def _lengths(counts: np.ndarray, edges: np.ndarray) -> Lengths:
    p50, p90, p99 = map(int, np.percentile(counts, (50, 90, 99), method="nearest"))
    histogram, _ = np.histogram(counts, edges)
    return Lengths(
        round(float(counts.mean()), 1), p50, p90, p99, int(counts.max()), edges.tolist(), histogram.tolist()
    )


class Span(NamedTuple):
    """Consecutive tokens as text, or a special one; `learned`: the loss is over them."""

    text: str
    special: bool
    learned: bool


class ShownGroup(NamedTuple):
    """A group as the model sees it: its parts by their names."""

    source: str
    parts: dict[str, list[Span]]
    cut: list[str]  # the parts that were cut


def show_groups(
    groups: Sequence[Group], count: int, chat_format: ChatFormat, *, learn_prompt: bool = False
) -> list[ShownGroup]:
    """`count` groups, evenly from the first to the last, decoded with their special tokens visible."""
    tokenizer = chat_format.tokenizer
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    special |= {chat_format.stop_token_id, *tokenizer.all_special_ids}

    def spans(ids: Sequence[int], learned: bool) -> Iterator[Span]:
        run: list[int] = []
        for token in ids:
            if token in special:
                if run:
                    yield Span(tokenizer.decode(run), False, learned)
                    run = []
                yield Span(tokenizer.decode([token]), True, learned)
            else:
                run.append(token)
        if run:
            yield Span(tokenizer.decode(run), False, learned)

    def shown(group: Group) -> ShownGroup:
        names = part_names(len(group.responses))
        parts = {
            name: list(spans(ids, learn_prompt or name != "prompt"))
            for name, ids in zip(names, (group.prompt_ids, *group.responses), strict=True)
        }
        if group.unscored:
            parts[names[1]] = [span for ids, learned in _turns(group) for span in spans(ids, learned)]
        return ShownGroup(
            group.source, parts, [name for name, cut in zip(names, group.cut, strict=False) if cut]
        )

    count = min(count, len(groups))
    places = np.linspace(0, len(groups) - 1, count).astype(int).tolist() if count else []
    return [shown(groups[place]) for place in places]


def _turns(group: Group) -> Iterator[tuple[Sequence[int], bool]]:
    """A dialogue's answers, which are learned, and what is between them."""
    (response,), end = group.responses, 0
    for start, stop in group.unscored:
        yield response[end:start], True
        yield response[start:stop], False
        end = stop
    yield response[end:], True


def as_dict(data: PreparedData, shown: Sequence[ShownGroup] = ()) -> dict[str, Any]:
    """Reports, statistics and shown pairs as plain JSON values; a shown side is its text."""
    values = data.as_dict()
    for name, side in (("train", data.train), ("eval", data.eval)):
        if side is not None:
            found = statistics(side.groups)  # type: ignore[arg-type]
            values[name] |= {
                "statistics": asdict(found) | {"saved_by_sharing": round(found.saved_by_sharing, 4)}
            }
    values["shown"] = [
        {"source": group.source, "cut": group.cut}
        | {name: "".join(span.text for span in spans) for name, spans in group.parts.items()}
        for group in shown
    ]
    return values
