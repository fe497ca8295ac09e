"""The recipe: what is read, what is refused and in which words, and what `auto` becomes."""

import contextlib
import dataclasses
import subprocess
import sys
import time
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qorpo.data.conversations import RankedPairs
from qorpo.data.locate import Source
from qorpo.data.shapes import SHAPES
from qorpo.data.tokenize import Limits
from qorpo.errors import RecipeError
from qorpo.recipe import FIELDS, OBJECTIVES, MemoryRecipe, Recipe, SourceRecipe, load_recipe, resolve, values

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))
LEAST = {"model": {"path": "demo"}, "data": {"train": "demo"}, "output": "runs/x"}


def problems(source, overrides=()) -> list[str]:
    """The lines of the one error that a recipe raises, its title first."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    title, *lines = str(caught.value).split("\n  ")
    assert title.endswith(": 1 problem" if len(lines) == 1 else f": {len(lines)} problems")
    return lines


def problem(*overrides: str) -> str:
    """The one problem that overrides make of a recipe that has none."""
    lines = problems(LEAST, overrides)
    assert len(lines) == 1, lines
    return lines[0]


def value(key: str, recipe: Recipe):
    """None where the recipe's objective has no such key."""
    found = recipe.to_dict()
    for part in key.split("."):
        found = found.get(part)
    return found


def written(folder: Path, text: str) -> Path:
    path = folder / "my.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# --- reading ---


