"""Checkpoints: what trains and where it stands, not the frozen base.

adapter_model.safetensors and adapter_config.json (PEFT's own format, so a checkpoint opens as an adapter),
optimizer.pt (optimizer and schedule) and state.json (`TrainState`). The order of pairs and every step's dropout follow
from the seed and the step, so no random state is needed to go on exactly.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file

from qorpo.errors import RunError
from qorpo.training.optim import load_optimizer_state

STATE = "state.json"


@dataclass(slots=True)
class TrainState:
    """Where a run stands."""

    step: int = 0  # optimizer steps done
    best_step: int | None = None  # the step with the lowest evaluation loss so far
    best_loss: float | None = None


def save_checkpoint(
    folder: Path, model: PeftModel, optimizer: torch.optim.Optimizer, schedule: Any, state: TrainState
) -> None:
    """Write a checkpoint into an existing empty folder (see `RunFolder.whole`)."""
    save_adapter(folder, model)
    torch.save(
        {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, folder / "optimizer.pt"
    )
    (folder / STATE).write_text(json.dumps(asdict(state)) + "\n", encoding="utf-8")


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
        raise _unusable(folder, error) from error


def save_adapter(folder: Path, model: PeftModel) -> None:
    """The adapter in PEFT's format; the base's embeddings stay out, since qorpo never resizes them."""
    model.save_pretrained(str(folder), save_embedding_layers=False)


def load_adapter(folder: Path, model: PeftModel) -> None:
    """Put saved adapter weights into a model with the same adapter."""
    try:
        weights = load_file(folder / "adapter_model.safetensors", device="cpu")
        outcome: Any = set_peft_model_state_dict(model, weights)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise _unusable(folder, error) from error
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if strange := outcome.unexpected_keys or sorted(trained & set(outcome.missing_keys)):
        raise RunError(
            f"{folder}: does not fit the recipe's adapter (such as {strange[0]}); resume with the run's own recipe"
        )


def _unusable(folder: Path, error: Exception) -> RunError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return RunError(
        f"{folder}: can't be resumed from: {reason}; remove that folder to go on from the one before it"
    )
