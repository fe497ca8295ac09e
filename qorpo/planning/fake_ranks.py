"""Ranks that are not there: FSDP2 as one of them runs it, with collectives that make their buffers and fill nothing."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from qorpo.engine.distributed import precision
from qorpo.model.parts import decoder_layers
from qorpo.model.scoring import Scorer


@contextmanager
def fake_ranks(count: int) -> Iterator[DeviceMesh]:
    """Be rank 0 of `count`; or, where this process is one of `count` real ones, the same rank beside as many fake ones.

    There all ranks must come here together for the first time.
    """
    if dist.is_initialized():
        assert count == dist.get_world_size(), "as many fake ranks as real ones"
        yield _fake_mesh()
        return
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield DeviceMesh("cpu", torch.arange(count))
    finally:
        dist.destroy_process_group()


@cache
def _fake_mesh() -> DeviceMesh:
    return DeviceMesh.from_group(dist.new_group(backend="fake"), "cpu")


def shard(scorer: Scorer, mesh: DeviceMesh, compute_dtype: torch.dtype | None) -> None:
    """What accelerate makes of a scorer by the plugin of `make_accelerator`."""
    for layer in decoder_layers(scorer.model):
        fully_shard(layer, mesh=mesh, mp_policy=precision(compute_dtype), reshard_after_forward=True)
    fully_shard(scorer, mesh=mesh, mp_policy=precision(compute_dtype))
