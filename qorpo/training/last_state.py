"""What a run that memory ended leaves behind: its last whole step as a checkpoint, and one message that says what to do."""

import contextlib
import traceback
from collections.abc import Iterator
from typing import Any

from qorpo.engine.within_memory import StepTooLargeError, free_memory
from qorpo.errors import RunError
from qorpo.out_of_memory import is_out_of_memory, shortage_of
from qorpo.planning.auto import advice_for
from qorpo.training.run_folder import RunFolder


@contextlib.contextmanager
def ending_with_advice(trainer: Any) -> Iterator[None]:
    """Where memory runs out in the block, saves the run so far, as far as this rank alone can, and says what to do.

    Args:
        trainer: the loop's Trainer, which imports this.

    Raises:
        RunError: then, in place of the library's error.
    """
    try:
        yield
    except BaseException as error:  # CheckpointException is no Exception
        if not is_out_of_memory(error):
            raise
        raise _ended(trainer, error) from error


def _ended(trainer: Any, error: BaseException) -> RunError:
    step, shortage = trainer.state.step + 1, f"({shortage_of(error)})"
    if isinstance(error, StepTooLargeError):
        shortage = f"with one pair a micro-batch {shortage}"
    if trainer.session.ranks.count > 1:
        shortage = f"on rank {trainer.session.ranks.index} {shortage}"
    _let_go_of(error)
    folder = RunFolder(trainer.folder.path)  # without waiting: other ranks are in the midst of the step
    if trainer.is_whole:
        _save(trainer, folder)
    advice = (
        f"lower memory.microbatch_tokens ({trainer.recipe.memory.microbatch_tokens}) or data.max_length, or take more GPUs"
        if trainer.session.is_sharded
        else advice_for(trainer.recipe, trainer.model, trainer.session.longest, trainer.session.dtype)
    )
    steps = folder.checkpoint_steps()
    kept = f"{folder.checkpoint(steps[-1])} holds the run so far" if steps else "nothing was saved yet"
    if not trainer.is_whole:
        kept = f"the weights were half changed, so they were not saved; {kept}"
    return RunError(
        f"step {step}: out of memory {shortage}; {advice}; {kept}: change memory's keys and go on with --resume, or start "
        "anew with the others changed"
    )


def _save(trainer: Any, folder: RunFolder) -> None:
    if trainer.session.ranks.count > 1 and (
        trainer.session.weights.is_written_by_all or trainer.session.is_sharded
    ):
        return  # each rank has a part of it
    try:
        trainer.flush_metrics()  # on disk before the checkpoint that counts on them
        if trainer.state.step not in folder.checkpoint_steps():
            trainer.checkpoints.write(trainer.state, folder)
        trainer.checkpoints.finish()
    except RunError:
        pass
    except BaseException as error:
        if not is_out_of_memory(error):
            raise


def _let_go_of(error: BaseException) -> None:
    """Free the tensors that the frames of a broken attempt hold; the traceback's lines stay."""
    broken: BaseException | None = error
    while broken is not None and broken.__traceback__ is not None:
        traceback.clear_frames(broken.__traceback__)
        broken = broken.__cause__ or broken.__context__
    with contextlib.suppress(RuntimeError):  # a device that ran out so badly that it can't be asked
        free_memory()
