"""Records of any shape made sense of: what was asked, and which of two answers to it is better.

A record's columns become fields, under whichever name they are known (ALIASES); a shape is the fields it needs and
one reader. A new shape is a row of SHAPES, a new name of a column a word in ALIASES. What a comparison is worth as a
pair is judged in filters.py.
"""

import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from qorpo.data.conversations import (
    ANSWER_KEYS,
    Layout,
    answer_of,
    history_of,
    is_null,
    message,
    messages_of,
    shown,
    start_of,
    transcript_of,
    turn_key,
)
from qorpo.data.records import BadRecord, Conversation, Unusable


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
    "response": ("response", "output", "completion", "answer", "target"),
    "conversation": ("messages", "conversations", "conversation"),
    "label": ("label", "kto_tag"),
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
    fields = fields_of(record, layout)
    shapes = [shape for shape in SHAPES if layout.shape in (None, shape.name)]
    for shape in shapes:
        if shape.fields <= fields.keys():
            return shape.read(fields, layout)
    raise _unreadable(record, fields, shapes)


def fields_of(record: Mapping[str, Any], layout: Layout) -> Fields:
    columns = {name: value for name, value in record.items() if not is_null(value)}
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


def has_column(name: str, record: Mapping[str, Any], layout: Layout) -> bool:
    """Whether a record has a field's column, be it null."""
    given = layout.columns.get(name)
    return any(column in record for column in (ALIASES[name] if given is None else (given,)))


# --- the shapes ---


def _chosen_rejected(fields: Fields, layout: Layout) -> list[Comparison]:
    """chosen and rejected, each an answer, or a whole conversation: as messages, or as an HH-RLHF transcript."""
    prompt = prompt_of(fields, layout) if "prompt" in fields else None

    def conversation(side: str) -> Conversation:
        value = fields[side]
        if prompt is None:
            return transcript_of(side, value) if isinstance(value, str) else messages_of(side, value, layout)
        turns = answer_of(side, value, layout)
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
    prompt = prompt_of(fields, layout)
    first, second = (prompt + answer_of(name, fields[name], layout) for name in ("output_1", "output_2"))
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
    prompt = prompt_of(fields, layout)
    answers = [prompt + answer_of(f"responses[{n}]", text, layout) for n, text in enumerate(responses)]
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


def prompt_of(fields: Fields, layout: Layout) -> Conversation:
    """The prompt's turns, after the system's and the history's where they have columns of their own."""
    value = fields["prompt"]
    if not isinstance(value, str):
        turns = messages_of("prompt", value, layout)
    elif re.match(r"\s*Human:", value) and value.rstrip().endswith("\n\nAssistant:"):
        turns = transcript_of("prompt", value)[:-1]
    else:
        extra = fields.get("input", "")
        if not isinstance(extra, str):
            raise BadRecord("wrong_type", f"'input' is {shown(extra)}; expected text")
        # As LLaMA-Factory joins them.
        turns = (message("user", f"{value}\n{extra}" if extra.strip() else value),)
    turns = history_of(fields.get("history", []), layout) + turns
    system = fields.get("system", "")
    if not isinstance(system, str):
        raise BadRecord("wrong_type", f"'system' is {shown(system)}; expected text")
    if system.strip() and turns[:1] and turns[0]["role"] != "system":
        turns = (message("system", system), *turns)
    return turns


_SCORE_KEYS = ("overall_score", "score", "rating", "reward")


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
    if is_null(value) or value == "":
        return None
    number = _number(value)
    if number is None or not (number == 0 or 1 <= number <= 2):
        raise BadRecord(
            "wrong_value",
            f"the preference is {shown(value)}; expected 1 or 2, a number between them, or 0 or 1.5 for a tie",
        )
    return 3 - 2 * number if number else 0.0


def label_of(value: object) -> bool:
    """A label's truth: true or false, 1 or 0, also where a table of text spells it."""
    words = {"true": True, "false": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    number = _number(value)
    if number not in (0, 1):
        raise BadRecord("wrong_value", f"the label is {shown(value)}; expected true or false, or 1 or 0")
    return bool(number)


def _number(value: object) -> float | None:
    """The value as a finite number, also where a table of text spells it."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _holds(turns: Conversation, part: Conversation) -> bool:
    keys, wanted = [turn_key(turn) for turn in turns], [turn_key(turn) for turn in part]
    return any(keys[start : start + len(wanted)] == wanted for start in range(len(keys)))


# --- what no shape can read ---


def _unreadable(record: dict[Any, Any], fields: Fields, shapes: Sequence[Shape]) -> BadRecord:
    columns = [start_of(name) + (" (null)" if is_null(value) else "") for name, value in record.items()]
    found = ", ".join(columns[:COLUMNS_SHOWN] + ["…"] * (len(columns) > COLUMNS_SHOWN))
    has_answer = any(
        isinstance(record.get(name), str | list) for name in ("completion", "messages", *ANSWER_KEYS)
    )
    if {"label", "kto_tag"} & record.keys() and (has_answer or "prompt" in fields):
        return BadRecord(
            "unpaired",
            f"one answer and a label, as for KTO; found {found}",
            "pair a good and a bad answer to each prompt, as prompt, chosen and rejected, or set objective.name: kto",
        )
    nearest = max(shapes, key=lambda shape: len(shape.fields & fields.keys() - {"prompt"}))
    missing = nearest.fields - fields.keys()
    if has_answer and not {"chosen", "rejected", "output_1", "output_2", "responses"} & fields.keys():
        return BadRecord(
            "no_rejected",
            f"one answer and none to compare it with, as for supervised fine-tuning; found {found}",
            "give each prompt a chosen and a rejected answer, or set objective.name: sft, which learns from one",
        )
    return BadRecord(
        "missing_column",
        f"no column {', '.join(map(repr, sorted(missing)))}; found {found or 'none'}; "
        f"expected {_expected([nearest] if nearest.fields & fields.keys() - {'prompt'} else shapes)}",
        "rename the column, or name it in data.columns",
    )


def _expected(shapes: Sequence[Shape] = SHAPES) -> str:
    return "; or ".join(shape.description for shape in shapes)
