"""Whether data and model go together, found before a step fails in the middle of them."""

import logging
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from qorpo.data.chat_format import ChatFormat
from qorpo.data.groups import Group
from qorpo.data.token_table import largest_token_id, longest_sequence
from qorpo.errors import DataError, ModelError, RecipeError
from qorpo.identity import base_differences, base_identity, chat_identity, differences
from qorpo.manifest import MANIFEST, check_folder
from qorpo.model.adapter_folder import CONFIG, WEIGHTS, find_adapter, read_adapter_config
from qorpo.recipe import Recipe

logger = logging.getLogger(__name__)


def check_early_stopping(recipe: Recipe, has_eval: bool) -> None:
    """Raises RecipeError where a run is to stop by evaluations, and has none."""
    if recipe.train.early_stopping is not None and not has_eval:
        raise RecipeError(
            f"train.early_stopping: {recipe.train.early_stopping} counts evaluations, and there are none; set data.eval, or "
            "leave it out"
        )


def check_adapter(recipe: Recipe, chat: ChatFormat) -> None:
    """Hold the adapter of `model.adapter` to its manifest, and the base to the one that it was trained on.

    A tokenizer or template that is another is only said.

    Raises:
        DamageError: where it is damaged. ModelError: where model.path is not its base.
    """
    path, base = recipe.model.adapter, recipe.model.path
    assert path is not None
    folder = find_adapter(path)
    remedy = f"make it again, or remove {MANIFEST} if you changed it yourself"
    manifest = check_folder(folder, remedy, only=[CONFIG, WEIGHTS])
    if manifest is None:  # PEFT's own knows its base by name alone
        named = read_adapter_config(folder).base_model_name_or_path
        if named and named != base:
            logger.warning("model.adapter: %s names %s as its base, and model.path is %s", path, named, base)
        return
    made_with = manifest.belongs_to
    if found := base_differences(made_with.get("base"), base_identity(base, recipe.model.revision)):
        raise ModelError(
            f"model.adapter: {path} was trained on another base than model.path ({base}): {'; '.join(found)}; give its own"
        )
    learned = {key: value for key, value in made_with.items() if key in ("tokenizer", "template")}
    for difference in differences(learned, chat_identity(chat)):
        logger.warning("model.adapter: %s: %s", path, difference)


def check_vocabulary(model: Any, tokenizer: PreTrainedTokenizerBase, groups: Sequence[Group]) -> None:
    """Raises ModelError for a token that the model has no embedding of."""
    largest = largest_token_id(groups)
    rows = model.get_input_embeddings().weight.shape[0]
    if largest >= rows:
        raise ModelError(
            f"the tokenizer gives token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), but the model has only "
            f"{rows} embeddings; use the tokenizer that belongs to the model"
        )


def check_positions(model: Any, groups: Sequence[Group]) -> None:
    """Warns of a prompt with its response that is longer than the model's positions.

    Raises DataError where the model can't go beyond them: its positions are a table, and no rotation.
    """
    config = model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    longest = longest_sequence(groups)
    if positions is None or longest <= positions:
        return
    found = f"data.max_length: a prompt with its response has {longest:,} tokens"
    if not getattr(config, "rope_parameters", None):
        raise DataError(f"{found}, but the model has {positions:,} positions; set it to {positions} at most")
    logger.warning(
        "%s, and the model was made for %s: beyond these it may score poorly", found, f"{positions:,}"
    )