def test_three_keys_make_a_recipe_and_the_rest_has_the_documented_defaults():
    assert load_recipe(LEAST).to_dict() == {
        "model": {
            "path": "demo",
            "revision": None,
            "adapter": None,
            "quantization": "auto",
            "attention": "auto",
            "liger": "auto",
            "chat_template": None,
            "trust_remote_code": False,
            "allow_pickle": False,
        },
        "tuning": "lora",
        "lora": {
            "rank": 16,
            "alpha": 32,
            "dropout": 0.0,
            "targets": "all-linear",
            "modules_to_save": [],
            "use_rslora": False,
            "use_dora": False,
            "init": "default",
        },
        "data": {
            "train": ["demo"],
            "eval": None,
            "shape": None,
            "columns": {},
            "ranked_pairs": "best-worst",
            "min_margin": 0.0,
            "max_length": 2048,
            "max_prompt_length": 1024,
            "long_prompts": "drop",
            "long_responses": "cut",
            "train_turns": None,
            "on_bad_record": "fail",
        },
        "objective": {"name": "orpo", "lambda": 0.1, "nll_tokens": "response", "nll_average": "sequence"},
        "train": {
            "pairs_per_step": 32,
            "learning_rate": "auto",
            "epochs": "auto",
            "max_steps": None,
            "warmup_ratio": 0.1,
            "schedule": "cosine",
            "optimizer": "auto",
            "lora_plus_ratio": None,
            "weight_decay": 0.0,
            "adam_beta1": 0.9,
            "adam_beta2": 0.999,
            "adam_epsilon": 1e-8,
            "max_grad_norm": 1.0,
            "seed": 42,
            "eval_every": 0.1,
            "early_stopping": None,
            "save_every": 0.1,
            "log_every": 1,
            "keep_checkpoints": 2,
            "report_to": "auto",
        },
        "memory": {
            "budget_gib": "auto",
            "microbatch_tokens": "auto",
            "logprob_chunk_tokens": "auto",
            "activation_checkpointing": "auto",
            "activation_offload": "auto",
            "sharding": "auto",
        },
        "output": "runs/x",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_loads(path):
    recipe = load_recipe(path)
    assert resolve(recipe, device_type="cuda", installed=lambda module: True)


def test_the_shipped_configs_are_found():
    assert {"demo.yaml", "qlora-24gb.yaml"} <= {path.name for path in CONFIGS}


def test_numbers_that_yaml_reads_as_text_become_numbers(tmp_path):
    text = yaml.safe_dump(LEAST) + "train: {learning_rate: 8e-6, adam_epsilon: 1e-7, max_steps: 1e3}\n"
    assert yaml.safe_load(text)["train"]["learning_rate"] == "8e-6"  # the trap
    train = load_recipe(written(tmp_path, text), ["objective.lambda=2e-1", "data.eval=5e-2"])
    assert (train.train.learning_rate, train.train.adam_epsilon) == (8e-6, 1e-7)
    assert train.train.max_steps == 1000
    assert isinstance(train.train.max_steps, int)
    assert train.objective.weight == 0.2
    assert train.data.eval == 0.05


def test_overrides_are_yaml_and_the_last_wins():
    recipe = load_recipe(
        LEAST,
        [
            "data.train=[a.jsonl,b.jsonl]",
            "objective.lambda=0.2",
            "train.max_grad_norm=null",
            "data.eval=",
            "train.seed=1",
            "train.seed=7",
            "output = runs/a=b",
            "train.report_to=[]",
        ],
    )
    assert recipe.data.train == ("a.jsonl", "b.jsonl")
    assert recipe.objective.weight == 0.2
    assert recipe.train.max_grad_norm is None
    assert recipe.data.eval is None
    assert recipe.train.seed == 7
    assert recipe.output == "runs/a=b"
    assert recipe.train.report_to == ()


def test_overrides_leave_the_given_mapping_alone():
    mine = {**LEAST, "train": {"seed": 1}}
    assert load_recipe(mine, ["train.seed=2"]).train.seed == 2
    assert mine["train"] == {"seed": 1}


def test_one_file_or_name_is_a_list_of_one():
    recipe = load_recipe(LEAST, ["data.eval=b.jsonl", "lora.targets=q_proj", "train.report_to=wandb"])
    assert recipe.data.train == ("demo",)
    assert recipe.data.eval == ("b.jsonl",)
    assert recipe.lora.targets == ("q_proj",)
    assert recipe.train.report_to == ("wandb",)


def test_paths_stay_as_written():
    recipe = load_recipe({**LEAST, "output": Path("runs") / "x"}, ["data.train=../pairs.jsonl"])
    assert recipe.output == str(Path("runs/x"))
    assert recipe.data.train == ("../pairs.jsonl",)


def test_a_heading_with_nothing_under_it_keeps_the_defaults(tmp_path):
    path = written(tmp_path, yaml.safe_dump(LEAST) + "lora:\n  # rank: 8\n")
    assert load_recipe(path).lora.rank == 16
    assert load_recipe(path, ["lora.rank=8"]).lora.rank == 8


def test_from_one_on_eval_every_counts_steps():
    assert load_recipe(LEAST, ["train.eval_every=0.5"]).train.eval_every == 0.5
    steps = load_recipe(LEAST, ["train.eval_every=20"]).train.eval_every
    assert (steps, type(steps)) == (20, int)
    assert "got 1.5" in problem("train.eval_every=1.5")


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    assert load_recipe(written(tmp_path, "\ufeff" + yaml.safe_dump(LEAST))) == load_recipe(LEAST)


def test_a_recipe_does_not_change():
    with pytest.raises(ValueError, match="frozen"):
        load_recipe(LEAST).train.seed = 3  # type: ignore[misc]


# --- what is refused ---


def test_all_problems_come_in_one_message(tmp_path):
    path = written(
        tmp_path,
        """\
model: {quantization: int8}
lora:
  rank: x
  rank: y
data: {max_length: 512, max_prompt_length: 512, on_bad_record: maybe}
train: {lerning_rate: 1e-4}
""",
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["train.seed", "train.sed=1", "train.log_every=0"])
    assert str(caught.value).split("\n") == [
        f"{path}: 12 problems",
        "  line 4: rank given again (first on line 3); keep one",
        "  override 'train.seed': expected key=value, such as train.epochs=2",
        "  train.sed: unknown key; did you mean train.seed?",
        "  model.path: missing; give the base model: a local folder, a hub id, or demo (qorpo's own tiny one)",
        "  model.quantization: got 'int8'; expected nf4, none or auto",
        "  lora.rank: got 'y'; expected a whole number of at least 1",
        "  data.train: missing; give pairs (for sft and kto also rows of one answer) to train on: a file, folder, hub id, demo, or a list of these",
        "  data: max_prompt_length (512) must be less than max_length (512); lower it or raise max_length",
        "  data.on_bad_record: got 'maybe'; expected fail or skip",
        "  train.log_every: got 0; expected a whole number of at least 1",
        "  train.lerning_rate: unknown key; did you mean train.learning_rate?",
        "  output: missing; give the run folder, which the run makes",
    ]


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("train.lerning_rate", "train.learning_rate"),
        ("learning_rate", "train.learning_rate"),
        ("train.max_length", "data.max_length"),
        ("train.lambda", "objective.lambda"),
        ("train.gradient_checkpointing", "memory.activation_checkpointing"),
        ("modle.path", "model.path"),
        ("dataset", "data"),
        ("data.trian", "data.train"),
        ("trian", "train"),
    ],
)
def test_an_unknown_key_comes_with_the_nearest_known_one(key, nearest):
    section, _, name = key.rpartition(".")
    expected = f"{key}: unknown key; did you mean {nearest}?"
    assert problem(f"{key}=1") == expected
    if section in LEAST or not section:
        inner = {**LEAST.get(section, {}), name: 1}
        assert problems({**LEAST, **({section: inner} if section else inner)}) == [expected]


