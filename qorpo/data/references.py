"""Groups with what the model said of them as it started, and each prompt with an answer to another.

Legend: P groups, N responses of each.
"""

from abc import abstractmethod
from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import overload

from qorpo.data.filters import digest
from qorpo.data.groups import Group
from qorpo.data.token_table import longest_sequence


class _Made(Sequence[Group]):
    """Groups that are made when they are asked for."""

    def __init__(self, groups: Sequence[Group]):
        self._groups = groups

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> Group: ...
    @overload
    def __getitem__(self, index: slice) -> list[Group]: ...
    def __getitem__(self, index: int | slice) -> Group | list[Group]:
        if isinstance(index, slice):
            return [self.made(place) for place in range(*index.indices(len(self)))]
        return self.made(range(len(self))[index])

    @abstractmethod
    def made(self, place: int) -> Group: ...


class WithReference(_Made):
    """Groups with the reference's log-probs, and with `mismatched` groups that have theirs.

    Args:
        logps_PN: the sum of each response's log-probs.
    """

    def __init__(
        self,
        groups: Sequence[Group],
        logps_PN: Sequence[Sequence[float]],
        mismatched: Sequence[Group] | None = None,
    ):
        super().__init__(groups)
        self._logps_PN, self._mismatched = logps_PN, mismatched

    def made(self, place: int) -> Group:
        return replace(
            self._groups[place],
            reference_logps=tuple(self._logps_PN[place]),
            mismatched=None if self._mismatched is None else self._mismatched[place],
        )


class Mismatched(_Made):
    """Each group's prompt with the answer of its partner, cut where the two would be longer than any group is.

    The partners are fixed for a run, so that the reference can score them beforehand: see `partners`.
    """

    def __init__(self, groups: Sequence[Group], seed: int):
        super().__init__(groups)
        self._partners = partners([group.prompt_ids for group in groups], seed)
        self._most_tokens = longest_sequence(groups) if self._partners else 0

    @property
    def is_possible(self) -> bool:
        """Whether there are two different prompts."""
        return bool(self._partners)

    def made(self, place: int) -> Group:
        prompt, other = self._groups[place].prompt_ids, self._groups[self._partners[place]]
        answer = other.responses[0][: self._most_tokens - len(prompt)]
        return Group(prompt, (answer,), f"{self._groups[place].source} with {other.source}")


def partners(prompts: Sequence[Hashable], seed: int) -> list[int]:
    """For each prompt the place of another: the last different one before it, going round an order that the seed draws.

    Empty where all prompts are the same.
    """
    order = sorted(range(len(prompts)), key=lambda place: digest((seed, place)))
    found = [-1] * len(prompts)
    before = different = -1
    for place in order * 2:  # the second round knows what is before the first's start
        if before >= 0 and prompts[place] != prompts[before]:
            different = before
        found[place], before = different, place
    return found if different >= 0 else []
