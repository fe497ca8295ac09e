"""What merge reads is what was written, belongs together and lies in its folder; what it writes can be held to that."""

import json
import logging
import os
import shutil
from pathlib import Path

import pytest
from helpers.lora_folders import add_adapter, load
from helpers.tiny import changed, short_recipe

import qorpo.manifest as manifest
from qorpo import train
from qorpo.errors import DamageError, ModelError, RecipeError
from qorpo.manifest import MANIFEST, check_folder, write_manifest
from qorpo.merging.merge import merge
from qorpo.model.load import load_model, load_tokenizer


@pytest.fixture(scope="module")
def trained(base, pairs_file, tmp_path_factory):
    """A finished run with two checkpoints, on a base that is as it was."""
    folder = tmp_path_factory.mktemp("run")
    recipe = short_recipe(base, pairs_file, folder / "run")
    train(changed(recipe, train__max_steps=4, train__optimizer="adamw_torch", model__quantization="none"))
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def merged(run, tmp_path):
    return merge(run, tmp_path / "merged", verify=False).output


@pytest.fixture
def moved(run, base, tmp_path):
    """The run's recipe names this copy of its base, to be changed."""
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    edit(run / "recipe.yaml", str(base), str(copy))
    return copy


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


# --- damage ---


def test_a_flipped_bit_in_any_file_of_an_adapter_is_named(run, tmp_path):
    for path in sorted((run / "adapter").iterdir()):
        good = path.read_bytes()
        flip(path)
        if path.name == "README.md":
            continue
        with pytest.raises(
            DamageError, match=rf"adapter/{path.name}: is damaged .*; make it again .*, or remove {MANIFEST}"
        ):
            merge(run, tmp_path / "merged", verify=False)
        path.write_bytes(good)
    assert not (tmp_path / "merged").exists()


def test_an_edited_readme_is_said_and_merged(run, tmp_path, caplog):
    (run / "adapter" / "README.md").write_text("# Mine\n")
    merge(run, tmp_path / "merged", verify=False)
    assert "README.md: is not as qorpo wrote it" in caplog.text


def test_an_adapter_without_a_manifest_is_merged_and_a_checkpoint_without_one_is_not(run, tmp_path):
    (run / "adapter" / MANIFEST).unlink()
    merge(run, tmp_path / "merged", verify=False)
    checkpoint = run / "checkpoints" / "step-4"
    merge(checkpoint, tmp_path / "of-checkpoint", verify=False)
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(DamageError, match=rf"step-4: has no {MANIFEST}"):
        merge(checkpoint, tmp_path / "again", verify=False)


def test_a_merged_folder_is_held_to_its_manifest_wherever_it_is_a_base(merged, tmp_path):
    assert sorted(check_folder(merged, "").files) == [
        name for name in names_in(merged) if name not in (MANIFEST, "verification.json")
    ]
    for name in names_in(merged):
        if name in ("README.md", "verification.json"):
            continue
        path = merged / name
        good = path.read_bytes()
        flip(path)
        with pytest.raises(DamageError, match=f"{name}: is damaged"):
            load_model(str(merged), quantization="none")
        if name != "model.safetensors":
            with pytest.raises(DamageError, match=f"{name}: is damaged"):
                load_tokenizer(str(merged))
        path.write_bytes(good)
    adapter = add_adapter(load(merged), merged, tmp_path / "adapter")
    flip(merged / "model.safetensors")
    with pytest.raises(DamageError, match=r"model.safetensors: is damaged .*; make the model again"):
        merge(adapter, tmp_path / "twice", verify=False)


def test_of_large_weights_samples_are_read_as_a_base_is_loaded(merged, monkeypatch):
    monkeypatch.setattr(manifest, "SMALL_BYTES", 1000)
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 64)
    write_manifest(merged, {})
    read = []
    monkeypatch.setattr(manifest, "sha256_of", lambda path: read.append(path.name) or "x")
    with pytest.raises(DamageError) as error:
        load_model(str(merged), quantization="none")
    assert "model.safetensors" not in read
    assert "model.safetensors: is damaged" not in str(error.value)
    monkeypatch.undo()
    content = (merged / "model.safetensors").read_bytes()
    (merged / "model.safetensors").write_bytes(content[:-64] + bytes(64))
    monkeypatch.setattr(manifest, "SMALL_BYTES", 1000)
    monkeypatch.setattr(manifest, "BLOCK_BYTES", 64)
    with pytest.raises(DamageError, match=r"model.safetensors: is damaged \(its size and samples"):
        load_model(str(merged), quantization="none")


def test_a_merged_folder_that_was_damaged_is_not_verified(run, pairs_file, tmp_path):
    merge(run, tmp_path / "merged", verify=False)
    flip(tmp_path / "merged" / "model.safetensors")
    with pytest.raises(
        DamageError, match=r"model.safetensors: is damaged .*; remove .*merged and merge again"
    ):
        merge(run, tmp_path / "merged", verify=str(pairs_file), verify_only=True)


# --- what belongs together ---


def test_a_changed_base_is_refused_and_the_same_elsewhere_is_not(run, moved, tmp_path, caplog):
    merge(run, tmp_path / "first", verify=False)
    flip(moved / "model.safetensors")
    with pytest.raises(
        ModelError, match=r"(?s)adapter: was trained on something else; .*the base's model.safetensors"
    ):
        merge(run, tmp_path / "second", verify=False)
    merge(run, tmp_path / "second", base=moved, verify=False)  # the person's own word
    assert "the base's model.safetensors: not what it was made with" in caplog.text


