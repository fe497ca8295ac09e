"""Checkpoints: what trains and where it stands, not the frozen base.

Of adapters: adapter_model.safetensors and adapter_config.json (PEFT's own format, so a checkpoint opens as an adapter)
and optimizer.pt. Of full tuning: shards/ (see `sharded`) and schedule.pt. With either state.json (`TrainState`) and a
manifest of all files, with what they belong to. The order of pairs and every step's dropout follow from the seed and the
step, so no random state is needed to go on exactly.
"""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils._pytree import tree_map

from qorpo.engine.distributed import Ranks, all_agree, gathered, sharded_like
from qorpo.engine.optim import load_optimizer_state
from qorpo.errors import DamageError, RunError
from qorpo.identity import differences
from qorpo.manifest import MANIFEST, check_folder, read_manifest, write_manifest
from qorpo.out_of_memory import is_out_of_memory
from qorpo.training.run_folder import RunFolder
from qorpo.training.saving import save_adapter
from qorpo.training.sharded import hashes_of_all_ranks, load_parameters, load_shards, save_shards

logger = logging.getLogger(__name__)

STATE = "state.json"
# What libraries raise where a file is not what it should be.
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, RuntimeError, UnpicklingError,
    SafetensorError,
)  # fmt: skip


@dataclass(slots=True)
class TrainState:
    """Where a run stands."""

    step: int = 0  # optimizer steps done
    best_step: int | None = None  # the step with the best evaluation so far, by the objective's headline
    best_headline: float | None = None


class Checkpoints:
    """A run's checkpoints, in its folder: all ranks write, finish, check and load them together.

    Args:
        folder: the run's.
        model: what trains, inside of `scorer`, which may be wrapped and sharded.
        is_full: all parameters train, and each rank writes its shards of them; else the adapter, written whole.
        keep: so many of the latest are kept, and the best.
        belongs_to: the run's `identity`, by which a checkpoint of another one is told.
    """

    def __init__(
        self,
        folder: RunFolder,
        model: Any,
        scorer: Any,
        optimizer: torch.optim.Optimizer,
        schedule: Any,
        ranks: Ranks,
        *,
        is_full: bool,
        keep: int,
        belongs_to: Mapping[str, Any],
    ):
        self.folder, self.model, self.scorer = folder, model, scorer
        self.optimizer, self.schedule, self.ranks = optimizer, schedule, ranks
        self.is_full, self.keep, self.belongs_to = is_full, keep, belongs_to
        self.checked: int | None = None  # the step of one that was held to its manifest already
        # One that ranks are writing: when this rank's files are written, with their hashes; its folder, and what then
        # names it; and the best step it knows of.
        self._unfinished: tuple[Future[dict[str, str]], Path, ExitStack, int | None] | None = None

    def write(self, state: TrainState, folder: RunFolder | None = None) -> None:
        """Write one; where it is sharded, `finish` ends it while training goes on.

        Args:
            folder: another view of the run's folder, for a rank that writes without waiting for the others.
        """
        self.finish()
        folder = folder or self.folder
        with ExitStack() as stack:
            unfinished = stack.enter_context(folder.new_folder(folder.checkpoint(state.step)))
            if folder.is_main:
                text = json.dumps(asdict(state)) + "\n"
                (unfinished / STATE).write_text(text, encoding="utf-8")
            if not self.is_full:
                save_checkpoint(unfinished, self.model, self.optimizer, self.schedule, folder.is_main)
            else:
                if folder.is_main:
                    save_tensors(unfinished / "schedule.pt", {"schedule": self.schedule.state_dict()})
                # Before step 1 the optimizer has no state, and asking for it would count as a step of it.
                optimizer = self.optimizer if state.step else None
                if writing := save_shards(unfinished, self.scorer, optimizer):
                    self._unfinished = writing, unfinished, stack.pop_all(), state.best_step
                    return
            self.seal(unfinished, folder=folder)
        folder.prune_checkpoints(self.keep, state.best_step)

    def finish(self, *, wait: bool = True) -> None:
        """Give one that is being written its name, once all ranks have written their shards."""
        if self._unfinished is None:
            return
        writing, unfinished, stack, best_step = self._unfinished
        if not wait and not self.ranks.all_are(writing.done()):
            return
        self._unfinished = None
        with stack:
            self.seal(unfinished, hashes_of_all_ranks(writing.result()))
        self.folder.prune_checkpoints(self.keep, best_step)

    def seal(
        self, unfinished: Path, hashes: Mapping[str, str] | None = None, *, folder: RunFolder | None = None
    ) -> None:
        """Write the manifest of a folder that is about to get its name; the metrics that lead up to it are on disk first.

        Args:
            hashes: sha256 of files by their path in the folder, where they are known already.
        """
        folder = folder or self.folder
        if folder.is_main:
            folder.flush_metrics()
            write_manifest(unfinished, self.belongs_to, hashes=hashes)

    def check(self, step: int) -> None:
        """Hold one to its manifest and to this run.

        Raises:
            QorpoError: as `check_checkpoint`, on all ranks, where any rank finds something wrong.
        """
        share = self.ranks.index, self.ranks.count
        all_agree(lambda: check_checkpoint(self.folder.checkpoint(step), self.belongs_to, share))

    def load_latest(self) -> TrainState | None:
        """Go on from the last one; None where there is none."""
        steps = self.folder.checkpoint_steps()
        if not steps:
            return None
        if steps[-1] != self.checked:
            self.check(steps[-1])
        latest = self.folder.checkpoint(steps[-1])
        if self.is_full:
            load_sharded_checkpoint(latest, self.scorer, self.optimizer, self.schedule)
        else:
            load_checkpoint(latest, self.model, self.optimizer, self.schedule)
        state = read_state(latest)
        logger.info("resumed from %s", latest)
        if state.best_step is not None and state.best_step not in steps:
            logger.warning(
                "the best checkpoint, of step %d, is gone; the best is sought anew", state.best_step
            )
            state.best_step = state.best_headline = None
        self.folder.prune_checkpoints(self.keep, state.best_step)  # a kill may have come before it
        return state

    def load_best(self, state: TrainState) -> None:
        """Put the weights of the best step into the model."""
        assert state.best_step is not None
        self.check(state.best_step)
        best = self.folder.checkpoint(state.best_step)
        with readable(best):
            load_parameters(best, self.scorer) if self.is_full else load_adapter(best, self.model)


