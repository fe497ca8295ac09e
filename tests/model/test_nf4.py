"""NF4 weights are the codebook's values times their block's scale, whatever the length of a row."""

import pytest
import torch

bitsandbytes = pytest.importorskip("bitsandbytes")

from qorpo.model.nf4 import fix_dequantization  # noqa: E402


def by_the_book(packed, state):
    """Two values a byte, the first in the high half; each block of 64 has a scale of its own."""
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten()[
        : state.shape.numel()
    ]
    scales = state.absmax.repeat_interleave(state.blocksize)[: len(codes)]
    return (state.code[codes.long()] * scales).view(state.shape)


@pytest.mark.parametrize("columns", [16, 32, 36, 48, 50, 64, 96, 100, 160, 320, 864])
@pytest.mark.parametrize("rows", [3, 64])
def test_rows_of_any_length(rows, columns):
    fix_dequantization()
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    packed, state = bitsandbytes.functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    values = bitsandbytes.functional.dequantize_4bit(packed, state)
    assert torch.allclose(values, by_the_book(packed, state), rtol=1e-6, atol=0)
    assert (values - weight).norm() < 0.12 * weight.norm()
    assert torch.equal(bitsandbytes.functional.dequantize_4bit(packed.t(), state), values.t())


def test_a_layer_trains_on_the_values_meant():
    fix_dequantization()
    torch.manual_seed(0)
    layer = bitsandbytes.nn.Linear4bit(
        96, 40, bias=False, quant_type="nf4", compute_dtype=torch.float32, compress_statistics=True
    )
    layer.weight = bitsandbytes.nn.Params4bit(torch.randn(40, 96), requires_grad=False, quant_type="nf4").to(
        "cpu"
    )
    layer.support_avx512bf16_for_cpu = False
    hidden = torch.randn(2, 7, 96, requires_grad=True)
    out = layer(hidden)
    state = layer.weight.quant_state
    scales = bitsandbytes.functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    state.absmax, nested = scales, state.absmax
    weight = by_the_book(layer.weight.data, state)
    state.absmax = nested
    assert torch.allclose(out, hidden @ weight.T, atol=1e-4)
    out.sum().backward()
    assert torch.allclose(hidden.grad, weight.sum(0).expand_as(hidden), atol=1e-4)
