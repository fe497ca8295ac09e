"""Statistics of prepared data, and pairs as the model sees them."""

import json

import numpy as np
import pytest
from helpers.tiny import make_tokenizer

from qorpo.data.chat_format import ChatFormat
from qorpo.data.inspect import as_dict, show_groups, statistics
from qorpo.data.prepare import prepare_pairs
from qorpo.data.shapes import Layout
from qorpo.data.tokenize import Limits

RECORDS = [
    {"prompt": "What?", "chosen": "aaaa", "rejected": "b"},
    {"prompt": "What?", "chosen": "a", "rejected": "bb"},
    {"prompt": "What is it?", "chosen": "a", "rejected": "b"},
    {"prompt": "What\nis it?", "chosen": "aaaaaaa <|end|>", "rejected": "bb" * 40},
]


@pytest.fixture
def chat():
    return ChatFormat(make_tokenizer())


@pytest.fixture
def data(chat, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in RECORDS))
    return prepare_pairs(
        str(path), str(path), chat, Limits(60, 40), layout=Layout(), cache=tmp_path / "cache"
    )


def test_statistics_are_those_of_the_tokens(data):
    pairs = list(data.train.groups)
    sizes = np.array([p.lengths for p in pairs])
    found = statistics(data.train.groups)
    assert found.pairs == 4
    assert found.row_tokens == sizes.sum()
    assert found.separate_tokens == sizes.sum() + sizes[:, 0].sum()
    assert found.saved_by_sharing == pytest.approx(sizes[:, 0].sum() / found.separate_tokens)
    assert (found.chosen_longer, found.equally_long) == (0.25, 0.25)
    for column, side in enumerate(("prompt", "chosen", "rejected")):
        lengths = found.lengths[side]
        counts = sizes[:, column]
        assert (lengths.max, lengths.mean) == (counts.max(), round(counts.mean(), 1))
        assert lengths.p99 == counts.max()
        assert lengths.p50 in counts
        for low, high, number in zip(lengths.edges, lengths.edges[1:], lengths.counts, strict=False):
            assert number == ((low <= counts) & (counts < high)).sum()
        assert sum(lengths.counts) == 4


def test_shown_pairs_are_all_their_tokens(data, chat):
    first, last = show_groups(data.train.groups, 2, chat)
    assert (first.source, last.source) == ("pairs.jsonl:1", "pairs.jsonl:4")
    assert len(show_groups(data.train.groups, 9, chat)) == 4
    assert show_groups(data.train.groups, 0, chat) == []
    assert list(first.parts) == ["prompt", "chosen", "rejected"]
    assert [(span.text, span.special) for span in first.parts["prompt"]] == [
        ("<|start|>", True), ("user\nWhat?", False), ("<|end|>", True),
        ("<|start|>", True), ("assistant\n", False),
    ]  # fmt: skip
    assert [(span.text, span.special, span.learned) for span in first.parts["chosen"]] == [
        ("aaaa", False, True), ("<|end|>", True, True),
    ]  # fmt: skip
    assert not any(span.learned for span in first.parts["prompt"])
    (learned,) = show_groups(data.train.groups, 1, chat, learn_prompt=True)
    assert all(span.learned for span in learned.parts["prompt"])
    # What only spells the stop is text, and a cut answer has none.
    assert [span.special for span in last.parts["chosen"]] == [False, True]
    assert [span.special for span in last.parts["rejected"]] == [False]
    assert last.cut == ["rejected"]


def test_as_dict_is_json_and_whole(data, chat):
    values = json.loads(json.dumps(as_dict(data, show_groups(data.train.groups, 1, chat))))
    assert values["train"]["kept"] == values["train"]["statistics"]["pairs"] == 4
    assert values["eval"]["statistics"]["lengths"]["chosen"]["max"] > 0
    assert 0 < values["train"]["statistics"]["saved_by_sharing"] < 0.5
    assert values["eval_prompts_in_train"] == 3
    assert values["shown"] == [
        {
            "source": "pairs.jsonl:1",
            "cut": [],
            "prompt": "<|start|>user\nWhat?<|end|><|start|>assistant\n",
            "chosen": "aaaa<|end|>",
            "rejected": "b<|end|>",
        }
    ]
