"""Merged models against PEFT's own merge, in float32: every architecture, and everything that LoRA can hold."""

import pytest
import torch
from helpers.architectures import SHARED, SMALL, build, build_gemma3_wrapper
from helpers.lora_folders import add_adapter, load, logits, save_base, with_adapter
from peft import PeftModel
from transformers import AutoModelForImageTextToText

import qorpo
from qorpo.errors import ModelError
from qorpo.model.adapters import attach_lora

TOLERANCE = 1e-5


def merged_logits(base, adapter, output, **options):
    qorpo.merge(str(adapter), output, base=str(base), dtype="float32", **options)
    return logits(load(output))


def close(left, right):
    assert left.shape == right.shape
    assert (left - right).abs().max() < TOLERANCE * max(1, right.abs().max())


@pytest.mark.parametrize("name", SHARED)
def test_merged_as_peft_merges(name, make, tmp_path):
    base, adapter = make(build(name))
    expected = logits(with_adapter(base, adapter).merge_and_unload())
    assert (expected - logits(load(base))).abs().max() > 1e-2  # the adapter does something
    close(merged_logits(base, adapter, tmp_path / "merged", onto="original"), expected)


LORA = {
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 7}, "alpha_pattern": {"k_proj": 32}},
    "single-layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1]},
    "by-expression": {"target_modules": r".*layers\.[01]\.self_attn\.[qv]_proj"},
    "modules-to-save": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "norms-to-save": {"modules_to_save": ["input_layernorm"]},
    "embeddings": {"target_modules": ["embed_tokens", "lm_head", "o_proj"]},
    "embeddings-dora": {"target_modules": ["embed_tokens", "o_proj"], "use_dora": True},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 5, 90]}},
    "dora-rslora-patterns": {"use_dora": True, "use_rslora": True, "rank_pattern": {"v_proj": 3}},
}


@pytest.mark.parametrize("kind", LORA)
def test_all_that_lora_holds(kind, make, tmp_path):
    base, adapter = make(build("llama"), **LORA[kind])
    expected = logits(with_adapter(base, adapter))
    close(logits(with_adapter(base, adapter).merge_and_unload()), expected)
    close(merged_logits(base, adapter, tmp_path / "merged", onto="original"), expected)


@pytest.mark.parametrize(
    "settings", [{}, {"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}]
)
def test_conv1d_is_fan_in_fan_out(settings, make, tmp_path):
    base, adapter = make(build("gpt2"), fan_in_fan_out=True, **settings)
    expected = logits(with_adapter(base, adapter))
    close(merged_logits(base, adapter, tmp_path / "merged", onto="original"), expected)


TIED = {
    "lora-on-embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "head-saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embeddings-saved": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both-saved-apart": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "both-saved-tied": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 5]}},
    "layers-alone": {},
}  # fmt: skip


@pytest.mark.parametrize("kind", TIED)
def test_tied_embeddings_part_where_the_adapter_parts_them(kind, make, tmp_path):
    base, adapter = make(build("llama-tied"), **TIED[kind])
    expected = logits(with_adapter(base, adapter))
    close(merged_logits(base, adapter, tmp_path / "merged", onto="original"), expected)
    model = load(tmp_path / "merged")
    stays = kind in ("tokens", "layers-alone", "both-saved-tied")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == stays
    assert model.config.tie_word_embeddings == stays


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("way", ["saved-by-peft", "modules-to-save", "lora-on-them"])
def test_added_tokens_and_resized_embeddings(tied, way, tmp_path):
    base = save_base(build("llama-tied" if tied else "llama"), tmp_path / "base")
    grown = load(base)
    grown.resize_token_embeddings(103)
    settings = {
        "saved-by-peft": {},
        "modules-to-save": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "lora-on-them": {"target_modules": ["embed_tokens", "q_proj"]},
    }[way]
    adapter = add_adapter(grown, base, tmp_path / "adapter", **settings)
    if way == "lora-on-them" and not tied:  # PEFT does not save the head then, and its new rows are lost
        with pytest.raises(
            ModelError, match=r"has 103 tokens and the base 97, but lm_head\.weight is not in it"
        ):
            qorpo.merge(str(adapter), tmp_path / "merged", base=str(base))
        return
    reference = load(base)
    reference.resize_token_embeddings(103)
    ids = torch.tensor([[1, 98, 102, 5, 99]])
    expected = logits(PeftModel.from_pretrained(reference, adapter).eval(), ids)
    qorpo.merge(str(adapter), tmp_path / "merged", base=str(base), onto="original")
    model = load(tmp_path / "merged")
    assert model.config.vocab_size == 103
    close(logits(model, ids), expected)


MOE = SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2}
EXPERTS = {
    "mixtral": ("mixtral", MOE, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "qwen3-moe": (
        "qwen3_moe", SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8},
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
    "gpt-oss": (
        "gpt_oss", SMALL | {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
        ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPERTS)
def test_experts(name, make, tmp_path):
    kind, config, parameters = EXPERTS[name]
    base, adapter = make(
        build(kind, config), target_modules=["q_proj", "o_proj"], target_parameters=parameters
    )
    expected = logits(with_adapter(base, adapter))
    close(logits(with_adapter(base, adapter).merge_and_unload()), expected)
    close(merged_logits(base, adapter, tmp_path / "merged", onto="original"), expected)


@pytest.mark.parametrize("targets", ["all-linear", "all-linear+experts"])
def test_a_mixtures_adapter_as_peft_merges(targets, tmp_path):
    """Router untouched, and a dense layer's MLP of the same names as the experts' own."""
    config = SMALL | {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "mlp_only_layers": [0],
    }
    merged_as_pefts(build("qwen3_moe", config), targets, tmp_path)


def test_a_vision_language_model_stays_whole(tmp_path):
    model = build_gemma3_wrapper()
    names = set(model.state_dict())
    merged_as_pefts(model, "all-linear", tmp_path)
    assert set(AutoModelForImageTextToText.from_pretrained(tmp_path / "merged").state_dict()) == names


def merged_as_pefts(model, targets, folder):
    base = save_base(model, folder / "base")
    model = type(model).from_pretrained(base, dtype=torch.float32).eval()
    model.name_or_path = str(base)
    peft_model = attach_lora(model, rank=4, targets=targets).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    peft_model.save_pretrained(folder / "adapter")
    before = logits(load(base))
    expected = logits(peft_model.merge_and_unload())
    assert (expected - before).abs().max() > 1e-2
    close(merged_logits(base, folder / "adapter", folder / "merged", onto="original"), expected)
