"""What a source of pairs names: files, folders, datasets of the hub, or records in memory."""

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from qorpo.data.conversations import Layout, RankedPairs, shown
from qorpo.data.files import EXPECTED_FILE, Found, file_kind, read_records
from qorpo.data.shapes import FIELDS, SHAPES
from qorpo.errors import DataError
from qorpo.printable import printable

DEMO_FOLDER = Path(__file__).parents[1] / "demo"
DEMO_FILES = {"demo": "train.jsonl", "demo:train": "train.jsonl", "demo:eval": "eval.jsonl"}
MOST_BYTES_OF_INFO = 16 << 20


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


# Or a dataset of the datasets library, which is not imported for it.
Sources = (
    str | os.PathLike[str] | Source | Sequence[str | os.PathLike[str] | Source] | Sequence[Mapping] | Any
)


@dataclass(frozen=True, slots=True)
class RecordFile:
    """What a source comes down to: records to read, under a name, with a hash of their content."""

    name: str
    sha256: str
    read: Callable[[], Iterator[Found]]
    layout: Layout
    weight: float = 1.0


def open_sources(source: Sources, layout: Layout) -> list[RecordFile]:
    """The files behind one or several sources. Raises DataError with every one that can't be opened."""
    given = _listed(source)
    if not given:
        raise DataError("no source of pairs; give a file, a folder, a hub id, demo, or a list of these")
    if all(isinstance(each, Mapping) and not _is_dataset(each) for each in given):
        _check_layout(layout)
        return [_from_memory(given, layout)]
    files, problems = [], []
    for each in given:
        try:
            files += _open_source(each, layout)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return files


def _listed(source: Sources) -> list[Any]:
    if isinstance(source, str | bytes | os.PathLike | Source) or _is_dataset(source):
        return [source]
    if not isinstance(source, Sequence):
        raise DataError(
            f"{shown(source)} is no source of pairs; give a path, a list of paths, or a list of records"
        )
    return list(source)


def _open_source(given: Any, layout: Layout) -> list[RecordFile]:
    if _is_dataset(given):
        _check_layout(layout)
        return [_from_dataset("dataset", lambda: given, None, layout)]
    if not isinstance(given, str | os.PathLike | Source):
        raise DataError(f"{shown(given)} is no source of pairs; give a path, a hub id, or demo")
    source = given if isinstance(given, Source) else Source(os.fspath(given))
    _check_layout(layout)
    _check_layout(replace(layout, columns=source.columns))
    own = replace(layout, shape=source.shape or layout.shape, columns={**layout.columns, **source.columns})
    _check_layout(own)
    if not 0 < source.weight < float("inf"):
        raise DataError(f"{source.path}: weight {source.weight}; expected a number above 0")
    try:
        return [replace(file, weight=source.weight) for file in _open(source, own)]
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, with a zero byte, or ~nobody's
        what = getattr(error, "strerror", None) or error
        raise DataError(f"{shown(source.path)}: can't be opened ({what}); give another path") from error


def _check_layout(layout: Layout) -> None:
    names = [shape.name for shape in SHAPES]
    if layout.shape not in (None, *names):
        raise DataError(f"data.shape: {layout.shape!r}; expected {', '.join(names)}")
    if layout.ranked_pairs not in get_args(RankedPairs):
        raise DataError(
            f"data.ranked_pairs: {layout.ranked_pairs!r}; expected {', '.join(get_args(RankedPairs))}"
        )
    if not isinstance(layout.columns, Mapping):
        raise DataError(
            f"data.columns: {shown(layout.columns)}; expected a mapping, such as {{prompt: query}}"
        )
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
        return RecordFile(printable(str(path)), _sha256(path), lambda: read_records(path), layout)
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

    local = Path(source.path).expanduser()

    def load() -> Any:
        with contextlib.nullcontext() if local.is_dir() else _asked_once(source):
            return datasets.load_dataset(
                str(local) if local.is_dir() else source.path,
                source.config,
                split=source.split or "train",
                revision=source.revision,
            )

    return _from_dataset(source.path, load, source.split, layout)