def test_an_unknown_key_near_nothing_comes_with_its_sections_keys():
    expected = (
        "unknown key; known are objective.name, objective.lambda, objective.nll_tokens, objective.nll_average, "
        "objective.beta, objective.alpha, objective.gamma_beta_ratio, objective.gamma, "
        "objective.desirable_weight, objective.undesirable_weight"
    )
    assert problem("objective.qqq=1") == f"objective.qqq: {expected}"
    assert (
        problem("objective.weight=1") == f"objective.weight: {expected}"
    )  # the Python name is not the recipe's
    top = "unknown key; known are model, tuning, lora, data, objective, train, memory, output"
    assert problem("zzz=1") == f"zzz: {top}"
    assert problem("output.zzz=1") == f"output.zzz: {top}"
    assert problems({**LEAST, 7: 1}) == [f"7: {top}"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("lora.rank=0", "got 0; expected a whole number of at least 1"),
        ("lora.rank=1.5", "got 1.5; expected a whole number of at least 1"),
        ("lora.rank=true", "got true; expected a whole number of at least 1"),
        ("lora.rank=", "got null; expected a whole number of at least 1"),
        ("lora.dropout=1", "got 1; expected a number from 0 to below 1"),
        ("lora.targets=[]", "got []; expected all-linear, all-linear+experts, or a list of module names"),
        ("lora.modules_to_save=[1]", "got [1]; expected a list of module names"),
        ("objective.lambda=-0.1", "got -0.1; expected a number of at least 0"),
        ("objective.lambda=true", "got true; expected a number of at least 0"),
        ("objective.lambda=abc", "got 'abc'; expected a number of at least 0"),
        ("objective.name=xyz", "got 'xyz'; expected orpo, sft, probability_ratio, cpo, simpo, asft, dpo, ipo, sppo, mmpo, kto"),
        ("objective.name=SimPOO", "got 'SimPOO'; did you mean simpo? expected orpo, sft, probability_ratio, cpo, simpo, asft, dpo, ipo, sppo, mmpo, kto"),
        ("objective.name=[orpo]", "got ['orpo']; expected orpo, sft, probability_ratio, cpo, simpo, asft, dpo, ipo, sppo, mmpo, kto"),
        ("objective.name=", "got null; expected orpo, sft, probability_ratio, cpo, simpo, asft, dpo, ipo, sppo, mmpo, kto"),
        ("objective=5", "got 5; expected a section, with keys of its own"),
        ("train.learning_rate=0", "got 0; expected auto, or a number above 0"),
        ("train.learning_rate=.nan", "got nan; expected auto, or a number above 0"),
        ("train.epochs=.inf", "got inf; expected auto, or a number above 0"),
        ("train.epochs=0", "got 0; expected auto, or a number above 0"),
        ("train.groups_per_step=0", "got 0; expected a whole number of at least 1"),
        ("train.lora_plus_ratio=0", "got 0; expected a number above 0"),
        ("lora.init=pissa", "got 'pissa'; expected default, gaussian or orthogonal (what changes the base's weights or needs data is not taken)"),
        ("train.max_steps=0", "got 0; expected a whole number of at least 1"),
        ("train.warmup_ratio=1", "got 1; expected a number from 0 to below 1"),
        ("train.adam_beta2=1.0", "got 1.0; expected a number from 0 to below 1"),
        ("train.max_grad_norm=-1", "got -1; expected a number of at least 0"),
        ("train.seed=-1", "got -1; expected a whole number from 0 to 4294967295"),
        ("train.save_every=0", "got 0; expected a number above 0, and whole from 1 on"),
        ("train.schedule=step", "got 'step'; expected cosine, linear, inverse_sqrt or constant"),
        ("train.report_to=", "got null; expected auto, [] for none, or a list of aim, clearml, comet_ml, dvclive, "
         "mlflow, swanlab, tensorboard, trackio, wandb"),
        ("data.train=[]", "got []; expected a file, a folder, a hub id, demo, or a list of these, each also with keys path, config, split, revision, weight, shape, columns"),
        ("data.train=7", "got 7; expected a file, a folder, a hub id, demo, or a list of these, each also with keys path, config, split, revision, weight, shape, columns"),
        ("data.eval=1.0", "got 1.0; expected a fraction of train between 0 and 1, null, or a file, a folder, a hub id, demo, or a list of these, each also with keys path, config, split, revision, weight, shape, columns"),
        ("model.path=''", "got ''; expected text (quote a number or a date)"),
        ("model.revision=2024-01-01", "got 2024-01-01; expected text (quote a number or a date)"),
        ("model.trust_remote_code=1", "got 1; expected true or false"),
        ("memory.microbatch_tokens=0", "got 0; expected auto, or a whole number of at least 1"),
        ("memory.activation_checkpointing=maybe", "got 'maybe'; expected auto, true, false, or how many layers, from the first"),
        ("train=5", "got 5; expected a section, with keys of its own"),
    ],
)  # fmt: skip
def test_a_wrong_value_comes_with_what_belongs_there(override, expected):
    assert problem(override) == f"{override.partition('=')[0]}: {expected}"


def named(key: str) -> list[str]:
    """The override that names an objective which has the key, where it is an objective's."""
    section, _, name = key.rpartition(".")
    has = [objective for objective, keys in OBJECTIVES.items() if name in keys.names()]
    return [f"objective.name={has[0]}"] if section == "objective" and name != "name" else []


@pytest.mark.parametrize("key", FIELDS)
def test_no_key_takes_just_anything_nor_answers_in_pydantics_words(key):
    line = problems(LEAST, [*named(key), f"{key}=[[]]"])[0]  # no key is a list of lists
    assert line.startswith(f"{key}: got [[]]; expected ")
    assert "nput" not in line, "pydantic's messages say 'Input should be …'"


def test_a_section_that_is_no_section_is_told_once_also_with_overrides():
    assert problems({**LEAST, "train": 5}, ["train.seed=1"]) == [
        "train: got 5; expected a section, with keys of its own"
    ]


def test_long_values_are_cut():
    line = problem("train.schedule=" + "x" * 500)
    assert len(line) < 200


