"""DoRA (arXiv 2402.09353): y = m/n ∘ (W x + s·B A x) + bias, where m (out,) trains, and n holds the row lengths of W + s·B A.

PEFT's forward unpacks W and multiplies B A out to find n, in the activations' type. Here n comes of products with the
few rows of A, in float32, so that a weight in 4 bits is never unpacked for it: ‖W + s·BA‖² by rows is
‖W‖² + 2s·(W Aᵀ ∘ B) 1 + s²·(B A Aᵀ ∘ B) 1. Legend: T tokens, r rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils.integrations import dequantize_bnb_weight
from torch import nn

SMALLEST_SQUARE = 1e-12
"""Of a row's length: rows of zeros have none to divide by."""


@contextmanager
def exact_beginnings() -> Iterator[None]:
    """Within it PEFT's new DoRA layers begin at the row lengths of W in float32, and keep their squares.

    PEFT rounds them to the base's type, and can't make them of weights that are not there (on the meta device).
    """
    theirs = DoraLinearLayer.update_layer
    DoraLinearLayer.update_layer = _begin  # type: ignore[method-assign]
    try:
        yield
    finally:
        DoraLinearLayer.update_layer = theirs  # type: ignore[method-assign]


def _begin(self: Any, *, base_layer: Any, **_: Any) -> None:
    weight = base_layer.weight
    if type(weight).__name__ == "Params4bit":
        if weight.is_meta:
            weight = weight.new_empty(base_layer.out_features, base_layer.in_features, dtype=torch.bfloat16)
        else:
            weight = dequantize_bnb_weight(weight)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    lengths = torch.linalg.vector_norm(weight.detach(), dim=0 if self.fan_in_fan_out else 1, dtype=dtype)
    self.weight = nn.Parameter(lengths)
    self.register_buffer("base_squares", lengths.square(), persistent=False)


def has_exact_beginning(layer: Any, name: str) -> bool:
    """Whether a LoRA layer's adapter of this name is DoRA, made within `exact_beginnings`."""
    return name in layer.lora_magnitude_vector and hasattr(layer.lora_magnitude_vector[name], "base_squares")


def forward_dora(layer: Any, name: str, rows: torch.Tensor) -> torch.Tensor:
    """The layer's output (T, out) for `rows` (T, in). n counts as a constant in backward (Sec. 4.3 of the paper)."""
    dropout, b = layer.lora_dropout[name], layer.lora_B[name].weight
    factor = layer.lora_magnitude_vector[name].weight / row_lengths(layer, name, rows.dtype)
    base = layer.base_layer(rows)
    dropped, product = rows, base
    if not isinstance(dropout, nn.Identity) and dropout.training:
        dropped = dropout(rows)
        product = layer.base_layer(dropped)
    if layer.base_layer.bias is not None:
        product = product - layer.base_layer.bias
    # factor is near 1, and its distance from there is what a low precision keeps.
    wide = torch.addcmul(base, product, (factor - 1).to(base.dtype))
    low = layer.lora_A[name](dropped)
    return wide.addmm_(low, (factor[:, None] * b).to(low.dtype).T, alpha=layer.scaling[name])


@torch.no_grad()
def row_lengths(layer: Any, name: str, dtype: torch.dtype) -> torch.Tensor:
    """n (out,); the base's product with the rows of A is computed in `dtype`, all else in the adapter's own."""
    a, b, scaling = (
        layer.lora_A[name].weight,
        layer.lora_B[name].weight,
        layer.scaling[name],
    )  # (r, in), (out, r)
    product = layer.base_layer(a.to(dtype))  # (r, out)
    if layer.base_layer.bias is not None:
        product = product - layer.base_layer.bias
    of_both = (product.to(b.dtype).T * b).sum(1)
    of_adapter = ((b @ (a @ a.T)) * b).sum(1)
    squares = layer.lora_magnitude_vector[name].base_squares + 2 * scaling * of_both + scaling**2 * of_adapter
    return squares.clamp_min(SMALLEST_SQUARE).sqrt()
