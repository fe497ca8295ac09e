"""model.adapter: training goes on from an adapter, which is held to its manifest, its base and the recipe's lora keys."""

import json
import logging
import shutil

import pytest
import torch
from helpers.tiny import changed, make_base, read_metrics, short_recipe
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from qorpo import train
from qorpo.build import with_adapter
from qorpo.errors import DamageError, ModelError, RecipeError, RunError
from qorpo.identity import base_identity
from qorpo.model.load import load_model
from qorpo.planning.fake_model import make_fake_model
from qorpo.planning.plan import plan
from qorpo.recipe import load_recipe, resolve
from qorpo.training.progress import Progress

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def sft(base, pairs_file, tmp_path_factory):
    """A finished run of SFT, with DoRA and the rank, alpha and scaling that are not the defaults."""
    recipe = changed(
        short_recipe(base, pairs_file, tmp_path_factory.mktemp("sft") / "run"), objective={"name": "sft"},
        lora={"rank": 4, "alpha": 6, "use_dora": True, "use_rslora": True}, data__eval=0.25,
    )  # fmt: skip
    return train(recipe).output


@pytest.fixture
def recipe(base, pairs_file, tmp_path, sft):
    """ORPO from there; it says nothing of lora."""
    recipe = short_recipe(base, pairs_file, tmp_path / "run")
    del recipe["lora"]
    return changed(recipe, model__adapter=str(sft), data__eval=0.25)


class Killed(BaseException):
    pass


class KillAt(Progress):
    def __init__(self, step):
        self.at = step

    def step(self, done_steps):
        if done_steps == self.at:
            raise Killed


def adapter(output):
    return load_file(output / "adapter" / WEIGHTS)


