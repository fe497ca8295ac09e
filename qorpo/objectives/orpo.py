"""Odds ratio preference optimization (Hong, Lee, Thorne 2024, arXiv 2403.07691). Legend: P pairs."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from qorpo.objectives.base import (
    PAIR_CHARTS,
    PAIR_METRICS,
    ObjectiveOutput,
    PairObjective,
    Scores,
    Totals,
    WithNll,
)
from qorpo.ops.numerics import LARGEST_LOGP, log1mexp


def orpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    nll: torch.Tensor | float,
    weight: float = 0.1,
    reduction: Literal["mean", "sum", "none"] = "mean",
) -> ObjectiveOutput:
    """L = E[L_SFT + λ · L_OR] (Eq. 4), in float64.

    Args:
        chosen_logps: (P,) average log-likelihood a token of each chosen response, ≤ 0.
        rejected_logps: (P,) the same of each rejected response.
        nll: L_SFT, (P,) or a scalar that every pair gets: already normalised by the caller, who knows over which
            tokens it is averaged.
        weight: λ.
        reduction: over pairs.

    Returns:
        The loss and, per pair and detached, loss, nll, odds_ratio_loss (Eq. 5), log_odds_ratio (log of Eq. 1),
        chosen_logps, rejected_logps, rewards/accuracies (1 where chosen is the likelier) and rewards/margins
        (λ times the difference of average log-likelihoods).

    Raises:
        ValueError: for an unknown reduction, or shapes that don't fit together.
    """
    if chosen_logps.shape != rejected_logps.shape:
        raise ValueError(
            f"chosen {tuple(chosen_logps.shape)} and rejected {tuple(rejected_logps.shape)} differ in shape"
        )
    if isinstance(nll, torch.Tensor) and nll.numel() != 1 and nll.shape != chosen_logps.shape:
        raise ValueError(
            f"nll {tuple(nll.shape)} is neither a scalar nor of the pairs' shape {tuple(chosen_logps.shape)}"
        )
    chosen_P, rejected_P = chosen_logps.double(), rejected_logps.double()
    log_odds_ratio_P = log_odds(chosen_P) - log_odds(rejected_P)  # log of Eq. 1
    odds_ratio_loss_P = -F.logsigmoid(log_odds_ratio_P)  # Eq. 5
    nll_P = torch.as_tensor(nll, dtype=chosen_P.dtype, device=chosen_P.device).expand_as(chosen_P)
    loss_P = nll_P + weight * odds_ratio_loss_P  # Eq. 4
    margin_P = chosen_P - rejected_P
    metrics = {
        "loss": loss_P,
        "nll": nll_P,
        "odds_ratio_loss": odds_ratio_loss_P,
        "log_odds_ratio": log_odds_ratio_P,
        "chosen_logps": chosen_P,
        "rejected_logps": rejected_P,
        "rewards/accuracies": (margin_P > 0).double(),
        "rewards/margins": weight * margin_P,
    }
    return ObjectiveOutput(
        _reduce(loss_P, reduction), {name: value.detach() for name, value in metrics.items()}
    )


def log_odds(logps: torch.Tensor) -> torch.Tensor:
    """log(P / (1 − P)) of P = exp(logps) (Sec. 3.1), finite in value and gradient up to and at logps = 0.

    Average log-likelihoods are clamped to −1e-12: beyond it 1 − P has no digits left, and the gradient is 0.
    """
    logps = logps.clamp(max=LARGEST_LOGP)
    return logps - log1mexp(logps)


def _reduce(loss_P: torch.Tensor, reduction: str) -> torch.Tensor:
    match reduction:
        case "mean":
            return loss_P.mean()
        case "sum":
            return loss_P.sum()
        case "none":
            return loss_P
    raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")


@dataclass(frozen=True, kw_only=True)
class Orpo(WithNll, PairObjective):
    """`orpo_loss` with the NLL that two keys name; the odds are always of the responses' averages."""

    name: ClassVar[str] = "orpo"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "nll", "odds_ratio_loss", "log_odds_ratio", *PAIR_METRICS)
    charts: ClassVar[tuple[tuple[str, ...], ...]] = (*PAIR_CHARTS, ("nll",), ("log_odds_ratio",))

    weight: float = 0.1  # λ

    def __call__(self, scores: Scores, totals: Totals) -> ObjectiveOutput:
        chosen_P, rejected_P = scores.averages.unbind(1)
        nll_P = self.nll(scores, totals)
        return orpo_loss(chosen_P, rejected_P, nll_P, weight=self.weight, reduction="sum")
