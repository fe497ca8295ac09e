"""Records of one answer to each prompt, as supervised fine-tuning takes them: read as conversations that end in it."""

from qorpo.data.conversations import Layout, answer_of, messages_of, shown, transcript_of
from qorpo.data.records import BadRecord, Conversation
from qorpo.data.shapes import SHAPES, fields_of, prompt_of


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