def test_lengths_are_compared_whatever_else_is_wrong_but_only_where_both_are_numbers():
    clash = "data: max_prompt_length (1024) must be less than max_length (512); lower it or raise max_length"
    assert problem("data.max_length=512") == clash
    assert problems({"model": {"path": "demo"}, "output": "x"}, ["data.max_length=512"])[1:] == [clash]
    assert (
        problem("data.max_length=none")
        == "data.max_length: got 'none'; expected a whole number of at least 1"
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: b\n\tc: d\n", "line 2: not valid YAML: found character '\\t' that cannot start any token"),
        ("output: [x\n", "line 2: not valid YAML: expected ',' or ']', but got '<stream end>'"),
        ("output: 2024-13-01\n", "not valid YAML: month must be in 1..12"),
        (
            "output: !!python/name:os.system\n",
            "line 1: a recipe takes no tags (!!python/name:os.system); leave",
        ),
        ("a: 1\noutput: !!timestamp x\n", "line 2: a recipe takes no tags (!!timestamp); leave it out"),
        ("a: !own {b: 1}\n", "line 1: a recipe takes no tags (!own); leave it out"),
        ("a: &a [*a]\n", "line 1: a recipe takes no aliases (*a); write the value itself"),
        ("a: &a [x]\nb: *a\n", "line 2: a recipe takes no aliases (*a); write the value itself"),
        ("output: [" + "1:" * 9999 + "1]\n", "line 1: a value of 19,999 characters; 2,048 at most"),
        ("a: " + "[" * 9999, "nested too deeply; a recipe has sections, and keys in them"),
        ("- " * 9999, "nested too deeply; a recipe has sections, and keys in them"),
        ("{a: " * 9999, "nested too deeply; a recipe has sections, and keys in them"),
        ("#" * 300_000, "over 256 KiB; give the path of a recipe, a YAML file"),
        ("- a\n", "got ['a']; expected keys and values, such as output: runs/first"),
        ("just text", "got 'just text'; expected keys and values, such as output: runs/first"),
    ],
)
def test_a_file_that_holds_no_recipe(tmp_path, text, expected):
    path = written(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value).startswith(f"{path}: 1 problem\n  {expected}")


def test_a_recipe_of_other_bytes_is_no_recipe(tmp_path):
    for text in ("output: é".encode("latin-1"), "output: x".encode("utf-16")):
        (tmp_path / "my.yaml").write_bytes(text)
        with pytest.raises(RecipeError, match=r"my\.yaml: not text in UTF-8"):
            load_recipe(tmp_path / "my.yaml")


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_change_of_a_recipe_is_taken_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    text = bytearray(CONFIGS[0].read_bytes())
    pieces = st.binary(max_size=4) | st.sampled_from(
        [b"!!float ", b"&a ", b"*a", b"<<: ", b"? ", b"- ", b"[", b"}", b"9" * 999, b".inf", b"2024-13-45", b"\x1b", b"|\n"]
    )  # fmt: skip
    for place, piece in data.draw(st.lists(st.tuples(st.integers(0, len(text)), pieces), max_size=4)):
        text[place:place] = piece
    path.write_bytes(text)
    with contextlib.suppress(RecipeError):
        load_recipe(path)


def test_numbers_beyond_all_reason_are_refused():
    for value in (10**5000, 2**60, "0x" + "f" * 2000):
        with pytest.raises(RecipeError, match="expected a whole number of at least 1"):
            load_recipe({**LEAST, "train": {"max_steps": value}})


def test_of_very_many_problems_the_first_are_shown():
    with pytest.raises(RecipeError) as caught:
        load_recipe({f"key{n}": n for n in range(5000)})
    assert str(caught.value).startswith("recipe: 5003 problems")
    assert str(caught.value).endswith("and 4,983 more")


def test_an_empty_file_lacks_what_every_recipe_needs(tmp_path):
    lines = problems(written(tmp_path, "# nothing yet\n"))
    assert [line.split(":")[0] for line in lines] == ["model.path", "data.train", "output"]


