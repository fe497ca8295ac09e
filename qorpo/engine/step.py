"""A step's pairs -> micro-batches -> gradient: the batch is a promise, the micro-batch a detail.

Loss and gradient are those of the whole step, whatever the split: the objective counts what its means are taken over
(pairs, tokens) before the first backward. Legend: P pairs, M parts of a pair (prompt, chosen, rejected), S scored tokens.
"""

import contextlib
from collections.abc import Callable, Sequence

import torch

from qorpo.data.pack import PackedPairs, lengths_of, moved, pack_pairs
from qorpo.data.tokenize import TokenizedPair
from qorpo.engine.distributed import Ranks
from qorpo.objectives.base import Objective, Scores

ALONE = Ranks()


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


def scores_of(token_logps_S: torch.Tensor, packed: PackedPairs) -> Scores:
    """Log-probs of a packed row's tokens, summed over each prompt and each response."""
    lengths_PM = moved(torch.tensor(packed.lengths, dtype=torch.float64), token_logps_S.device)
    return Scores.of_tokens(token_logps_S, packed.sides, lengths_PM)
