"""Where preference pairs come from: files, folders, datasets of the hub; and the pairs in them, one after another."""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qorpo.data.files import EXPECTED_FILE, Found, file_kind, read_records
from qorpo.data.filters import Repeats, digest, judge, notes, prompt_key
from qorpo.data.records import BadRecord, DataReport, PairSet, PreferencePair, Unusable
from qorpo.data.shapes import FIELDS, SHAPES, Comparison, Layout, RankedPairs, majority, read_comparisons
from qorpo.errors import DataError

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
DEMO_FILES = {"demo": "train.jsonl", "demo:train": "train.jsonl", "demo:eval": "eval.jsonl"}

PROBLEMS_SHOWN = 5

OnBadRecord = Literal["fail", "skip"]


@dataclass(frozen=True, slots=True)
class Source:
    """A file, a folder, a dataset of the hub, or demo; `path` may end in ":split".

    `weight`: how often each pair counts; 2 is twice, 0.5 for about half of them, drawn by their content.
    `shape` and `columns` as in Layout.
    """

    path: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None
    weight: float = 1.0
    shape: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)


Sources = str | os.PathLike[str] | Source | Sequence[str | os.PathLike[str] | Source]


@dataclass(frozen=True, slots=True)
class RecordFile:
    """What a source comes down to: records to read, under a name, with a hash of their content."""

    name: str
    sha256: str
    read: Callable[[], Iterator[Found]]
    layout: Layout
    weight: float = 1.0


def load_pairs(
    source: Sources,
    *,
    shape: str | None = None,
    columns: Mapping[str, str] | None = None,
    ranked_pairs: RankedPairs = "best-worst",
    min_margin: float = 0.0,
    on_bad_record: OnBadRecord = "fail",
) -> PairSet:
    """The preference pairs of a source, or of a list of them.

    Args:
        source: a file (.jsonl, .json, .csv, these also as .gz or .zst; .parquet, .arrow), a folder of these, a
            folder of `save_to_disk`, a hub id ("name:split"), a dataset of LLaMA-Factory's
            ("dataset_info.json:name"), "demo" or "demo:eval"; or a `Source`.
        shape: a name in SHAPES, where the columns alone would not say; None: recognised.
        columns: {qorpo's name: the records' own} for columns under other names than ALIASES holds.
        ranked_pairs: which of several ranked answers make pairs: best-worst, adjacent or all.
        min_margin: least difference of scores, or of a preference between 1 and 2 (0 is a tie, 1 is sure).
        on_bad_record: fail, or skip and count a record that can't be read.

    A record that makes no pair (`judge` says which) is dropped and counted. A record that can't be read raises
    DataError, after all of them have been read and with the first few named; with on_bad_record="skip" it is
    dropped and counted too. DataError as well for a source that can't be read, or when no pair is left.
    """
    if on_bad_record not in ("fail", "skip"):
        raise DataError(f"data.on_bad_record: {on_bad_record!r}; expected fail or skip")
    layout = Layout(shape=shape, columns=columns or {}, ranked_pairs=ranked_pairs)
    report = DataReport()
    files = open_sources(source, layout)
    return PairSet(iter_pairs(files, report, min_margin=min_margin, on_bad_record=on_bad_record), report)


def iter_pairs(
    files: Sequence[RecordFile],
    report: DataReport,
    *,
    min_margin: float = 0.0,
    on_bad_record: OnBadRecord = "fail",
) -> Iterator[PreferencePair]:
    """The pairs of files, counting in `report` as they go; raises at the end as load_pairs does."""
    problems: list[tuple[str, BadRecord]] = []
    repeats = Repeats()
    for file in files:
        kept_before = report.kept
        for where, comparison in _comparisons(file, report, problems):
            try:
                pair = judge(comparison, where, min_margin)
            except Unusable as finding:
                report.drop(finding.reason, where)
                continue
            is_stated = comparison.basis == "stated"
            for reason in [*notes(pair, comparison.margin if is_stated else None), *repeats.notes(pair)]:
                report.note(reason, where)
            copies = _copies(pair, file.weight)
            if not copies:
                report.drop("left_out_by_weight", where)
            report.kept += copies
            yield from [pair] * copies
        report.sources.append({"path": file.name, "sha256": file.sha256, "kept": report.kept - kept_before})
    if problems and on_bad_record == "fail":
        raise DataError(_problems_text(files, report.read, problems))
    if not report.kept:
        raise DataError(_nothing_text(files, report))


def _comparisons(
    file: RecordFile, report: DataReport, problems: list[tuple[str, BadRecord]]
) -> Iterator[tuple[str, Comparison]]:
    """A file's comparisons; annotators' votes on the same two answers come as one, last."""
    votes: dict[bytes, list[tuple[str, Comparison]]] = {}
    for where, record in file.read():
        try:
            if isinstance(record, BadRecord):
                raise record
            comparisons = read_comparisons(record, file.layout)
        except (BadRecord, Unusable) as finding:
            report.drop(finding.reason, where)
            if isinstance(finding, BadRecord):
                problems.append((where, finding))
            continue
        if record.get("tools"):
            report.note("tools_left_out", where)
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


