"""Sources to tokens on disk: pairs are read once, tokenized by several processes, and found again by what made them.

Texts and tokens go through Arrow files, so memory holds neither whole. What a set was made of (files by content,
layout, limits, tokenizer, template, versions) is its name in the cache: anything else is another set.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from qorpo.data.filters import digest, hold_out, prompt_key
from qorpo.data.locate import RecordFile, Sources, open_sources
from qorpo.data.records import DataReport, PreferencePair
from qorpo.data.shapes import Layout
from qorpo.data.sources import OnBadRecord, iter_pairs
from qorpo.data.tokenize import ChatFormat, Limits, Tokenized, TokenizedPair, tokenize_batch, tokens_report
from qorpo.errors import DataError

logger = logging.getLogger(__name__)

PAIRS_PER_BATCH = 512
# Below this many pairs a process takes longer to start than to tokenize its share.
PAIRS_PER_PROCESS = 4096
SECONDS_OF_A_DAY = 24 * 60 * 60
_SIDES = ("prompt", "chosen", "rejected")


@dataclass(frozen=True, slots=True)
class PreparedData:
    """Pairs to train and evaluate on as tokens, and the report of the whole they were split from, where they were."""

    train: Tokenized
    eval: Tokenized | None
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
    seed: int = 0,
    cache: Path | None = None,
    num_processes: int | None = None,
) -> PreparedData:
    """Read, filter, split and tokenize; or find all that in the cache.

    Args:
        train, eval: as load_pairs takes them; `eval` may also be a fraction of train, split off by prompt, or None.
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
    )
    cache = cache or Path(datasets.config.HF_DATASETS_CACHE) / "qorpo"
    folder = cache / work.name(chat_format)
    if folder.exists():
        try:
            prepared = _read(folder)
        except (OSError, ValueError, KeyError):  # a disk's fault; Arrow's errors are among these
            shutil.rmtree(folder, ignore_errors=True)
        else:
            logger.info("data: tokens as made before, in %s", folder)
            return prepared
    unfinished = cache / f".{folder.name}.{os.getpid()}"
    for leftover in cache.glob(f".{folder.name}.*"):
        if time.time() - leftover.stat().st_mtime > SECONDS_OF_A_DAY:  # of a killed run, and no run at work
            shutil.rmtree(leftover, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        _build(unfinished, work, chat_format, num_processes)
        if not folder.exists():  # else another run made the same meanwhile
            unfinished.rename(folder)
    except OSError as error:
        raise DataError(
            f"{cache}: can't keep the tokens there ({error.strerror or error}); make room, "
            "or set HF_DATASETS_CACHE to another folder"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return _read(folder)


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
            "tokenizer": backend.to_str() if backend else sorted(tokenizer.get_vocab().items()),
            "class": [type(tokenizer).__name__, str(tokenizer.special_tokens_map)],
            "template": [tokenizer.chat_template, chat_format.stop_token_id],
            "versions": [
                importlib.metadata.version(name) for name in ("qorpo", "transformers", "tokenizers")
            ],
        }
        return hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:32]


# --- making ---


def _build(folder: Path, work: _Work, chat_format: ChatFormat, num_processes: int | None) -> None:
    """Fill the folder: tokens of both sets, which of their rows are kept, and the report, which is last."""
    tokenize = _TokenizeBatch(chat_format, work.limits)
    reports: dict[str, Any] = {"train": None, "eval": None, "whole": None, "leaked_prompts": 0}

    def read(name: str, files: Sequence[RecordFile]) -> tuple[DataReport, list[bytes]]:
        report = DataReport()
        pairs = iter_pairs(files, report, min_margin=work.min_margin, on_bad_record=work.on_bad_record)
        return report, _write_texts(folder / f"{name}.texts", pairs)

    def side(name: str, tokens_name: str, report: DataReport, mine: np.ndarray) -> None:
        table = _table(folder, tokens_name)
        unusable = np.array([reason is not None for reason in table["reason"].to_pylist()])
        for row in np.flatnonzero(mine & unusable).tolist():
            report.drop(table["reason"][row].as_py(), table["source"][row].as_py())
        rows = np.flatnonzero(mine & ~unusable)
        np.save(folder / f"{name}.npy", rows)
        pairs = TokenizedPairs(table, rows)
        reports[name] = tokens_report(report, pairs.lengths().tolist(), pairs.cuts().tolist()).as_dict()

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
    (folder / "report.json").write_text(json.dumps(reports), encoding="utf-8")


