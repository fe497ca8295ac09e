"""A file of prompts, or prompts from Python, each made sense of by a format; all that is wrong comes in one message."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from qorpo.data.conversations import Layout, message, shown
from qorpo.data.files import read_records
from qorpo.data.records import BadRecord, Conversation
from qorpo.data.shapes import fields_of, prompt_of
from qorpo.errors import DataError

PROBLEMS_SHOWN = 5

Prompts = str | os.PathLike[str] | Sequence[str | Sequence[Mapping[str, Any]] | Mapping[str, Any]]
"""A file of records, or a list of texts, of conversations, or of records."""


@dataclass(frozen=True)
class Prompt:
    """What a model is asked: a conversation that ends in a question, and further questions of the same user."""

    id: str | int
    messages: Conversation
    further: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)  # as it was read
    source: str = ""  # "prompts.jsonl:7"

    @property
    def num_turns(self) -> int:
        return 1 + len(self.further)

    def conversation(self, answers: Sequence[str]) -> Conversation:
        """What the turn after these answers is given."""
        turns = list(self.messages)
        for answer, question in zip(answers, self.further, strict=False):
            turns += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        return tuple(turns)


class Reader(Protocol):
    def read(self, record: Mapping[str, Any], place: int) -> Prompt:
        """The prompt of a record, counted from 0; raises BadRecord."""


def read_prompts(prompts: Prompts, reader: Reader) -> list[Prompt]:
    """All prompts of a file or list.

    Raises:
        DataError: for records that hold no prompt, and ids that occur twice: all of them in one message.
    """
    found: dict[Any, Prompt] = {}
    problems: list[str] = []
    for place, (where, record) in enumerate(_records(prompts)):
        try:
            if isinstance(record, BadRecord):
                raise record
            if not isinstance(record, Mapping):
                raise BadRecord("not_object", f"{shown(record)} is no record; expected an object")
            read = reader.read(record, place)
            prompt = Prompt(read.id, _checked(read), read.further, dict(record), where)
        except BadRecord as problem:
            problems.append(f"{where}: {problem}; {problem.remedy}")
            continue
        first = found.setdefault(prompt.id, prompt)
        if first is not prompt:
            problems.append(f"{where}: id {prompt.id!r} is {first.source}'s too; give each its own")
    if problems:
        more = [f"and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
        raise DataError("\n  ".join([*problems[:PROBLEMS_SHOWN], *more]))
    if not found:
        raise DataError(
            f"{prompts if isinstance(prompts, str | os.PathLike) else 'prompts'}: holds no prompt"
        )
    return list(found.values())


def _records(prompts: Prompts) -> Iterator[tuple[str, Any]]:
    if isinstance(prompts, str | os.PathLike):
        path = Path(prompts).expanduser()
        if not path.is_file():
            raise DataError(f"--prompts: there is no file {prompts}")
        yield from read_records(path)
        return
    for place, each in enumerate(prompts):
        if isinstance(each, str):
            each = {"prompt": each}
        elif isinstance(each, Sequence):
            each = {"messages": list(each)}
        yield f"prompts[{place}]", each


def _checked(prompt: Prompt) -> Conversation:
    turns = [*prompt.messages, *(message("user", text) for text in prompt.further)]
    if not turns or not all(turn["content"].strip() for turn in turns if turn["role"] == "user"):
        raise BadRecord("empty_prompt", "the prompt is empty", "fill or remove it")
    if turns[-1]["role"] == "assistant":
        raise BadRecord(
            "wrong_value", "the last turn is the assistant's; the model would have nothing to answer",
            "end in the user's turn",
        )  # fmt: skip
    return prompt.messages


def conversation_of(record: Mapping[str, Any]) -> Conversation:
    """The turns of a record with a prompt, an instruction, a question or messages, under training's column names."""
    columns = {"prompt": "messages"} if "messages" in record and "prompt" not in record else {}
    layout = Layout(columns=columns)
    fields = fields_of(record, layout)
    if "prompt" not in fields:
        names = ", ".join(map(repr, record)) or "none"
        raise BadRecord(
            "missing_column", f"no prompt in the columns {names}; expected 'prompt' or 'messages'"
        )
    return prompt_of(fields, layout)


def text_of(record: Mapping[str, Any], column: str) -> str:
    """A text that a format needs."""
    value = record.get(column)
    if not isinstance(value, str):
        found = f"{column!r} is {shown(value)}" if column in record else f"{column!r} is missing"
        raise BadRecord("wrong_type", f"{found}; expected text")
    return value


def id_of(record: Mapping[str, Any], place: int, names: Iterable[str] = ("id",)) -> str | int:
    """What the record calls itself, else its place from 0."""
    value = next((record[name] for name in names if record.get(name) is not None), place)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise BadRecord("wrong_type", f"the id is {shown(value)}; expected text or a whole number")
    return value
