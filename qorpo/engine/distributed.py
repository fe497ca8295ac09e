"""Several processes as one trainer: which rank scores which groups, what is summed, and the sharding by FSDP2.

Every rank knows all groups of a step and parts them in the same way, so nothing is negotiated: each takes its own
share, and all take the same number of micro-batches, since a sharded forward needs every rank.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    broadcast_object_list,
)
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from qorpo.data.groups import row_tokens
from qorpo.data.pack import split_by_budget
from qorpo.errors import QorpoError, RunError
from qorpo.model.parts import decoder_layers
from qorpo.recipe import Recipe, load_recipe

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the others; alone by default.

    `keep_gradients` is a context in which a backward's gradients stay on their rank (DDP's no_sync), for all but the
    last micro-batch; sharded gradients are reduced at once, for they would be held whole.
    """

    index: int = 0
    count: int = 1
    device: torch.device | None = None
    keep_gradients: Any = field(default=contextlib.nullcontext)

    def micro_batches(
        self, groups: Sequence[T], microbatch_tokens: int, tokens_of: Callable[[Any], int] = row_tokens
    ) -> list[list[T]]:
        """This rank's rows of a step's groups; empty ones at the end where another rank has more.

        What stands for groups, such as their places, is shared in the same way by `tokens_of`.
        """
        if self.count == 1:
            return split_by_budget(groups, microbatch_tokens, tokens_of)
        rows = [
            split_by_budget(share, microbatch_tokens, tokens_of)
            for share in shares(groups, self.count, tokens_of)
        ]
        mine = rows[self.index]
        return mine + [[]] * (max(map(len, rows)) - len(mine))

    def summed(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each value's sum over the ranks; the same names must be everywhere."""
        if self.count == 1:
            return values
        stacked = torch.stack([values[name].double() for name in sorted(values)])
        dist.all_reduce(stacked)
        return dict(zip(sorted(values), stacked.unbind(), strict=True))

    def all_are(self, done: bool) -> bool:
        """Whether it is so on every rank."""
        if self.count == 1:
            return done
        found = torch.tensor(float(done), device=self.device)
        dist.all_reduce(found)
        return found.item() == self.count


def shares(groups: Sequence[T], count: int, tokens_of: Callable[[Any], int] = row_tokens) -> list[list[T]]:
    """Groups parted into `count` shares of about as many tokens: the longest first, each to the lightest share."""
    parts: list[list[T]] = [[] for _ in range(count)]
    tokens = [0] * count
    for group in sorted(groups, key=tokens_of, reverse=True):
        lightest = tokens.index(min(tokens))
        parts[lightest].append(group)
        tokens[lightest] += tokens_of(group)
    return parts


def runs_on(recipe: Recipe, model: Any) -> str:
    """The type of the device that trains a model: one that is to be sharded waits in host memory, wherever it will be."""
    sharding = recipe.memory.sharding
    sharded = recipe.tuning == "full" if sharding == "auto" else sharding != "none"
    return "cuda" if sharded and torch.cuda.is_available() else model.device.type


def make_accelerator(
    recipe: Recipe, model: Any, compute_dtype: torch.dtype | None, **options: Any
) -> Accelerator:
    """accelerate's Accelerator: plain, data-parallel, or with FSDP2 around each decoder layer and the whole.

    Args:
        recipe: resolved; by memory.sharding nothing is sharded, or all over all ranks (full), or all within each node
            and replicated over nodes (hybrid).
        compute_dtype: what sharded parameters are cast to in forward, with gradients reduced in float32; None: as is.

    Raises:
        RunError: where several ranks were to shard and would not.
    """
    ignore_launchers_settings()
    sharding = recipe.memory.sharding
    options["cpu"] = runs_on(recipe, model) == "cpu"
    state = PartialState(cpu=options["cpu"])
    if sharding == "none" or state.num_processes == 1:
        return Accelerator(**options)
    options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        mixed_precision_policy=precision(compute_dtype),
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=sorted({type(layer).__name__ for layer in decoder_layers(model)}),
        cpu_ram_efficient_loading=True,  # the main rank's weights go out a tensor at a time
        state_dict_type="SHARDED_STATE_DICT",
    )
    if sharding == "hybrid":
        per_node = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes))
        options["parallelism_config"] = ParallelismConfig(
            dp_replicate_size=state.num_processes // per_node, dp_shard_size=per_node
        )
    accelerator = Accelerator(**options)
    if accelerator.distributed_type is not DistributedType.FSDP:
        raise RunError(
            f"memory.sharding: {sharding} would be left out without a word by accelerate on {accelerator.device.type} "
            "(FSDP2 needs CUDA): run one process, or on GPUs"
        )
    return accelerator


