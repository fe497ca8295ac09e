"""Checkpoints of full tuning: shards/, as torch.distributed.checkpoint (DCP) writes parameters and optimizer.

Each rank writes its own shards, and any number of ranks reads them. DCP unpickles the shards' `.metadata` and entries that
are no tensors, so code in them would run; here both are read by readers that know DCP's own classes alone.
"""

import contextlib
import io
import pickle
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from qorpo.errors import DamageError
from qorpo.manifest import sha256_of

SHARDS = "shards"

# --- writing ---


def save_shards(
    folder: Path, scorer: Any, optimizer: torch.optim.Optimizer | None
) -> Future[dict[str, str]] | None:
    """Write parameters, and an optimizer's state where one is given, into a checkpoint's folder, all ranks together.

    Returns:
        What gives the sha256 of this rank's files by their path in the folder, once they are written, from a copy in
        host memory while training goes on; None where there is one process, and all is written.
    """
    content: dict[str, Any]
    if optimizer is None:
        content = {"model": get_model_state_dict(scorer)}
    else:
        parameters, optimizer_state = get_state_dict(scorer, optimizer)
        content = {"model": parameters, "optimizer": optimizer_state}
    if not dist.is_initialized():
        with _alone():
            dcp.save(content, checkpoint_id=folder / SHARDS)
        return None
    writing = dcp.async_save(content, checkpoint_id=folder / SHARDS, process_group=_writers())
    assert isinstance(writing, Future)  # the default stager copies before it returns
    hashed: Future[dict[str, str]] = Future()

    def hash_own(written: Future[Any]) -> None:  # in the thread that wrote
        try:
            written.result()
            own = (folder / SHARDS).glob(f"__{dist.get_rank()}_*.distcp")
            hashed.set_result({f"{SHARDS}/{path.name}": sha256_of(path) for path in own})
        except BaseException as error:
            hashed.set_exception(error)

    writing.add_done_callback(hash_own)
    return hashed


def hashes_of_all_ranks(mine: dict[str, str]) -> dict[str, str]:
    """The hashes of all ranks on the main one, which needs them; all ranks together."""
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(mine, found, group=_writers())
    return {name: sha for each in found or [] for name, sha in each.items()}


@cache
def _writers() -> Any:
    """The ranks once more, so that what they write in the background doesn't meet what they compute."""
    return dist.new_group(backend="gloo")


# --- reading ---


def load_shards(folder: Path, scorer: Any, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's parameters and optimizer into the objects of a fresh run, all ranks together."""
    parameters, optimizer_state = get_state_dict(scorer, optimizer)
    saved: dict[str, Any] = {"model": parameters, "optimizer": optimizer_state}
    _load(saved, _Reader(folder / SHARDS))
    set_state_dict(scorer, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])


def load_parameters(folder: Path, scorer: Any) -> None:
    """Put a checkpoint's parameters alone into a model, all ranks together."""
    parameters = {"model": get_model_state_dict(scorer)}
    _load(parameters, _Reader(folder / SHARDS))
    set_model_state_dict(scorer, parameters["model"])


def read_parameters(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A checkpoint's parameters by their names in the model, read one at a time by one process."""
    prefix = "model.model."  # the state's part, and the scorer's attribute
    tensors = {}
    reader = _Reader(folder / SHARDS)
    for key, found in reader.read_metadata().state_dict_metadata.items():
        if key.startswith(prefix) and isinstance(found, TensorStorageMetadata):
            state = {key: torch.empty(found.size, dtype=found.properties.dtype)}
            _load(state, reader, no_dist=True)
            tensor = state[key]
            tensors[key.removeprefix(prefix)] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return tensors


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without DCP's warning that one process is one process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _load(content: dict[str, Any], reader: "_Reader", **options: Any) -> None:
    reader.read_metadata()  # what is wrong with it DCP would log with a traceback, and go on
    try:
        with _alone():
            dcp.load(content, storage_reader=reader, planner=_Planner(reader.path), **options)
    except CheckpointException as error:  # an error of each rank
        raise next(iter(error.failures.values()))[0] from error


class _Reader(FileSystemReader):
    metadata: Metadata | None = None

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """Raises DamageError where `.metadata` is not what DCP writes; nothing of it runs."""
        if self.metadata is not None:
            return self.metadata
        path = Path(self.path) / ".metadata"
        with path.open("rb") as file:
            try:
                metadata = _Unpickler(file).load()
                _check(metadata)
            except (ValueError, TypeError, AttributeError, KeyError, IndexError, EOFError, ImportError,
                    MemoryError, OverflowError, RuntimeError, pickle.UnpicklingError) as error:  # fmt: skip
                raise DamageError(f"{path}: is no checkpoint's ({error}); nothing of it was run") from error
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        self.metadata = metadata
        return metadata


class _Planner(DefaultLoadPlanner):
    def __init__(self, shards: Any):
        super().__init__()
        self.shards = shards

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """DCP's own runs whatever is pickled there; plain values are all that qorpo's checkpoints hold."""
        plain = io.BytesIO()
        try:
            torch.save(torch.load(value, weights_only=True), plain)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise DamageError(
                f"{self.shards}: {read_item.storage_index.fqn} is damaged, or holds more than plain values; "
                "nothing of it was run"
            ) from error
        plain.seek(0)
        super().load_bytes(read_item, plain)


class _Unpickler(pickle.Unpickler):
    """Knows the classes of DCP's metadata, and nothing that does more than hold values."""

    ALLOWED: ClassVar = {
        "pathlib": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
        "pathlib._local": {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
        "torch": {"Size"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        is_type = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_type and name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def _enum_member(kind: Any, name: str) -> Enum:
    """Python before 3.11.4 pickles a member of an enumeration as `getattr(kind, name)`."""
    if not (isinstance(kind, type) and issubclass(kind, Enum) and name in kind.__members__):
        raise pickle.UnpicklingError(f"it asks for {name} of {kind!r}")
    return kind[name]


def _check(metadata: Any) -> None:
    """Raises ValueError where it names files outside the shards' own folder, or asks for an extension of DCP's."""
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise ValueError("it is no Metadata")
    for info in metadata.storage_data.values():
        if not isinstance(info, _StorageInfo) or Path(info.relative_path).name != info.relative_path:
            raise ValueError(f"it names {getattr(info, 'relative_path', info)!r}")
        if getattr(info, "transform_descriptors", None):
            raise ValueError(f"it asks for {info.transform_descriptors}")
