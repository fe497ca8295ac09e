"""Where results are written: whole or not at all, and known to be possible before an evaluation takes an hour."""

from pathlib import Path
from typing import Any

from qorpo.errors import RunError
from qorpo.failed_write import FailedWrite, failed_write
from qorpo.storage import unfinished_of, write_json


def check_output(path: Path) -> None:
    """Raises RunError where a results file can't be written."""
    if path.is_dir():
        raise RunError(f"--output {path}: is a folder; give the name of a file")
    try:
        unfinished_of(path).touch()
        unfinished_of(path).unlink()
    except OSError as error:
        raise _unwritable(path, error) from error


def write_results(path: Path, content: Any) -> None:
    """JSON, in place of what stood there. Raises RunError where it can't be written."""
    check_output(path)
    try:
        write_json(path, content)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> RunError:
    failed = failed_write(error) or FailedWrite(str(error), "fix that")
    return RunError(
        f"--output {path}: can't be written ({failed.reason}); {failed.remedy}, or give another --output"
    )
