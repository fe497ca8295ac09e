"""Loading in 4 bits: the linear layers and experts of the language model, by bitsandbytes, as transformers loads them.

transformers' own quantizer takes every nn.Linear, a vision tower's and a router's too, and leaves the experts that
transformers 5 stacks into one parameter, (E, out, in), in 16 bits. Legend: E experts.
"""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers import BitsAndBytesConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from qorpo.errors import ModelError
from qorpo.model.parts import linear_layers, stacked_experts

BLOCK_SIZE = 64  # weights with a scale of their own


def nf4_config(config: Any) -> BitsAndBytesConfig:
    """How every base is quantized: NF4 with double quantization, computed in bfloat16."""
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(
            "the model is quantized already; give its unquantized base, or set model.quantization: none"
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


class Nf4Quantizer(Bnb4BitHfQuantizer):
    """transformers' quantizer, told what to quantize: linear layers but the head and routers, and stacked experts."""

    on_gpu = False  # quantize experts on this process's GPU, whatever device they are loaded to

    def _process_model_before_weight_loading(self, model: Any, device_map: Any = None, **kwargs: Any) -> None:
        wanted = set(linear_layers(model, experts=True))
        self.experts = [f"{name}.{parameter}" for name, _, parameter in stacked_experts(model)]
        self.states: dict[str, Any] = {}
        # Whole names: a pattern that ended like a layer's name would leave that out too.
        self.quantization_config.llm_int8_skip_modules = [
            f"^{name}$".replace(".", r"\.") for name, _ in model.named_modules() if name and name not in wanted
        ]  # fmt: skip
        super()._process_model_before_weight_loading(model, device_map, **kwargs)

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        return param_name in self.experts or super().param_needs_quantization(model, param_name, **kwargs)

    def get_quantize_ops(self) -> ConversionOps:
        return _Quantize(self)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for (
            name
        ) in self.experts:  # in the order of the module's own parameters, in which PEFT nests its wrappers
            if name not in self.states:
                continue
            module, _, parameter = name.rpartition(".")
            unpack_when_used(model.get_submodule(module), parameter, _unpacking(self.states[name]))
        return super()._process_model_after_weight_loading(model, **kwargs)


class _Quantize(ConversionOps):
    """What becomes of a loaded tensor: an expert stack is packed here, a linear layer's weight by transformers' own."""

    def __init__(self, quantizer: Nf4Quantizer):
        self.quantizer = quantizer
        self.linear = Bnb4BitHfQuantizer.get_quantize_ops(quantizer)

    def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        from bitsandbytes.functional import quantize_4bit

        packed, linear = {}, {}
        for name, value in input_dict.items():
            if name not in self.quantizer.experts:
                linear[name] = value
                continue
            stack = value[0] if isinstance(value, list) else value
            card = (
                torch.device("cuda", torch.cuda.current_device()) if self.quantizer.on_gpu else stack.device
            )
            codes, state = quantize_4bit(
                stack.to(card), blocksize=BLOCK_SIZE, quant_type="nf4", compress_statistics=True
            )
            state.to(stack.device)
            self.quantizer.states[name] = state
            packed[name] = nn.Parameter(codes.to(stack.device), requires_grad=False)
        return packed | (self.linear.convert(linear, *args, **kwargs) if linear else {})


def _unpacking(state: Any) -> nn.Module:
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization

    return Bnb4bitParametrization(state)


def unpack_when_used(module: nn.Module, parameter: str, unpacking: nn.Module) -> None:
    """Let a packed parameter be what `unpacking` makes of it wherever the module reads it: once a forward."""
    parametrize.register_parametrization(module, parameter, unpacking, unsafe=True)
    if not any(isinstance(hook, _Once) for hook in module._forward_pre_hooks.values()):
        once = _Once()
        module.register_forward_pre_hook(once)
        # Checkpointing breaks off a recomputation by an error, and the cache must be given back then too.
        module.register_forward_hook(once.end, always_call=True)


class _Once:
    """torch's cache of parametrized parameters, for as long as one module's forward runs."""

    def __call__(self, module: nn.Module, args: Any) -> None:
        parametrize._cache_enabled += 1

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        parametrize._cache_enabled = max(0, parametrize._cache_enabled - 1)
        if not parametrize._cache_enabled:
            parametrize._cache = {}


def shell_of(module: nn.Module, parameter: str) -> torch.Tensor | None:
    """A tensor of a packed parameter's shape, type and device that takes no memory; None where it is not packed."""
    if not parametrize.is_parametrized(module, parameter):
        return None
    entries: Any = module.parametrizations
    return _shell(entries[parameter])


def _shell(entries: Any) -> torch.Tensor:
    state = getattr(entries[0], "quant_state", None)
    if state is None:  # PEFT's own, around a parameter that is not packed
        return entries.original
    return torch.empty(1, dtype=state.dtype, device=entries.original.device).expand(state.shape)


@contextmanager
def experts_plain(model: nn.Module) -> Iterator[None]:
    """Inside, packed experts look like plain parameters of their shape, of which nothing may be read.

    PEFT nests its wrappers of a module's parameters in another order where they are packed, so that an adapter would
    open with the matrices of one parameter on the other.
    """
    kept: list[tuple[nn.Module, Any, Any]] = []
    for module in [each for each in model.modules() if parametrize.is_parametrized(each)]:
        parametrizations: Any = module._modules.pop("parametrizations")
        kept.append((module, type(module), parametrizations))
        module.__class__ = type(module).__mro__[1]  # what it was before it was packed
        for name, entries in parametrizations.items():
            module.register_parameter(name, nn.Parameter(_shell(entries), requires_grad=False))
    try:
        yield
    finally:
        for module, kind, parametrizations in kept:
            for name in parametrizations:
                del module._parameters[name]
            module.__class__ = kind
            module._modules["parametrizations"] = parametrizations


@contextmanager
def qorpos_quantizer(*, on_gpu: bool = False) -> Iterator[None]:
    """Inside, transformers loads 4-bit models by `Nf4Quantizer`."""
    mapping: dict[str, Any] = AUTO_QUANTIZER_MAPPING
    own = mapping["bitsandbytes_4bit"]
    options = {"on_gpu": on_gpu and torch.cuda.is_available()}
    mapping["bitsandbytes_4bit"] = type("Nf4Quantizer", (Nf4Quantizer,), options)
    try:
        yield
    finally:
        mapping["bitsandbytes_4bit"] = own


def four_bit_parameters(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters in 4 bits, by their names with PEFT's wrappers, and the shapes that they unpack to."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    from bitsandbytes.nn import Linear4bit
    from bitsandbytes.nn.parametrize import Bnb4bitParametrization

    found: dict[str, tuple[int, ...]] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            found[f"{name}.weight"] = (module.out_features, module.in_features)
        elif isinstance(module, Bnb4bitParametrization):
            found[f"{name.rpartition('.')[0]}.original"] = tuple(module.quant_state.shape)
    return found
