"""Identity preference optimization (Azar et al. 2023, arXiv 2310.12036). Legend: P pairs, Δs as in dpo.py."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qorpo.objectives.base import Scores
from qorpo.objectives.dpo import ReferencePairObjective


def ipo_loss(
    chosen_log_ratios: torch.Tensor, rejected_log_ratios: torch.Tensor, beta: float = 0.1
) -> torch.Tensor:
    """(P,) (Δa_w − Δa_l − 1 / (2β))², Eq. 17 with β for the paper's τ, in float64.

    The paper has the sums Δs. TRL divides each by its response's tokens, which its authors report to have confirmed
    with the paper's: so does qorpo.

    Args:
        chosen_log_ratios: (P,) Δs of each chosen response divided by its tokens, Δa.
        rejected_log_ratios: (P,) the same of each rejected response.
    """
    return (chosen_log_ratios.double() - rejected_log_ratios.double() - 1 / (2 * beta)) ** 2


@dataclass(frozen=True, kw_only=True)
class Ipo(ReferencePairObjective):
    name: ClassVar[str] = "ipo"

    beta: float = 0.1

    def loss(self, chosen_P: torch.Tensor, rejected_P: torch.Tensor, scores: Scores) -> torch.Tensor:
        return ipo_loss(chosen_P / scores.tokens_PN[:, 0], rejected_P / scores.tokens_PN[:, 1], self.beta)
