"""Small random models of every architecture that qorpo claims, in float64, by name."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qorpo.model.parts import auto_class

SMALL = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
OPT = {
    "vocab_size": 97, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "max_position_embeddings": 128, "dropout": 0.0, "word_embed_proj_dim": 32, "pad_token_id": 1,
}  # fmt: skip

# name: (model_type, config). Windows are shorter than the test's rows, caps and scales far from neutral.
SHARED = {
    "llama": ("llama", SMALL),
    "llama-tied": ("llama", SMALL | {"tie_word_embeddings": True}),
    "mistral-window": ("mistral", SMALL | {"sliding_window": 5}),
    "qwen2": ("qwen2", SMALL),
    "qwen2-mixed-windows": ("qwen2", SMALL | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("qwen3", SMALL | {"head_dim": 16}),
    "gemma2": ("gemma2", SMALL | {"head_dim": 8, "sliding_window": 4, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0}),
    "gemma3": ("gemma3_text", SMALL | {"head_dim": 8, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"] * 1 + ["sliding_attention"]}),
    "phi": ("phi", {**SMALL, "resid_pdrop": 0.0}),
    "phi3": ("phi3", SMALL | {"sliding_window": 6}),
    "opt": ("opt", OPT),
    "opt-350m-kind": ("opt", OPT | {"word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "gpt2": ("gpt2", {"vocab_size": 97, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
    "gpt-neox": ("gpt_neox", {k: v for k, v in SMALL.items() if k != "num_key_value_heads"}),
    "cohere": ("cohere", SMALL | {"logit_scale": 0.25}),
    "granite": ("granite", SMALL | {"logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "olmo2": ("olmo2", SMALL),
}  # fmt: skip


def build(name_or_type: str, config: dict | None = None, **changes) -> PreTrainedModel:
    """A random model in float64, evaluation mode; weights large enough that attention matters."""
    model_type, settings = SHARED[name_or_type] if config is None else (name_or_type, config)
    torch.manual_seed(0)
    settings = {**settings, "initializer_range": 0.2, **changes}
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**settings))
    if getattr(model.config, "attn_logit_softcapping", None):
        model.set_attn_implementation(
            "eager"
        )  # SDPA has no soft cap, and transformers before 5.23 doesn't mind
    return model.double().eval()


def build_gemma3_wrapper() -> PreTrainedModel:
    """A vision-language model: Gemma-3 with its vision tower, in float32."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING["gemma3"](
        text_config=SMALL | {"head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8, "initializer_range": 0.2},
        vision_config={"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        mm_tokens_per_image=1, initializer_range=0.2,
    )  # fmt: skip
    return auto_class(config).from_config(config, dtype=torch.float32).eval()
