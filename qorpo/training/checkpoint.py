"""Checkpoints: what trains and where it stands, not the frozen base.

Of adapters: adapter_model.safetensors and adapter_config.json (PEFT's own format, so a checkpoint opens as an adapter)
and optimizer.pt. Of full tuning: shards/, as torch.distributed.checkpoint writes parameters and optimizer, each rank
its own, to be read by any number of ranks. With either the schedule and state.json (`TrainState`). The order of pairs and every step's dropout follow
from the seed and the step, so no random state is needed to go on exactly.
"""

import json
import logging
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.utils._pytree import tree_map
from transformers import GenerationConfig, PreTrainedModel

from qorpo.data.tokenize import ChatFormat
from qorpo.engine.distributed import Ranks, gathered, sharded_like
from qorpo.engine.optim import load_optimizer_state
from qorpo.errors import RunError
from qorpo.out_of_memory import is_out_of_memory
from qorpo.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

STATE = "state.json"
SHARDS = "shards"


@dataclass(slots=True)
class TrainState:
    """Where a run stands."""

    step: int = 0  # optimizer steps done
    best_step: int | None = None  # the step with the best evaluation so far, by the objective's headline
    best_headline: float | None = None


class Checkpoints:
    """A run's checkpoints, in its folder: all ranks write, finish and load them together.

    Args:
        folder: the run's.
        model: what trains, inside of `scorer`, which may be wrapped and sharded.
        is_full: all parameters train, and each rank writes its shards of them; else the adapter, written whole.
        keep: so many of the latest are kept, and the best.
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
    ):
        self.folder, self.model, self.scorer = folder, model, scorer
        self.optimizer, self.schedule, self.ranks = optimizer, schedule, ranks
        self.is_full, self.keep = is_full, keep
        # One that ranks are writing: when it is done, what then names it, and the best step it knows of.
        self._unfinished: tuple[Future[Any], ExitStack, int | None] | None = None

    def write(self, state: TrainState, folder: RunFolder | None = None) -> None:
        """Write one; where it is sharded, `finish` ends it while training goes on.

        Args:
            folder: another view of the run's folder, for a rank that writes without waiting for the others.
        """
        self.finish()
        folder, parts = folder or self.folder, (self.optimizer, self.schedule, state)
        with ExitStack() as stack:
            unfinished = stack.enter_context(folder.new_folder(folder.checkpoint(state.step)))
            if not self.is_full:
                save_checkpoint(unfinished, self.model, *parts, folder.is_main)
            elif writing := save_sharded_checkpoint(unfinished, self.scorer, *parts, folder.is_main):
                self._unfinished = writing, stack.pop_all(), state.best_step
                return
        folder.prune_checkpoints(self.keep, state.best_step)

    def finish(self, *, wait: bool = True) -> None:
        """Give one that is being written its name, once all ranks have written their shards."""
        if self._unfinished is None:
            return
        writing, stack, best_step = self._unfinished
        if not wait and not self.ranks.all_are(writing.done()):
            return
        self._unfinished = None
        with stack:
            writing.result()
        self.folder.prune_checkpoints(self.keep, best_step)

    def load_latest(self) -> TrainState | None:
        """Go on from the last one; None where there is none."""
        steps = self.folder.checkpoint_steps()
        if not steps:
            return None
        latest = self.folder.checkpoint(steps[-1])
        if self.is_full:
            state = load_sharded_checkpoint(latest, self.scorer, self.optimizer, self.schedule)
        else:
            state = load_checkpoint(latest, self.model, self.optimizer, self.schedule)
        logger.info("resumed from %s", latest)
        self.folder.prune_checkpoints(self.keep, state.best_step)  # a kill may have come before it
        return state

    def load_best(self, state: TrainState) -> None:
        """Put the weights of the best step into the model."""
        assert state.best_step is not None
        best = self.folder.checkpoint(state.best_step)
        if self.is_full:
            load_parameters(best, self.scorer)
        else:
            load_adapter(best, self.model)


def save_checkpoint(
    folder: Path,
    model: PeftModel,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    state: TrainState,
    is_main: bool = True,
) -> None:
    """Write a checkpoint into an existing empty folder (see `RunFolder.new_folder`); where sharded, all ranks together."""
    save_adapter(folder, model, is_main)
    optimizer_state = tree_map(gathered, optimizer.state_dict())
    if not is_main:
        return
    _save(folder / "optimizer.pt", {"optimizer": optimizer_state, "schedule": schedule.state_dict()})
    (folder / STATE).write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")


def _save(path: Path, content: Any) -> None:
    with path.open("wb") as file:  # given a path, torch.save says nothing of why a write failed
        torch.save(content, file)


def load_checkpoint(
    folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, schedule: Any
) -> TrainState:
    """Put a checkpoint's values into the objects of a fresh run.

    Raises:
        RunError: where the checkpoint is damaged or belongs to another recipe.
    """
    load_adapter(folder, model)
    try:
        saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
        load_optimizer_state(optimizer, saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        return TrainState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError, UnpicklingError) as error:
        if is_out_of_memory(error):
            raise
        raise _unusable(folder, error) from error


def save_sharded_checkpoint(
    folder: Path,
    scorer: Any,
    optimizer: torch.optim.Optimizer,
    schedule: Any,
    state: TrainState,
    is_main: bool,
) -> Future[Any] | None:
    """Write a checkpoint of all parameters, all ranks together.

    Returns:
        What tells when this rank's shards are written, from a copy in host memory while training goes on; None where
        there is one process, and all is written.
    """
    if is_main:
        _save(folder / "schedule.pt", {"schedule": schedule.state_dict()})
        (folder / STATE).write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")
    content: dict[str, Any]
    if state.step == 0:  # the optimizer has no state yet, and asking for it would count as a step of it
        content = {"model": get_model_state_dict(scorer)}
    else:
        parameters, optimizer_state = get_state_dict(scorer, optimizer)
        content = {"model": parameters, "optimizer": optimizer_state}
    if not dist.is_initialized():
        dcp.save(content, checkpoint_id=folder / SHARDS)
        return None
    writing = dcp.async_save(content, checkpoint_id=folder / SHARDS, process_group=_writers())
    assert isinstance(writing, Future)  # the default stager copies before it returns
    return writing


@cache
def _writers() -> Any:
    """The ranks once more, so that what they write in the background doesn't meet what they compute."""
    return dist.new_group(backend="gloo")


