"""From a recipe to a run folder: load what it names, train, and write down what happened."""

import importlib.metadata
import logging
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from qorpo.build import chat_format_of, load_data, with_adapter
from qorpo.data.prepare import PreparedData
from qorpo.engine.device import check_bfloat16, resolve_on
from qorpo.engine.distributed import all_agree, from_main, main_first, this_process
from qorpo.errors import RunError
from qorpo.identity import LENGTHS, MAY_CHANGE, run_identity
from qorpo.model.load import load_model
from qorpo.out_of_memory import advised
from qorpo.planning.auto import cap_card
from qorpo.recipe import Recipe, load_recipe
from qorpo.reports.write import write_report
from qorpo.storage import read_note
from qorpo.training.checkpoint import check_checkpoint
from qorpo.training.checks import check_adapter, check_early_stopping
from qorpo.training.loop import Trainer
from qorpo.training.progress import Progress
from qorpo.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "flash-attn",
    "liger-kernel",
    "tokenizers",
)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a run left behind."""

    output: Path
    report: Path | None  # the run's page, and what it says in a sentence; None where it could not be drawn
    verdict: str | None
    trained: Path  # the adapter's folder, or the model's after full tuning
    steps: int  # that were taken
    best_step: int | None  # of the lowest evaluation loss, where there was an evaluation; 0 is the start
    metrics: dict[str, float]  # the last evaluation's, else the last step's
    evaluations: dict[int, dict[str, float]]  # metrics by step, the start's at 0
    last_step: dict[str, float]  # the last step's metrics
    stopped_early: str | None  # why, where train.early_stopping ended it
    warning: str | None  # where the held-out loss did not fall
    trainer: Trainer


def train(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    progress: Progress | None = None,
) -> TrainResult:
    """Train as a recipe says and leave its run folder.

    Args:
        recipe: a Recipe, a mapping of its keys, or a YAML file.
        overrides: `key.sub=value` changes.
        resume: go on with the run in the recipe's output, from its last checkpoint, exactly.
        progress: told how it goes; silent by default.

    Raises:
        QorpoError: what the user can fix, before anything is written where that can be known.
    """
    if not isinstance(recipe, Recipe) or overrides:
        recipe = load_recipe(recipe.to_dict() if isinstance(recipe, Recipe) else recipe, overrides)
    folder = RunFolder(recipe.output, is_main=this_process().is_main_process)
    with folder.owned():
        return _train(folder, recipe, resume, progress)


def _train(folder: RunFolder, recipe: Recipe, resume: bool, progress: Progress | None) -> TrainResult:
    with main_first():  # an adapter of the hub's is downloaded once
        recipe = with_adapter(recipe)
    if resume:
        folder.check_resumable()
        recipe = merge_saved(load_recipe(folder.recipe), recipe)
    else:
        folder.check_free()
    check_early_stopping(recipe, recipe.data.eval is not None)
    state = this_process()
    device = state.device
    check_bfloat16(device)
    recipe = resolve_on(recipe, device)

    chat = chat_format_of(recipe)
    if recipe.model.adapter is not None:
        all_agree(lambda: check_adapter(recipe, chat))
    with main_first():
        data = load_data(recipe, chat)
    if resume:
        check_same_data(folder, data)
        steps = folder.checkpoint_steps()
        if steps:  # before the model is loaded
            identity = from_main(lambda: run_identity(recipe, chat, data.train, data.eval))
            share = state.process_index, state.num_processes
            all_agree(lambda: check_checkpoint(folder.checkpoint(steps[-1]), identity, share))
    cap_card(recipe.memory.budget_gib, device)
    is_main, to_be_sharded = (
        state.is_main_process,
        recipe.memory.sharding != "none" and state.num_processes > 1,
    )
    with advised("`qorpo plan` with this recipe says what it needs, and what to change"):
        model = load_model(
            recipe.model.path,
            revision=recipe.model.revision,
            quantization=recipe.model.quantization,
            device="cpu" if to_be_sharded else device,
            trust_remote_code=recipe.model.trust_remote_code,
            allow_pickle=recipe.model.allow_pickle,
            empty=to_be_sharded and not is_main and recipe.model.quantization == "none",
            to_be_sharded=to_be_sharded,
        )
        trainer = Trainer(
            model, chat.tokenizer, recipe, data.train, data.eval, progress=progress if is_main else None
        )
    if resume and steps:
        trainer.checkpoints.checked = steps[-1]
    if is_main and not resume:
        write_down(folder, trainer.recipe, model, data)
    metrics = trainer.train(resume=resume)
    report, verdict = _draw(folder)
    return TrainResult(
        output=folder.path,
        report=report,
        verdict=verdict,
        trained=trainer.result,
        steps=trainer.state.step,
        best_step=trainer.state.best_step,
        metrics=metrics,
        evaluations=trainer.metrics.evaluations,
        last_step=trainer.metrics.last_step,
        stopped_early=trainer.stopped_early,
        warning=trainer.warning,
        trainer=trainer,
    )


def _draw(folder: RunFolder) -> tuple[Path | None, str | None]:
    """The run's page. The run is over and saved, so whatever goes wrong here is said and ends nothing."""
    if not folder.is_main:
        return None, None
    try:
        path, (verdict,) = write_report([folder.path])
        return path, verdict
    except Exception as error:
        logger.warning(
            "the run's page could not be drawn (%s); `qorpo report %s` tries again", error, folder.path
        )
        return None, None


