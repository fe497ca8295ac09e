"""Files of records: each format's reader yields (where, record), and a record that can't be read as (where, BadRecord).

`where` is "pairs.jsonl:41" (lines from 1) or "pairs.parquet[40]" (rows and items from 0). What a file can make a
reader hold or do is bounded: a line or row, a .json, what a compressed file unpacks to.
"""

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from qorpo.data.records import BadRecord
from qorpo.errors import DataError
from qorpo.printable import printable

Found = tuple[str, Any]  # (where, the record) or (where, a BadRecord)

ROWS_PER_BATCH = 1024
EXPECTED_FILE = "a file ending in .jsonl, .json, .csv (these also as .gz or .zst), .parquet or .arrow"

MOST_BYTES_OF_A_RECORD = 16 << 20
MOST_BYTES_OF_A_DOCUMENT = 1 << 30  # read whole it takes several times that
# Text packs to a tenth, rarely a fiftieth. What unpacks to more than both of these was made to fill memory or time.
MOST_BYTES_UNPACKED = 4 << 30
MOST_TIMES_UNPACKED = 200


def read_records(path: str | os.PathLike[str]) -> Iterator[Found]:
    """The records of a file, streamed but for .json, which is read whole.

    A .json file is a list of records, an object that holds just one list, or one record a line. Text is UTF-8; a table
    is of commas, semicolons or tabs, whichever its header has most of.
    Raises DataError for a file that can't be read as a whole.
    """
    path = Path(path)
    kind, compression = file_kind(path)
    if kind is None:
        raise DataError(f"{path}: unknown extension {path.suffix!r}; expected {EXPECTED_FILE}")
    import pyarrow

    name = printable(path.name)
    try:
        if kind in COLUMNAR:
            yield from COLUMNAR[kind](path, name)
        else:
            with _open(path, compression) as file:
                _check_encoding(file, name)
                yield from TEXT[kind](file, name)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip stream is broken ({error}); {_AGAIN}") from error
    except DataError:
        raise
    except Exception as error:
        if kind in TEXT and not isinstance(error, OSError | pyarrow.ArrowException):
            raise  # a fault of ours; of a damaged table, Arrow's readers raise every kind there is
        # Arrow's errors of input are OSErrors without a number.
        what = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path}: can't be read ({what[:200]}); {_AGAIN}") from error


_AGAIN = "fetch or write the file again"


