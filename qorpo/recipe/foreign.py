"""Recipes of other trainers, given by mistake: recognised by their keys, each named beside qorpo's."""

from collections.abc import Mapping
from typing import Any

_SHARED = {
    "learning_rate": "train.learning_rate",
    "max_steps": "train.max_steps",
    "weight_decay": "train.weight_decay",
    "max_grad_norm": "train.max_grad_norm",
    "save_total_limit": "train.keep_checkpoints",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "output_dir": "output",
    "gradient_checkpointing": "memory.activation_checkpointing",
}
_TRANSFORMERS = _SHARED | {
    "model_name_or_path": "model.path",
    "per_device_train_batch_size": "train.pairs_per_step (times gradient_accumulation_steps and devices)",
    "gradient_accumulation_steps": "train.pairs_per_step",
    "num_train_epochs": "train.epochs",
    "lr_scheduler_type": "train.schedule",
    "warmup_ratio": "train.warmup_ratio",
    "optim": "train.optimizer",
    "eval_steps": "train.eval_every",
    "save_steps": "train.save_every",
    "report_to": "train.report_to",
    "eval_dataset": "data.eval",
}
# By the trainer; its first keys are those that no other one has.
KEYS: dict[str, dict[str, str]] = {
    "Axolotl": {"base_model": "model.path", "sequence_len": "data.max_length", "num_epochs": "train.epochs"}
    | _SHARED
    | {
        "load_in_4bit": "model.quantization: nf4",
        "chat_template": "model.chat_template (a Jinja file)",
        "adapter": "tuning",
        "lora_r": "lora.rank",
        "lora_target_linear": "lora.targets: all-linear",
        "lora_modules_to_save": "lora.modules_to_save",
        "rl": "objective.name",
        "orpo_alpha": "objective.lambda",
        "datasets": "data.train",
        "test_datasets": "data.eval",
        "val_set_size": "data.eval",
        "micro_batch_size": "train.pairs_per_step (times gradient_accumulation_steps and devices)",
        "gradient_accumulation_steps": "train.pairs_per_step",
        "lr_scheduler": "train.schedule",
        "warmup_ratio": "train.warmup_ratio",
        "optimizer": "train.optimizer",
        "evals_per_epoch": "train.eval_every",
        "saves_per_epoch": "train.save_every",
    },
    "LLaMA-Factory": {"stage": "objective.name", "finetuning_type": "tuning", "cutoff_len": "data.max_length"}
    | _TRANSFORMERS
    | {
        "quantization_bit": "model.quantization: nf4",
        "template": "model.chat_template (a Jinja file)",
        "flash_attn": "model.attention",
        "enable_liger_kernel": "model.liger",
        "lora_rank": "lora.rank",
        "lora_target": "lora.targets",
        "additional_target": "lora.modules_to_save",
        "pref_loss": "objective.name",
        "pref_beta": "objective.lambda",
        "dataset": "data.train (dataset_info.json:NAME)",
        "val_size": "data.eval",
    },
    "TRL": {"dataset_name": "data.train", "use_peft": "tuning", "lora_target_modules": "lora.targets"}
    | _TRANSFORMERS
    | {
        "load_in_4bit": "model.quantization: nf4",
        "attn_implementation": "model.attention",
        "use_liger_kernel": "model.liger",
        "lora_r": "lora.rank",
        "lora_modules_to_save": "lora.modules_to_save",
        "beta": "objective.lambda",
        "max_length": "data.max_length",
        "max_prompt_length": "data.max_prompt_length",
    },
}
NUM_MARKS = 3


def recognised(raw: Mapping[str, Any]) -> list[str]:
    """What to say of a recipe of another trainer: a line, then a line a key; nothing where it is none."""
    if isinstance(raw.get("model"), dict):
        return []
    names = [str(name) for name in raw]
    for trainer, keys in KEYS.items():
        marks = set(list(keys)[:NUM_MARKS])
        known = [name for name in names if name in keys]
        if marks & set(known) and len(known) >= 2:
            others = [name for name in names if name not in keys]
            lines = [f"{name} is {keys[name]} here" for name in known]
            rest = f"; leave out what has no counterpart: {', '.join(others[:12])}" if others else ""
            return [
                f"this is a recipe of {trainer}; write these keys as qorpo has them (qorpo keys){rest}",
                *lines,
            ]
    return []