def merge_saved(saved: Recipe, given: Recipe) -> Recipe:
    """The recipe to go on with: the saved run's, with what may change taken from the one given now.

    Raises:
        RunError: where the two would not give the same run.
    """
    resolved = dict(saved.values())
    for key, value in given.values():
        if value == "auto":
            given = given.replace(key, resolved[key])
    if changes := saved.differences(given, ignoring=MAY_CHANGE):
        raise RunError(
            f"output: {given.output} holds a run of another recipe; put these back, or give another output:\n  "
            + "\n  ".join(changes)
        )
    for change in saved.differences(given, ignoring=[key for key, _ in saved.values() if key not in LENGTHS]):
        logger.info("%s", change)
    return given


def check_same_data(folder: RunFolder, data: PreparedData) -> None:
    """Raises RunError where the files are not those that the run began with: steps would repeat or miss pairs."""
    saved = read_note(folder.path / "data.json") or {}
    parts = {name: now for name, now in data.as_dict().items() if isinstance(now, dict)}
    if any(_hashes(saved.get(name)) is None for name in parts):  # torn; checkpoints know the files too
        if folder.is_main:
            folder.write_json("data.json", data.as_dict())
        return
    for name, now in parts.items():
        if _hashes(saved[name]) != _hashes(now):
            raise RunError(
                f"data.{name}: the files have changed since {folder.path} began; put them back, or start anew"
            )


def _hashes(report: Any) -> list[str] | None:
    try:
        return [source["sha256"] for source in report["sources"]]
    except (KeyError, TypeError):
        return None


def write_down(folder: RunFolder, recipe: Recipe, model: Any, data: PreparedData) -> None:
    """What explains the run, before its first step; the recipe last, since it marks the folder as a run's."""
    folder.write_json("data.json", data.as_dict())
    folder.write_json("environment.json", environment(model))
    folder.write_recipe(recipe.to_yaml())


def environment(model: Any) -> dict[str, Any]:
    """Versions, device, qorpo's commit where it runs from a checkout, and the base's."""
    device = model.device
    return {
        "qorpo": _version("qorpo"),
        "commit": _commit(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "processes": PartialState().num_processes,
        "base_commit": getattr(model.config, "_commit_hash", None),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    here = Path(__file__).parent
    try:
        answer = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True, timeout=5
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
