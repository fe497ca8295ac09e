"""The slow plain twin of packed scoring: each sequence of a packed row by itself. Legend: S scored tokens, L of a sequence."""

from collections.abc import Iterator
from typing import Any

import torch

from qorpo.data.pack import PackedGroups


def own_logps(model: Any, packed: PackedGroups) -> torch.Tensor:
    """(S,) log-probs by the plainest way there is: the model's own logits of each sequence alone."""
    logps = []
    for ids_1T, predictors, targets in sequences(packed):
        logits = model(input_ids=ids_1T, use_cache=False).logits[0, predictors]
        wide = torch.promote_types(logits.dtype, torch.float32)
        logps.append(logits.to(wide).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1))
    return torch.cat(logps)


def sequences(packed: PackedGroups) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each sequence by itself: its ids (1, L), and the places and targets that are scored in it.

    One a response, after its prompt; in this order the scored tokens are those of `packed`.
    """
    segments = iter(packed.input_ids[0].split([tokens for lengths in packed.lengths for tokens in lengths]))
    predictors = packed.position_ids[0].index_select(0, packed.predictors)  # a place in the sequence alone
    start = 0
    for in_prompt, first, *others in packed.scored:
        prompt = next(segments)
        for count in (in_prompt + first, *others):
            mine = slice(start, start + count)
            yield torch.cat([prompt, next(segments)])[None], predictors[mine], packed.targets[mine]
            start += count