def _write_texts(path: Path, pairs: Iterable[PreferencePair]) -> list[bytes]:
    """Write pairs as an Arrow stream; returns their prompts' digests."""
    import pyarrow

    schema = pyarrow.schema([(name, pyarrow.string()) for name in ("prompt", "chosen", "rejected", "source")])
    prompts: list[bytes] = []
    batch: list[dict[str, str]] = []
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, schema) as writer:

        def flush() -> None:
            writer.write(pyarrow.RecordBatch.from_pylist(batch, schema))
            batch.clear()

        for pair in pairs:
            prompts.append(digest(prompt_key(pair.prompt)))
            batch.append(
                {
                    "prompt": json.dumps(pair.prompt),
                    "chosen": pair.chosen,
                    "rejected": pair.rejected,
                    "source": pair.source,
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

    def __init__(self, chat_format: ChatFormat, limits: Limits):
        self.chat_format, self.limits = chat_format, limits

    def __call__(self, texts: Any) -> Any:
        import pyarrow

        pairs = [
            PreferencePair(tuple(json.loads(row["prompt"])), row["chosen"], row["rejected"], row["source"])
            for row in texts.to_pylist()
        ]
        results = tokenize_batch(pairs, self.chat_format, self.limits)
        kept = [result if isinstance(result, TokenizedPair) else None for result in results]
        ids, flag = pyarrow.list_(pyarrow.int32()), pyarrow.bool_()
        columns = {
            f"{s}_ids": pyarrow.array([p and getattr(p, f"{s}_ids") for p in kept], ids) for s in _SIDES
        }
        columns |= {
            f"{s}_cut": pyarrow.array([p and getattr(p, f"{s}_cut") for p in kept], flag) for s in _SIDES
        }
        reasons = [None if isinstance(result, TokenizedPair) else result.reason for result in results]
        columns["source"] = pyarrow.array([pair.source for pair in pairs], pyarrow.string())
        columns["reason"] = pyarrow.array(reasons, pyarrow.string())
        return pyarrow.table(columns)


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


def _read(folder: Path) -> PreparedData:
    reports = json.loads((folder / "report.json").read_text(encoding="utf-8"))

    def side(name: str) -> Tokenized | None:
        if reports[name] is None:
            return None
        tokens_name = "train" if reports["whole"] else name
        pairs = TokenizedPairs(_table(folder, tokens_name), np.load(folder / f"{name}.npy"))
        return Tokenized(pairs, DataReport.from_dict(reports[name]))

    train = side("train")
    assert train is not None
    whole = reports["whole"] and DataReport.from_dict(reports["whole"])
    return PreparedData(train, side("eval"), whole, reports["leaked_prompts"])


def _table(folder: Path, name: str) -> Any:
    """A set's tokens, mapped into memory, not read."""
    import pyarrow

    return pyarrow.concat_tables(
        pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        for path in sorted(folder.glob(f"{name}*tokens*"))
    )


class TokenizedPairs(Sequence[TokenizedPair]):
    """Tokenized pairs in Arrow files: some rows of a table, in order, each read when it is asked for."""

    def __init__(self, table: Any, rows: np.ndarray):
        self._table, self._rows = table, rows
        self._batches = table.to_batches()
        self._ends = np.cumsum([batch.num_rows for batch in self._batches])

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = int(self._rows[index])
        place = int(np.searchsorted(self._ends, row, side="right"))
        batch = self._batches[place]
        row -= int(self._ends[place]) - batch.num_rows

        def ids(name: str) -> tuple[int, ...]:
            return tuple(batch[name][row].values.to_numpy().tolist())

        return TokenizedPair(
            *(ids("prompt_ids"), ids("chosen_ids"), ids("rejected_ids"), batch["source"][row].as_py()),
            *(batch[name][row].as_py() for name in ("prompt_cut", "chosen_cut", "rejected_cut")),
        )

    def largest_token_id(self) -> int:
        import pyarrow.compute as compute

        return max(compute.max(compute.list_flatten(self._table[f"{side}_ids"])).as_py() for side in _SIDES)

    def lengths(self) -> np.ndarray:
        """(P, 3) token counts of prompt, chosen and rejected."""
        import pyarrow.compute

        columns = [pyarrow.compute.list_value_length(self._table[f"{side}_ids"]) for side in _SIDES]
        return self._columns(columns, np.int64)

    def cuts(self) -> np.ndarray:
        """(P, 3) whether prompt, chosen and rejected were cut."""
        return self._columns([self._table[f"{side}_cut"] for side in _SIDES], np.bool_)

    def _columns(self, columns: list[Any], dtype: type) -> np.ndarray:
        # Rows first: a dropped row is null, and a column with a null becomes floats or objects.
        taken = [column.take(self._rows).to_numpy() for column in columns]
        return np.stack(taken, axis=1).astype(dtype, casting="safe")


def largest_token_id(pairs: Sequence[TokenizedPair]) -> int:
    """The largest id in any of the pairs, -1 where there are none."""
    if isinstance(pairs, TokenizedPairs):
        return pairs.largest_token_id()
    return max((max(*p.prompt_ids, *p.chosen_ids, *p.rejected_ids) for p in pairs), default=-1)


def longest_pair(pairs: Sequence[TokenizedPair]) -> tuple[int, int, int]:
    """Token counts of prompt, chosen and rejected of the pair with most of them."""
    if isinstance(pairs, TokenizedPairs):
        lengths = pairs.lengths()
        return tuple(lengths[lengths.sum(1).argmax()].tolist())
    return max(((len(p.prompt_ids), len(p.chosen_ids), len(p.rejected_ids)) for p in pairs), key=sum)
