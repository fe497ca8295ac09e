"""NF4 as it is meant, where bitsandbytes' kernel for the CPU computes something else."""

import functools
import importlib.util
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


@contextmanager
def quantized_on_gpu() -> Iterator[None]:
    """Inside, weights that are loaded into host memory are quantized on this process's GPU, where there is one.

    The codes go back to host memory and their scales stay. On a CPU it would take hours for 70 billion weights.
    """
    if not torch.cuda.is_available():
        yield
        return
    from bitsandbytes.nn import Params4bit

    own = Params4bit._quantize

    def _quantize(self: Any, device: Any) -> Any:
        own(self, torch.device("cuda", torch.cuda.current_device()))
        self.data = self.data.to(device)
        return self

    Params4bit._quantize = _quantize  # type: ignore[method-assign]
    try:
        yield
    finally:
        Params4bit._quantize = own  # type: ignore[method-assign]


def keep_quant_states(model: nn.Module) -> None:
    """Have layers know the scales of their 4-bit weights, which a weight that FSDP2 shards no longer does."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.quant_state = getattr(module.weight, "quant_state")  # noqa: B009 (mypy knows a Tensor)


OPERATOR = "bitsandbytes::dequantize_4bit"


@functools.cache
def fix_dequantization() -> torch.library.Library:
    """Let bitsandbytes dequantize rows of any length rightly on the CPU; where it is right already, nothing changes.

    bitsandbytes 0.50 with AVX-512 applies wrong scales to rows that are a multiple of 16 long, but not of a block (64):
    864 inputs gave weights off by 26% instead of 9%. Blocks lie one after another whatever the rows, so dequantizing
    rows of one block each, by the same kernel, gives the values that are meant.

    Returns what holds the kernel in its place.
    """
    import bitsandbytes  # noqa: F401 (registers the operator)

    own = torch.library.get_kernel(OPERATOR, "CPU")

    def dequantize_4bit(
        keyset: Any,
        packed: torch.Tensor,
        absmax: torch.Tensor,
        blocksize: int,
        quant_type: str,
        shape: Sequence[int],
        dtype: torch.dtype,
    ) -> torch.Tensor:
        if shape[-1] % blocksize == 0:
            return own.call_boxed(keyset, packed, absmax, blocksize, quant_type, shape, dtype)
        count = math.prod(shape)
        num_blocks = -(-count // blocksize)
        codes = packed.reshape(-1).view(torch.uint8)
        codes = F.pad(codes, (0, num_blocks * blocksize // 2 - len(codes)))
        values = own.call_boxed(keyset, codes, absmax, blocksize, quant_type, [num_blocks, blocksize], dtype)
        return values.flatten()[:count].view(shape)

    library = torch.library.Library("bitsandbytes", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch says that a kernel takes another's place
        library.impl("dequantize_4bit", dequantize_4bit, "CPU", with_keyset=True, allow_override=True)
    return library
