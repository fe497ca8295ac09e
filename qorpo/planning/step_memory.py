"""One training step of a fake model, run by the code that trains real ones, and the bytes alive while it ran."""

import gc
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PretrainedConfig

from qorpo.build import build_objective
from qorpo.data.groups import Group, GroupLengths
from qorpo.engine.optim import make_optimizer
from qorpo.engine.step import run_step
from qorpo.model.adapters import b_matrices
from qorpo.model.checkpointing import checkpoint_layers
from qorpo.model.mixed_precision import casts_of
from qorpo.model.parts import decoder_layers
from qorpo.model.scoring import Mode, Scorer
from qorpo.ops.softmax import triton_is_installed
from qorpo.planning.fake_model import make_fake_model
from qorpo.planning.fake_ranks import fake_ranks, shard
from qorpo.planning.foreign import foreign_code
from qorpo.planning.live_bytes import LiveBytes, Peak
from qorpo.recipe import Recipe

CPU = torch.device("cpu")

HEAD, OPTIMIZER = "forward of the head", "optimizer's step"
"""Stretches of a step that others ask for by name."""


@dataclass(frozen=True)
class StepShape:
    """What a step's memory depends on beside the model and the recipe's own keys."""

    rows: tuple[GroupLengths, ...]  # the groups of its largest micro-batch
    accumulates: bool  # whether gradients of an earlier micro-batch are there
    attention: Mode
    chunk_tokens: int
    checkpointed_layers: int | None  # None: all
    offload: bool
    on_cuda: bool
    dtype: torch.dtype = torch.bfloat16
    shards: int = 1  # ranks that a model under full tuning is sharded over


@dataclass(frozen=True)
class StepMemory:
    """The most bytes alive in each stretch of a step, and what is kept in host memory."""

    peaks: dict[str, Peak]
    host_bytes: int  # offloaded inputs of layers
    paged_bytes: int  # optimizer states in unified memory, moved out when the device is short
    num_layers: int
    traffic_bytes: (
        int  # what one micro-batch receives of gathered weights, and sends of gradients; as many go back
    )

    @property
    def stretch(self) -> str:
        """Which stretch of the step needs most."""
        return max(self.peaks, key=lambda name: self.peaks[name].total_bytes)

    @property
    def peak(self) -> Peak:
        return self.peaks[self.stretch]


def step_memory(config: PretrainedConfig, recipe: Recipe, shape: StepShape) -> StepMemory:
    """Count a step after the first: optimizer states are there, and gradients where the step has more micro-batches."""
    with _without_collector(), fake_ranks(shape.shards) if shape.shards > 1 else nullcontext() as mesh:
        return _step_memory(config, recipe, shape, mesh)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Fake tensors are so many small objects that Python's collector of cycles takes a tenth of the time over them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _step_memory(
    config: PretrainedConfig, recipe: Recipe, shape: StepShape, mesh: DeviceMesh | None
) -> StepMemory:
    model, fake_mode = make_fake_model(config, recipe, shape.dtype)
    scorer = Scorer(model, shape.attention, shape.chunk_tokens)
    # As the run will have it: on this machine's own card, or on a card elsewhere, where Triton is taken for granted.
    scorer.fused_head = shape.on_cuda and (triton_is_installed() or not torch.cuda.is_available())
    casts_to = casts_of(recipe.tuning, shape.dtype)
    layers = decoder_layers(model)
    num_checkpointed = len(layers) if shape.checkpointed_layers is None else shape.checkpointed_layers
    if num_checkpointed:
        checkpoint_layers(model, num_checkpointed, offload=shape.offload)
    if mesh is None:
        scorer.compute_dtype = casts_to
    else:
        with fake_mode:
            shard(scorer, mesh, casts_to)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = LiveBytes()
    _count_model(model, count)
    workspaces = [
        torch.empty(workspace_bytes() * shape.on_cuda, dtype=torch.uint8, device="meta") for _ in range(2)
    ]
    count.add(workspaces, "matrix products' workspaces")
    _follow(layers, num_checkpointed, count)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: count.add([p.grad], "gradients"))
    with fake_mode:
        optimizer, paged_bytes = _count_optimizer(trained, b_matrices(model), recipe, shape.on_cuda, count)
        if shape.accumulates:
            for parameter in trained:
                parameter.grad = torch.zeros_like(parameter)
                count.add([parameter.grad], "gradients")
        model.train()

        def backward(loss: torch.Tensor) -> None:
            count.kind, count.stretch = "backward", "backward of the loss"
            loss.backward()

        count.peaks.clear()
        count.kind, count.stretch = "activations", "forward"
        groups = [filled_group(lengths) for lengths in shape.rows]
        with foreign_code(), count, scorer.packed_attention():
            run_step(
                scorer, groups, build_objective(recipe.objective), device=CPU, backward=backward,
                microbatch_tokens=sum(map(sum, shape.rows)),
            )  # fmt: skip
            count.kind, count.stretch = "optimizer", OPTIMIZER
            torch.nn.utils.clip_grad_norm_(trained, recipe.train.max_grad_norm or float("inf"))
            if optimizer is not None:
                optimizer.step()
    traffic_bytes = count.received_bytes + count.sent_bytes
    return StepMemory(count.peaks, count.host_peak, paged_bytes, len(layers), traffic_bytes)