def check_checkpoint(
    folder: Path, belongs_to: Mapping[str, Any] | None = None, share: tuple[int, int] = (0, 1)
) -> Mapping[str, Any]:
    """Hold a checkpoint to its manifest.

    Args:
        belongs_to: the identity that it must have, as far as it is given.
        share: which rank of how many: each hashes its share of the files.

    Returns:
        What it belongs to.

    Raises:
        QorpoError: where a file is damaged or missing, or the checkpoint is another run's.
    """
    remedy = f"remove {folder} to go on from the checkpoint before it"
    manifest = read_manifest(folder, remedy)
    if manifest is None:
        raise DamageError(f"{folder}: has no {MANIFEST}, which qorpo writes with every checkpoint; {remedy}")
    index, count = share
    check_folder(folder, remedy, only=sorted(manifest.files)[index::count])
    check_same(folder, manifest.belongs_to, belongs_to or {})
    read_state(folder)
    return manifest.belongs_to


def check_same(folder: Path, made_with: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raises RunError where a checkpoint belongs to something else than what is there now, with all that differs."""
    if found := differences(made_with, now):
        what = f"{folder}: was made with something else; put it back, or start anew in another output:"
        raise RunError("\n  ".join([what, *found]))


def read_state(folder: Path) -> TrainState:
    """A checkpoint's state.json.

    Raises:
        DamageError: where it is not what qorpo writes.
    """
    path = folder / STATE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or sorted(found) != sorted(each.name for each in fields(TrainState)):
            raise ValueError(f"its keys are not {', '.join(each.name for each in fields(TrainState))}")
        step, best_step, best_headline = found["step"], found["best_step"], found["best_headline"]
        if type(step) is not int or step < 0 or folder.name != f"step-{step}":
            raise ValueError(f"its step is {step!r}")
        if (best_step is None) != (best_headline is None):
            raise ValueError("it has a best step or a best headline, and not the other")
        if best_step is not None and (type(best_step) is not int or not 0 <= best_step <= step):
            raise ValueError(f"its best step is {best_step!r}, at step {step}")
        if best_headline is not None and (
            type(best_headline) not in (int, float) or not math.isfinite(best_headline)
        ):
            raise ValueError(f"its best headline is {best_headline!r}")
    except (OSError, ValueError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise DamageError(
            f"{path}: is damaged ({reason}); remove {folder} to go on from the checkpoint before it"
        ) from error
    return TrainState(**found)


def save_checkpoint(
    folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, schedule: Any, is_main: bool = True
) -> None:
    """Write adapter, optimizer and schedule into an existing folder; where sharded, all ranks together."""
    save_adapter(folder, model, is_main)
    optimizer_state = tree_map(gathered, optimizer.state_dict())
    if is_main:
        save_tensors(
            folder / "optimizer.pt", {"optimizer": optimizer_state, "schedule": schedule.state_dict()}
        )


def save_tensors(path: Path, content: Any) -> None:
    with path.open("wb") as file:  # given a path, torch.save says nothing of why a write failed
        torch.save(content, file)


def load_checkpoint(folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, schedule: Any) -> None:
    """Put a checkpoint's values into the objects of a fresh run.

    Raises:
        QorpoError: where the checkpoint is damaged or belongs to another recipe.
    """
    with readable(folder):
        load_adapter(folder, model)
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        load_optimizer_state(optimizer, saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])


def load_sharded_checkpoint(
    folder: Path, scorer: Any, optimizer: torch.optim.Optimizer, schedule: Any
) -> None:
    """Put a checkpoint of all parameters into the objects of a fresh run, all ranks together.

    Raises:
        QorpoError: where the checkpoint is damaged or belongs to another recipe.
    """
    with readable(folder):
        if read_state(folder).step == 0:
            load_parameters(folder, scorer)
            return
        load_shards(folder, scorer, optimizer)
        schedule.load_state_dict(torch.load(folder / "schedule.pt", weights_only=True)["schedule"])


def load_adapter(folder: Path, model: PeftModel) -> None:
    """Put saved adapter weights into a model with the same adapter."""
    weights = load_file(folder / "adapter_model.safetensors", device="cpu")
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {name: sharded_like(weight, own.get(name)) for name, weight in weights.items()}
    outcome: Any = set_peft_model_state_dict(model, weights)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if strange := outcome.unexpected_keys or sorted(trained & set(outcome.missing_keys)):
        raise RunError(
            f"{folder}: does not fit the recipe's adapter (such as {strange[0]}); resume with the run's own recipe"
        )


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Turns what libraries raise while they read a checkpoint into a RunError that names it."""
    try:
        yield
    except UNREADABLE as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise RunError(
            f"{folder}: can't be read: {reason}; remove that folder to go on from the one before it"
        ) from error
