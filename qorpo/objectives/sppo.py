"""Self-play preference optimization (Wu et al. 2024, arXiv 2405.00675). Legend: P pairs, Δs as in dpo.py."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qorpo.objectives.base import Scores
from qorpo.objectives.dpo import ReferencePairObjective


def sppo_loss(
    chosen_log_ratios: torch.Tensor, rejected_log_ratios: torch.Tensor, beta: float = 0.001
) -> torch.Tensor:
    """(P,) ½ [(Δs_w − ½/β)² + (Δs_l + ½/β)²], in float64.

    Eq. 4.7 of the paper is the mean of (Δs − η (p − ½))² over responses, η = 1/β and p the probability that the
    response beats the policy; here p is 1 for chosen and 0 for rejected. The authors' code halves the sum of the two,
    as here. TRL's `sppo_hard` doesn't, so its loss is twice this one.

    Args:
        chosen_log_ratios: (P,) Δs of each chosen response.
        rejected_log_ratios: (P,) Δs of each rejected response.
    """
    target = 0.5 / beta
    return ((chosen_log_ratios.double() - target) ** 2 + (rejected_log_ratios.double() + target) ** 2) / 2


@dataclass(frozen=True, kw_only=True)
class Sppo(ReferencePairObjective):
    name: ClassVar[str] = "sppo"

    beta: float = 0.001

    def loss(self, chosen_P: torch.Tensor, rejected_P: torch.Tensor, scores: Scores) -> torch.Tensor:
        return sppo_loss(chosen_P, rejected_P, self.beta)
