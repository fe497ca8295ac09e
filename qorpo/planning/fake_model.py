"""A model of a config's shape whose tensors take no memory: fake ones, which know shape, type and place alone.

The model, its quantized layers and its adapters are made by the libraries' own code on PyTorch's meta device, so that
which layers are quantized or adapted is never guessed; then every parameter becomes a fake tensor on the CPU (a fake
CUDA one aborts on a build without CUDA). bitsandbytes' 4-bit weights can't be fake: `_NF4Linear` stands in for them.
liger's kernels can't run on them, so a layer's own norm, RoPE and MLP are counted: they keep more for backward (float32
copies in the norm, the activated gate in the MLP), so that with `model.liger` a plan is above what is needed.
"""

import copy
import math
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from transformers import PretrainedConfig

from qorpo.model.adapter_folder import find_adapter, read_adapter_config, stored_names
from qorpo.model.adapters import attach, attach_lora
from qorpo.model.mixed_precision import train_all
from qorpo.model.parts import auto_class, stacked_experts
from qorpo.model.quantizer import Nf4Quantizer, nf4_config, unpack_when_used
from qorpo.planning.foreign import foreign_code
from qorpo.recipe import Recipe

# bitsandbytes' NF4: so many weights have one absmax, and so many absmaxes, themselves in 8 bits, have one of their own.
WEIGHTS_PER_ABSMAX, ABSMAXES_PER_SCALE = 64, 256


def shortened(config: PretrainedConfig, num_layers: int) -> PretrainedConfig:
    """The same model with its first `num_layers` layers."""
    config = copy.deepcopy(config)
    with foreign_code():
        text = config.get_text_config()
        kinds = getattr(text, "layer_types", None)
        text.num_hidden_layers = num_layers
        # Some configs work them out by themselves, and can't be told.
        if kinds is not None and text.layer_types != kinds[:num_layers]:
            text.layer_types = kinds[:num_layers]
    return config


def make_fake_model(
    config: PretrainedConfig, recipe: Recipe, dtype: torch.dtype = torch.bfloat16
) -> tuple[Any, FakeTensorMode]:
    """A model of fake tensors, as `load_model` with `attach_lora` or `train_all` leaves it, and the mode it lives in."""
    quantized = recipe.model.quantization == "nf4"
    config = copy.deepcopy(config)  # what quantizes it writes it there
    with foreign_code(), torch.device("meta"):
        model = auto_class(config).from_config(
            config, dtype=dtype, trust_remote_code=recipe.model.trust_remote_code
        )
    if recipe.tuning == "full":
        train_all(model)
        mode = FakeTensorMode()
        _make_fake(model, mode)
        return model, mode
    if quantized:
        with foreign_code():
            quantizer = Nf4Quantizer(nf4_config(config), pre_quantized=False)
            quantizer.preprocess_model(model, device_map={"": "meta"})
            quantizer.postprocess_model(model)
    model.requires_grad_(False)
    experts = [(module, parameter) for _, module, parameter in stacked_experts(model)] if quantized else []
    with foreign_code(), torch.device("meta"):
        if recipe.model.adapter is not None:
            folder = find_adapter(recipe.model.adapter)
            peft_model = attach(model, read_adapter_config(folder), stored_names(folder))
        else:  # what adapters begin with has no bytes of its own
            peft_model = attach_lora(model, **{**dict(recipe.lora), "init": "default"})
    mode = FakeTensorMode()
    if quantized:
        with mode:
            _stand_in_for_nf4(peft_model, torch.uint8 if recipe.memory.sharding == "none" else torch.bfloat16)
            for module, parameter in experts:
                _stand_in_for_packed_experts(module, parameter)
    _make_fake(peft_model, mode)
    return peft_model, mode


