"""Tiny random models of the families that transformers knows, each keeping what makes it special."""

from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qorpo.model.parts import auto_class

# Taken where a family's configuration has the key. Windows are shorter than the rows, and every token has two experts.
TINY: dict[str, Any] = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.2, "sliding_window": 8, "window_size": 8, "attention_window_size": 8,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 24, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "n_shared_experts": 1, "num_shared_experts": 1, "shared_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "intermediate_size_mlp": 48, "expert_ffn_hidden_size": 24,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_num_heads": 8,
    "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 8, "state_size": 8, "num_heads": 8, "mamba_d_ssm": 64,
    "mamba_dt_rank": 4, "time_step_rank": 4, "lru_width": 32, "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97, "num_kv_shared_layers": 1, "laurel_rank": 8, "conv_L_cache": 3,
    "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 256, "n_inner": 48, "ffn_dim": 48, "d_model": 32,
    "word_embed_proj_dim": 32, "n_heads": 4, "n_layers": 4, "max_seq_len": 256, "num_layers": 4, "rotary_dim": 4,
    "kv_channels": 8, "dim_model_base": 16, "block_dim": 32, "block_ff_dim": 48,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "attention_dropout": 0.0, "hidden_dropout": 0.0,
    "dropout": 0.0, "activation_dropout": 0.0, "attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0,
}  # fmt: skip
TINY_VISION: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "depth": 2,
    "num_heads": 2, "image_size": 28, "patch_size": 14, "embed_dim": 16, "out_hidden_size": 32,
    "fullatt_block_indexes": [1], "deepstack_visual_indexes": [0, 1],
}  # fmt: skip

MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}  # of half a head's size
MLA = {"num_key_value_heads": 4}
OWN: dict[str, dict[str, Any]] = {
    "deepseek_v2": MLA | {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}, "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v3": MLA, "glm4_moe_lite": MLA, "longcat_flash": MLA, "minicpm3": MLA, "youtu": MLA,
    "axk1": MLA, "qwen3_moe": {"mlp_only_layers": [0]}, "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "nemotron": {"num_key_value_heads": 2}, "granite": {"logits_scaling": 4.0}, "cohere": {"logit_scale": 0.25},
    "bamba": {"attn_layer_indices": [1, 3]}, "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}, "llama": {"tie_word_embeddings": True},
    "llama4_text": {"attention_chunk_size": 8}, "gemma3n_text": {"intermediate_size": [48] * 4},
}  # fmt: skip

NAMES = [
    "afmoe",
    "apertus",
    "arcee",
    "aria_text",
    "axk1",
    "bamba",
    "biogpt",
    "bitnet",
    "bloom",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "cwm",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "diffllama",
    "doge",
    "dots1",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone4",
    "exaone_moe",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "flex_olmo",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma3_text",
    "gemma3n_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_oss",
    "gptj",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "internlm3",
    "internvl",
    "jamba",
    "jetmoe",
    "laguna",
    "lfm2",
    "lfm2_moe",
    "llama",
    "llama4_text",
    "llava",
    "longcat_flash",
    "mamba",
    "mamba2",
    "minicpm3",
    "minimax",
    "minimax_m2",
    "ministral3",
    "mistral",
    "mistral3",
    "mixtral",
    "mpt",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_5_vl",
    "qwen2_moe",
    "qwen2_vl",
    "qwen3",
    "qwen3_5",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_vl",
    "qwen3_vl_moe",
    "recurrent_gemma",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "vaultgemma",
    "xglm",
    "youtu",
    "zamba",
]


def tiny_config(name: str) -> PretrainedConfig:
    """The family's own configuration, with every size that it has made tiny."""
    kind = CONFIG_MAPPING[name]
    default = kind()
    keys = _filled(default, TINY)
    for part in getattr(kind, "sub_configs", None) or {}:
        if (inner := getattr(default, part, None)) is not None:
            keys[part] = _filled(inner, TINY if "text" in part else TINY_VISION)
            if part == "text_config" and name in ("qwen2_vl", "qwen2_5_vl", "glm4v"):
                keys[part]["rope_parameters"] = MROPE
    return kind(**keys | OWN.get(name, {}))


def _filled(default: PretrainedConfig, sizes: dict[str, Any]) -> dict[str, Any]:
    """What of `sizes` the configuration has and lets be told; some work out their kinds of layers by themselves."""
    kind = type(default)
    names = getattr(kind, "attribute_map", {})

    def can_be_told(key: str) -> bool:
        return not isinstance(getattr(kind, names.get(key, key), None), property)

    there = {
        key: value
        for key, value in sizes.items()
        if key.endswith("_token_id")
        or (hasattr(default, key) and can_be_told(key) and getattr(default, key) is not None)
    }
    kinds = getattr(default, "layer_types", None)
    if sizes is TINY and kinds is not None and can_be_told("layer_types"):
        there["layer_types"] = (list(dict.fromkeys(kinds)) * 4)[:4]
    return there


def tiny_model(name: str) -> Any:
    """In float32, with weights large enough that attention and routing matter."""
    config = tiny_config(name)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    return model
