"""From a recipe to data: pairs become tokens whichever way they come."""

from pathlib import Path

import datasets
import pytest
from helpers.tiny import make_tokenizer, preference_records

from qorpo.build import tokenized
from qorpo.data.sources import load_pairs
from qorpo.data.tokenize import ChatFormat, Limits, tokenize_pairs
from qorpo.errors import DataError
from qorpo.recipe import load_recipe


def keys(**changes):
    data = {"train": "demo", "max_length": 64, "max_prompt_length": 32, **changes}
    return load_recipe({"model": {"path": "demo"}, "data": data, "output": "unused"}).data


def test_pairs_become_tokens_whichever_way_they_come(pairs_file):
    chat, records = ChatFormat(make_tokenizer()), preference_records()
    expected = tokenize_pairs(load_pairs(records), chat, Limits(64, 32))
    ways = [
        records, str(pairs_file), Path(pairs_file), [str(pairs_file)], datasets.Dataset.from_list(records),
        load_pairs(records), list(load_pairs(records)), expected,
    ]  # fmt: skip
    for pairs in ways:
        found = tokenized(pairs, chat, keys())
        assert [p.chosen_ids for p in found] == [p.chosen_ids for p in expected.pairs]


def test_records_are_read_as_the_recipe_says():
    chat = ChatFormat(make_tokenizer())
    records = [{"ask": "Q?", "chosen": "Yes, it is.", "rejected": "No."}, {"ask": "Q?"}]
    found = tokenized(records, chat, keys(columns={"prompt": "ask"}, on_bad_record="skip"))
    assert len(found) == 1
    with pytest.raises(DataError, match=r"records\[1\]"):
        tokenized(records, chat, keys(columns={"prompt": "ask"}))
    with pytest.raises(DataError, match="no source of pairs"):
        tokenized(7, chat, keys())