def _make_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Every parameter and buffer a fake one, also where a model put it elsewhere than on meta; tied ones stay one."""
    made: dict[int, torch.Tensor] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            shell = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
            made[id(tensor)] = (
                nn.Parameter(shell, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else shell
            )
        return made[id(tensor)]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None and not isinstance(tensor, FakeTensor):
                    tensors[name] = fake(tensor)  # type: ignore[assignment]


def _stand_in_for_nf4(model: nn.Module, storage: torch.dtype) -> None:
    from bitsandbytes.nn import Linear4bit

    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Linear4bit):
                setattr(parent, name, _NF4Linear(child, storage))


def _stand_in_for_packed_experts(module: nn.Module, parameter: str) -> None:
    """The bytes of experts in 4 bits, (E, …, …), which are unpacked together wherever their module reads them."""
    weight = getattr(module, parameter)
    packed, absmax, absmax_scales = _nf4_tensors(weight.numel(), torch.uint8)
    setattr(module, parameter, nn.Parameter(packed, requires_grad=False))
    unpack_when_used(module, parameter, _NF4Experts(tuple(weight.shape), weight.dtype, absmax, absmax_scales))


def _nf4_tensors(num_weights: int, storage: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed weights, a scale a block of them, and what those scales, themselves in 8 bits, are made of."""
    num_absmaxes = -(-num_weights // WEIGHTS_PER_ABSMAX)
    packed = torch.empty(-(-((num_weights + 1) // 2) // storage.itemsize), 1, dtype=storage)
    codes = 256 + 16 + 1  # the 8-bit and the 4-bit values that there are, and the absmaxes' mean
    scales = torch.empty(-(-num_absmaxes // ABSMAXES_PER_SCALE) + codes)
    return packed, torch.empty(num_absmaxes, dtype=torch.uint8), scales


class _NF4Experts(nn.Module):
    """What unpacks experts in a module's forward, without a gradient."""

    absmax: torch.Tensor
    absmax_scales: torch.Tensor

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, absmax: torch.Tensor, absmax_scales: torch.Tensor
    ):
        super().__init__()
        self.quant_state = SimpleNamespace(shape=shape, dtype=dtype)  # as bitsandbytes' own has it
        self.register_buffer("absmax", absmax)
        self.register_buffer("absmax_scales", absmax_scales)

    @property
    def nf4_constants(self) -> list[torch.Tensor]:
        return [self.absmax, self.absmax_scales]

    @torch.no_grad()
    def forward(self, packed: torch.Tensor) -> torch.Tensor:
        return _unpacked(self.absmax, self.quant_state.shape, self.quant_state.dtype)


class _NF4Linear(nn.Module):
    """The bytes and the steps of bitsandbytes' Linear4bit: unpacks its weight in forward, and again in backward."""

    absmax: torch.Tensor
    absmax_scales: torch.Tensor

    def __init__(self, layer: Any, storage: torch.dtype):
        super().__init__()
        self.out_features, self.in_features = layer.out_features, layer.in_features
        self.shape = (layer.out_features, layer.in_features)
        self.compute_dtype = layer.compute_dtype
        packed, absmax, absmax_scales = _nf4_tensors(math.prod(self.shape), storage)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("absmax", absmax)
        self.register_buffer("absmax_scales", absmax_scales)
        self.bias = None
        if layer.bias is not None:
            bias = torch.empty(layer.out_features, dtype=torch.bfloat16)
            self.bias = nn.Parameter(bias, requires_grad=False)

    @property
    def nf4_constants(self) -> list[torch.Tensor]:
        return [self.absmax, self.absmax_scales]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        product = _NF4Product.apply(x.to(self.compute_dtype), self.weight, self.absmax, self.shape, self.bias)
        return product.to(x.dtype)


class _NF4Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, packed, absmax, shape, bias):
        ctx.save_for_backward(packed, absmax)
        ctx.shape = shape
        return F.linear(x, _unpacked(absmax, shape, x.dtype), bias)

    @staticmethod
    def backward(ctx, upstream):
        _, absmax = ctx.saved_tensors
        return upstream @ _unpacked(absmax, ctx.shape, upstream.dtype), None, None, None, None


def _unpacked(absmax: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    absmax_float32 = absmax.float()  # alive until the weight is unpacked
    weight = absmax_float32.new_empty(shape, dtype=dtype)
    del absmax_float32
    return weight
