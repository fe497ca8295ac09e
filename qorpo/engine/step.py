"""A step's pairs -> micro-batches -> gradient: the batch is a promise, the micro-batch a detail.

Loss and gradient are those of the whole step, whatever the split: pairs are averaged over the step's pairs, and
token-averaged terms over the step's tokens, both counted before the first backward. Legend: P pairs, S scored tokens.
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from qorpo.data.pack import PackedPairs, moved, pack_pairs, row_tokens, split_by_budget
from qorpo.data.tokenize import TokenizedPair
from qorpo.engine.distributed import Ranks
from qorpo.objectives.orpo import ObjectiveOutput, orpo_loss
from qorpo.recipe import ObjectiveRecipe

logger = logging.getLogger(__name__)
T = TypeVar("T")
ALONE = Ranks()


class StepTooLargeError(Exception):
    """Memory ran out although each micro-batch that is as long as any held one pair."""


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
    ranks: Ranks = ALONE,
) -> dict[str, torch.Tensor]:
    """Means over `pairs` of every metric of the objective, as tensors on the device (no synchronisation).

    Several ranks are given the same pairs, and each scores its share of them.

    Args:
        scorer: PackedPairs -> (S,) log-probs, a `PairScorer` or what accelerate made of one.
        microbatch_tokens: most tokens a row; a longer pair has a row of its own.
        backward: called with each micro-batch's share of the step's loss; the shares add up to it. None: score only.
    """
    totals = StepTotals.of(pairs, objective)
    sums: dict[str, torch.Tensor] = {}
    rows = ranks.micro_batches(pairs, microbatch_tokens)
    # Nothing here waits for the device, so a row is packed and copied while it computes those before.
    for number, row in enumerate(rows, start=1):
        # A rank with nothing left scores the least there is, for nothing: the others need it.
        packed = pack_pairs(row or [_least(pairs)], score_prompts=objective.nll_tokens == "all").to(device)
        # Gradients are averaged over ranks.
        weight = ranks.count / totals.pairs if row else 0.0
        with contextlib.nullcontext() if number == len(rows) else ranks.keep_gradients():
            output = pair_losses(scorer(packed), packed, objective, totals)
            if backward is not None:
                backward(output.loss * weight)
        for name, value_P in output.metrics.items():
            sums[name] = sums.get(name, 0.0) + value_P.sum() * bool(row)
    return {name: value / totals.pairs for name, value in ranks.summed(sums).items()}


def _least(pairs: Sequence[TokenizedPair]) -> TokenizedPair:
    token = pairs[0].prompt_ids[:1]
    return TokenizedPair(token, token, token, "idle")


def within_memory(
    attempt: Callable[[int], T],
    pairs: Sequence[TokenizedPair],
    microbatch_tokens: int,
    undo: Callable[[], None] = lambda: None,
) -> tuple[T, int]:
    """`attempt(microbatch_tokens)`, and for as long as memory runs out in it, the whole again with half the tokens.

    Args:
        attempt: what scores all of `pairs` in micro-batches of at most so many tokens.
        undo: takes back what a broken attempt left, such as gradients of its first micro-batches.

    Returns:
        What `attempt` gave, and the tokens with which it succeeded.

    Raises:
        StepTooLargeError: where smaller micro-batches would be no smaller, since the longest pair alone is as long.
    """
    longest_pair = max(map(row_tokens, pairs))
    while True:
        try:
            return attempt(microbatch_tokens), microbatch_tokens
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            shortage = str(error).splitlines()[0]
        # Out of the except clause, whose traceback holds the broken attempt's tensors.
        undo()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        rows = split_by_budget(pairs, microbatch_tokens)
        longest_row = max(sum(map(row_tokens, row)) for row in rows)
        if longest_row == longest_pair:
            raise StepTooLargeError(shortage)
        smaller = max(longest_row // 2, longest_pair)
        logger.warning(
            "out of memory in micro-batches of %d tokens (%s); the step is done again in micro-batches of %d",
            longest_row, shortage, smaller,
        )  # fmt: skip
        microbatch_tokens = smaller


def pair_losses(
    token_logps_S: torch.Tensor, packed: PackedPairs, objective: ObjectiveRecipe, totals: StepTotals
) -> ObjectiveOutput:
    """The objective of a micro-batch's pairs, summed; divided by `totals.pairs` it is their share of the step's."""
    lengths_P3 = moved(torch.tensor(packed.lengths, dtype=torch.float64), token_logps_S.device)
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
