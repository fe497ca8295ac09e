"""Activation checkpointing: a decoder layer's activations are computed again in backward instead of kept."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from qorpo.model.offload import HostInputs
from qorpo.model.parts import decoder_layers

logger = logging.getLogger(__name__)


def checkpoint_layers(model: nn.Module, num_layers: int | None = None, *, offload: bool = False) -> int:
    """Keep only the inputs of decoder layers for backward; returns of how many.

    The layer's own forward is wrapped, the same in every version of transformers, so that module names, state dicts
    and hooks (which stay outside, as FSDP wants them) are untouched. Non-reentrant: inputs need no gradient.

    Args:
        num_layers: the first so many layers; None: all. What the last layers keep is freed before the first are
            computed again, so these are the ones to leave out.
        offload: keep the inputs in host memory (`HostInputs`).
    """
    layers = decoder_layers(model)
    host_inputs = HostInputs() if offload else None
    for layer in layers[:num_layers]:
        if not isinstance(layer.forward, _Recomputed):
            layer.forward = _Recomputed(layer.forward, host_inputs)
    if not layers:
        logger.warning(
            "activation checkpointing: %s has no layers that transformers can checkpoint",
            type(model).__name__,
        )
    return len(layers[:num_layers])


class _Recomputed:
    def __init__(self, forward: Callable[..., Any], host_inputs: HostInputs | None):
        self.forward = forward
        self.host_inputs = host_inputs

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(hidden, *args, **kwargs)
        with self.host_inputs.of(hidden) if self.host_inputs else nullcontext():
            return checkpoint(self.forward, hidden, *args, use_reentrant=False, **kwargs)
