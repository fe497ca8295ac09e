"""Offloaded inputs of layers: they leave, they come back, and nothing else changes."""

import copy
import gc
import weakref

import pytest
import torch
from helpers.architectures import SHARED, build

from qorpo.data.groups import Group
from qorpo.data.pack import pack_groups
from qorpo.model import offload as offload_module
from qorpo.model.checkpointing import checkpoint_layers
from qorpo.model.parts import decoder_layers
from qorpo.model.scoring import Scorer

PAIRS = [
    Group((5, 6, 7), ((8, 9), (10, 11, 12, 13)), "a:1"),
    Group((3,), ((4, 5, 6), (7, 8)), "a:2"),
]


def loss_and_gradients(model):
    scorer = Scorer(model, "sdpa", chunk_tokens=4)
    model.zero_grad()
    with scorer.packed_attention():
        logps = scorer(pack_groups(PAIRS))
        (logps.square() + logps).sum().backward()
    return [
        logps.detach(),
        *(parameter.grad for parameter in model.parameters() if parameter.grad is not None),
    ]


@pytest.mark.parametrize("name", ["llama", "qwen2-mixed-windows", "opt", "gpt2", "gemma3"])
@pytest.mark.parametrize("num_layers", [None, 2])
def test_loss_and_gradients_are_the_same_to_the_last_bit(name, num_layers):
    assert name in SHARED
    plain, offloaded = build(name), build(name)
    assert checkpoint_layers(plain, num_layers) == checkpoint_layers(offloaded, num_layers, offload=True)
    for ours, theirs in zip(loss_and_gradients(offloaded), loss_and_gradients(plain), strict=True):
        assert torch.equal(ours, theirs)


def watched_inputs(model, monkeypatch):
    """Weak references to the storages of the layers' inputs, and those of their copies in host memory."""
    inputs, copies = [], []
    for layer in decoder_layers(model):
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0].untyped_storage())))
    real = offload_module.host_room

    def noted(tensor):
        room = real(tensor)
        copies.append(weakref.ref(room.untyped_storage()))
        return room

    monkeypatch.setattr(offload_module, "host_room", noted)
    return inputs, copies


@pytest.mark.parametrize("offload", [False, True])
def test_the_inputs_leave_after_forward_and_the_copies_after_backward(monkeypatch, offload):
    model = build("llama")
    checkpoint_layers(model, offload=offload)
    inputs, copies = watched_inputs(model, monkeypatch)
    scorer = Scorer(model, "sdpa")
    with scorer.packed_attention():
        loss = scorer(pack_groups(PAIRS)).sum()
        gc.collect()
        there = [reference() is not None for reference in inputs]
        assert there == [not offload] * 3
        assert [reference() is not None for reference in copies] == [True] * (3 * offload)
        loss.backward()
    del loss
    gc.collect()
    assert [reference() for reference in [*inputs, *copies]] == [None] * (3 + 3 * offload)


def test_masks_and_positions_stay():
    model = build("llama")
    checkpoint_layers(model, offload=True)
    scorer = Scorer(model, "dense")
    before = loss_and_gradients(copy.deepcopy(build("llama")))
    with scorer.packed_attention():
        logps = scorer(pack_groups(PAIRS))
    torch.testing.assert_close(logps.detach(), before[0], rtol=0, atol=1e-10)


def test_scoring_alone_moves_nothing(monkeypatch):
    monkeypatch.setattr(offload_module, "host_room", None)
    model = build("llama")
    checkpoint_layers(model, offload=True)
    with torch.no_grad():
        Scorer(model, "dense")(pack_groups(PAIRS))
