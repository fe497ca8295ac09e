"""LoRA adapters by PEFT: attached, found again, and computed in the base's own precision."""

from collections.abc import Collection, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper, _LoraFactorsProxy
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from qorpo.errors import ModelError
from qorpo.model.adapter_folder import WEIGHTS, read_adapter_config, stored_names
from qorpo.model.dora import exact_beginnings, forward_dora, has_exact_beginning
from qorpo.model.parts import stacked_experts
from qorpo.model.quantizer import experts_plain, shell_of
from qorpo.model.targets import EXPERTS, target_names, targets_as_given, warn_of_peft
from qorpo.out_of_memory import is_out_of_memory


def attach_lora(
    model: PreTrainedModel,
    *,
    rank: int = 16,
    alpha: int = 32,
    dropout: float = 0.0,
    targets: str | Sequence[str] = "all-linear",
    modules_to_save: Sequence[str] = (),
    use_rslora: bool = False,
    use_dora: bool = False,
    init: str = "default",
) -> PeftModel:
    """Freeze `model` and put LoRA on `targets`; whole copies of `modules_to_save` train beside it.

    Targets are looked for in the language model alone: all-linear means attention and MLPs, those of shared experts
    among them, but no router and no expert; all-linear+experts adds each expert's matrices. What trains is kept in float32 (a bfloat16 weight would lose small updates), and is cast to the activations' type
    where it is used, so that no float32 copy of an activation is made.

    Args:
        use_rslora: scale by alpha / √rank (arXiv 2312.03732).
        use_dora: train the length of each weight's rows apart from their direction; see `dora`.
        init: default (A uniform, B zero), gaussian (A normal, B zero) or orthogonal (both there, B A zero).

    Raises:
        ModelError: where a target is not in the model, or is the output head, which trains only as a module to save.
    """
    with experts_plain(model):
        stacks = [f"{name}.{stack}" for name, _, stack in stacked_experts(model)]
    parameters = stacks if targets == EXPERTS else []
    if parameters and dropout:
        raise ModelError(
            f"lora.dropout: {dropout} can't be applied to experts, whose weights are adapted together; set it to 0"
        )
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_names(model, targets, modules_to_save),
        target_parameters=parameters or None,
        modules_to_save=list(modules_to_save) or None,
        use_rslora=use_rslora,
        use_dora=use_dora,
        init_lora_weights="gaussian" if init == "gaussian" else True,
    )
    peft_model = attach(model, config)
    if init == "orthogonal":
        for module in peft_model.modules():
            if isinstance(module, LoraLayer):
                _begin_orthogonal(module)
        # Its config says nothing of it: PEFT could not open the adapter on a base in 4 bits.
    return peft_model


def attach(model: PreTrainedModel, config: LoraConfig, stored: Collection[str] = ()) -> PeftModel:
    """Freeze `model` and put new adapters on it as PEFT's config says, to be computed as `attach_lora` has it.

    Args:
        stored: names of the tensors that they will be given.
    """
    config.base_model_name_or_path = None  # PEFT writes the model's own there, and warns of another
    try:
        with exact_beginnings(), targets_as_given(model, stored):
            peft_model = get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"lora.targets: {error}") from error
    if isinstance(peft_model.get_output_embeddings(), LoraLayer):
        raise ModelError(
            "lora.targets: the output head can't carry LoRA; name it in lora.modules_to_save to train it whole"
        )
    compute_in_base_type(peft_model)
    warn_of_peft(peft_model, config)
    return peft_model


def continue_lora(model: PreTrainedModel, folder: Path, *, dropout: float) -> PeftModel:
    """Put the adapter of a folder (see `adapter_folder`) on `model`, to train on.

    Raises:
        ModelError: where it is no adapter that can be trained on, or does not fit the model.
    """
    config = read_adapter_config(folder)
    config.lora_dropout, began = dropout, config.init_lora_weights
    config.init_lora_weights = True  # the values are read
    peft_model = attach(model, config, stored_names(folder))
    config.init_lora_weights = began
    try:
        outcome: Any = set_peft_model_state_dict(peft_model, load_file(folder / WEIGHTS, device="cpu"))
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"model.adapter: {folder}: does not fit model.path, or is damaged: {reason}"
        ) from error
    trained = {name for name, parameter in peft_model.named_parameters() if parameter.requires_grad}
    if strange := outcome.unexpected_keys or sorted(trained & set(outcome.missing_keys)):
        raise ModelError(
            f"model.adapter: {folder}: does not fit model.path (such as {strange[0]}); give the base that it was trained on"
        )
    return peft_model


