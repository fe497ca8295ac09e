"""The plan at work in a run: memory's `auto` resolved for a loaded model, the card capped, advice when memory runs out."""

import copy
import logging
from dataclasses import replace
from typing import Any

import psutil
import torch

from qorpo.data.groups import Group, GroupLengths
from qorpo.data.pack import pack_groups
from qorpo.errors import PlanError
from qorpo.model.parts import decoder_layers
from qorpo.model.scoring import Scorer
from qorpo.planning.advice import advise
from qorpo.planning.counter import MemorySettings, StepCounter
from qorpo.planning.settings import (
    CONTEXT_BYTES,
    GIB,
    fastest_that_fits,
    fixed_settings,
    memory_keys,
    reserved_bytes,
)
from qorpo.recipe import Recipe

logger = logging.getLogger(__name__)

LATER_BYTES = int(0.25 * GIB)
"""What libraries load onto a card after the model, at their first calls; stated, not measured by qorpo yet."""


HOST_SHARE = 0.25
"""The most of the host's free memory that layers spared recomputation may keep, where no budget is given."""


def resolve_memory(
    recipe: Recipe,
    model: Any,
    longest: GroupLengths,
    *,
    device: torch.device,
    dtype: torch.dtype,
    ranks: int = 1,
) -> Recipe:
    """The recipe with every `auto` of its memory section but the budget replaced: by the plan, for what is free.

    Off CUDA, where nothing but a budget bounds it, under hybrid sharding, and where a model can't be planned, by fixed
    values; on the CPU layers are spared recomputation as far as memory is plenty.

    Args:
        model: loaded, with adapters, and wherever it is to be but for a model that is sharded afterwards.
        longest: the longest group of the data.
        device: where it trains.
        dtype: what it computes in.
        ranks: processes that share each step, of which all must call this together.
    """
    memory, on_cuda = recipe.memory, device.type == "cuda"
    if "auto" not in memory.model_dump(exclude={"budget_gib"}).values():
        return recipe
    num_layers = len(decoder_layers(model))
    settings = fixed_settings(memory, num_layers, on_cuda=on_cuda)
    if memory.sharding != "hybrid" and (on_cuda or memory.budget_gib != "auto"):
        try:
            counter = _counter(recipe, model, longest, device, dtype, ranks)
            settings = _planned(recipe, counter, free_bytes(recipe, device))
        except PlanError as error:  # a model like no other: a plan helps, but training can do without
            logger.warning("memory: no plan can be made of this model (%s); fixed values are taken", error)
    elif (
        not on_cuda and memory.activation_checkpointing == "auto" and num_layers and memory.sharding == "none"
    ):
        tokens = max(settings.microbatch_tokens, sum(longest))
        layer_bytes = kept_bytes(model, recipe.model.attention, longest) / sum(longest) * tokens / num_layers
        spared = min(num_layers, int(HOST_SHARE * psutil.virtual_memory().available / max(layer_bytes, 1)))
        settings = replace(settings, checkpointed_layers=num_layers - spared)
    keys = memory_keys(settings, num_layers)
    logger.info("memory: %s", ", ".join(f"{key} {str(value).lower()}" for key, value in keys.items()))
    for key, value in keys.items():
        recipe = recipe.replace(f"memory.{key}", value)
    return recipe


def _planned(recipe: Recipe, counter: StepCounter, room_bytes: int) -> MemorySettings:
    settings = fastest_that_fits(recipe.memory, counter, room_bytes)
    needed = reserved_bytes(counter.peak_bytes(settings))
    level = logging.INFO if needed <= room_bytes else logging.WARNING
    logger.log(
        level, "memory: planned %.2f GiB of %.2f%s", needed / GIB, room_bytes / GIB,
        "" if needed <= room_bytes else ", which does not fit: " + _together(recipe, counter, settings, room_bytes),
    )  # fmt: skip
    return settings


def kept_bytes(model: Any, attention: str, longest: GroupLengths) -> int:
    """What autograd keeps of one group's forward: counted, which takes as long as the forward and needs as much memory."""
    scorer = Scorer(model, attention)  # type: ignore[arg-type]
    standing = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in standing:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with scorer.packed_attention(), torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        scorer(pack_groups([Group.of(((1,) * tokens for tokens in longest), "plan")]).to(model.device))
    return sum(kept.values())


def planned_bytes(recipe: Recipe, model: Any, longest: GroupLengths) -> int:
    """What `torch.cuda.max_memory_reserved` is to say of steps by a resolved recipe."""
    counter = _counter(recipe, model, longest, model.device, model.dtype)
    settings = fixed_settings(recipe.memory, counter.num_layers, on_cuda=counter.on_cuda)
    return reserved_bytes(counter.count(settings).peak.total_bytes)


def advice_for(recipe: Recipe, model: Any, longest: GroupLengths, dtype: torch.dtype) -> str:
    """What to change in a resolved recipe that ran out of memory."""
    try:
        counter = _counter(recipe, model, longest, model.device, dtype)
        settings = fixed_settings(recipe.memory, counter.num_layers, on_cuda=counter.on_cuda)
        return _together(recipe, counter, settings, free_bytes(recipe, model.device))
    except PlanError:
        return "lower data.max_length or lora.rank, or take a larger card"


def _together(recipe: Recipe, counter: StepCounter, settings: MemorySettings, room_bytes: int) -> str:
    needed = reserved_bytes(counter.peak_bytes(settings))
    if needed <= room_bytes:
        return f"the plan counts {needed / GIB:.2f} GiB of {room_bytes / GIB:.2f} that should be free; does another process use them?"
    return "the plan advises " + "; ".join(advise(recipe, counter, settings, room_bytes))


def _counter(
    recipe: Recipe,
    model: Any,
    longest: GroupLengths,
    device: torch.device,
    dtype: torch.dtype,
    ranks: int = 1,
) -> StepCounter:
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # what the loaded model is, the fake one becomes
    quantization = "nf4" if getattr(model, "is_loaded_in_4bit", False) else "none"
    return StepCounter(
        config, recipe.replace("model.quantization", quantization), longest=longest,
        on_cuda=device.type == "cuda", dtype=dtype, ranks=ranks,
    )  # fmt: skip


def free_bytes(recipe: Recipe, device: torch.device) -> int:
    """What PyTorch's allocator may reserve: what is free or its own already, within the recipe's budget."""
    budget_gib = recipe.memory.budget_gib
    if device.type == "cuda":
        return _room_on_card(budget_gib, device)
    if budget_gib != "auto":
        return int(budget_gib * GIB)
    return psutil.virtual_memory().available + psutil.Process().memory_info().rss


def _room_on_card(budget_gib: float | str, device: torch.device) -> int:
    free, _ = torch.cuda.mem_get_info(device)
    room_bytes = free + torch.cuda.memory_reserved(device) - LATER_BYTES
    return (
        room_bytes if isinstance(budget_gib, str) else min(room_bytes, int(budget_gib * GIB) - CONTEXT_BYTES)
    )


def cap_card(budget_gib: float | str, device: torch.device) -> None:
    """Let PyTorch reserve no more of a CUDA card than is free now and the budget leaves beside CUDA's own share.

    So its allocator is the first to run out, which a step gets over; a library's own call that fails ends the run.
    """
    if device.type == "cuda":
        share = _room_on_card(budget_gib, device) / torch.cuda.get_device_properties(device).total_memory
        # By its number or none: a device that is just "cuda", as accelerate names a single card, is refused.
        torch.cuda.set_per_process_memory_fraction(min(max(share, 0.0), 1.0), device.index)
