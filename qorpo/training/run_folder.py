"""The run folder: what is in it, and how it is written so that a kill or a full disk leaves the last good state."""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qorpo.errors import RunError
from qorpo.failed_write import failed_write
from qorpo.reports.pair_values import HELD_OUT, PairValues, held_out_file
from qorpo.storage import (
    LOCK,
    UNFINISHED,
    Lock,
    flush,
    make_folder,
    remove_folder,
    sweep,
    unfinished_of,
    whole_folder,
    write_json,
    write_text,
)

logger = logging.getLogger(__name__)

# Written before the first step, in this order: a kill before the last leaves no run, and nothing in a new one's way.
FIRST_WRITTEN = ("data.json", "environment.json", "recipe.yaml")


class RunFolder:
    """Paths and writes of one run.

    recipe.yaml, environment.json, data.json, reference/ where the objective needs one, metrics.jsonl (a line a step, and a
    line an evaluation), held_out/ (each held-out group's figures), checkpoints/step-N/, and at the end adapter/, or model/ of full tuning. Of several ranks the main one writes, but
    for what is put into a `new_folder`; `wait` is until all have come so far.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        is_main: bool = True,
        wait: Callable[[], None] = lambda: None,
    ):
        self.path = Path(path).expanduser()
        self.is_main, self.wait = is_main, wait
        self.recipe = self.path / "recipe.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.adapter = self.path / "adapter"
        self.model = self.path / "model"
        self.checkpoints = self.path / "checkpoints"
        self.reference = self.path / "reference"

    @contextmanager
    def owned(self) -> Iterator[None]:
        """This run's alone, of all processes: the main rank takes the folder's lock, and sweeps up after a kill.

        Raises:
            RunError: on all ranks, where another process has it, or it can't be made.
        """
        from qorpo.engine.distributed import all_agree  # here, for torch takes seconds

        lock = Lock(self.path)

        def take() -> None:
            if not self.is_main:
                return
            self.check_place()
            with self.writing():
                lock.take()
            self.sweep()

        try:
            all_agree(take)
            yield
        finally:
            lock.release()

    def check_place(self) -> None:
        """Raises RunError where no folder can be made and filled; writes nothing."""
        if self.path.exists() and not self.path.is_dir():
            raise RunError(f"output: {self.path} is a file; give another output")
        home = _existing(self.path)
        if not (home.is_dir() and os.access(home, os.W_OK | os.X_OK)):
            raise RunError(f"output: {self.path} can't be made: {home} takes no files; give another output")
        for place in (self.checkpoints, self.metrics, self.recipe):  # of a run to go on with
            if place.exists() and not os.access(place, os.W_OK):
                raise RunError(
                    f"output: {place} can't be written; change its permissions, or give another output"
                )
        if self.checkpoints.exists() and not self.checkpoints.is_dir():
            raise RunError(f"output: {self.checkpoints} is no folder; remove it, or give another output")

    def check_free(self) -> None:
        """Raises RunError where something is in the way; writes nothing."""
        self.check_place()
        if self.recipe.exists():
            raise RunError(
                f"output: {self.path} holds a run; go on with it by --resume, or give another output"
            )
        names = [path.name for path in self.path.iterdir()] if self.path.exists() else []
        if {name.removeprefix(".").removesuffix(UNFINISHED) for name in names if name != LOCK} - {
            *FIRST_WRITTEN
        }:
            raise RunError(f"output: {self.path} is not empty; give another output, or empty it")

    def check_resumable(self) -> None:
        """Raises RunError where there is no run to go on with."""
        if not self.recipe.exists():
            raise RunError(
                f"output: {self.path} holds no run to resume (no recipe.yaml); leave out --resume to start one"
            )

    def write_json(self, name: str, content: Any) -> None:
        with self.writing():
            make_folder(self.path)
            write_json(self.path / name, content)

    def write_recipe(self, text: str) -> None:
        if not self.is_main:
            return
        with self.writing():
            write_text(self.recipe, text)

    def append_metrics(self, rows: list[dict[str, Any]]) -> None:
        if not self.is_main:
            return
        with self.writing(), self.metrics.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Every step's and evaluation's line; empty where there is none yet."""
        if not self.metrics.exists():
            return []
        return [json.loads(line) for line in self.metrics.read_text(encoding="utf-8").splitlines()]

    def cut_metrics(self, last_step: int) -> None:
        """Drop the lines after a checkpoint's step, and a last line that a kill left unfinished."""
        if not (self.is_main and self.metrics.exists()):
            return
        kept, num_torn = [], 0
        lines = self.metrics.read_bytes().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                if not all(isinstance(value, int | float) for value in row.values()):
                    raise ValueError("no line of metrics")
                if row["step"] <= last_step:
                    kept.append(line.decode() + "\n")
            except (ValueError, KeyError, AttributeError, RecursionError):
                num_torn += number < len(lines)
        if num_torn:
            logger.warning("%s: %d lines can't be read, and are left out", self.metrics, num_torn)
        with self.writing():
            write_text(self.metrics, "".join(kept))

    def write_held_out(self, step: int, values: PairValues, kept: Collection[int | None]) -> None:
        """Write each held-out group's figures at a step; of earlier evaluations only those of `kept` steps stay."""
        if not self.is_main:
            return
        with self.writing():
            path = held_out_file(self.path, step)
            make_folder(path.parent)
            for other in path.parent.glob("step-*.json"):
                if other not in {held_out_file(self.path, each) for each in kept if each is not None}:
                    other.unlink()
            values.write(path)

    def flush_metrics(self) -> None:
        """Have the rows so far on disk."""
        if self.metrics.exists():
            with self.writing():
                flush(self.metrics)
                flush(self.path)

    def way_on(self) -> str:
        """How to go on with what is there."""
        steps = self.checkpoint_steps()
        if steps:
            return f"{self.checkpoint(steps[-1])} holds the run so far; go on with --resume"
        if self.recipe.exists():
            return "no checkpoint was written yet; --resume starts at step 1"
        return "nothing was written yet; start again"

    def checkpoint(self, step: int) -> Path:
        return self.checkpoints / f"step-{step}"

    def checkpoint_steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending."""
        if not self.checkpoints.is_dir():
            return []
        names = (re.fullmatch(r"step-(\d+)", path.name) for path in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in names if match)

    def prune_checkpoints(self, keep: int, best_step: int | None) -> None:
        """Keep the latest `keep` and the best; sweep away what a kill left half written."""
        if not self.is_main:
            return
        with self.writing():
            for step in self.checkpoint_steps()[:-keep]:
                if step != best_step:
                    remove_folder(self.checkpoint(step))
        self.sweep()

    def sweep(self) -> None:
        """Remove what a kill left half written."""
        if self.is_main:
            with self.writing():
                sweep(self.path)
                sweep(self.checkpoints)
                sweep(self.path / HELD_OUT)

    @contextmanager
    def new_folder(self, path: Path) -> Iterator[Path]:
        """A folder written beside its place, flushed to disk, then renamed: it appears whole or not at all."""
        with self.writing():
            if not self.is_main:
                self.wait()  # until it is there
                yield unfinished_of(path)
                self.wait()
                self.wait()  # until it has its name
                return
            with whole_folder(path, replace=True) as unfinished:
                self.wait()
                yield unfinished
                self.wait()
            self.wait()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turns a failed write, in whatever words a library puts it, into one message."""
        try:
            yield
        except BaseException as error:
            if (failed := failed_write(error)) is None:
                raise
            steps = self.checkpoint_steps()
            good = (
                f"the last good checkpoint is {self.checkpoint(steps[-1])}"
                if steps
                else "no checkpoint was written yet"
            )
            free = f"{shutil.disk_usage(_existing(self.path)).free / 2**30:.2f} GiB free"
            again = "go on with --resume" if self.recipe.exists() else "start again"
            raise RunError(
                f"{self.path}: could not be written ({failed.reason}; {free}); {good}; {failed.remedy}, then {again}"
            ) from error


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.absolute().parent)
