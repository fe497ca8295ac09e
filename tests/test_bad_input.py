"""What a person can get wrong, through the command line: one message that names the place and the remedy, exit code 2,
no traceback, and nothing written."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.tiny import changed, preference_records, write_records

Refused = Callable[..., str]


@pytest.fixture
def refused(command, recipe_dict, tmp_path) -> Refused:
    """refused(**changes of the recipe) is the one message that `qorpo train` ends with."""

    def run(*arguments: str, **changes: Any) -> str:
        recipe = changed(recipe_dict, **changes)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
        code, out, err = command("train", path, *arguments)
        # A bar of transformers' may stand before the message.
        noise, found, message = err.rpartition("qorpo: ")
        assert found, err
        assert code == 2, err
        assert out == ""
        assert "qorpo: " not in noise
        assert "Traceback" not in err
        if recipe["output"] == str(tmp_path / "run"):
            assert not (tmp_path / "run").exists()
        return message.strip()

    return run


# --- the recipe ---


def test_no_such_recipe(command):
    code, out, err = command("train", "missing.yaml")
    assert (code, out) == (2, "")
    assert err == ("qorpo: missing.yaml: No such file or directory; give the path of a recipe, a YAML file\n")


def test_an_unknown_key_is_answered_with_the_nearest(refused):
    assert "train.learnin_rate: unknown key; did you mean train.learning_rate?" in refused(
        train__learnin_rate=1
    )


def test_a_wrong_type_is_answered_with_the_right_one(refused):
    assert "train.pairs_per_step: got 'many'; expected a whole number of at least 1" in refused(
        train__pairs_per_step="many"
    )


def test_every_problem_of_a_recipe_comes_at_once(refused):
    message = refused("train.seed=-1", train__pairs_per_step=0, lora__rnak=8)
    assert "3 problems" in message
    for key in ("train.seed", "train.pairs_per_step", "lora.rnak"):
        assert f"\n  {key}: " in message


def test_a_prompt_must_leave_room_for_an_answer(refused):
    message = refused(data__max_prompt_length=128)
    assert "max_prompt_length (128) must be less than max_length (128)" in message


# --- the data ---


def test_no_such_data_file(refused, tmp_path):
    message = refused(data__train=str(tmp_path / "absent.jsonl"))
    assert message.startswith(f"{tmp_path / 'absent.jsonl'}: no such file; expected")


def test_data_that_is_not_json_is_named_by_its_line(refused, tmp_path):
    path = write_records(tmp_path / "pairs.jsonl", preference_records())
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:4], "{broken", *lines[5:]]) + "\n")
    message = refused(data__train=str(path))
    assert message.startswith("pairs.jsonl:5: not JSON")
    assert "data.on_bad_record: skip" in message


def test_a_missing_column_is_named_with_what_is_there(refused, tmp_path):
    records = [{"prompt": "a", "chosen": "b", "worse": "c"}]
    message = refused(data__train=str(write_records(tmp_path / "pairs.jsonl", records)))
    assert message.startswith("pairs.jsonl:1: ")
    for word in ("prompt", "chosen", "rejected", "worse"):
        assert word in message


def test_zero_usable_pairs_come_with_counts(refused, tmp_path):
    records = [{"prompt": "a", "chosen": "b", "rejected": "b"}] * 3 + [
        {"prompt": "a", "chosen": "b", "rejected": " "}
    ]
    message = refused(data__train=str(write_records(tmp_path / "pairs.jsonl", records)))
    assert message.startswith("0 usable pairs")
    assert "3 same" in message
    assert "1 empty" in message


def test_pairs_that_are_all_too_long_come_with_counts_and_keys(refused):
    message = refused(data__max_prompt_length=2)
    assert "0 usable pairs left as tokens" in message
    assert "40 prompt_too_long" in message
    assert "data.max_prompt_length" in message


def test_a_chat_template_that_is_not_there(refused, tmp_path):
    path = str(tmp_path / "absent.jinja")
    assert refused(model__chat_template=path).startswith(f"model.chat_template: {path} can't be read")


# --- the model ---


def remove(*patterns: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def garble(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"this is no tensor" * 100)


def forget_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def reshape_a_tensor(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))


def unknown_kind(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove("*.safetensors"), ["no weights (*.safetensors)"]),
        (remove("tokenizer*"), ["no tokenizer"]),
        (remove("config.json"), ["no config.json"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["config.json", "JSON"]),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), ["no tokenizer could be loaded"]),
        (truncate, ["could not be loaded"]),
        (garble, ["could not be loaded"]),
        (forget_a_tensor, ["1 weights are missing, such as model.layers.1.mlp.up_proj.weight"]),
        (reshape_a_tensor, []),
        (unknown_kind, ["nonesuch"]),
    ],
    ids=[
        "no-weights",
        "no-tokenizer",
        "no-config",
        "broken-config",
        "broken-tokenizer",
        "truncated-weights",
        "garbled-weights",
        "missing-tensor",
        "other-shapes",
        "unknown-architecture",
    ],
)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_a_broken_model_folder(refused, base_copy, change, words, quantization):
    change(base_copy)
    message = refused(model__path=str(base_copy), model__quantization=quantization)
    assert str(base_copy) in message
    for word in words:
        assert word in message
    assert "\n" not in message


def test_a_folder_that_is_not_there(refused, tmp_path):
    message = refused(model__path=str(tmp_path / "absent"))
    assert message.startswith(f"model.path: there is no folder {tmp_path / 'absent'}; give a model folder")


def test_a_file_for_a_folder(refused, base):
    message = refused(model__path=str(base / "config.json"))
    assert message.startswith(f"model.path: {base / 'config.json'} is a file; give the folder")


def test_pickled_weights_need_an_opt_in(refused, base_copy, command, recipe_dict, tmp_path):
    import torch
    from safetensors.torch import load_file

    weights = load_file(base_copy / "model.safetensors")
    (base_copy / "model.safetensors").unlink()
    torch.save(weights, base_copy / "pytorch_model.bin")
    message = refused(model__path=str(base_copy))
    assert message.startswith(f"{base_copy}: weights only as .bin")
    assert "model.allow_pickle: true" in message

    code, _, err = command("train", tmp_path / "recipe.yaml", "model.allow_pickle=true", "train.max_steps=1")
    assert code == 0, err
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_a_tokenizer_of_another_model(refused, base_copy, tmp_path):
    path = base_copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    shift = 1000
    vocabulary = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        token: index + (shift if len(token) == 1 else 0) for token, index in vocabulary.items()
    }
    path.write_text(json.dumps(tokenizer))
    message = refused(model__path=str(base_copy))
    assert "embeddings; use the tokenizer that belongs to the model" in message


def test_a_base_that_is_quantized_already(refused, base_copy):
    config = json.loads((base_copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (base_copy / "config.json").write_text(json.dumps(config))
    message = refused(model__path=str(base_copy))
    assert "quantized already; give its unquantized base" in message


def test_a_hub_id_when_offline(refused, monkeypatch):
    message = refused(model__path="nobody/nothing")
    assert message.startswith("nobody/nothing: there is no such folder, and the hub can't be reached")
    assert "offline" in message


@pytest.mark.slow
def test_a_hub_that_can_not_be_reached(recipe_dict, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed(recipe_dict, model__path="nobody/nothing")))
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # a port that refuses
        "HF_HOME": str(tmp_path / "hub"),
    }
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "qorpo", "train", str(path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    # Retries alone would take 46 seconds; on a busy machine the imports may take 20.
    assert time.monotonic() - started < 40
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("qorpo: nobody/nothing: there is no such folder, and the hub can't be")
    assert done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "run").exists()


# --- the adapters ---


def test_targets_that_name_no_module(refused):
    message = refused(lora__targets=["q_proj", "qq_proj"])
    assert message.startswith("lora: this model has no module named qq_proj; it has ")
    assert "q_proj" in message


def test_a_module_to_save_that_is_not_there(refused):
    assert "no module named lm_haed" in refused(lora__modules_to_save=["lm_haed"])


def test_lora_on_the_head_is_refused_with_the_other_way(refused):
    message = refused(lora__targets=["q_proj", "lm_head"])
    assert message.startswith("lora.targets: the output head can't carry LoRA")
    assert "lora.modules_to_save" in message


def test_an_attention_that_is_not_here(refused):
    message = refused(model__attention="flash")
    assert "Set model.attention: auto instead of flash" in message


# --- the output ---


def test_an_output_that_holds_a_run(refused, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "recipe.yaml").write_text("output: other\n")
    message = refused(output=str(other))
    assert message == f"output: {other} holds a run; go on with it by --resume, or give another output"
    assert [path.name for path in other.iterdir()] == ["recipe.yaml"]


def test_an_output_that_holds_something_else(refused, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    message = refused(output=str(other))
    assert message.startswith(f"output: {other} is not empty; give another output")
    assert (other / "thesis.txt").read_text() == "mine"


def test_an_output_that_is_a_file(refused, tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    assert refused(output=str(other)) == f"output: {other} is a file; give another output"
    assert other.read_text() == "mine"


def test_an_output_inside_a_file(refused, tmp_path):
    other = tmp_path / "other"
    other.write_text("mine")
    message = refused(output=str(other / "run"))
    assert message == f"output: {other / 'run'} can't be made: {other} takes no files; give another output"


def test_an_output_that_can_not_be_written(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    said = said_of(locked / "run", locked)
    assert said == f"output: {locked / 'run'} can't be made: {locked} takes no files; give another output"
    assert list(locked.iterdir()) == []


@pytest.mark.parametrize("name", ["checkpoints", "metrics.jsonl"])
def test_a_run_that_can_not_be_written_is_told_so_before_its_model_is_loaded(tmp_path, name):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    for file in ("recipe.yaml", "metrics.jsonl"):
        (run / file).touch()
    said = said_of(run, run / name)
    assert said == f"output: {run / name} can't be written; change its permissions, or give another output"


def said_of(run, locked):
    """What the check that `train` makes first, `--resume` too, says in a process that may not write everywhere."""
    check = (
        "import sys; from qorpo.training.run_folder import RunFolder; RunFolder(sys.argv[1]).check_place()"
    )
    start = [sys.executable, "-c", check, str(run)]
    if os.geteuid() == 0:  # who may write anywhere, unless that is taken away
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("root may write anywhere, and setpriv is not here to take that away")
        start = [setpriv, "--bounding-set=-all", "--inh-caps=-all", *start]
    locked.chmod(0o555)
    try:
        done = subprocess.run(start, capture_output=True, text=True)
    finally:
        locked.chmod(0o755)
    return done.stderr.splitlines()[-1].partition("RunError: ")[2]


def test_resuming_where_there_is_no_run(refused, tmp_path):
    message = refused("--resume")
    assert message.startswith(f"output: {tmp_path / 'run'} holds no run to resume")


# --- what looks wrong and is not ---


def test_a_tokenizer_without_a_pad_token_trains(command, recipe_dict, base, tmp_path):
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(base).pad_token is None
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed(recipe_dict, train__max_steps=1)))
    code, _, err = command("train", path)
    assert code == 0, err