def test_a_path_that_is_no_text_file(tmp_path):
    binary = tmp_path / "adapter.safetensors"
    binary.write_bytes(b"\xff\xfe\x00")
    for path, told in (
        (tmp_path / "none.yaml", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (binary, "not text in UTF-8"),
    ):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert str(caught.value) == f"{path}: {told}; give the path of a recipe, a YAML file"


def test_keys_given_twice_are_refused_at_any_depth(tmp_path):
    text = "output: a\nmodel: {path: demo}\ndata: {train: demo}\nlora: {rank: 1, rank: 1}\noutput: a\n"
    lines = problems(written(tmp_path, text))
    assert sorted(lines) == [
        "line 4: rank given again (first on line 4); keep one",
        "line 5: output given again (first on line 1); keep one",
    ]


def test_an_override_that_is_no_yaml():
    assert problem("data.train=[a") == (
        "override 'data.train=[a': line 1: not valid YAML: expected ',' or ']', but got '<stream end>'; quote the value"
    )


# --- writing, copying, comparing ---


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_saved_recipe_reads_back_equal_resolved_or_not(tmp_path, path):
    recipe = load_recipe(path, ["train.learning_rate=8e-6", "train.save_every=30", "train.adam_epsilon=1e-7"])
    if recipe.objective.name == "orpo":
        recipe = recipe.replace("objective.lambda", "1e-7")
    recipe = recipe.replace("output", "läuft/λ")
    for each in (recipe, resolve(recipe, device_type="cpu", installed=lambda module: True)):
        each.save(tmp_path / "recipe.yaml")
        assert "output: läuft/λ\n" in (tmp_path / "recipe.yaml").read_text(encoding="utf-8")
        again = load_recipe(tmp_path / "recipe.yaml")
        assert again == each
        assert again.to_yaml() == each.to_yaml()


def test_replace_gives_a_checked_copy():
    recipe = load_recipe(LEAST)
    changed = recipe.replace("model.attention", "varlen")
    assert (changed.model.attention, recipe.model.attention) == ("varlen", "auto")
    assert changed.replace("model.attention", "auto") == recipe
    with pytest.raises(RecipeError, match=r"model\.attention: got 'fast'; expected auto, flash, varlen, "):
        recipe.replace("model.attention", "fast")
    with pytest.raises(RecipeError, match=r"did you mean model\.attention\?"):
        recipe.replace("model.atention", "sdpa")


def test_differences_name_key_and_both_values():
    saved = load_recipe(
        LEAST, ["train.learning_rate=1e-4", "train.log_every=7", "memory.microbatch_tokens=64"]
    )
    now = load_recipe(LEAST, ["train.learning_rate=2e-4", "objective.lambda=1", "data.train=[a, b]"])
    assert saved.differences(now, ignoring=["train.log_every", "memory"]) == [
        "data.train: ['demo'] in the saved run, ['a', 'b'] now",
        "objective.lambda: 0.1 in the saved run, 1.0 now",
        "train.learning_rate: 0.0001 in the saved run, 0.0002 now",
    ]
    assert len(saved.differences(now)) == 5
    assert saved.differences(saved) == []


def test_differences_of_two_objectives_name_the_keys_that_only_one_has():
    saved, now = load_recipe(LEAST), load_recipe(LEAST, ["objective={name: simpo, beta: 10}"])
    assert saved.differences(now) == [
        "objective.name: 'orpo' in the saved run, 'simpo' now",
        "objective.lambda: 0.1 in the saved run, absent now",
        "objective.nll_tokens: 'response' in the saved run, absent now",
        "objective.nll_average: 'sequence' in the saved run, absent now",
        "objective.beta: absent in the saved run, 10.0 now",
        "objective.gamma_beta_ratio: absent in the saved run, 0.8 now",
    ]


# --- objectives ---


def test_an_objective_has_its_own_keys_and_defaults(tmp_path):
    defaults = {
        name: load_recipe(LEAST, [f"objective.name={name}"]).to_dict()["objective"] for name in OBJECTIVES
    }
    nll = {"nll_tokens": "response", "nll_average": "sequence"}
    assert defaults == {
        "orpo": {"name": "orpo", "lambda": 0.1, **nll},
        "sft": {"name": "sft", **nll},
        "probability_ratio": {"name": "probability_ratio", "lambda": 0.1, "beta": 1.0, **nll},
        "cpo": {"name": "cpo", "beta": 0.1, "alpha": 1.0, **nll},
        "simpo": {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.8},
        "asft": {"name": "asft", "lambda": 0.1, **nll},
        "dpo": {"name": "dpo", "beta": 0.1},
        "ipo": {"name": "ipo", "beta": 0.1},
        "sppo": {"name": "sppo", "beta": 0.001},
        "mmpo": {"name": "mmpo", "beta": 0.01, "gamma": 2.2},
        "kto": {"name": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0},
    }
    for name in OBJECTIVES:
        recipe = load_recipe(LEAST, [f"objective.name={name}"])
        recipe.save(tmp_path / "recipe.yaml")
        assert load_recipe(tmp_path / "recipe.yaml") == recipe


def test_a_key_of_another_objective_is_refused_by_naming_those_that_have_it():
    assert (
        problem("objective.beta=2")
        == "objective.beta: belongs to probability_ratio, cpo, simpo, dpo, ipo, sppo, mmpo, kto; objective.name is orpo; leave it out"
    )
    raw = {**LEAST, "objective": {"name": "simpo", "lambda": 0.1, "nll_tokens": "all", "beta": -1}}
    assert problems(raw) == [
        "objective.beta: got -1; expected a number above 0",
        "objective.lambda: belongs to orpo, probability_ratio, asft; objective.name is simpo; leave it out",
        "objective.nll_tokens: belongs to orpo, sft, probability_ratio, cpo, asft; objective.name is simpo; leave it out",
    ]


def test_every_key_has_a_description_of_one_line():
    whole = load_recipe(LEAST).to_dict()
    sections = {name: keys for name, keys in whole.items() if isinstance(keys, dict)}
    sections["objective"] = {key for keys in OBJECTIVES.values() for key in keys.names()}
    sections["train"] = {*sections["train"], "groups_per_step"}  # saved by its other name
    assert set(FIELDS) == {*whole, *(f"{name}.{key}" for name, keys in sections.items() for key in keys)}
    for key, field in FIELDS.items():
        assert field.description, key
        assert field.description.endswith("."), key
        assert "\n" not in field.description, key


# --- what auto stands for ---


@pytest.mark.parametrize("device_type", ["cuda", "cpu", "mps"])
def test_resolve_replaces_every_auto_but_what_is_settled_as_the_model_loads(device_type):
    recipe = load_recipe(LEAST)
    resolved = resolve(recipe, device_type=device_type, installed=lambda module: True)
    assert {line.partition(" in ")[0] + line.partition(",")[2] for line in recipe.differences(resolved)} == {
        "model.quantization: 'auto' 'nf4' now",
        "memory.sharding: 'auto' 'none' now",
        "train.learning_rate: 'auto' 0.0001 now",
        "train.epochs: 'auto' 1.0 now",
        "train.optimizer: 'auto' 'paged_adamw_8bit' now",
        "train.report_to: 'auto' ['tensorboard'] now",
        *([] if device_type == "cuda" else ["model.liger: 'auto' false now"]),
    }
    later = ["model.attention", *(["model.liger"] if device_type == "cuda" else [])]
    later += [f"memory.{key}" for key in MemoryRecipe.model_fields if key != "sharding"]
    assert [key for key in FIELDS if value(key, resolved) == "auto"] == later
    assert resolve(resolved, device_type=device_type, installed=lambda module: True) == resolved


def test_offload_needs_a_cuda_device():
    recipe = load_recipe(LEAST, ["memory.activation_offload=true"])
    assert resolve(recipe, device_type="cuda").memory.activation_offload is True
    with pytest.raises(
        RecipeError, match=r"memory\.activation_offload: true needs a CUDA device, and this is cpu"
    ):
        resolve(recipe, device_type="cpu")


@pytest.mark.parametrize(
    ("device_type", "missing", "reason"),
    [
        ("cpu", None, "a CUDA device, and this is cpu"),
        ("cuda", "liger_kernel", r"liger-kernel, which is not installed \(pip install liger-kernel\)"),
        ("cuda", "triton", r"Triton, which is not installed \(pip install triton\)"),
    ],
)
def test_ligers_modules_need_cuda_and_two_packages(device_type, missing, reason):
    def resolved(liger):
        recipe = load_recipe(LEAST, [f"model.liger={liger}"])
        return resolve(
            recipe, device_type=device_type, installed=lambda module: module != missing
        ).model.liger

    assert resolved("auto") is False
    assert resolved("false") is False
    with pytest.raises(RecipeError, match=rf"model\.liger: true needs {reason}; set it to auto"):
        resolved("true")


def test_resolve_keeps_what_was_said():
    said = {
        "model.quantization": "none",
        "model.liger": False,
        "train.learning_rate": 3e-3,
        "train.epochs": 2.5,
        "train.optimizer": "adamw_torch",
        "train.report_to": [],
        "memory.microbatch_tokens": 7,
        "memory.logprob_chunk_tokens": 8,
        "memory.activation_checkpointing": False,
        "memory.sharding": "none",
    }
    recipe = load_recipe(LEAST)
    for key, each in said.items():
        recipe = recipe.replace(key, each)
    assert resolve(recipe, device_type="cuda", installed=lambda module: False) == recipe


def test_the_descriptions_say_what_auto_becomes():
    resolved = resolve(load_recipe(LEAST), device_type="cuda", installed=lambda module: True)
    for key in FIELDS:
        became = value(key, resolved)
        if value(key, load_recipe(LEAST)) != "auto" or became == "auto":
            continue
        text = {1e-4: "1e-4", 1.0: "1"}.get(became) if not isinstance(became, list) else became[0]
        assert f"auto: {text or became}" in FIELDS[key].description


def test_auto_reports_to_tensorboard_only_where_it_is_installed():
    recipe = load_recipe(LEAST)
    assert (
        resolve(recipe, device_type="cpu", installed=lambda module: module != "tensorboard").train.report_to
        == ()
    )


def test_resolve_names_every_missing_package_and_its_remedy():
    recipe = load_recipe(LEAST, ["train.report_to=[wandb, mlflow]"])
    with pytest.raises(RecipeError) as caught:
        resolve(recipe, device_type="cuda", installed=lambda module: False)
    assert str(caught.value).split("\n  ") == [
        "recipe: 4 problems",
        "train.report_to: wandb is not installed; pip install 'qorpo[tracking]', or leave it out",
        "train.report_to: mlflow is not installed; pip install mlflow, or leave it out",
        "model.quantization: nf4 needs bitsandbytes, which is not installed; "
        "pip install bitsandbytes, or set model.quantization: none",
        "train.optimizer: paged_adamw_8bit needs bitsandbytes, which is not installed; "
        "pip install bitsandbytes, or set train.optimizer: adamw_torch",
    ]


def test_a_folder_with_a_packages_name_is_not_the_package(tmp_path, monkeypatch):
    (tmp_path / "dvclive").mkdir()  # as trackers leave behind, found as a namespace package
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RecipeError, match="dvclive is not installed"):
        resolve(load_recipe(LEAST, ["train.report_to=dvclive"]), device_type="cpu")


