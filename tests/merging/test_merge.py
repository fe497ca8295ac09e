"""A real run merged: what is in the folder, what opens it, both bases, weights, shards, types."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from helpers.architectures import SMALL, build
from helpers.lora_folders import add_adapter, load, logits, save_base, with_adapter
from helpers.tiny import changed, make_base, preference_records, short_recipe, write_records
from safetensors import safe_open
from safetensors.torch import load_file

import qorpo
from qorpo.merging import source
from qorpo.merging.shards import read_checkpoint


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run trained on the tiny base in NF4, with evaluation pairs."""
    folder = tmp_path_factory.mktemp("run")
    base = make_base(folder / "base")
    pairs = write_records(folder / "pairs.jsonl", preference_records())
    recipe = changed(short_recipe(base, pairs, folder / "tiny-run"), data__eval=0.25, model__attention="sdpa")
    return qorpo.train(recipe).output


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("merged") / "model"
    return qorpo.merge(run, output)


def test_the_folder_holds_all_that_a_model_needs(merged, run):
    names = {path.name for path in merged.output.iterdir()}
    assert names == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md", "verification.json", "qorpo-manifest.json",
    }  # fmt: skip
    assert merged.onto == "original"
    stored = load_file(merged.output / "model.safetensors")
    base = load_file(run.parent / "base" / "model.safetensors")
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in base.items()
    }
    differing = {name for name in base if not torch.equal(base[name], stored[name])}
    assert len(differing) == merged.changed == 2 * 7
    assert all(name.endswith("_proj.weight") for name in differing)


def test_it_stops_where_the_adapter_learned_to(run, tmp_path):
    # A base whose own stop token is another than the template's.
    base = shutil.copytree(run.parent / "base", tmp_path / "base")
    (base / "generation_config.json").write_text('{"eos_token_id": 7, "temperature": 0.5, "do_sample": true}')
    qorpo.merge(run, tmp_path / "model", base=base, verify=False)
    learned = json.loads((run / "adapter" / "generation_config.json").read_text())["eos_token_id"]
    generation = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == learned == [1]
    assert generation["temperature"] == 0.5


def test_the_card_says_what_it_is(merged, run):
    card = (merged.output / "README.md").read_text()
    data = json.loads((run / "data.json").read_text())
    assert data["train"]["sources"][0]["sha256"] in card
    for line in (
        "# tiny-run",
        "the base's own weights",
        "| eval_nll |",
        "learning_rate: 0.005",
        "library_name: transformers",
    ):
        assert line in card


def test_it_is_verified_and_the_report_is_in_the_folder(merged):
    assert merged.verification.passed
    report = json.loads((merged.output / "verification.json").read_text())
    assert report["verdict"] == "pass"
    assert report["pairs"] == 10
    own, trained = report["comparisons"]
    assert (own["reference"], own["judged"]) == ("adapter on the original base", True)
    assert (trained["reference"], trained["judged"]) == ("adapter on the NF4 base", False)
    assert 0 < own["figures"]["kl_mean"] < trained["figures"]["kl_mean"]


def test_dequantized_is_what_training_saw(run, tmp_path):
    result = qorpo.merge(run, tmp_path / "model", onto="dequantized")
    (comparison,) = result.verification.comparisons
    assert comparison.reference == "adapter on the NF4 base"
    assert result.verification.passed
    assert comparison.figures["kl_mean"] < 1e-3
    base = load_file(run.parent / "base" / "model.safetensors")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(stored[name], base[name])


