"""What loading leaves in memory: types, what is quantized, what is not, and what is never executed."""

import json
import os
import pickle

import pytest
import torch
from helpers.tiny import make_base
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from qorpo.errors import ModelError
from qorpo.model.load import load_model, load_tokenizer, read_chat_template

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def modules_of(model, kind):
    return {name: module for name, module in model.named_modules() if isinstance(module, kind)}


def test_unquantized_weights_are_the_files_in_bfloat16(base):
    model = load_model(str(base), quantization="none")
    saved = load_file(base / "model.safetensors")
    loaded = dict(model.named_parameters())
    assert set(loaded) == set(saved)
    for name, weight in loaded.items():
        assert weight.dtype == torch.bfloat16
        assert not weight.requires_grad
        assert torch.equal(weight, saved[name])


def test_a_float32_base_is_loaded_in_bfloat16(base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == torch.float32
    model = load_model(str(tmp_path), quantization="none")
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("tied", [False, True])
def test_nf4_is_double_quantized_and_stays_in_the_trunk(base, tmp_path, tied):
    from bitsandbytes.nn import Linear4bit

    model = load_model(str(make_base(tmp_path / "tied", tie_word_embeddings=True) if tied else base))
    quantized = modules_of(model, Linear4bit)
    assert {name.rsplit(".", 1)[-1] for name in quantized} == LINEARS
    assert len(quantized) == 2 * len(LINEARS)
    for module in quantized.values():
        state = module.weight.quant_state
        assert module.weight.dtype == torch.uint8
        assert state.quant_type == "nf4"
        assert state.nested
        assert state.absmax.dtype == torch.uint8
        assert module.compute_dtype == torch.bfloat16
    head = model.get_output_embeddings()
    assert type(head) is nn.Linear
    assert (head.weight is model.get_input_embeddings().weight) == tied
    for name, weight in model.named_parameters():
        assert not weight.requires_grad
        if name.rsplit(".", 2)[-2] not in LINEARS:
            assert weight.dtype == torch.bfloat16, name


def test_nf4_dequantizes_to_about_the_files_weights(base):
    from bitsandbytes.functional import dequantize_4bit

    saved = load_file(base / "model.safetensors")
    model = load_model(str(base))
    name = "model.layers.1.mlp.gate_proj"
    weight = model.get_submodule(name).weight
    error = dequantize_4bit(weight.data, weight.quant_state).float() - saved[f"{name}.weight"].float()
    # 16 levels over a block of 64: a tenth of the weights' spread, and not nothing.
    assert 0.01 < error.std() / saved[f"{name}.weight"].float().std() < 0.15


def test_nf4_never_takes_the_processors_kernel_without_autograd(base):
    from bitsandbytes.nn import Linear4bit

    for module in modules_of(load_model(str(base)), Linear4bit).values():
        assert module.support_avx512bf16_for_cpu is False


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_pickled_weights_load_when_allowed(base, base_copy, quantization):
    torch.save(load_file(base_copy / "model.safetensors"), base_copy / "pytorch_model.bin")
    (base_copy / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"set model\.allow_pickle: true"):
        load_model(str(base_copy), quantization=quantization)
    models = [
        load_model(str(base), quantization=quantization),
        load_model(str(base_copy), quantization=quantization, allow_pickle=True),
    ]
    ids = torch.arange(20)[None]
    logits = [model(ids).logits for model in models]
    assert torch.equal(*logits)


class Payload:
    """What a hostile file would do when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_even_then_nothing_in_a_pickle_runs(base_copy, tmp_path):
    (base_copy / "model.safetensors").unlink()
    torch.save({"weight": Payload(str(tmp_path / "ran"))}, base_copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="hold more than tensors; convert them to safetensors"):
        load_model(str(base_copy), allow_pickle=True)
    (base_copy / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(str(tmp_path / "ran"))))
    with pytest.raises(ModelError, match="hold more than tensors; convert them to safetensors"):
        load_model(str(base_copy), allow_pickle=True)
    assert not (tmp_path / "ran").exists()


def test_safetensors_win_over_a_pickle_beside_them(base_copy):
    (base_copy / "pytorch_model.bin").write_bytes(b"not even a pickle")
    load_model(str(base_copy), allow_pickle=True)


def test_code_that_comes_with_a_model_does_not_run(base_copy, tmp_path):
    config = json.loads((base_copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (base_copy / "config.json").write_text(json.dumps(config))
    (base_copy / "mine.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'ran')!r})\n")
    with pytest.raises(ModelError):
        load_model(str(base_copy))
    assert not (tmp_path / "ran").exists()


def test_the_tokenizer_keeps_its_chat_template(base):
    tokenizer = load_tokenizer(str(base))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text == "<|start|>user\nHi<|end|>"


def test_home_is_meant_by_a_tilde(base, monkeypatch):
    monkeypatch.setenv("HOME", str(base.parent))
    assert load_tokenizer(f"~/{base.name}").eos_token == "<|end|>"


def test_a_template_file_is_read_as_it_stands(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages }}\n — ünï", encoding="utf-8")
    assert read_chat_template(str(path)) == "{{ messages }}\n — ünï"
    assert read_chat_template(None) is None
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match=r"model\.chat_template"):
        read_chat_template(str(path))


# --- a config of another model ---


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize(
    ("change", "shown"), [({"vocab_size": 512}, r"\(512, 64\)"), ({"intermediate_size": 192}, "192")]
)
def test_a_config_of_other_shapes_is_one_message(base_copy, caplog, quantization, change, shown):
    file = base_copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(
        ModelError, match=f"by config.json .*{shown}.*config.json and weights are not one model's"
    ):
        load_model(str(base_copy), quantization=quantization)
    assert "LOAD REPORT" not in caplog.text


def test_weights_without_a_place_are_said(base_copy, caplog):
    file = base_copy / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1}))
    load_model(str(base_copy), quantization="none")
    assert "9 weights are not used, such as model.layers.1.input_layernorm.weight" in caplog.text
