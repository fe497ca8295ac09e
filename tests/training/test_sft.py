"""Supervised fine-tuning from a recipe: rows of one answer, and pairs of which rejected is left out."""

import json

import pytest
from helpers.tiny import changed, preference_records, read_metrics, short_recipe

import qorpo
from qorpo.errors import DataError, RecipeError
from qorpo.planning.plan import plan
from qorpo.recipe import load_recipe


@pytest.fixture
def rows_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = []
    for number, record in enumerate(preference_records()):
        turns = [
            {"role": "user", "content": record["prompt"]},
            {"role": "assistant", "content": record["chosen"]},
        ]
        more = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "It just is."}]
        alpaca = {"instruction": record["prompt"], "input": "", "output": record["chosen"]}
        rows.append({"messages": turns + more} if number % 2 else alpaca)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def sft(base, data, output, **changes):
    return changed(short_recipe(base, data, output), objective={"name": "sft"}, **changes)


def test_rows_of_one_answer_train(base, rows_file, tmp_path):
    result = qorpo.train(sft(base, rows_file, tmp_path / "run", data__eval=0.25))
    evaluations = [line for line in read_metrics(tmp_path / "run") if "eval_loss" in line]
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    steps = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert all("groups_per_second" in line and "pairs_per_second" not in line for line in steps)
    assert {"eval_nll", "eval_chosen_logps"} <= evaluations[0].keys()
    assert result.warning is None
    saved = load_recipe(tmp_path / "run" / "recipe.yaml")
    assert saved.objective.name == "sft"
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    assert report["train"]["tokens"].keys() == {"prompt", "response"}


def test_pairs_and_their_chosen_answers_alone_train_to_the_same_adapter(base, pairs_file, tmp_path):
    chosen = tmp_path / "chosen.jsonl"
    records = [{"prompt": each["prompt"], "completion": each["chosen"]} for each in preference_records()]
    chosen.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    for data, output in ((pairs_file, "pairs"), (chosen, "chosen")):
        qorpo.train(sft(base, data, tmp_path / output, train__max_steps=2))
    one, other = (tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("pairs", "chosen"))
    assert one.read_bytes() == other.read_bytes()


def test_a_plan_counts_one_answer():
    recipe = {
        "model": {"path": "demo"}, "data": {"train": "demo", "max_length": 256, "max_prompt_length": 128},
        "memory": {"microbatch_tokens": 1, "activation_checkpointing": False}, "output": "unused",
    }  # fmt: skip
    kept = {
        name: plan(recipe, [f"objective.name={name}"], budget_gib=2.0).by_kind["activations"]
        for name in ("sft", "orpo")
    }
    assert 0.4 * kept["orpo"] < kept["sft"] < 0.65 * kept["orpo"]


def test_one_answer_is_too_few_to_compare(base, rows_file, tmp_path):
    with pytest.raises(DataError, match=r"objective\.name: sft, which learns from one"):
        qorpo.train(short_recipe(base, rows_file, tmp_path / "run"))


def test_turns_are_a_key_of_sft_alone(base, rows_file, tmp_path):
    with pytest.raises(RecipeError, match=r"orpo learns the last answer, and data\.train_turns is all"):
        load_recipe(changed(short_recipe(base, rows_file, tmp_path), data__train_turns="all"))
    recipe = load_recipe(sft(base, rows_file, tmp_path, data__train_turns="last"))
    assert recipe.data.train_turns == "last"
