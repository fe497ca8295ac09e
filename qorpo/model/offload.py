"""Activation offload: the inputs of recomputed layers wait for backward in host memory."""

import weakref
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks


class HostInputs:
    """Takes a layer's input off the device as forward leaves the layer, and brings it back before its recomputation.

    On CUDA host memory is pinned and copies run on a stream of their own: out while the layer computes, and back while
    the layer after it is differentiated, so that two inputs are on the device at a time.
    """

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._latest: weakref.ref[_Kept] | None = None

    def of(self, hidden: torch.Tensor) -> saved_tensors_hooks:
        """A context in which autograd keeps `hidden` in host memory, and all else where it is."""
        if hidden.is_cuda and self._stream is None:
            self._stream = torch.cuda.Stream(hidden.device)
        kind = (
            hidden.shape,
            hidden.dtype,
        )  # the hooks live as long as the graph: they must not hold the tensor

        def leave(tensor: torch.Tensor) -> Any:
            if (tensor.shape, tensor.dtype) != kind:
                return tensor
            kept = _Kept(tensor, self._stream, self._latest)
            self._latest = weakref.ref(kept)
            return kept

        return saved_tensors_hooks(leave, lambda kept: kept.come_back() if isinstance(kept, _Kept) else kept)


class _Kept:
    """One layer's input in host memory. Autograd owns it; the layer after it knows it only weakly."""

    def __init__(
        self, tensor: torch.Tensor, stream: "torch.cuda.Stream | None", before: "weakref.ref[_Kept] | None"
    ):
        self.device, self.stream, self.before = tensor.device, stream, before
        self.host = host_room(tensor)
        self.fetched: torch.Tensor | None = None
        if stream is None:
            self.host.copy_(tensor)
            return
        stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(stream):
            self.host.copy_(tensor, non_blocking=True)
        tensor.record_stream(stream)  # its memory is not used again before the copy is done

    def come_back(self) -> torch.Tensor:
        self.fetch()
        tensor, self.fetched = self.fetched, None
        assert tensor is not None
        if self.stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
        if before := self.before and self.before():
            before.fetch()
        return tensor

    def fetch(self) -> None:
        if self.fetched is not None:
            return
        self.fetched = torch.empty_like(self.host, device=self.device, pin_memory=False)
        if self.stream is None:
            self.fetched.copy_(self.host)
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            self.fetched.copy_(self.host, non_blocking=True)


def host_room(tensor: torch.Tensor) -> torch.Tensor:
    """Host memory for a tensor, pinned where copies are to run beside the computation."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
