"""A short row of pairs, and what a way of attending makes of it: log-probs, and their gradients by the tokens' embeddings.

A gradient is the sharper witness. What a token may not see has none at all, and a token that is seen too far away, or not
at all, shows as a share of the gradient's own size, however weakly a model attends and however coarse its type is.
Legend: S scored tokens, T tokens of the row, H hidden.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from qorpo.data.groups import Group
from qorpo.data.pack import PackedGroups, pack_groups
from qorpo.model.scoring import Scorer

LONGEST_WINDOW = 300
"""The longest window that the check looks beyond, in tokens; more would take memory that a large model may not have."""

MORE_TOKENS = 5


@dataclass(frozen=True)
class Probe:
    """A row, and which of its tokens to look at."""

    packed: PackedGroups
    parts_T: torch.Tensor  # each token's prompt or response: 3·pair + 0, 1 or 2
    first_T: torch.Tensor  # bool: those that the row has with shorter responses too
    first_S: torch.Tensor  # the same of the scored tokens
    upstream_S: torch.Tensor  # the gradient of each log-prob

    @classmethod
    def of(cls, pairs: Sequence[Group], more: int, device: torch.device) -> "Probe":
        """The pairs with `more` tokens behind each response: they change nothing before them but its rounding."""
        longer = [
            replace(pair, responses=tuple(ids + pair.prompt_ids[:1] * more for ids in pair.responses))
            for pair in pairs
        ]
        packed = pack_groups(longer, score_prompts=True).to(device)
        counts = torch.tensor([pair.lengths for pair in pairs]).flatten()
        lengths = torch.tensor(packed.lengths).flatten()
        unscored = torch.tensor([1, 0, 0]).repeat(len(pairs))  # a prompt's first token
        first_S = _first(counts - unscored, lengths - unscored).to(device)
        # As training weighs a response, by its mean; rejected's most, since its prompt is where sharing could go wrong.
        weights = torch.tensor([0.0, 1 / 16, 1.0]).repeat(len(pairs)) / counts
        return cls(
            packed, torch.repeat_interleave(lengths).to(device), _first(counts, lengths).to(device),
            first_S, weights.to(device)[packed.segments] * first_S,
        )  # fmt: skip


def _first(counts: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Of parts of these lengths in a row: True for the first `count` of each."""
    return torch.cat(
        [torch.arange(length) < count for count, length in zip(counts, lengths.tolist(), strict=True)]
    )


def probe_rows(model: Any) -> tuple[Probe, Probe]:
    """The row to look at, and a longer one with the same in it: by how much they differ is the model's own noise."""
    pairs = _probe_pairs(model)
    return Probe.of(pairs, 0, model.device), Probe.of(pairs, MORE_TOKENS, model.device)


def _probe_pairs(model: Any) -> list[Group]:
    """Two pairs of fixed pseudo-random tokens, the second's chosen response longer than the model's smallest window.

    So a window, or a distance, that goes by the place in the row instead of the position parts rejected from its
    prompt. Windows over LONGEST_WINDOW, and those of more tokens than the model has positions, are not looked beyond.
    """
    config = model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    windows = [
        getattr(config, name, None) for name in ("sliding_window", "window_size", "attention_chunk_size")
    ]
    window = min(
        (int(each) for each in windows if isinstance(each, int) and each > 0), default=LONGEST_WINDOW + 1
    )
    positions = getattr(config, "max_position_embeddings", None) or 2 * LONGEST_WINDOW
    long = 12 if window > LONGEST_WINDOW else min(window + 8, max(12, positions - 6 - MORE_TOKENS))

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(config.vocab_size, (count,), generator=generator).tolist())

    return [Group.of(map(tokens, lengths), "self-check") for lengths in ((9, 7, 5), (6, long, 8))]


@dataclass(frozen=True)
class Observed:
    """What a way of attending makes of a row. Legend: S scored tokens, T tokens of the row, H hidden."""

    logps_S: torch.Tensor
    gradient_TH: torch.Tensor | None  # by the tokens' embeddings; None where they can't be had
    parts_T: torch.Tensor  # each token's prompt or response, 3 a pair

    def errors(self, own: "Observed") -> tuple[float, float]:
        """The mean difference of log-probs, in nats; that of gradients, relative, in the prompt or response where it is most."""
        logps = (self.logps_S - own.logps_S).abs().mean().item()
        if self.gradient_TH is None or own.gradient_TH is None:
            return logps, 0.0
        difference_TH = self.gradient_TH - own.gradient_TH
        relative = [
            (difference_TH[own.parts_T == part].norm() / own.gradient_TH[own.parts_T == part].norm()).item()
            for part in own.parts_T.unique()
        ]
        return logps, max(relative, key=lambda error: math.inf if math.isnan(error) else error)


def observed(scorer: Scorer, call: Callable[..., torch.Tensor], probe: Probe, **options: Any) -> Observed:
    """What the scorer makes of a probe, called as `call(packed, **options)`."""
    packed, seen = probe.packed, list[torch.Tensor]()

    def cut_off(module: Any, arguments: Any, embedded: torch.Tensor) -> torch.Tensor:
        seen.append(embedded.detach().requires_grad_())
        return seen[-1]

    hook = scorer.model.get_input_embeddings().register_forward_hook(cut_off)
    try:
        with torch.enable_grad(), scorer.packed_attention():
            logps_S = call(packed, **options)
            objective = (logps_S * probe.upstream_S.to(logps_S)).sum()
            gradients = torch.autograd.grad(objective, seen) if seen else ()
    finally:
        hook.remove()
    gradient_TH = _by_row(packed, [gradient[0].double() for gradient in gradients])
    return Observed(
        logps_S.detach()[probe.first_S],
        None if gradient_TH is None else gradient_TH[probe.first_T],
        probe.parts_T[probe.first_T],
    )


def _by_row(packed: PackedGroups, gradients: list[torch.Tensor]) -> torch.Tensor | None:
    """(T, H) of the row's tokens, from one forward of it, or from two a pair, which share its prompt."""
    if len(gradients) != 2 * len(packed.lengths):
        whole = len(gradients) == 1 and len(gradients[0]) == packed.input_ids.shape[1]
        return gradients[0] if whole else None
    parts = []
    for (prompt, _, _), by_chosen, by_rejected in zip(
        packed.lengths, gradients[::2], gradients[1::2], strict=True
    ):
        parts += [by_chosen[:prompt] + by_rejected[:prompt], by_chosen[prompt:], by_rejected[prompt:]]
    return torch.cat(parts)