def test_a_checkpoint_takes_the_bases_tokenizer_only_if_it_is_the_same(run, moved, tmp_path):
    checkpoint = run / "checkpoints" / "step-4"
    merge(checkpoint, tmp_path / "first", verify=False)
    edit(moved / "chat_template.jinja", "<|start|>", "<|start|>\n")
    with pytest.raises(ModelError, match="the chat template or its stop token is not the one"):
        merge(checkpoint, tmp_path / "second", verify=False)
    merge(run, tmp_path / "second", verify=False)  # it has its own


def test_a_models_code_is_trusted_only_where_it_is_said_again(run, tmp_path):
    edit(run / "recipe.yaml", "trust_remote_code: false", "trust_remote_code: true")
    with pytest.raises(
        RecipeError, match=r"recipe.yaml: the run used code .* give --trust-remote-code if you trust"
    ):
        merge(run, tmp_path / "merged", verify=False)
    merge(run, tmp_path / "merged", verify=False, trust_remote_code=True)


# --- torn notes ---

TORN = [
    b"",
    b'{"train": {"sou',
    b"\xff\xfe\x00garbage",
    b"[" * 100_000,
    b"null",
    b'{"train": 1, "eval": [2]}',
]


@pytest.mark.parametrize("content", TORN, ids=range(len(TORN)))
def test_torn_notes_leave_the_card_poorer_and_no_more(run, tmp_path, content):
    for name in ("data.json", "environment.json"):
        (run / name).write_bytes(content)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(content + b'\n{"eval_loss": "low"}\n[1]\n{"step": 9, "eval_lo')
    output = merge(run, tmp_path / "merged", verify=False).output
    assert "LoRA adapters merged by qorpo" in (output / "README.md").read_text()


@pytest.mark.parametrize("content", TORN[:5], ids=range(5))
def test_a_torn_recipe_is_one_message(run, tmp_path, command, content):
    (run / "recipe.yaml").write_bytes(content)
    code, out, err = command("merge", run, "--output", tmp_path / "merged", "--no-verify")
    assert (code, out) == (2, "")
    assert "recipe.yaml" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("content", TORN[:5], ids=range(5))
def test_torn_settings_of_a_base_are_one_message(base_copy, tmp_path, name, content):
    adapter = add_adapter(load(base_copy), base_copy, tmp_path / "adapter")
    (base_copy / name).write_bytes(content)
    with pytest.raises(ModelError, match=rf"{name}.* can't be read"):
        merge(adapter, tmp_path / "merged", verify=False)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("content", TORN[:5], ids=range(5))
def test_a_torn_adapter_config_is_one_message(base, tmp_path, content):
    adapter = add_adapter(load(base), base, tmp_path / "adapter")
    (adapter / "adapter_config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"adapter_config.json can't be read"):
        merge(adapter, tmp_path / "merged", verify=False)


# --- names and links out of the folder ---


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/../../b", 7, None])
def test_an_index_that_names_files_elsewhere_is_refused(base_copy, tmp_path, name):
    adapter = add_adapter(load(base_copy), base_copy, tmp_path / "adapter")
    shutil.copy(base_copy / "model.safetensors", tmp_path / "other.safetensors")
    (base_copy / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (base_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"its index names .*, which is not in the folder"):
        merge(adapter, tmp_path / "merged", verify=False)


def test_a_link_out_of_the_folder_is_not_copied(base_copy, tmp_path):
    adapter = add_adapter(load(base_copy), base_copy, tmp_path / "adapter")
    (tmp_path / "secret").write_text("a secret")
    (base_copy / "NOTICE").symlink_to(tmp_path / "secret")
    with pytest.raises(ModelError, match=r"NOTICE: is a link to .*secret, out of the model's folder"):
        merge(adapter, tmp_path / "merged", verify=False)
    assert names_in(tmp_path) == ["adapter", "base", "secret"]


def test_weights_behind_a_link_are_read_and_said(base_copy, tmp_path, caplog):
    adapter = add_adapter(load(base_copy), base_copy, tmp_path / "adapter")
    shutil.move(base_copy / "model.safetensors", tmp_path / "elsewhere.safetensors")
    (base_copy / "model.safetensors").symlink_to(tmp_path / "elsewhere.safetensors")
    with caplog.at_level(logging.WARNING):
        merge(adapter, tmp_path / "merged", verify=False)
    assert "is a link out of the model's folder; read from" in caplog.text
    assert not (tmp_path / "merged" / "model.safetensors").is_symlink()


def test_the_hubs_cache_of_links_is_a_models_own(base, tmp_path, caplog):
    repository = tmp_path / "models--a--b"
    blobs, snapshot = repository / "blobs", repository / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(base.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    adapter = add_adapter(load(base), base, tmp_path / "adapter")
    merge(adapter, tmp_path / "merged", base=snapshot, verify=False)
    assert "is a link" not in caplog.text


# --- leftovers ---


def test_an_adapter_that_a_kill_left_aside_comes_back(run, tmp_path):
    (run / "adapter").rename(run / ".adapter.qorpo-replaced")
    merge(run, tmp_path / "merged", verify=False)
    assert (run / "adapter").is_dir()


def test_what_a_killed_merge_left_is_swept_by_the_next(run, tmp_path):
    left = tmp_path / ".merged.qorpo-unfinished"
    left.mkdir()
    (left / "model.safetensors").touch()
    merge(run, tmp_path / "merged", verify=False)
    assert names_in(tmp_path) == ["merged", "run"]
