"""What of a model is adapted and quantized: its language model, without routers, and experts only by choice."""

import pytest
import torch
from helpers.architectures import SMALL, build_gemma3_wrapper
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qorpo.data.groups import Group
from qorpo.data.pack import pack_groups
from qorpo.model.adapters import attach_lora
from qorpo.model.load import load_model
from qorpo.model.mixed_precision import train_all
from qorpo.model.parts import decoder_layers, linear_layers, stacked_experts
from qorpo.model.quantizer import four_bit_parameters
from qorpo.model.selfcheck import make_scorer

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {"num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 1, "topk_group": 1}  # fmt: skip
# model_type: its config, and what all-linear must reach beside attention.
MIXTURES = {
    "mixtral": ({"num_local_experts": 4}, set()),
    "qwen2_moe": ({"num_experts": 4, "shared_expert_intermediate_size": 24}, {"gate_proj", "up_proj", "down_proj"}),
    "qwen3_moe": ({"num_experts": 4, "mlp_only_layers": [0]}, {"gate_proj", "up_proj", "down_proj"}),
    "deepseek_v2": ({"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, **MLA}, {"gate_proj", "up_proj", "down_proj"}),
    "deepseek_v3": ({"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, **MLA}, {"gate_proj", "up_proj", "down_proj"}),
    "glm4_moe": ({"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8}, {"gate_proj", "up_proj", "down_proj"}),
    "olmoe": ({"num_experts": 4}, set()),
    "phimoe": ({"num_local_experts": 4}, set()),
    "llama4_text": ({"num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 8}, {"gate_proj", "up_proj", "down_proj"}),
    "gpt_oss": ({"num_local_experts": 4, "head_dim": 8}, set()),
    "granitemoe": ({"num_local_experts": 4}, set()),
}  # fmt: skip


def mixture(model_type: str):
    config = CONFIG_MAPPING[model_type](**SMALL | EXPERTS | MIXTURES[model_type][0])
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_all_linear_of_a_mixture_is_attention_and_dense_mlps(model_type):
    model = mixture(model_type)
    stacks = [f"{name}.{parameter}" for name, _, parameter in stacked_experts(model)]
    assert stacks
    peft_model = attach_lora(model, rank=2)
    adapted = {
        name.split(".lora_")[0].removeprefix("base_model.model.")
        for name, parameter in peft_model.named_parameters()
        if parameter.requires_grad
    }
    attention = {name for name in adapted if "attn" in name}
    assert attention
    assert {name.rsplit(".", 1)[1] for name in adapted - attention} == MIXTURES[model_type][1]
    ids = torch.arange(1, 41)[None]
    peft_model.train()(ids).logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in peft_model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_experts_learn_by_choice_and_routers_never(model_type):
    peft_model = attach_lora(mixture(model_type), rank=2, targets="all-linear+experts").train()
    trained = {name: each for name, each in peft_model.named_parameters() if each.requires_grad}
    of_experts = [name for name in trained if ".experts." in name]
    assert of_experts
    assert not [name for name in trained if "router" in name or ".gate." in name]
    for name, parameter in trained.items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(1, 41)[None]
    logits = peft_model(ids).logits
    logits.square().mean().backward()
    assert all(trained[name].grad.abs().sum() > 0 for name in of_experts)
    merged = peft_model.merge_and_unload()
    assert torch.allclose(merged(ids).logits, logits, atol=2e-5)


def test_of_a_vision_language_model_only_the_language_model():
    model = build_gemma3_wrapper()
    assert all(name.startswith("model.language_model.layers.") for name in linear_layers(model))
    assert len(decoder_layers(model)) == SMALL["num_hidden_layers"]
    for targets in ("all-linear", ["q_proj", "v_proj"]):
        peft_model = attach_lora(model, rank=2, targets=targets)
        trained = [name for name, parameter in peft_model.named_parameters() if parameter.requires_grad]
        assert trained
        assert all(".language_model." in name for name in trained)
        model = peft_model.unload()
    train_all(model)
    assert not [each for each in model.model.vision_tower.parameters() if each.requires_grad]
    assert all(each.requires_grad for each in model.model.language_model.parameters())


def test_a_vision_language_model_is_scored_in_training_as_by_its_own_forward():
    peft_model = attach_lora(build_gemma3_wrapper(), rank=2)
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    scorer = make_scorer(peft_model.eval())
    assert scorer.mode == "sdpa"
    packed = pack_groups(
        [Group((5, 6, 7) * 4, ((8, 9), (10, 11, 12)), "a:1"), Group((3,), ((4, 5), (7,)), "a:2")]
    )
    with torch.no_grad():
        own = scorer(packed, by_own_logits=True)
    scorer.train()
    with scorer.packed_attention():
        logps = scorer(packed)
        logps.sum().backward()
    assert (logps - own).abs().max() < 2e-5
    assert all(each.grad is not None for each in peft_model.parameters() if each.requires_grad)


def test_a_vision_tower_stays_in_16_bits(tmp_path):
    pytest.importorskip("bitsandbytes")
    build_gemma3_wrapper().to(torch.bfloat16).save_pretrained(tmp_path)
    packed = four_bit_parameters(load_model(str(tmp_path)))
    assert len(packed) == 7 * SMALL["num_hidden_layers"]
    assert all(name.startswith("model.language_model.layers.") for name in packed)
