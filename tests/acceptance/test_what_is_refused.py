"""What qorpo refuses: by exit code 2 and one message, before anything is written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chain import FILES, Row, qorpo
from rows import COMMITTED, EVERY_REASON, UNREADABLE

ROW = COMMITTED[1]


def refused_data(**data: Any) -> Row:
    return replace(ROW, data=ROW.data | data)


# The row, and what the message has to name.
REFUSED = {
    "unreadable records": (
        refused_data(on_bad_record="fail"),
        [
            EVERY_REASON.name,
            "data.on_bad_record",
            *(f"{count} {reason}" for reason, count in UNREADABLE.items()),
        ],
    ),
    "nothing left as tokens": (
        refused_data(max_length=3, max_prompt_length=2, long_prompts="drop"),
        ["prompt_too_long", "data.max_prompt_length"],
    ),
    "no preference in any record": (
        replace(ROW, train=FILES / "only_ties.jsonl"),
        ["only_ties.jsonl", "2 tie"],
    ),
    "no such file": (replace(ROW, train=FILES / "none.jsonl"), ["none.jsonl", "no such file"]),
    "a set that is no preference data": (
        replace(ROW, train=f"{FILES / 'dataset_info.json'}:sft"),
        ["sft", "opposites"],
    ),
    "more held out than there is": (replace(ROW, eval=1.5), ["data.eval", "1.5"]),
    "a template that is no template": (
        replace(ROW, model={"path": "demo", "chat_template": FILES / "table.csv"}),
        ["template"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_data_ends_a_run_before_it_begins(name: str, tmp_path: Path):
    row, named = REFUSED[name]
    recipe = row.write_recipe(tmp_path)
    said = qorpo("train", recipe, code=2).stderr
    assert [word for word in named if word not in said] == [], said
    assert not (tmp_path / "run").exists()


def test_a_run_is_neither_overwritten_nor_resumed_from_nothing(tmp_path: Path):
    recipe = ROW.write_recipe(tmp_path)
    said = qorpo("train", recipe, "--resume", code=2).stderr
    assert str(tmp_path / "run") in said
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text(json.dumps({"someone": "else's"}))
    said = qorpo("train", recipe, code=2).stderr
    assert str(tmp_path / "run") in said
    assert json.loads((tmp_path / "run" / "recipe.yaml").read_text()) == {"someone": "else's"}
