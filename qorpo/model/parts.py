"""Which modules of a model are its language model, and which of those are linear layers, routers or experts.

A vision-language model is trained by text alone: only its language model is adapted, quantized and recomputed, since
the rest never sees a gradient. Legend: E experts.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.pytorch_utils import Conv1D

ROUTERS = {"gate", "gating", "router", "wg", "shared_expert_gate"}
"""What mixtures call the layer that chooses experts, and the one that weighs a shared expert."""

BARE_IN_MAMBA = (".out_proj", ".x_proj", ".dt_proj")
"""Layers of a Mamba mixer whose weights its kernels, or on any device its own code, read without calling the layer."""

_EXPERTS_KEY = re.compile(r"(num|n)_(\w+_)?experts|moe_num_experts")
_ONE_EXPERT = re.compile(r"\.experts\.\d+\.")


def auto_class(config: PretrainedConfig) -> Any:
    """The class that makes a model of a configuration: a vision-language model whole, so that a merge keeps all of it."""
    whole = AutoModelForImageTextToText
    return whole if type(config) in whole._model_mapping else AutoModelForCausalLM


def base_model(model: Any) -> Any:
    """The model without PEFT's wrappers around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def language_model(model: Any) -> nn.Module:
    """The trunk that turns tokens into hidden states: all of a plain model but its head."""
    model = base_model(model)
    while (inner := _decoder(model)) is not model:
        model = inner
    return model


def _decoder(model: Any) -> Any:
    found = model.get_decoder() if hasattr(model, "get_decoder") else model
    if found is model and isinstance(model, PreTrainedModel) and model.get_output_embeddings() is not None:
        # Llama-4's text model doesn't find its own.
        return next((child for child in model.children() if isinstance(child, PreTrainedModel)), model)
    return found


def is_wrapper(model: Any) -> bool:
    """Whether the model is more than a language model: a vision tower or another encoder stands beside it."""
    config = base_model(model).config
    return config.get_text_config() is not config


def language_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    """The language model's modules, by their names in the whole model without PEFT's wrappers."""
    model = base_model(model)
    trunk = language_model(model)
    prefix = next(name for name, module in model.named_modules() if module is trunk)
    others = [name for name, module in trunk.named_modules() if name and _brings_a_model(module)]
    for name, module in trunk.named_modules():
        if not any(name == other or name.startswith(f"{other}.") for other in others):
            yield ".".join(part for part in (prefix, name) if part), module


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers that transformers can checkpoint, in the order they run."""
    return [module for _, module in language_modules(model) if isinstance(module, GradientCheckpointingLayer)]


def expert_counts(config: PretrainedConfig) -> set[int]:
    """How many experts a layer may have, by any name that configurations give it; empty for a dense model."""
    return set(_expert_counts(config.get_text_config().to_dict()))


def linear_layers(model: Any, *, experts: bool = False) -> list[str]:
    """Linear layers of the language model, without its head and routers, and what Mamba's fused kernels read as bare weights.

    Args:
        experts: with those that are one expert's alone.
    """
    head = base_model(model).get_output_embeddings()
    is_mixture, trunk = bool(expert_counts(base_model(model).config)), base_model(model)
    return [
        name
        for name, module in language_modules(model)
        if _is_linear(module)
        and ".altup." not in name  # Gemma-3n reads these as bare weights, and clamps them
        and not (name.endswith(BARE_IN_MAMBA) and _is_mamba(trunk.get_submodule(name.rpartition(".")[0])))
        and module is not head
        and not (is_mixture and ROUTERS & {*name.split(".")[-2:]})
        and (experts or not _ONE_EXPERT.search(f"{name}."))
    ]


def stacked_experts(model: Any) -> list[tuple[str, nn.Module, str]]:
    """Parameters that hold all experts of a layer, (E, …, …): the module's name, the module, the parameter's name."""
    counts = expert_counts(base_model(model).config)
    return [
        (name, module, parameter)
        for name, module in language_modules(model)
        if not isinstance(module, nn.modules.conv._ConvNd)
        for parameter, value in module.named_parameters(recurse=False)
        if value.dim() == 3 and value.shape[0] in counts and value.is_floating_point()
    ]


def _is_linear(module: nn.Module) -> bool:
    """Routers may be subclasses that return tuples (phimoe, llama4)."""
    return isinstance(module, nn.Linear | Conv1D) and "Router" not in type(module).__name__


def _is_mamba(mixer: nn.Module) -> bool:
    return all(hasattr(mixer, name) for name in ("conv1d", "A_log", "D"))


def _brings_a_model(module: nn.Module) -> bool:
    """Whether a module of the trunk is a model of its own or holds one: phi4_multimodal's towers are in its embedding."""
    return isinstance(module, PreTrainedModel) or any(
        isinstance(child, PreTrainedModel) for child in module.children()
    )


def _expert_counts(keys: dict[str, Any]) -> Iterator[int]:
    for key, value in keys.items():
        if isinstance(value, dict):
            yield from _expert_counts(value)
        elif isinstance(value, int) and value > 1 and _EXPERTS_KEY.fullmatch(key):
            yield value
