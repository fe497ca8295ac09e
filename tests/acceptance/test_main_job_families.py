"""The main job on a mixture of experts and on a vision-language model, tiny and random, in 4 bits."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from chain import adapters
from rows import COMMITTED
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qorpo.model.load import DEMO_BASE, load_config
from qorpo.model.parts import auto_class

pytest.importorskip("bitsandbytes")

TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.1,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": TEXT | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    "gemma3": {
        "text_config": TEXT | {"sliding_window": 16, "query_pre_attn_scalar": 16},
        "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 1,
    },
}  # fmt: skip


def make_model(model_type: str, folder: Path) -> Path:
    """A random model with the demo's tokenizer."""
    demo = load_config("demo")
    tokens = {
        key: getattr(demo, key) for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
    }
    keys = MODELS[model_type]
    keys = keys | {"text_config": keys["text_config"] | tokens} if "text_config" in keys else keys | tokens
    torch.manual_seed(0)
    config = CONFIG_MAPPING[model_type](**keys)
    auto_class(config).from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_BASE / file, folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODELS)
def test_adapters(model_type: str, tmp_path: Path):
    row = replace(
        COMMITTED[1],
        name=model_type,
        model={"path": make_model(model_type, tmp_path / "base")},
        changes={"learning_rate": 0.004},
    )
    adapters(row, tmp_path)
