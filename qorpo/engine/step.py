"""A step's groups -> micro-batches -> gradient: the batch is a promise, the micro-batch a detail.

Loss and gradient are those of the whole step, whatever the split: the objective counts what its means are taken over
(groups, tokens) before the first backward. Legend: P groups, M segments of a group (prompt, responses), S scored tokens.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from qorpo.data.groups import Group, row_tokens
from qorpo.data.pack import PackedGroups, moved, pack_groups
from qorpo.engine.distributed import Ranks
from qorpo.objectives.base import Objective, Scores, Totals

ALONE = Ranks()


def run_step(
    scorer: Callable[[PackedGroups], torch.Tensor],
    groups: Sequence[Group],
    objective: Objective,
    *,
    microbatch_tokens: int,
    device: torch.device,
    backward: Callable[[torch.Tensor], None] | None = None,
    ranks: Ranks = ALONE,
) -> dict[str, torch.Tensor]:
    """Means over `groups` of every metric of the objective, as tensors on the device (no synchronisation).

    Several ranks are given the same groups, and each scores its share of them.

    Args:
        scorer: PackedGroups -> (S,) log-probs, a `Scorer`, or what accelerate made of one.
        microbatch_tokens: most tokens a row; a longer group has a row of its own.
        backward: called with each micro-batch's share of the step's loss; the shares add up to it. None: score only.
    """
    options: dict[str, Any] = {"microbatch_tokens": microbatch_tokens, "device": device, "ranks": ranks}
    totals = _totals_of(objective, scorer, groups, options)
    sums: dict[str, torch.Tensor] = {}
    rows = ranks.micro_batches(groups, microbatch_tokens)
    # Nothing here waits for the device, so a row is packed and copied while it computes those before.
    for number, row in enumerate(rows, start=1):
        # A rank without pairs scores a dummy row with weight 0: a sharded forward needs every rank.
        packed = pack_groups(row or [_least(groups)], score_prompts=objective.scores_prompts).to(device)
        # Gradients are averaged over ranks.
        weight = ranks.count / totals.groups if row else 0.0
        with contextlib.nullcontext() if number == len(rows) else ranks.keep_gradients():
            output = objective(scores_of(scorer(packed), packed), totals)
            if backward is not None:
                backward(output.loss * weight)
        for name, value_P in output.metrics.items():
            sums[name] = sums.get(name, 0.0) + value_P.sum() * bool(row)
    return {name: value / totals.groups for name, value in ranks.summed(sums).items()}


@torch.no_grad()
def score_groups(
    scorer: Callable[[PackedGroups], torch.Tensor],
    groups: Sequence[Group],
    objective: Objective,
    *,
    microbatch_tokens: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> dict[str, torch.Tensor]:
    """(P,) float64 on the host of every metric of the objective: each group's own, in the order of `groups`.

    Their means are what `run_step` gives. The scorer is taken as it is: put the model into eval mode before. Several
    ranks are given the same groups, score a share each, and all get all.
    """
    groups = list(groups)
    options: dict[str, Any] = {"microbatch_tokens": microbatch_tokens, "device": device, "ranks": ranks}
    totals = _totals_of(objective, scorer, groups, options)
    found = {name: torch.zeros(len(groups), dtype=torch.float64, device=device) for name in objective.metrics}
    places = range(len(groups))
    for row in ranks.micro_batches(places, microbatch_tokens, lambda place: row_tokens(groups[place])):
        own = [groups[place] for place in row] or [_least(groups)]
        packed = pack_groups(own, score_prompts=objective.scores_prompts).to(device)
        metrics = objective(scores_of(scorer(packed), packed), totals).metrics
        if row:
            at = moved(torch.tensor(row), device)
            for name, values_P in found.items():
                values_P[at] = metrics[name]
    return {name: values_P.cpu() for name, values_P in ranks.summed(found).items()}


@torch.no_grad()
def summed_logps(
    scorer: Callable[[PackedGroups], torch.Tensor],
    groups: Sequence[Group],
    *,
    microbatch_tokens: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> torch.Tensor:
    """(P, N) float64 on the device: the sum of each response's log-probs, in the order of `groups`.

    Several ranks are given the same groups, score a share each, and all get all. The scorer is taken as it is.
    """
    found_PN = torch.zeros(len(groups), len(groups[0].responses), dtype=torch.float64, device=device)
    places = range(len(groups))
    for row in ranks.micro_batches(places, microbatch_tokens, lambda place: row_tokens(groups[place])):
        packed = pack_groups([groups[place] for place in row] or [_least(groups)]).to(device)
        logps_PN = scores_of(scorer(packed), packed).logps_PN
        if row:
            found_PN[moved(torch.tensor(row), device)] = logps_PN
    return ranks.summed({"logps": found_PN})["logps"]


def kl_estimate(
    scorer: Callable[[PackedGroups], torch.Tensor], groups: Sequence[Group], **options: Any
) -> torch.Tensor:
    """kto's z₀ of a step's groups, on the device: the mean of log π(y'|x) − log π_ref(y'|x), at least 0, where y' is an
    answer to another prompt (`Group.mismatched`). Options are those of `summed_logps`."""
    others = [group.mismatched for group in groups if group.mismatched is not None]
    assert len(others) == len(groups), "scored without the mismatched answers that the objective needs"
    reference_PN = torch.tensor([each.reference_logps for each in others], dtype=torch.float64)
    ratios_PN = summed_logps(scorer, others, **options) - moved(reference_PN, options["device"])
    return ratios_PN.mean().clamp(min=0)


def _totals_of(
    objective: Objective,
    scorer: Callable[[PackedGroups], torch.Tensor],
    groups: Sequence[Group],
    options: dict[str, Any],
) -> Totals:
    totals = objective.totals([group.learned_lengths for group in groups])
    return totals._replace(kl=kl_estimate(scorer, groups, **options)) if objective.needs_kl else totals


def _least(groups: Sequence[Group]) -> Group:
    """A group of one token a part, for a rank that has none; it holds what the others hold."""
    token = groups[0].prompt_ids[:1]
    responses = (token,) * len(groups[0].responses)
    return replace(groups[0], prompt_ids=token, responses=responses, source="idle", unscored=())


def scores_of(token_logps_S: torch.Tensor, packed: PackedGroups) -> Scores:
    """Log-probs of a packed row's tokens, summed over each prompt and each response."""
    learned = [
        (prompt, *scored) for (prompt, *_), (_, *scored) in zip(packed.lengths, packed.scored, strict=True)
    ]
    lengths_PM = moved(torch.tensor(learned, dtype=torch.float64), token_logps_S.device)
    return Scores.of_tokens(
        token_logps_S, packed.segments, lengths_PM, packed.reference_logps, packed.margins, packed.desirable
    )
