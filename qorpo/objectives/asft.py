"""Aligned supervised fine-tuning (Wang, Sun, Hua, Fang 2024, arXiv 2409.10571). Legend: P pairs.

Not to be confused with anchored supervised fine-tuning (arXiv 2509.23753), which is called ASFT too.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from qorpo.objectives.base import (
    PAIR_METRICS,
    ObjectiveOutput,
    PairObjective,
    Scores,
    Totals,
    WithNll,
    pair_output,
)
from qorpo.ops.numerics import LARGEST_LOGP, log1mexp


def asft_loss(chosen_logps: torch.Tensor, rejected_logps: torch.Tensor) -> torch.Tensor:
    """(P,) −log σ(log odds(y_w)) − log σ(−log odds(y_l)), in float64, finite in value and gradient up to and at 0.

    Since σ(log odds) = P, this is −log P(y_w) − log(1 − P(y_l)), and so it is computed (arXiv 2502.01237, Sec. 2.4 and
    App. C, which writes down the loss and proves the equality): the whole loss is (1 + λ) nll − λ log(1 − P(y_l)) where
    the nll is the response's average. P is of the average log-likelihood, as in ORPO.

    Args:
        chosen_logps: (P,) average log-likelihood a token of each chosen response.
        rejected_logps: (P,) the same of each rejected response, clamped to −1e-12.
    """
    return -chosen_logps.double() - log1mexp(rejected_logps.double().clamp(max=LARGEST_LOGP))


@dataclass(frozen=True, kw_only=True)
class Asft(WithNll, PairObjective):
    """nll + λ · `asft_loss`."""

    name: ClassVar[str] = "asft"
    metrics: ClassVar[tuple[str, ...]] = ("loss", "nll", "asft_loss", *PAIR_METRICS)

    weight: float = 0.1  # λ

    def __call__(self, scores: Scores, totals: Totals) -> ObjectiveOutput:
        nll_P = self.nll(scores, totals)
        chosen_P, rejected_P = scores.averages.unbind(1)
        asft_loss_P = asft_loss(chosen_P, rejected_P)
        loss_P = nll_P + self.weight * asft_loss_P
        return pair_output(scores, loss_P, self.weight * scores.averages, nll=nll_P, asft_loss=asft_loss_P)
