"""What data is before it is tokens: conversations, preference pairs, demonstrations."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypedDict, overload

from qorpo.data.counts import DataReport

ROLES = ("system", "developer", "user", "assistant", "tool")

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
