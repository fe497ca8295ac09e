"""Groups laid in one row, each prompt once: [prompt][response 1]…[response n], group after group, no padding.

Legend: T tokens of the row, S scored tokens, P groups. Each response's positions continue from the prompt's end, and
the prompt's last token predicts the first token of each. What may attend to what is `model/attention.py`'s.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch

from qorpo.data.groups import Group, GroupLengths, row_tokens

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PackedGroups:
    """A micro-batch. Its segments are the prompts and responses in the row's order, and so are the scored tokens."""

    input_ids: torch.Tensor  # (1, T) int64
    position_ids: torch.Tensor  # (1, T) int64: the place in prompt and response
    predictors: torch.Tensor  # (S,) int64: the place in the row whose hidden state predicts the scored token
    targets: torch.Tensor  # (S,) int64: the scored token
    segments: torch.Tensor  # (S,) int64: which segment of the row the scored token is in
    lengths: tuple[GroupLengths, ...]  # P of them
    scored: tuple[GroupLengths, ...]  # how many tokens of each segment are scored
    # What else the groups hold, where they do; see `Group`.
    reference_logps: torch.Tensor | None = None  # (P, N) float64
    margins: torch.Tensor | None = None  # (P,) float64
    desirable: torch.Tensor | None = None  # (P,) bool

    def to(self, device: torch.device) -> "PackedGroups":
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        tensors: dict[str, Any] = {
            name: moved(value, device) for name, value in values.items() if isinstance(value, torch.Tensor)
        }
        return replace(self, **tensors)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of the host on `device`. The host doesn't wait, and pinned memory is copied beside what a GPU computes."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # kept by PyTorch until the copy is done
    return tensor.to(device, non_blocking=True)


def pack_groups(groups: Sequence[Group], *, score_prompts: bool = False) -> PackedGroups:
    """Lay groups in one row.

    Args:
        groups: at least one; every prompt and response holds at least one token.
        score_prompts: also score the prompt's tokens from its second on (`nll_tokens: all`).
    """
    ids: list[int] = []
    positions: list[int] = []
    predictors: list[int] = []
    targets: list[int] = []
    segments: list[int] = []
    scored: list[GroupLengths] = []
    segment = 0
    for group in groups:
        assert min(group.lengths) > 0, f"{group.source}: an empty prompt or response reached packing"
        start, prompt_tokens = len(ids), len(group.prompt_ids)
        prompt_end = start + prompt_tokens
        ids += group.prompt_ids
        positions += range(prompt_tokens)
        prompt_scored = prompt_tokens - 1 if score_prompts else 0
        predictors += range(start, start + prompt_scored)
        targets += group.prompt_ids[1 : 1 + prompt_scored]
        segments += [segment] * prompt_scored
        segment += 1
        for response in group.responses:
            start, tokens = len(ids), len(response)
            ids += response
            positions += range(prompt_tokens, prompt_tokens + tokens)
            predicted_by = [prompt_end - 1, *range(start, start + tokens - 1)]
            learned = response
            if group.unscored:
                places = [place for place in range(tokens) if not _is_within(place, group.unscored)]
                predicted_by = [predicted_by[place] for place in places]
                learned = tuple(response[place] for place in places)
            predictors += predicted_by
            targets += learned
            segments += [segment] * len(learned)
            segment += 1
        scored.append((prompt_scored, *group.learned_lengths[1:]))
    return PackedGroups(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        predictors=torch.tensor(predictors),
        targets=torch.tensor(targets),
        segments=torch.tensor(segments),
        lengths=tuple(group.lengths for group in groups),
        scored=tuple(scored),
        reference_logps=_known([group.reference_logps or None for group in groups], torch.float64),
        margins=_known([group.margin for group in groups], torch.float64),
        desirable=_known([group.desirable for group in groups], torch.bool),
    )


def _known(values: Sequence[Any], dtype: torch.dtype) -> torch.Tensor | None:
    """What every group has, as a tensor; None where one lacks it."""
    return None if None in values else torch.tensor(values, dtype=dtype)


def _is_within(place: int, spans: Sequence[tuple[int, int]]) -> bool:
    return any(start <= place < stop for start, stop in spans)


def split_by_budget(
    groups: Sequence[T], budget_tokens: int, tokens_of: Callable[[Any], int] = row_tokens
) -> list[list[T]]:
    """Split a step's groups into micro-batches of at most `budget_tokens` row tokens: longest first, best fit.

    A group longer than the budget gets a micro-batch of its own. Deterministic for a given order of groups. What stands
    for groups, such as their places, is split in the same way by `tokens_of`.
    """
    bins: list[list[T]] = []
    room: list[int] = []
    for group in sorted(groups, key=tokens_of, reverse=True):
        need = tokens_of(group)
        fitting = [index for index, left in enumerate(room) if left >= need]
        if fitting:
            best = min(fitting, key=room.__getitem__)
            bins[best].append(group)
            room[best] -= need
        else:
            bins.append([group])
            room.append(budget_tokens - need)
    return bins
