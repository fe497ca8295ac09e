"""Commands about recipes: init, keys, train --dry-run, and recipes of other trainers given by mistake."""

import json
from pathlib import Path

import pytest
import yaml
from helpers.tiny import changed

from qorpo.errors import RecipeError
from qorpo.recipe import FIELDS, load_recipe
from qorpo.recipe.describe import SECTIONS, commented_recipe, describe_keys, json_schema
from qorpo.recipe.foreign import KEYS

MIGRATING = Path(__file__).parents[1] / ".github" / "docs" / "migrating.md"


# --- init ---


def test_init_evaluates_the_demo_on_pairs_it_does_not_train_on(command, tmp_path):
    code, _, err = command("init", tmp_path / "demo.yaml", "--model", "demo", "--output", "runs/demo")
    assert code == 0, err
    data = load_recipe(tmp_path / "demo.yaml").data
    assert (data.train, data.eval) == (("demo",), ("demo:eval",))


def test_init_writes_a_commented_recipe_that_loads(command, tmp_path):
    path = tmp_path / "mine.yaml"
    arguments = [
        "--model",
        "org/base",
        "--train",
        "my pairs.jsonl",
        "--eval",
        "0.1",
        "--output",
        "runs/mine",
        "--full",
    ]
    code, out, err = command("init", path, *arguments)
    assert code == 0, err
    assert f"qorpo train {path} --dry-run" in out
    recipe = load_recipe(path)
    assert (recipe.model.path, recipe.data.train, recipe.data.eval) == ("org/base", ("my pairs.jsonl",), 0.1)
    assert (recipe.tuning, recipe.output) == ("full", "runs/mine")
    assert path.read_text().count(" # ") > 8
    code, _, err = command("init", path)
    assert code == 2
    assert "is there already" in err


def test_init_writes_nothing_where_what_is_given_does_not_hold(command, tmp_path):
    code, _, err = command("init", tmp_path / "r.yaml", "--model", "x", "--train", "y", "--eval", "1.5")
    assert code == 2
    assert "data.eval" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ['a "quoted": name', "- dash", "3", "null", "ü # no comment"])
def test_whatever_is_given_is_kept_as_text(text):
    assert load_recipe(yaml.safe_load(commented_recipe(text, text, None, text))).model.path == text


# --- keys ---


def test_keys_says_all_of_them_with_default_and_meaning(command):
    code, out, _ = command("keys")
    assert code == 0
    for name, info in FIELDS.items():
        assert name in out
        assert info.description in out
    assert "train.warmup_ratio: 0.1 (a number" in out


def test_keys_of_a_section_are_its_own(command):
    for section in SECTIONS:
        names = [line.strip().split(":")[0] for line in describe_keys(section) if line.startswith("  ")]
        assert {name.split(".")[0] for name in names if "." in name.split(" ")[0]} <= {section}
    code, _, err = command("keys", "trian")
    assert code == 2
    assert "there are model, tuning" in err


def test_the_schema_has_every_key(command):
    code, out, _ = command("keys", "--schema")
    assert code == 0
    schema = json.loads(out)
    assert schema == json_schema()
    assert schema["required"] == ["model", "data", "output"]
    for path in FIELDS:
        section, _, key = path.partition(".")
        place = schema["properties"][section]
        if not key:
            continue
        options = place.get("oneOf") or [place]
        names = set().union(*(schema["$defs"][each["$ref"].split("/")[-1]]["properties"] for each in options))
        assert key in names, path


# --- dry run ---


def test_a_dry_run_checks_and_plans_and_writes_nothing(command, recipe_dict, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(changed(recipe_dict, data__eval=0.25)))
    code, out, err = command("train", path, "--dry-run", "--output", tmp_path / "elsewhere")
    assert code == 0, err
    assert "would train on 30 pairs, 10 held out, in 8 steps" in out
    assert "fits" in out
    assert out.splitlines()[-1] == f"  qorpo train {path} output={tmp_path / 'elsewhere'}"
    assert [each.name for each in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize("broken", ["data", "weights", "output"])
def test_a_dry_run_finds_what_a_run_would(command, recipe_dict, base_copy, tmp_path, broken):
    path = tmp_path / "recipe.yaml"
    recipe = changed(recipe_dict, model__path=str(base_copy))
    path.write_text(
        json.dumps(changed(recipe, data__train=str(tmp_path / "none.jsonl")) if broken == "data" else recipe)
    )
    if broken == "weights":
        (base_copy / "model.safetensors").unlink()
    if broken == "output":
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "mine").write_text("")
    code, _, err = command("train", path, "--dry-run")
    assert code == 2
    assert {"data": "none.jsonl", "weights": "no weights", "output": "is not empty"}[broken] in err


# --- recipes of others ---

OTHERS = {
    "Axolotl": {"base_model": "a/b", "rl": "orpo", "orpo_alpha": 0.1, "sequence_len": 2048, "output_dir": "x", "fsdp": []},
    "LLaMA-Factory": {"model_name_or_path": "a/b", "stage": "dpo", "pref_loss": "orpo", "cutoff_len": 2048, "dataset": "d"},
    "TRL": {"model_name_or_path": "a/b", "dataset_name": "d", "beta": 0.1, "output_dir": "x", "use_peft": True},
}  # fmt: skip


@pytest.mark.parametrize("trainer", OTHERS)
def test_a_recipe_of_another_trainer_is_recognised_and_its_keys_named(trainer, tmp_path):
    path = tmp_path / "theirs.yaml"
    path.write_text(yaml.safe_dump(OTHERS[trainer]))
    with pytest.raises(RecipeError) as error:
        load_recipe(path)
    said = str(error.value)
    assert said.startswith(f"{path}: this is a recipe of {trainer}")
    for name in OTHERS[trainer]:
        if name in KEYS[trainer]:
            assert f"{name} is {KEYS[trainer][name]} here" in said
    if trainer == "Axolotl":
        assert "no counterpart: fsdp" in said


def test_a_recipe_of_qorpos_with_an_odd_key_is_not_taken_for_anothers(recipe_dict):
    with pytest.raises(RecipeError, match="base_model"):
        load_recipe({**recipe_dict, "base_model": "a", "sequence_len": 1})
    with pytest.raises(RecipeError, match=r"not a key|no such key|unknown"):
        load_recipe({"modle": {"path": "x"}, "output": "x"})


def test_the_keys_named_are_qorpos_and_the_pages():
    table = MIGRATING.read_text(encoding="utf-8")
    for trainer, keys in KEYS.items():
        for name, ours in keys.items():
            assert ours.split(" ")[0].split(":")[0] in FIELDS, (trainer, name)
        assert sum(name in table for name in keys) > len(keys) / 2
