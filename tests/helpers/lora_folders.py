"""Small bases and adapters of every kind, as folders, and what transformers and PEFT make of them in float32."""

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

IDS = torch.arange(1, 25)[None] * 3 % 97


def save_base(
    model: PreTrainedModel, folder: Path, dtype: torch.dtype = torch.float32, **options: Any
) -> Path:
    model.to(dtype).save_pretrained(folder, **options)
    return folder


def add_adapter(model: PreTrainedModel, base: Path, folder: Path, seed: int = 1, **settings: Any) -> Path:
    """A LoRA adapter with weights as if trained: nothing of it is zero. Uses the model up."""
    config = LoraConfig(
        **{"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    )
    torch.manual_seed(seed)
    model.name_or_path = str(base)
    peft_model = get_peft_model(model, config)
    with torch.no_grad():
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    peft_model.save_pretrained(folder)
    return folder


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def with_adapter(base: Path, adapter: Path) -> PeftModel:
    return PeftModel.from_pretrained(load(base), adapter).eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits
