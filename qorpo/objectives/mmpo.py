"""Margin matching preference optimization (Kim et al. 2024, arXiv 2410.03145). Legend: P pairs, Δs as in dpo.py."""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from qorpo.objectives.base import Scores
from qorpo.objectives.dpo import ReferencePairObjective


def mmpo_loss(
    chosen_log_ratios: torch.Tensor,
    rejected_log_ratios: torch.Tensor,
    margins: torch.Tensor,
    beta: float = 0.01,
    gamma: float = 2.2,
) -> torch.Tensor:
    """(P,) −p log σ(βδ) − (1 − p) log σ(−βδ), δ = Δs_w − Δs_l, in float64: DPO with a soft target p = σ(γ · margin).

    The authors' code is the same, γ named bt_beta there. The defaults are theirs for UltraFeedback's scores, Gemma-2B
    and Llama-3-8B; Gemma-7B has γ 0.3, and 1.1 on SHP. γ depends on the scale of the data's scores.

    Args:
        chosen_log_ratios: (P,) Δs of each chosen response.
        rejected_log_ratios: (P,) Δs of each rejected response.
        margins: (P,) score of chosen minus score of rejected.
    """
    logits_P = beta * (chosen_log_ratios.double() - rejected_log_ratios.double())
    scaled_P = gamma * margins.double()
    # σ(−x) for 1 − σ(x), which loses its digits where p is near 1.
    return -scaled_P.sigmoid() * F.logsigmoid(logits_P) - (-scaled_P).sigmoid() * F.logsigmoid(-logits_P)


@dataclass(frozen=True, kw_only=True)
class Mmpo(ReferencePairObjective):
    """`mmpo_loss`; `Scores.margins_P` must be there."""

    name: ClassVar[str] = "mmpo"
    needs_margins: ClassVar[bool] = True

    beta: float = 0.01
    gamma: float = 2.2

    def loss(self, chosen_P: torch.Tensor, rejected_P: torch.Tensor, scores: Scores) -> torch.Tensor:
        assert scores.margins_P is not None, "scored without the margins that mmpo needs"
        return mmpo_loss(chosen_P, rejected_P, scores.margins_P, self.beta, self.gamma)
