"""What data is before it is tokens: conversations, preference pairs, and the report of what became of the records."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal, TypedDict, overload

ROLES = ("system", "developer", "user", "assistant", "tool")

EXAMPLES_PER_REASON = 3

TrainTurns = Literal["last", "all"]


class Message(TypedDict):
    """One turn of a conversation; `role` is one of ROLES."""

    role: str
    content: str


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """A prompt and two answers to it.

    `prompt` ends in a turn of the user, the system or a tool: the next is the assistant's. `chosen` and `rejected`
    are the text of that one turn. `source` is where the pair came from, "pairs.jsonl:41" (line 41) or
    "pairs.json[40]" (item 40, from 0). `margin`: how much better chosen is, by the record's scores or votes.
    """

    prompt: Conversation
    chosen: str
    rejected: str
    source: str
    margin: float | None = None
    desirable: ClassVar[None] = None

    @property
    def answers(self) -> tuple[str, ...]:
        return self.chosen, self.rejected


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the one answer to it that is learned; with `every_turn` the assistant's turns in the prompt too.

    `desirable`: whether the answer is a good one, where it comes with a label, as kto learns from.
    """

    prompt: Conversation
    answer: str
    source: str
    every_turn: bool = False
    desirable: bool | None = None
    margin: ClassVar[None] = None

    @property
    def answers(self) -> tuple[str, ...]:
        return (self.answer,)


Example = PreferencePair | Demonstration


def labelled_answers(example: Example) -> tuple[Example, ...]:
    """A pair as two labelled answers, chosen and rejected; anything else as it is."""
    if isinstance(example, Demonstration):
        return (example,)
    return tuple(
        Demonstration(example.prompt, answer, example.source, desirable=desirable)
        for answer, desirable in ((example.chosen, True), (example.rejected, False))
    )


class BadRecord(ValueError):  # noqa: N818 (a finding, yielded as often as it is raised)
    """A record readable as no shape: `reason` counts it, the text says what was found, and `remedy` what to do."""

    def __init__(self, reason: str, text: str, remedy: str = "fix the record"):
        super().__init__(text)
        self.reason = reason
        self.remedy = remedy


class Unusable(ValueError):  # noqa: N818 (an outcome that is counted, not a fault)
    """A well-formed record that makes no preference pair; `reason` is the name it is dropped and counted under."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(slots=True)
class DataReport:
    """What became of the records read; `read == kept + sum(dropped.values())` always.

    `dropped` and `noted` (kept at reading, but worth a look) count by reason; `examples` holds the first three
    places of each reason. `sources` are {"path", "sha256", "kept"} of the files. A record that makes several pairs
    counts once for each, and so does a pair for each time its source's weight has it. Tokenizing adds, for prompt,
    chosen and rejected, `cut`, how many were cut to the length limits, and `tokens`, {"total", "mean", "max"}.
    """

    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    sources: list[dict[str, Any]] = field(default_factory=list)
    cut: dict[str, int] = field(default_factory=dict)
    tokens: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def read(self) -> int:
        return self.kept + sum(self.dropped.values())

    def drop(self, reason: str, where: str) -> None:
        self._count(self.dropped, reason, where)

    def note(self, reason: str, where: str) -> None:
        self._count(self.noted, reason, where)

    def _count(self, counts: dict[str, int], reason: str, where: str) -> None:
        counts[reason] = counts.get(reason, 0) + 1
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES_PER_REASON:
            places.append(where)

    def summary(self) -> str:
        """Such as "read 12, dropped 7 empty, 5 same", the most frequent reason first."""
        counts = sorted(self.dropped.items(), key=lambda item: -item[1])
        dropped = ", ".join(f"{count:,} {reason}" for reason, count in counts)
        return f"read {self.read:,}" + (f", dropped {dropped}" if dropped else "")

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {"read": self.read, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataReport":
        return cls(**{name: value for name, value in values.items() if name != "read"})


class PairSet(Sequence[Example]):
    """Preference pairs, list-like, with the `report` of the records they came from."""

    __slots__ = ("_pairs", "report")

    def __init__(self, pairs: Iterable[Example], report: DataReport):
        self._pairs = list(pairs)
        self.report = report

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        return self._pairs[index]

    def __repr__(self) -> str:
        return f"PairSet({len(self)} pairs; {self.report.summary()})"
