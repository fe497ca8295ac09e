"""What `qorpo.load` opens, as what, and what it refuses."""

import json
import shutil

import pytest
import torch
from helpers.tiny import CHAT_TEMPLATE, changed, short_recipe
from peft import PeftModel
from transformers import AutoModelForCausalLM

import qorpo
from qorpo.errors import DamageError, ModelError, RecipeError, RunError
from qorpo.generation.load import find_model


def quantized_layers(model):
    from bitsandbytes.nn import Linear4bit

    return sum(isinstance(module, Linear4bit) for module in model.modules())


def test_a_run_comes_with_adapter_template_and_stop_token_on_its_nf4_base(run):
    model, tokenizer = qorpo.load(run)
    assert isinstance(model, PeftModel)
    assert not model.training
    assert quantized_layers(model) == 14
    assert tokenizer.chat_template == CHAT_TEMPLATE
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_run_adapter_and_last_checkpoint_are_the_same_model(run):
    ids = torch.arange(2, 12)[None]
    paths = [run, run / "adapter", run / "checkpoints" / "step-8"]
    logits = [qorpo.load(path)[0](input_ids=ids).logits for path in paths]
    assert logits[0].equal(logits[1])
    assert qorpo.load(paths[2])[1].chat_template == CHAT_TEMPLATE
    steps = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert steps == 8


def test_other_quantization_is_had_by_asking(run, merged, base):
    assert quantized_layers(qorpo.load(run, quantization="none")[0]) == 0
    assert quantized_layers(qorpo.load(merged)[0]) == 0
    assert quantized_layers(qorpo.load(base, quantization="nf4")[0]) == 14


def test_float32_keeps_the_weights_as_they_are(run, base):
    exact, coarse = (qorpo.load(base, dtype=dtype)[0] for dtype in ("float32", "bfloat16"))
    for own, other in zip(exact.parameters(), coarse.parameters(), strict=True):
        assert own.dtype == torch.float32
        assert own.equal(other.float())
    quantized = qorpo.load(run, dtype="float32")[0]
    assert quantized(input_ids=torch.arange(9)[None]).logits.dtype == torch.float32


def test_a_full_run_opens_its_model(base, pairs_file, tmp_path):
    recipe = changed(short_recipe(base, pairs_file, tmp_path / "full"), tuning="full", train__max_steps=2)
    recipe["train"]["learning_rate"] = 1e-4
    qorpo.train(recipe)
    model, _ = qorpo.load(tmp_path / "full")
    own = AutoModelForCausalLM.from_pretrained(tmp_path / "full" / "model", dtype=torch.float32)
    for name, weight in own.named_parameters():
        assert model.get_parameter(name).equal(weight)
    shutil.rmtree(tmp_path / "full" / "model")
    with pytest.raises(RunError, match="not written yet"):
        qorpo.load(tmp_path / "full")


def test_an_adapter_without_its_run_knows_how_it_was_trained(run, tmp_path):
    alone = shutil.copytree(run / "adapter", tmp_path / "alone")
    assert find_model(alone).quantization == "nf4"
    (alone / "qorpo-manifest.json").unlink()  # as one by PEFT has none
    assert find_model(alone).quantization == "none"


def test_a_flipped_bit_is_named_before_the_model_is_loaded(run, tmp_path):
    copy = shutil.copytree(run / "adapter", tmp_path / "adapter")
    weights = copy / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(DamageError, match=r"adapter_model\.safetensors: is damaged"):
        qorpo.load(copy)


def test_code_of_the_model_is_trusted_only_where_that_is_said_again(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    recipe = copy / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("trust_remote_code: false", "trust_remote_code: true"))
    with pytest.raises(RecipeError, match="--trust-remote-code"):
        qorpo.load(copy)
    assert find_model(copy, trust_remote_code=True).trust_remote_code


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"quantization": "int8"}, RecipeError, "--quantization: got 'int8'; expected auto, nf4, none"),
        ({"dtype": "float8"}, RecipeError, "--dtype: got 'float8'"),
    ],
)
def test_unknown_values_are_refused(run, arguments, error, named):
    with pytest.raises(error, match=named):
        qorpo.load(run, **arguments)


def test_folders_that_hold_no_model_are_refused(merged, base, tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        qorpo.load(tmp_path)
    with pytest.raises(ModelError, match="there is no folder"):
        qorpo.load(tmp_path / "none")
    with pytest.raises(RecipeError, match=r"--base: .* is a whole model"):
        qorpo.load(merged, base=str(base))