def file_kind(path: Path) -> tuple[str | None, str | None]:
    """(format, compression) by the name's end; the format is None where it is none of ours."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    suffix = Path(path.stem).suffix if compression else path.suffix
    known = suffix in TEXT or (suffix in COLUMNAR and not compression)
    return (suffix if known else None), compression


# --- opening ---


def _open(path: Path, compression: str | None) -> io.BufferedReader:
    if compression is None:
        return path.open("rb")
    most = max(MOST_BYTES_UNPACKED, MOST_TIMES_UNPACKED * path.stat().st_size)
    packed = gzip.open(path) if compression == "gzip" else _zstd(path)  # noqa: SIM115
    return io.BufferedReader(_Unpacked(cast(BinaryIO, packed), path, most))


def _zstd(path: Path) -> Any:
    import pyarrow

    return pyarrow.CompressedInputStream(_arrow_file(path), "zstd")


def _arrow_file(path: Path) -> Any:
    import pyarrow

    return pyarrow.OSFile(os.fsencode(path))  # as bytes: a name need not be UTF-8


class _Unpacked(io.RawIOBase):
    """What a compressed file unpacks to; raises DataError past `most` bytes."""

    def __init__(self, packed: BinaryIO, path: Path, most: int):
        self.packed, self.path, self.left = packed, path, most
        self.most = most

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.packed.read(len(buffer))
        buffer[: len(data)] = data
        self.left -= len(data)
        if self.left < 0:
            raise DataError(
                f"{self.path}: unpacks to over {self.most >> 30} GiB, {MOST_TIMES_UNPACKED} times its size; "
                "unpack it yourself, if that is right"
            )
        return len(data)

    def close(self) -> None:
        self.packed.close()
        super().close()


def _check_encoding(file: io.BufferedReader, name: str) -> None:
    start = file.peek(4)[:4]
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in start:
        raise DataError(f"{name}:1: the file is UTF-16 or UTF-32; save it as UTF-8")


# --- text ---


def _read_lines(file: io.BufferedReader, name: str) -> Iterator[Found]:
    number = 0
    while line := file.readline(MOST_BYTES_OF_A_RECORD + 1):
        number += 1
        where = f"{name}:{number}"
        if len(line) > MOST_BYTES_OF_A_RECORD:
            _skip_line(file, line)
            yield where, _too_long()
            continue
        try:
            # utf-8-sig also takes the byte order mark some editors write first.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield where, json.loads(text)
        except UnicodeDecodeError as error:
            yield where, _not_utf8(error.object[error.start])
        except (ValueError, RecursionError) as error:
            # The error's own text would name line 1, of this line.
            at = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            yield (
                where,
                BadRecord("not_json", f"not JSON ({at}); expected one record a line", "fix the line"),
            )


def _skip_line(file: Any, line: Any) -> None:
    """Read on to the end of a line, of which `line` was read, holding no more than that."""
    while line and line[-1:] not in (b"\n", "\n", "\r"):
        line = file.readline(1 << 20)


def _too_long() -> BadRecord:
    return BadRecord(
        "record_too_long", f"the record has over {MOST_BYTES_OF_A_RECORD >> 20} MiB", "cut or remove it"
    )


def _not_utf8(byte: int) -> BadRecord:
    return BadRecord("not_utf8", f"byte 0x{byte:02x} is not UTF-8", "save the file as UTF-8")


def _read_document(file: io.BufferedReader, name: str) -> Iterator[Found]:
    data = file.read(MOST_BYTES_OF_A_DOCUMENT + 1)
    if len(data) > MOST_BYTES_OF_A_DOCUMENT:
        raise DataError(
            f"{name}: over {MOST_BYTES_OF_A_DOCUMENT >> 30} GiB, and .json is read whole; write one record a line, as .jsonl"
        )
    try:
        document = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        problem = _not_utf8(error.object[error.start])
        raise DataError(f"{name}:{line}: {problem}; {problem.remedy}") from None
    except (ValueError, RecursionError) as error:
        if (
            isinstance(error, json.JSONDecodeError)
            and error.msg == "Extra data"
            and data.lstrip()[:1] == b"{"
        ):
            # One record a line, under .json's name.
            yield from _read_lines(io.BufferedReader(cast(Any, io.BytesIO(data))), name)
            return
        raise DataError(
            f"{name}: not JSON ({error}); if it holds one record a line, name it .jsonl"
        ) from None
    del data
    if isinstance(document, dict):
        lists = [key for key, value in document.items() if isinstance(value, list)]
        if len(lists) != 1:
            held = ", ".join(repr(key)[:60] for key in lists[:12]) or "none"
            raise DataError(
                f"{name}: an object with {len(lists)} lists ({held}); expected one list of records"
            )
        document = document[lists[0]]
    if not isinstance(document, list):
        raise DataError(f"{name}: holds {type(document).__name__}; expected a list of records")
    yield from ((f"{name}[{index}]", record) for index, record in enumerate(document))


def _read_table(file: io.BufferedReader, name: str) -> Iterator[Found]:
    """Rows of a table with a header, each cell text; one that holds messages in JSON is read as these."""
    csv.field_size_limit(MOST_BYTES_OF_A_RECORD)
    header = file.peek(1).partition(b"\n")[0]
    lines = _TableLines(file)
    rows = csv.DictReader(lines, delimiter=max(",;\t", key=lambda mark: header.count(mark.encode())))
    while True:
        first = lines.number + 1
        lines.start_record()
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield f"{name}:{lines.number}", BadRecord("not_csv", f"not CSV ({error})", "fix the line")
            continue
        except BadRecord as problem:
            yield f"{name}:{lines.number}", problem
            continue
        if row is None:
            return
        yield f"{name}:{max(first, 2)}", _row_record(row)


class _TableLines:
    """The lines of a table as text. A record longer than it may be raises BadRecord, and reading can go on."""

    def __init__(self, file: BinaryIO):
        # Bytes that are no UTF-8 become lone surrogates, so that only their row is bad.
        self.text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
        self.number = 0
        self.start_record()

    def start_record(self) -> None:
        self.left = MOST_BYTES_OF_A_RECORD

    def __iter__(self) -> "_TableLines":
        return self

    def __next__(self) -> str:
        line = self.text.readline(self.left + 1)
        if not line:
            raise StopIteration
        self.number += 1
        self.left -= len(line)
        if self.left < 0:
            _skip_line(self.text, line)
            raise _too_long()
        return line


def _row_record(row: dict[Any, Any]) -> Any:
    if None in row:
        return BadRecord(
            "not_csv", f"{len(row[None])} cells more than columns", "quote cells that hold commas"
        )
    for cell in row.values():
        try:
            (cell or "").encode()
        except UnicodeEncodeError as error:
            return _not_utf8(ord(cell[error.start]) & 0xFF)
    return {column: _cell(text) for column, text in row.items()}


def _cell(text: str | None) -> Any:
    if text and text.lstrip()[:1] in ("[", "{"):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return text
        items = value if isinstance(value, list) else [value]
        if items and all(isinstance(i, dict) and ({"role", "from"} & i.keys()) for i in items):
            return value
    return text


TEXT: dict[str, Callable[[io.BufferedReader, str], Iterator[Found]]] = {
    ".jsonl": _read_lines,
    ".json": _read_document,
    ".csv": _read_table,
}

# --- tables of columns ---


def _read_parquet(path: Path, name: str) -> Iterator[Found]:
    import pyarrow.parquet

    with _arrow_file(path) as opened, pyarrow.parquet.ParquetFile(opened) as file:
        yield from _rows(file.iter_batches(ROWS_PER_BATCH), name, path.stat().st_size)


def _read_arrow(path: Path, name: str) -> Iterator[Found]:
    """Arrow's streams, as datasets writes them, and its files, as Feather's second version is."""
    import pyarrow

    with _arrow_file(path) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(file))
        yield from _rows(batches, name, path.stat().st_size)


def _rows(batches: Any, name: str, most: int) -> Iterator[Found]:
    number = 0
    for batch in batches:
        # Offsets and indices that point elsewhere would be followed there.
        batch.validate(full=True)
        if number + batch.num_rows > most:  # nulls, or one value again and again, take no room
            raise DataError(f"{name}: over {most:,} rows in as many bytes; {_AGAIN}")
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            for record in batch.slice(start, ROWS_PER_BATCH).to_pylist():
                yield f"{name}[{number}]", record
                number += 1


COLUMNAR: dict[str, Callable[[Path, str], Iterator[Found]]] = {
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
}
