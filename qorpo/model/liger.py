"""liger-kernel's fused RMSNorm, RoPE and SwiGLU or GeGLU in place of a loaded model's own, and of no other model's.

liger's route for a loaded model gives its norms and MLPs forwards of their own, but it also puts names into the
modeling module, of which every later model of the family would be made, and RoPE into nothing else: attention looks it
up there. Here the module's names are put back, and RoPE is given to this model's attention layers alone.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from qorpo.errors import ModelError

logger = logging.getLogger(__name__)

# Where a patched module keeps what it was given, by name: a copy of the module that PEFT trains takes it along.
_GIVEN = "_given_by_liger"


def apply_liger(model: Any, wanted: bool | str) -> bool:
    """Give a model liger's modules, but never its loss; whether it has any now.

    Call it before adapters are attached, and have `resolve_mode` check it afterwards: what it compares with are the
    model's own modules.

    Args:
        model: of transformers, with or without PEFT adapters, on a CUDA device when it runs.
        wanted: true, false, or auto: where liger has modules for the architecture.

    Raises:
        ModelError: where `wanted` is true and liger has none, or can't put them in.
    """
    if not wanted:
        return False
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    try:
        replaced = _patch(base)
        obstacle = f"liger-kernel has no modules for {base.config.model_type}"
    except Exception as error:  # of a version of liger or transformers that the other doesn't know
        remove_liger(base)
        replaced, obstacle = [], f"liger-kernel can't be applied to {base.config.model_type} ({error})"
    if replaced:
        logger.info("liger: %s are liger-kernel's", ", ".join(replaced))
    elif wanted is True:
        raise ModelError(f"model.liger: {obstacle}; set it to auto or false")
    else:
        logger.info("liger: off, %s", obstacle)
    return bool(replaced)


def remove_liger(model: nn.Module) -> None:
    """Give a model its own modules back."""
    for module in model.modules():
        for name in vars(module).pop(_GIVEN, ()):
            vars(module).pop(name, None)


def has_liger(model: nn.Module) -> bool:
    return any(_GIVEN in vars(module) for module in model.modules())


@contextmanager
def own_modules(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes without liger."""
    given = [(module, vars(module)[_GIVEN]) for module in model.modules() if _GIVEN in vars(module)]
    remove_liger(model)
    try:
        yield
    finally:
        for module, names in given:
            vars(module).update({**names, _GIVEN: names})


def _patch(model: nn.Module) -> list[str]:
    """Patch the model; returns the kinds of modules that compute by liger now."""
    from liger_kernel.transformers import (
        _apply_liger_kernel_to_instance,
    )  # transformers' Trainer takes it too

    modules = list(model.modules())
    own_names = [set(vars(module)) for module in modules]
    files = {name: vars(sys.modules[name]) for name in {type(module).__module__ for module in modules}}
    before = {name: dict(file) for name, file in files.items()}
    functions: dict[str, dict[str, Any]] = {}
    try:
        _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)
    finally:
        for name, file in files.items():
            changed = {key: value for key, value in file.items() if value is not before[name].get(key)}
            functions[name] = {
                key: value for key, value in changed.items() if isinstance(value, FunctionType)
            }
            file.update({key: before[name][key] for key in changed})
        for module in modules:
            _give_functions(module, functions.get(type(module).__module__, {}))
        for module, names in zip(modules, own_names, strict=True):
            if given := {name: value for name, value in vars(module).items() if name not in names}:
                vars(module)[_GIVEN] = given
    return sorted({type(module).__name__ for module in modules if _GIVEN in vars(module)})


def _give_functions(module: nn.Module, functions: dict[str, Any]) -> None:
    """Let a module's forward call `functions` where it calls those of its file by their names."""
    forward = type(module).forward
    if "forward" in vars(module) or not isinstance(forward, FunctionType):
        return
    if called := {name: functions[name] for name in forward.__code__.co_names if name in functions}:
        own = FunctionType(
            forward.__code__, {**forward.__globals__, **called}, forward.__name__, forward.__defaults__, forward.__closure__
        )  # fmt: skip
        own.__kwdefaults__ = forward.__kwdefaults__
        module.forward = MethodType(own, module)
