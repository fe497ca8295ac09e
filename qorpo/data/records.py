"""A preference record made sense of: whatever its shape, two conversations that end in the assistant's turn.

A shape is the columns it needs and one reader. `SHAPES` is the table of them, most columns first; a new shape is
a new row. What the two conversations are worth as a pair is judged in filters.py.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict, overload

ROLES = ("system", "developer", "user", "assistant", "tool")

EXAMPLES_PER_REASON = 3


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
    "pairs.json[40]" (item 40, from 0).
    """

    prompt: Conversation
    chosen: str
    rejected: str
    source: str


class BadRecord(ValueError):  # noqa: N818 (a finding, yielded as often as it is raised)
    """A record readable as no shape: `reason` counts it, the text says what was found, and `remedy` what to do."""

    def __init__(self, reason: str, text: str, remedy: str = "mend the record"):
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
    places of each reason. `sources` are {"path", "sha256"} of the files. Tokenizing adds `cut`, the responses cut
    to the length limit by side, and `tokens`, {"total", "mean", "max"} of prompt, chosen and rejected.
    """

    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    sources: list[dict[str, str]] = field(default_factory=list)
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


class PairSet(Sequence[PreferencePair]):
    """Preference pairs, list-like, with the `report` of the records they came from."""

    __slots__ = ("_pairs", "report")

    def __init__(self, pairs: Iterable[PreferencePair], report: DataReport):
        self._pairs = list(pairs)
        self.report = report

    def __len__(self) -> int:
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...
    @overload
    def __getitem__(self, index: slice) -> list[PreferencePair]: ...
    def __getitem__(self, index: int | slice) -> PreferencePair | list[PreferencePair]:
        return self._pairs[index]

    def __repr__(self) -> str:
        return f"PairSet({len(self)} pairs; {self.report.summary()})"


def read_conversations(record: object) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation of a record, read by the first shape whose columns it has.

    A column that is null counts as absent. Raises BadRecord if no shape can read it, and Unusable if its own
    columns contradict each other.
    """
    if not isinstance(record, dict):
        raise BadRecord("not_object", f"{_shown(record)} is no record; expected an object with {_expected()}")
    columns = {name: value for name, value in record.items() if value is not None}
    for shape in SHAPES:
        if shape.columns <= columns.keys():
            return shape.read(columns)
    missing = min((shape.columns - columns.keys() for shape in SHAPES), key=len)
    found = ", ".join(repr(name) + ("" if name in columns else " (null)") for name in record) or "none"
    raise BadRecord(
        "missing_column",
        f"no column {', '.join(map(repr, sorted(missing)))}; found {found}; expected {_expected()}",
        "rename the column",
    )


def _with_prompt(columns: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
    """prompt (text or messages), and on each side text, one assistant message, or the whole conversation again."""
    value = columns["prompt"]
    prompt = (_message("user", value),) if isinstance(value, str) else _messages("prompt", value)

    def conversation(side: str) -> Conversation:
        value = columns[side]
        turns = (_message("assistant", value),) if isinstance(value, str) else _messages(side, value)
        if len(turns) == 1:
            return prompt + turns
        if not _holds(turns, prompt):
            raise Unusable("different_prompts")
        return turns

    return conversation("chosen"), conversation("rejected")


def _without_prompt(columns: Mapping[str, Any]) -> tuple[Conversation, Conversation]:
    """Two whole conversations, each as messages or as an HH-RLHF transcript."""

    def conversation(side: str) -> Conversation:
        value = columns[side]
        return _transcript(side, value) if isinstance(value, str) else _messages(side, value)

    return conversation("chosen"), conversation("rejected")


@dataclass(frozen=True, slots=True)
class Shape:
    """A way records come: the columns that tell it, its reader, and its name in messages."""

    columns: frozenset[str]
    read: Callable[[Mapping[str, Any]], tuple[Conversation, Conversation]]
    name: str


SHAPES = (
    Shape(frozenset({"prompt", "chosen", "rejected"}), _with_prompt, "prompt/chosen/rejected"),
    Shape(
        frozenset({"chosen", "rejected"}),
        _without_prompt,
        "chosen/rejected message lists, or HH-RLHF transcripts",
    ),
)


def turn_key(message: Message) -> tuple[str, str]:
    """What makes two turns the same: role and text, whatever whitespace surrounds it."""
    return message["role"], message["content"].strip()


def _holds(turns: Conversation, part: Conversation) -> bool:
    keys, wanted = [turn_key(turn) for turn in turns], [turn_key(turn) for turn in part]
    return any(keys[start : start + len(wanted)] == wanted for start in range(len(keys)))


def _messages(column: str, value: object) -> Conversation:
    if not isinstance(value, list) or not value:
        raise BadRecord("wrong_type", f"{column!r} is {_shown(value)}; expected text or a list of messages")
    for index, item in enumerate(value):
        texts = isinstance(item, dict) and all(isinstance(item.get(key), str) for key in ("role", "content"))
        if not texts:
            raise BadRecord(
                "wrong_type",
                f"{column}[{index}] is {_shown(item)}; expected an object with the texts 'role' and 'content'",
            )
        if item["role"] not in ROLES:
            found = f"{column}[{index}] has role {item['role']!r}"
            raise BadRecord("unknown_role", f"{found}; expected {', '.join(ROLES)}")
    return tuple(_message(item["role"], item["content"]) for item in value)


def _message(role: str, content: str) -> Message:
    try:
        content.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair ("\ud83d"); no tokenizer takes it.
        half = f"U+{ord(content[error.start]):04X}"
        raise BadRecord("not_utf8", f"the text holds {half}, half of a surrogate pair", "remove it") from None
    return {"role": role, "content": content}


_LABEL = re.compile(r"\n\n(Human|Assistant):")
_LABEL_ROLES = {"Human": "user", "Assistant": "assistant"}


def _transcript(column: str, text: str) -> Conversation:
    """The turns of "\\n\\nHuman: …\\n\\nAssistant: …", as Anthropic's HH-RLHF writes them, each stripped."""
    before, *parts = _LABEL.split("\n\n" + text.lstrip("\n"))
    if before.strip() or not parts:
        raise BadRecord(
            "missing_column",
            f"no column 'prompt', and {column!r} is no HH-RLHF transcript but {_shown(text)}; "
            f"expected {_expected()}",
            "add the prompts",
        )
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(_message(_LABEL_ROLES[label], content.strip()) for label, content in turns)


def _expected() -> str:
    return ", or ".join(shape.name for shape in SHAPES)


_KINDS = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def _shown(value: object) -> str:
    """The value's kind and its beginning, for a message."""
    if value is None:
        return "null"
    kind, text = _KINDS.get(type(value), type(value).__name__), repr(value)
    return f"{kind} ({text if len(text) <= 60 else text[:57] + '...'})"
