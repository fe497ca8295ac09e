"""An adapter to go on from, by its folder: a run, the adapter in it, a checkpoint, a folder in PEFT's format, a hub id.

Only its config is read here; `adapters.continue_lora` puts its weights on a model.
"""

import dataclasses
import json
import warnings
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError, safe_open

from qorpo.errors import ModelError
from qorpo.manifest import MANIFEST
from qorpo.model.load import ask_hub_once
from qorpo.model.targets import EXPERTS
from qorpo.storage import recover

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Other ways to begin have changed the base's weights, which the folder does not hold.
KNOWN_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")
# What of PEFT's config training takes as it is; of the rest only the defaults.
TAKEN = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora", "init_lora_weights",
    "rank_pattern", "alpha_pattern", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern",
    "fan_in_fan_out", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_type",
    "peft_version", "runtime_config", "eva_config",
}  # fmt: skip


def find_adapter(path: str) -> Path:
    """The folder with adapter_config.json that `model.adapter` names.

    Raises:
        ModelError: where there is none, with what to do.
    """
    folder = Path(path).expanduser()
    if (folder / "recipe.yaml").is_file():
        recover(folder)
        if (folder / "adapter" / CONFIG).is_file():
            return folder / "adapter"
        if (folder / "model").is_dir():
            raise ModelError(
                f"model.adapter: {path} trained all parameters; give {folder / 'model'} as model.path instead"
            )
        raise ModelError(
            f"model.adapter: {path} has no adapter yet; finish the run by --resume, or give a checkpoint of it"
        )
    if (folder / CONFIG).is_file():
        return folder
    if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ModelError(
            f"model.adapter: {path} holds no run and no adapter ({CONFIG}); give a run's folder, an adapter's, or a hub id"
        )
    return _downloaded(path)


@lru_cache(maxsize=8)
def _downloaded(name: str) -> Path:
    ask_hub_once(name, None, CONFIG)
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, WEIGHTS, MANIFEST]))
    except Exception as error:  # of whichever HTTP library is underneath
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"model.adapter: {name} is no folder, and can't be had from the hub: {reason}"
        ) from error


def read_adapter_config(folder: Path) -> LoraConfig:
    """PEFT's config of an adapter that can be trained on.

    Raises:
        ModelError: where it is damaged, no LoRA, or LoRA of a kind that can't, by the name of what is in the way.
    """
    try:
        kind = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["peft_type"]
        if kind != "LORA":
            raise ModelError(f"model.adapter: {folder} is a {kind} adapter; qorpo trains LoRA")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config: Any = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ModelError(f"model.adapter: {folder / CONFIG} can't be read: {error}") from error
    usual = LoraConfig()
    strange = [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in TAKEN and getattr(config, field.name) != getattr(usual, field.name, None)
    ]
    if config.init_lora_weights not in KNOWN_BEGINNINGS:
        strange.append(f"init_lora_weights {config.init_lora_weights}")
    if strange:
        raise ModelError(
            f"model.adapter: {folder} has {', '.join(strange)}, which qorpo can't train on; merge it with what made it, and "
            "give the result as model.path"
        )
    if not (folder / WEIGHTS).is_file():
        raise ModelError(f"model.adapter: {folder} has no {WEIGHTS}; is the adapter whole?")
    config.task_type, config.inference_mode = "CAUSAL_LM", False
    return config


def stored_names(folder: Path) -> list[str]:
    """Names of the adapter's tensors.

    Raises:
        ModelError: where the file is damaged.
    """
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            return [*file.keys()]
    except (OSError, SafetensorError) as error:
        raise ModelError(f"model.adapter: {folder / WEIGHTS} can't be read: {error}") from error


def lora_keys(config: LoraConfig) -> dict[str, Any]:
    """A config in the words of a recipe's lora section (but for how it began); targets by the last part of their names."""
    names: Any = config.target_modules or ()
    if config.target_parameters:
        targets: Any = EXPERTS
    elif isinstance(names, str):
        targets = "all-linear" if names == "all-linear" else [names]
    else:
        targets = ends_of(names)
    alpha = config.lora_alpha
    return {
        "rank": config.r,
        "alpha": int(alpha) if alpha == int(alpha) else alpha,
        "dropout": config.lora_dropout,
        "targets": targets,
        "modules_to_save": sorted(config.modules_to_save or ()),
        "use_rslora": config.use_rslora,
        "use_dora": config.use_dora,
    }


def ends_of(names: Iterable[str]) -> list[str]:
    """Modules by the last part of their names, each once."""
    return sorted({name.rsplit(".", 1)[-1] for name in names})
