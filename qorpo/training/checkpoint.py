"""Checkpoints: what trains and where it stands, not the frozen base.

Of adapters: adapter_model.safetensors and adapter_config.json (PEFT's own format, so a checkpoint opens as an adapter)
and optimizer.pt. Of full tuning: shards/ (see `sharded`) and schedule.pt. With either state.json (`TrainState`) and a
manifest of all files, with what they belong to. The order of pairs and every step's dropout follow from the seed and the
step, so no random state is needed to go on exactly.
"""

import json
import logging
import math
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from qorpo.engine.distributed import all_agree
from qorpo.errors import DamageError, RunError
from qorpo.identity import differences
from qorpo.manifest import MANIFEST, check_folder, read_manifest, write_manifest
from qorpo.training.run_folder import RunFolder
from qorpo.training.session import Session
from qorpo.training.sharded import hashes_of_all_ranks

logger = logging.getLogger(__name__)

STATE = "state.json"


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
        session: what trains, with its optimizer and schedule.
        belongs_to: the run's `identity`, by which a checkpoint of another one is told.
    """

    def __init__(self, folder: RunFolder, session: Session, *, belongs_to: Mapping[str, Any]):
        self.folder, self.session, self.belongs_to = folder, session, belongs_to
        self.keep = session.recipe.train.keep_checkpoints  # so many of the latest, and the best
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
            session = self.session
            writing = session.weights.write(
                unfinished, session.scorer, session.optimizer.optimizer, session.schedule,
                step=state.step, is_main=folder.is_main,
            )  # fmt: skip
            if writing is not None:
                self._unfinished = writing, unfinished, stack.pop_all(), state.best_step
                return
            self.seal(unfinished, folder=folder)
        folder.prune_checkpoints(self.keep, state.best_step)

    def finish(self, *, wait: bool = True) -> None:
        """Give one that is being written its name, once all ranks have written their shards."""
        if self._unfinished is None:
            return
        writing, unfinished, stack, best_step = self._unfinished
        if not wait and not self.session.ranks.all_are(writing.done()):
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
        share = self.session.ranks.index, self.session.ranks.count
        all_agree(lambda: check_checkpoint(self.folder.checkpoint(step), self.belongs_to, share))

    def load_latest(self) -> TrainState | None:
        """Go on from the last one; None where there is none."""
        steps = self.folder.checkpoint_steps()
        if not steps:
            return None
        if steps[-1] != self.checked:
            self.check(steps[-1])
        latest = self.folder.checkpoint(steps[-1])
        state = read_state(latest)
        session = self.session
        session.weights.read(
            latest, session.scorer, session.optimizer.optimizer, session.schedule, step=state.step
        )
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
        self.session.weights.load(self.folder.checkpoint(state.best_step), self.session.scorer)


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
