"""What `auto` in a recipe's memory section comes to: the fastest settings whose step fits."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from qorpo.planning.counter import MemorySettings, StepCounter
from qorpo.planning.step_memory import HEAD
from qorpo.recipe import MemoryRecipe

GIB = 2**30

CONTEXT_BYTES = int(0.6 * GIB)
"""What CUDA itself, its libraries and their kernels take of a card; stated, not measured by qorpo yet."""

ALLOCATOR_SHARE = 0.03
"""What the allocator reserves beyond the tensors, as a share of them, with expandable segments; stated as well."""

SPARE_SHARE = 0.05
"""What is left free before layers are spared recomputation: that wins time, and running out loses it."""

SMALLEST_CHUNK = 128


def reserved_bytes(tensor_bytes: float) -> int:
    """What PyTorch's allocator reserves for a step whose tensors come to `tensor_bytes`."""
    return int(tensor_bytes * (1 + ALLOCATOR_SHARE))


def fixed_settings(memory: MemoryRecipe, num_layers: int, *, on_cuda: bool) -> MemorySettings:
    """What is given, and for what is not the fastest values that are known, but with every layer recomputed."""
    layers, tokens, chunk = (
        memory.activation_checkpointing, memory.microbatch_tokens, memory.logprob_chunk_tokens,
    )  # fmt: skip
    return MemorySettings(
        microbatch_tokens=(4096 if on_cuda else 2048) if tokens == "auto" else tokens,
        chunk_tokens=(1024 if on_cuda else 256) if chunk == "auto" else chunk,
        # `is`: True means all layers, while 1, which equals True, means one.
        checkpointed_layers=num_layers
        if layers == "auto" or layers is True
        else min(int(layers), num_layers),
        offload=memory.activation_offload is True,
    )


def ladder(memory: MemoryRecipe, counter: StepCounter) -> Iterator[MemorySettings]:
    """Settings that need less and less, the cheapest saving first; what is given is never changed."""
    settings = fixed_settings(memory, counter.num_layers, on_cuda=counter.on_cuda)
    yield settings
    if memory.microbatch_tokens == "auto" and len(counter.rows(settings)) > 1:
        settings = replace(settings, microbatch_tokens=sum(counter.longest))
        yield settings
    while True:
        peaks = counter.peaks(settings)
        is_head = max(peaks, key=peaks.__getitem__) == HEAD
        if is_head and memory.logprob_chunk_tokens == "auto" and settings.chunk_tokens > SMALLEST_CHUNK:
            settings = replace(settings, chunk_tokens=settings.chunk_tokens // 2)
        elif _may_offload(memory, counter) and not settings.offload:
            settings = replace(settings, offload=True)
        else:
            return
        yield settings


def frugal(memory: MemoryRecipe, counter: StepCounter, chunk_tokens: int) -> MemorySettings:
    """All that `auto` may do to save memory, but for the head's chunks, which are given."""
    settings = fixed_settings(memory, counter.num_layers, on_cuda=counter.on_cuda)
    if memory.microbatch_tokens == "auto":
        settings = replace(settings, microbatch_tokens=sum(counter.longest))
    offload = settings.offload or _may_offload(memory, counter)
    return replace(settings, chunk_tokens=chunk_tokens, offload=offload)


def _may_offload(memory: MemoryRecipe, counter: StepCounter) -> bool:
    return (
        memory.activation_offload == "auto"
        and counter.on_cuda
        and memory.activation_checkpointing is not False
    )


def fastest_that_fits(memory: MemoryRecipe, counter: StepCounter, room_bytes: int) -> MemorySettings:
    """The fastest settings whose step's reserved memory is at most `room_bytes`; the most frugal where none is."""

    def fits(settings: MemorySettings, room: float = room_bytes) -> bool:
        return reserved_bytes(counter.peak_bytes(settings)) <= room

    for settings in ladder(memory, counter):
        if fits(settings):
            break
    if memory.activation_checkpointing != "auto" or settings.offload:
        return settings
    fewest = _least(
        lambda count: fits(replace(settings, checkpointed_layers=count), room_bytes * (1 - SPARE_SHARE)),
        counter.num_layers,
    )
    return replace(settings, checkpointed_layers=fewest)


def _least(holds: Callable[[int], bool], stop: int) -> int:
    """The smallest number from 0 for which `holds`, which holds from there on; `stop` where it never does."""
    low, high = 0, stop
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def memory_keys(settings: MemorySettings, num_layers: int) -> dict[str, Any]:
    """Settings as the recipe's keys have them."""
    recomputed: bool | int = settings.checkpointed_layers
    if recomputed in (0, num_layers):
        recomputed = recomputed > 0
    return {
        "microbatch_tokens": settings.microbatch_tokens,
        "logprob_chunk_tokens": settings.chunk_tokens,
        "activation_checkpointing": recomputed,
        "activation_offload": settings.offload,
    }