@torch.no_grad()
def _begin_orthogonal(layer: Any) -> None:
    """A of the odd and B of the even rows of one orthogonal matrix, so that B A is zero while both learn.

    PEFT's own gives them the type of the base's weight: bytes in 4 bits, and in bfloat16 B A is no longer zero.
    """
    for a, b in zip(layer.lora_A.values(), layer.lora_B.values(), strict=True):
        rank = len(a.weight)
        if isinstance(layer, ParamWrapper) or rank % 2:
            raise ModelError(
                f"lora.init: orthogonal needs an even rank and layers of one matrix, and here are {type(layer).__name__} "
                f"and rank {rank}; set it to default"
            )
        matrix, _ = torch.linalg.qr(torch.randn(rank, rank, device=a.weight.device))
        for weight, half in ((a.weight, matrix[0::2]), (b.weight.T, matrix[1::2])):
            mixture = torch.randn(weight.shape[1], rank // 2, device=weight.device)
            weight.copy_((mixture @ half).T / 10)


def compute_in_base_type(peft_model: PeftModel) -> None:
    """Keep what trains in float32, and cast it to the activations' type where it is used, as `attach_lora` says."""
    for module in peft_model.modules():
        if isinstance(module, LoraLayer):
            _keep_input_type(module)
        elif isinstance(module, ModulesToSaveWrapper):
            _train_in_float32(module)


def b_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The second matrices (out, r) of a model's LoRA layers, which LoRA+ gives a rate of their own."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [linear.weight for layer in layers for linear in layer.lora_B.values()]


def output_head(model: Any) -> Any:
    """The module whose weight (V, H) makes logits: the trained copy where there is one."""
    head = model.get_output_embeddings()
    if isinstance(head, ModulesToSaveWrapper):
        return head.modules_to_save[head.active_adapter]  # type: ignore[index]
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head; qorpo trains causal language models")
    return head


class _CastLinear(nn.Linear):
    """A float32 weight that computes in its input's type."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return F.linear(input, self.weight.to(input.dtype), bias)


class _CastEmbedding(nn.Embedding):
    """A float32 weight whose rows come out in the type that the model computes in."""

    compute_dtype: torch.dtype

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).to(self.compute_dtype)


def _keep_input_type(layer: Any) -> None:
    """PEFT would cast every layer's input to the adapter's float32: rank × width is the cheaper side to cast."""
    if isinstance(layer, ParamWrapper):  # adapts a weight of experts, and its output is no product
        if shell_of(layer.get_base_layer(), layer.parameter_name) is not None:
            vars(layer)["forward"] = MethodType(_adapt_packed, layer)
            vars(layer)["get_param"] = MethodType(_shell, layer)
        return
    linears = [*layer.lora_A.values(), *layer.lora_B.values()]
    if linears and all(type(linear) is nn.Linear for linear in linears):
        layer.cast_input_dtype_enabled = False
        for linear in linears:
            linear.__class__ = _CastLinear
        layer.forward = MethodType(_add_in_place, layer)


def _add_in_place(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """base(x) + scaling · B A x, added up by the last product, in the base's own output.

    PEFT's forward, which anything beyond that is left to, makes of the wide side two more copies here and one in
    backward: the product, and it or its gradient times the scaling.
    """
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = not (args or kwargs or layer.disable_adapters or layer.merged)
    if not plain or len(names) != 1 or layer.lora_B[names[0]].bias is not None:
        return type(layer).forward(layer, x, *args, **kwargs)
    (name,) = names
    rows = x.flatten(0, -2)  # 2-D: an output seen through a view would be copied in backward
    if layer.lora_variant:
        if not has_exact_beginning(layer, name):
            return type(layer).forward(layer, x, *args, **kwargs)
        return forward_dora(layer, name, rows).view(*x.shape[:-1], -1)
    low = layer.lora_A[name](layer.lora_dropout[name](rows))
    wide = layer.base_layer(rows).addmm_(
        low, layer.lora_B[name].weight.to(low.dtype).T, alpha=layer.scaling[name]
    )
    return wide.view(*x.shape[:-1], -1)


def _adapt_packed(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """PEFT's forward for experts in 4 bits: W + scaling · B A, made after W is unpacked.

    PEFT's own reads the parameter as it adds its change, so that torch's cache keeps it without the change; and it
    never takes away again what it added beside another parametrization.
    """
    names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
    entries = layer.get_base_layer().parametrizations[layer.parameter_name]
    for name in names:
        entries.append(_LoraFactorsProxy(*layer.get_delta_factors(name)))
    try:
        return layer.base_layer(x, *args, **kwargs)
    finally:
        for _ in names:
            del entries[-1]


def _shell(layer: Any) -> torch.Tensor | None:
    """What PEFT asks for a type and a device alone."""
    return shell_of(layer.get_base_layer(), layer.parameter_name)


def _train_in_float32(wrapper: Any) -> None:
    for module in wrapper.modules_to_save.values():
        dtype = getattr(getattr(module, "weight", None), "dtype", torch.float32)
        if dtype not in (torch.bfloat16, torch.float16):
            continue
        if type(module) is nn.Linear:
            module.__class__ = _CastLinear
        elif isinstance(module, nn.Embedding) and type(module).forward is nn.Embedding.forward:
            module.__class__ = _CastEmbedding
            module.compute_dtype = dtype  # type: ignore[assignment]
        else:
            continue
        module.float()
