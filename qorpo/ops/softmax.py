"""One chunk's softmax with the target held apart: in passes of PyTorch's own, or in one compiled kernel.

Legend: V vocabulary, C tokens of a chunk.

With q the softmax of the others alone and Z the log of their Σ exp(z), p = sigmoid(z_target − Z) and
d logp / d z_v = −(1 − p) q_v. Nothing is subtracted from 1 or from p, so a confident target, where the odds term
looks closest, loses no digit.
"""

import importlib.util
import logging
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from qorpo.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

_can_compile = True  # until it was tried in vain


@cache
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def softmax_of_others_(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    target_logits_C: torch.Tensor,
    upstream_C: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    scratch_CV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p and 1 − p of the target; what was logits is the others' distribution after, 0 at the target.

    Args:
        logits_CV: (C, V) h Wᵀ + b, in the hidden states' type; after, q times the slope of scale and cap, and times
            upstream · (1 − p) where that is given.
        targets_C: (C,) int64.
        target_logits_C: (C,) the target's, scaled and capped, in high precision.
        upstream_C: (C,) the gradient of log p, or None.
        scale: factor on the logits.
        softcap: c in c·tanh(z / c), after the scale.
        scratch_CV: (C, V) in high precision; may be `logits_CV`.

    Returns:
        log p and 1 − p, (C,) each, in high precision.
    """
    if scratch_CV is not logits_CV:
        scratch_CV.copy_(logits_CV)
    scratch_CV, slopes = scaled_and_capped(scratch_CV, scale, softcap)
    scratch_CV.scatter_(1, targets_C[:, None], -torch.inf)
    highest_C = scratch_CV.amax(-1)
    torch.softmax(scratch_CV, -1, out=scratch_CV)
    # log Σ exp(z) = max z − log max q, and max q is far from underflow: at least 1 / V.
    leads_C = target_logits_C - (highest_C - scratch_CV.amax(-1).log_())
    one_minus_p_C = torch.sigmoid(-leads_C)
    if softcap is not None or scale != 1.0:
        scratch_CV *= slopes
    if upstream_C is not None:
        scratch_CV *= (upstream_C * one_minus_p_C)[:, None]
    if scratch_CV is not logits_CV:
        logits_CV.copy_(scratch_CV)
    return F.logsigmoid(leads_C), one_minus_p_C


def _functional(logits_CV, targets_C, target_logits_C, upstream_C, scale, softcap):
    """`softmax_of_others_` without scratch, as a compiler wants it: of this it makes the one kernel."""
    wide_CV, slopes = scaled_and_capped(logits_CV.to(target_logits_C.dtype), scale, softcap)
    is_target_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == targets_C[:, None]
    wide_CV = wide_CV.masked_fill(is_target_CV, -torch.inf)
    highest_C1 = wide_CV.amax(-1, keepdim=True)
    exps_CV = (wide_CV - highest_C1).exp()
    sums_C1 = exps_CV.sum(-1, keepdim=True)
    leads_C = target_logits_C - (highest_C1 + sums_C1.log()).squeeze(1)
    one_minus_p_C = torch.sigmoid(-leads_C)
    factors_C1 = sums_C1.reciprocal()
    if upstream_C is not None:
        factors_C1 = factors_C1 * (upstream_C * one_minus_p_C)[:, None]
    logits_CV.copy_(exps_CV * (slopes * factors_C1))
    return F.logsigmoid(leads_C), one_minus_p_C


# An operator of its own: a plan on fake tensors sees what it keeps, not how it is computed.
@torch.library.custom_op("qorpo::fused_softmax_of_others_", mutates_args={"logits_CV"})
def fused_softmax_of_others_(
    logits_CV: torch.Tensor,
    targets_C: torch.Tensor,
    target_logits_C: torch.Tensor,
    upstream_C: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`softmax_of_others_` in one kernel, compiled in the first call, without scratch."""
    global _can_compile
    inputs = (logits_CV, targets_C, target_logits_C, upstream_C, scale, softcap)
    if _can_compile:
        try:
            return _compiled()(*inputs)
        # Of many types: no C compiler, no Triton for this card. Nothing is computed then.
        except Exception as error:
            if is_out_of_memory(error):
                raise  # it passes: the step is done again, smaller, and the compiler asked again
            _can_compile = False  # each further try would take seconds, for every chunk
            logger.warning(
                "the output head's kernel could not be compiled, so it needs more time and memory: %s: %s",
                type(error).__name__, (str(error).strip() or "no reason given").splitlines()[0],
            )  # fmt: skip
    return softmax_of_others_(*inputs, torch.empty_like(logits_CV, dtype=target_logits_C.dtype))


@cache
def _compiled() -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    logger.info("compiling the output head's kernel, once; some seconds")
    return torch.compile(_functional)


@fused_softmax_of_others_.register_fake
def _(logits_CV, targets_C, target_logits_C, upstream_C, scale, softcap):
    return torch.empty_like(target_logits_C), torch.empty_like(target_logits_C)


def scaled_and_capped(
    logits: torch.Tensor, scale: float, softcap: float | None
) -> tuple[torch.Tensor, torch.Tensor | float]:
    """cap·tanh(scale·logits / cap), and what a logit's change is multiplied by; in place where there is no cap."""
    if softcap is None:
        return logits if scale == 1.0 else logits.mul_(scale), scale
    tanh = torch.tanh(logits * (scale / softcap))
    return softcap * tanh, scale * (1.0 - tanh.square())
