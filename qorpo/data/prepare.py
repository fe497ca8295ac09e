"""Sources to tokens on disk: pairs are read once, tokenized by several processes, and found again by what made them.

Texts and tokens go through Arrow files, so memory holds neither whole. What a set was made of (files by content,
layout, limits, tokenizer, template, versions) is its name in the cache: anything else is another set.
"""

import contextlib
import hashlib
import importlib.metadata
import io
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from qorpo.data.chat_format import ChatFormat
from qorpo.data.counts import DataReport
from qorpo.data.filters import digest, hold_out, prompt_key
from qorpo.data.groups import TokenizedData, tokens_report
from qorpo.data.locate import RecordFile, Sources, open_sources
from qorpo.data.records import Demonstration, Example, PreferencePair, TrainTurns
from qorpo.data.shapes import Layout
from qorpo.data.sources import OnBadRecord, iter_examples
from qorpo.data.token_table import ArrowGroups, arrow_schema, read_table
from qorpo.data.tokenize import Limits, tokenize_batch
from qorpo.errors import DamageError, DataError
from qorpo.failed_write import failed_write
from qorpo.manifest import MANIFEST, check_folder, write_manifest
from qorpo.storage import sweep, whole_folder, write_json

logger = logging.getLogger(__name__)

PAIRS_PER_BATCH = 128  # a tokenizer's own record of them takes many times their tokens
# Below this many pairs a process takes longer to start than to tokenize its share.
PAIRS_PER_PROCESS = 4096


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Pairs to train and evaluate on as tokens, and the report of the whole they were split from, where they were."""

    train: TokenizedData
    eval: TokenizedData | None
    whole: DataReport | None
    leaked_prompts: int  # distinct evaluation prompts that occur in train as well

    def as_dict(self) -> dict[str, Any]:
        return {
            "train": self.train.report.as_dict(),
            "eval": self.eval and self.eval.report.as_dict(),
            "split_from": self.whole and self.whole.as_dict(),
            "eval_prompts_in_train": self.leaked_prompts,
        }


def prepare_pairs(
    train: Sources,
    eval: Sources | float | None,
    chat_format: ChatFormat,
    limits: Limits,
    *,
    layout: Layout,
    min_margin: float = 0.0,
    on_bad_record: OnBadRecord = "fail",
    train_turns: TrainTurns | Literal["auto"] | None = None,
    labelled: bool = False,
    num_responses: int = 2,
    seed: int = 0,
    cache: Path | None = None,
    num_processes: int | None = None,
) -> PreparedData:
    """Read, filter, split and tokenize; or find all that in the cache.

    Args:
        train, eval: as load_pairs takes them; `eval` may also be a fraction of train, split off by prompt, or None.
        train_turns, labelled: as load_pairs has them.
        num_responses: how many responses of a group are kept, the first.
        cache: a folder; None: "qorpo" in the folder that datasets keeps its own in (HF_DATASETS_CACHE).
        num_processes: to tokenize with; None: one a core, where there is work enough.

    Raises:
        DataError: as load_pairs, tokenize_pairs and hold_out do, and where the cache can't be written.
    """
    import datasets

    work = _Work(
        train=open_sources(train, layout),
        eval=None if isinstance(eval, float | None) else open_sources(eval, layout),
        fraction=eval if isinstance(eval, float) else None,
        seed=seed,
        limits=limits,
        min_margin=min_margin,
        on_bad_record=on_bad_record,
        train_turns=train_turns,
        labelled=labelled,
        num_responses=num_responses,
    )
    cache = cache or Path(datasets.config.HF_DATASETS_CACHE) / "qorpo"
    folder = cache / work.name(chat_format)
    if (found := _open(folder)) is not None:
        return found
    try:
        sweep(cache)
        with contextlib.suppress(_MadeMeanwhile):
            _make(folder, work, chat_format, num_processes)
        return _read(folder)
    except (OSError, ValueError) as error:
        if (failed := failed_write(error)) is None:
            raise
        raise DataError(
            f"{cache}: can't keep the tokens there ({failed.reason}); {failed.remedy}, or set HF_DATASETS_CACHE to "
            "another folder"
        ) from error


@dataclass(frozen=True, slots=True)
class _Work:
    """What is to be prepared."""

    train: Sequence[RecordFile]
    eval: Sequence[RecordFile] | None
    fraction: float | None  # of train, to evaluate on
    seed: int
    limits: Limits
    min_margin: float
    on_bad_record: OnBadRecord
    train_turns: TrainTurns | Literal["auto"] | None
    labelled: bool
    num_responses: int

    def name(self, chat_format: ChatFormat) -> str:
        """A hash of all that decides the tokens and the report."""

        def contents(files: Sequence[RecordFile] | None) -> Any:
            return files and [(file.name, file.sha256, file.weight, asdict(file.layout)) for file in files]

        tokenizer = chat_format.tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", None)
        made_of = {
            "files": [contents(self.train), contents(self.eval)],
            "split": self.fraction and (self.fraction, self.seed),
            "keys": [asdict(self.limits), self.min_margin, self.on_bad_record],
            "responses": [self.train_turns, self.labelled, self.num_responses],
            "tokenizer": backend.to_str() if backend else sorted(tokenizer.get_vocab().items()),
            "class": [type(tokenizer).__name__, str(tokenizer.special_tokens_map)],
            "template": [tokenizer.chat_template, chat_format.stop_token_id],
            "columns": str(arrow_schema()),
            "versions": [
                importlib.metadata.version(name) for name in ("qorpo", "transformers", "tokenizers")
            ],
        }
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


# --- making ---


class _MadeMeanwhile(Exception):  # noqa: N818 (no error: it leaves the block that would write)
    """Another process has made the same tokens."""


def _make(folder: Path, work: _Work, chat_format: ChatFormat, num_processes: int | None) -> None:
    """Make the folder, whole or not at all; one process at a time does. Raises _MadeMeanwhile."""
    with whole_folder(folder, wait=True) as unfinished:
        if _open(folder) is not None:
            raise _MadeMeanwhile
        if folder.exists():
            shutil.rmtree(folder)  # damaged, and no other process removes it: that one would hold the lock
        _build(unfinished, work, chat_format, num_processes)
        write_manifest(unfinished, {"tokens": folder.name})


def _build(folder: Path, work: _Work, chat_format: ChatFormat, num_processes: int | None) -> None:
    """Fill the folder: tokens of both sets, which of their rows are kept, and the report, which is last."""
    tokenize = _TokenizeBatch(chat_format, work.limits, work.num_responses, work.on_bad_record)
    reports: dict[str, Any] = {"train": None, "eval": None, "whole": None, "leaked_prompts": 0}

    def read(name: str, files: Sequence[RecordFile]) -> tuple[DataReport, list[bytes]]:
        report = DataReport()
        pairs = iter_examples(
            files,
            report,
            min_margin=work.min_margin,
            on_bad_record=work.on_bad_record,
            train_turns=work.train_turns,
            labelled=work.labelled,
        )
        return report, _write_texts(folder / f"{name}.texts", pairs)

    def side(name: str, tokens_name: str, report: DataReport, mine: np.ndarray) -> None:
        table = read_table(folder, tokens_name)
        unusable = np.array([reason is not None for reason in table["reason"].to_pylist()])
        for row in np.flatnonzero(mine & unusable).tolist():
            report.drop(table["reason"][row].as_py(), table["source"][row].as_py())
        rows = np.flatnonzero(mine & ~unusable)
        content = io.BytesIO()
        np.save(content, rows)  # into a file it passes over a failed write in silence
        (folder / f"{name}.npy").write_bytes(content.getvalue())
        groups = ArrowGroups(table, rows)
        try:
            tokens_report(report, groups.lengths().tolist(), groups.cuts().tolist())
        except DataError as error:
            raise DataError(f"data.{name}: {error}") from None
        reports[name] = report.as_dict()

    report, prompts = read("train", work.train)
    _tokenize(folder, "train", tokenize, num_processes)
    if work.fraction is not None:
        held_out = np.array(hold_out(prompts, work.fraction, work.seed))
        reports["whole"] = report.as_dict()
        for name, mine in (("train", ~held_out), ("eval", held_out)):
            own = DataReport(kept=int(mine.sum()), sources=report.sources)
            side(name, "train", own, mine)
    else:
        side("train", "train", report, np.full(len(prompts), True))
        if work.eval is not None:
            eval_report, eval_prompts = read("eval", work.eval)
            _tokenize(folder, "eval", tokenize, num_processes)
            side("eval", "eval", eval_report, np.full(len(eval_prompts), True))
            reports["leaked_prompts"] = len(set(prompts) & set(eval_prompts))
    write_json(folder / "report.json", reports)


def _write_texts(path: Path, examples: Iterable[Example]) -> list[bytes]:
    """Write examples as an Arrow stream; returns their prompts' digests."""
    import pyarrow

    text = pyarrow.string()
    schema = pyarrow.schema(
        {
            "prompt": text,
            "answers": pyarrow.list_(text),
            "source": text,
            "margin": pyarrow.float64(),
            "every_turn": pyarrow.bool_(),
            "desirable": pyarrow.bool_(),
        }
    )
    prompts: list[bytes] = []
    batch: list[dict[str, Any]] = []
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:

        def flush() -> None:
            writer.write(pyarrow.RecordBatch.from_pylist(batch, schema))
            batch.clear()

        for example in examples:
            prompts.append(digest(prompt_key(example.prompt)))
            batch.append(
                {
                    "prompt": json.dumps(example.prompt),
                    "answers": example.answers,
                    "source": example.source,
                    "margin": example.margin,
                    "every_turn": isinstance(example, Demonstration) and example.every_turn,
                    "desirable": example.desirable,
                }
            )
            if len(batch) == PAIRS_PER_BATCH:
                flush()
        flush()
    return prompts


