"""Bytes of tensors alive at any moment, by what they are and by who made them; on real tensors and on fake ones."""

import sys
import weakref
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

BLOCK = 512
"""CUDA's caching allocator hands out multiples of this many bytes."""

HOST = "host"
"""The kind of what is kept in host memory, beside the device's total."""

_SAME_TO_MEMORY = {torch.ops.aten._unsafe_view.default: torch.ops.aten.view.default}

_HERE = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)
# What is made while a function of this file is running is of this kind, whatever else is going on.
_KIND_OF_FILE = {
    "ops/log_probs.py": "head",
    "model/attention.py": "attention",
    "_fully_shard/_fsdp_param.py": "gathered weights",
    "_fully_shard/_fsdp_collectives.py": "gathered weights",
}
_KIND_OF_FUNCTION = {"host_room": HOST, "foreach_reduce": "gradients"}


@dataclass
class Peak:
    """The most bytes alive at once during one stretch of a step."""

    total_bytes: int = 0
    by_kind: dict[str, int] = field(default_factory=dict)
    where: str = ""


class LiveBytes(TorchDispatchMode):
    """Counts every storage from the operation that made it until it is freed.

    `kind` and `stretch` name what is being made now; whoever runs the step sets them. Tensors there before are told
    of by `add`. Scratch space inside an operation is not seen: PyTorch's own kernels take little of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "activations"
        self.stretch = ""
        self.peaks: dict[str, Peak] = {}
        self.host_peak = 0
        self.received_bytes = 0  # from other ranks, of weights gathered; as many are sent
        self.sent_bytes = 0  # to other ranks, of gradients to be summed; as many are received
        self._total = 0
        self._by_kind: Counter[str] = Counter()
        self._living: dict[int, tuple[weakref.ref[Any], str, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        if func is torch.ops.aten.add.Tensor and _autograd_adds(args):
            for into, other in (args, args[::-1]):
                if _is_sole_owner(into):
                    return into.add_(other)
        # The same to memory, and fake tensors remember the one and work the other out anew each time.
        func = _SAME_TO_MEMORY.get(func, func)
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.c10d._allgather_base_.default:
            self.received_bytes += args[0].nbytes - args[1].nbytes
        elif func is torch.ops.c10d._reduce_scatter_base_.default:
            self.sent_bytes += args[1].nbytes - args[0].nbytes
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        return result

    def __enter__(self) -> "LiveBytes":
        # FSDP2 frees gathered weights by resizing their storage, which is no operation.
        resize = self._resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, num_bytes: int) -> torch.UntypedStorage:
            result = resize(storage, num_bytes)
            if storage._cdata in self._living:
                self._forget(storage._cdata)
            self._note_storage(storage, sys._getframe(1))
            return result

        torch.UntypedStorage.resize_ = resized  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*exception)

    def add(self, tensors: Iterable[torch.Tensor], kind: str) -> None:
        """Count `tensors` as `kind` from now on, whatever they were counted as before."""
        for tensor in map(_local, tensors):
            key = tensor.untyped_storage()._cdata
            if key in self._living:
                self._forget(key)
            self._note(tensor, kind)

    def _note(self, tensor: torch.Tensor, kind: str | None = None) -> None:
        storage = _local(tensor).untyped_storage()
        if storage._cdata not in self._living:
            self._note_storage(storage, sys._getframe(2), kind)

    def _note_storage(self, storage: Any, frame: FrameType, kind: str | None = None) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if size == 0:
            return
        kind = kind or _kind_of(frame) or self.kind
        self._living[key] = weakref.ref(storage, lambda _: self._forget(key)), kind, size
        self._by_kind[kind] += size
        if kind == HOST:
            self.host_peak = max(self.host_peak, self._by_kind[HOST])
            return
        self._total += size
        peak = self.peaks.get(self.stretch)
        if peak is None or self._total > peak.total_bytes:
            by_kind = {name: size for name, size in self._by_kind.items() if size and name != HOST}
            self.peaks[self.stretch] = Peak(self._total, by_kind, _place(frame))

    def _forget(self, key: int) -> None:
        _, kind, size = self._living.pop(key)
        self._by_kind[kind] -= size
        if kind != HOST:
            self._total -= size


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, which itself says the size of the whole; any other tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def _kind_of(frame: FrameType | None) -> str | None:
    while frame is not None:
        if (kind := _kind_of_code(frame.f_code)) is not None:
            return kind
        frame = frame.f_back
    return None


@cache
def _kind_of_code(code: CodeType) -> str | None:
    endings = (kind for ending, kind in _KIND_OF_FILE.items() if code.co_filename.endswith(ending))
    return _KIND_OF_FUNCTION.get(code.co_name) or next(endings, None)


def _autograd_adds(tensors: tuple[Any, ...]) -> bool:
    """Whether it is autograd that sums two gradients of one tensor: into one of them, but for a mode that watches."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith((_TORCH, _HERE)):
        if frame.f_code.co_name == "_engine_run_backward":
            return all(isinstance(tensor, torch.Tensor) for tensor in tensors)
        frame = frame.f_back
    return False


def _is_sole_owner(tensor: torch.Tensor) -> bool:
    """As autograd asks it: nobody else holds the storage (but for the name it is given here)."""
    storage = tensor.untyped_storage()
    return torch._C._storage_Use_Count(storage._cdata) == 2


def _place(frame: FrameType | None) -> str:
    """The innermost line outside torch and this package, and the node of autograd that is running, where one is."""
    node = torch._C._current_autograd_node()
    running = f" ({node.name()})" if node is not None else ""
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith((_TORCH, _HERE)):
            path = Path(name)
            return f"{path.parent.name}/{path.name}:{frame.f_lineno} {frame.f_code.co_name}{running}"
        frame = frame.f_back
    return running.strip()
