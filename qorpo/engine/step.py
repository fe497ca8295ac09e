"""A step's pairs -> micro-batches -> gradient: the batch is a promise, the micro-batch a detail.

Loss and gradient are those of the whole step, whatever the split: the objective counts what its means are taken over
(pairs, tokens) before the first backward. Legend: P pairs, M parts of a pair (prompt, chosen, rejected), S scored tokens.
"""

import contextlib
import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from qorpo.data.pack import PackedPairs, lengths_of, moved, pack_pairs, row_tokens, split_by_budget
from qorpo.data.tokenize import TokenizedPair
from qorpo.engine.distributed import Ranks
from qorpo.objectives.base import Objective, Scores

logger = logging.getLogger(__name__)
T = TypeVar("T")
ALONE = Ranks()


class StepTooLargeError(Exception):
    """Memory ran out although each micro-batch that is as long as any held one pair."""


def run_step(
    scorer: Callable[[PackedPairs], torch.Tensor],
    pairs: Sequence[TokenizedPair],
    objective: Objective,
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
    totals = objective.totals([lengths_of(pair) for pair in pairs])
    sums: dict[str, torch.Tensor] = {}
    rows = ranks.micro_batches(pairs, microbatch_tokens)
    # Nothing here waits for the device, so a row is packed and copied while it computes those before.
    for number, row in enumerate(rows, start=1):
        # A rank with nothing left scores the least there is, for nothing: the others need it.
        packed = pack_pairs(row or [_least(pairs)], score_prompts=objective.scores_prompts).to(device)
        # Gradients are averaged over ranks.
        weight = ranks.count / totals.groups if row else 0.0
        with contextlib.nullcontext() if number == len(rows) else ranks.keep_gradients():
            output = objective(scores_of(scorer(packed), packed), totals)
            if backward is not None:
                backward(output.loss * weight)
        for name, value_P in output.metrics.items():
            sums[name] = sums.get(name, 0.0) + value_P.sum() * bool(row)
    return {name: value / totals.groups for name, value in ranks.summed(sums).items()}


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


def scores_of(token_logps_S: torch.Tensor, packed: PackedPairs) -> Scores:
    """Log-probs of a packed row's tokens, summed over each prompt and each response."""
    lengths_PM = moved(torch.tensor(packed.lengths, dtype=torch.float64), token_logps_S.device)
    return Scores.of_tokens(token_logps_S, packed.sides, lengths_PM)
