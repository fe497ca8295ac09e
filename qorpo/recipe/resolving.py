"""What `auto` stands for."""

import configparser
import contextlib
import importlib.util
import netrc
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from qorpo.recipe.keys import Recipe
from qorpo.recipe.reading import recipe_error

# Learning rate and epochs of all parameters: the paper's (Sec. 4.1, App. C). Objectives that it did not train take the
# nearest one's: with a reference DPO's, the others ORPO's.
FULL = {"orpo": (8e-6, 10.0), "sft": (1e-5, 1.0), "dpo": (5e-6, 3.0)}
# The rates of adapters; one epoch.
ADAPTERS = {"orpo": 1e-4}
LIKE_DPO = ("ipo", "kto", "mmpo", "sppo")


def rate_and_epochs(objective: str, *, full: bool) -> tuple[float, float]:
    """What `auto` of train.learning_rate and train.epochs stands for."""
    nearest = "dpo" if objective in LIKE_DPO else "orpo"
    if full:
        return FULL.get(objective, FULL[nearest])
    return ADAPTERS.get(objective, ADAPTERS.get(nearest, ADAPTERS["orpo"])), 1.0


def resolve(
    recipe: Recipe,
    *,
    device_type: str,
    installed: Callable[[str], bool] | None = None,
    can_page: bool = True,
) -> Recipe:
    """A copy with every `auto` replaced but those of model.attention, memory and (where it may be) model.liger, which
    are resolved as the model loads.

    `device_type` is torch's ("cuda", "cpu", …). `installed` tells whether a module can be imported,
    `can_page` whether the device's memory moves to the host by itself, as paged optimizer states need. Raises RecipeError where the recipe needs one that can't.
    """
    installed = installed or _importable
    full = recipe.tuning == "full"
    is_sharded = full or recipe.memory.sharding in ("full", "hybrid")  # bitsandbytes' optimizers can't be
    rate, epochs = rate_and_epochs(recipe.objective.name, full=full)
    meaning = {
        "model.quantization": "none" if full else "nf4",
        "memory.sharding": "full" if full else "none",
        "train.learning_rate": rate,
        "train.epochs": epochs,
        "train.optimizer": "adamw_torch_fused" if is_sharded or not can_page else "paged_adamw_8bit",
        "train.report_to": ["tensorboard"] if installed("tensorboard") else [],
    }
    liger_needs = {
        f"a CUDA device, and this is {device_type}": device_type == "cuda",
        "liger-kernel, which is not installed (pip install liger-kernel)": installed("liger_kernel"),
        "Triton, which is not installed (pip install triton)": installed("triton"),
    }
    liger_lacks = [need for need, is_met in liger_needs.items() if not is_met]
    if liger_lacks:
        meaning["model.liger"] = False
    for key, value in recipe.values():
        if value == "auto" and key in meaning:
            recipe = recipe.replace(key, meaning[key])

    problems = []
    if full and recipe.model.adapter is not None:
        problems.append(
            f"model.adapter: {recipe.model.adapter} can't be trained with all parameters; merge it (qorpo merge) and give the "
            "merged folder as model.path, or leave out --full (tuning: full)"
        )
    if recipe.model.liger is True and liger_lacks:
        problems.append(f"model.liger: true needs {liger_lacks[0]}; set it to auto")
    if full and recipe.model.quantization == "nf4":
        problems.append(
            "model.quantization: nf4 weights can't be trained; leave out --full (tuning: full), or set it to auto or none"
        )
    if recipe.lora.use_dora and not full and is_sharded:
        problems.append(
            "lora.use_dora: needs the base's whole weights on each GPU; set memory.sharding to none, or leave it out"
        )
    if recipe.memory.activation_offload is True and device_type != "cuda":
        problems.append(
            f"memory.activation_offload: true needs a CUDA device, and this is {device_type}; set it to auto"
        )
    for tracker in recipe.train.report_to:
        if not installed(tracker):
            package = "'qorpo[tracking]'" if tracker in ("tensorboard", "wandb") else tracker
            problems.append(
                f"train.report_to: {tracker} is not installed; pip install {package}, or leave it out"
            )
        elif tracker == "wandb" and not has_wandb_key():
            problems.append(
                "train.report_to: wandb has no key on this machine; wandb login, set WANDB_API_KEY or "
                "WANDB_MODE=offline, or leave it out"
            )
    if not installed("bitsandbytes"):
        quantization, optimizer = recipe.model.quantization, recipe.train.optimizer
        missing = "needs bitsandbytes, which is not installed; pip install bitsandbytes, or set"
        if quantization == "nf4":
            problems.append(f"model.quantization: {quantization} {missing} model.quantization: none")
        if not optimizer.startswith("adamw_torch"):
            problems.append(f"train.optimizer: {optimizer} {missing} train.optimizer: adamw_torch")
    if problems:
        raise recipe_error("recipe", problems)
    return recipe


def has_wandb_key() -> bool:
    """Whether W&B can log in, or was told not to: by its variables, its settings, or .netrc, as it looks itself."""
    if {"WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"} & os.environ.keys():
        return True
    parser = configparser.ConfigParser(interpolation=None, default_section="default")
    folders = (
        os.environ.get("WANDB_CONFIG_DIR", Path.home() / ".config" / "wandb"),
        Path(os.environ.get("WANDB_DIR", "."), "wandb"),
    )
    with contextlib.suppress(configparser.Error, UnicodeDecodeError):
        parser.read([Path(folder, "settings") for folder in folders], encoding="utf-8")
    settings = parser.defaults()
    if os.environ.get("WANDB_MODE", settings.get("mode")) in ("offline", "disabled", "dryrun"):
        return True
    server = os.environ.get("WANDB_BASE_URL") or settings.get("base_url") or "https://api.wandb.ai"
    file = os.environ.get("NETRC") or Path.home() / ("_netrc" if os.name == "nt" else ".netrc")
    with contextlib.suppress(OSError, netrc.NetrcParseError, UnicodeDecodeError):
        return netrc.netrc(file).authenticators(urlsplit(server).hostname or "") is not None
    return False


def _importable(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    # Without an origin it is a mere folder of that name, such as the ./wandb that wandb writes.
    return spec is not None and spec.origin is not None
