"""A report as one HTML file: nothing is loaded from elsewhere, everything from a run or row is escaped."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from qorpo.errors import RunError
from qorpo.failed_write import FailedWrite, failed_write
from qorpo.printable import printable
from qorpo.reports.charts import Chart, drawn
from qorpo.storage import unfinished_of, write_bytes

LONGEST_TEXT = 2_000  # characters of a cell or a part of a pair; a page is no place for a book


@dataclass(frozen=True)
class Table:
    """Rows of text under a head; the first column is text, the others are figures where `figures`."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    figures: bool = True


@dataclass(frozen=True)
class Part:
    """A piece of a shown pair: its text, and classes of the page's style (prompt, chosen, learned, special, …)."""

    text: str
    style: str = ""


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it, in this order."""

    title: str
    text: Sequence[str] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    pairs: Sequence[tuple[str, Sequence[tuple[str, Sequence[Part]]]]] = ()  # (source, ((side, its parts), …))
    commands: Sequence[str] = ()
    folded: str = ""  # a long text that opens at a click


@dataclass(frozen=True)
class Page:
    title: str
    verdict: str = ""
    state: str = ""
    warnings: Sequence[str] = ()
    sections: Sequence[Section] = field(default_factory=list)

    def html(self) -> str:
        return _template().render(page=self, drawn=drawn)

    @property
    def charts(self) -> list[Chart]:
        return [chart for section in self.sections for chart in section.charts]


@cache
def _template() -> Any:
    import jinja2  # here: the command line answers --help without it

    environment = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        finalize=lambda value: _shown(value) if type(value) is str else value,
    )
    return environment.get_template("page.html.jinja")


def _shown(text: str) -> str:
    """Control characters spelled out, and no more of a text than a page can bear."""
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}… ({len(text) - LONGEST_TEXT:,} more characters)"
    return printable(text)


def check_output(path: Path, endings: Sequence[str]) -> None:
    """Raises RunError where nothing can be written there: another ending, a folder, or no file to be made."""
    if path.suffix not in endings:
        raise RunError(f"{path}: unknown extension {path.suffix!r}; expected {' or '.join(endings)}")
    if path.is_dir():
        raise RunError(f"{path}: is a folder; give the name of a file")
    try:
        unfinished_of(path).touch()
    except OSError as error:
        raise unwritable(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished_of(path).unlink(missing_ok=True)


def write_output(path: Path, content: bytes) -> None:
    """Whole or not at all. Raises RunError where it can't be written."""
    try:
        write_bytes(path, content)
    except OSError as error:
        raise unwritable(path, error) from error


def unwritable(path: Path, error: OSError) -> RunError:
    failed = failed_write(error) or FailedWrite(str(error), "fix that")
    return RunError(f"{path}: can't be written ({failed.reason}); {failed.remedy}, or give another --output")
