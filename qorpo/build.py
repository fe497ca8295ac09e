"""What a recipe's keys stand for: its data, with what became of the records logged, and its objective."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from qorpo.data.chat_format import ChatFormat
from qorpo.data.groups import Group, TokenizedData
from qorpo.data.locate import Source, Sources
from qorpo.data.prepare import PreparedData, prepare_pairs
from qorpo.data.records import Example
from qorpo.data.shapes import Layout
from qorpo.data.sources import load_pairs
from qorpo.data.tokenize import Limits, tokenize_pairs
from qorpo.errors import DataError, RecipeError
from qorpo.objectives.asft import Asft
from qorpo.objectives.base import Objective
from qorpo.objectives.cpo import Cpo
from qorpo.objectives.orpo import Orpo
from qorpo.objectives.probability_ratio import ProbabilityRatio
from qorpo.objectives.sft import Sft
from qorpo.objectives.simpo import Simpo
from qorpo.recipe import DataRecipe, ObjectiveRecipe, Recipe, SourceRecipe

logger = logging.getLogger(__name__)

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    each.name: each for each in (Orpo, Sft, ProbabilityRatio, Cpo, Simpo, Asft)
}


def chat_format_of(recipe: Recipe) -> ChatFormat:
    """The recipe's tokenizer and template."""
    from qorpo.model.load import (  # here: a report builds an objective alone
        load_tokenizer,
        read_chat_template,
    )

    keys = recipe.model
    tokenizer = load_tokenizer(keys.path, revision=keys.revision, trust_remote_code=keys.trust_remote_code)
    return ChatFormat(tokenizer, read_chat_template(keys.chat_template))


def with_remote_code(recipe: Recipe, path: Path, is_said: bool) -> Recipe:
    """A run's saved recipe, which trusts a model's code only where the person says so again.

    Raises:
        RecipeError: where it did, and the person does not.
    """
    if recipe.model.trust_remote_code and not is_said:
        raise RecipeError(
            f"{path}: the run used code that comes with {recipe.model.path} (model.trust_remote_code: true), which a "
            "saved recipe can't allow; give --trust-remote-code if you trust that code"
        )
    return recipe.replace("model.trust_remote_code", is_said)


def load_data(recipe: Recipe, chat_format: ChatFormat) -> PreparedData:
    """The recipe's pairs as tokens, logging what was dropped."""
    keys = recipe.data
    data = prepare_pairs(
        _sources(keys.train),
        keys.eval if isinstance(keys.eval, float | None) else _sources(keys.eval),
        chat_format,
        limits_of(keys),
        layout=Layout(shape=keys.shape, columns=keys.columns, ranked_pairs=keys.ranked_pairs),
        min_margin=keys.min_margin,
        on_bad_record=keys.on_bad_record,
        train_turns=turns_of(recipe),
        num_responses=build_objective(recipe.objective).responses,
        seed=recipe.train.seed,
    )
    if data.whole is not None:
        logger.info("data: %s", data.whole.summary())
    if data.leaked_prompts:
        logger.warning(
            "data: %d evaluation prompts occur in training too; its figures will flatter", data.leaked_prompts
        )
    for name, tokenized in (("train", data.train), ("eval", data.eval)):
        if tokenized is not None:
            report = tokenized.report
            cut = ", ".join(f"{count} {side}" for side, count in report.cut.items() if count) or "none"
            logger.info("data: %s: %s, kept %d; cut to length: %s", name, report.summary(), report.kept, cut)
    return data


def tokenized(
    data: Sequence[Example] | TokenizedData | Sources, chat_format: ChatFormat, recipe: Recipe
) -> Sequence[Group]:
    """Groups, whichever of these they come as; what load_pairs takes is read as the recipe's `data` says.

    Raises DataError where they have fewer responses than the objective compares.
    """
    keys, wanted = recipe.data, build_objective(recipe.objective).responses
    if not isinstance(data, TokenizedData):
        ready: Any = data
        if not isinstance(data, Sequence) or not all(isinstance(each, Example) for each in data):
            ready = load_pairs(
                data,
                shape=keys.shape,
                columns=keys.columns,
                ranked_pairs=keys.ranked_pairs,
                min_margin=keys.min_margin,
                on_bad_record=keys.on_bad_record,
                train_turns=turns_of(recipe),
            )
        data = tokenize_pairs(ready, chat_format, limits_of(keys), wanted, keys.on_bad_record)
    counts = {len(group.responses) for group in data.groups[:1]}
    if any(count < wanted for count in counts):
        raise DataError(
            f"objective.name: {recipe.objective.name} compares {wanted} responses of a prompt, and the data has one; "
            "give pairs, or set it to sft"
        )
    return data.groups if counts <= {wanted} else [group.first(wanted) for group in data.groups]


def turns_of(recipe: Recipe) -> Literal["auto", "last", "all"] | None:
    """Which answers of a conversation are learned, where the objective learns from one answer; else None."""
    return (recipe.data.train_turns or "auto") if build_objective(recipe.objective).responses == 1 else None


def _sources(given: Sequence[str | SourceRecipe]) -> list[str | Source]:
    return [each if isinstance(each, str) else Source(**dict(each)) for each in given]


def limits_of(keys: DataRecipe) -> Limits:
    return Limits(keys.max_length, keys.max_prompt_length, keys.long_prompts, keys.long_responses)


def build_objective(keys: ObjectiveRecipe) -> Objective:
    """The loss that the recipe names; its class has the same keys, by the same names."""
    return OBJECTIVES[keys.name](**keys.model_dump(exclude={"name"}))
