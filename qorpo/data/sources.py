"""Where preference pairs come from: files of records, read one at a time, each with its place."""

import gzip
import hashlib
import json
import os
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from qorpo.data.filters import make_pair, notes
from qorpo.data.records import BadRecord, DataReport, PairSet, Unusable, read_conversations
from qorpo.errors import DataError

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
DEMO_FILES = {"demo": "train.jsonl", "demo:train": "train.jsonl", "demo:eval": "eval.jsonl"}

PROBLEMS_SHOWN = 5

Source = str | os.PathLike[str]
Found = tuple[str, Any]  # (where, the record) or (where, a BadRecord)


def load_pairs(
    source: Source | Sequence[Source], *, on_bad_record: Literal["fail", "skip"] = "fail"
) -> PairSet:
    """The preference pairs of a file, of "demo" or "demo:eval", or of a list of these.

    A record that makes no pair (make_pair says which) is dropped and counted. A record that can't be read raises
    DataError, after all of them have been read and with the first few named; with on_bad_record="skip" it is
    dropped and counted too. DataError as well for a source that can't be read, or when no pair is left.
    """
    if on_bad_record not in ("fail", "skip"):
        raise DataError(f"data.on_bad_record: {on_bad_record!r}; expected fail or skip")
    paths = _paths(source)
    report = DataReport()
    pairs, problems = [], []
    for path in paths:
        for where, record in read_records(path):
            try:
                if isinstance(record, BadRecord):
                    raise record
                pair = make_pair(*read_conversations(record), where)
            except (BadRecord, Unusable) as finding:
                report.drop(finding.reason, where)
                if isinstance(finding, BadRecord):
                    problems.append((where, finding))
                continue
            pairs.append(pair)
            report.kept += 1
            for reason in notes(pair):
                report.note(reason, where)
        report.sources.append({"path": str(path), "sha256": _sha256(path)})
    if problems and on_bad_record == "fail":
        raise DataError(_problems_text(paths, report.read, problems))
    if not pairs:
        raise DataError(_nothing_text(paths, report))
    return PairSet(pairs, report)


def read_records(path: Source) -> Iterator[Found]:
    """The records of a .jsonl, .json, .jsonl.gz or .json.gz file in UTF-8, each as (where, record).

    `where` is "pairs.jsonl:41" (lines from 1; blank ones are skipped) or "pairs.json[40]" (items from 0). A .json
    file is a list of records, or an object that holds just one list. A line that can't be read comes as
    (where, BadRecord). Lines are streamed. Raises DataError for a file that can't be read as a whole.
    """
    path = _checked(Path(path))
    kind = _kind(path)
    try:
        with cast(BinaryIO, gzip.open(path) if path.suffix == ".gz" else path.open("rb")) as file:
            yield from READERS[kind](file, path.name)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: the gzip stream is broken ({error}); fetch or compress the file again"
        ) from error
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from error


def _read_lines(file: BinaryIO, name: str) -> Iterator[Found]:
    for number, line in enumerate(file, start=1):
        where = f"{name}:{number}"
        try:
            # utf-8-sig also takes the byte order mark some editors write first.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield where, json.loads(text)
        except UnicodeDecodeError as error:
            yield where, BadRecord("not_utf8", _bad_byte(error), "save the file as UTF-8")
        except (ValueError, RecursionError) as error:
            # The error's own text would name line 1, of this line.
            at = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            yield (
                where,
                BadRecord("not_json", f"not JSON ({at}); expected one record a line", "mend the line"),
            )


def _read_document(file: BinaryIO, name: str) -> Iterator[Found]:
    try:
        document = json.loads(file.read().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: {_bad_byte(error)}; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{name}: not JSON ({error}); if it holds one record a line, name it .jsonl"
        ) from None
    if isinstance(document, dict):
        lists = [key for key, value in document.items() if isinstance(value, list)]
        if len(lists) != 1:
            held = ", ".join(map(repr, lists)) or "none"
            raise DataError(
                f"{name}: an object with {len(lists)} lists ({held}); expected one list of records"
            )
        document = document[lists[0]]
    if not isinstance(document, list):
        raise DataError(f"{name}: holds {type(document).__name__}; expected a list of records")
    yield from ((f"{name}[{index}]", record) for index, record in enumerate(document))


READERS = {".jsonl": _read_lines, ".json": _read_document}
EXPECTED_FILE = "a file ending in .jsonl, .json, .jsonl.gz or .json.gz"


def _kind(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix == ".gz" else path.suffix


def _checked(path: Path) -> Path:
    """The path, if a file of a known kind is there."""
    path = path.expanduser()
    if path.is_dir():
        held = sorted(file.name for file in path.iterdir() if _kind(file) in READERS)
        listed = f"; it holds {', '.join(held[:3])}{', ...' if len(held) > 3 else ''}" if held else ""
        raise DataError(f"{path} is a folder; expected {EXPECTED_FILE}, or a list of these{listed}")
    if not path.exists():
        raise DataError(f"{path}: no such file; expected {EXPECTED_FILE}, or the name demo")
    if _kind(path) not in READERS:
        raise DataError(f"{path}: unknown extension {path.suffix!r}; expected {EXPECTED_FILE}")
    return path


def _paths(source: Source | Sequence[Source]) -> list[Path]:
    """The files of a source; every one that can't be read is named at once."""
    sources = [source] if isinstance(source, (str, os.PathLike)) else list(source)
    if not sources:
        raise DataError("no source of pairs; give a file, demo, or a list of these")
    paths, problems = [], []
    for each in sources:
        demo = DEMO_FILES.get(os.fspath(each))
        try:
            paths.append(_checked(DEMO_FOLDER / demo if demo else Path(each)))
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return paths


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _bad_byte(error: UnicodeDecodeError) -> str:
    return f"byte 0x{error.object[error.start]:02x} is not UTF-8"


def _named(paths: list[Path]) -> str:
    return ", ".join(map(str, paths))


def _problems_text(paths: list[Path], read: int, problems: list[tuple[str, BadRecord]]) -> str:
    skip = "or set data.on_bad_record: skip"
    shown = problems[:PROBLEMS_SHOWN]
    if len(problems) == 1:
        ((where, problem),) = shown
        return f"{where}: {problem}; {problem.remedy}, {skip}"
    counts = Counter(problem.reason for _, problem in problems).most_common()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts)
    lines = [
        f"{len(problems):,} of {read:,} records of {_named(paths)} can't be read ({reasons}); mend them, {skip}:"
    ]
    lines += [f"{where}: {problem}; {problem.remedy}" for where, problem in shown]
    if len(problems) > len(shown):
        lines.append(f"and {len(problems) - len(shown):,} more")
    return "\n  ".join(lines)


def _nothing_text(paths: list[Path], report: DataReport) -> str:
    places = "; ".join(f"{reason}: {', '.join(where)}" for reason, where in report.examples.items())
    look = f"look at {places}" if places else "the file holds no records"
    return f"0 usable pairs in {_named(paths)}: {report.summary()}; {look}"
