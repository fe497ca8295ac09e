"""Held-out preference pairs: does the model tell chosen from rejected, and does it so better than its base?

Legend: P pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from qorpo.build import build_objective, limits_of
from qorpo.data.groups import Group, TokenizedData
from qorpo.data.sources import load_pairs
from qorpo.data.tokenize import ChatFormat, tokenize_pairs
from qorpo.engine.step import score_groups, summed_logps
from qorpo.evaluation.results import Figure
from qorpo.intervals import mean_interval
from qorpo.model.scoring import Scorer
from qorpo.model.selfcheck import make_scorer
from qorpo.objectives.base import Objective, ObjectiveOutput, Scores, Totals
from qorpo.objectives.orpo import Orpo
from qorpo.recipe import DataRecipe, Recipe

ROW_TOKENS = 2048
Metrics = dict[str, NDArray[np.float64]]  # (P,) each


def read_pairs(
    source: str, recipe: Recipe | None, chat: ChatFormat, limit: int | None = None
) -> TokenizedData:
    """Pairs as tokens, read and cut to length as the run's recipe says, or by the defaults.

    Args:
        source: whatever `data.train` may name.
        limit: take the first so many that are kept.

    Raises:
        DataError: where they can't be read, or none is left.
    """
    keys = recipe.data if recipe else DataRecipe(train=(source,))
    found = load_pairs(
        source, shape=keys.shape, columns=keys.columns, ranked_pairs=keys.ranked_pairs,
        min_margin=keys.min_margin, on_bad_record=keys.on_bad_record,
    )  # fmt: skip
    data = tokenize_pairs(found, chat, limits_of(keys), 2)
    return data if limit is None else data._replace(groups=data.groups[:limit])


@dataclass(frozen=True)
class WithLikelihoods:
    """A pair objective's metrics, with ORPO's (NLL, log odds ratio, …) beside them: one scoring gives both."""

    own: Objective
    responses: ClassVar[int] = 2

    def __getattr__(self, name: str) -> Any:
        return getattr(self.own, name)

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys([*self.own.metrics, *Orpo.metrics]))

    def __call__(self, scores: Scores, totals: Totals) -> ObjectiveOutput:
        output = self.own(scores, totals)
        return output._replace(metrics=Orpo()(scores, totals).metrics | output.metrics)


def objective_of(recipe: Recipe | None, groups: Sequence[Group], has_base: bool) -> Objective:
    """The run's own, where it compares two responses and these pairs have what it needs; else ORPO with its defaults.

    A run that began from an adapter has another reference than the base, which is what there is to compare with here.
    """
    own = build_objective(recipe.objective) if recipe else Orpo()
    lacks_margins = own.needs_margins and any(group.margin is None for group in groups)
    is_start = has_base and recipe is not None and recipe.model.adapter is None
    if own.responses != 2 or lacks_margins or (own.needs_reference and not is_start):
        return Orpo()
    return WithLikelihoods(own)


class PairsScorer:
    """A model that scores pairs, the check at load behind it."""

    def __init__(self, model: Any, attention: str = "auto"):
        self.scorer: Scorer = make_scorer(model, attention)
        self.options = {"microbatch_tokens": ROW_TOKENS, "device": model.device}

    def metrics(self, groups: Sequence[Group], objective: Objective) -> Metrics:
        """Every metric of each pair, in the order of `groups`."""
        self.scorer.eval()
        with self.scorer.packed_attention():
            found = score_groups(self.scorer, groups, objective, **self.options)
        return {name: values.numpy() for name, values in found.items()}

    def as_reference(self, groups: Sequence[Group]) -> list[Group]:
        """The groups with this model's log-probs, for objectives that compare with the model as it started."""
        self.scorer.eval()
        with self.scorer.packed_attention():
            logps_PN = summed_logps(self.scorer, groups, **self.options)
        return [
            replace(group, reference_logps=tuple(row))
            for group, row in zip(groups, logps_PN.tolist(), strict=True)
        ]


def compared(groups: Sequence[Group], model: Metrics, base: Metrics | None) -> dict[str, Figure]:
    """Means over pairs; where there is a base, its own and the paired differences. Prompts are resampled whole."""
    prompts = [group.prompt_ids for group in groups]
    figures = {}
    for name, values_P in model.items():
        mine, theirs, difference = mean_interval(values_P, prompts), None, None
        if base is not None:
            theirs = mean_interval(base[name], prompts)
            difference = mean_interval(values_P - base[name], prompts)
        figures[name] = Figure(mine, theirs, difference)
    return figures
