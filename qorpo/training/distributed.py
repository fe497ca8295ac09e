"""Several processes as one trainer: which rank scores which pairs, what is summed, and the sharding by FSDP2.

Every rank knows all pairs of a step and parts them in the same way, so nothing is negotiated: each takes its own
share, and all take the same number of micro-batches, since a sharded forward needs every rank.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    broadcast_object_list,
)
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from qorpo.data.pack import row_tokens, split_by_budget
from qorpo.data.tokenize import TokenizedPair
from qorpo.errors import RunError
from qorpo.model.recompute import decoder_layers
from qorpo.recipe import Recipe, load_recipe


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among the others; alone by default.

    `keep_gradients` is a context in which a backward's gradients stay on their rank (DDP's no_sync), for all but the
    last micro-batch; sharded gradients are reduced at once, for they would be held whole.
    """

    index: int = 0
    count: int = 1
    keep_gradients: Any = field(default=contextlib.nullcontext)

    def micro_batches(
        self, pairs: Sequence[TokenizedPair], microbatch_tokens: int
    ) -> list[list[TokenizedPair]]:
        """This rank's rows of a step's pairs; empty ones at the end where another rank has more."""
        if self.count == 1:
            return split_by_budget(pairs, microbatch_tokens)
        rows = [split_by_budget(share, microbatch_tokens) for share in shares(pairs, self.count)]
        mine = rows[self.index]
        return mine + [[]] * (max(map(len, rows)) - len(mine))

    def summed(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Each value's sum over the ranks; the same names must be everywhere."""
        if self.count == 1:
            return values
        stacked = torch.stack([values[name].double() for name in sorted(values)])
        dist.all_reduce(stacked)
        return dict(zip(sorted(values), stacked.unbind(), strict=True))


def shares(pairs: Sequence[TokenizedPair], count: int) -> list[list[TokenizedPair]]:
    """Pairs parted into `count` shares of about as many tokens: the longest first, each to the lightest share."""
    parts: list[list[TokenizedPair]] = [[] for _ in range(count)]
    tokens = [0] * count
    for pair in sorted(pairs, key=row_tokens, reverse=True):
        lightest = tokens.index(min(tokens))
        parts[lightest].append(pair)
        tokens[lightest] += row_tokens(pair)
    return parts


def runs_on(recipe: Recipe, model: Any) -> str:
    """The type of the device that trains a model: one that is to be sharded waits in host memory, wherever it will be."""
    sharding = recipe.memory.sharding
    sharded = recipe.tuning == "full" if sharding == "auto" else sharding != "none"
    return "cuda" if sharded and torch.cuda.is_available() else model.device.type


def make_accelerator(
    sharding: str, model: Any, compute_dtype: torch.dtype | None, **options: Any
) -> Accelerator:
    """accelerate's Accelerator: plain, data-parallel, or with FSDP2 around each decoder layer and the whole.

    Args:
        sharding: none; full, over all ranks; or hybrid, within each node, and replicated over nodes.
        compute_dtype: what sharded parameters are cast to in forward, with gradients reduced in float32; None: as is.

    Raises:
        RunError: where several ranks were to shard and would not.
    """
    # A model that is to be sharded waits in host memory, wherever it will be.
    options["cpu"] = model.device.type == "cpu" and (sharding == "none" or not torch.cuda.is_available())
    state = PartialState(cpu=options["cpu"])
    if sharding == "none" or state.num_processes == 1:
        return Accelerator(**options)
    policy = MixedPrecisionPolicy()
    if compute_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=compute_dtype, reduce_dtype=torch.float32)
    options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        reshard_after_forward=True,
        mixed_precision_policy=policy,
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


def ranks_of(accelerator: Accelerator, scorer: Any) -> Ranks:
    def keep_gradients() -> AbstractContextManager[None]:
        return accelerator.no_sync(scorer)

    is_ddp = accelerator.num_processes > 1 and accelerator.distributed_type is not DistributedType.FSDP
    return Ranks(
        accelerator.process_index,
        accelerator.num_processes,
        keep_gradients if is_ddp else contextlib.nullcontext,
    )


def this_process() -> PartialState:
    """accelerate's account of this process among those that torchrun started.

    Raises:
        RunError: where it takes one of several for one alone: all of them would write the same run.
    """
    state = PartialState(cpu=not torch.cuda.is_available())  # without the word it sees no others on the CPU
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if state.num_processes != started:
        raise RunError(
            f"{started} processes were started (WORLD_SIZE), but {state.num_processes} found each other; start qorpo by "
            "torchrun or accelerate launch, or without WORLD_SIZE in the environment"
        )
    return state


@contextmanager
def main_first() -> Iterator[None]:
    """On each node one process first, then the others, which find what it left (tokens in the cache)."""
    with PartialState().local_main_process_first():
        yield


def as_on_main(recipe: Recipe) -> Recipe:
    """The main rank's recipe."""
    found = [recipe.to_dict()]
    broadcast_object_list(found)
    return load_recipe(found[0])


def whole(tensor: Any) -> Any:
    """A sharded tensor gathered (by all ranks together) into host memory; anything else as it is."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor that every rank has, in shards where `like` is."""
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)
