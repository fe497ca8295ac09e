"""What can't be merged is one message and leaves nothing; a kill or a full disk leaves nothing that looks whole."""

import errno
import json
import multiprocessing
import os
import pickle
import random
import shutil
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from helpers.architectures import SMALL, build
from helpers.lora_folders import add_adapter, load, save_base
from safetensors.torch import load_file, save_file

import qorpo
from qorpo.errors import ModelError, QorpoError, RecipeError, RunError
from qorpo.merging import shards
from qorpo.merging.merge import merge
from qorpo.recipe import load_recipe


@pytest.fixture
def both(make):
    return make(build("llama"))


def refused(message, adapter, tmp_path, kind=ModelError, **options):
    """One message; neither an output nor a trace of one."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind, match=message) as caught:
        merge(adapter, tmp_path / "out" / "model", **options)
    assert sorted(tmp_path.rglob("*")) == before
    return str(caught.value)


def set_config(adapter, **changes):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# --- the wrong base ---


def test_a_base_of_other_shapes(both, tmp_path):
    other = save_base(build("llama", SMALL | {"intermediate_size": 64}), tmp_path / "other")
    message = refused("does not fit the base", both[1], tmp_path, base=other)
    assert "layers.0.mlp.gate_proj.lora_B.weight is (48, 4), and by the base (64, 4)" in message
    assert "and 3 more" in message


def test_a_base_with_more_or_fewer_layers(both, tmp_path):
    deeper = save_base(build("llama", SMALL | {"num_hidden_layers": 4}), tmp_path / "deeper")
    assert "model.layers.3.self_attn.v_proj.lora_B.weight is missing from the adapter" in refused(
        "does not fit", both[1], tmp_path, base=deeper
    )
    flatter = save_base(build("llama", SMALL | {"num_hidden_layers": 2}), tmp_path / "flatter")
    assert "belongs to nothing in the base" in refused("does not fit", both[1], tmp_path, base=flatter)


def test_a_base_of_other_names(both, tmp_path):
    other = save_base(build("gpt2"), tmp_path / "other")
    set_config(both[1], target_modules=["q_proj"])
    refused("does not fit the base: .*q_proj", both[1], tmp_path, base=other)


def test_another_revision_than_was_trained_on(both, tmp_path):
    base, adapter = both
    snapshot = shutil.copytree(base, tmp_path / "models--org--model" / "snapshots" / ("b" * 40))
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "adapter")
    recipe = {"model": {"path": str(base)}, "data": {"train": "x"}, "output": str(run)}
    (run / "recipe.yaml").write_text(json.dumps(recipe))
    (run / "environment.json").write_text(json.dumps({"base_commit": "a" * 40}))
    refused(f"trained on commit {'a' * 40} of its base, and this is {'b' * 40}", run, tmp_path, base=snapshot)


def test_another_hub_model_than_was_trained_on(both, tmp_path, monkeypatch):
    set_config(both[1], base_model_name_or_path="org/model")
    monkeypatch.setattr("qorpo.merging.source.ask_hub_once", lambda *_: None)
    monkeypatch.setattr("qorpo.merging.source.snapshot_download", lambda *_, **__: str(both[0]))
    refused("trained on org/model, not on org/another", both[1], tmp_path, base="org/another")


def test_a_base_that_is_nowhere(both, tmp_path):
    set_config(both[1], base_model_name_or_path="/no/such/folder")
    refused("there is no folder /no/such/folder", both[1], tmp_path)
    set_config(both[1], base_model_name_or_path=None)
    refused("name no base; say which to merge into with --base", both[1], tmp_path)
    set_config(both[1], base_model_name_or_path="org/model")
    refused("org/model: there is no such folder, and the hub can't be reached", both[1], tmp_path)


# --- broken files ---


def test_a_truncated_shard(both, tmp_path):
    weights = both[0] / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1000)
    refused(
        r"model\.safetensors: cut short: [\d,]+ bytes, and .* ends at [\d,]+; fetch it again",
        both[1],
        tmp_path,
    )
    os.truncate(weights, 300)
    refused("300 bytes are no safetensors file", both[1], tmp_path)
    os.truncate(weights, 0)
    refused("0 bytes are no safetensors file", both[1], tmp_path)


def test_a_file_that_is_something_else(both, tmp_path):
    for content in (b"<html>not found</html>" * 50, (50).to_bytes(8, "little") + b"x" * 400):
        (both[0] / "model.safetensors").write_bytes(content)
        refused("no safetensors file|header can't be read", both[1], tmp_path)


def test_missing_tensors(both, tmp_path):
    weights = load_file(both[0] / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, both[0] / "model.safetensors")
    refused("1 tensors are missing, such as model.layers.1.mlp.up_proj.weight", both[1], tmp_path)


def test_missing_shards(both, tmp_path):
    load(both[0]).save_pretrained(both[0], max_shard_size="20KB")
    (both[0] / "model.safetensors").unlink(missing_ok=True)
    first = sorted(both[0].glob("*.safetensors"))[0]
    kept = first.read_bytes()
    first.unlink()
    refused(f"shards are missing: {first.name}", both[1], tmp_path)
    first.write_bytes(kept)
    index = both[0] / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra"] = first.name
    index.write_text(json.dumps(content))
    refused("1 tensors of the index are missing from their shards, such as model.extra", both[1], tmp_path)
    index.write_text("[]")
    refused("no index of shards", both[1], tmp_path)


def test_weights_that_are_not_the_configurations(both, tmp_path):
    config = json.loads((both[0] / "config.json").read_text())
    (both[0] / "config.json").write_text(json.dumps(config | {"intermediate_size": 52}))
    message = refused("config.json and weights are not one model's", both[1], tmp_path)
    assert "model.layers.0.mlp.down_proj.weight is (32, 48), and by config.json (32, 52)" in message


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickles_are_read_only_when_allowed_and_never_run(both, tmp_path):
    (both[0] / "model.safetensors").unlink()
    torch.save({"weight": Payload(str(tmp_path / "ran"))}, both[0] / "pytorch_model.bin")
    refused("--allow-pickle", both[1], tmp_path)
    refused("holds more than tensors", both[1], tmp_path, allow_pickle=True)
    (both[0] / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(str(tmp_path / "ran"))))
    refused("holds more than tensors", both[1], tmp_path, allow_pickle=True)


def test_an_adapter_that_is_not_whole(both, tmp_path):
    (both[1] / "adapter_model.safetensors").rename(both[1] / "elsewhere")
    refused("no adapter_model.safetensors; is the adapter whole", both[1], tmp_path)
    (both[1] / "elsewhere").rename(both[1] / "adapter_model.safetensors")
    (both[1] / "adapter_config.json").write_text("{")
    refused("adapter_config.json can't be read", both[1], tmp_path)
    refused("no run .* and no adapter", tmp_path / "nowhere", tmp_path, RunError)


# --- what is not supported, by its name ---


@pytest.mark.parametrize(("changes", "name"), [
    ({"peft_type": "IA3"}, "a IA3 adapter; qorpo merges LoRA"),
    ({"init_lora_weights": "pissa"}, r"init_lora_weights \(pissa\)"),
    ({"init_lora_weights": "olora"}, r"init_lora_weights \(olora\)"),
    ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication"),
    ({"alora_invocation_tokens": [1, 2]}, "ALoraLinearVariant is not supported"),
])  # fmt: skip
def test_other_kinds_of_adapter(changes, name, both, tmp_path):
    set_config(both[1], **changes)
    refused(name, both[1], tmp_path)


def test_a_base_that_is_quantized_already(both, tmp_path):
    config = json.loads((both[0] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (both[0] / "config.json").write_text(json.dumps(config))
    refused("quantized already; give the unquantized one", both[1], tmp_path)


def test_a_weight_on_resized_embeddings(both, tmp_path):
    grown = load(both[0])
    grown.resize_token_embeddings(103)
    adapter = add_adapter(grown, both[0], tmp_path / "grown")
    refused("can't be weighed against the base's", f"{adapter}=0.5", tmp_path)


def test_a_run_of_full_tuning_is_sent_to_export(tmp_path):
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-4"
    checkpoint.mkdir(parents=True)
    recipe = load_recipe(
        {"model": {"path": "x"}, "tuning": "full", "data": {"train": "y"}, "output": str(run)}
    )
    recipe.save(run / "recipe.yaml")
    for given in (run, checkpoint):
        with pytest.raises(
            RunError, match=r"full tuning has no adapter to merge: its model is not written yet; qorpo export"
        ):
            merge(str(given), tmp_path / "out")
    (run / "model").mkdir()
    with pytest.raises(RunError, match=f"{run / 'model'} opens as it is, and qorpo export"):
        merge(str(run), tmp_path / "out")


def test_options_that_make_no_sense(both, tmp_path):
    refused("--dtype: got 'int8'", both[1], tmp_path, RecipeError, dtype="int8")
    refused(
        "--onto: got 'both'; expected original or dequantized", both[1], tmp_path, RecipeError, onto="both"
    )
    with pytest.raises(RecipeError, match="--output: missing"):
        merge(both[1], None)


# --- the disk ---


def test_too_little_disk(both, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    refused("0.06 GiB are needed, 0.00 GiB are free", both[1], tmp_path, RunError)


def test_an_output_that_is_in_the_way(both, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model").mkdir()
    (tmp_path / "out" / "model" / "notes.txt").write_text("mine")
    refused("something is there already", both[1], tmp_path, RunError)
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "out").write_text("a file")
    refused("takes no files", both[1], tmp_path, RunError)


def test_a_disk_that_fills_up_halfway(both, tmp_path, monkeypatch):
    written = []
    write = shards._write_all

    def fill(file, data):
        written.append(len(data))
        if len(written) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    monkeypatch.setattr(shards, "_write_all", fill)
    (tmp_path / "out").mkdir()
    refused(
        "could not be written .*No space left on device.*nothing is left of it", both[1], tmp_path, RunError
    )
    monkeypatch.undo()
    merge(both[1], tmp_path / "out" / "model")


def test_checking_only_writes_nothing_and_finds_the_same(both, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    result = merge(both[1], None, check_only=True)
    assert (result.output, result.changed) == (None, 21)
    merge(both[1], tmp_path / "model", check_only=True)
    assert sorted(tmp_path.rglob("*")) == before
    os.truncate(both[0] / "model.safetensors", 5000)
    with pytest.raises(QorpoError, match=r"cut short|no safetensors"):
        merge(both[1], None, check_only=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks the tests' own process")
def test_killed_at_any_moment_it_leaves_nothing_that_looks_whole(tmp_path):
    base = save_base(
        build("llama", SMALL | {"hidden_size": 512, "intermediate_size": 1536}), tmp_path / "base"
    )
    adapter = add_adapter(load(base), base, tmp_path / "adapter")
    output = tmp_path / "out" / "model"
    merge(adapter, tmp_path / "whole", max_shard_bytes=4_000_000)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    context = multiprocessing.get_context("fork")

    def start():
        process = context.Process(target=merge, args=(adapter, output), kwargs={"max_shard_bytes": 4_000_000})
        process.start()
        return process

    started = time.perf_counter()
    start().join()
    duration = time.perf_counter() - started
    shutil.rmtree(output)
    draw = random.Random(0)
    cut_short = 0
    for _ in range(20):
        process = start()
        time.sleep(draw.uniform(0, duration))
        process.kill()
        process.join()
        if output.exists():
            assert {path.name: path.read_bytes() for path in output.iterdir()} == whole
            shutil.rmtree(output)
        else:
            cut_short += bool(list(output.parent.glob(".model.qorpo-*")))
    assert cut_short >= 3  # some were killed while they wrote
    qorpo.merge(adapter, output, max_shard_bytes=4_000_000)
    assert [path.name for path in output.parent.iterdir()] == ["model"]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == whole


# --- the command ---


def test_the_command_says_one_thing_and_ends_with_2(both, command, tmp_path):
    os.truncate(both[0] / "model.safetensors", 5000)
    code, out, err = command("merge", both[1], "--output", tmp_path / "model")
    assert code == 2
    assert out == ""
    assert err.startswith("qorpo: ")
    assert "Traceback" not in err
    assert not (tmp_path / "model").exists()


def test_the_command_prints_where_the_model_is(both, command, tmp_path):
    code, out, err = command("merge", both[1], "--output", tmp_path / "model", "--dtype", "float32")
    assert code == 0, err
    assert out.startswith(f"merged: {tmp_path / 'model'}\n\nnext:\n  qorpo chat {tmp_path / 'model'}")
    assert "Traceback" not in err
    code, out, err = command("merge", both[1], "--check-only")
    assert (code, out) == (0, "nothing written; 21 tensors would change\n")
