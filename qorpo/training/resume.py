"""Going on with a run: from its last checkpoint, to the end that it had or to a new one."""

import logging

from qorpo.engine.optim import take_rate
from qorpo.errors import RunError
from qorpo.out_of_memory import advised
from qorpo.recipe import load_recipe
from qorpo.training.checkpoint import Checkpoints, TrainState
from qorpo.training.metrics import Metrics
from qorpo.training.session import Session

logger = logging.getLogger(__name__)


def go_on(session: Session, checkpoints: Checkpoints, metrics: Metrics, total_steps: int) -> TrainState:
    """Put all of them where the last checkpoint stands; with more steps than before the run goes on to a new end.

    Raises:
        QorpoError: where the checkpoint is damaged or another run's, or there are fewer steps than it has done.
    """
    folder, keys = checkpoints.folder, session.recipe.train
    with advised(
        "nothing of the run was changed; free some memory, or lower memory's keys, and resume again"
    ):
        state = checkpoints.load_latest()
    if state is None:
        metrics.read_back(-1)
        logger.info("no checkpoint was written yet: starting at step 1")
        return TrainState()
    planned = session.schedule.get_last_lr()[0]
    key = "epochs" if keys.max_steps is None else "max_steps"
    if state.step > total_steps:
        raise RunError(
            f"train.{key}: {getattr(keys, key):g} is {total_steps} steps, and {folder.path} has done {state.step}; "
            "give more, or another output"
        )
    metrics.read_back(state.step)
    take_rate(session.schedule)
    rate = session.schedule.get_last_lr()[0]
    if state.step == total_steps:
        logger.info("nothing left to do: all %d steps are done; to go on, raise train.%s", total_steps, key)
    elif rate != planned:
        logger.info(
            "%d steps now, %s: the learning rate of step %d was to be %.3g and is %.3g",
            total_steps, keys.schedule, state.step + 1, planned, rate,
        )  # fmt: skip
    if folder.recipe.exists() and (
        rate != planned or load_recipe(folder.recipe).train.early_stopping != keys.early_stopping
    ):
        folder.write_recipe(session.recipe.to_yaml())
    return state
