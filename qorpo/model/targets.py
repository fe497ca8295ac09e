"""What of a model an adapter is put on, by its whole names, and how PEFT is kept from taking them for other modules."""

import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from math import prod
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils import transformers_weight_conversion
from torch import nn
from torch.nn.utils import parametrize

from qorpo.errors import ModelError
from qorpo.model.parts import language_model, language_modules, linear_layers
from qorpo.model.quantizer import experts_plain, four_bit_parameters

logger = logging.getLogger(__name__)

EXPERTS = "all-linear+experts"


def target_names(model: Any, targets: str | Sequence[str], modules_to_save: Sequence[str]) -> list[str]:
    """The whole names of the modules with an adapter.

    Raises:
        ModelError: where one is not in the language model.
    """
    there = [name for name, _ in language_modules(model)]
    ends = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()} - {""}
    given = [] if isinstance(targets, str) else list(targets)
    found = {end: [name for name in there if name == end or name.endswith(f".{end}")] for end in given}
    missing = {end for end, names in found.items() if not names}
    missing |= {name for name in modules_to_save if name.rsplit(".", 1)[-1] not in ends}
    head = next(
        (name for name, module in model.named_modules() if module is model.get_output_embeddings()), None
    )
    if head and missing:  # beside the trunk; refused below, by what it is
        missing -= {end for end in given if head == end or head.endswith(f".{end}")}
    if missing:
        raise ModelError(
            f"lora: this model has no module named {', '.join(sorted(missing))}; it has {', '.join(sorted(ends))}"
        )
    if isinstance(targets, str):
        return linear_layers(model, experts=targets == EXPERTS)
    return [name for end in given for name in found[end] or [end]]


@contextmanager
def targets_as_given(model: nn.Module, stored: Collection[str] = ()) -> Iterator[None]:
    """Inside, PEFT takes an adapter's targets as they are written.

    For adapters from before transformers 5, which name each expert's own layers, it turns gate_proj, up_proj and
    down_proj into the stacked experts; dense layers and shared experts of the same names are then left without their
    adapter, and without a word.

    Args:
        model: what the adapter is to be on; its experts may be in 4 bits.
        stored: names of the adapter's tensors; where one is a single expert's, PEFT's way is taken.
    """
    mapping = transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING
    kept = dict(mapping)
    if not any(".experts." in name and name.split(".experts.")[1][:1].isdigit() for name in stored):
        mapping.clear()
    try:
        with experts_plain(model):
            yield
    finally:
        mapping.update(kept)


def warn_of_peft(model: PeftModel, config: LoraConfig) -> None:
    kind = transformers_weight_conversion._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    taken = transformers_weight_conversion._MOE_TARGET_MODULE_MAPPING.get(kind or "", {})
    names = sorted({name.rsplit(".", 1)[-1] for name in config.target_modules or ()} & set(taken))
    if names:
        logger.warning(
            "lora: PEFT itself takes %s of %s for its experts when it opens an adapter, and would leave these of dense "
            "layers and shared experts out: merge the adapter by qorpo merge before others use it",
            ", ".join(names), model.config.model_type,
        )  # fmt: skip


def shares(model: Any) -> tuple[float, float]:
    """Of the language model's weights, the head's among them: the share in 4 bits, and the share with an adapter."""
    inside = {id(parameter) for parameter in language_model(model).parameters()}
    head = getattr(model.get_output_embeddings(), "weight", None)
    packed = four_bit_parameters(model)
    adapted = {
        f"{name}.{_base_parameter(module)}"
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }
    total = in_4_bits = with_adapter = 0
    for name, parameter in model.named_parameters():
        if (
            "lora_" in name
            or ".modules_to_save." in name
            or (id(parameter) not in inside and parameter is not head)
        ):
            continue
        size = prod(packed[name]) if name in packed else parameter.numel()
        total += size
        in_4_bits += size * (name in packed)
        with_adapter += size * (name in adapted)
    return in_4_bits / total, with_adapter / total


def _base_parameter(layer: Any) -> str:
    """Where the weight that a LoRA layer adapts is, by its name below the layer."""
    path, inner = "base_layer", layer.base_layer
    while isinstance(inner, LoraLayer):
        path, inner = f"{path}.base_layer", inner.base_layer
    parameter = layer.parameter_name if isinstance(layer, ParamWrapper) else "weight"
    is_packed = parametrize.is_parametrized(inner, parameter)
    return f"{path}.parametrizations.{parameter}.original" if is_packed else f"{path}.{parameter}"