def _tokenize(folder: Path, name: str, tokenize: "_TokenizeBatch", num_processes: int | None) -> None:
    """The set's tokens file, or files, from its texts, which go."""
    import datasets

    texts = folder / f"{name}.texts"
    pairs = datasets.Dataset.from_file(str(texts)).with_format("arrow")
    num_processes = num_processes or min(_num_cores(), len(pairs) // PAIRS_PER_PROCESS)
    # A tokenizer's own threads and several processes would be too many, and deadlock after a fork.
    one_process_each = {"TOKENIZERS_PARALLELISM": "false"} if num_processes > 1 else {}
    with _environment(one_process_each):
        pairs.map(
            tokenize,
            batched=True,
            batch_size=PAIRS_PER_BATCH,
            num_proc=num_processes if num_processes > 1 else None,
            remove_columns=pairs.column_names,
            cache_file_name=str(folder / f"{name}.tokens"),
            new_fingerprint=name,
            desc=f"tokenizing {name}",
        )
    texts.unlink()


class _TokenizeBatch:
    """From a table of texts to one of tokens, or of the reason why a pair is unusable."""

    def __init__(
        self, chat_format: ChatFormat, limits: Limits, num_responses: int, on_bad_record: OnBadRecord
    ):
        self.chat_format, self.limits = chat_format, limits
        self.num_responses, self.on_bad_record = num_responses, on_bad_record

    def __call__(self, texts: Any) -> Any:
        import pyarrow

        examples = [_example(row) for row in texts.to_pylist()]
        results = tokenize_batch(
            examples, self.chat_format, self.limits, self.num_responses, self.on_bad_record
        )
        schema = arrow_schema()
        columns: dict[str, list[Any]] = {
            name: [getattr(result, name, None) for result in results] for name in schema.names
        }
        columns["source"] = [example.source for example in examples]
        return pyarrow.table(columns, schema)


def _example(row: Mapping[str, Any]) -> Example:
    prompt, answers = tuple(json.loads(row["prompt"])), row["answers"]
    if len(answers) == 1:
        return Demonstration(prompt, answers[0], row["source"], row["every_turn"], row["desirable"])
    return PreferencePair(prompt, answers[0], answers[1], row["source"], row["margin"])


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


# --- reading ---


def _open(folder: Path) -> PreparedData | None:
    """What was made before, held to its manifest before any of it is mapped; None where it is not there, or damaged."""
    if not folder.exists():
        return None
    try:
        manifest = check_folder(folder, "it is made again")
        names = {path.name for path in folder.iterdir()}
        if manifest is None or manifest.belongs_to != {"tokens": folder.name}:
            raise DamageError(f"{folder}: has no manifest of its own; it is made again")
        if extra := names - {MANIFEST, *manifest.files}:
            raise DamageError(f"{folder / min(extra)}: was added; the folder is made again")
        prepared = _read(folder)
    except (DamageError, OSError) as error:
        logger.warning("data: tokens kept before: %s", error)
        return None
    logger.info("data: tokens as made before, in %s", folder)
    return prepared


def _read(folder: Path) -> PreparedData:
    reports = json.loads((folder / "report.json").read_text(encoding="utf-8"))

    def side(name: str) -> TokenizedData | None:
        if reports[name] is None:
            return None
        tokens_name = "train" if reports["whole"] else name
        groups = ArrowGroups(read_table(folder, tokens_name), np.load(folder / f"{name}.npy"))
        return TokenizedData(groups, DataReport.from_dict(reports[name]))

    train = side("train")
    assert train is not None
    whole = reports["whole"] and DataReport.from_dict(reports["whole"])
    return PreparedData(train, side("eval"), whole, reports["leaked_prompts"])
