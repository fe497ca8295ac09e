"""Records of one answer to each prompt, read as conversations that end in it; for kto with a label."""

from typing import NamedTuple

from qorpo.data.conversations import Layout, answer_of, messages_of, shown, transcript_of
from qorpo.data.records import BadRecord, Conversation, Unusable
from qorpo.data.shapes import SHAPES, fields_of, has_column, label_of, prompt_of


class Labelled(NamedTuple):
    """A conversation that ends in an answer, and whether that is a good one."""

    turns: Conversation
    desirable: bool


def read_labelled(record: object, layout: Layout) -> Labelled | None:
    """As `read_demonstration`, with the record's label.

    Raises BadRecord too where it has no column of labels, or one that is neither true nor false; Unusable
    (`no_verdict`) where the label is null.
    """
    turns = read_demonstration(record, layout)
    if turns is None:
        return None
    assert isinstance(record, dict)
    fields = fields_of(record, layout)
    if "label" in fields:
        return Labelled(turns, label_of(fields["label"]))
    if has_column("label", record, layout):
        raise Unusable("no_verdict")
    raise BadRecord(
        "missing_column",
        f"one answer and no label; found {shown(list(record))}",
        "add label: true or false, name its column in data.columns, or set objective.name: sft",
    )


def read_demonstration(record: object, layout: Layout) -> Conversation | None:
    """A record's conversation; None where it holds answers to compare, which shapes.py reads.

    Raises BadRecord if it holds neither.
    """
    if not isinstance(record, dict) or layout.shape is not None:
        return None
    fields = fields_of(record, layout)
    if any(shape.fields <= fields.keys() for shape in SHAPES):
        return None
    if "prompt" in fields and "response" in fields:
        return prompt_of(fields, layout) + answer_of("response", fields["response"], layout)
    if "conversation" not in fields:
        raise BadRecord(
            "missing_column",
            f"no prompt with a response, no messages, and nothing to compare; found {shown(list(record))}",
            "rename the columns, or name them in data.columns",
        )
    value = fields["conversation"]
    if isinstance(value, str):
        return transcript_of("conversation", value)
    messages_of("conversation", value, layout)  # a list of messages, or what is wrong is said of this column
    return prompt_of(fields | {"prompt": value}, layout)
