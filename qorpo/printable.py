"""Text from elsewhere (rows, file names, templates, other libraries' errors), safe to show on a terminal."""

import re

# All that a terminal obeys: control characters but for tab and line feed, also those of eight bits (U+009B opens an
# escape sequence); marks that turn the direction of writing, which can make one name look like another; line
# separators; and halves of surrogate pairs, which can't be written at all (Python holds a byte of a file name that is
# not UTF-8 as U+DC80 + byte).
_OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


def printable(text: str) -> str:
    """The text with whatever a terminal would obey spelled out: an escape is `\\x1b`."""
    return _OBEYED.sub(_spelled, text)


def _spelled(match: re.Match[str]) -> str:
    code = ord(match[0])
    if 0xDC80 <= code <= 0xDCFF:
        code -= 0xDC00
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
