"""Answers with a label, as kto learns from: which columns hold them, and pairs as two of them."""

import json

import pytest
from helpers.tiny import make_tokenizer, write_records

from qorpo.build import tokenized
from qorpo.data.chat_format import ChatFormat
from qorpo.data.conversations import Layout
from qorpo.data.demonstrations import read_labelled
from qorpo.data.pack import pack_groups
from qorpo.data.prepare import prepare_pairs
from qorpo.data.records import BadRecord, Demonstration
from qorpo.data.sources import load_pairs
from qorpo.data.tokenize import Limits, tokenize_pairs
from qorpo.errors import DataError
from qorpo.recipe import load_recipe

LIMITS = Limits(256, 128)
ASKED = {"role": "user", "content": "What?"}
THIS = {"role": "assistant", "content": "This."}
PAIR = {"prompt": "What?", "chosen": "This.", "rejected": "That."}
ROWS = [
    {"prompt": "What?", "completion": "This.", "label": True},
    {"prompt": [ASKED], "completion": [{"role": "assistant", "content": "That."}], "label": 0},
    {"messages": [ASKED, {"role": "assistant", "content": "Those."}], "kto_tag": "false"},
    {"question": "Why?", "answer": "So.", "label": "1"},
]  # fmt: skip
READ = [("This.", True), ("That.", False), ("Those.", False), ("So.", True)]


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(make_tokenizer())


@pytest.mark.parametrize(("record", "expected"), zip(ROWS, READ, strict=True))
def test_labelled_answers_are_read_under_the_names_that_datasets_use(record, expected):
    found = read_labelled(record, Layout())
    assert (found.turns[-1]["content"], found.desirable) == expected


@pytest.mark.parametrize("value", [True, 1, 1.0, "true", "True ", "1"])
def test_a_label_may_be_spelled(value):
    assert read_labelled({**ROWS[0], "label": value}, Layout()).desirable is True


@pytest.mark.parametrize("value", [2, -1, 0.5, "yes", "", [True]])
def test_what_is_no_label_is_said(value):
    with pytest.raises(BadRecord, match=r"the label is .*; expected true or false, or 1 or 0") as found:
        read_labelled({**ROWS[0], "label": value}, Layout())
    assert found.value.reason == "wrong_value"


def test_an_answer_without_a_label_is_none_and_a_null_is_no_verdict():
    with pytest.raises(BadRecord, match="one answer and no label") as found:
        read_labelled({"prompt": "What?", "completion": "This."}, Layout())
    assert "data.columns" in found.value.remedy
    named = {"prompt": "What?", "completion": "This.", "thumbs_up": True}
    assert read_labelled(named, Layout(columns={"label": "thumbs_up"})).desirable
    with pytest.raises(DataError, match=r"0 usable pairs.*dropped 1 no_verdict"):
        load_pairs([{**ROWS[0], "label": None}], labelled=True)


def test_a_pair_is_two_labelled_answers():
    found = load_pairs([PAIR, *ROWS[3:], {**PAIR, "rejected": "This. "}], labelled=True)
    assert [(each.answer, each.desirable) for each in found] == [("This.", True), ("That.", False), READ[3]]
    assert found.report.kept == 3
    assert found.report.dropped == {"same": 1}


def test_what_contradicts_or_repeats_is_noted():
    repeated = load_pairs([ROWS[0], ROWS[0]], labelled=True)
    assert repeated.report.noted == {"duplicate": 1}
    contradicted = load_pairs([ROWS[0], {**ROWS[0], "label": False}], labelled=True)
    assert contradicted.report.noted == {"contradiction": 1}


def test_the_last_answer_of_a_conversation_has_the_label(chat):
    record = {"messages": [ASKED, THIS, {"role": "user", "content": "Sure?"}, THIS], "label": True}
    (group,) = tokenize_pairs(load_pairs([record], labelled=True), chat, LIMITS, 1).groups
    assert group.unscored == ()
    assert group.desirable is True
    assert len(group.responses) == 1


def test_labels_outlive_the_cache_and_are_packed(chat, tmp_path):
    path = write_records(tmp_path / "rows.jsonl", [*ROWS, PAIR])
    options = {"layout": Layout(), "labelled": True, "num_responses": 1, "cache": tmp_path / "cache"}
    for _ in range(2):  # made, and found again
        groups = list(prepare_pairs(str(path), None, chat, LIMITS, **options).train.groups)
        assert [group.desirable for group in groups] == [*(label for _, label in READ), True, False]
    assert pack_groups(groups).desirable.tolist() == [group.desirable for group in groups]
    assert pack_groups([*groups, *unlabelled(chat)]).desirable is None


def unlabelled(chat):
    return tokenize_pairs([Demonstration((ASKED,), "This.", "a")], chat, LIMITS, 1).groups


def recipe_of(name):
    keys = {"objective": {"name": name}, "model": {"path": "demo"}, "data": {"train": "demo"}, "output": "x"}
    return load_recipe(keys)


def test_kto_takes_pairs_rows_and_files_alike(chat, tmp_path):
    recipe = recipe_of("kto")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(PAIR) + "\n", encoding="utf-8")
    for data in (load_pairs([PAIR]), load_pairs([PAIR], labelled=True), [PAIR], str(path)):
        assert [group.desirable for group in tokenized(data, chat, recipe)] == [True, False]
    for tokens in (tokenize_pairs(load_pairs([PAIR]), chat, LIMITS), unlabelled_data(chat)):
        with pytest.raises(DataError, match=r"rows have no label.*objective.name: kto learns from it"):
            tokenized(tokens, chat, recipe)


def unlabelled_data(chat):
    return tokenize_pairs([Demonstration((ASKED,), "This.", "a")], chat, LIMITS, 1)


def test_mmpo_needs_a_margin_of_every_pair(chat):
    scored = {**PAIR, "score_chosen": 3, "score_rejected": 1}
    (group,) = tokenized([scored], chat, recipe_of("mmpo"))
    assert group.margin == 2.0
    with pytest.raises(DataError, match=r"1 of 2 pairs have no score.*set objective.name: dpo"):
        tokenized([scored, PAIR], chat, recipe_of("mmpo"))


def test_mmpo_needs_margins_of_files_too(chat, tmp_path):
    from qorpo.build import load_data

    path = write_records(tmp_path / "pairs.jsonl", [PAIR, {**PAIR, "prompt": "Why?"}])
    recipe = recipe_of("mmpo").replace("data.train", [str(path)])
    with pytest.raises(DataError, match=r"data\.train: 2 of 2 pairs have no score.*such as .*pairs\.jsonl:1"):
        load_data(recipe, chat)