def test_it_begins_where_the_other_run_ended(recipe, sft, caplog):
    caplog.set_level(logging.INFO)
    result = train(recipe)
    kept = min(row["eval_nll"] for row in read_metrics(sft) if "eval_nll" in row)
    start = read_metrics(result.output)[0]
    assert start["step"] == 0
    assert start["eval_nll"] == pytest.approx(kept, abs=1e-6)
    lora = result.trainer.recipe.lora
    assert (lora.rank, lora.alpha, lora.use_dora, lora.use_rslora) == (4, 6, True, True)
    assert "lora.rank 4, lora.alpha 6" in caplog.text
    before, after = adapter(sft), adapter(result.output)
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name], after[name]) for name in before)
    config = json.loads((result.output / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["use_dora"]) == (4, True)


@pytest.mark.parametrize("form", ["adapter", "checkpoints/step-8", "pefts"])
def test_the_forms_that_an_adapter_comes_in(recipe, sft, base, tmp_path, form, caplog):
    if form == "pefts":
        path = tmp_path / "pefts"
        PeftModel.from_pretrained(load_model(str(base)), sft / "adapter").save_pretrained(path)
    else:
        path = sft / form
    result = train(changed(recipe, model__adapter=str(path), train__learning_rate=1e-12))
    for name, value in load_file(path / WEIGHTS).items():
        torch.testing.assert_close(adapter(result.output)[name], value, atol=1e-6, rtol=0)
    assert result.trainer.recipe.lora.rank == 4


def test_killed_and_resumed_it_ends_in_the_same_bytes_and_only_with_the_same_adapter(recipe, sft, tmp_path):
    copied = shutil.copytree(sft / "adapter", tmp_path / "copied")
    whole = train(changed(recipe, output=str(tmp_path / "whole")))
    recipe = changed(recipe, model__adapter=str(copied))
    with pytest.raises(Killed):
        train(recipe, progress=KillAt(5))
    moved = copied.rename(tmp_path / "away")
    with pytest.raises(ModelError, match=r"model\.adapter: .*copied holds no run and no adapter"):
        train(recipe, resume=True)
    shutil.copytree(moved, copied)
    (copied / "qorpo-manifest.json").unlink()
    save_file({name: value + 1 for name, value in load_file(copied / WEIGHTS).items()}, copied / WEIGHTS)
    with pytest.raises(RunError, match=r"the adapter that it began from \(model\.adapter\) is not the one"):
        train(recipe, resume=True)
    shutil.rmtree(copied)
    shutil.copytree(moved, copied)
    train(recipe, resume=True)
    assert (tmp_path / "run" / "adapter" / WEIGHTS).read_bytes() == (
        whole.output / "adapter" / WEIGHTS
    ).read_bytes()


def test_lora_keys_that_are_set_otherwise_are_refused_by_name(recipe, sft):
    with pytest.raises(RecipeError) as caught:
        train(changed(recipe, lora={"rank": 8, "alpha": 6, "use_dora": False, "targets": ["q_proj"]}))
    text = str(caught.value)
    assert "lora.rank: 8, and the adapter of model.adapter has 4; leave it out" in text
    assert "lora.use_dora: false, and the adapter of model.adapter has true" in text
    assert "lora.targets: ['q_proj']" in text
    assert "lora.alpha" not in text
    # What a run has saved says the same as its adapter; dropout may be another.
    result = train(changed(recipe, lora={"rank": 4, "targets": "all-linear", "dropout": 0.25}))
    assert result.trainer.recipe.lora.dropout == 0.25


def test_another_base_and_damage_are_refused_and_nothing_is_written(recipe, sft, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert base_identity(other) != base_identity(base)
    with pytest.raises(ModelError, match=r"was trained on another base than model\.path"):
        train(changed(recipe, model__path=str(other)))
    copied = shutil.copytree(sft / "adapter", tmp_path / "copied")
    content = bytearray((copied / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (copied / WEIGHTS).write_bytes(content)
    with pytest.raises(DamageError, match="is damaged"):
        train(changed(recipe, model__adapter=str(copied)))
    assert not (tmp_path / "run" / "recipe.yaml").exists()


def test_a_base_of_another_shape_is_refused(recipe, sft, tmp_path):
    wide = make_base(tmp_path / "wide", hidden_size=96)
    copied = shutil.copytree(sft / "adapter", tmp_path / "copied")
    (copied / "qorpo-manifest.json").unlink()
    with pytest.raises(ModelError, match=r"does not fit model\.path"):
        train(changed(recipe, model__path=str(wide), model__adapter=str(copied)))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa, which qorpo can't train on; merge it"),
        ({"bias": "lora_only"}, "has bias, which qorpo can't train on"),
        ({"trainable_token_indices": [1]}, "has trainable_token_indices"),
        ({"peft_type": "IA3"}, "is a IA3 adapter; qorpo trains LoRA"),
    ],
)
def test_adapters_of_other_kinds_are_refused_by_name(recipe, sft, tmp_path, change, expected):
    copied = shutil.copytree(sft / "adapter", tmp_path / "copied")
    config = json.loads((copied / "adapter_config.json").read_text()) | change
    (copied / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=expected):
        train(changed(recipe, model__adapter=str(copied)))


def test_all_parameters_cannot_go_on_from_an_adapter(recipe):
    with pytest.raises(RecipeError, match=r"model\.adapter: .*merge it \(qorpo merge\)"):
        train(changed(recipe, tuning="full"))


def test_an_adapter_beside_a_base_is_not_taken_for_the_base(recipe, sft, base, tmp_path):
    """transformers would load it, and the new adapters would take its place."""
    both = shutil.copytree(base, tmp_path / "both")
    for name in ("adapter_config.json", WEIGHTS):
        shutil.copy(sft / "adapter" / name, both / name)
    for path in (both, sft / "adapter"):
        with pytest.raises(
            ModelError, match=r"model\.path: .* holds an adapter .*this folder as model\.adapter"
        ):
            train(changed(recipe, model__path=str(path), model__adapter=None))


@pytest.mark.parametrize("path", ["nowhere/at/all", "./nowhere", "one-word"])
def test_a_path_with_no_adapter(recipe, path):
    with pytest.raises(ModelError, match=r"model\.adapter: .* holds no run and no adapter"):
        train(changed(recipe, model__adapter=path))


def test_a_plan_counts_the_adapter_that_is_there(recipe, base):
    def trained(raw):
        resolved = resolve(with_adapter(load_recipe(raw)), device_type="cuda", installed=lambda module: True)
        model, _ = make_fake_model(AutoConfig.from_pretrained(base), resolved)
        return {name: p.shape for name, p in model.named_parameters() if p.requires_grad}

    own = changed(recipe, model__adapter=None, lora={"rank": 4, "use_dora": True})
    assert trained(recipe) == trained(own) != trained(changed(own, lora__rank=5))


@pytest.mark.slow
def test_what_fits_has_no_rank_where_the_adapter_has_one(recipe):
    assert "lora_rank" not in plan(recipe).largest