def test_by_default_what_is_installed_is_looked_up(tmp_path, monkeypatch):
    for module in ("dvclive", "bitsandbytes"):
        (tmp_path / f"{module}.py").write_text("raise RuntimeError('looked up, never imported')")
    monkeypatch.syspath_prepend(tmp_path)
    for module in ("dvclive", "bitsandbytes"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    recipe = load_recipe(LEAST, ["train.report_to=dvclive"])
    assert resolve(recipe, device_type="cpu").train.report_to == ("dvclive",)


# --- the import ---


def test_importing_the_recipe_takes_no_torch_and_little_time():
    code = "import qorpo.recipe, sys; print(*{name.partition('.')[0] for name in sys.modules})"
    times = []
    for _ in range(3):
        start = time.perf_counter()
        loaded = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
        times.append(time.perf_counter() - start)
    assert not {"torch", "transformers", "accelerate", "peft", "bitsandbytes", "numpy"} & set(loaded.split())
    assert min(times) < 1.0, "a second before anything answers is felt"


def test_a_source_may_say_more_than_its_path(tmp_path):
    given = {"path": "org/pairs", "config": "clean", "weight": 0.5, "columns": {"prompt": "query"}}
    recipe = load_recipe({**LEAST, "data": {"train": ["a.jsonl", given], "eval": given}})
    assert recipe.data.train[0] == "a.jsonl"
    assert (recipe.data.train[1].config, recipe.data.train[1].weight) == ("clean", 0.5)
    assert recipe.data.eval[0].columns == {"prompt": "query"}
    recipe.save(tmp_path / "r.yaml")
    assert load_recipe(tmp_path / "r.yaml") == recipe
    assert problems({**LEAST, "data": {"train": [{"path": "a", "wieght": 1}]}})[0].startswith(
        "data.train: got"
    )
    assert problems({**LEAST, "data": {"train": [{"path": "a", "weight": 0}]}})[0].startswith(
        "data.train: got"
    )


def test_the_recipe_names_what_the_data_rooms_know():
    assert get_args(values.Shape) == tuple(shape.name for shape in SHAPES)
    assert get_args(values.RankedPairs) == get_args(RankedPairs)
    assert {field.name for field in dataclasses.fields(Source)} == set(SourceRecipe.model_fields)
    limits = get_type_hints(Limits)
    assert get_args(values.LongPrompts) == get_args(limits["long_prompts"])
    assert get_args(values.LongResponses) == get_args(limits["long_responses"])


def test_full_tuning_has_autos_of_its_own():
    settings = dict(resolve(load_recipe(LEAST, ["tuning=full"]), device_type="cuda").values())
    assert settings["model.quantization"] == "none"
    assert settings["train.learning_rate"] == 8e-6
    assert settings["train.optimizer"] == "adamw_torch_fused"
    assert settings["memory.sharding"] == "full"


@pytest.mark.parametrize(
    ("objective", "rate", "epochs"),
    [("orpo", 8e-6, 10), ("sft", 1e-5, 1), ("dpo", 5e-6, 3), ("kto", 5e-6, 3), ("cpo", 8e-6, 10)],
)
def test_full_tuning_takes_the_papers_rates_and_epochs(objective, rate, epochs):
    recipe = load_recipe(LEAST, ["tuning=full", f"objective.name={objective}"])
    train = resolve(recipe, device_type="cuda").train
    assert (train.learning_rate, train.epochs) == (rate, epochs)


def test_dora_needs_whole_weights_on_each_gpu():
    recipe = load_recipe(LEAST, ["lora.use_dora=true", "memory.sharding=full"])
    with pytest.raises(RecipeError, match=r"lora\.use_dora: needs the base's whole weights"):
        resolve(recipe, device_type="cuda")


def test_groups_per_step_is_pairs_per_step_by_its_general_name():
    recipe = load_recipe({**LEAST, "train": {"groups_per_step": 8}})
    assert recipe.train.pairs_per_step == 8
    assert recipe.to_dict()["train"]["pairs_per_step"] == 8
    assert "groups_per_step" not in recipe.to_dict()["train"]
    assert load_recipe(LEAST).train.pairs_per_step == 32
    assert recipe.replace("train.groups_per_step", 3).train.pairs_per_step == 3
    assert load_recipe(recipe.to_dict(), ["train.groups_per_step=5"]).train.pairs_per_step == 5
    assert load_recipe({**LEAST, "train": {"groups_per_step": 8, "pairs_per_step": 8}}) == recipe
    assert problems({**LEAST, "train": {"groups_per_step": 8, "pairs_per_step": 9}}) == [
        "train: pairs_per_step (9) and groups_per_step (8) are one key by two names; leave one out"
    ]


def test_sharded_adapters_keep_their_base_in_4_bits_and_take_torchs_optimizer():
    settings = dict(resolve(load_recipe(LEAST, ["memory.sharding=hybrid"]), device_type="cuda").values())
    assert settings["model.quantization"] == "nf4"
    assert settings["train.optimizer"] == "adamw_torch_fused"


def test_full_tuning_cannot_have_4_bits():
    with pytest.raises(RecipeError, match="nf4 weights can't be trained; leave out --full"):
        resolve(load_recipe(LEAST, ["tuning=full", "model.quantization=nf4"]), device_type="cuda")


PAPERS = [
    path
    for path in CONFIGS
    if path.name.startswith(
        ("opt-", "phi-2", "llama-2", "mistral-7b-alpha", "mistral-7b-sft", "mistral-7b-dpo")
    )
]
BASELINES = [path for path in PAPERS if path.stem.endswith("-dpo")]


def test_every_model_of_the_paper_has_its_baselines():
    assert len(PAPERS) == 9 + 1 + 2 * 9  # nine by ORPO, of which α also for A100s; nine by SFT and by DPO
    assert len(BASELINES) == 9


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.name)
def test_a_recipe_of_the_papers_models_trains_all_parameters_as_the_paper_did(path):
    name = path.stem[-3:] if path.stem.endswith(("-sft", "-dpo")) else "orpo"
    rate, epochs = {"orpo": (8e-6, 10), "sft": (1e-5, 1), "dpo": (5e-6, 3)}[name]
    full = resolve(load_recipe(path, ["tuning=full"]), device_type="cuda", installed=lambda module: True)
    assert full.objective.name == name
    assert (full.train.learning_rate, full.train.epochs) == (rate, epochs)
    assert full.model.quantization == "none"
    lora = resolve(load_recipe(path), device_type="cuda", installed=lambda module: True)
    assert (lora.train.learning_rate, lora.train.epochs) == (1e-4, 1)


