"""The dequantized base is bit for bit what the loaded 4-bit layers multiply by, and only theirs."""

import pytest
import torch
from helpers.architectures import SHARED, SMALL, build
from helpers.lora_folders import save_base
from transformers import AutoConfig

from qorpo.merging import shards
from qorpo.merging.dequantize import dequantized
from qorpo.merging.shards import read_checkpoint
from qorpo.merging.skeleton import Skeleton
from qorpo.model.load import load_model


def whole(blocks):
    return torch.cat([values for _, values in blocks()])


def layers_of(model):
    """What each layer in 4 bits multiplies by, under its weight's name."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    return {
        f"{name}.weight": dequantize_4bit(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, Linear4bit)
    }


def check(base, monkeypatch, block_elements):
    monkeypatch.setattr(shards, "BLOCK_ELEMENTS", block_elements)
    layers = layers_of(load_model(str(base)))
    skeleton = Skeleton.of(AutoConfig.from_pretrained(base))
    stored = read_checkpoint(base)
    places = skeleton.places(stored)
    quantized = skeleton.quantized()
    assert set(quantized) == set(layers)
    assert len(layers) > 0
    for name, place in places.items():
        if place.parameter in quantized:
            transposed = quantized[place.parameter]
            values = whole(dequantized(stored[name], transposed=transposed))
            expected = layers[place.parameter].float()
            assert torch.equal(values, expected.T if transposed else expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", SHARED)
def test_as_the_loaded_layers(name, dtype, tmp_path, monkeypatch):
    check(save_base(build(name), tmp_path, dtype), monkeypatch, 1 << 22)


@pytest.mark.parametrize("sizes", [
    {"hidden_size": 36, "intermediate_size": 50, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 10},
    {"hidden_size": 96, "intermediate_size": 160, "num_attention_heads": 4, "head_dim": 40},
    {"hidden_size": 200, "intermediate_size": 330, "num_attention_heads": 4, "head_dim": 64},
])  # fmt: skip
def test_rows_that_are_no_whole_blocks(sizes, tmp_path, monkeypatch):
    """Several reads a tensor, rows that are no multiple of 64 weights."""
    base = save_base(build("llama", SMALL | sizes | {"num_hidden_layers": 1}), tmp_path, torch.bfloat16)
    check(base, monkeypatch, 1)


def test_conv1d_in_several_reads(tmp_path, monkeypatch):
    check(save_base(build("gpt2"), tmp_path, torch.bfloat16), monkeypatch, 1)


def test_experts_are_not_quantized(tmp_path, monkeypatch):
    config = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
    check(save_base(build("mixtral", config), tmp_path, torch.bfloat16), monkeypatch, 1 << 22)
