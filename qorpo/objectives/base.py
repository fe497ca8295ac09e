"""What an objective is given, what it gives back, and what the step must know of it.

Legend: P groups, N responses a group (1 for sft and kto, 2 for pairs, K where answers are sampled), M = 1 + N parts
with the prompt, S scored tokens.

A step is many micro-batches, on one rank or several. Its counts are known before the first of them (`Totals`). An
objective sums its loss over a micro-batch's groups; that sum divided by `totals.groups` is the micro-batch's share of
the step's loss, and the shares of all micro-batches on all ranks add up to it, however the step was split.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch

NllTokens = Literal["response", "all"]
NllAverage = Literal["sequence", "token"]


class Scores(NamedTuple):
    """A micro-batch's log-probabilities, summed over the tokens of each part. All float64."""

    logps_PN: torch.Tensor  # (P, N) sum of log-probs of each response; chosen before rejected
    tokens_PN: torch.Tensor  # (P, N) tokens of each response
    prompt_logps_P: torch.Tensor  # (P,) the same of the prompt's tokens after its first; 0 where not scored
    prompt_tokens_P: torch.Tensor  # (P,) tokens of each prompt that can be scored: all but the first
    reference_logps_PN: torch.Tensor | None = None  # (P, N) `logps_PN` of the model as it started
    margins_P: torch.Tensor | None = (
        None  # (P,) score of chosen minus that of rejected, where the data has scores
    )
    desirable_P: torch.Tensor | None = None  # (P,) bool, of rows with a single labelled answer

    @classmethod
    def of_tokens(
        cls,
        token_logps_S: torch.Tensor,
        segments_S: torch.Tensor,
        lengths_PM: torch.Tensor,
        reference_logps_PN: torch.Tensor | None = None,
        margins_P: torch.Tensor | None = None,
        desirable_P: torch.Tensor | None = None,
    ) -> "Scores":
        """Sum the scored tokens of a packed row.

        Args:
            segments_S: int64, the part that each token belongs to: M · group + 0 for the prompt, 1 … N for the
                responses.
            lengths_PM: (P, M) float64, tokens of each prompt and each response.
        """
        sums_PM = torch.zeros(lengths_PM.numel(), dtype=torch.float64, device=token_logps_S.device)
        sums_PM = sums_PM.index_add(0, segments_S, token_logps_S.double()).view_as(lengths_PM)
        return cls(
            sums_PM[:, 1:], lengths_PM[:, 1:], sums_PM[:, 0], lengths_PM[:, 0] - 1,
            reference_logps_PN, margins_P, desirable_P,
        )  # fmt: skip

    @property
    def averages(self) -> torch.Tensor:
        """Average log-probability a token of each response."""
        return self.logps_PN / self.tokens_PN

    @property
    def log_ratios(self) -> torch.Tensor:
        """log π(y|x) − log π_ref(y|x) of each response."""
        assert self.reference_logps_PN is not None, "scored without the reference that the objective needs"
        return self.logps_PN - self.reference_logps_PN


class Totals(NamedTuple):
    """What a step's means are taken over, on all ranks together."""

    groups: int
    nll_tokens: int  # tokens whose negative log-likelihood is learned; 0 where none is
    kl: torch.Tensor | float = 0.0  # kto's z₀: see `Objective.needs_kl`


class ObjectiveOutput(NamedTuple):
    loss: torch.Tensor  # a scalar, or (P,) for reduction "none"; the only entry with a gradient
    metrics: dict[str, torch.Tensor]  # (P,) each, detached; their means over the step's groups are the step's


class Headline(NamedTuple):
    """The metric that says how good a model is: it chooses the best checkpoint, and the run's end speaks of it."""

    metric: str = "loss"
    lower_is_better: bool = True

    def is_better(self, value: float, best: float | None) -> bool:
        return best is None or (value < best if self.lower_is_better else value > best)


