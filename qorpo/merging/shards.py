"""Checkpoints read and written a few rows at a time, so that no more than a block is in memory.

By plain file reads: pages of a mapped file count as the process's own. A block is a tensor's next rows (along its
first dimension) with the index of the first of them.
"""

import hashlib
import json
import os
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from qorpo.errors import ModelError
from qorpo.merging.links import check_name

BLOCK_ELEMENTS = 1 << 20
BLOCKS_IN_FLIGHT = 4
READ_AHEAD_BYTES = 16 << 20
FLUSH_BYTES = 128 << 20  # left to itself, Linux starts to write at a tenth of memory

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Block(NamedTuple):
    """Rows `start` to `start + len(values)` of a tensor."""

    start: int
    values: torch.Tensor


Blocks = Callable[[], Iterator[Block]]
"""A tensor as a stream that can be started again; its blocks are the receiver's to change."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    path: Path
    offset: int = 0
    mapped: Any = field(default=None, compare=False)  # of a .bin file: the tensor itself, its pages unread

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    @property
    def rows_together(self) -> int:
        """Rows in a block; of a matrix a multiple of 64, so that quantization's blocks of 64 weights stay whole."""
        rows = BLOCK_ELEMENTS // max(prod(self.shape[1:]), 1)
        return max(64, rows // 64 * 64) if len(self.shape) <= 2 else max(1, rows)

    def blocks(self) -> Iterator[Block]:
        """The tensor's rows in its own type; a number alone is one row."""
        num_rows, *rest = self.shape or (1,)
        row, step = prod(rest), self.rows_together
        if self.mapped is not None:
            for start in range(0, num_rows, step):
                yield Block(start, self.mapped.reshape(num_rows, *rest)[start : start + step].clone())
            return
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.offset)
            for start in range(0, num_rows, step):
                count = min(step, num_rows - start)
                raw = torch.empty(count * row * self.dtype.itemsize, dtype=torch.uint8)
                _read_ahead(file, raw.nbytes)
                self._fill(file, raw.numpy().data)
                yield Block(start, raw.view(self.dtype).reshape(count, *rest))

    def _fill(self, file: BinaryIO, room: memoryview) -> None:
        while len(room):
            count = file.readinto(room)  # type: ignore[attr-defined]
            if not count:
                raise ModelError(f"{self.path}: ended inside {self.name}; is the download complete?")
            room = room[count:]

    def float_blocks(self) -> Iterator[Block]:
        """The tensor's rows in float32."""
        return (Block(start, values.float()) for start, values in self.blocks())

    def load(self) -> torch.Tensor:
        """The whole tensor in float32."""
        return torch.cat([values for _, values in self.float_blocks()]).reshape(self.shape)


