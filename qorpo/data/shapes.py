"""Records of any shape made sense of: what was asked, and which of two answers to it is better.

A record's columns become fields, under whichever name they are known (ALIASES); a shape is the fields it needs and
one reader. A new shape is a row of SHAPES, a new name of a column a word in ALIASES. What a comparison is worth as a
pair is judged in filters.py.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from qorpo.data.records import ROLES, BadRecord, Conversation, Message, Unusable

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


class Comparison(NamedTuple):
    """Two conversations, the first of them the better by `margin`.

    `basis` is what says so: the record itself ("stated": the margin is a difference of scores where it has them,
    else None), "scores" (0 is a tie), or an annotator's "vote" from 1 to −1, where the second is better for sure;
    other records may hold votes on the same two.
    """

    first: Conversation
    second: Conversation
    margin: float | None = None
    basis: Literal["stated", "scores", "vote"] = "stated"


# A field and the columns it is known under, the likeliest first.
ALIASES = {
    "prompt": ("prompt", "instruction", "question", "query", "conversations", "input"),
    "input": ("input",),
    "system": ("system",),
    "history": ("history",),
    "chosen": ("chosen", "chosen_response", "response_chosen"),
    "rejected": ("rejected", "rejected_response", "response_rejected"),
    "score_chosen": ("score_chosen", "chosen_score", "chosen_rating", "chosen-rating"),
    "score_rejected": ("score_rejected", "rejected_score", "rejected_rating", "rejected-rating"),
    "output_1": ("output_1", "response1", "response_1"),
    "output_2": ("output_2", "response2", "response_2"),
    "preference": ("preference",),
    "responses": ("responses", "outputs", "completions", "generations", "answers", "output"),
    "scores": ("scores", "ratings", "rating"),
}
FIELDS = tuple(ALIASES)
LISTS = ("responses", "scores")

COLUMNS_SHOWN = 12

Fields = dict[str, Any]


def read_comparisons(record: object, layout: Layout | None = None) -> list[Comparison]:
    """The comparisons a record holds: one, or for ranked answers as many as the layout asks for.

    A column that is null counts as absent. Raises BadRecord if no shape can read it, and Unusable if there is
    nothing to compare: `different_prompts`, `no_verdict`, `one_answer`.
    """
    layout = layout or Layout()
    if not isinstance(record, dict):
        raise BadRecord("not_object", f"{shown(record)} is no record; expected an object with {_expected()}")
    for column in ("images", "videos", "audios"):
        if record.get(column):
            raise BadRecord("not_text", f"the record has {column}", "leave it out: qorpo trains on text")
    fields = _fields(record, layout)
    shapes = [shape for shape in SHAPES if layout.shape in (None, shape.name)]
    for shape in shapes:
        if shape.fields <= fields.keys():
            return shape.read(fields, layout)
    raise _unreadable(record, fields, shapes)


def _fields(record: Mapping[str, Any], layout: Layout) -> Fields:
    columns = {name: value for name, value in record.items() if not _is_null(value)}
    fields: Fields = {}
    for name, aliases in ALIASES.items():
        given = layout.columns.get(name)
        for column in (given,) if given is not None else aliases:
            if column in columns and (name not in LISTS or isinstance(columns[column], list)):
                fields[name] = columns[column]
                break
    if "prompt" in fields and fields["prompt"] is fields.get("input"):
        del fields["input"]
    if "preference" not in fields:
        annotators = [record[name] for name in record if re.fullmatch(r"annotator_?\d+", str(name))]
        if annotators or layout.columns.get("preference", "preference") in record:
            fields["preference"] = annotators or None  # null: asked, without a verdict
    if "scores" not in fields and "responses" in fields:
        scores = [_own_score(response) for response in fields["responses"]]
        if any(score is not None for score in scores):
            fields["scores"] = scores
    return fields


# --- the shapes ---


def _chosen_rejected(fields: Fields, layout: Layout) -> list[Comparison]:
    """chosen and rejected, each an answer, or a whole conversation: as messages, or as an HH-RLHF transcript."""
    prompt = _prompt(fields, layout) if "prompt" in fields else None

    def conversation(side: str) -> Conversation:
        value = fields[side]
        if prompt is None:
            return _transcript(side, value) if isinstance(value, str) else _messages(side, value, layout)
        turns = _answer(side, value, layout)
        if len(turns) == 1:
            return prompt + turns
        if not _holds(turns, prompt):
            raise Unusable("different_prompts")
        return turns

    scores = _number(fields.get("score_chosen")), _number(fields.get("score_rejected"))
    margin = None if scores[0] is None or scores[1] is None else scores[0] - scores[1]
    return [Comparison(conversation("chosen"), conversation("rejected"), margin)]


def _two_outputs(fields: Fields, layout: Layout) -> list[Comparison]:
    """Two outputs and a preference: 1 or 2 says which is better, between them how surely; 0 and 1.5 are ties.

    A list of preferences, or PandaLM's columns annotator1, annotator2, …, are several annotators' votes.
    """
    prompt = _prompt(fields, layout)
    first, second = (prompt + _answer(name, fields[name], layout) for name in ("output_1", "output_2"))
    value = fields["preference"]
    verdicts = [_verdict(vote) for vote in (value if isinstance(value, list) else [value])]
    votes = [verdict for verdict in verdicts if verdict is not None]
    if not votes:
        raise Unusable("no_verdict")
    return [Comparison(first, second, majority(votes), "vote")]


def _scored(fields: Fields, layout: Layout) -> list[Comparison]:
    """Several responses and their scores, the higher the better; one without a score is left out."""
    responses, scores = fields["responses"], fields["scores"]
    if len(responses) != len(scores):
        raise BadRecord("wrong_length", f"{len(responses)} responses but {len(scores)} scores")
    numbers = [_number(score) for score in scores]
    scored = [
        (number, response) for number, response in zip(numbers, responses, strict=True) if number is not None
    ]
    ranked = sorted(scored, key=lambda each: -each[0])
    return _ranking([response for _, response in ranked], [score for score, _ in ranked], fields, layout)


def _ranked(fields: Fields, layout: Layout) -> list[Comparison]:
    """Several responses, from the best to the worst."""
    return _ranking(fields["responses"], None, fields, layout)


def _ranking(
    responses: list[Any], scores: list[Any] | None, fields: Fields, layout: Layout
) -> list[Comparison]:
    if len(responses) < 2:
        raise Unusable("one_answer")
    prompt = _prompt(fields, layout)
    answers = [prompt + _answer(f"responses[{n}]", text, layout) for n, text in enumerate(responses)]
    last = len(answers) - 1
    places = {
        "best-worst": [(0, last)],
        "adjacent": list(itertools.pairwise(range(last + 1))),
        "all": list(itertools.combinations(range(last + 1), 2)),
    }[layout.ranked_pairs]
    if scores is None:
        return [Comparison(answers[better], answers[worse]) for better, worse in places]
    return [
        Comparison(answers[better], answers[worse], scores[better] - scores[worse], "scores")
        for better, worse in places
    ]


class Shape(NamedTuple):
    """A way records come: its name, the fields that tell it, its reader, and how messages describe it."""

    name: str
    fields: frozenset[str]
    read: Callable[[Fields, Layout], list[Comparison]]
    description: str


SHAPES = (
    Shape(
        "chosen-rejected",
        frozenset({"chosen", "rejected"}),
        _chosen_rejected,
        "prompt, chosen and rejected (or these two as whole conversations)",
    ),
    Shape(
        "two-outputs",
        frozenset({"prompt", "output_1", "output_2", "preference"}),
        _two_outputs,
        "two outputs and a preference",
    ),
    Shape(
        "scored",
        frozenset({"prompt", "responses", "scores"}),
        _scored,
        "a list of responses and their scores",
    ),
    Shape("ranked", frozenset({"prompt", "responses"}), _ranked, "a list of responses, best first"),
)


def majority(verdicts: list[float]) -> float:
    """Several verdicts' one: the sign that more than the others have, times the mean's size; else 0, a tie."""
    counts = {sign: sum((v > 0) - (v < 0) == sign for v in verdicts) for sign in (1, 0, -1)}
    highest = max(counts.values())
    leaders = [sign for sign, count in counts.items() if count == highest]
    return leaders[0] * abs(sum(verdicts) / len(verdicts)) if len(leaders) == 1 else 0.0


# --- parts of a record ---


def _prompt(fields: Fields, layout: Layout) -> Conversation:
    """The prompt's turns, after the system's and the history's where they have columns of their own."""
    value = fields["prompt"]
    if not isinstance(value, str):
        turns = _messages("prompt", value, layout)
    elif re.match(r"\s*Human:", value) and value.rstrip().endswith("\n\nAssistant:"):
        turns = _transcript("prompt", value)[:-1]
    else:
        extra = fields.get("input", "")
        if not isinstance(extra, str):
            raise BadRecord("wrong_type", f"'input' is {shown(extra)}; expected text")
        # As LLaMA-Factory joins them.
        turns = (_message("user", f"{value}\n{extra}" if extra.strip() else value),)
    turns = _history(fields.get("history", []), layout) + turns
    system = fields.get("system", "")
    if not isinstance(system, str):
        raise BadRecord("wrong_type", f"'system' is {shown(system)}; expected text")
    if system.strip() and turns[:1] and turns[0]["role"] != "system":
        turns = (_message("system", system), *turns)
    return turns


