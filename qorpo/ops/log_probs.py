"""Log-probabilities of target tokens from hidden states, without ever holding all logits.

Legend: S scored tokens, H hidden, V vocabulary, C tokens of a chunk.

The head W is (V, H). With logits z = W h, log p_t depends on its own h_t alone, so for any loss L of the token
log-probs, dL/dh_t = dL/dlogp_t · (onehot(y_t) − softmax(z_t)) W. The vector behind dL/dlogp_t needs nothing from
the loss: where the head is frozen, one sweep over chunks yields the log-probs and that vector (S, H), frees the
logits, and backward is one multiplication a row. Where the head trains, backward makes each chunk's logits again
and adds up dW in float32. Either way C·V logits are alive at once, never S·V, and the result is exact for every loss.

Between a chunk's two products its logits become probabilities, which takes more time on a GPU than one would think:
memory is slow there. `torch.compile` makes one kernel of it (`fused`), that reads the logits twice, writes once over
them and needs no float32 copy.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from qorpo.ops.softmax import (
    fused_softmax_of_others_,
    scaled_and_capped,
    softmax_of_others_,
    triton_is_installed,
)  # fmt: skip


class _Head(NamedTuple):
    """What turns hidden states into logits: cap·tanh(scale·(h Wᵀ + b) / cap)."""

    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    scale: float
    softcap: float | None

    def cast(self, dtype: torch.dtype) -> "_Head":
        """A head that trains is kept in float32; its products are in the hidden states' own type."""
        bias_V = None if self.bias_V is None else self.bias_V.to(dtype)
        return self._replace(weight_VH=self.weight_VH.to(dtype), bias_V=bias_V)


