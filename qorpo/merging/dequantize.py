"""Weights as a model loaded in NF4 sees them: quantized and dequantized by bitsandbytes, a few rows at a time.

Blocks of 64 weights are quantized alone, so rows can be taken a few at a time. Only their scales, one a block, are
quantized together, over the whole tensor.
"""

from collections.abc import Iterator

import torch

from qorpo.merging.shards import Block, Blocks, Stored
from qorpo.model.nf4 import fix_dequantization

BLOCK_SIZE = 64  # of bitsandbytes' Params4bit
NESTED_BLOCK_SIZE = 256  # of its double quantization


def dequantized(stored: Stored, *, transposed: bool = False) -> Blocks:
    """A matrix as float32 blocks of the values that its NF4 layer multiplies by.

    They are exact in bfloat16, in which `load_model` loads a base before it quantizes it.

    Args:
        transposed: the layer quantizes the matrix's transpose, as it does for GPT-2's Conv1D.
    """

    def low_precision() -> Iterator[Block]:
        return (Block(start, values.to(torch.bfloat16)) for start, values in stored.blocks())

    def blocks() -> Iterator[Block]:
        if not transposed:
            for first, values in _round_trip(low_precision()):
                for start in range(0, len(values), stored.rows_together):
                    yield Block(first + start, values[start : start + stored.rows_together].float())
            return
        whole = torch.cat([values for _, values in low_precision()])
        step = stored.rows_together
        columns = (
            Block(start, whole[:, start : start + step].T.contiguous())
            for start in range(0, whole.shape[1], step)
        )
        for start, values in _round_trip(columns):
            whole[:, start : start + len(values)] = values.T
        for start in range(0, len(whole), step):
            yield Block(start, whole[start : start + step].float())

    return blocks


def _round_trip(blocks: Iterator[Block]) -> Iterator[Block]:
    """A matrix quantized and dequantized; all of it is read before the first block comes back."""
    fix_dequantization()
    from bitsandbytes.functional import (
        QuantState,
        dequantize_4bit,
        dequantize_blockwise,
        quantize_4bit,
        quantize_blockwise,
    )

    codes, scales = [], []
    for start, values in blocks:
        packed, state = quantize_4bit(values, blocksize=BLOCK_SIZE, quant_type="nf4")
        codes.append((start, values.shape, packed))
        scales.append(state.absmax)
    absmax = torch.cat(scales)
    offset = absmax.mean()
    absmax = dequantize_blockwise(*quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)) + offset

    done = 0
    for start, shape, packed in codes:
        count = -(-shape.numel() // BLOCK_SIZE)
        state = QuantState(
            absmax=absmax[done : done + count], shape=shape, dtype=torch.bfloat16,
            blocksize=BLOCK_SIZE, quant_type="nf4",
        )  # fmt: skip
        done += count
        yield Block(start, dequantize_4bit(packed, state))