def _history(value: object, layout: Layout) -> Conversation:
    """Earlier turns: messages, or lists of question and answer."""
    if isinstance(value, list) and value and all(_is_exchange(item) for item in value):
        return tuple(
            _message(role, text)
            for exchange in value
            for role, text in zip(("user", "assistant"), exchange, strict=True)
        )
    return () if value == [] else _messages("history", value, layout)


def _is_exchange(item: object) -> bool:
    return isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item)


_ANSWER_KEYS = ("response", "text", "content", "value", "output", "answer", "completion")
_SCORE_KEYS = ("overall_score", "score", "rating", "reward")


def _answer(name: str, value: object, layout: Layout) -> Conversation:
    """An answer: text, a message, messages, or an object that holds its text under a usual name."""
    if isinstance(value, str):
        return (_message("assistant", value),)
    if isinstance(value, dict):
        keys = _message_keys(value, layout)
        if keys is None:
            texts = [value[key] for key in _ANSWER_KEYS if isinstance(value.get(key), str)]
            if texts:
                return (_message("assistant", texts[0]),)
        value = [value]
    return _messages(name, value, layout)


def _own_score(response: object) -> float | None:
    """A response's score where it is an object that holds one; a rank counts down from the best."""
    if not isinstance(response, dict):
        return None
    for key in _SCORE_KEYS:
        if (score := _number(response.get(key))) is not None:
            return score
    rank = _number(response.get("rank"))
    return None if rank is None else -rank