@pytest.mark.slow
def test_a_plain_process_generates_the_same_text(run, tmp_path):
    """With neither qorpo nor PEFT nor bitsandbytes; in float32, greedily, as the adapter on its base."""
    from peft import PeftModel
    from transformers import AutoTokenizer

    output = tmp_path / "model"
    qorpo.merge(run, output, dtype="float32", verify=False)
    script = """
import sys
sys.modules.update(qorpo=None, peft=None, bitsandbytes=None)
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
assert model.dtype == torch.float32, model.dtype
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
for question in sys.argv[2:]:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True,
        return_tensors="pt", return_dict=True)
    print(model.generate(**ids, max_new_tokens=40, do_sample=False)[0].tolist())
"""
    questions = ["What colour is the sky?", "Tell me about the ink.", "Have you ever seen the milk?"]
    done = subprocess.run(
        [sys.executable, "-c", script, str(output), *questions], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    model = PeftModel.from_pretrained(load(run.parent / "base"), run / "adapter").eval()
    model.generation_config.eos_token_id = [1]
    tokenizer = AutoTokenizer.from_pretrained(run / "adapter")
    for question, line in zip(questions, done.stdout.splitlines(), strict=True):
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )  # fmt: skip
        assert json.loads(line) == model.generate(**inputs, max_new_tokens=40, do_sample=False)[0].tolist()


# --- shards, types, names ---


def test_shards_and_their_index(make, tmp_path):
    base, adapter = make(build("llama"))
    qorpo.merge(adapter, tmp_path / "one", base=base)
    qorpo.merge(adapter, tmp_path / "many", base=base, max_shard_bytes=20_000)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    for name in files:
        with safe_open(tmp_path / "many" / name, "pt") as shard:
            assert shard.metadata() == {"format": "pt"}
            assert all(index["weight_map"][key] == name for key in shard.keys())  # noqa: SIM118
        size = sum(tensor.nbytes for tensor in load_file(tmp_path / "many" / name).values())
        assert size <= 20_000
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for t in read_checkpoint(tmp_path / "one").values()
    )
    assert torch.equal(logits(load(tmp_path / "one")), logits(load(tmp_path / "many")))


