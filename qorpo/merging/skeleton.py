"""A model without weights: what its parameters are called, which are tied or quantized, and where a checkpoint keeps them.

transformers may load a checkpoint under other names than its own, and stack the experts of a mixture into one
parameter. Its own mapping says how, so a merged model keeps the checkpoint's names.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from qorpo.errors import ModelError
from qorpo.merging.shards import Stored
from qorpo.model.parts import auto_class, stacked_experts
from qorpo.model.quantizer import Nf4Quantizer, nf4_config


class Place(NamedTuple):
    """What of the model's parameter a checkpoint's tensor is: all of it, or rows of one expert's matrix."""

    parameter: str
    expert: int | None = None
    part: int = 0  # of `parts` that the expert's matrix is put together from, along its rows
    parts: int = 1
    is_opaque: bool = False  # transformers makes the parameter of it in a way that can't be taken apart here


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device; take it as it is, PEFT would change its names."""

    model: PreTrainedModel

    @classmethod
    def of(cls, config: Any, *, trust_remote_code: bool = False) -> "Skeleton":
        """The model that a configuration describes.

        Raises:
            ModelError: where transformers knows no causal language model of this kind.
        """
        try:
            with torch.device("meta"):
                model = auto_class(config).from_config(
                    config, trust_remote_code=trust_remote_code, dtype=torch.bfloat16
                )
        except (ValueError, KeyError, ImportError, AttributeError, TypeError, RuntimeError) as error:
            raise ModelError(
                f"{config.model_type}: the model can't be built: {str(error).splitlines()[0]}"
            ) from error
        return cls(model)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every parameter's, tied ones under each of their names; buffers that are saved too."""
        return {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}

    @cached_property
    def tied(self) -> dict[str, tuple[str, ...]]:
        """Every name that shares its parameter, with all the names of it."""
        groups: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        return {name: tuple(names) for names in groups.values() if len(names) > 1 for name in names}

    def quantized(self) -> dict[str, bool]:
        """Parameters that loading in NF4 quantizes, and whether it transposes them first (GPT-2's Conv1D).

        Consumes the model: its layers are replaced by bitsandbytes' own, as they are at load.
        """
        transposed = {name for name, module in self.model.named_modules() if isinstance(module, Conv1D)}
        experts = {f"{name}.{parameter}": False for name, _, parameter in stacked_experts(self.model)}
        quantizer = Nf4Quantizer(nf4_config(self.model.config), pre_quantized=False)
        quantizer.preprocess_model(model=self.model, device_map={"": torch.device("cpu")})
        from bitsandbytes.nn import Linear4bit

        return experts | {
            f"{name}.weight": name in transposed
            for name, module in self.model.named_modules()
            if isinstance(module, Linear4bit)
        }

    def places(self, names: Collection[str]) -> dict[str, Place]:
        """Where each of a checkpoint's tensors belongs; those that are no part of the model are left out."""
        mapping = get_model_conversion_mapping(self.model)
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        parameters, places = self.model.state_dict(), {}
        for name in names:
            target, pattern = rename_source_key(
                name, renamings, converters, self.model.base_model_prefix, parameters
            )
            if target not in parameters:
                continue
            places[name] = Place(target)
            if pattern is not None:
                (converter,) = (entry for entry in converters if pattern in entry.source_patterns)
                places[name] = _expert_place(name, target, pattern, converter)
        return places

    def missing(self, places: Mapping[str, Place]) -> list[str]:
        """Parameters that a checkpoint has no tensor for, though another name of a tied one will do."""
        found = {place.parameter for place in places.values()}
        found |= {name for parameter in found for name in self.tied.get(parameter, ())}
        return sorted(dict(self.model.named_parameters()).keys() - found)

    def misshapen(self, places: Mapping[str, Place], stored: Mapping[str, Stored]) -> list[str]:
        """A line for each tensor that is not of the model's shape."""
        problems = []
        for name, place in places.items():
            expected = self.shapes[place.parameter]
            if place.expert is not None:
                expected = (expected[1] // place.parts, *expected[2:])
            if not place.is_opaque and stored[name].shape != expected:
                problems.append(f"{name} is {stored[name].shape}, and by config.json {expected}")
        return problems


def embedding_names(model: Any) -> list[str]:
    """The input embedding's and the output head's weight."""
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    return [
        f"{name}.weight"
        for name, module in model.named_modules()
        if any(module is each for each in modules) and isinstance(module, nn.Embedding | nn.Linear)
    ]


def _expert_place(name: str, target: str, pattern: str, converter: WeightConverter) -> Place:
    """Of experts stacked along the first dimension, their matrices put together from parts along the rows."""
    kinds = [type(operation) for operation in converter.operations]
    if kinds not in ([MergeModulelist], [MergeModulelist, Concatenate]):
        return Place(target, is_opaque=True)
    stack, *rows = converter.operations
    number = re.search(r"\.(\d+)\.[^.]+(\.weight)?$", name)
    if number is None or stack.dim != 0 or (rows and rows[0].dim != 1):  # type: ignore[attr-defined]
        return Place(target, is_opaque=True)
    parts = list(converter.source_patterns)
    return Place(target, int(number[1]), parts.index(pattern), len(parts))