@pytest.mark.parametrize("path", BASELINES, ids=lambda path: path.name)
def test_baselines_have_the_model_and_data_of_orpos_recipe_and_dpo_goes_on_from_sft(path):
    stem = path.stem.removesuffix("-dpo")
    dpo, sft = load_recipe(path), load_recipe(path.with_name(f"{stem}-sft.yaml"))
    orpo = load_recipe(path.with_name({"mistral-7b": "mistral-7b-alpha"}.get(stem, stem) + ".yaml"))
    assert dpo.model == sft.model == orpo.model
    assert dpo.data == sft.data == orpo.data
    assert dpo.objective.beta == 0.1
    assert dpo.output != sft.output
    head = path.read_text(encoding="utf-8").split("\nmodel:")[0]
    assert f"configs/{stem}-sft.yaml\n" in head
    assert f"configs/{path.name} model.adapter={sft.output}\n" in head
    assert f"configs/{stem}-sft.yaml --full output={sft.output}-full\n" in head
    assert f"configs/{path.name} --full model.path={sft.output}-full/model " in head


# --- what a tracker needs ---


@pytest.fixture
def no_wandb_key(monkeypatch, tmp_path):
    """A home without a key; its folder."""
    for name in (
        "WANDB_API_KEY",
        "WANDB_IDENTITY_TOKEN_FILE",
        "WANDB_MODE",
        "WANDB_BASE_URL",
        "WANDB_DIR",
        "NETRC",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resolve_with_wandb():
    recipe = load_recipe(LEAST, ["train.report_to=wandb"])
    return resolve(recipe, device_type="cpu", installed=lambda module: True)


def test_wandb_without_a_key_is_found_before_anything_is_loaded(no_wandb_key):
    with pytest.raises(RecipeError, match=r"train\.report_to: wandb has no key.*WANDB_MODE=offline"):
        resolve_with_wandb()
    (no_wandb_key / ".netrc").write_text("machine example.org login user password secret\n")
    with pytest.raises(RecipeError, match="wandb has no key"):
        resolve_with_wandb()


@pytest.mark.skipif(sys.platform == "win32", reason="the home is told in another way there")
@pytest.mark.parametrize(
    "way", ["WANDB_API_KEY=k", "WANDB_MODE=offline", ".netrc", "wandb/settings", "config/settings"]
)
def test_wandb_with_a_key_or_offline_is_fine(no_wandb_key, monkeypatch, way):
    if "=" in way:
        monkeypatch.setenv(*way.split("="))
    else:
        file = no_wandb_key / way
        file.parent.mkdir(exist_ok=True)
        file.write_text(
            "machine api.wandb.ai login user password secret\n"
            if way == ".netrc"
            else "[default]\nmode = offline\n"
        )
    assert resolve_with_wandb().train.report_to == ("wandb",)


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.report_to=tensorboard", "train.report_to", ["tensorboard"]),
        ("train.report_to=tensorboard,mlflow", "train.report_to", ["tensorboard", "mlflow"]),
        ("train.report_to=none", "train.report_to", []),
        ("lora.modules_to_save=lm_head", "lora.modules_to_save", ["lm_head"]),
        ("lora.targets=q_proj, v_proj", "lora.targets", ["q_proj", "v_proj"]),
        ("data.train=a.jsonl", "data.train", ["a.jsonl"]),
    ],
)
def test_a_string_where_a_list_belongs_is_understood(override, key, value):
    assert dict(load_recipe(LEAST, [override]).values())[key] == value


@pytest.mark.parametrize("name", ["pairs_per_step", "groups_per_step"])
def test_a_step_of_no_pairs_is_refused_by_either_name(name):
    recipe = {"model": {"path": "demo"}, "data": {"train": "demo"}, "output": "x", "train": {name: 0}}
    with pytest.raises(RecipeError, match=rf"train\.{name}: got 0"):
        load_recipe(recipe)