class Objective(Protocol):
    """A loss with its normalisation and its metrics. The step calls `totals` once, then the objective a micro-batch."""

    @property
    def name(self) -> str:
        """As in the recipe's objective.name."""

    @property
    def responses(self) -> int:
        """How many responses of a group it reads, the first ones; the others are not computed."""

    @property
    def scores_prompts(self) -> bool:
        """Whether the prompt's tokens are scored too."""

    @property
    def needs_reference(self) -> bool:
        """Whether `Scores.reference_logps_PN` must be there."""

    @property
    def needs_kl(self) -> bool:
        """Whether `Totals.kl` must be there: the step's mean log ratio (policy to reference) of answers that belong to
        other prompts, at least 0, scored without gradient before the step's first backward."""

    @property
    def needs_margins(self) -> bool:
        """Whether `Scores.margins_P` must be there."""

    @property
    def needs_labels(self) -> bool:
        """Whether `Scores.desirable_P` must be there: it learns from answers of which each is good or bad by itself."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """The names in its output's metrics."""

    @property
    def headline(self) -> Headline: ...

    @property
    def charts(self) -> tuple[tuple[str, ...], ...]:
        """What a report of a run draws: metrics that belong in one chart."""

    def totals(self, lengths: Sequence[Sequence[int]]) -> Totals:
        """What the step's means are taken over, of all the step's groups: (prompt, response 1, … N) tokens of each."""

    def __call__(self, scores: Scores, totals: Totals) -> ObjectiveOutput:
        """Of a micro-batch: the loss summed over its groups, in units of the step's mean over `totals.groups`."""


PAIR_METRICS = ("chosen_logps", "rejected_logps", "rewards/accuracies", "rewards/margins")
PAIR_CHARTS = (
    ("loss",),
    ("chosen_logps", "rejected_logps"),
    ("rewards/margins",),
    ("rewards/accuracies",),
)


class Plain:
    """What most objectives do without, and their headline."""

    needs_reference: ClassVar[bool] = False
    needs_kl: ClassVar[bool] = False
    needs_margins: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    headline: ClassVar[Headline] = Headline()


@dataclass(frozen=True, kw_only=True)
class PairObjective(Plain):
    """What objectives of chosen and rejected have in common."""

    name: ClassVar[str]
    responses: ClassVar[int] = 2
    metrics: ClassVar[tuple[str, ...]] = ("loss", *PAIR_METRICS)
    charts: ClassVar[tuple[tuple[str, ...], ...]] = PAIR_CHARTS

    @property
    def scores_prompts(self) -> bool:
        return False

    def totals(self, lengths: Sequence[Sequence[int]]) -> Totals:
        return Totals(len(lengths), 0)


@dataclass(frozen=True, kw_only=True)
class WithNll:
    """Objectives that learn the first response's negative log-likelihood; two keys say over what it is averaged."""

    nll_tokens: NllTokens = "response"  # or all: the prompt's tokens too, from the second on
    nll_average: NllAverage = (
        "sequence"  # each sequence's mean, then over groups; or token: over the step's tokens
    )

    @property
    def scores_prompts(self) -> bool:
        return self.nll_tokens == "all"

    def totals(self, lengths: Sequence[Sequence[int]]) -> Totals:
        # A sequence's first token has nothing before it that could predict it.
        prompt_tokens = sum(prompt - 1 for prompt, *_ in lengths) if self.scores_prompts else 0
        return Totals(len(lengths), prompt_tokens + sum(response for _, response, *_ in lengths))

    def nll(self, scores: Scores, totals: Totals) -> torch.Tensor:
        """(P,) whose mean over the step's groups is the step's NLL, by sequence or by token (Eqs. 2-3 of ORPO)."""
        nll_P, tokens_P = -scores.logps_PN[:, 0], scores.tokens_PN[:, 0]
        if self.scores_prompts:
            nll_P, tokens_P = nll_P - scores.prompt_logps_P, tokens_P + scores.prompt_tokens_P
        if self.nll_average == "sequence":
            return nll_P / tokens_P
        return nll_P * (totals.groups / totals.nll_tokens)


def pair_output(
    scores: Scores, loss_P: torch.Tensor, rewards_PN: torch.Tensor, **others: torch.Tensor
) -> ObjectiveOutput:
    """The loss summed over pairs, with the metrics that every objective of pairs has.

    Args:
        rewards_PN: (P, 2) how the objective values chosen and rejected.
        others: (P,) each, metrics of its own.
    """
    averages = scores.averages
    margin_P = rewards_PN[:, 0] - rewards_PN[:, 1]
    metrics = {
        "loss": loss_P,
        **others,
        "chosen_logps": averages[:, 0],
        "rejected_logps": averages[:, 1],
        "rewards/accuracies": (margin_P > 0).double(),
        "rewards/margins": margin_P,
    }
    return ObjectiveOutput(loss_P.sum(), {name: value.detach() for name, value in metrics.items()})
