"""Files of records: each format's reader yields (where, record), and a record that can't be read as (where, BadRecord).

`where` is "pairs.jsonl:41" (lines from 1) or "pairs.parquet[40]" (rows and items from 0).
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

Found = tuple[str, Any]  # (where, the record) or (where, a BadRecord)

ROWS_PER_BATCH = 1024
EXPECTED_FILE = "a file ending in .jsonl, .json, .csv (these also as .gz or .zst), .parquet or .arrow"


def read_records(path: str | os.PathLike[str]) -> Iterator[Found]:
    """The records of a file, streamed but for .json, which is read whole.

    A .json file is a list of records, an object that holds just one list, or one record a line. Text is UTF-8.
    Raises DataError for a file that can't be read as a whole.
    """
    path = Path(path)
    kind, compression = file_kind(path)
    if kind is None:
        raise DataError(f"{path}: unknown extension {path.suffix!r}; expected {EXPECTED_FILE}")
    import pyarrow

    try:
        if kind in COLUMNAR:
            yield from COLUMNAR[kind](path)
        else:
            with _open(path, compression) as file:
                yield from TEXT[kind](file, path.name)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip stream is broken ({error}); {_AGAIN}") from error
    except (pyarrow.ArrowException, OSError) as error:
        # Arrow's errors of input are OSErrors without a number.
        what = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise DataError(f"{path}: can't be read ({what}); {_AGAIN}") from error


_AGAIN = "fetch or write the file again"


def file_kind(path: Path) -> tuple[str | None, str | None]:
    """(format, compression) by the name's end; the format is None where it is none of ours."""
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    suffix = Path(path.stem).suffix if compression else path.suffix
    known = suffix in TEXT or (suffix in COLUMNAR and not compression)
    return (suffix if known else None), compression


def _open(path: Path, compression: str | None) -> BinaryIO:
    if compression == "zstd":
        import pyarrow

        return cast(
            BinaryIO, io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(str(path)), "zstd"))
        )
    return cast(BinaryIO, gzip.open(path)) if compression else path.open("rb")


# --- text ---


def _read_lines(file: BinaryIO, name: str) -> Iterator[Found]:
    for number, line in enumerate(file, start=1):
        where = f"{name}:{number}"
        try:
            # utf-8-sig also takes the byte order mark some editors write first.
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                yield where, json.loads(text)
        except UnicodeDecodeError as error:
            yield where, BadRecord("not_utf8", _bad_byte(error.object, error.start), "save the file as UTF-8")
        except (ValueError, RecursionError) as error:
            # The error's own text would name line 1, of this line.
            at = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            yield (
                where,
                BadRecord("not_json", f"not JSON ({at}); expected one record a line", "fix the line"),
            )


def _read_document(file: BinaryIO, name: str) -> Iterator[Found]:
    data = file.read()
    try:
        document = json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{name}:{line}: {_bad_byte(error.object, error.start)}; save the file as UTF-8"
        ) from None
    except (ValueError, RecursionError) as error:
        if (
            isinstance(error, json.JSONDecodeError)
            and error.msg == "Extra data"
            and data.lstrip()[:1] == b"{"
        ):
            yield from _read_lines(io.BytesIO(data), name)  # one record a line, under .json's name
            return
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


def _read_table(file: BinaryIO, name: str) -> Iterator[Found]:
    """Rows of a table with a header, each cell text; one that holds messages in JSON is read as these."""
    csv.field_size_limit(1 << 30)
    # Bytes that are no UTF-8 become lone surrogates, so that only their row is bad.
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.DictReader(text)
    while True:
        line = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            yield f"{name}:{rows.line_num}", BadRecord("not_csv", f"not CSV ({error})", "fix the line")
            continue
        if row is None:
            return
        yield f"{name}:{max(line, 2)}", _row_record(row)


def _row_record(row: dict[Any, Any]) -> Any:
    if None in row:
        return BadRecord(
            "not_csv", f"{len(row[None])} cells more than columns", "quote cells that hold commas"
        )
    for cell in row.values():
        try:
            (cell or "").encode()
        except UnicodeEncodeError as error:
            found = _bad_byte(cell.encode("utf-8", "surrogateescape"), None, ord(cell[error.start]) & 0xFF)
            return BadRecord("not_utf8", found, "save the file as UTF-8")
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


def _bad_byte(data: bytes, at: int | None, byte: int | None = None) -> str:
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "the file is UTF-16"
    return f"byte 0x{data[at] if at is not None else byte:02x} is not UTF-8"


TEXT: dict[str, Callable[[BinaryIO, str], Iterator[Found]]] = {
    ".jsonl": _read_lines,
    ".json": _read_document,
    ".csv": _read_table,
}

# --- tables of columns ---


def _read_parquet(path: Path) -> Iterator[Found]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        yield from _rows(file.iter_batches(ROWS_PER_BATCH), path.name)


def _read_arrow(path: Path) -> Iterator[Found]:
    """Arrow's streams, as datasets writes them, and its files, as Feather's second version is."""
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(index) for index in range(reader.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(file))
        yield from _rows(batches, path.name)


def _rows(batches: Any, name: str) -> Iterator[Found]:
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_PER_BATCH):
            for record in batch.slice(start, ROWS_PER_BATCH).to_pylist():
                yield f"{name}[{number}]", record
                number += 1


COLUMNAR: dict[str, Callable[[Path], Iterator[Found]]] = {".parquet": _read_parquet, ".arrow": _read_arrow}