def token_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    chunk_tokens: int = 256,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    fused: bool | None = None,
) -> torch.Tensor:
    """log softmax(head(hidden))[target] of each token, computed `chunk_tokens` tokens at a time.

    Args:
        hidden: (S, H) hidden states, one row a scored token.
        weight: (V, H) the output head; where it needs no gradient, one sweep does forward and backward.
        targets: (S,) int64, the token each row is to predict.
        bias: (V,) or None.
        chunk_tokens: rows whose logits are held at once; changes memory and speed, never the result.
        logit_scale: factor on the logits (Cohere's `logit_scale`, 1 / Granite's `logits_scaling`).
        logit_softcap: c in c·tanh(z / c) (Gemma-2's `final_logit_softcapping`), after the scale.
        fused: whether a chunk's logits become probabilities in one kernel, which `torch.compile` makes in the first
            call (some seconds); None: on CUDA where Triton is installed. Where it can't be made, a warning says why.

    Returns:
        (S,) float32 log-probabilities (float64 for float64 hidden states).

    Raises:
        ValueError: where shapes don't fit together or `chunk_tokens` is below 1.

    See also `token_logps_plain`, the slow twin that this is held to.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"expected hidden (S, H) and weight (V, H), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    if targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"expected one target a row of hidden, got {tuple(targets.shape)} for {tuple(hidden.shape)}"
        )
    if chunk_tokens < 1:
        raise ValueError(f"chunk_tokens must be at least 1, got {chunk_tokens}")
    head_trains = weight.requires_grad or (bias is not None and bias.requires_grad)
    if fused is None:
        fused = hidden.is_cuda and triton_is_installed()
    function = _TrainedHead if head_trains and torch.is_grad_enabled() else _FrozenHead
    return function.apply(hidden, weight, bias, targets, chunk_tokens, logit_scale, logit_softcap, fused)


def token_logps_plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> torch.Tensor:
    """The slow twin of `token_logps`: all logits at once, gradients by autograd. Same arguments and result."""
    logps_SV = next_token_logps(
        hidden, weight, bias=bias, logit_scale=logit_scale, logit_softcap=logit_softcap
    )
    return logps_SV.gather(-1, targets[:, None]).squeeze(-1)


def next_token_logps(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> torch.Tensor:
    """(S, V) log-probs of every next token; arguments as of `token_logps`."""
    bias = None if bias is None else bias.to(hidden.dtype)
    logits_SV = F.linear(hidden, weight.to(hidden.dtype), bias)
    logits_SV = logits_SV.to(_accumulation_dtype(hidden)) * logit_scale
    if logit_softcap is not None:
        logits_SV = logit_softcap * torch.tanh(logits_SV / logit_softcap)
    return logits_SV.log_softmax(-1)


class _FrozenHead(torch.autograd.Function):
    """One sweep: the log-probs, and the vector d logp_t / d h_t that backward multiplies by the upstream gradient."""

    @staticmethod
    def forward(ctx, hidden_SH, weight_VH, bias_V, targets_S, chunk_tokens, scale, softcap, fused):
        head = _Head(weight_VH, bias_V, scale, softcap).cast(hidden_SH.dtype)
        logps_S = hidden_SH.new_empty(len(targets_S), dtype=_accumulation_dtype(hidden_SH))
        slopes_SH = torch.empty_like(hidden_SH, dtype=logps_S.dtype) if ctx.needs_input_grad[0] else None
        for rows, chunk in _chunks(hidden_SH, targets_S, chunk_tokens, head, fused):
            logps_S[rows] = chunk.logps_C
            if slopes_SH is not None:
                slopes_SH[rows] = chunk.one_minus_p_C[:, None] * chunk.input_grad(head.weight_VH)
        ctx.save_for_backward(slopes_SH)
        ctx.hidden_dtype = hidden_SH.dtype
        return logps_S

    @staticmethod
    @once_differentiable  # the stored vector is no function of hidden to autograd
    def backward(ctx, upstream_S):
        (slopes_SH,) = ctx.saved_tensors
        # A product of low and high precision is computed in the high one; it is rounded once.
        grad_SH = (slopes_SH * upstream_S[:, None]).to(ctx.hidden_dtype)
        return grad_SH, None, None, None, None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """Forward keeps no logits; backward makes each chunk's again, since dW needs them with the upstream gradient."""

    @staticmethod
    def forward(ctx, hidden_SH, weight_VH, bias_V, targets_S, chunk_tokens, scale, softcap, fused):
        head = _Head(weight_VH, bias_V, scale, softcap).cast(hidden_SH.dtype)
        logps_S = hidden_SH.new_empty(len(targets_S), dtype=_accumulation_dtype(hidden_SH))
        for rows, chunk in _chunks(hidden_SH, targets_S, chunk_tokens, head, fused):
            logps_S[rows] = chunk.logps_C
        ctx.save_for_backward(hidden_SH, weight_VH, bias_V, targets_S)
        ctx.chunk_tokens, ctx.scale, ctx.softcap, ctx.fused = chunk_tokens, scale, softcap, fused
        return logps_S

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream_S):
        hidden_SH, weight_VH, bias_V, targets_S = ctx.saved_tensors
        head = _Head(weight_VH, bias_V, ctx.scale, ctx.softcap).cast(hidden_SH.dtype)
        wide = _accumulation_dtype(hidden_SH)
        grad_hidden_SH = torch.empty_like(hidden_SH) if ctx.needs_input_grad[0] else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=wide) if ctx.needs_input_grad[1] else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=wide) if ctx.needs_input_grad[2] else None
        for rows, chunk in _chunks(hidden_SH, targets_S, ctx.chunk_tokens, head, ctx.fused, upstream_S):
            if grad_hidden_SH is not None:
                grad_hidden_SH[rows] = chunk.input_grad(head.weight_VH)
            slopes_CV = chunk.slopes()
            if grad_bias_V is not None:
                grad_bias_V += slopes_CV.sum(0, dtype=wide)
            if grad_weight_VH is not None:
                _add_outer(grad_weight_VH, slopes_CV, hidden_SH[rows])
        return (
            grad_hidden_SH,
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            None, None, None, None, None,
        )  # fmt: skip


