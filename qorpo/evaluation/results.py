"""What an evaluation found: figures with their intervals, lines for a person, and JSON."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qorpo.console import aligned, figure
from qorpo.errors import RunError
from qorpo.failed_write import FailedWrite, failed_write
from qorpo.intervals import Interval
from qorpo.storage import unfinished_of, write_json


@dataclass(frozen=True)
class Figure:
    """One number of a model; where it was compared, the base's and the difference (model minus base), paired."""

    value: Interval
    base: Interval | None = None
    difference: Interval | None = None


@dataclass(frozen=True)
class Result:
    """What one `--on` came to. `notes`: JSON that explains the figures: counts, settings, where answers are."""

    on: str
    figures: Mapping[str, Figure]
    notes: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "figures": {name: asdict(each) for name, each in self.figures.items()},
            "notes": dict(self.notes),
        }

    def lines(self) -> Iterator[str]:
        """A table for a person, and the notes."""
        yield self.on
        is_compared = any(each.difference for each in self.figures.values())
        rows = [
            ["", "value", "95% interval", *(["base", "difference", "95% interval"] if is_compared else [])]
        ]
        for name, each in self.figures.items():
            row = [name, figure(each.value.value), _span(each.value)]
            if is_compared:
                base, difference = each.base, each.difference
                row += [
                    figure(base.value) if base else "",
                    *(_difference(difference) if difference else ["", ""]),
                ]
            rows.append(row)
        yield from (f"  {line}" for line in aligned(rows))
        for name, note in self.notes.items():
            if isinstance(note, Mapping):
                note = ", ".join(f"{count} {reason}" for reason, count in note.items() if count) or "none"
            yield f"  {name}: {note}"


def _span(of: Interval) -> str:
    return "" if of.low is None or of.high is None else f"{figure(of.low)} to {figure(of.high)}"


def _difference(of: Interval) -> list[str]:
    return [("+" if of.value > 0 else "") + figure(of.value), _span(of)]


def check_output(path: Path) -> None:
    """Raises RunError where a results file can't be written; better known before an evaluation than after it."""
    if path.is_dir():
        raise RunError(f"--output {path}: is a folder; give the name of a file")
    try:
        unfinished_of(path).touch()
        unfinished_of(path).unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def write_results(path: Path, content: Any) -> None:
    """JSON, whole or not at all, in place of what stood there. Raises RunError where it can't be written."""
    check_output(path)
    try:
        write_json(path, content)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RunError:
    failed = failed_write(error) or FailedWrite(str(error), "fix that")
    return RunError(f"{path}: can't be written ({failed.reason}); {failed.remedy}, then try again")
