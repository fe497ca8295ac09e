"""ORPO's ablation: the ratio of probabilities in place of the ratio of odds (arXiv 2403.07691, App. B and D). P pairs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from qorpo.objectives.base import (
    PAIR_METRICS,
    ObjectiveOutput,
    PairObjective,
    Scores,
    Totals,
    WithNll,
    pair_output,
)


def probability_ratio_loss(
    chosen_logps: torch.Tensor, rejected_logps: torch.Tensor, beta: float = 1.0
) -> torch.Tensor:
    """(P,) −log σ(β (log P(y_w|x) − log P(y_l|x))) (Eq. 27), in float64.

    Args:
        chosen_logps: (P,) average log-likelihood a token of each chosen response.
        rejected_logps: (P,) the same of each rejected response.
    """
    return -F.logsigmoid(beta * (chosen_logps.double() - rejected_logps.double()))


@dataclass(frozen=True, kw_only=True)
class ProbabilityRatio(WithNll, PairObjective):
    """nll + λ · `probability_ratio_loss`: Eq. 4 with L_PR for L_OR."""

    name: ClassVar[str] = "probability_ratio"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "nll", "probability_ratio_loss", *PAIR_METRICS)

    weight: float = 0.1  # λ
    beta: float = 1.0

    def __call__(self, scores: Scores, totals: Totals) -> ObjectiveOutput:
        nll_P = self.nll(scores, totals)
        chosen_P, rejected_P = scores.averages.unbind(1)
        ratio_loss_P = probability_ratio_loss(chosen_P, rejected_P, self.beta)
        loss_P = nll_P + self.weight * ratio_loss_P
        return pair_output(
            scores, loss_P, self.beta * scores.averages, nll=nll_P, probability_ratio_loss=ratio_loss_P
        )
