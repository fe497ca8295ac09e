"""Simple preference optimization (Meng, Xia, Chen 2024, arXiv 2405.14734). Legend: P pairs."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from qorpo.objectives.base import ObjectiveOutput, PairObjective, Scores, Totals, pair_output


def simpo_loss(
    chosen_logps: torch.Tensor,
    rejected_logps: torch.Tensor,
    beta: float = 2.0,
    gamma_beta_ratio: float = 0.8,
) -> torch.Tensor:
    """(P,) −log σ(β a_w − β a_l − γ), Eq. 6, in float64.

    Args:
        chosen_logps: (P,) average log-likelihood a token of each chosen response.
        rejected_logps: (P,) the same of each rejected response.
        gamma_beta_ratio: γ / β, as the authors' code has it; TRL's `simpo_gamma` is γ. The defaults are the authors'
            for Mistral-7B base; their other models have β from 2 to 10 and ratios from 0.1 to 0.55.
    """
    return -F.logsigmoid(beta * (chosen_logps.double() - rejected_logps.double() - gamma_beta_ratio))


@dataclass(frozen=True, kw_only=True)
class Simpo(PairObjective):
    """`simpo_loss` alone: no NLL and no reference."""

    name: ClassVar[str] = "simpo"

    beta: float = 2.0
    gamma_beta_ratio: float = 0.8

    def __call__(self, scores: Scores, totals: Totals) -> ObjectiveOutput:
        chosen_P, rejected_P = scores.averages.unbind(1)
        loss_P = simpo_loss(chosen_P, rejected_P, self.beta, self.gamma_beta_ratio)
        return pair_output(scores, loss_P, self.beta * scores.averages)
