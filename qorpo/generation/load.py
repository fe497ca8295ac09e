"""A run, an adapter, a merged folder or any model, opened to answer: model, tokenizer, and the tokens to stop at."""

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qorpo.build import with_remote_code
from qorpo.data.chat_format import ChatFormat
from qorpo.engine.device import computing_device
from qorpo.errors import RecipeError, RunError
from qorpo.identity import base_identity, chat_identity
from qorpo.manifest import sha256_of
from qorpo.merging.output import tokenizer_folder
from qorpo.merging.source import Base, Trained, find_base, find_trained
from qorpo.merging.verify import with_adapters
from qorpo.model.load import load_model, load_tokenizer, read_chat_template
from qorpo.model.mixed_precision import compute_in_float32
from qorpo.out_of_memory import advised
from qorpo.recipe import load_recipe

QUANTIZATIONS = ("auto", "nf4", "none")
DTYPES = ("auto", "bfloat16", "float32")


@dataclass(frozen=True)
class Opened:
    """What a MODEL on the command line stands for; nothing of its weights is read yet."""

    name: str
    path: str  # of the base, or of the model itself
    revision: str | None
    quantization: str  # nf4 or none
    dtype: str  # that it computes in: float32, bfloat16, or auto
    trust_remote_code: bool
    allow_pickle: bool
    trained: Trained | None = None  # the adapter that goes onto the base
    base: Base | None = None

    @cached_property
    def chat(self) -> ChatFormat:
        """The tokenizer with the chat template that was learned."""
        if self.trained is None or self.base is None:
            return ChatFormat(
                load_tokenizer(self.path, revision=self.revision, trust_remote_code=self.trust_remote_code)
            )
        folder = tokenizer_folder(self.base, [self.trained])
        tokenizer = load_tokenizer(str(folder), trust_remote_code=self.trust_remote_code)
        recipe = self.trained.recipe if folder == self.base.folder else None  # a checkpoint brings none
        return ChatFormat(tokenizer, read_chat_template(recipe.model.chat_template) if recipe else None)

    def model(self, device: torch.device | str | None = None) -> Any:
        """Ready to answer: in eval mode, on the card where there is one."""
        device = torch.device(device) if device else computing_device()
        with advised("take a smaller model or --quantization nf4, or close what else needs memory"):
            model: Any = load_model(
                self.path, revision=self.revision, quantization=self.quantization, device=device,
                trust_remote_code=self.trust_remote_code, allow_pickle=self.allow_pickle,
            )  # fmt: skip
            if self.dtype == "float32" or (self.dtype == "auto" and device.type == "cpu"):
                compute_in_float32(model)
            if self.trained is not None:
                model = with_adapters(model, [self.trained.adapter])
        stops, pad = stop_tokens(model, self.chat), self.chat.tokenizer.pad_token_id
        model.generation_config.eos_token_id = stops
        model.generation_config.pad_token_id = stops[0] if pad is None else pad
        return model.eval()

    def identity(self) -> dict[str, Any]:
        """What answers depend on, to be compared later; JSON."""
        adapter = self.trained.adapter.folder if self.trained else None
        names = sorted(path.name for path in adapter.glob("adapter_*")) if adapter else []
        return {
            "base": base_identity(self.path, self.revision) or self.path,
            "adapter": {name: sha256_of(adapter / name) for name in names if adapter},
            "quantization": self.quantization,
            "dtype": self.dtype,
            **chat_identity(self.chat),
        }


def find_model(
    path: str | os.PathLike[str],
    *,
    quantization: str = "auto",
    dtype: str = "auto",
    base: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Opened:
    """The model that a path stands for; manifests are checked as `merge` does. Arguments and errors as `load`."""
    if quantization not in QUANTIZATIONS:
        raise RecipeError(f"--quantization: got {quantization!r}; expected {', '.join(QUANTIZATIONS)}")
    if dtype not in DTYPES:
        raise RecipeError(f"--dtype: got {dtype!r}; expected {', '.join(DTYPES)}")
    folder = Path(path).expanduser()
    trust: Any = {"allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code}
    name = folder.name or str(path)
    is_trained = (folder / "recipe.yaml").is_file() or (folder / "adapter_config.json").is_file()
    if not is_trained and folder.parent.name == "checkpoints" and not (folder / "config.json").is_file():
        is_trained = True  # `find_trained` says what to do about one of full tuning
    if (folder / "recipe.yaml").is_file() and load_recipe(folder / "recipe.yaml").tuning == "full":
        with_remote_code(load_recipe(folder / "recipe.yaml"), folder / "recipe.yaml", trust_remote_code)
        if not (folder / "model").is_dir():
            raise RunError(
                f"{folder}: its model is not written yet; finish the run by --resume, or use qorpo export"
            )
        path, is_trained = folder / "model", False
    if not is_trained:
        if base is not None:
            raise RecipeError(
                f"--base: {path} is a whole model, with no adapter to put on a base; leave it out"
            )
        kept = "none" if quantization == "auto" else quantization
        return Opened(name, str(path), revision, kept, dtype, **trust)
    trained = find_trained(str(folder), **trust)
    found = find_base([trained], base, revision, **trust)
    if quantization == "auto":
        quantization = _trained_in(trained)
    if trained.run is not None and name == "adapter":
        name = trained.run.name
    return Opened(name, str(found.folder), None, quantization, dtype, trained=trained, base=found, **trust)


def _trained_in(trained: Trained) -> str:
    """The base's quantization in training, as the run or the adapter's manifest knows it; else none."""
    if trained.recipe is not None:
        known: Any = trained.recipe.model.quantization
    else:
        known = (trained.belongs_to.get("recipe") or {}).get("model.quantization")
    return known if known in ("nf4", "none") else "none"


def load(
    path: str | os.PathLike[str],
    *,
    quantization: str = "auto",
    dtype: str = "auto",
    base: str | None = None,
    revision: str | None = None,
    device: torch.device | str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Model and tokenizer of a run, an adapter, a merged folder or any model, ready to answer.

    The adapter is attached to its base. The tokenizer has the chat template that was learned, and the model's
    `generate` stops at the token that was learned.

    Args:
        path: a run's folder, its adapter or a checkpoint; an adapter in PEFT's format; a model's folder or hub id; demo.
        quantization: nf4, none, or auto: as the run trained, and a model of its own or an adapter by others in 16 bits.
        dtype: bfloat16, as training computes, or float32, in which answers don't depend on the batch; the weights are
            the same. auto: float32 on the CPU, where it costs little, else bfloat16.
        base: where the base of an adapter is now.
        revision: branch, tag or commit of a hub's model.
        device: None: a CUDA card that computes bfloat16, else the CPU.
        allow_pickle: also read .bin weights (by torch's weights-only reader).
        trust_remote_code: run code that comes with the model; what a run's recipe says of it counts for nothing.

    Raises:
        QorpoError: what the user can fix; damaged files are named before weights are read.
    """
    opened = find_model(
        path, quantization=quantization, dtype=dtype, base=base, revision=revision,
        allow_pickle=allow_pickle, trust_remote_code=trust_remote_code,
    )  # fmt: skip
    return opened.model(device), opened.chat.tokenizer


def stop_tokens(model: Any, chat: ChatFormat) -> list[int]:
    """Ids that end an answer: the one that the template closes it with, then EOS and the model's own."""
    own = model.generation_config.eos_token_id
    ids = [chat.stop_token_id, chat.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return [token for token in dict.fromkeys(ids) if token is not None]
