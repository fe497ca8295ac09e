"""What a run leaves for others to open: adapters in PEFT's format, models and tokenizers in transformers'."""

import json
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel

from qorpo.data.chat_format import ChatFormat
from qorpo.engine.distributed import gathered


def save_whole_model(folder: Path, model: PreTrainedModel, dtype: torch.dtype, is_main: bool) -> None:
    """Write all parameters in `dtype` as transformers does, gathered one by one by all ranks into the main one."""
    tensors = {}
    for name, tensor in model.state_dict().items():
        full = gathered(tensor.to(dtype) if tensor.is_floating_point() else tensor)
        if is_main:
            tensors[name] = full
    if is_main:
        save_parameters(folder, model, tensors, dtype)


def save_parameters(
    folder: Path, model: PreTrainedModel, tensors: dict[str, torch.Tensor], dtype: torch.dtype
) -> None:
    """Write these tensors as the model's, with its config."""
    model.save_pretrained(str(folder), state_dict=tensors)
    config = folder / "config.json"
    saved = json.loads(config.read_text(encoding="utf-8"))
    saved["dtype"] = str(dtype).removeprefix(
        "torch."
    )  # transformers names the type of the float32 master weights
    config.write_text(json.dumps(saved, indent=2) + "\n", encoding="utf-8")


def save_tokenizer(folder: Path, chat: ChatFormat) -> None:
    """The tokenizer with its chat template, and generation_config.json with the tokens to stop at: the one that was
    learned, and the base's own, which may differ."""
    tokenizer = chat.tokenizer
    tokenizer.save_pretrained(str(folder))
    stops = dict.fromkeys([chat.stop_token_id, tokenizer.eos_token_id])
    GenerationConfig(
        eos_token_id=[stop for stop in stops if stop is not None],
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(str(folder))


def save_adapter(folder: Path, model: PeftModel, is_main: bool = True) -> None:
    """The adapter in PEFT's format; the base's embeddings stay out, since qorpo never resizes them.

    Where it is sharded all ranks gather it together, and the main one writes.
    """
    trained = {name: gathered(weight) for name, weight in model.named_parameters() if weight.requires_grad}
    if is_main:
        model.save_pretrained(str(folder), save_embedding_layers=False, state_dict=trained)
        _sort_sets(folder / "adapter_config.json")
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's blank card


def _sort_sets(path: Path) -> None:
    """PEFT writes its sets of names in an order that changes from process to process."""
    config = json.loads(path.read_text(encoding="utf-8"))
    for key in ("target_modules", "exclude_modules"):
        if isinstance(config.get(key), list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
