"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290). Legend: P pairs.

Δs of a response is the sum of its log-probabilities minus the reference's sum.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from qorpo.objectives.base import (
    PAIR_CHARTS,
    PAIR_METRICS,
    ObjectiveOutput,
    PairObjective,
    Scores,
    Totals,
    pair_output,
)

REWARDS = ("rewards/chosen", "rewards/rejected")


@dataclass(frozen=True, kw_only=True)
class ReferencePairObjective(PairObjective, ABC):
    """What objectives of a pair's Δs have in common: the reward of a response is β Δs, as in TRL."""

    needs_reference: ClassVar[bool] = True
    metrics: ClassVar[tuple[str, ...]] = ("loss", *REWARDS, *PAIR_METRICS)
    charts: ClassVar[tuple[tuple[str, ...], ...]] = (*PAIR_CHARTS, REWARDS)

    beta: float

    @abstractmethod
    def loss(self, chosen_P: torch.Tensor, rejected_P: torch.Tensor, scores: Scores) -> torch.Tensor:
        """(P,) the loss of each pair, of Δs of chosen and of rejected."""

    def __call__(self, scores: Scores, totals: Totals) -> ObjectiveOutput:
        log_ratios_PN = scores.log_ratios
        chosen_P, rejected_P = log_ratios_PN.unbind(1)
        loss_P = self.loss(chosen_P, rejected_P, scores)
        rewards_PN = self.beta * log_ratios_PN
        named = dict(zip(REWARDS, rewards_PN.unbind(1), strict=True))
        return pair_output(scores, loss_P, rewards_PN, **named)


def dpo_loss(
    chosen_log_ratios: torch.Tensor, rejected_log_ratios: torch.Tensor, beta: float = 0.1
) -> torch.Tensor:
    """(P,) −log σ(β (Δs_w − Δs_l)), Eq. 7, in float64; log 2 where the policy is the reference.

    Args:
        chosen_log_ratios: (P,) Δs of each chosen response.
        rejected_log_ratios: (P,) Δs of each rejected response.
    """
    return -F.logsigmoid(beta * (chosen_log_ratios.double() - rejected_log_ratios.double()))


@dataclass(frozen=True, kw_only=True)
class Dpo(ReferencePairObjective):
    name: ClassVar[str] = "dpo"

    beta: float = 0.1

    def loss(self, chosen_P: torch.Tensor, rejected_P: torch.Tensor, scores: Scores) -> torch.Tensor:
        return dpo_loss(chosen_P, rejected_P, self.beta)