def _copies(pair: PreferencePair, weight: float) -> int:
    if weight == 1:
        return 1
    whole, part = divmod(weight, 1)
    drawn = int.from_bytes(digest((prompt_key(pair.prompt), pair.chosen, pair.rejected))[:8], "big") / 2**64
    return int(whole) + (drawn < part)


# --- what a source names ---


def open_sources(source: Sources, layout: Layout) -> list[RecordFile]:
    """The files behind one or several sources. Raises DataError with every one that can't be opened."""
    given = [source] if isinstance(source, str | os.PathLike | Source) else list(source)
    if not given:
        raise DataError("no source of pairs; give a file, a folder, a hub id, demo, or a list of these")
    files, problems = [], []
    for each in given:
        each = each if isinstance(each, Source) else Source(os.fspath(each))
        own = replace(layout, shape=each.shape or layout.shape, columns={**layout.columns, **each.columns})
        try:
            _check_layout(own)
            if not 0 < each.weight < float("inf"):
                raise DataError(f"{each.path}: weight {each.weight}; expected a number above 0")
            files += [replace(file, weight=each.weight) for file in _open(each, own)]
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return files


def _check_layout(layout: Layout) -> None:
    names = [shape.name for shape in SHAPES]
    if layout.shape not in (None, *names):
        raise DataError(f"data.shape: {layout.shape!r}; expected {', '.join(names)}")
    if unknown := [name for name in layout.columns if name not in FIELDS]:
        raise DataError(f"data.columns: unknown {', '.join(unknown)}; expected {', '.join(FIELDS)}")


def _open(source: Source, layout: Layout) -> list[RecordFile]:
    if source.path in DEMO_FILES:
        return [_file(DEMO_FOLDER / DEMO_FILES[source.path], layout)]
    path = Path(source.path).expanduser()
    if not path.exists() and source.split is None and ":" in source.path:
        front, _, split = source.path.rpartition(":")
        source, path = replace(source, path=front, split=split), Path(front).expanduser()
    if path.is_dir():
        return _open_folder(path, source, layout)
    if path.is_file():
        if path.name == "dataset_info.json":
            return _open_llama_factory(path, source.split, layout)
        if file_kind(path)[0] is None:
            raise DataError(f"{path}: unknown extension {path.suffix!r}; expected {EXPECTED_FILE}")
        if source.split or source.config:
            raise DataError(f"{path}: a file has no {'split' if source.split else 'config'}; leave it out")
        return [_file(path, layout)]
    if re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", source.path) and file_kind(path)[0] is None:
        return [_from_hub(source, layout)]
    raise DataError(f"{path}: no such file; expected {EXPECTED_FILE}, a folder, a hub id, or the name demo")


def _file(path: Path, layout: Layout) -> RecordFile:
    try:
        return RecordFile(str(path), _sha256(path), lambda: read_records(path), layout)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror or error})") from error


# Words in files' names that tell a split, as the hub reads them.
_SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
}  # fmt: skip


def _open_folder(folder: Path, source: Source, layout: Layout) -> list[RecordFile]:
    if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
        return [_from_disk(folder, source, layout)]
    if source.config or _has_configs(folder / "README.md"):
        return [_from_hub(source, layout)]
    files = sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and file_kind(path)[0]
        and not any(p.startswith(".") for p in path.relative_to(folder).parts)
    )
    splits = {path: _split_of(path.relative_to(folder)) for path in files}
    if source.split is not None:
        wanted = _SPLIT_WORDS.get(source.split.lower(), source.split)
        files = [path for path in files if splits[path] == wanted]
    counts = Counter(splits[path] or "no split" for path in files)
    if len(counts.keys() - {"no split"}) > 1:
        held = ", ".join(
            f"{name} ({count} file{'s' * (count > 1)})" for name, count in sorted(counts.items())
        )
        raise DataError(
            f"{folder}: holds several splits: {held}; name one, as {folder}:train, or name the files"
        )
    if not files:
        held = f" of split {source.split!r}" if source.split else ""
        raise DataError(f"{folder}: a folder without files{held} to read; expected {EXPECTED_FILE}")
    return [_file(path, layout) for path in files]


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _has_configs(readme: Path) -> bool:
    """Whether a dataset's card lays out its files."""
    if not readme.is_file():
        return False
    front, _, _ = readme.read_text(encoding="utf-8", errors="replace").partition("\n---")
    return front.startswith("---") and "\nconfigs:" in front


