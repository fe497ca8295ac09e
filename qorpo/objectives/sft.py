"""Supervised fine-tuning: the negative log-likelihood alone (arXiv 2403.07691, Eqs. 2-3). Legend: P groups."""

from dataclasses import dataclass
from typing import ClassVar

from qorpo.objectives.base import ObjectiveOutput, Plain, Scores, Totals, WithNll


@dataclass(frozen=True, kw_only=True)
class Sft(WithNll, Plain):
    """The first response's NLL. Of a pair only chosen is read; rejected is not computed."""

    name: ClassVar[str] = "sft"
    responses: ClassVar[int] = 1
    metrics: ClassVar[tuple[str, ...]] = ("loss", "nll", "chosen_logps")
    charts: ClassVar[tuple[tuple[str, ...], ...]] = (("loss",), ("chosen_logps",))

    def __call__(self, scores: Scores, totals: Totals) -> ObjectiveOutput:
        nll_P = self.nll(scores, totals)
        metrics = {"loss": nll_P, "nll": nll_P, "chosen_logps": scores.averages[:, 0]}
        return ObjectiveOutput(nll_P.sum(), {name: value.detach() for name, value in metrics.items()})
