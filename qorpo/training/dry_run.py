"""All that can be found wrong with a run before it begins, and what it will need; nothing is trained or written."""

from dataclasses import dataclass
from pathlib import Path

from qorpo.build import chat_format_of, load_data
from qorpo.data.prepare import PreparedData
from qorpo.engine.device import check_bfloat16, resolve_on
from qorpo.engine.distributed import this_process
from qorpo.model.load import check_model_folder, check_weights_there, model_source
from qorpo.planning.plan import Plan, plan
from qorpo.recipe import Recipe
from qorpo.training.checks import check_early_stopping
from qorpo.training.order import Order
from qorpo.training.run_folder import RunFolder


@dataclass(frozen=True)
class DryRun:
    """What a run would begin with: its data, its steps, and the memory that a card needs for them."""

    data: PreparedData
    steps: int
    plan: Plan

    def lines(self) -> list[str]:
        held_out = f", {len(self.data.eval.groups):,} held out" if self.data.eval else ""
        return [f"would train on {len(self.data.train.groups):,} pairs{held_out}, in {self.steps:,} steps"]


def dry_run(recipe: Recipe, *, resume: bool = False) -> DryRun:
    """Check a recipe's output, data, tokenizer, template and model files, and plan its step.

    Raises:
        QorpoError: whatever `train` would find wrong before its first step, but for the weights' own content.
    """
    folder = RunFolder(recipe.output)
    folder.check_resumable() if resume else folder.check_free()
    check_early_stopping(recipe, recipe.data.eval is not None)
    device = this_process().device
    check_bfloat16(device)
    resolved = resolve_on(recipe, device)
    keys = recipe.model
    source = Path(model_source(keys.path))
    if source.is_dir():
        check_weights_there(source, keys.allow_pickle)
        check_model_folder(source)
    data = load_data(resolved, chat_format_of(resolved))
    steps = Order(len(data.train.groups), resolved.train).total_steps
    return DryRun(data, steps, plan(recipe))
