"""What a recipe will need in memory, before anything is downloaded: `plan`."""

import importlib.util
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from qorpo.build import build_objective, with_adapter
from qorpo.engine.device import unpaged
from qorpo.errors import RecipeError
from qorpo.model.load import load_config
from qorpo.planning.advice import advise
from qorpo.planning.counter import StepCounter, group_of, length_within
from qorpo.planning.largest import largest_rank_that_fits, longest_row_that_fits
from qorpo.planning.settings import CONTEXT_BYTES, GIB, fastest_that_fits, memory_keys, reserved_bytes
from qorpo.recipe import Recipe, load_recipe, resolve

DEFAULT_BUDGET_GIB = 24.0


@dataclass(frozen=True)
class Plan:
    """One training step's memory on one card (under full tuning on several, on each), in GiB."""

    model: str
    tuning: str  # lora or full
    ranks: int
    budget_gib: float
    fits: bool
    needed_gib: float  # of the card: what the allocator reserves, and CUDA's own share
    reserved_gib: float  # what torch.cuda.max_memory_reserved is to say
    peak_gib: float  # the tensors alive at the step's peak
    by_kind: dict[str, float]  # what they are
    moment: str  # the stretch of the step that the peak is in
    where: str  # the line of code, and the node of autograd
    host_gib: float  # pinned host memory: offloaded inputs of layers
    paged_gib: float  # optimizer states that leave the card when it is short
    traffic_gib: float  # what a card receives, and as much sends, for one micro-batch: weights gathered, gradients summed
    memory: dict[str, Any]  # the recipe's memory section as it would be trained
    largest: dict[
        str, int
    ]  # what fits with all that `auto` may do: microbatch_tokens, max_length, lora_rank where there is one
    advice: list[str]  # what makes it fit, the cheapest first; where it fits, what auto did for that

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def plan(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    budget_gib: float | None = None,
    ranks: int = 1,
) -> Plan:
    """Count a recipe's training step on a CUDA card of `budget_gib`, on any machine; a config.json is enough.

    Groups are taken to be the longest that data.max_length allows: next to no prompt, and as many answers as the objective reads.

    Args:
        recipe: a Recipe, a mapping of its keys, or a YAML file.
        overrides: `key.sub=value` changes.
        budget_gib: the card's memory; None: memory.budget_gib, else this machine's card, else 24.
        ranks: the cards that a model under `tuning: full` is sharded over, of which the first is counted.

    Raises:
        RecipeError, ModelError: a recipe that doesn't hold together, or a model that has no config.json to be had.
        PlanError: a model whose own code doesn't run on fake tensors.
    """
    return plan_budgets(recipe, overrides, budgets_gib=[budget_gib], ranks=ranks)[0]


def plan_budgets(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    budgets_gib: Sequence[float | None],
    ranks: int = 1,
) -> list[Plan]:
    """`plan` for several cards; what they share is counted once."""
    if not isinstance(recipe, Recipe) or overrides:
        recipe = load_recipe(recipe.to_dict() if isinstance(recipe, Recipe) else recipe, overrides)
    can_page = not torch.cuda.is_available() or unpaged(torch.device("cuda")) is None
    recipe = resolve(with_adapter(recipe), device_type="cuda", installed=_is_there, can_page=can_page)
    if ranks > 1 and recipe.memory.sharding == "none":
        raise RecipeError(
            f"--ranks: got {ranks}, but nothing is sharded, so each card needs what one does; leave it out, or give --full"
        )
    if not 1 <= ranks <= recipe.train.pairs_per_step:
        raise RecipeError(
            f"--ranks: got {ranks}; give from 1 to train.pairs_per_step ({recipe.train.pairs_per_step})"
        )
    config = load_config(
        recipe.model.path, revision=recipe.model.revision, trust_remote_code=recipe.model.trust_remote_code
    )
    responses = build_objective(recipe.objective).responses
    longest = group_of(1 + responses * (recipe.data.max_length - 1), responses)
    counter = StepCounter(config, recipe, longest=longest, on_cuda=True, ranks=ranks)
    return [_plan(recipe, counter, budget_of(recipe) if gib is None else gib) for gib in budgets_gib]


def read_budgets(text: str | None) -> list[float | None]:
    """Budgets as the command line gives them, "12,16,24"; None stands for the recipe's own.

    Raises:
        RecipeError: where one is no number above 0.
    """
    if text is None:
        return [None]
    try:
        budgets = [float(part) for part in text.split(",")]
    except ValueError:
        budgets = []
    if not budgets or not all(0 < gib < math.inf for gib in budgets):
        raise RecipeError(f"--budgets: got {text!r}; give GiB above 0, such as 12,16,24")
    return [*budgets]


def _plan(recipe: Recipe, counter: StepCounter, budget_gib: float) -> Plan:
    room_bytes = int(budget_gib * GIB) - CONTEXT_BYTES
    settings = fastest_that_fits(recipe.memory, counter, room_bytes)
    step = counter.estimate(settings)
    reserved = reserved_bytes(step.peak.total_bytes)
    row_tokens = longest_row_that_fits(recipe, counter, settings.chunk_tokens, room_bytes)
    positions = getattr(counter.config.get_text_config(), "max_position_embeddings", None)
    largest = {
        "microbatch_tokens": row_tokens,
        "max_length": min(length_within(row_tokens, counter.num_responses), positions or row_tokens),
    }
    if recipe.tuning == "lora" and recipe.model.adapter is None:
        largest["lora_rank"] = largest_rank_that_fits(recipe, counter, settings.chunk_tokens, room_bytes)
    return Plan(
        model=recipe.model.path,
        tuning=recipe.tuning,
        ranks=counter.ranks,
        budget_gib=budget_gib,
        fits=reserved <= room_bytes,
        needed_gib=_gib(reserved + CONTEXT_BYTES),
        reserved_gib=_gib(reserved),
        peak_gib=_gib(step.peak.total_bytes),
        by_kind={
            kind: _gib(size) for kind, size in sorted(step.peak.by_kind.items(), key=lambda item: -item[1])
        },
        moment=step.stretch,
        where=step.peak.where,
        host_gib=_gib(step.host_bytes),
        paged_gib=_gib(step.paged_bytes),
        traffic_gib=_gib(step.traffic_bytes),
        memory={"budget_gib": budget_gib, **memory_keys(settings, counter.num_layers)},
        largest=largest,
        advice=advise(recipe, counter, settings, room_bytes),
    )


def budget_of(recipe: Recipe) -> float:
    """GiB of the card to plan for: the recipe's, else this machine's, else 24."""
    if recipe.memory.budget_gib != "auto":
        return recipe.memory.budget_gib
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / GIB
    return DEFAULT_BUDGET_GIB


def _is_there(module: str) -> bool:
    """A plan needs no tracker."""
    return module != "bitsandbytes" or importlib.util.find_spec(module) is not None


def _gib(num_bytes: int) -> float:
    return round(num_bytes / GIB, 3)
