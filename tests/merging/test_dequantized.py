"""The dequantized base is bit for bit what the loaded 4-bit layers multiply by, and only theirs."""

import pytest
import torch
from helpers.architectures import SHARED, SMALL, build
from helpers.lora_folders import save_base
from torch.nn.utils import parametrize
from transformers import AutoConfig

from qorpo.merging import shards
from qorpo.merging.dequantize import dequantized, dequantized_part
from qorpo.merging.outline import _stacks
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
    } | {
        f"{name}.{parameter}": getattr(module, parameter)
        for name, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for parameter in module.parametrizations
    }


def check(base, monkeypatch, block_elements):
    monkeypatch.setattr(shards, "BLOCK_ELEMENTS", block_elements)
    layers = layers_of(load_model(str(base)))
    skeleton = Skeleton.of(AutoConfig.from_pretrained(base))
    stored = read_checkpoint(base)
    places = skeleton.places(stored)
    quantized = skeleton.quantized()
    stacks = _stacks(stored, places, quantized)
    assert set(quantized) == set(layers)
    assert len(layers) > 0
    for name, place in places.items():
        if place.parameter in quantized:
            transposed = quantized[place.parameter]
            if place.parameter in stacks:
                values = whole(dequantized_part(stored[name], stacks[place.parameter]))
                expert = layers[place.parameter][place.expert]
                assert torch.equal(values, expert.chunk(place.parts)[place.part].float()), name
                continue
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


@pytest.mark.parametrize("block_elements", [1, 1 << 22])
@pytest.mark.parametrize(
    ("model_type", "experts"),
    [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts"), ("gpt_oss", "num_local_experts")],
)
def test_experts_as_the_loaded_stacks(model_type, experts, block_elements, tmp_path, monkeypatch):
    """The checkpoint keeps each expert's matrices apart (gpt_oss: stacked); loaded, their scales are one parameter's."""
    sizes = {"num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 8, experts: 4}
    check(save_base(build(model_type, SMALL | sizes), tmp_path, torch.bfloat16), monkeypatch, block_elements)
