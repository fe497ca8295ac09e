"""Tokenized pairs laid in one row, each prompt once: [prompt][chosen][rejected], pair after pair, no padding.

Legend: T tokens of the row, S scored tokens, P pairs. Rejected's positions continue from the prompt's end, and the
prompt's last token predicts the first token of both responses. What may attend to what is `model/attention.py`'s.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from qorpo.data.tokenize import TokenizedPair


class PairLengths(NamedTuple):
    """Token counts of one pair in the row."""

    prompt: int
    chosen: int
    rejected: int


@dataclass(frozen=True, slots=True)
class PackedPairs:
    """A micro-batch. Scored tokens come pair by pair: prompt's (where asked for), chosen's, rejected's."""

    input_ids: torch.Tensor  # (1, T) int64
    position_ids: torch.Tensor  # (1, T) int64, from 0 in each sequence
    predictors: torch.Tensor  # (S,) int64: the place in the row whose hidden state predicts the scored token
    targets: torch.Tensor  # (S,) int64: the scored token
    sides: torch.Tensor  # (S,) int64: 3·pair + 0 for its prompt, 1 for chosen, 2 for rejected
    lengths: tuple[PairLengths, ...]  # P of them
    scores_prompts: bool

    def to(self, device: torch.device) -> "PackedPairs":
        names = ("input_ids", "position_ids", "predictors", "targets", "sides")
        tensors: dict[str, Any] = {name: moved(getattr(self, name), device) for name in names}
        return replace(self, **tensors)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`. The host doesn't wait, and pinned memory is copied beside what a GPU computes."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # kept by PyTorch until the copy is done
    return tensor.to(device, non_blocking=True)


def lengths_of(pair: TokenizedPair) -> PairLengths:
    return PairLengths(len(pair.prompt_ids), len(pair.chosen_ids), len(pair.rejected_ids))


def row_tokens(pair: TokenizedPair) -> int:
    """Tokens that a pair takes in a packed row."""
    return sum(lengths_of(pair))


def pack_pairs(pairs: Sequence[TokenizedPair], *, score_prompts: bool = False) -> PackedPairs:
    """Lay pairs in one row.

    Args:
        pairs: at least one; every prompt and response holds at least one token.
        score_prompts: also score the prompt's tokens from its second on (`nll_tokens: all`).
    """
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    sides: list[int] = []
    lengths: list[PairLengths] = []

    def score(predicted_by: range | list[int], tokens: Sequence[int], side: int) -> None:
        predictors.extend(predicted_by)
        targets.extend(tokens)
        sides.extend([side] * len(tokens))

    for index, pair in enumerate(pairs):
        lengths.append(lengths_of(pair))
        num_prompt, num_chosen, num_rejected = lengths[-1]
        assert min(lengths[-1]) > 0, f"{pair.source}: an empty prompt or response reached packing"
        start = len(ids)
        ids += [*pair.prompt_ids, *pair.chosen_ids, *pair.rejected_ids]
        positions += [*range(num_prompt + num_chosen), *range(num_prompt, num_prompt + num_rejected)]

        prompt_end, chosen_end = start + num_prompt, start + num_prompt + num_chosen
        if score_prompts:
            score(range(start, prompt_end - 1), pair.prompt_ids[1:], 3 * index)
        score(range(prompt_end - 1, chosen_end - 1), pair.chosen_ids, 3 * index + 1)
        score(
            [prompt_end - 1, *range(chosen_end, chosen_end + num_rejected - 1)],
            pair.rejected_ids,
            3 * index + 2,
        )

    return PackedPairs(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        sides=torch.tensor(sides),
        lengths=tuple(lengths),
        scores_prompts=score_prompts,
    )


def split_by_budget(pairs: Sequence[TokenizedPair], budget_tokens: int) -> list[list[TokenizedPair]]:
    """Split a step's pairs into micro-batches of at most `budget_tokens` row tokens: longest first, best fit.

    A pair longer than the budget gets a micro-batch of its own. Deterministic for a given order of pairs.
    """
    bins: list[list[TokenizedPair]] = []
    room: list[int] = []
    for pair in sorted(pairs, key=row_tokens, reverse=True):
        need = row_tokens(pair)
        fitting = [index for index, left in enumerate(room) if left >= need]
        if fitting:
            best = min(fitting, key=room.__getitem__)
            bins[best].append(pair)
            room[best] -= need
        else:
            bins.append([pair])
            room.append(budget_tokens - need)
    return bins