def _verdict(value: object) -> float | None:
    """1 or 2 as 1 or −1, between them what lies between; 0 and 1.5 as 0. None where there is no verdict."""
    if _is_null(value) or value == "":
        return None
    number = _number(value)
    if number is None or not (number == 0 or 1 <= number <= 2):
        raise BadRecord(
            "wrong_value",
            f"the preference is {shown(value)}; expected 1 or 2, a number between them, or 0 or 1.5 for a tie",
        )
    return 3 - 2 * number if number else 0.0


def _number(value: object) -> float | None:
    """The value as a finite number, also where a table of text spells it."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


_ROLE_NAMES = {role: role for role in ROLES} | {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function": "tool",
}  # fmt: skip


def _messages(column: str, value: object, layout: Layout) -> Conversation:
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
        turns.append(_message(role, _joined(text, f"{column}[{index}]")))
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
                f"{where} has a part of type {_start(kind)}" if kind else f"{where} has a part {shown(part)}",
                "leave the record out: qorpo trains on text",
            )
        texts.append(part["text"])
    return "".join(texts)


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
            f"no column 'prompt', and {column!r} is no HH-RLHF transcript but {shown(text)}",
            "add the prompts, or name their column in data.columns",
        )
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(_message(_LABEL_ROLES[label], content.strip()) for label, content in turns)


def turn_key(message: Message) -> tuple[str, str]:
    """What makes two turns the same: role and text, whatever whitespace surrounds it."""
    return message["role"], message["content"].strip()


def _holds(turns: Conversation, part: Conversation) -> bool:
    keys, wanted = [turn_key(turn) for turn in turns], [turn_key(turn) for turn in part]
    return any(keys[start : start + len(wanted)] == wanted for start in range(len(keys)))


def _is_null(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


# --- what no shape can read ---


def _unreadable(record: dict[Any, Any], fields: Fields, shapes: Sequence[Shape]) -> BadRecord:
    columns = [_start(name) + (" (null)" if _is_null(value) else "") for name, value in record.items()]
    found = ", ".join(columns[:COLUMNS_SHOWN] + ["…"] * (len(columns) > COLUMNS_SHOWN))
    has_answer = any(
        isinstance(record.get(name), str | list) for name in ("completion", "messages", *_ANSWER_KEYS)
    )
    if {"label", "kto_tag"} & record.keys() and (has_answer or "prompt" in fields):
        return BadRecord(
            "unpaired",
            f"one answer and a label, as for KTO; found {found}",
            "pair a good and a bad answer to each prompt, as prompt, chosen and rejected",
        )
    nearest = max(shapes, key=lambda shape: len(shape.fields & fields.keys() - {"prompt"}))
    missing = nearest.fields - fields.keys()
    if has_answer and not {"chosen", "rejected", "output_1", "output_2", "responses"} & fields.keys():
        return BadRecord(
            "no_rejected",
            f"one answer and none to compare it with, as for supervised fine-tuning; found {found}",
            "ORPO learns from pairs: give each prompt a chosen and a rejected answer",
        )
    return BadRecord(
        "missing_column",
        f"no column {', '.join(map(repr, sorted(missing)))}; found {found or 'none'}; "
        f"expected {_expected([nearest] if nearest.fields & fields.keys() - {'prompt'} else shapes)}",
        "rename the column, or name it in data.columns",
    )


def _expected(shapes: Sequence[Shape] = SHAPES) -> str:
    return "; or ".join(shape.description for shape in shapes)


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
    return f"{_KINDS.get(type(value), type(value).__name__)} ({_start(value)})"


def _start(value: object) -> str:
    try:
        text = repr(value[:60] if isinstance(value, str) else value)
    except (RecursionError, ValueError):  # nested deeply, or a number of more digits than Python writes
        return "..."
    return text if len(text) <= 60 else text[:57] + "..."
