"""A model that transformers opens, out of a run's sharded checkpoint."""

import glob
from pathlib import Path

import torch
from accelerate import init_empty_weights

from qorpo.build import chat_format_of, with_remote_code
from qorpo.card import write_run_card
from qorpo.errors import RunError
from qorpo.identity import base_identity, chat_identity, recipe_identity
from qorpo.manifest import write_manifest
from qorpo.model.load import load_config
from qorpo.model.parts import auto_class
from qorpo.recipe import load_recipe
from qorpo.storage import output_folder, recover, sweep
from qorpo.training.checkpoint import check_checkpoint, check_same, read_state
from qorpo.training.run_folder import RunFolder
from qorpo.training.saving import save_parameters, save_tokenizer
from qorpo.training.sharded import SHARDS, read_parameters
from qorpo.training.weights import readable

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def export_model(
    run: str | Path, output: str | Path, *, dtype: str = "bfloat16", trust_remote_code: bool = False
) -> Path:
    """Write the model of a run's checkpoint as one folder; memory holds it once, in `dtype`.

    Args:
        run: a run's folder, of which the best checkpoint by evaluation loss is taken, else the last; or a checkpoint.
        output: the folder to make.
        dtype: bfloat16, float16, or float32 for the master weights themselves.
        trust_remote_code: run code that comes with the model; what the run's recipe says of it counts for nothing.

    Raises:
        QorpoError: where there is no such checkpoint, it is damaged, or the output can't be made.
    """
    if dtype not in DTYPES:
        raise RunError(f"--dtype: got {dtype!r}; expected {', '.join(DTYPES)}")
    checkpoint, folder = _checkpoint(Path(run).expanduser().absolute())
    output = Path(output).expanduser()
    sweep(output.absolute().parent, glob.escape(output.name))
    if output.exists():
        raise RunError(f"--output: {output} is there already; give another")
    recipe = with_remote_code(load_recipe(folder.recipe), folder.recipe, trust_remote_code)
    keys = recipe.model
    made_with = check_checkpoint(checkpoint)
    chat = chat_format_of(recipe)
    base = base_identity(keys.path, keys.revision)
    check_same(
        checkpoint, made_with, {"recipe": recipe_identity(recipe), "base": base, **chat_identity(chat)}
    )
    config = load_config(keys.path, revision=keys.revision, trust_remote_code=trust_remote_code)
    with init_empty_weights(include_buffers=True):
        model = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    with readable(checkpoint):
        tensors = read_parameters(checkpoint, DTYPES[dtype])
    with output_folder(output) as unfinished:
        save_parameters(unfinished, model, tensors, DTYPES[dtype])
        save_tokenizer(unfinished, chat)
        write_run_card(unfinished, folder.path, recipe)
        write_manifest(unfinished, made_with)
    return output


def _checkpoint(path: Path) -> tuple[Path, RunFolder]:
    if (path / SHARDS).is_dir():
        return path, RunFolder(path.parents[1])
    folder = RunFolder(path)
    recover(folder.checkpoints)
    steps = folder.checkpoint_steps()
    if not steps or not (folder.checkpoint(steps[-1]) / SHARDS).is_dir():
        raise RunError(
            f"{path}: no sharded checkpoint; give the folder of a run of full tuning, or of its checkpoint"
        )
    latest = folder.checkpoint(steps[-1])
    best_step = read_state(latest).best_step
    return (folder.checkpoint(best_step) if best_step in steps else latest), folder
