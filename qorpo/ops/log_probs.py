"""Log-probabilities of target tokens from hidden states, without ever holding all logits.

Legend: S scored tokens, H hidden, V vocabulary, C tokens of a chunk.

The head W is (V, H). With logits z = W h, log p_t depends on its own h_t alone, so for any loss L of the token
log-probs, dL/dh_t = dL/dlogp_t · (onehot(y_t) − softmax(z_t)) W. The vector behind dL/dlogp_t needs nothing from
the loss: where the head is frozen, one sweep over chunks yields the log-probs and that vector (S, H), frees the
logits, and backward is one multiplication a row. Where the head trains, backward makes each chunk's logits again
and adds up dW in float32. Either way C·V logits are alive at once, never S·V, and the result is exact for every loss.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


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
    function = _TrainedHead if head_trains and torch.is_grad_enabled() else _FrozenHead
    return function.apply(hidden, weight, bias, targets, chunk_tokens, logit_scale, logit_softcap)


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
    def forward(ctx, hidden_SH, weight_VH, bias_V, targets_S, chunk_tokens, scale, softcap):
        head = _Head(weight_VH, bias_V, scale, softcap).cast(hidden_SH.dtype)
        logps_S = hidden_SH.new_empty(len(targets_S), dtype=_accumulation_dtype(hidden_SH))
        slopes_SH = torch.empty_like(hidden_SH, dtype=logps_S.dtype) if ctx.needs_input_grad[0] else None
        for rows, softmax in _chunks(hidden_SH, targets_S, chunk_tokens, head):
            logps_S[rows] = softmax.logps_C
            if slopes_SH is not None:
                targets_C, falls_CV = targets_S[rows], softmax.falls()
                # The target's slope weighs as much as all others together: kept out of the low-precision product,
                # it pays for the one rounding more that a stored vector has over plain autograd's.
                target_falls_C = _pick(falls_CV, targets_C)
                falls_CV.scatter_(1, targets_C[:, None], 0.0)
                others_CH = falls_CV.to(hidden_SH.dtype) @ head.weight_VH
                slopes_SH[rows] = -others_CH - target_falls_C[:, None] * head.weight_VH[targets_C]
        ctx.save_for_backward(slopes_SH)
        ctx.hidden_dtype = hidden_SH.dtype
        return logps_S

    @staticmethod
    @once_differentiable  # the stored vector is no function of hidden to autograd
    def backward(ctx, upstream_S):
        (slopes_SH,) = ctx.saved_tensors
        # A product of low and high precision is computed in the high one; it is rounded once.
        grad_SH = (slopes_SH * upstream_S[:, None]).to(ctx.hidden_dtype)
        return grad_SH, None, None, None, None, None, None


class _TrainedHead(torch.autograd.Function):
    """Forward keeps no logits; backward makes each chunk's again, since dW needs them with the upstream gradient."""

    @staticmethod
    def forward(ctx, hidden_SH, weight_VH, bias_V, targets_S, chunk_tokens, scale, softcap):
        head = _Head(weight_VH, bias_V, scale, softcap).cast(hidden_SH.dtype)
        logps_S = hidden_SH.new_empty(len(targets_S), dtype=_accumulation_dtype(hidden_SH))
        for rows, softmax in _chunks(hidden_SH, targets_S, chunk_tokens, head):
            logps_S[rows] = softmax.logps_C
        ctx.save_for_backward(hidden_SH, weight_VH, bias_V, targets_S)
        ctx.chunk_tokens, ctx.scale, ctx.softcap = chunk_tokens, scale, softcap
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
        for rows, softmax in _chunks(hidden_SH, targets_S, ctx.chunk_tokens, head):
            slopes_CV = softmax.falls().mul_(-upstream_S[rows, None])
            if grad_bias_V is not None:
                grad_bias_V += slopes_CV.sum(0)
            if grad_hidden_SH is not None:
                torch.mm(slopes_CV.to(hidden_SH.dtype), head.weight_VH, out=grad_hidden_SH[rows])
            if grad_weight_VH is not None:
                _add_outer(grad_weight_VH, slopes_CV, hidden_SH[rows])
        return (
            grad_hidden_SH,
            None if grad_weight_VH is None else grad_weight_VH.to(weight_VH.dtype),
            None if grad_bias_V is None else grad_bias_V.to(bias_V.dtype),
            None, None, None, None,
        )  # fmt: skip


