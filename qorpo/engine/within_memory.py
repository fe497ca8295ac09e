"""A step that memory runs out in is done again, smaller: the same step, since the batch is a promise."""

import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from qorpo.data.groups import Group, row_tokens
from qorpo.data.pack import split_by_budget
from qorpo.out_of_memory import is_out_of_memory, shortage_of

logger = logging.getLogger(__name__)
T = TypeVar("T")


class StepTooLargeError(MemoryError):
    """Memory ran out although each micro-batch that is as long as any held one group."""


def within_memory(
    attempt: Callable[[int], T],
    groups: Sequence[Group],
    microbatch_tokens: int,
    undo: Callable[[], None] = lambda: None,
) -> tuple[T, int]:
    """`attempt(microbatch_tokens)`, and for as long as memory runs out in it, the whole again with half the tokens.

    Args:
        attempt: what scores all of `groups` in micro-batches of at most so many tokens.
        undo: takes back what a broken attempt left, such as gradients of its first micro-batches.

    Returns:
        What `attempt` gave, and the tokens with which it succeeded.

    Raises:
        StepTooLargeError: where smaller micro-batches would be no smaller, since the longest group alone is as long.
    """
    longest_group = max(map(row_tokens, groups))
    while True:
        try:
            return attempt(microbatch_tokens), microbatch_tokens
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            shortage = shortage_of(error)
        # Out of the except clause, whose traceback holds the broken attempt's tensors.
        undo()
        free_memory()
        rows = split_by_budget(groups, microbatch_tokens)
        longest_row = max(sum(map(row_tokens, row)) for row in rows)
        if longest_row == longest_group:
            raise StepTooLargeError(shortage)
        smaller = max(longest_row // 2, longest_group)
        logger.warning(
            "out of memory in micro-batches of %d tokens (%s); the step is done again in micro-batches of %d",
            longest_row, shortage, smaller,
        )  # fmt: skip
        microbatch_tokens = smaller


def free_memory() -> None:
    """Give back what nothing uses any more: tensors in cycles, and what PyTorch's allocator keeps for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