def filled_group(lengths: GroupLengths) -> Group:
    """A group of these lengths with all that any objective reads of one; each value is made up."""
    group = Group.of(((1,) * tokens for tokens in lengths), "plan")
    with_reference = replace(group, reference_logps=(0.0,) * len(group.responses))
    return replace(with_reference, margin=1.0, desirable=True, mismatched=with_reference.first(1))


def workspace_bytes() -> int:
    """What each cuBLAS handle has from PyTorch's allocator, as parseChosenWorkspaceSize in CublasHandlePool.cpp has it.

    There are two, of the threads that run forward and backward. A card that is not here is taken to be older than Hopper.
    """
    if sizes := re.findall(r":(\d+):(\d+)", os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")):
        return sum(int(kib) * int(times) for kib, times in sizes) * 2**10
    is_hopper = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] >= 9
    return 32 * 2**20 if is_hopper or torch.version.hip else 2 * 4096 * 2**10 + 8 * 16 * 2**10


def _count_model(model: nn.Module, count: LiveBytes) -> None:
    nf4 = {
        f"{name}.weight" if hasattr(module, "in_features") else f"{name.rpartition('.')[0]}.original"
        for name, module in model.named_modules()
        if hasattr(module, "nf4_constants")
    }
    for name, parameter in model.named_parameters():
        dtype = "nf4" if name in nf4 else str(parameter.dtype).removeprefix("torch.")
        kind = "trained weights" if parameter.requires_grad else "base weights"
        if "lora_" in name or "modules_to_save" in name:
            count.add([parameter], "adapters")
        else:
            count.add([parameter], f"{kind}, {dtype}")
    count.add(model.buffers(), "buffers")
    for module in model.modules():
        count.add(getattr(module, "nf4_constants", ()), "quantization constants")


def _follow(layers: Sequence[nn.Module], num_checkpointed: int, count: LiveBytes) -> None:
    """Name the stretches of forward and backward as they go from layer to layer."""
    for index, layer in enumerate(layers):
        place = layer_place(index, num_checkpointed, len(layers))

        def begin(layer: nn.Module, args: Any, place: str = place) -> None:
            count.stretch = f"forward of {place}"

        def end(layer: nn.Module, args: Any, output: Any, place: str = place) -> None:
            hidden = output[0] if isinstance(output, tuple) else output

            def begin_backward(grad: torch.Tensor) -> None:
                count.stretch = f"backward of {place}"

            if isinstance(hidden, torch.Tensor) and hidden.requires_grad:  # nothing may train before it
                hidden.register_hook(begin_backward)
            count.stretch = HEAD

        # Before FSDP2's own, which gather and free the layer's weights.
        layer.register_forward_pre_hook(begin, prepend=True)
        layer.register_forward_hook(end, prepend=True)


def layer_place(index: int, num_checkpointed: int, num_layers: int) -> str:
    """Layers of a kind need the same; which of them is at its peak is decided by what else is there, at either end."""
    kind, start, stop = (
        ("recomputed", 0, num_checkpointed)
        if index < num_checkpointed
        else ("kept", num_checkpointed, num_layers)
    )
    if index == stop - 1:
        return f"the last {kind} layer"
    return f"the first {kind} layer" if index == start else f"a {kind} layer between"


def _count_optimizer(
    trained: Sequence[nn.Parameter],
    faster: Sequence[nn.Parameter],
    recipe: Recipe,
    on_cuda: bool,
    count: LiveBytes,
) -> tuple[torch.optim.Optimizer | None, int]:
    """States as the first step leaves them: the optimizer, None where its own code takes no fake tensors, and paged bytes."""
    name = recipe.train.optimizer
    if name.startswith("adamw_torch"):
        optimizer = make_optimizer(trained, recipe.train, faster)
        if on_cuda and name == "adamw_torch":
            for group in optimizer.param_groups:
                group["foreach"] = True  # its default there
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        for state in optimizer.state.values():
            count.add([tensor for tensor in state.values() if tensor.dim()], "optimizer")
        return optimizer, 0

    paged_bytes = 0
    for parameter in trained:
        small = parameter.numel() < 4096  # bitsandbytes keeps those in 32 bits
        bits = 32 if small or name.endswith("32bit") else 8
        num_bytes = 2 * parameter.numel() * bits // 8
        if on_cuda and name.startswith("paged") and parameter.numel() >= 1e5:
            paged_bytes += num_bytes
        else:
            _hold(count, parameter, num_bytes)
        if bits == 8:
            _hold(
                count, parameter, 2 * 4 * -(-parameter.numel() // 256)
            )  # a float32 absmax a block, of either
    return None, paged_bytes


def _hold(count: LiveBytes, parameter: nn.Parameter, num_bytes: int) -> None:
    state = torch.empty(num_bytes, dtype=torch.uint8)
    count.add([state], "optimizer")
    parameter.__dict__.setdefault("planned_states", []).append(state)