@contextlib.contextmanager
def _asked_once(source: Source) -> Iterator[None]:
    """Where the hub does not answer, datasets looks for its own copy at once; it would ask for half a minute."""
    import datasets
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    was_offline = datasets.config.HF_HUB_OFFLINE
    unreachable = None
    try:
        url = hf_hub_url(source.path, "README.md", repo_type="dataset", revision=source.revision)
        get_hf_file_metadata(url, timeout=10)
    except HfHubHTTPError:
        pass  # it answered; datasets has the better words for what it said
    except Exception as error:  # of whichever HTTP library is underneath
        unreachable = " ".join(str(error).split())
        datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except ConnectionError as error:
        raise ConnectionError(f"the hub can't be reached: {unreachable}" if unreachable else error) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = was_offline


def _is_dataset(source: object) -> bool:
    return type(source).__module__.startswith("datasets.")


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
    if not hasattr(dataset, "data"):
        raise DataError(f"{path}: {type(dataset).__name__} can be read only once; give a Dataset")
    name = printable(f"{path}:{split}" if split else path)
    fingerprint = hashlib.sha256(dataset._fingerprint.encode()).hexdigest()
    label = printable(Path(path).name if Path(path).exists() else path)

    def read() -> Iterator[Found]:
        try:
            # Its files are mapped: offsets that point elsewhere would be followed there.
            dataset.data.validate(full=True)
            yield from (
                (f"{label}[{index}]", record) for index, record in enumerate(dataset.with_format(None))
            )
        except Exception as error:  # of damaged files, whatever Arrow and datasets raise
            raise DataError(
                f"{path}: can't be read ({' '.join(str(error).split())}); fetch or write it again"
            ) from error

    return RecordFile(name, fingerprint, read, layout)


def _from_memory(records: Sequence[Mapping], layout: Layout) -> RecordFile:
    sha = hashlib.sha256()
    for record in records:
        sha.update(repr(record).encode("utf-8", "surrogatepass"))
    return RecordFile(
        "records",
        sha.hexdigest(),
        lambda: ((f"records[{n}]", dict(record)) for n, record in enumerate(records)),
        layout,
    )


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
        with path.open("rb") as file:
            info = json.loads(file.read(MOST_BYTES_OF_INFO).decode("utf-8-sig"))
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
    given, tags = (_texts(entry.get(key), f"{path}: {name}: {key}") for key in ("columns", "tags"))
    columns = {
        _LLAMA_FACTORY_COLUMNS[key]: column for key, column in given.items() if key in _LLAMA_FACTORY_COLUMNS
    }
    own = replace(
        layout,
        columns={**columns, **layout.columns},
        roles={tags[tag]: role for tag, role in _TAG_ROLES.items() if tag in tags},
        role_key=tags.get("role_tag"),
        text_key=tags.get("content_tag"),
    )
    place = _texts(
        {key: entry.get(key) for key in ("file_name", "hf_hub_url", "subset", "split")}, f"{path}: {name}"
    )
    if any("dataset_info.json" in text for text in place.values()):
        raise DataError(f"{path}: {name} names a dataset_info.json; give the file with its records")
    if "file_name" in place:
        return _open(Source(str(path.parent / place["file_name"])), own)
    if "hf_hub_url" in place:
        return _open(Source(place["hf_hub_url"], config=place.get("subset"), split=place.get("split")), own)
    raise DataError(f"{path}: {name} names no file_name and no hf_hub_url; give its file itself")


def _texts(value: object, where: str) -> dict[str, str]:
    """A section of dataset_info.json whose values are text; a null is left out."""
    if not isinstance(value, dict | None):
        raise DataError(f"{where} is {shown(value)}; expected an object")
    texts = {key: text for key, text in (value or {}).items() if text is not None}
    for key, text in texts.items():
        if not isinstance(text, str):
            raise DataError(f"{where}: {key} is {shown(text)}; expected text")
    return texts


def _sha256(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            sha.update(chunk)
    return sha.hexdigest()