def precision(compute_dtype: torch.dtype | None) -> MixedPrecisionPolicy:
    """What FSDP2 casts: parameters for forward and backward, and their gradients back to float32 to be summed."""
    if compute_dtype is None:
        return MixedPrecisionPolicy()
    # Inputs are of that type already; casting them would hand each layer a copy of the packed layout.
    return MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def ranks_of(accelerator: Accelerator, scorer: Any) -> Ranks:
    def keep_gradients() -> AbstractContextManager[None]:
        return accelerator.no_sync(scorer)

    is_ddp = accelerator.num_processes > 1 and accelerator.distributed_type is not DistributedType.FSDP
    return Ranks(
        accelerator.process_index,
        accelerator.num_processes,
        accelerator.device,
        keep_gradients if is_ddp else contextlib.nullcontext,
    )


def ignore_launchers_settings() -> None:
    """The recipe says how to train: what `accelerate launch` would have, it hands down in the environment, where it
    wins over arguments (the loss would be divided by its accumulation steps, for one).
    """
    found = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if (
            name.startswith(("ACCELERATE_USE_", "ACCELERATE_DYNAMO_", "FSDP_"))
            and name != "ACCELERATE_USE_CPU"
        )
        or name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS")
    }
    meant = sorted(name for name, value in found.items() if value.lower() not in ("false", "no", "1"))
    if meant:
        logger.warning(
            "left out, since the recipe says how to train: %s of the environment", ", ".join(meant)
        )


def this_process() -> PartialState:
    """accelerate's account of this process among those that torchrun started.

    Raises:
        RunError: where they can't find each other, or it takes one of several for one alone: all of them would write
            the same run.
    """
    ignore_launchers_settings()
    started, here = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    if torch.cuda.is_available() and here > torch.cuda.device_count():
        raise RunError(
            f"{here} processes were started on this machine, which has {torch.cuda.device_count()} GPUs; "
            "start one for each (--nproc-per-node gpu)"
        )
    try:
        state = PartialState(
            cpu=not torch.cuda.is_available()
        )  # without the word it sees no others on the CPU
    except RuntimeError as error:
        raise RunError(_why_not_joined(str(error).splitlines()[0], started)) from error
    if state.num_processes != started:
        raise RunError(
            f"{started} processes were started (WORLD_SIZE), but {state.num_processes} found each other; start qorpo by "
            "torchrun or accelerate launch, or without WORLD_SIZE in the environment"
        )
    return state


def _why_not_joined(reason: str, started: int) -> str:
    where = f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', '29500')}"
    if "EADDRINUSE" in reason:
        remedy = "another run has this port; give another (MASTER_PORT, or torchrun's --rdzv-endpoint)"
    elif "NCCL" in reason and not dist.is_nccl_available():
        remedy = "this PyTorch has no NCCL, by which GPUs talk; install its CUDA build for Linux"
    else:
        remedy = "start all of them with the same address, port and WORLD_SIZE"
    return f"{started} processes could not join at {where}: {remedy} ({reason})"


@contextmanager
def main_first() -> Iterator[None]:
    """On each node one process first, then the others, which find what it left (tokens in the cache)."""
    with PartialState().local_main_process_first():
        yield


def as_on_main(recipe: Recipe) -> Recipe:
    """The main rank's recipe."""
    return load_recipe(from_main(recipe.to_dict))


def from_main(make: Callable[[], T]) -> T:
    """What the main rank makes, on all of them."""
    found: list[Any] = [make() if PartialState().is_main_process else None]
    broadcast_object_list(found)
    return found[0]


def all_agree(check: Callable[[], object]) -> None:
    """Run a check on every rank; where one raises a QorpoError all do, so that none waits for another in vain."""
    problem: QorpoError | None = None
    try:
        check()
    except QorpoError as error:
        problem = error
    if dist.is_initialized():
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, problem)
        problem = next((each for each in found if each is not None), None)
    if problem is not None:
        raise problem


def reshard(scorer: Any) -> None:
    """Give back what a forward without a backward has left gathered: the output head, for one."""
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gathered(tensor: Any) -> Any:
    """A sharded tensor gathered (by all ranks together) into host memory; anything else as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: torch.Tensor, like: torch.Tensor | None) -> torch.Tensor:
    """A whole tensor that every rank has, in shards where `like` is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
