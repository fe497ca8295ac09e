"""Weights as a model loaded in NF4 sees them: quantized and dequantized by bitsandbytes, a few rows at a time.

Blocks of 64 weights are quantized alone, so rows can be taken a few at a time. Only their scales, one a block, are
quantized together, over the whole tensor.
"""

from collections.abc import Iterator, Sequence
from math import prod

import torch

from qorpo.merging.shards import Block, Blocks, Stored
from qorpo.model.nf4 import fix_dequantization

BLOCK_SIZE = 64  # of bitsandbytes' Params4bit
NESTED_BLOCK_SIZE = 256  # of its double quantization


class StackScales:
    """The scales of experts that a checkpoint keeps apart and a loaded model quantizes together.

    Args:
        parts: the parameter's matrices as they lie in it: expert after expert, and of each its parts.
    """

    def __init__(self, parts: Sequence[Stored]):
        self.parts = parts
        self._absmax: torch.Tensor | None = None

    def of(self, part: Stored) -> torch.Tensor:
        """(blocks,) of one matrix."""
        if self._absmax is None:
            found = [_pack(values)[1] for each in self.parts for _, values in _low_precision(each)]
            self._absmax = _double_quantized(torch.cat(found))
        before = sum(prod(each.shape) for each in self.parts[: self.parts.index(part)])
        return self._absmax[before // BLOCK_SIZE : (before + prod(part.shape)) // BLOCK_SIZE]


def dequantized_part(part: Stored, scales: StackScales) -> Blocks:
    """As `dequantized`, of one matrix in a stack."""

    def blocks() -> Iterator[Block]:
        absmax, done = scales.of(part), 0
        for start, values in _low_precision(part):
            packed, _ = _pack(values)
            count = values.numel() // BLOCK_SIZE
            yield Block(start, _unpack(packed, absmax[done : done + count], values.shape).float())
            done += count

    return blocks


def dequantized(stored: Stored, *, transposed: bool = False) -> Blocks:
    """A matrix as float32 blocks of the values that its NF4 layer multiplies by.

    They are exact in bfloat16, in which `load_model` loads a base before it quantizes it.

    Args:
        transposed: the layer quantizes the matrix's transpose, as it does for GPT-2's Conv1D.
    """

    def blocks() -> Iterator[Block]:
        if not transposed:
            for first, values in _round_trip(_low_precision(stored)):
                for start in range(0, len(values), stored.rows_together):
                    yield Block(first + start, values[start : start + stored.rows_together].float())
            return
        whole = torch.cat([values for _, values in _low_precision(stored)])
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


def _low_precision(stored: Stored) -> Iterator[Block]:
    return (Block(start, values.to(torch.bfloat16)) for start, values in stored.blocks())


def _round_trip(blocks: Iterator[Block]) -> Iterator[Block]:
    """A matrix quantized and dequantized; all of it is read before the first block comes back."""
    codes, scales = [], []
    for start, values in blocks:
        packed, absmax = _pack(values)
        codes.append((start, values.shape, packed))
        scales.append(absmax)
    all_absmax = _double_quantized(torch.cat(scales))

    done = 0
    for start, shape, packed in codes:
        count = -(-shape.numel() // BLOCK_SIZE)
        yield Block(start, _unpack(packed, all_absmax[done : done + count], shape))
        done += count


def _pack(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and the scale of each block."""
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(values, blocksize=BLOCK_SIZE, quant_type="nf4")
    return packed, state.absmax


def _double_quantized(absmax: torch.Tensor) -> torch.Tensor:
    """Scales of a whole parameter as they come back from their own 8 bits."""
    from bitsandbytes.functional import dequantize_blockwise, quantize_blockwise

    offset = absmax.mean()
    return dequantize_blockwise(*quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK_SIZE)) + offset


def _unpack(packed: torch.Tensor, absmax: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    fix_dequantization()
    from bitsandbytes.functional import QuantState, dequantize_4bit

    state = QuantState(
        absmax=absmax, shape=shape, dtype=torch.bfloat16, blocksize=BLOCK_SIZE, quant_type="nf4"
    )
    return dequantize_4bit(packed, state)
