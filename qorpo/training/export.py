"""A model that transformers opens, out of a run's sharded checkpoint."""

import json
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from accelerate import init_empty_weights
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoModelForCausalLM

from qorpo.build import chat_format_of
from qorpo.errors import RunError
from qorpo.model.load import load_config
from qorpo.recipe import load_recipe
from qorpo.storage import output_folder
from qorpo.training.checkpoint import SHARDS, STATE, TrainState, save_parameters, save_tokenizer
from qorpo.training.run_folder import RunFolder

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export_model(run: str | Path, output: str | Path, *, dtype: str = "bfloat16") -> Path:
    """Write the model of a run's checkpoint as one folder; memory holds it once, in `dtype`.

    Args:
        run: a run's folder, of which the best checkpoint by evaluation loss is taken, else the last; or a checkpoint.
        output: the folder to make.
        dtype: bfloat16, float16, or float32 for the master weights themselves.

    Raises:
        QorpoError: where there is no such checkpoint, or the output can't be made.
    """
    if dtype not in DTYPES:
        raise RunError(f"--dtype: got {dtype!r}; expected {', '.join(DTYPES)}")
    checkpoint, folder = _checkpoint(Path(run).expanduser())
    output = Path(output).expanduser()
    if output.exists():
        raise RunError(f"--output: {output} is there already; give another")
    recipe = load_recipe(folder.recipe)
    keys = recipe.model
    config = load_config(keys.path, revision=keys.revision, trust_remote_code=keys.trust_remote_code)
    with init_empty_weights(include_buffers=True):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=keys.trust_remote_code)
    chat = chat_format_of(recipe)
    with output_folder(output) as unfinished:
        save_parameters(unfinished, model, _tensors(checkpoint, DTYPES[dtype]), DTYPES[dtype])
        save_tokenizer(unfinished, chat)
    return output


def _checkpoint(path: Path) -> tuple[Path, RunFolder]:
    if (path / SHARDS).is_dir():
        return path, RunFolder(path.parents[1])
    folder = RunFolder(path)
    steps = folder.checkpoint_steps()
    if not steps or not (folder.checkpoint(steps[-1]) / SHARDS).is_dir():
        raise RunError(
            f"{path}: no sharded checkpoint; give the folder of a run of full tuning, or of its checkpoint"
        )
    latest = folder.checkpoint(steps[-1])
    state = TrainState(**json.loads((latest / STATE).read_text(encoding="utf-8")))
    return (folder.checkpoint(state.best_step) if state.best_step in steps else latest), folder


def _tensors(checkpoint: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """All parameters by their names in the model, read one at a time."""
    prefix = "model.model."  # the state's part, and the scorer's attribute
    reader = dcp.FileSystemReader(checkpoint / SHARDS)
    tensors = {}
    try:
        for key, found in reader.read_metadata().state_dict_metadata.items():
            if key.startswith(prefix) and isinstance(found, TensorStorageMetadata):
                state = {key: torch.empty(found.size, dtype=found.properties.dtype)}
                dcp.load(state, checkpoint_id=checkpoint / SHARDS, no_dist=True)
                tensor = state[key]
                tensors[key.removeprefix(prefix)] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    except (OSError, ValueError, KeyError, RuntimeError, CheckpointException) as error:
        raise RunError(f"{checkpoint}: can't be read: {str(error).splitlines()[0]}") from error
    return tensors
