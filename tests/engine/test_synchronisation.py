"""No step asks the device for a value: the host would wait for all that it queued, at every micro-batch."""

import traceback

import pytest
import torch
from helpers import architectures
from helpers.tiny import make_base
from torch.utils._python_dispatch import TorchDispatchMode

from qorpo.data.groups import Group
from qorpo.engine.step import run_step
from qorpo.model.adapters import attach_lora
from qorpo.model.checkpointing import checkpoint_layers
from qorpo.model.load import load_model
from qorpo.model.scoring import Scorer
from qorpo.objectives.orpo import Orpo

CPU = torch.device("cpu")
aten = torch.ops.aten
# Their results, or the shapes of their results, are known to the host only once the device has computed them.
WAITING = {
    aten._local_scalar_dense, aten.item, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select, aten._unique2,
    aten.unique_consecutive, aten.unique_dim, aten.repeat_interleave,
}  # fmt: skip


class Waits(TorchDispatchMode):
    """Notes every operation for which the host would wait for a device, with the lines that asked."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        by_mask = func.overloadpacket in (aten.index, aten.index_put, aten.index_put_) and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if by_mask or (func.overloadpacket in WAITING and (kwargs or {}).get("output_size") is None):
            self.found.append(f"{func}: {''.join(traceback.format_stack(limit=6)[:-1])}")
        return func(*args, **(kwargs or {}))


def pairs():
    generator = torch.Generator().manual_seed(1)

    def tokens(count):
        return tuple(torch.randint(97, (count,), generator=generator).tolist())

    return [Group.of(map(tokens, each), "test") for each in [(11, 9, 4), (1, 1, 1), (7, 3, 12), (2, 8, 5)]]


def waits_of_a_step(model, mode, **objective):
    scorer = Scorer(model, mode, chunk_tokens=7)
    with scorer.packed_attention(), Waits() as waits:
        means = run_step(
            scorer.train(), pairs(), Orpo(**objective), microbatch_tokens=40, device=CPU,
            backward=torch.Tensor.backward,
        )  # fmt: skip
    assert torch.isfinite(means["loss"])
    return waits.found


def test_what_waits_is_noticed():
    with Waits() as waits:
        numbers = torch.arange(4)
        numbers[numbers > 1].sum().item()
        bool((numbers == 2).any())
        numbers.repeat_interleave(numbers)
    assert len(waits.found) >= 4


@pytest.mark.parametrize("mode", ["sdpa", "dense"])
@pytest.mark.parametrize("name", architectures.SHARED)
def test_no_step_of_any_architecture_waits(name, mode):
    model = architectures.build(name)
    checkpoint_layers(model)
    assert waits_of_a_step(model, mode) == []


@pytest.mark.parametrize("nll_tokens", ["response", "all"])
def test_no_step_on_nf4_with_adapters_waits(tmp_path, nll_tokens):
    model = attach_lora(load_model(str(make_base(tmp_path / "base"))), dropout=0.1)
    checkpoint_layers(model, 1)
    assert waits_of_a_step(model, "sdpa", nll_tokens=nll_tokens, nll_average="token") == []
