"""What a recipe's keys stand for: its data, with what became of the records logged, and its objective."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from qorpo.data.chat_format import ChatFormat
from qorpo.data.groups import Group, TokenizedData
from qorpo.data.locate import Source, Sources
from qorpo.data.prepare import PreparedData, prepare_pairs
from qorpo.data.records import Example, labelled_answers
from qorpo.data.shapes import Layout
from qorpo.data.sources import load_pairs
from qorpo.data.token_table import sources_without
from qorpo.data.tokenize import Limits, tokenize_pairs
from qorpo.errors import DataError, RecipeError
from qorpo.objectives.asft import Asft
from qorpo.objectives.base import Objective
from qorpo.objectives.cpo import Cpo
from qorpo.objectives.dpo import Dpo
from qorpo.objectives.ipo import Ipo
from qorpo.objectives.kto import Kto
from qorpo.objectives.mmpo import Mmpo
from qorpo.objectives.orpo import Orpo
from qorpo.objectives.probability_ratio import ProbabilityRatio
from qorpo.objectives.sft import Sft
from qorpo.objectives.simpo import Simpo
from qorpo.objectives.sppo import Sppo
from qorpo.recipe import DataRecipe, ObjectiveRecipe, Recipe, SourceRecipe, load_recipe
from qorpo.recipe.reading import recipe_error
from qorpo.recipe.values import shown

logger = logging.getLogger(__name__)

OBJECTIVES: dict[str, Callable[..., Objective]] = {
    each.name: each for each in (Orpo, Sft, ProbabilityRatio, Cpo, Simpo, Asft, Dpo, Ipo, Sppo, Mmpo, Kto)
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


def with_adapter(recipe: Recipe) -> Recipe:
    """The recipe with the lora keys of the adapter that `model.adapter` names; dropout may be another.

    Raises:
        RecipeError: with each key that the recipe sets otherwise. ModelError: where there is no such adapter.
    """
    if recipe.model.adapter is None or recipe.tuning == "full":  # with which it is refused
        return recipe
    from qorpo.model.adapter_folder import ends_of, find_adapter, lora_keys, read_adapter_config

    taken, given = (
        lora_keys(read_adapter_config(find_adapter(recipe.model.adapter))),
        recipe.to_dict()["lora"],
    )
    is_said = recipe.lora.model_fields_set
    if isinstance(given["targets"], list) and ends_of(given["targets"]) == taken["targets"]:
        taken["targets"] = given["targets"]
    if "dropout" in is_said:
        taken["dropout"] = given["dropout"]
    differing = {key: value for key, value in taken.items() if value != given[key]}
    problems = [
        f"lora.{key}: {shown(given[key])}, and the adapter of model.adapter has {shown(value)}; leave it out"
        for key, value in differing.items()
        if key in is_said and given[key] != "all-linear"  # whose names only the model knows
    ]
    if problems:
        raise recipe_error("recipe", problems)
    if differing:
        found = ", ".join(f"lora.{key} {shown(value)}" for key, value in differing.items())
        logger.info("model.adapter: %s has %s", recipe.model.adapter, found)
    return load_recipe({**recipe.to_dict(), "lora": {**given, **taken}})


def load_data(recipe: Recipe, chat_format: ChatFormat) -> PreparedData:
    """The recipe's pairs as tokens, logging what was dropped."""
    keys, objective = recipe.data, build_objective(recipe.objective)
    data = prepare_pairs(
        _sources(keys.train),
        keys.eval if isinstance(keys.eval, float | None) else _sources(keys.eval),
        chat_format,
        limits_of(keys),
        layout=Layout(shape=keys.shape, columns=keys.columns, ranked_pairs=keys.ranked_pairs),
        min_margin=keys.min_margin,
        on_bad_record=keys.on_bad_record,
        **reading_of(recipe),
        num_responses=objective.responses,
        seed=recipe.train.seed,
    )
    if data.whole is not None:
        logger.info("data: %s", data.whole.summary())
    if data.leaked_prompts:
        logger.warning(
            "data: %s evaluation prompts occur in training too; its figures will flatter",
            f"{data.leaked_prompts:,}",
        )
    for name, tokenized in (("train", data.train), ("eval", data.eval)):
        if tokenized is not None:
            report = tokenized.report
            cut = ", ".join(f"{count:,} {side}" for side, count in report.cut.items() if count) or "none"
            logger.info(
                "data: %s: %s, kept %s; cut to length: %s", name, report.summary(), f"{report.kept:,}", cut
            )
            _check_fits(tokenized.groups, objective, f"data.{name}")
    return data


def tokenized(
    data: Sequence[Example] | TokenizedData | Sources, chat_format: ChatFormat, recipe: Recipe
) -> Sequence[Group]:
    """Groups, whichever of these they come as; what load_pairs takes is read as the recipe's `data` says.

    Raises DataError where they have fewer responses than the objective compares, or lack what else it reads.
    """
    keys, objective = recipe.data, build_objective(recipe.objective)
    wanted = objective.responses
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
                **reading_of(recipe),
            )
        elif objective.needs_labels:
            ready = [each for example in data for each in labelled_answers(example)]  # type: ignore[arg-type]
        data = tokenize_pairs(ready, chat_format, limits_of(keys), wanted, keys.on_bad_record)
    counts = {len(group.responses) for group in data.groups[:1]}
    if any(count < wanted for count in counts):
        raise DataError(
            f"objective.name: {recipe.objective.name} compares {wanted} responses of a prompt, and the data has one; "
            "give pairs, or set it to sft"
        )
    _check_fits(data.groups, objective, "the data")
    return data.groups if counts <= {wanted} else [group.first(wanted) for group in data.groups]


def _check_fits(groups: Sequence[Group], objective: Objective, where: str) -> None:
    """Raises DataError where groups lack what the objective reads beside their tokens."""
    if objective.needs_margins and (lacking := sources_without(groups, "margin")):
        raise DataError(
            f"{where}: {len(lacking):,} of {len(groups):,} pairs have no score that says how much better chosen is "
            f"(such as {lacking[0]}), and objective.name: {objective.name} learns from it; give data with scores (data.shape: "
            "scored, or score_chosen and score_rejected), or set objective.name: dpo"
        )
    if objective.needs_labels and (lacking := sources_without(groups, "desirable")):
        raise DataError(
            f"{where}: {len(lacking):,} of {len(groups):,} rows have no label (such as {lacking[0]}), and objective.name: "
            f"{objective.name} learns from it; tokenize them as labelled answers"
        )


def reading_of(recipe: Recipe) -> dict[str, Any]:
    """What reads records as the objective learns from them, for `load_pairs`: pairs, answers by themselves, or labelled."""
    objective = build_objective(recipe.objective)
    alone = objective.responses == 1 and not objective.needs_labels
    return {
        "train_turns": (recipe.data.train_turns or "auto") if alone else None,
        "labelled": objective.needs_labels,
    }


def _sources(given: Sequence[str | SourceRecipe]) -> list[str | Source]:
    return [each if isinstance(each, str) else Source(**dict(each)) for each in given]


def limits_of(keys: DataRecipe) -> Limits:
    return Limits(keys.max_length, keys.max_prompt_length, keys.long_prompts, keys.long_responses)


def build_objective(keys: ObjectiveRecipe) -> Objective:
    """The loss that the recipe names; its class has the same keys, by the same names."""
    return OBJECTIVES[keys.name](**keys.model_dump(exclude={"name"}))