def _read_ahead(file: BinaryIO, num_bytes: int) -> None:
    """Have the disk bring what comes after the next bytes while those are worked on; Linux alone goes 128 KiB ahead."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), file.tell() + num_bytes, READ_AHEAD_BYTES, os.POSIX_FADV_WILLNEED)


# --- reading ---


def read_checkpoint(folder: Path, *, allow_pickle: bool = False) -> dict[str, Stored]:
    """Every tensor of a model folder, by its name and in the files' order; only headers are read.

    Raises:
        ModelError: for files that are missing, cut short or no checkpoint, and tensors missing from them.
    """
    for stem, ending in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, single = folder / f"{stem}.{ending}.index.json", folder / f"{stem}.{ending}"
        if ending == "bin" and (index.is_file() or single.is_file()) and not allow_pickle:
            raise ModelError(
                f"{folder}: weights only as .bin; convert them to safetensors, or read them by torch's weights-only "
                "reader with --allow-pickle"
            )
        if index.is_file():
            return _read_sharded(folder, index)
        if single.is_file():
            check_name(folder, single.name)
            return read_tensors(single)
    raise ModelError(
        f"{folder}: no weights (model.safetensors or model.safetensors.index.json); is the download complete?"
    )


def _read_sharded(folder: Path, index: Path) -> dict[str, Stored]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = list(dict.fromkeys(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index}: no index of shards ({error}); is the download complete?") from error
    for name in names:
        check_name(folder, name)
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise ModelError(f"{folder}: shards are missing: {', '.join(absent)}; is the download complete?")
    problems: list[str] = []
    stored: dict[str, Stored] = {}
    for name in names:
        try:
            stored |= read_tensors(folder / name)
        except ModelError as error:
            problems.append(str(error))
    if problems:
        raise ModelError("\n  ".join(problems))
    if missing := sorted(weight_map.keys() - stored.keys()):
        raise ModelError(
            f"{folder}: {len(missing)} tensors of the index are missing from their shards, such as {missing[0]}; "
            "is the download complete?"
        )
    return stored


def read_tensors(path: Path) -> dict[str, Stored]:
    """Every tensor of a .safetensors file, or of a .bin file by torch's weights-only reader (no code of it runs).

    Raises:
        ModelError: for a file that is cut short, or is none of these.
    """
    if path.suffix == ".safetensors":
        return _read_header(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {
            name: Stored(name, tensor.dtype, tuple(tensor.shape), path, mapped=tensor.detach())
            for name, tensor in tensors.items()
        }
    except (pickle.UnpicklingError, EOFError, RuntimeError, AttributeError, OSError) as error:
        raise ModelError(
            f"{path}: broken, of torch before 1.6, or holds more than tensors; convert it to safetensors"
        ) from error


def _read_header(path: Path) -> dict[str, Stored]:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ModelError(f"{path}: {size:,} bytes are no safetensors file; is the download complete?")
        header = file.read(length)
    try:
        entries = json.loads(header)
        entries.pop("__metadata__", None)
        stored = {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            start, end = entry["data_offsets"]
            tensor = Stored(
                name, DTYPES[entry["dtype"]], tuple(map(int, entry["shape"])), path, 8 + length + start
            )
            if end - start != tensor.nbytes:
                raise ValueError(f"{name} has {end - start} bytes for {entry['dtype']} {entry['shape']}")
            if 8 + length + end > size:
                raise ModelError(
                    f"{path}: cut short: {size:,} bytes, and {name} ends at {8 + length + end:,}; fetch it again"
                )
            stored[name] = tensor
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: its header can't be read ({error}); fetch it again") from error
    return stored


# --- writing ---


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written, and where its values come from."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Blocks

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Shard:
    """A file to be written."""

    file: str
    tensors: tuple[Planned, ...]

    def header(self) -> bytes:
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for tensor in self.tensors:
            entries[tensor.name] = {
                "dtype": NAMES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, offset + tensor.nbytes],
            }
            offset += tensor.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def plan_shards(tensors: Iterable[Planned], max_bytes: int) -> list[Shard]:
    """The tensors in their order, in files of at most `max_bytes` (a larger tensor has a file of its own)."""
    groups: list[list[Planned]] = [[]]
    size = 0
    for tensor in tensors:
        if groups[-1] and size + tensor.nbytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.nbytes
    names = (
        ["model.safetensors"]
        if len(groups) == 1
        else [f"model-{number:05}-of-{len(groups):05}.safetensors" for number in range(1, len(groups) + 1)]
    )
    # Wider types first keeps every tensor aligned to its own type, as the format asks.
    return [
        Shard(name, tuple(sorted(group, key=lambda tensor: -tensor.dtype.itemsize)))
        for name, group in zip(names, groups, strict=True)
    ]


def write_shards(folder: Path, shards: list[Shard], on_progress: Callable[[int], None]) -> dict[str, str]:
    """Write shards and their index, each flushed to disk; `on_progress` hears of bytes as they are handed over.

    One thread computes blocks, one writes them, one hashes them, and one flushes what was written, so that the disk
    never waits.

    Returns:
        The sha256 of each shard's file.
    """
    with _one_thread_computing(), _Writer() as writer:
        for shard in shards:
            file = (folder / shard.file).open("wb", buffering=0)
            writer.write(file, shard.header())
            for tensor in shard.tensors:
                for _, values in tensor.blocks():
                    data = values.to(tensor.dtype).contiguous().reshape(-1).view(torch.uint8).numpy()
                    writer.write(file, data.data)
                    on_progress(data.nbytes)
            writer.finish(file)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for shard in shards for tensor in shard.tensors)},
            "weight_map": {tensor.name: shard.file for shard in shards for tensor in shard.tensors},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
    return writer.hashes


class _Writer:
    """Writes in the background, at most BLOCKS_IN_FLIGHT behind; leaving it waits for all and raises what failed."""

    def __init__(self) -> None:
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="qorpo-write")
        self._hashing = ThreadPoolExecutor(1, thread_name_prefix="qorpo-hash")
        self._flushing = ThreadPoolExecutor(1, thread_name_prefix="qorpo-flush")
        self.hashes: dict[str, str] = {}  # of finished files, by their names
        self._sha = hashlib.sha256()
        self._writes: deque[Future[Any]] = deque()
        self._flushes: list[Future[Any]] = []
        self._unflushed_bytes = 0

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self._writing.shutdown()
        self._hashing.shutdown()
        self._flushing.shutdown()
        if error[0] is None:
            for future in (*self._writes, *self._flushes):
                future.result()

    def write(self, file: BinaryIO, data: Any) -> None:
        self._writes.append(self._writing.submit(self._write, file, data))
        self._writes.append(self._hashing.submit(self._hash, data))
        while len(self._writes) > 2 * BLOCKS_IN_FLIGHT:
            self._writes.popleft().result()

    def finish(self, file: BinaryIO) -> None:
        self._writes.append(self._writing.submit(self._flush, file, True))
        self._writes.append(self._hashing.submit(self._hashed, Path(file.name).name))

    def _hash(self, data: Any) -> None:
        self._sha.update(data)

    def _hashed(self, name: str) -> None:
        self.hashes[name], self._sha = self._sha.hexdigest(), hashlib.sha256()

    def _write(self, file: BinaryIO, data: Any) -> None:
        _write_all(file, data)
        self._unflushed_bytes += len(data)
        if self._unflushed_bytes >= FLUSH_BYTES:
            self._flush(file, False)

    def _flush(self, file: BinaryIO, is_last: bool) -> None:
        self._unflushed_bytes = 0
        self._flushes.append(self._flushing.submit(_sync, file, is_last))


def _sync(file: BinaryIO, is_last: bool) -> None:
    os.fsync(file.fileno())
    if is_last:
        file.close()


@contextmanager
def _one_thread_computing() -> Iterator[None]:
    """Blocks are small: threads that wait for each other at every one are slower, on a busy machine ten times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _write_all(file: BinaryIO, data: Any) -> None:
    room = memoryview(data)
    while len(room):
        room = room[file.write(room) :]