def test_a_sharded_base_and_a_pickled_one(make, tmp_path):
    base, adapter = make(build("llama"))
    qorpo.merge(adapter, tmp_path / "plain", base=base)
    load(base).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    qorpo.merge(adapter, tmp_path / "from-shards", base=tmp_path / "sharded")
    pickled = shutil.copytree(base, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    qorpo.merge(adapter, tmp_path / "from-pickle", base=pickled, allow_pickle=True)
    expected = logits(load(tmp_path / "plain"))
    for name in ("from-shards", "from-pickle"):
        assert torch.equal(logits(load(tmp_path / name)), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_types(dtype, make, tmp_path):
    base, adapter = make(build("llama"))
    qorpo.merge(adapter, tmp_path / "model", base=base, dtype=dtype)
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {str(tensor.dtype) for tensor in stored.values()} == {f"torch.{dtype}"}
    model = type(load(base)).from_pretrained(tmp_path / "model")
    assert str(model.dtype) == f"torch.{dtype}"
    exact = logits(with_adapter(base, adapter))
    assert (logits(load(tmp_path / "model")) - exact).abs().max() < {
        "float32": 1e-5,
        "bfloat16": 0.2,
        "float16": 0.03,
    }[dtype]


def test_a_checkpoint_of_other_names_keeps_them(make, tmp_path):
    """Such as the hub's GPT-2, which has no prefix, no output head, and buffers that transformers no longer reads."""
    from safetensors.torch import save_file

    base, adapter = make(build("gpt2"), fan_in_fan_out=True)
    stored = load_file(base / "model.safetensors")
    older = {name.removeprefix("transformer."): tensor for name, tensor in stored.items()}
    older["h.0.attn.bias"] = torch.ones(1, 1, 4, 4, dtype=torch.uint8)
    save_file(older, base / "model.safetensors", {"format": "pt"})
    qorpo.merge(adapter, tmp_path / "model", base=base, dtype="float32")
    assert load_file(tmp_path / "model" / "model.safetensors").keys() == older.keys()
    expected = logits(with_adapter(base, adapter))
    assert (logits(load(tmp_path / "model")) - expected).abs().max() < 1e-5


def test_experts_that_a_checkpoint_keeps_together(tmp_path):
    """A checkpoint by save_pretrained keeps experts apart; one that stacks them as transformers does opens too."""
    from safetensors.torch import save_file

    config = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
    model = build("mixtral", config).float()
    base = save_base(model, tmp_path / "base")
    adapter = add_adapter(
        load(base), base, tmp_path / "adapter",
        target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )  # fmt: skip
    stacked = shutil.copytree(base, tmp_path / "stacked")
    save_file(
        {name: value.contiguous() for name, value in load(base).state_dict().items()},
        stacked / "model.safetensors",
    )
    expected = logits(with_adapter(base, adapter))
    for name in ("base", "stacked"):
        qorpo.merge(adapter, tmp_path / f"from-{name}", base=tmp_path / name)
        assert (logits(load(tmp_path / f"from-{name}")) - expected).abs().max() < 1e-5
    assert "model.layers.0.block_sparse_moe.experts.3.w3.weight" in read_checkpoint(tmp_path / "from-base")


# --- several adapters ---


def test_several_adapters_in_turn_by_weight(make, tmp_path):
    base, first = make(build("llama"))
    second = add_adapter(
        load(base), base, tmp_path / "second", seed=2, r=3, target_modules=["q_proj", "lm_head"]
    )
    qorpo.merge(f"{first}=0.5", tmp_path / "model", base=base, adapters=[f"{second}=-2"])

    own = load(base).state_dict()
    halves = with_adapter(base, first).merge_and_unload().state_dict()
    others = with_adapter(base, second).merge_and_unload().state_dict()
    merged = load(tmp_path / "model").state_dict()
    for name, weight in own.items():
        expected = weight + 0.5 * (halves[name] - weight) - 2 * (others[name] - weight)
        torch.testing.assert_close(merged[name], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"modules_to_save": ["lm_head"]}, {"bias": "all"}])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_what_is_no_sum_is_weighed_as_a_change(architecture, settings, make, tmp_path):
    base, adapter = make(build(architecture), **settings)
    qorpo.merge(f"{adapter}=0.25", tmp_path / "model", base=base)
    own = load_file(base / "model.safetensors")
    qorpo.merge(adapter, tmp_path / "whole", base=base)
    whole, merged = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "model"))
    for name, tensor in own.items():
        torch.testing.assert_close(merged[name], tensor + 0.25 * (whole[name] - tensor), atol=1e-6, rtol=1e-5)


def test_dora_after_another_adapter_scales_what_that_one_made(make, tmp_path):
    base, first = make(build("llama"))
    second = add_adapter(load(base), base, tmp_path / "second", seed=2, use_dora=True)
    qorpo.merge(first, tmp_path / "both", base=base, adapters=[str(second)])
    qorpo.merge(first, tmp_path / "one", base=base)
    qorpo.merge(second, tmp_path / "then", base=tmp_path / "one")
    assert torch.equal(logits(load(tmp_path / "both")), logits(load(tmp_path / "then")))


# --- where things are ---


def test_a_checkpoint_and_an_adapter_of_a_run_know_their_run(run):
    for folder in (run, run / "adapter", *(run / "checkpoints").iterdir()):
        assert source.find_trained(str(folder)).run == run
    assert source.find_trained(f"{run}=0.5").adapter.weight == 0.5


def test_a_base_from_the_hubs_cache_is_the_commit_that_was_trained_on(make, tmp_path, monkeypatch):
    """Several commits are there; the run's own note picks the right one."""
    base, adapter = make(build("llama"))
    cache = tmp_path / "hub" / "models--org--model"
    for commit, weights in (
        ("a" * 40, base),
        ("b" * 40, save_base(build("llama", SMALL | {"vocab_size": 90}), tmp_path / "b")),
    ):
        shutil.copytree(weights, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("b" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "org/model", "revision": "a" * 40})
    )
    qorpo.merge(adapter, tmp_path / "model")
    assert (logits(load(tmp_path / "model")) - logits(with_adapter(base, adapter))).abs().max() < 1e-5
