"""What of a model trains, an adapter or all parameters: how either is made ready, kept in checkpoints and left as a result.

A loop and its checkpoints speak to either in the same words; only here is it known which of the two it is.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel

from qorpo.engine.distributed import gathered, sharded_like
from qorpo.engine.optim import load_optimizer_state
from qorpo.errors import ModelError, RunError
from qorpo.model.adapter_folder import find_adapter
from qorpo.model.adapters import attach_lora, continue_lora
from qorpo.model.mixed_precision import train_all
from qorpo.model.targets import shares
from qorpo.out_of_memory import is_out_of_memory
from qorpo.recipe import Recipe
from qorpo.training.saving import save_adapter, save_whole_model
from qorpo.training.sharded import load_parameters, load_shards, save_shards

# What libraries raise where a file is not what it should be.
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, EOFError, RuntimeError, UnpicklingError,
    SafetensorError,
)  # fmt: skip

logger = logging.getLogger(__name__)


class AdapterWeights:
    """LoRA on a frozen base. Every rank has all of it; the main one writes it, in PEFT's format."""

    name = "adapter"  # of the result, in messages and in the run folder
    is_written_by_all = False  # whether each rank writes a part of a checkpoint

    def __init__(self, model: PeftModel):
        self.model: Any = model

    def write(
        self, folder: Path, scorer: Any, optimizer: torch.optim.Optimizer, schedule: Any,
        *, step: int, is_main: bool,
    ) -> Future[dict[str, str]] | None:  # fmt: skip
        """Put adapter, optimizer and schedule into a checkpoint's folder; where sharded, all ranks together.

        Args:
            scorer: the model in what accelerate wrapped around it.
            step: optimizer steps done.

        Returns:
            None, since all is written; else what `save_shards` gives.
        """
        save_adapter(folder, self.model, is_main)
        optimizer_state = tree_map(gathered, optimizer.state_dict())
        if is_main:
            _save_tensors(
                folder / "optimizer.pt", {"optimizer": optimizer_state, "schedule": schedule.state_dict()}
            )
        return None

    def read(
        self, folder: Path, scorer: Any, optimizer: torch.optim.Optimizer, schedule: Any, *, step: int
    ) -> None:
        """Put a checkpoint's values into the objects of a fresh run; all ranks together.

        Raises:
            QorpoError: where the checkpoint is damaged or belongs to another recipe.
        """
        with readable(folder):
            load_adapter(folder, self.model)
            saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
            load_optimizer_state(optimizer, saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])

    def load(self, folder: Path, scorer: Any) -> None:
        """Put a checkpoint's weights alone into the model; raises as `read`."""
        with readable(folder):
            load_adapter(folder, self.model)

    def save(self, folder: Path, is_main: bool) -> None:
        """Write the result, for others to open; where sharded, all ranks together."""
        save_adapter(folder, self.model, is_main)


class FullWeights:
    """All parameters, in float32. Each rank writes its shards into a checkpoint; the result is in the base's type."""

    name = "model"
    is_written_by_all = True

    def __init__(self, model: Any):
        self.model: Any = model
        self.dtype = train_all(model)

    def write(
        self, folder: Path, scorer: Any, optimizer: torch.optim.Optimizer, schedule: Any,
        *, step: int, is_main: bool,
    ) -> Future[dict[str, str]] | None:  # fmt: skip
        if is_main:
            _save_tensors(folder / "schedule.pt", {"schedule": schedule.state_dict()})
        # Before step 1 the optimizer has no state, and asking for it would count as a step of it.
        return save_shards(folder, scorer, optimizer if step else None)

    def read(
        self, folder: Path, scorer: Any, optimizer: torch.optim.Optimizer, schedule: Any, *, step: int
    ) -> None:
        with readable(folder):
            if step == 0:
                load_parameters(folder, scorer)
                return
            load_shards(folder, scorer, optimizer)
            schedule.load_state_dict(torch.load(folder / "schedule.pt", weights_only=True)["schedule"])

    def load(self, folder: Path, scorer: Any) -> None:
        with readable(folder):
            load_parameters(folder, scorer)

    def save(self, folder: Path, is_main: bool) -> None:
        save_whole_model(folder, self.model, self.dtype, is_main)


Weights = AdapterWeights | FullWeights


def make_weights(model: PreTrainedModel | PeftModel, recipe: Recipe) -> Weights:
    """Make trainable what the recipe says; a PEFT model keeps the adapter that it has.

    A new adapter's first values come from the recipe's seed.
    """
    torch.manual_seed(recipe.train.seed)
    if recipe.tuning == "full":
        return FullWeights(model)
    path = recipe.model.adapter
    if isinstance(model, PeftModel):
        if path is not None:
            raise ModelError(f"model.adapter: {path}, and the model has an adapter already; leave one out")
        return AdapterWeights(model)
    if path is not None:
        peft_model = continue_lora(model, find_adapter(path), dropout=recipe.lora.dropout)
    else:
        peft_model = attach_lora(model, **dict(recipe.lora))
    in_4_bits, adapted = shares(peft_model)
    logger.info(
        "model: %.1f%% of the language model's weights are in 4 bits, %.1f%% have an adapter",
        100 * in_4_bits, 100 * adapted,
    )  # fmt: skip
    return AdapterWeights(peft_model)


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


def _save_tensors(path: Path, content: Any) -> None:
    with path.open("wb") as file:  # given a path, torch.save says nothing of why a write failed
        torch.save(content, file)
