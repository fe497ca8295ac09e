"""Optimizers and schedules by the names Hugging Face users know."""

import logging
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import get_scheduler

from qorpo.engine.distributed import sharded_like
from qorpo.recipe import TrainRecipe

logger = logging.getLogger(__name__)

_SCHEDULES = {
    "cosine": "cosine",
    "linear": "linear",
    "inverse_sqrt": "inverse_sqrt",
    "constant": "constant_with_warmup",
}


def make_optimizer(
    parameters: Iterable[nn.Parameter], recipe: TrainRecipe, b_matrices: Iterable[nn.Parameter] = ()
) -> torch.optim.Optimizer:
    """AdamW over what trains; weight decay on matrices only, never on biases or norms.

    A resolved recipe is expected: no `auto` for optimizer or learning rate.

    Args:
        b_matrices: those of the parameters that learn at `lora_plus_ratio` times the rate (LoRA+, arXiv 2402.12354).
    """
    parameters = list(parameters)
    faster = {id(parameter) for parameter in b_matrices} if recipe.lora_plus_ratio else set()
    rest = [p for p in parameters if id(p) not in faster]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.dim() >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.dim() < 2], "weight_decay": 0.0},
    ]
    if recipe.lora_plus_ratio and faster:
        rate = float(recipe.learning_rate) * recipe.lora_plus_ratio
        matrices = [p for p in parameters if id(p) in faster]
        groups.append({"params": matrices, "weight_decay": recipe.weight_decay, "lr": rate})
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (recipe.adam_beta1, recipe.adam_beta2),
        "eps": recipe.adam_epsilon,
    }
    if recipe.optimizer.startswith("adamw_torch"):
        return torch.optim.AdamW(groups, fused=recipe.optimizer == "adamw_torch_fused", **settings)

    import bitsandbytes.optim as bnb

    if recipe.optimizer.startswith("paged") and all(p.device.type == "cpu" for p in parameters):
        logger.info(
            "optimizer: %s is not paged on the CPU, where there is nothing to page out", recipe.optimizer
        )
        # The same arithmetic without the paging, so that no warning of bitsandbytes' is left to explain.
        return {"paged_adamw_8bit": bnb.AdamW8bit, "paged_adamw_32bit": bnb.AdamW32bit}[recipe.optimizer](
            groups, **settings
        )
    kinds = {
        "paged_adamw_8bit": bnb.PagedAdamW8bit,
        "paged_adamw_32bit": bnb.PagedAdamW32bit,
        "adamw_8bit": bnb.AdamW8bit,
    }
    return kinds[recipe.optimizer](groups, **settings)


def make_schedule(optimizer: torch.optim.Optimizer, recipe: TrainRecipe, total_steps: int) -> Any:
    """The learning rate's course: it climbs over n warm-up steps, from 1/n of the highest rate at the first step to all
    of it at the n-th, and takes the recipe's schedule over the remaining steps.
    """
    warmup_steps = math.ceil(recipe.warmup_ratio * total_steps)
    schedule: Any = get_scheduler(_SCHEDULES[recipe.schedule], optimizer, warmup_steps, total_steps)
    after_warmup = schedule.lr_lambdas[0]

    def share(steps_done: int) -> float:
        # transformers climbs from 0, where the first step would learn nothing.
        return (steps_done + 1) / warmup_steps if steps_done < warmup_steps else after_warmup(steps_done)

    schedule.lr_lambdas = [share] * len(optimizer.param_groups)
    take_rate(schedule)
    return schedule


def take_rate(schedule: Any) -> None:
    """Give the optimizer the rate that its schedule has for the next step, whatever either has loaded."""
    schedule._last_lr = [
        highest * share(schedule.last_epoch)
        for highest, share in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict`, of whole tensors into sharded ones too, and paged states paged again: bitsandbytes brings them
    back as plain device memory.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for index, values in state["state"].items():
        state["state"][index] = {
            name: sharded_like(value, parameters[index]) if torch.is_tensor(value) else value
            for name, value in values.items()
        }
    optimizer.load_state_dict(state)
    if not getattr(optimizer, "is_paged", False):
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            values = optimizer.state[parameter]
            for name in ("state1", "state2"):
                if (
                    name in values
                    and parameter.device.type != "cpu"
                    and not getattr(values[name], "is_paged", False)
                ):
                    paged = optimizer.get_state_buffer(parameter, dtype=values[name].dtype)  # type: ignore[attr-defined]
                    values[name] = paged.copy_(values[name])
