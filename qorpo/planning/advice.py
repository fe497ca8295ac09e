"""What to change in a recipe that doesn't fit, the cheapest change first."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

from qorpo.planning.counter import MemorySettings, StepCounter, length_within
from qorpo.planning.largest import longest_row_that_fits
from qorpo.planning.settings import (
    CONTEXT_BYTES,
    GIB,
    SMALLEST_CHUNK,
    frugal,
    ladder,
    memory_keys,
    reserved_bytes,
)
from qorpo.recipe import Recipe

SMALL_RANK = 8
SHORTEST_USEFUL = 128


def advise(recipe: Recipe, counter: StepCounter, settings: MemorySettings, room_bytes: int) -> list[str]:
    """Changes that together make the step fit, each with what it saves; where it fits, what `auto` saved for that."""
    if reserved_bytes(counter.peak_bytes(settings)) <= room_bytes:
        return _what_auto_did(recipe, counter, settings)
    changes = list(_changes(recipe, counter))
    taken: list[tuple[str, Any]] = []
    for key, value in changes:
        taken.append((key, value))
        if _need_after(recipe, counter, taken) <= room_bytes:
            break
    else:
        return _shorter_or_nothing(recipe, counter, taken, room_bytes)
    # What a later change made needless goes.
    for change in taken[:-1]:
        without = [other for other in taken if other != change]
        if _need_after(recipe, counter, without) <= room_bytes:
            taken = without
    return _with_savings(recipe, counter, taken)


def _changes(recipe: Recipe, counter: StepCounter) -> Iterator[tuple[str, Any]]:
    """Keys that could need less, in the order of what they cost: time first, then what is learned."""
    memory, longest_row = recipe.memory, sum(counter.longest)
    if memory.microbatch_tokens != "auto" and memory.microbatch_tokens > longest_row:
        yield "memory.microbatch_tokens", longest_row
    if memory.logprob_chunk_tokens != "auto" and memory.logprob_chunk_tokens > SMALLEST_CHUNK:
        yield "memory.logprob_chunk_tokens", SMALLEST_CHUNK
    if memory.sharding == "none" and not recipe.train.optimizer.startswith("paged"):
        yield "train.optimizer", "paged_adamw_8bit"
    if memory.activation_checkpointing != "auto" and memory.activation_checkpointing is not True:
        yield "memory.activation_checkpointing", True
    if memory.activation_offload is False:
        yield "memory.activation_offload", True
    if recipe.tuning == "full":
        return
    if recipe.model.quantization != "nf4":
        yield "model.quantization", "nf4"
    if recipe.model.adapter is not None:  # its rank and modules are what they are
        return
    if recipe.lora.modules_to_save:
        yield "lora.modules_to_save", []
    if recipe.lora.rank > SMALL_RANK:
        yield "lora.rank", SMALL_RANK


def _after(recipe: Recipe, changes: list[tuple[str, Any]]) -> Recipe:
    for key, value in changes:
        recipe = recipe.replace(key, value)
    return recipe


def _need_after(recipe: Recipe, counter: StepCounter, changes: list[tuple[str, Any]]) -> int:
    changed = _after(recipe, changes)
    chunk = changed.memory.logprob_chunk_tokens
    settings = frugal(changed.memory, counter, SMALLEST_CHUNK if chunk == "auto" else chunk)
    return reserved_bytes(counter.changed(changed).peak_bytes(settings))


def _with_savings(recipe: Recipe, counter: StepCounter, changes: list[tuple[str, Any]]) -> list[str]:
    needs = [_need_after(recipe, counter, changes[:count]) for count in range(len(changes) + 1)]
    return [
        f"{key}={str(value).lower()}: {(before - after) / GIB:.2f} GiB less"
        for (key, value), before, after in zip(changes, needs, needs[1:], strict=False)
        if before > after
    ]


def _shorter_or_nothing(
    recipe: Recipe,
    counter: StepCounter,
    changes: list[tuple[str, Any]],
    room_bytes: int,
) -> list[str]:
    """Shorter pairs cost what is learned from long ones; below them there is only another card or model."""
    changed = _after(recipe, changes)
    row_tokens = longest_row_that_fits(changed, counter.changed(changed), SMALLEST_CHUNK, room_bytes)
    max_length = length_within(row_tokens, counter.num_responses)
    if max_length >= SHORTEST_USEFUL:
        return [
            *_with_savings(recipe, counter, changes),
            f"data.max_length={max_length}: longer answers are cut",
        ]
    if recipe.memory.sharding == "full" and (ranks := _ranks_that_fit(changed, counter, room_bytes)):
        return [f"--ranks {ranks}: so many cards hold it"]
    needed = (_need_after(recipe, counter, changes) + CONTEXT_BYTES) / GIB
    return [
        f"no change of this recipe makes it fit: at its least it needs {needed:.1f} GiB; take a larger card, or a smaller model"
    ]


def _ranks_that_fit(recipe: Recipe, counter: StepCounter, room_bytes: int) -> int | None:
    """The number of ranks, doubled until it fits; None where the step has too few pairs for as many."""
    ranks = 2 * counter.ranks
    while ranks <= recipe.train.pairs_per_step:
        if _need_after(recipe, counter.changed(ranks=ranks), []) <= room_bytes:
            return ranks
        ranks *= 2
    return None


def _what_auto_did(recipe: Recipe, counter: StepCounter, settings: MemorySettings) -> list[str]:
    """The steps of the ladder down to `settings`, counted already."""
    lines = []
    for before, after in pairwise(ladder(recipe.memory, counter)):
        if replace(before, checkpointed_layers=settings.checkpointed_layers) == settings:
            break
        saved = (counter.peak_bytes(before) - counter.peak_bytes(after)) / GIB
        was, now = (memory_keys(rung, counter.num_layers) for rung in (before, after))
        lines += [
            f"auto took memory.{key}={str(now[key]).lower()}: {saved:.2f} GiB less"
            for key in now
            if now[key] != was[key]
        ]
    return lines
