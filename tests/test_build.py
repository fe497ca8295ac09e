"""What a recipe's keys become: pairs that are tokens whichever way they come, and the objective."""

import dataclasses
from pathlib import Path

import datasets
import pytest
from helpers.tiny import make_tokenizer, preference_records

from qorpo.build import OBJECTIVES, build_objective, tokenized
from qorpo.data.chat_format import ChatFormat
from qorpo.data.sources import load_pairs
from qorpo.data.tokenize import Limits, tokenize_pairs
from qorpo.errors import DataError
from qorpo.recipe import OBJECTIVES as RECIPES
from qorpo.recipe import load_recipe


def recipe_of(objective="orpo", **changes):
    data = {"train": "demo", "max_length": 64, "max_prompt_length": 32, **changes}
    return load_recipe(
        {"model": {"path": "demo"}, "data": data, "objective": {"name": objective}, "output": "unused"}
    )


def test_pairs_become_tokens_whichever_way_they_come(pairs_file):
    chat, records = ChatFormat(make_tokenizer()), preference_records()
    expected = tokenize_pairs(load_pairs(records), chat, Limits(64, 32))
    ways = [
        records, str(pairs_file), Path(pairs_file), [str(pairs_file)], datasets.Dataset.from_list(records),
        load_pairs(records), list(load_pairs(records)), expected,
    ]  # fmt: skip
    for pairs in ways:
        found = tokenized(pairs, chat, recipe_of())
        assert [p.responses[0] for p in found] == [p.responses[0] for p in expected.groups]


def test_records_are_read_as_the_recipe_says():
    chat = ChatFormat(make_tokenizer())
    records = [{"ask": "Q?", "chosen": "Yes, it is.", "rejected": "No."}, {"ask": "Q?"}]
    found = tokenized(records, chat, recipe_of(columns={"prompt": "ask"}, on_bad_record="skip"))
    assert len(found) == 1
    with pytest.raises(DataError, match=r"records\[1\]"):
        tokenized(records, chat, recipe_of(columns={"prompt": "ask"}))
    with pytest.raises(DataError, match="no source of pairs"):
        tokenized(7, chat, recipe_of())


def test_groups_have_as_many_responses_as_the_objective_reads():
    chat = ChatFormat(make_tokenizer())
    pairs = tokenize_pairs(load_pairs(preference_records()), chat, Limits(64, 32))
    alone = tokenized(pairs, chat, recipe_of("sft"))
    assert alone == tokenized(preference_records(), chat, recipe_of("sft"))
    assert alone == [group.first(1) for group in pairs.groups]
    with pytest.raises(DataError, match=r"orpo compares 2 responses of a prompt, and the data has one"):
        tokenized(pairs._replace(groups=alone), chat, recipe_of())


# --- the objective ---

LEAST = {"model": {"path": "demo"}, "data": {"train": "demo"}, "output": "runs/x"}


def test_every_objective_of_the_recipe_is_built_by_its_name_and_no_other():
    assert RECIPES.keys() == OBJECTIVES.keys()
    for name, each in OBJECTIVES.items():
        assert each.name == name


@pytest.mark.parametrize("name", OBJECTIVES)
def test_recipe_and_objective_have_the_same_keys_and_defaults(name):
    keys = load_recipe({**LEAST, "objective": {"name": name}}).objective
    objective = build_objective(keys)
    assert objective == OBJECTIVES[name]()
    assert dataclasses.asdict(objective) == keys.model_dump(exclude={"name"})


def test_the_objective_is_what_the_recipe_says():
    recipe = load_recipe(
        {**LEAST, "objective": {"name": "cpo", "beta": 0.3, "alpha": 0, "nll_tokens": "all"}}
    )
    objective = build_objective(recipe.objective)
    assert (objective.name, objective.beta, objective.alpha) == ("cpo", 0.3, 0.0)
    assert objective.scores_prompts
    assert build_objective(load_recipe(LEAST, ["objective.lambda=0.7"]).objective).weight == 0.7
