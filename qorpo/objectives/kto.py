"""Kahneman-Tversky optimization (Ethayarajh et al. 2024, arXiv 2402.01306). Legend: P rows of one labelled answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from qorpo.objectives.base import ObjectiveOutput, Plain, Scores, Totals


def kto_loss(
    log_ratios: torch.Tensor,
    desirable: torch.Tensor,
    kl: torch.Tensor | float = 0.0,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> torch.Tensor:
    """(P,) λ_D (1 − σ(β (Δs − z₀))) of desirable answers, λ_U (1 − σ(β (z₀ − Δs))) of the others, in float64.

    Eqs. 7-8 without the constant λ_y: loss λ_y − v(x, y), as in the authors' code and TRL.

    Args:
        log_ratios: (P,) Δs, the sum of the answer's log-probabilities minus the reference's.
        desirable: (P,) bool.
        kl: z₀, the step's estimate of the KL divergence from the reference, at least 0; no gradient flows through it.
    """
    kl = kl.detach() if isinstance(kl, torch.Tensor) else kl
    above_P = beta * (log_ratios.double() - kl)
    # 1 − σ(x) = σ(−x), which keeps its digits.
    return torch.where(
        desirable, desirable_weight * (-above_P).sigmoid(), undesirable_weight * above_P.sigmoid()
    )


@dataclass(frozen=True, kw_only=True)
class Kto(Plain):
    """`kto_loss`. A row is right where a desirable answer is above z₀, or another below it.

    z₀ is the mean of log π(y'|x) − log π_ref(y'|x) over the step's rows, on all ranks and whatever its micro-batches, at
    least 0. y' is an answer to another prompt, the same one for x all through a run (`data.references.partners`), so that
    the reference scores it once. TRL 1.16 has the same loss and weights, and differs in z₀: it takes each device's
    micro-batch by itself; y' is the answer of the row before in the micro-batch, in the order of the file, which may be
    the other answer to the same prompt.
    """

    name: ClassVar[str] = "kto"
    responses: ClassVar[int] = 1
    scores_prompts: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = True
    needs_kl: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("loss", "kl", "rewards/accuracies", "rewards/margins")
    charts: ClassVar[tuple[tuple[str, ...], ...]] = (
        ("loss",),
        ("kl",),
        ("rewards/margins",),
        ("rewards/accuracies",),
    )

    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def totals(self, lengths: Sequence[Sequence[int]]) -> Totals:
        return Totals(len(lengths), 0)

    def __call__(self, scores: Scores, totals: Totals) -> ObjectiveOutput:
        assert scores.desirable_P is not None, "scored without the labels that kto needs"
        log_ratios_P = scores.log_ratios[:, 0]
        loss_P = kto_loss(
            log_ratios_P, scores.desirable_P, totals.kl, self.beta, self.desirable_weight, self.undesirable_weight
        )  # fmt: skip
        kl_P = torch.as_tensor(totals.kl, dtype=torch.float64, device=log_ratios_P.device).expand_as(
            log_ratios_P
        )
        above_P = self.beta * (log_ratios_P - kl_P)
        margin_P = torch.where(scores.desirable_P, above_P, -above_P)
        metrics = {
            "loss": loss_P,
            "kl": kl_P,
            "rewards/accuracies": (margin_P > 0).double(),
            "rewards/margins": margin_P,
        }
        return ObjectiveOutput(loss_P.sum(), {name: value.detach() for name, value in metrics.items()})