class _Chunk(NamedTuple):
    """What one chunk gives; its (C, V) memory is the next chunk's."""

    logps_C: torch.Tensor
    one_minus_p_C: torch.Tensor  # 1 − p
    others_CV: torch.Tensor  # −d logp / d (h Wᵀ + b), 0 at the target
    targets_C: torch.Tensor
    target_slopes_C: torch.Tensor  # d logp / d (h Wᵀ + b) at the target
    target_rows_CH: torch.Tensor

    def input_grad(self, weight_VH: torch.Tensor) -> torch.Tensor:
        """(C, H): the head's rows weighed by `slopes`.

        The target weighs as much as all others together: kept out of the low-precision product, it pays for the one
        rounding more that a stored vector has over plain autograd's.
        """
        return self.target_slopes_C[:, None] * self.target_rows_CH - self.others_CV @ weight_VH

    def slopes(self) -> torch.Tensor:
        """(C, V), where `others_CV` was."""
        slopes_CV = self.others_CV.neg_()
        return slopes_CV.scatter_(
            1, self.targets_C[:, None], self.target_slopes_C.to(slopes_CV.dtype)[:, None]
        )


def _chunks(
    hidden_SH: torch.Tensor,
    targets_S: torch.Tensor,
    chunk_tokens: int,
    head: _Head,
    fused: bool,
    upstream_S: torch.Tensor | None = None,
) -> Iterator[tuple[slice, _Chunk]]:
    """Each chunk's rows and what they give, all chunks in the same memory: fresh pages cost a quarter of a product.

    Where `upstream_S` is given, slopes are multiplied by it and by 1 − p.
    """
    wide, num_tokens = _accumulation_dtype(hidden_SH), len(targets_S)
    shape = (min(chunk_tokens, num_tokens), len(head.weight_VH))
    chunk_CV = hidden_SH.new_empty(shape)
    wide_CV = None if fused or chunk_CV.dtype == wide else hidden_SH.new_empty(shape, dtype=wide)
    for start in range(0, num_tokens, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, num_tokens))
        hidden_CH, targets_C = hidden_SH[rows], targets_S[rows]
        logits_CV = chunk_CV[: len(targets_C)]
        if head.bias_V is None:
            torch.mm(hidden_CH, head.weight_VH.T, out=logits_CV)
        else:
            torch.addmm(head.bias_V, hidden_CH, head.weight_VH.T, out=logits_CV)
        # A confident target has the largest logit and so, in low precision, the coarsest rounding, which is most of
        # 1 − p's error: one dot product a row, in high precision, fixes it.
        target_rows_CH = head.weight_VH.index_select(0, targets_C)
        target_logits_C = (hidden_CH.to(wide) * target_rows_CH).sum(-1)
        if head.bias_V is not None:
            target_logits_C += head.bias_V[targets_C]
        target_logits_C, target_slopes = scaled_and_capped(target_logits_C, head.scale, head.softcap)
        upstream_C = None if upstream_S is None else upstream_S[rows]
        inputs = (logits_CV, targets_C, target_logits_C, upstream_C, head.scale, head.softcap)
        if fused:
            logps_C, one_minus_p_C = fused_softmax_of_others_(*inputs)
        else:
            scratch_CV = logits_CV if wide_CV is None else wide_CV[: len(targets_C)]
            logps_C, one_minus_p_C = softmax_of_others_(*inputs, scratch_CV)
        factors_C = torch.ones_like(one_minus_p_C) if upstream_C is None else one_minus_p_C * upstream_C
        yield (
            rows,
            _Chunk(logps_C, one_minus_p_C, logits_CV, targets_C, factors_C * target_slopes, target_rows_CH),
        )


def _add_outer(grad_weight_VH: torch.Tensor, slopes_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
    """grad_weight += slopesᵀ hidden, a sum over tokens that no low-precision rounding interrupts."""
    if hidden_CH.is_cuda and hidden_CH.dtype != grad_weight_VH.dtype:
        # Tensor cores add up in float32; only the result would be rounded.
        grad_weight_VH += torch.mm(slopes_CV.T, hidden_CH, out_dtype=grad_weight_VH.dtype)
    else:
        wide = grad_weight_VH.dtype
        grad_weight_VH.addmm_(slopes_CV.T.to(wide), hidden_CH.to(wide))


def _accumulation_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
