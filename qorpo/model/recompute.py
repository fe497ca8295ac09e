"""Activation checkpointing: a decoder layer's activations are computed again in backward instead of kept."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

logger = logging.getLogger(__name__)


def checkpoint_layers(model: nn.Module) -> int:
    """Keep only the inputs of each decoder layer for backward; returns how many layers.

    The layer's own forward is wrapped, the same in every version of transformers, so that module names, state dicts
    and hooks (which stay outside, as FSDP wants them) are untouched. Non-reentrant: inputs need no gradient.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        if not isinstance(layer.forward, _Recomputed):
            layer.forward = _Recomputed(layer.forward)
    if not layers:
        logger.warning(
            "activation checkpointing: %s has no layers that transformers can checkpoint",
            type(model).__name__,
        )
    return len(layers)


class _Recomputed:
    def __init__(self, forward: Callable[..., Any]):
        self.forward = forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*args, **kwargs)
        return checkpoint(self.forward, *args, use_reentrant=False, **kwargs)