def load_sharded_checkpoint(
    folder: Path, scorer: Any, optimizer: torch.optim.Optimizer, schedule: Any
) -> TrainState:
    """Put a checkpoint of all parameters into the objects of a fresh run, all ranks together.

    Raises:
        RunError: where the checkpoint is damaged or belongs to another recipe.
    """
    try:
        state = TrainState(**json.loads((folder / STATE).read_text(encoding="utf-8")))
        if state.step == 0:
            load_parameters(folder, scorer)
            return state
        parameters, optimizer_state = get_state_dict(scorer, optimizer)
        saved: dict[str, Any] = {"model": parameters, "optimizer": optimizer_state}
        dcp.load(saved, checkpoint_id=folder / SHARDS)
        set_state_dict(
            scorer, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"]
        )
        schedule.load_state_dict(torch.load(folder / "schedule.pt", weights_only=True)["schedule"])
        return state
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, CheckpointException) as error:
        if is_out_of_memory(error):
            raise
        raise _unusable(folder, error) from error


def load_parameters(folder: Path, scorer: Any) -> None:
    """Put a sharded checkpoint's parameters alone into a model."""
    parameters = {"model": get_model_state_dict(scorer)}
    try:
        dcp.load(parameters, checkpoint_id=folder / SHARDS)
    except (OSError, ValueError, KeyError, RuntimeError, CheckpointException) as error:
        if is_out_of_memory(error):
            raise
        raise _unusable(folder, error) from error
    set_model_state_dict(scorer, parameters["model"])


def save_whole_model(folder: Path, model: PreTrainedModel, dtype: torch.dtype, is_main: bool) -> None:
    """Write all parameters in `dtype` as transformers does, gathered one by one by all ranks into the main one."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        full = gathered(tensor.to(dtype) if tensor.is_floating_point() else tensor)
        if is_main:
            tensors[name] = full
    if is_main:
        save_parameters(folder, model, tensors, dtype)


def save_parameters(
    folder: Path, model: PreTrainedModel, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Write these tensors as the model's, with its config."""
    model.save_pretrained(str(folder), state_dict=tensors)
    config = folder / "config.json"
    saved = json.loads(config.read_text(encoding="utf-8"))
    saved["dtype"] = str(dtype).removeprefix(
        "torch."
    )  # transformers names the type of the float32 master weights
    config.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def save_tokenizer(folder: Path, chat: ChatFormat) -> None:
    """The tokenizer with its chat template, and generation_config.json with the tokens to stop at: the one that was
    learned, and the base's own, which may differ."""
    tokenizer = chat.tokenizer
    tokenizer.save_pretrained(str(folder))
    stops = dict.fromkeys([chat.stop_token_id, tokenizer.eos_token_id])
    GenerationConfig(
        eos_token_id=[stop for stop in stops if stop is not None],
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(str(folder))


def save_adapter(folder: Path, model: PeftModel, is_main: bool = True) -> None:
    """The adapter in PEFT's format; the base's embeddings stay out, since qorpo never resizes them.

    Where it is sharded all ranks gather it together, and the main one writes.
    """
    trained = {name: gathered(weight) for name, weight in model.named_parameters() if weight.requires_grad}
    if is_main:
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=trained)


def load_adapter(folder: Path, model: PeftModel) -> None:
    """Put saved adapter weights into a model with the same adapter."""
    try:
        weights = load_file(folder / "adapter_model.safetensors", device="cpu")
        own = get_peft_model_state_dict(model, save_embedding_layers=False)
        weights = {name: sharded_like(weight, own.get(name)) for name, weight in weights.items()}
        outcome: Any = set_peft_model_state_dict(model, weights)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise _unusable(folder, error) from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if strange := outcome.unexpected_keys or sorted(trained & set(outcome.missing_keys)):
        raise RunError(
            f"{folder}: does not fit the recipe's adapter (such as {strange[0]}); resume with the run's own recipe"
        )


def _unusable(folder: Path, error: BaseException) -> RunError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return RunError(
        f"{folder}: can't be resumed from: {reason}; remove that folder to go on from the one before it"
    )
