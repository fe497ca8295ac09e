"""The unit of training as tokens: a prompt with n ≥ 1 responses. A preference pair is n = 2, chosen first."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from qorpo.data.counts import DataReport
from qorpo.errors import DataError

GroupLengths = tuple[int, ...]
"""Token counts of a group's parts: of its prompt, then of each response."""


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its responses as token ids; a response that is not cut ends in the stop token, a cut one has none."""

    prompt_ids: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    source: str
    cut: tuple[bool, ...] = ()  # whether the prompt, and each response, was cut; empty: not known
    unscored: tuple[
        tuple[int, int], ...
    ] = ()  # spans of the only response that are read, not learned: later questions
    margin: float | None = None  # how much better the first response is than the second, where the data says
    desirable: bool | None = None  # whether the only response is one to learn, where the data says
    reference_logps: tuple[float, ...] = ()  # each response's sum of log-probs by the model as it started
    mismatched: "Group | None" = None  # its prompt with an answer to another, for kto

    @classmethod
    def of(cls, parts: Iterable[Sequence[int]], source: str) -> "Group":
        """The group of a prompt and its responses."""
        prompt, *responses = map(tuple, parts)
        return cls(prompt, tuple(responses), source)

    @property
    def lengths(self) -> GroupLengths:
        return len(self.prompt_ids), *map(len, self.responses)

    @property
    def learned_lengths(self) -> GroupLengths:
        """`lengths` without the unscored spans."""
        if not self.unscored:
            return self.lengths
        prompt, response = self.lengths
        return prompt, response - sum(stop - start for start, stop in self.unscored)

    def first(self, count: int) -> "Group":
        """The same with its first `count` responses alone."""
        return replace(
            self,
            responses=self.responses[:count],
            cut=self.cut[: 1 + count],
            reference_logps=self.reference_logps[:count],
        )


class TokenizedData(NamedTuple):
    """Groups ready to train on, and what became of the records they came from."""

    groups: Sequence[Group]
    report: DataReport


def row_tokens(group: Group) -> int:
    """Tokens that a group takes in a packed row."""
    return len(group.prompt_ids) + sum(map(len, group.responses))


def part_names(num_responses: int) -> tuple[str, ...]:
    """What a group's parts are called, for a person: its prompt, then each response."""
    if num_responses == 1:
        return "prompt", "response"
    if num_responses == 2:
        return "prompt", "chosen", "rejected"
    return "prompt", *(f"response {number}" for number in range(1, num_responses + 1))


def tokens_report(
    report: DataReport, lengths: Sequence[Sequence[int]], cuts: Sequence[Sequence[bool]]
) -> DataReport:
    """The report with what tokenizing adds: (P, 1 + n) lengths of the groups' parts, and whether they were cut."""
    report.kept = len(lengths)
    if not report.kept:
        raise DataError(
            f"0 usable pairs left as tokens: {report.summary()}; "
            "look at data.max_prompt_length, data.max_length and model.chat_template"
        )
    columns = zip(zip(*lengths, strict=True), zip(*cuts, strict=True), strict=True)
    for part, (counts, were_cut) in zip(part_names(len(lengths[0]) - 1), columns, strict=True):
        report.cut[part] = sum(were_cut)
        report.tokens[part] = {
            "total": sum(counts), "mean": round(sum(counts) / len(counts), 1), "max": max(counts)
        }  # fmt: skip
    return report
