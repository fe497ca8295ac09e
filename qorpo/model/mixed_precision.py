"""Parameters kept in float32, computed in the base's own type: a bfloat16 weight would lose small updates."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from qorpo.model.parts import is_wrapper, language_model


def train_all(model: Any) -> torch.dtype:
    """Make every floating parameter trainable and float32; returns the type that the model computed in.

    Of a vision-language model only the language model's and the head's: text gives the others no gradient.
    """
    dtype = next(model.parameters()).dtype
    if is_wrapper(model):
        model.requires_grad_(False)
        head = model.get_output_embeddings()
        parameters = [*language_model(model).parameters(), *(head.parameters() if head is not None else ())]
    else:
        parameters = [*model.parameters()]
    for parameter in parameters:
        if parameter.is_floating_point():
            if parameter.dtype in (torch.bfloat16, torch.float16):
                parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    return dtype


def casts_of(tuning: str, dtype: torch.dtype) -> torch.dtype | None:
    """What trained parameters are cast to where a base of `dtype` computes; None: nothing is cast."""
    return dtype if tuning == "full" and dtype in (torch.bfloat16, torch.float16) else None


@contextmanager
def computed_in(model: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, modules see each trained parameter cast to `dtype`, once for all forwards; None: as they are.

    Gradients reach the parameters themselves, in their own type: casting saves nothing for backward, so several
    backwards may go through one cast. Recomputed layers see the same cast, as long as backward is inside too.
    """
    if dtype is None:
        yield
        return
    casts: dict[nn.Parameter, torch.Tensor] = {}
    replaced: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and parameter.dtype != dtype:
                if parameter not in casts:
                    casts[parameter] = parameter.to(dtype)
                replaced.append((module, name, parameter))
    try:
        for module, name, parameter in replaced:
            module._parameters[name] = casts[parameter]  # type: ignore[assignment]
        yield
    finally:
        for module, name, parameter in replaced:
            module._parameters[name] = parameter


def compute_in_float32(model: nn.Module) -> None:
    """Make a model compute in float32. Every weight keeps its value; 4-bit layers stay in 4 bits."""
    nn.Module.float(model)  # transformers' own refuses quantized models
    for module in cast(Iterable[Any], model.modules()):
        if hasattr(module, "compute_dtype"):  # bitsandbytes' layers
            module.compute_dtype = torch.float32
