"""The longest row and the largest rank that fit, found from a few counts: memory grows almost in straight lines."""

from collections.abc import Callable
from dataclasses import replace

from qorpo.planning.counter import MemorySettings, StepCounter, group_of
from qorpo.planning.settings import frugal, reserved_bytes
from qorpo.planning.step_memory import OPTIMIZER
from qorpo.recipe import Recipe

LONGEST_ROW = 2**20

NEAR = 1.2
"""How far beyond a number that was counted a straight line is trusted."""


def longest_row_that_fits(recipe: Recipe, counter: StepCounter, chunk_tokens: int, room_bytes: int) -> int:
    """Tokens of the longest row, one group, that fits with all that `auto` may do; 0 where none does."""
    start = sum(counter.longest)

    def settings_of(row_tokens: int) -> MemorySettings:
        # Beside a long row a sixteenth of it is a small chunk, and smaller ones would take long to count.
        settings = frugal(recipe.memory, counter, max(chunk_tokens, row_tokens // 16))
        return replace(settings, microbatch_tokens=row_tokens)

    def need(row_tokens: int) -> int:
        changed = (
            counter
            if row_tokens == start
            else counter.changed(longest=group_of(row_tokens, counter.num_responses))
        )
        return reserved_bytes(changed.peak_bytes(settings_of(row_tokens)))

    standing = reserved_bytes(counter.peaks(settings_of(start))[OPTIMIZER])  # there whatever the row
    guess = start * (room_bytes - standing) / max(need(start) - standing, 1)
    return largest_that_fits(need, start, int(guess), room_bytes, LONGEST_ROW)


def largest_rank_that_fits(recipe: Recipe, counter: StepCounter, chunk_tokens: int, room_bytes: int) -> int:
    """The largest LoRA rank that fits with all that `auto` may do; 0 where none does."""
    start = recipe.lora.rank
    settings = frugal(recipe.memory, counter, chunk_tokens)

    def need(rank: int) -> int:
        changed = counter if rank == start else counter.changed(recipe.replace("lora.rank", rank))
        return reserved_bytes(changed.peak_bytes(settings))

    # In float32, with their gradients.
    guess = start * (1 + (room_bytes - need(start)) / max(8 * counter.num_trained, 1))
    ceiling = max(start + 1, counter.config.get_text_config().hidden_size)
    return largest_that_fits(need, start, int(guess), room_bytes, ceiling)


def largest_that_fits(
    need: Callable[[int], int], start: int, guess: int, room_bytes: int, ceiling: int
) -> int:
    """The largest number whose need is within the room, or a little less; 0 where there is none.

    A need is the highest of several straight lines or bends upwards, so between two numbers that were counted a
    straight line is never too low; a little beyond them it is nearly right.
    """
    low, high = start, max(guess, start + 1)
    needs = {low: need(low)}
    if needs[low] > room_bytes:
        low, high = max(1, start // 16), start
    while True:
        high = min(high, ceiling)
        for number in {low, high} - needs.keys():
            needs[number] = need(number)
        if needs[low] > room_bytes:
            return 0
        slope = max((needs[high] - needs[low]) / (high - low), 1e-9)
        found = int(low + (room_bytes - needs[low]) / slope)
        if needs[high] > room_bytes:
            return max(low, int(0.999 * found))  # sizes are rounded up to blocks, so the line has small steps
        if high == ceiling:
            return ceiling
        if found <= NEAR * high:
            return max(high, int(0.99 * found))
        low, high = high, found