def _from_disk(folder: Path, source: Source, layout: Layout) -> RecordFile:
    import datasets

    return _from_dataset(str(folder), lambda: datasets.load_from_disk(str(folder)), source.split, layout)


def _from_hub(source: Source, layout: Layout) -> RecordFile:
    import datasets

    def load() -> Any:
        return datasets.load_dataset(
            str(Path(source.path).expanduser()) if Path(source.path).expanduser().is_dir() else source.path,
            source.config,
            split=source.split or "train",
            revision=source.revision,
        )

    return _from_dataset(source.path, load, source.split, layout)


def _from_dataset(path: str, load: Callable[[], Any], split: str | None, layout: Layout) -> RecordFile:
    try:
        dataset = load()
    except Exception as error:  # whatever datasets, the hub's client or the network raise
        reason = " ".join(str(error).split())
        raise DataError(
            f"{path}: can't be read as a dataset ({type(error).__name__}: {reason}); check the name, its config, "
            "split and revision, and the network, or give a local file"
        ) from error
    if isinstance(dataset, dict):
        wanted = split or "train"
        if wanted not in dataset:
            raise DataError(
                f"{path}: no split {wanted!r}; it has {', '.join(dataset)}: name one, as {path}:NAME"
            )
        dataset = dataset[wanted]
    name = f"{path}:{split}" if split else path
    fingerprint = hashlib.sha256(dataset._fingerprint.encode()).hexdigest()
    label = Path(path).name if Path(path).exists() else path

    def read() -> Iterator[Found]:
        yield from ((f"{label}[{index}]", record) for index, record in enumerate(dataset))

    return RecordFile(name, fingerprint, read, layout)


_TAG_ROLES = {
    "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system",
    "observation_tag": "tool", "function_tag": "assistant",
}  # fmt: skip
_LLAMA_FACTORY_COLUMNS = {"messages": "prompt", "query": "input"} | {
    name: name for name in ("prompt", "history", "system", "chosen", "rejected")
}


def _open_llama_factory(path: Path, name: str | None, layout: Layout) -> list[RecordFile]:
    """A dataset as LLaMA-Factory's dataset_info.json describes it: file, columns and tags."""
    try:
        info = json.loads(path.read_text(encoding="utf-8-sig"))
        entries = {key: entry for key, entry in info.items() if entry.get("ranking")}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: no dataset_info.json as LLaMA-Factory has it ({error})") from error
    if name not in entries:
        found = (
            f"{name!r} is " + ("no preference data" if name in info else "not in it")
            if name
            else "name a dataset"
        )
        raise DataError(
            f"{path}: {found}; it has {', '.join(entries) or 'no preference data'}, as {path}:NAME"
        )
    entry = entries[name]
    columns = {
        _LLAMA_FACTORY_COLUMNS[key]: column
        for key, column in entry.get("columns", {}).items()
        if key in _LLAMA_FACTORY_COLUMNS
    }
    tags = entry.get("tags", {})
    own = replace(
        layout,
        columns={**columns, **layout.columns},
        roles={tags[tag]: role for tag, role in _TAG_ROLES.items() if tag in tags},
        role_key=tags.get("role_tag"),
        text_key=tags.get("content_tag"),
    )
    if "file_name" in entry:
        return _open(Source(str(path.parent / entry["file_name"])), own)
    if "hf_hub_url" in entry:
        return _open(Source(entry["hf_hub_url"], config=entry.get("subset"), split=entry.get("split")), own)
    raise DataError(f"{path}: {name} names no file_name and no hf_hub_url; give its file itself")


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()


# --- what went wrong ---


def _named(files: Sequence[RecordFile]) -> str:
    return ", ".join(file.name for file in files)


def _problems_text(files: Sequence[RecordFile], read: int, problems: list[tuple[str, BadRecord]]) -> str:
    skip = "or set data.on_bad_record: skip"
    shown = problems[:PROBLEMS_SHOWN]
    if len(problems) == 1:
        ((where, problem),) = shown
        return f"{where}: {problem}; {problem.remedy}, {skip}"
    counts = Counter(problem.reason for _, problem in problems).most_common()
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in counts)
    lines = [
        f"{len(problems):,} of {read:,} records of {_named(files)} can't be read ({reasons}); fix them, {skip}:"
    ]
    lines += [f"{where}: {problem}; {problem.remedy}" for where, problem in shown]
    if len(problems) > len(shown):
        lines.append(f"and {len(problems) - len(shown):,} more")
    return "\n  ".join(lines)


def _nothing_text(files: Sequence[RecordFile], report: DataReport) -> str:
    places = "; ".join(f"{reason}: {', '.join(where)}" for reason, where in report.examples.items())
    look = f"look at {places}" if places else "there are no records"
    return f"0 usable pairs in {_named(files)}: {report.summary()}; {look}"
