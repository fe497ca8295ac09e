"""Every way of attending gives the same log-probs: in bfloat16 within the plain way's own error, kernels by stand-ins.

flash-attn and PyTorch's varlen_attn need a GPU. What they are documented to compute is written out here in plain
PyTorch and put in their place, so that what they are handed (layout, window, scale, grouped heads, soft cap) is held to
the models' own forwards; whether the kernels compute what they document is tests/test_gpu.py's.
"""

import sys
import types

import pytest
import torch
from helpers.architectures import SHARED, build
from torch.nn.attention import varlen

from qorpo.data.groups import Group
from qorpo.data.pack import pack_groups
from qorpo.errors import ModelError
from qorpo.model import attention
from qorpo.model.attention import PackedLayout
from qorpo.model.scoring import Scorer
from qorpo.model.selfcheck import varlen_has_all
from qorpo.model.sequences import own_logps

LENGTHS = [(11, 9, 4), (1, 1, 1), (6, 7), (7, 3, 12, 1, 6, 2), (2, 8, 5)]  # groups of 1, 2 and 5 responses
BUDGET = 1.5


def packed_row():
    generator = torch.Generator().manual_seed(1)

    def tokens(count):
        return tuple(torch.randint(97, (count,), generator=generator).tolist())

    return pack_groups([Group.of(map(tokens, each), "test") for each in LENGTHS])


def sequences_attended(query, key, value, query_ends, key_ends, scale, window, softcap):
    """(T, heads, D): each sequence's queries over its keys, causal and aligned at the end, at most `window` keys back."""
    outputs = []
    key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
    for (q0, q1), (k0, k1) in zip(query_ends.unfold(0, 2, 1), key_ends.unfold(0, 2, 1), strict=True):
        scores = torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1]) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        behind = torch.arange(k1 - k0)[-(q1 - q0) :, None] - torch.arange(k1 - k0)
        hidden = (behind < 0) | (behind >= (k1 - k0 if window is None else window))
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, value[k0:k1]))
    return torch.cat(outputs)


def check_layout(query, key, query_ends, key_ends, max_queries, max_keys):
    assert query_ends.dtype == key_ends.dtype == torch.int32
    assert (int(query_ends[-1]), int(key_ends[-1])) == (len(query), len(key))
    assert (query_ends.diff().max(), key_ends.diff().max()) == (max_queries, max_keys)


def flash_attn_varlen_func(
    query, key, value, query_ends, key_ends, max_queries, max_keys,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    assert causal
    assert not dropout_p
    assert window_size[1] == (-1 if window_size[0] == -1 else 0)
    check_layout(query, key, query_ends, key_ends, max_queries, max_keys)
    window = None if window_size[0] == -1 else window_size[0] + 1
    return sequences_attended(query, key, value, query_ends, key_ends, softmax_scale, window, softcap)


def varlen_attn(
    query, key, value, query_ends, key_ends, max_queries, max_keys,
    *, scale=None, window_size=(-1, -1), enable_gqa=False,
):  # fmt: skip
    assert window_size[1] == 0  # causal
    assert enable_gqa or query.shape[1] == key.shape[1]
    check_layout(query, key, query_ends, key_ends, max_queries, max_keys)
    window = None if window_size[0] == -1 else window_size[0] + 1
    return sequences_attended(query, key, value, query_ends, key_ends, scale, window, None)


def varlen_attn_of_old(query, key, value, query_ends, key_ends, max_queries, max_keys, is_causal=False):
    assert is_causal
    assert query.shape[1] == key.shape[1]
    return varlen_attn(
        query, key, value, query_ends, key_ends, max_queries, max_keys,
        scale=query.shape[-1] ** -0.5, window_size=(-1, 0),
    )  # fmt: skip


@pytest.fixture(params=["flash", "varlen", "varlen-of-old"])
def kernel(request, monkeypatch):
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    old = request.param == "varlen-of-old"
    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn_of_old if old else varlen_attn)
    attention._torch_varlen.cache_clear()
    yield request.param.removesuffix("-of-old")
    attention._torch_varlen.cache_clear()


def scored(model, mode, packed):
    scorer = Scorer(model, mode)
    with torch.no_grad(), scorer.packed_attention():
        return scorer(packed)


@pytest.mark.parametrize("name", SHARED)
def test_a_kernel_is_handed_what_the_model_computes(name, kernel, request):
    model, packed = build(name), packed_row()
    old = request.node.callspec.params["kernel"] == "varlen-of-old"
    has_window = any(attention.expected_windows(model.config))
    if kernel == "varlen" and (not varlen_has_all(model.config) or (old and has_window)):
        with pytest.raises(ModelError, match="varlen_attn has n"):
            scored(model, kernel, packed)
        return
    with torch.no_grad():
        own = own_logps(model, packed)
    torch.testing.assert_close(scored(model, kernel, packed), own, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SHARED)
def test_in_bfloat16_every_way_is_as_exact_as_the_plain_one(name):
    packed = packed_row()
    exact = scored(build(name), "separate", packed)
    model = build(name).bfloat16()
    error = {
        mode: (scored(model, mode, packed).double() - exact).norm().item()
        for mode in ("separate", "sdpa", "dense")
    }
    assert error["sdpa"] <= BUDGET * error["separate"]
    assert error["dense"] <= BUDGET * error["separate"]


@pytest.mark.parametrize("recomputed", [False, True])
def test_one_layout_a_row_and_one_gathering_of_keys_and_values_a_layer(kernel, recomputed, monkeypatch):
    from qorpo.model.checkpointing import checkpoint_layers

    model, packed = build("llama"), packed_row()
    if recomputed:
        checkpoint_layers(model)
    layouts, gathered = [], []
    of, gather = PackedLayout.of.__func__, attention._gathered
    monkeypatch.setattr(
        PackedLayout, "of", classmethod(lambda cls, *args: layouts.append(of(cls, *args)) or layouts[-1])
    )
    monkeypatch.setattr(
        attention, "_gathered", lambda layout, *args: gathered.append(id(layout)) or gather(layout, *args)
    )
    scorer = Scorer(model, kernel)
    with scorer.packed_attention():
        scorer(packed).sum().backward()
    assert len(layouts) == 1
    layers = model.config.num_hidden_layers
    assert gathered == [id(layouts[0])] * layers * (2 if recomputed else 1)
