"""What a record's columns say, as conversations: texts, messages under their usual names, transcripts."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qorpo.data.records import ROLES, BadRecord, Conversation, Message

RankedPairs = Literal["best-worst", "adjacent", "all"]


@dataclass(frozen=True, slots=True)
class Layout:
    """How records are laid out, where that is not to be told from their columns.

    `shape` is a name in SHAPES; `columns` maps names of FIELDS to the records' own; `roles` maps the records' role
    names to ROLES. `ranked_pairs` says which of several ranked answers make pairs: the best and the worst, each and
    the next (adjacent), or all.
    """

    shape: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    roles: Mapping[str, str] = field(default_factory=dict)
    role_key: str | None = None
    text_key: str | None = None
    ranked_pairs: RankedPairs = "best-worst"


def history_of(value: object, layout: Layout) -> Conversation:
    """Earlier turns: messages, or lists of question and answer."""
    if isinstance(value, list) and value and all(_is_exchange(item) for item in value):
        return tuple(
            message(role, text)
            for exchange in value
            for role, text in zip(("user", "assistant"), exchange, strict=True)
        )
    return () if value == [] else messages_of("history", value, layout)


def _is_exchange(item: object) -> bool:
    return isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item)


ANSWER_KEYS = ("response", "text", "content", "value", "output", "answer", "completion")


def answer_of(name: str, value: object, layout: Layout) -> Conversation:
    """An answer: text, a message, messages, or an object that holds its text under a usual name."""
    if isinstance(value, str):
        return (message("assistant", value),)
    if isinstance(value, dict):
        keys = _message_keys(value, layout)
        if keys is None:
            texts = [value[key] for key in ANSWER_KEYS if isinstance(value.get(key), str)]
            if texts:
                return (message("assistant", texts[0]),)
        value = [value]
    return messages_of(name, value, layout)


_ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function": "tool",
}  # fmt: skip


def messages_of(column: str, value: object, layout: Layout) -> Conversation:
    if not isinstance(value, list) or not value:
        raise BadRecord("wrong_type", f"{column!r} is {shown(value)}; expected text or a list of messages")
    turns = []
    for index, item in enumerate(value):
        keys = _message_keys(item, layout)
        if keys is None:
            raise BadRecord(
                "wrong_type",
                f"{column}[{index}] is {shown(item)}; expected an object with the texts 'role' and 'content', "
                "or 'from' and 'value'",
            )
        name, text = (item[key] for key in keys)
        role = layout.roles.get(name) or _ROLE_NAMES.get(name.lower())
        if role is None:
            found = f"{column}[{index}] has role {shown(name)}"
            raise BadRecord("unknown_role", f"{found}; expected {', '.join(_ROLE_NAMES)}")
        turns.append(message(role, _joined(text, f"{column}[{index}]")))
    return tuple(turns)


def _message_keys(item: object, layout: Layout) -> tuple[str, str] | None:
    """Under which keys a message holds its role and its text; None where it is no message."""
    if not isinstance(item, dict):
        return None
    given = (layout.role_key, layout.text_key)
    for role, text in ((given[0] or "role", given[1] or "content"), ("role", "content"), ("from", "value")):
        if isinstance(item.get(role), str) and isinstance(item.get(text), str | list):
            return role, text
    return None


def _joined(content: str | list[Any], where: str) -> str:
    """A message's text, also where it comes as a list of parts."""
    if isinstance(content, str):
        return content
    texts = []
    for part in content:
        if not (isinstance(part, dict) and isinstance(part.get("text"), str)):
            kind = part.get("type") if isinstance(part, dict) else None
            raise BadRecord(
                "not_text",
                f"{where} has a part of type {start_of(kind)}"
                if kind
                else f"{where} has a part {shown(part)}",
                "leave the record out: qorpo trains on text",
            )
        texts.append(part["text"])
    return "".join(texts)


def message(role: str, content: str) -> Message:
    try:
        content.encode()
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair ("\ud83d"); no tokenizer takes it.
        half = f"U+{ord(content[error.start]):04X}"
        raise BadRecord("not_utf8", f"the text holds {half}, half of a surrogate pair", "remove it") from None
    return {"role": role, "content": content}


_LABEL = re.compile(r"\n\n(Human|Assistant):")
_LABEL_ROLES = {"Human": "user", "Assistant": "assistant"}


def transcript_of(column: str, text: str) -> Conversation:
    """The turns of "\\n\\nHuman: …\\n\\nAssistant: …", as Anthropic's HH-RLHF writes them, each stripped."""
    before, *parts = _LABEL.split("\n\n" + text.lstrip("\n"))
    if before.strip() or not parts:
        raise BadRecord(
            "missing_column",
            f"no column 'prompt', and {column!r} is no HH-RLHF transcript but {shown(text)}",
            "add the prompts, or name their column in data.columns",
        )
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(message(_LABEL_ROLES[label], content.strip()) for label, content in turns)


def turn_key(message: Message) -> tuple[str, str]:
    """What makes two turns the same: role and text, whatever whitespace surrounds it."""
    return message["role"], message["content"].strip()


def is_null(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


# --- values in messages ---

_KINDS = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "text",
    list: "a list",
    dict: "an object",
}


def shown(value: object) -> str:
    """The value's kind and its beginning, for a message."""
    if value is None:
        return "null"
    return f"{_KINDS.get(type(value), type(value).__name__)} ({start_of(value)})"


def start_of(value: object) -> str:
    try:
        text = repr(value[:60] if isinstance(value, str) else value)
    except (RecursionError, ValueError):  # nested deeply, or a number of more digits than Python writes
        return "..."
    return text if len(text) <= 60 else text[:57] + "..."
