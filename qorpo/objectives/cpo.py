"""Contrastive preference optimization (Xu et al. 2024, arXiv 2401.08417). Legend: P pairs."""

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


def cpo_loss(chosen_logps: torch.Tensor, rejected_logps: torch.Tensor, beta: float = 0.1) -> torch.Tensor:
    """(P,) −log σ(β log π(y_w|x) − β log π(y_l|x)), L_prefer of Eq. 3, in float64.

    Args:
        chosen_logps: (P,) sum of the log-probabilities of each chosen response's tokens.
        rejected_logps: (P,) the same of each rejected response.
    """
    return -F.logsigmoid(beta * (chosen_logps.double() - rejected_logps.double()))


@dataclass(frozen=True, kw_only=True)
class Cpo(WithNll, PairObjective):
    """`cpo_loss` + α · nll.

    The paper's L_NLL is the mean of −log π(y_w|x) over pairs, not divided by the length. The authors' code and TRL
    average over the chosen responses' tokens of the micro-batch, without the prompts': nll_average "token" here.
    """

    name: ClassVar[str] = "cpo"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "nll", *PAIR_METRICS)

    beta: float = 0.1
    alpha: float = 1.0

    def __call__(self, scores: Scores, totals: Totals) -> ObjectiveOutput:
        nll_P = self.nll(scores, totals)
        chosen_P, rejected_P = scores.logps_PN.unbind(1)
        loss_P = cpo_loss(chosen_P, rejected_P, self.beta) + self.alpha * nll_P
        return pair_output(scores, loss_P, self.beta * scores.logps_PN, nll=nll_P)
