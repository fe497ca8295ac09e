"""Weights as a model loaded in NF4 sees them: quantized and dequantized by bitsandbytes, a few rows at a time.

Blocks of 64 weights are quantized alone, so rows can be taken a few at a time. Only their scales, one a block, are
quantized together, over the whole tensor.
"""

from collections.abc import Iterator

import torch

from qorpo.merging.shards import Block, Blocks, Stored

BLOCK_SIZE = 64  # of bitsandbytes' Params4bit
NESTED_BLOCK_SIZE = 256  # of its double quantization


def dequantized(stored: Stored, *, transposed: bool = False) -> Blocks:
    """A matrix as float32 blocks of the values that its NF4 layer multiplies by.

    They are exact in bfloat16, in which `load_model` loads a base before it quantizes it.

    Args:
        transposed: the layer quantizes the matrix's transpose, as it does for GPT-2's Conv1D.
    """

    def source() -> Iterator[Block]:
        if not transposed:
            yield from (Block(start, values.to(torch.bfloat16)) for start, values in stored.blocks())
            return
        whole = torch.cat([values.to(torch.bfloat16) for _, values in stored.blocks()])
        yield Block(0, whole.T.contiguous())

    def blocks() -> Iterator[Block]:
        from bitsandbytes.functional import (
            QuantState,
            dequantize_4bit,
            dequantize_blockwise,
            quantize_4bit,
            quantize_blockwise,
        )

        codes, scales = [], []
        for start, values in source():
            packed, state = quantize_4bit(values, blocksize=BLOCK_SIZE, quant_type="nf4")
            codes.append((start, values.shape, packed))
            scales.append(state.absmax)
        absmax = torch.cat(scales)
        offset = absmax.mean()
        absmax = dequantize_blockwise(*quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE))
        absmax += offset

        done = 0
        for start, shape, packed in codes:
            count = -(-shape.numel() // BLOCK_SIZE)
            state = QuantState(
                absmax=absmax[done : done + count], shape=shape, dtype=torch.bfloat16,
                blocksize=BLOCK_SIZE, quant_type="nf4",
            )  # fmt: skip
            done += count
            values = dequantize_4bit(packed, state)
            yield Block(start, (values.T if transposed else values).float().contiguous())

    return blocks
