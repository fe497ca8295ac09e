"""A step's pairs -> micro-batches -> gradient: the batch is a promise, the micro-batch a detail.

Loss and gradient are those of the whole step, whatever the split: pairs are averaged over the step's pairs, and
token-averaged terms over the step's tokens, both counted before the first backward. Legend: P pairs, S scored tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from qorpo.data.pack import PackedPairs, pack_pairs, row_tokens, split_by_budget
from qorpo.data.tokenize import TokenizedPair
from qorpo.objectives.orpo import ObjectiveOutput, orpo_loss
from qorpo.recipe import ObjectiveRecipe


@dataclass(frozen=True, slots=True)
class StepTotals:
    """What a step's means are taken over."""

    pairs: int
    nll_tokens: int  # the tokens whose negative log-likelihood is learned
    row_tokens: int  # the tokens computed, each prompt once

    @classmethod
    def of(cls, pairs: Sequence[TokenizedPair], objective: ObjectiveRecipe) -> "StepTotals":
        # A sequence's first token has nothing before it that could predict it.
        prompt_tokens = (
            sum(len(pair.prompt_ids) - 1 for pair in pairs) if objective.nll_tokens == "all" else 0
        )
        return cls(
            pairs=len(pairs),
            nll_tokens=prompt_tokens + sum(len(pair.chosen_ids) for pair in pairs),
            row_tokens=sum(map(row_tokens, pairs)),
        )


def run_step(
    scorer: Callable[[PackedPairs], torch.Tensor],
    pairs: Sequence[TokenizedPair],
    objective: ObjectiveRecipe,
    *,
    microbatch_tokens: int,
    device: torch.device,
    backward: Callable[[torch.Tensor], None] | None = None,
) -> dict[str, torch.Tensor]:
    """Means over `pairs` of every metric of the objective, as tensors on the device (no synchronisation).

    Args:
        scorer: PackedPairs -> (S,) log-probs, a `PairScorer` or what accelerate made of one.
        microbatch_tokens: most tokens a row; a longer pair has a row of its own.
        backward: called with each micro-batch's share of the step's loss; the shares add up to it. None: score only.
    """
    totals = StepTotals.of(pairs, objective)
    sums: dict[str, torch.Tensor] = {}
    for micro_batch in split_by_budget(pairs, microbatch_tokens):
        packed = pack_pairs(micro_batch, score_prompts=objective.nll_tokens == "all").to(device)
        output = pair_losses(scorer(packed), packed, objective, totals)
        if backward is not None:
            backward(output.loss / totals.pairs)
        for name, value_P in output.metrics.items():
            sums[name] = sums.get(name, 0.0) + value_P.sum()
    return {name: value / totals.pairs for name, value in sums.items()}


def pair_losses(
    token_logps_S: torch.Tensor, packed: PackedPairs, objective: ObjectiveRecipe, totals: StepTotals
) -> ObjectiveOutput:
    """The objective of a micro-batch's pairs, summed; divided by `totals.pairs` it is their share of the step's."""
    lengths_P3 = torch.tensor(packed.lengths, dtype=torch.float64).to(token_logps_S.device, non_blocking=True)
    sums_P3 = torch.zeros(lengths_P3.numel(), dtype=torch.float64, device=token_logps_S.device)
    sums_P3 = sums_P3.index_add(0, packed.sides, token_logps_S.double()).view_as(lengths_P3)
    prompt_P, chosen_P, rejected_P = sums_P3.unbind(1)
    num_prompt_P, num_chosen_P, num_rejected_P = lengths_P3.unbind(1)

    nll_P, num_nll_P = -chosen_P, num_chosen_P  # Eqs. 2-3
    if objective.nll_tokens == "all":
        nll_P, num_nll_P = nll_P - prompt_P, num_nll_P + num_prompt_P - 1
    # Either way the mean of nll_P over the step's pairs is the step's NLL.
    nll_P = (
        nll_P / num_nll_P
        if objective.nll_average == "sequence"
        else nll_P * (totals.pairs / totals.nll_tokens)
    )
    return orpo_loss(
        chosen_P / num_chosen_P, rejected_P / num_rejected_P, nll_P, weight=objective.weight, reduction="sum"
    )
