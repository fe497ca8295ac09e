"""Answers kept as they come, so that a kill loses none: a file beside the output that a finished run turns into it.

The first line says what the answers were made with, each further line is one of them.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

from qorpo.errors import DamageError, RunError
from qorpo.failed_write import failed_write
from qorpo.storage import flush, make_folder, owned_file, write_text

Key = tuple[str | int, int, int]
"""A prompt's id, a sample, a turn."""


@dataclass(frozen=True)
class KeptAnswer:
    """One turn of the assistant's."""

    id: str | int
    sample: int
    turn: int
    text: str
    finished: bool
    made_at: float

    @property
    def key(self) -> Key:
        return self.id, self.sample, self.turn


class Kept:
    """The answers so far, by key; `add` has more of them on disk before it returns."""

    def __init__(self, file: BinaryIO | None = None, answers: Sequence[KeptAnswer] = ()):
        self._file = file
        self.answers = {each.key: each for each in answers}

    def add(self, answers: Sequence[KeptAnswer]) -> None:
        new = [each for each in answers if each.key not in self.answers]
        self.answers |= {each.key: each for each in new}
        if self._file is not None:
            self._file.write(b"".join(_line(asdict(each)) for each in new))
            self._file.flush()
            os.fsync(self._file.fileno())


def part_of(output: Path) -> Path:
    return output.with_name(output.name + ".part")


def check_free(output: Path) -> None:
    """Raises RunError where the output is there already, and no answers beside it that it is still to be made of."""
    if output.is_dir() or (output.exists() and not part_of(output).exists()):
        raise RunError(f"--output {output}: something is there already; give another output, or remove it")


@contextmanager
def kept_answers(output: Path, made_with: Mapping[str, Any]) -> Iterator[Kept]:
    """The answers that an earlier run left for this output; what the block adds is kept for a later one.

    Args:
        made_with: JSON values; answers made with others are refused.

    Raises:
        RunError: for such answers, where another process is writing them, or where they can't be written.
        DamageError: for a file that is none of answers.
    """
    part = part_of(output)
    with _writing(output, part):
        make_folder(output.absolute().parent)
        with part.open("a+b") as file, owned_file(part):
            flush(part.parent)
            yield Kept(file, _read(file, part, made_with))


def finish(output: Path, text: str) -> None:
    """Write the output whole, after which the answers beside it are needed no more."""
    with _writing(output, part_of(output)):
        write_text(output, text)
        part_of(output).unlink(missing_ok=True)
        flush(output.absolute().parent)


@contextmanager
def _writing(output: Path, part: Path) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        if (failed := failed_write(error)) is None:
            raise
        raise RunError(
            f"--output {output}: could not be written ({failed.reason}); {failed.remedy}, then try again: "
            f"the answers in {part} are kept"
        ) from error


def _read(file: BinaryIO, part: Path, made_with: Mapping[str, Any]) -> list[KeptAnswer]:
    file.seek(0)
    content = file.read()
    whole = content[: content.rfind(b"\n") + 1]  # a kill or a full disk may have torn the last line
    file.truncate(len(whole))
    if not whole:
        file.write(_line(made_with))
        file.flush()
        return []
    try:
        first, *lines = (json.loads(line) for line in whole.splitlines())
        answers = [KeptAnswer(**line) for line in lines]
        found = sorted(key for key in {*first, *made_with} if first.get(key) != made_with.get(key))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise DamageError(f"{part}: is damaged ({error}); remove it to answer anew") from error
    if found:
        changes = (f"{key}: {_shown(first.get(key))} then, {_shown(made_with.get(key))} now" for key in found)
        raise RunError(
            "\n  ".join(
                [
                    f"{part}: holds answers that were made with something else; give another output, or remove it:",
                    *changes,
                ]
            )
        )
    return answers


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, ensure_ascii=False, sort_keys=True).encode() + b"\n"
