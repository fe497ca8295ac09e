"""A checkpoint is read as it was written, by the run that wrote it, or not at all; nothing in it is code that runs."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers.tiny import changed, read_metrics, short_recipe

import qorpo.training.run as run
from qorpo import train
from qorpo.errors import DamageError, QorpoError, RunError
from qorpo.identity import base_identity, differences
from qorpo.manifest import MANIFEST, check_folder, read_manifest, write_manifest
from qorpo.training.checkpoint import check_checkpoint, read_state
from qorpo.training.export import export_model
from qorpo.training.sharded import read_parameters


@pytest.fixture(scope="module")
def finished(base, pairs_file, tmp_path_factory):
    """A run of adapters, and one of all parameters, each of four steps with a checkpoint every two."""
    folder = tmp_path_factory.mktemp("runs")
    for tuning in ("lora", "full"):
        train(recipe_of(tuning, base, pairs_file, folder / tuning))
    return folder


def recipe_of(tuning, base, pairs_file, output, **changes):
    recipe = short_recipe(base, pairs_file, output)
    settings = {"data__eval": 0.2, "train__max_steps": 4, "train__optimizer": "adamw_torch", "tuning": tuning}
    return changed(recipe, model__quantization="none", **settings | changes)


@pytest.fixture(params=["lora", "full"])
def stopped(request, finished, base, pairs_file, tmp_path):
    """(folder, recipe) of a run whose end is not there yet."""
    folder = tmp_path / "run"
    shutil.copytree(finished / request.param, folder)
    shutil.rmtree(folder / ("adapter" if request.param == "lora" else "model"))
    return folder, recipe_of(request.param, base, pairs_file, folder)


@pytest.fixture
def no_model(monkeypatch):
    """Whatever is refused is refused before a model is loaded."""

    def load_model(*_, **__):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(run, "load_model", load_model)


def flip(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 4
    path.write_bytes(content)


def reseal(folder):
    """What who can write files can do: a manifest that fits what the folder holds now."""
    write_manifest(folder, read_manifest(folder, "").belongs_to)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


# --- damage ---


def test_every_folder_of_a_run_has_a_manifest_of_all_its_files(finished):
    for tuning, result in (("lora", "adapter"), ("full", "model")):
        folders = [finished / tuning / result, *(finished / tuning / "checkpoints").iterdir()]
        assert len(folders) == 3
        for folder in folders:
            manifest = check_folder(folder, "")
            assert sorted(manifest.files) == [
                path.relative_to(folder).as_posix() for path in files(folder) if path.name != MANIFEST
            ]
            assert set(manifest.belongs_to) == {"recipe", "base", "tokenizer", "template", "data"}
            assert "model.safetensors" in manifest.belongs_to["base"]["files"]


def test_a_flipped_bit_in_any_file_of_a_checkpoint_is_named(stopped, no_model):
    folder, recipe = stopped
    for path in files(folder / "checkpoints" / "step-4"):
        good = path.read_bytes()
        flip(path)
        with pytest.raises(
            DamageError, match=rf"{path.name}: is damaged .*; remove .*step-4 to go on from the check"
        ):
            train(recipe, resume=True)
        path.write_bytes(good)
        path.unlink()
        with pytest.raises(DamageError, match=f"{path.name}.*(is missing|which qorpo writes)"):
            train(recipe, resume=True)
        path.write_bytes(good)
    with pytest.raises(AssertionError, match="a model was loaded"):
        train(recipe, resume=True)


def test_the_checkpoint_before_a_damaged_one_goes_on(stopped):
    folder, recipe = stopped
    shutil.rmtree(folder / "checkpoints" / "step-4")
    result = train(recipe, resume=True)
    assert result.steps == 4
    assert [row["step"] for row in read_metrics(folder) if "loss" in row] == [1, 2, 3, 4]


def test_a_best_checkpoint_that_is_damaged_during_the_run_is_one_message(
    finished, base, pairs_file, tmp_path, monkeypatch
):
    from qorpo import Trainer

    def best_at_2(trainer):
        if trainer.state.step == 4:
            flip(tmp_path / "run" / "checkpoints" / "step-2" / "adapter_model.safetensors")
        return {
            "eval_loss": 1.0 + (trainer.state.step != 2),
            "eval_rewards/accuracies": 0.5,
            "eval_rewards/margins": 0.1,
        }

    monkeypatch.setattr(Trainer, "evaluate", best_at_2)
    recipe = recipe_of("lora", base, pairs_file, tmp_path / "run")
    with pytest.raises(DamageError, match=r"step-2/adapter_model.safetensors: is damaged"):
        train(recipe)
    # Without it the best of what is left is taken.
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-2")
    assert train(recipe, resume=True).best_step is None
    assert (tmp_path / "run" / "adapter").is_dir()


@pytest.mark.parametrize(
    "content",
    [
        "{}", '{"step": 99}', "[]", "null", "{", "[" * 100_000,
        '{"step": 99, "best_step": null, "best_headline": null}', '{"step": -2, "best_step": null, "best_headline": null}',
        '{"step": "2", "best_step": null, "best_headline": null}', '{"step": true, "best_step": null, "best_headline": null}',
        '{"step": 2, "best_step": 2, "best_headline": null}', '{"step": 2, "best_step": null, "best_headline": 0.5}',
        '{"step": 2, "best_step": 3, "best_headline": 0.5}', '{"step": 2, "best_step": 2, "best_headline": NaN}',
        '{"step": 2, "best_step": 2, "best_headline": "low"}', '{"step": 2, "best_step": null, "best_headline": null, "x": 1}',
    ],
)  # fmt: skip
def test_a_state_that_qorpo_would_not_write_is_refused(tmp_path, content):
    folder = tmp_path / "step-2"
    folder.mkdir()
    (folder / "state.json").write_text(content)
    with pytest.raises(DamageError, match=r"state.json: is damaged .*; remove .*step-2 to go on"):
        read_state(folder)


def test_a_state_that_qorpo_writes_is_read(finished):
    assert read_state(finished / "lora" / "checkpoints" / "step-2").step == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads the names of open files from /proc")
def test_metrics_are_on_disk_before_a_checkpoint_counts_on_them(
    finished, base, pairs_file, tmp_path, monkeypatch
):
    events = []
    for name in ("fsync", "rename"):
        call = getattr(os, name)

        def noted(what, *rest, name=name, call=call):
            path = os.readlink(f"/proc/self/fd/{what}") if name == "fsync" else os.fspath(what)
            events.append(f"{name} {Path(path).name}")
            return call(what, *rest)

        monkeypatch.setattr(os, name, noted)
    train(recipe_of("lora", base, pairs_file, tmp_path / "run", train__max_steps=2, data__eval=None))
    named = events.index("rename .step-2.qorpo-unfinished")
    for earlier in ("recipe.yaml", "data.json", "environment.json"):
        assert f"fsync .{earlier}.qorpo-unfinished" in events[:named]
    assert events[:named].count("fsync metrics.jsonl") == 1
    assert {"fsync run", "fsync step-2", "fsync .step-2.qorpo-unfinished"} & set(events[:named])


@pytest.mark.parametrize("content", [b"", b'{"train": ', b"\xff\xfe", b"[]", b'{"train": 1}'], ids=range(5))
def test_torn_data_json_is_made_again_where_the_checkpoint_knows_the_files(stopped, caplog, content):
    folder, recipe = stopped
    shutil.rmtree(folder / "checkpoints" / "step-4")
    good = json.loads((folder / "data.json").read_text())
    (folder / "data.json").write_bytes(content)
    (folder / "environment.json").write_bytes(content)
    train(recipe, resume=True)
    assert ("data.json: can't be read" in caplog.text) is (content != b'{"train": 1}')
    assert json.loads((folder / "data.json").read_text()) == good


# --- what a checkpoint belongs to ---


def test_a_changed_base_is_refused_before_it_is_loaded(stopped, base, tmp_path, no_model):
    folder, recipe = stopped
    other = Path(shutil.copytree(base, tmp_path / "base"))
    flip(other / "model.safetensors", -1)
    for saved in (folder / "recipe.yaml",):
        saved.write_text(saved.read_text().replace(str(base), str(other)))
    with pytest.raises(
        RunError, match=r"(?s)step-4: was made with something else; .*the base's model.safetensors"
    ):
        train(changed(recipe, model__path=str(other)), resume=True)


def test_the_same_base_elsewhere_is_the_same(stopped, base, tmp_path, no_model):
    folder, recipe = stopped
    other = shutil.copytree(base, tmp_path / "base")
    saved = folder / "recipe.yaml"
    saved.write_text(saved.read_text().replace(str(base), str(other)))
    with pytest.raises(AssertionError, match="a model was loaded"):
        train(changed(recipe, model__path=str(other)), resume=True)


@pytest.mark.parametrize("what", ["template", "tokenizer"])
def test_a_changed_tokenizer_or_template_is_refused(stopped, base, tmp_path, no_model, what):
    folder, recipe = stopped
    other = Path(shutil.copytree(base, tmp_path / "base"))
    if what == "template":
        path = other / "chat_template.jinja"
        path.write_text(path.read_text().replace("<|start|>", "<|start|>\n"))
    else:
        path = other / "tokenizer.json"
        path.write_text(path.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    saved = folder / "recipe.yaml"
    saved.write_text(saved.read_text().replace(str(base), str(other)))
    with pytest.raises(RunError, match=rf"(?s)step-4: was made with something else; .*the .*{what}"):
        train(changed(recipe, model__path=str(other)), resume=True)


def test_a_checkpoint_of_another_seed_at_the_same_path_is_refused(stopped, base, pairs_file, no_model):
    folder, recipe = stopped
    saved = folder / "recipe.yaml"
    saved.write_text(saved.read_text().replace("seed: 42", "seed: 43"))
    with pytest.raises(
        RunError, match=r"(?s)was made with something else.*train.seed: it was made with 42, and the rec"
    ):
        train(changed(recipe, train__seed=43), resume=True)


def test_what_both_do_not_know_is_not_compared(base):
    known = base_identity(base)
    assert differences({}, {"base": known, "recipe": {"a": 1}}) == []
    assert differences({"base": None}, {"base": known}) == []
    assert differences({"recipe": {"a": 1}}, {"recipe": {"b": 1}}) == []
    assert base_identity("a/model-that-is-nowhere") is None


# --- no code ---


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Attribute:
    """Whatever a class has, by the one function that members of enumerations are pickled with before Python 3.11.4."""

    def __reduce__(self):
        return getattr, (Path, "home")


def poisoned(folder, kind, trace):
    """A sharded checkpoint with a payload that makes the folder `trace`, and a manifest that fits."""
    shards = folder / "shards"
    metadata = pickle.loads((shards / ".metadata").read_bytes())
    if kind == "metadata":
        metadata.planner_data = Payload(str(trace))
    elif kind == "attribute":
        metadata.planner_data = Attribute()
    elif kind == "outside":
        for info in metadata.storage_data.values():
            info.relative_path = f"../../{info.relative_path}"
    else:
        index = next(each for each in metadata.storage_data if each.fqn.endswith("param_groups.0.lr"))
        torch.save(Payload(str(trace)), shards / "__9_0.distcp")
        info = metadata.storage_data[index]
        info.relative_path, info.offset, info.length = (
            "__9_0.distcp",
            0,
            (shards / "__9_0.distcp").stat().st_size,
        )
    (shards / ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(folder)


@pytest.mark.parametrize("kind", ["metadata", "attribute", "entry", "outside"])
def test_no_payload_in_shards_runs_on_resume(finished, base, pairs_file, tmp_path, command, kind):
    folder = Path(shutil.copytree(finished / "full", tmp_path / "run"))
    poisoned(folder / "checkpoints" / "step-4", kind, tmp_path / "ran")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(recipe_of("full", base, pairs_file, folder)))
    code, out, err = command("train", recipe, "--resume")
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    assert "shards" in err
    assert ("it names '../../" if kind == "outside" else "nothing of it was run") in err
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["metadata", "outside"])  # export reads parameters alone
def test_no_payload_in_shards_runs_on_export(finished, tmp_path, command, kind):
    folder = Path(shutil.copytree(finished / "full", tmp_path / "run"))
    poisoned(folder / "checkpoints" / "step-4", kind, tmp_path / "ran")
    code, out, err = command("export", folder / "checkpoints" / "step-4", "--output", tmp_path / "model")
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    assert "is no checkpoint's" in err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"\x80\x04.", pickle.dumps(Path("x")), pickle.dumps({})]
)
def test_metadata_of_any_content_is_one_error(finished, tmp_path, content):
    folder = Path(shutil.copytree(finished / "full" / "checkpoints" / "step-4", tmp_path / "step-4"))
    (folder / "shards" / ".metadata").write_bytes(content)
    with pytest.raises(DamageError, match=r".metadata: is no checkpoint's"):
        read_parameters(folder, torch.float32)


# --- export ---


def test_an_export_holds_what_was_trained_and_belongs_to_its_run(finished, tmp_path):
    from safetensors.torch import load_file

    folder = finished / "full"
    output = export_model(folder, tmp_path / "model")
    trained = load_file(folder / "model" / "model.safetensors")
    exported = load_file(output / "model.safetensors")
    assert all(torch.equal(tensor, exported[name]) for name, tensor in trained.items())
    assert check_folder(output, "").belongs_to == check_folder(folder / "model", "").belongs_to


def test_an_export_is_refused_for_damage_and_for_a_changed_template(finished, base, tmp_path):
    folder = Path(shutil.copytree(finished / "full", tmp_path / "run"))
    shards = folder / "checkpoints" / "step-4" / "shards" / "__0_0.distcp"
    good = shards.read_bytes()
    flip(shards)
    with pytest.raises(DamageError, match=r"__0_0.distcp: is damaged"):
        export_model(folder / "checkpoints" / "step-4", tmp_path / "model")
    shards.write_bytes(good)
    other = Path(shutil.copytree(base, tmp_path / "base"))
    saved = folder / "recipe.yaml"
    saved.write_text(saved.read_text().replace(str(base), str(other)))
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|start|>", "<|start|>\n"))
    with pytest.raises(QorpoError, match="the chat template or its stop token"):
        export_model(folder, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_an_export_trusts_a_models_code_only_where_it_is_said_again(finished, tmp_path, command):
    folder = Path(shutil.copytree(finished / "full", tmp_path / "run"))
    saved = folder / "recipe.yaml"
    saved.write_text(saved.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    code, _, err = command("export", folder, "--output", tmp_path / "model")
    assert code == 2
    assert "give --trust-remote-code if you trust that code" in err
    code, _, err = command("export", folder, "--output", tmp_path / "model", "--trust-remote-code")
    assert code == 0, err


def test_an_export_says_where_the_model_is_and_nothing_else(finished, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "qorpo", "export", finished / "full", "--output", tmp_path / "model"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == (f"model: {tmp_path / 'model'}\n", "")


def test_what_a_killed_export_left_is_swept_by_the_next(finished, tmp_path):
    left = tmp_path / ".model.qorpo-unfinished"
    left.mkdir()
    (left / "model.safetensors").touch()
    export_model(finished / "full", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# --- the same bytes ---


def test_an_adapters_names_are_in_order(finished):
    names = json.loads((finished / "lora" / "adapter" / "adapter_config.json").read_text())["target_modules"]
    assert len(names) == 14
    assert names == sorted(names)


@pytest.mark.slow
def test_an_adapters_files_are_the_same_whatever_the_hash_seed(base, pairs_file, tmp_path):
    recipe = recipe_of("lora", base, pairs_file, "unset", train__max_steps=1)
    script = (
        "import sys, json; from qorpo import train; train(json.loads(sys.argv[1]), [f'output={sys.argv[2]}'])"
    )
    found = []
    for seed in ("1", "2"):
        output = tmp_path / seed / "run"  # whose name the card says
        subprocess.run(
            [sys.executable, "-c", script, json.dumps(recipe), str(output)],
            env={**os.environ, "PYTHONHASHSEED": seed}, check=True, capture_output=True,
        )  # fmt: skip
        found.append({path.name: path.read_bytes() for path in files(output / "adapter")})
    assert found[0] == found[1]
    assert check_checkpoint(tmp_path / "1" / "run" / "checkpoints" / "step-1")