class _Softmax(NamedTuple):
    """One chunk's softmax; its (C, V) memory is the next chunk's."""

    targets_C: torch.Tensor
    logps_C: torch.Tensor
    probs_CV: torch.Tensor
    damping_CV: torch.Tensor | None
    scale: float

    def falls(self) -> torch.Tensor:
        """−d logp_target / d (h Wᵀ + b), (C, V): (p − onehot) times the scale and the cap's derivative; reuses `probs_CV`.

        The target's p − 1 is expm1(logp), exact where p is near 1, just where the odds term looks closest. One
        tensor, cast once by the caller: two products subtracted after a cast would cancel there. The sign is left to
        the caller, who has fewer numbers to turn.
        """
        falls_CV = self.probs_CV.scatter_(1, self.targets_C[:, None], torch.expm1(self.logps_C)[:, None])
        if self.scale != 1.0:
            falls_CV *= self.scale
        return falls_CV if self.damping_CV is None else falls_CV.mul_(self.damping_CV)


def _chunks(
    hidden_SH: torch.Tensor, targets_S: torch.Tensor, chunk_tokens: int, head: _Head
) -> Iterator[tuple[slice, _Softmax]]:
    """Each chunk's rows and its softmax, all chunks in the same memory: fresh pages cost a quarter of a product."""
    wide, num_tokens = _accumulation_dtype(hidden_SH), len(targets_S)
    shape = (min(chunk_tokens, num_tokens), len(head.weight_VH))
    product_CV = hidden_SH.new_empty(shape)
    logits_CV = product_CV if product_CV.dtype == wide else hidden_SH.new_empty(shape, dtype=wide)
    for start in range(0, num_tokens, chunk_tokens):
        rows = slice(start, min(start + chunk_tokens, num_tokens))
        length = rows.stop - rows.start
        yield rows, _softmax(hidden_SH[rows], targets_S[rows], head, product_CV[:length], logits_CV[:length])


def _softmax(
    hidden_CH: torch.Tensor,
    targets_C: torch.Tensor,
    head: _Head,
    product_CV: torch.Tensor,
    logits_CV: torch.Tensor,
) -> _Softmax:
    """A chunk's softmax, over `logits_CV`, where the logits were; `product_CV` may be the same tensor."""
    if head.bias_V is None:
        torch.mm(hidden_CH, head.weight_VH.T, out=product_CV)
    else:
        torch.addmm(head.bias_V, hidden_CH, head.weight_VH.T, out=product_CV)
    if product_CV.dtype != logits_CV.dtype:
        logits_CV.copy_(product_CV)
        # A confident target has the largest logit and so the coarsest rounding, which is most of 1 − p's error:
        # one dot product a row mends it.
        target_logits_C = (hidden_CH.to(logits_CV.dtype) * head.weight_VH[targets_C]).sum(-1)
        if head.bias_V is not None:
            target_logits_C += head.bias_V[targets_C]
        logits_CV.scatter_(1, targets_C[:, None], target_logits_C[:, None])
    if head.scale != 1.0:
        logits_CV *= head.scale
    damping_CV = None
    if head.softcap is not None:
        logits_CV.div_(head.softcap).tanh_()
        damping_CV = logits_CV.square().neg_().add_(1.0)
        logits_CV *= head.softcap
    # The log-probs before the softmax takes the logits' place.
    logps_C = _pick(logits_CV, targets_C)
    highest_C = logits_CV.amax(-1)
    torch.softmax(logits_CV, -1, out=logits_CV)
    # log Σ exp(z) = max z − log max p, and max p is far from underflow: at least 1 / V.
    logps_C = logps_C - highest_C + logits_CV.amax(-1).log_()
    return _Softmax(targets_C, logps_C, logits_CV, damping_CV, head.scale)


def _add_outer(grad_weight_VH: torch.Tensor, slopes_CV: torch.Tensor, hidden_CH: torch.Tensor) -> None:
    """grad_weight += slopesᵀ hidden, a sum over tokens that no low-precision rounding interrupts."""
    if hidden_CH.is_cuda and hidden_CH.dtype != slopes_CV.dtype:
        # Tensor cores add up in float32; only the result would be rounded.
        grad_weight_VH += torch.mm(slopes_CV.T.to(hidden_CH.dtype), hidden_CH, out_dtype=slopes_CV.dtype)
    else:
        grad_weight_VH.addmm_(slopes_CV.T, hidden_CH.to(slopes_CV.dtype))


def _pick(values_CV: torch.Tensor, targets_C: torch.Tensor) -> torch.Tensor:
    return values_CV.gather(1, targets_C[:, None]).squeeze(1)


def _accumulation_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32
