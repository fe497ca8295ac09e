"""From sources to preference pairs, one after another, with an account of what became of the records."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from qorpo.data.conversations import Layout, RankedPairs
from qorpo.data.counts import DataReport
from qorpo.data.demonstrations import Labelled, read_demonstration, read_labelled
from qorpo.data.filters import Repeats, digest, judge, make_demonstration, notes, prompt_key
from qorpo.data.locate import RecordFile, Sources, open_sources
from qorpo.data.records import (
    BadRecord,
    Conversation,
    Demonstration,
    Example,
    PairSet,
    TrainTurns,
    Unusable,
    labelled_answers,
)
from qorpo.data.shapes import Comparison, majority, read_comparisons
from qorpo.errors import DataError

PROBLEMS_SHOWN = 5

OnBadRecord = Literal["fail", "skip"]


def load_pairs(
    source: Sources,
    *,
    shape: str | None = None,
    columns: Mapping[str, str] | None = None,
    ranked_pairs: RankedPairs = "best-worst",
    min_margin: float = 0.0,
    on_bad_record: OnBadRecord = "fail",
    train_turns: TrainTurns | Literal["auto"] | None = None,
    labelled: bool = False,
) -> PairSet:
    """The preference pairs of a source, or of a list of them.

    Args:
        source: a file (.jsonl, .json, .csv, these also as .gz or .zst; .parquet, .arrow), a folder of these, a
            folder of `save_to_disk`, a hub id ("name:split"), a dataset of LLaMA-Factory's
            ("dataset_info.json:name"), "demo" or "demo:eval"; or a `Source`. Or a `datasets.Dataset`, or records
            themselves: a list of dicts.
        shape: a name in SHAPES, where the columns alone would not say; None: recognised.
        columns: {qorpo's name: the records' own} for columns under other names than ALIASES holds.
        ranked_pairs: which of several ranked answers make pairs: best-worst, adjacent or all.
        min_margin: least difference of scores, or of a preference between 1 and 2 (0 is a tie, 1 is sure).
        on_bad_record: fail, or skip and count a record that can't be read.
        train_turns: where one answer is enough, as under sft: records of one are read too, as Demonstrations, and
            this says which of the assistant's turns are learned: last, all, or (auto) all but in pairs; None: pairs.
        labelled: as kto learns: records of one answer and a label are read too, and a pair is two of them.

    A record that makes no pair (`judge` says which) is dropped and counted. A record that can't be read raises
    DataError, after all of them have been read and with the first few named; with on_bad_record="skip" it is
    dropped and counted too. DataError as well for a source that can't be read, or when no pair is left.
    """
    if on_bad_record not in ("fail", "skip"):
        raise DataError(f"data.on_bad_record: {on_bad_record!r}; expected fail or skip")
    layout = Layout(shape=shape, columns=columns or {}, ranked_pairs=ranked_pairs)
    report = DataReport()
    files = open_sources(source, layout)
    return PairSet(
        iter_examples(
            files,
            report,
            min_margin=min_margin,
            on_bad_record=on_bad_record,
            train_turns=train_turns,
            labelled=labelled,
        ),
        report,
    )


def iter_examples(
    files: Sequence[RecordFile],
    report: DataReport,
    *,
    min_margin: float = 0.0,
    on_bad_record: OnBadRecord = "fail",
    train_turns: TrainTurns | Literal["auto"] | None = None,
    labelled: bool = False,
) -> Iterator[Example]:
    """The pairs of files, or what `load_pairs` has in their place, counting in `report` as they go; raises at the end
    as it does."""
    read_alone = read_labelled if labelled else read_demonstration if train_turns else None
    problems = _Problems()
    repeats = Repeats()
    for file in files:
        kept_before = report.kept
        for where, found in _found_in(file, report, problems, read_alone):
            stated_margin = None
            example: Example
            try:
                if isinstance(found, Comparison):
                    example = judge(found, where, min_margin)
                    stated_margin = found.margin if found.basis == "stated" else None
                elif isinstance(found, Labelled):
                    example = make_demonstration(found.turns, where, False, found.desirable)
                else:
                    example = make_demonstration(found, where, train_turns != "last")
            except Unusable as finding:
                report.drop(finding.reason, where)
                continue
            for reason in [*notes(example, stated_margin), *repeats.notes(example)]:
                report.note(reason, where)
            copies = _copies(example, file.weight)
            if train_turns == "all" and isinstance(found, Comparison):
                example = Demonstration(example.prompt, example.answers[0], where, every_turn=True)
            if not copies:
                report.drop("left_out_by_weight", where)
            for each in labelled_answers(example) if labelled else (example,):
                report.kept += copies
                yield from itertools.repeat(each, copies)
        report.sources.append({"path": file.name, "sha256": file.sha256, "kept": report.kept - kept_before})
    if problems.first and on_bad_record == "fail":
        raise DataError(problems.text(files, report.read))
    if not report.kept:
        raise DataError(_nothing_text(files, report))


def _found_in(
    file: RecordFile,
    report: DataReport,
    problems: "_Problems",
    read_alone: Callable[[object, Layout], Labelled | Conversation | None] | None,
) -> Iterator[tuple[str, Comparison | Labelled | Conversation]]:
    """A file's comparisons, and what `read_alone` reads of other records; annotators' votes on the same two answers come
    as one, last."""
    votes: dict[bytes, list[tuple[str, Comparison]]] = {}
    for where, record in file.read():
        try:
            if isinstance(record, BadRecord):
                raise record
            shown = read_alone(record, file.layout) if read_alone else None
            comparisons = read_comparisons(record, file.layout) if shown is None else []
        except (BadRecord, Unusable) as finding:
            report.drop(finding.reason, where)
            if isinstance(finding, BadRecord):
                problems.add(where, finding)
            continue
        if record.get("tools"):
            report.note("tools_left_out", where)
        if shown is not None:
            yield where, shown
        for comparison in comparisons:
            if comparison.basis == "vote":
                prompt, answers = _parts(comparison)
                votes.setdefault(digest((prompt, *sorted(answers))), []).append((where, comparison))
            else:
                yield where, comparison
    for ballots in votes.values():
        where, first = ballots[0]
        _, answers = _parts(first)
        verdicts = [
            (comparison.margin or 0.0) * (1 if _parts(comparison)[1] == answers else -1)
            for _, comparison in ballots
        ]
        for further, _ in ballots[1:]:
            report.drop("further_vote", further)
        yield where, first._replace(margin=majority(verdicts))


def _parts(comparison: Comparison) -> tuple[Any, tuple[str, str]]:
    (*prompt, first), (*_, second) = comparison.first, comparison.second
    return prompt_key(prompt), (first["content"], second["content"])


def _copies(example: Example, weight: float) -> int:
    if weight == 1:
        return 1
    whole, part = divmod(weight, 1)
    drawn = int.from_bytes(digest((prompt_key(example.prompt), *example.answers))[:8], "big") / 2**64
    return int(whole) + (drawn < part)


# --- what went wrong ---


def _named(files: Sequence[RecordFile]) -> str:
    return ", ".join(file.name for file in files)


@dataclass(slots=True)
class _Problems:
    """Records that can't be read: how many of each reason, and the first few."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[tuple[str, BadRecord]] = field(default_factory=list)

    def add(self, where: str, problem: BadRecord) -> None:
        self.counts[problem.reason] += 1
        if len(self.first) < PROBLEMS_SHOWN:
            self.first.append((where, problem))

    def text(self, files: Sequence[RecordFile], read: int) -> str:
        skip = "or set data.on_bad_record: skip"
        lines = [f"{where}: {problem}; {problem.remedy}" for where, problem in self.first]
        total = self.counts.total()
        if total == 1:
            return f"{lines[0]}, {skip}"
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.counts.most_common())
        more = [f"and {total - len(lines):,} more"] if total > len(lines) else []
        head = (
            f"{total:,} of {read:,} records of {_named(files)} can't be read ({reasons}); fix them, {skip}:"
        )
        return "\n  ".join([head, *lines, *more])


def _nothing_text(files: Sequence[RecordFile], report: DataReport) -> str:
    places = "; ".join(f"{reason}: {', '.join(report.examples[reason])}" for reason in report.dropped)
    look = f"look at {places}" if places else "there are no records"
    return f"0 usable pairs in {_named(files)}: {report.summary()}; {look}"
