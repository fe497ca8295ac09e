"""A base model and its tokenizer, from a local folder, a hub, or the embedded demo."""

import contextlib
import json
import logging
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights

from qorpo.errors import ModelError
from qorpo.manifest import MANIFEST, check_folder, read_manifest
from qorpo.model.nf4 import fix_dequantization, keep_quant_states, quantized_on_gpu
from qorpo.model.parts import auto_class
from qorpo.model.quantizer import four_bit_parameters, nf4_config, qorpos_quantizer
from qorpo.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

DEMO_BASE = Path(__file__).parent.parent / "demo" / "base"


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder, a hub id or `demo`.

    Raises:
        ModelError: where there is no tokenizer to be had.
    """
    source = model_source(path)
    if (
        Path(source).is_dir()
        and not any(Path(source).glob("tokenizer*"))
        and not any(Path(source).glob("vocab*"))
    ):
        raise ModelError(
            f"{source}: no tokenizer (tokenizer.json, tokenizer.model or vocab.*); copy the base's there"
        )
    if Path(source).is_dir():
        check_model_folder(Path(source), with_weights=False)
    else:
        ask_hub_once(source, revision)
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except Exception as error:  # tokenizers raise every kind there is, bare Exception included
        raise ModelError(f"{source}: no tokenizer could be loaded: {_first_line(error)}") from error


def load_config(path: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """The configuration of a model folder, a hub id or `demo`; no weights are needed.

    Raises:
        ModelError: where there is none to be had.
    """
    source = model_source(path)
    if Path(source).is_dir():
        _check_config(Path(source))
        check_model_folder(Path(source), with_weights=False)
    else:
        ask_hub_once(source, revision)
    try:
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ModelError(f"{source}: the model could not be loaded: {_first_line(error)}") from error


def load_model(
    path: str,
    *,
    revision: str | None = None,
    quantization: str = "nf4",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    empty: bool = False,
    to_be_sharded: bool = False,
) -> PreTrainedModel:
    """A causal language model in `dtype`, its linear layers in NF4 with double quantization if so asked.

    The output head, embeddings and norms keep their own type; only linear layers inside the trunk are quantized.

    Args:
        path: a local folder, a hub id (`org/name`), or `demo`.
        quantization: nf4 (bitsandbytes) or none.
        allow_pickle: also read `.bin` weights (by torch's weights-only reader).
        empty: leave the weights out, in memory that is not touched: another process has them.
        to_be_sharded: keep 4-bit weights so that FSDP2 can shard them, and quantize them on this process's GPU, where
            there is one, though they are to wait in host memory.

    Raises:
        ModelError: where the folder or id holds no model that can be read, with what to do.
    """
    config = load_config(path, revision=revision, trust_remote_code=trust_remote_code)
    if empty:
        with no_init_weights():
            return auto_class(config).from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    source = model_source(path)
    if Path(source).is_dir():
        check_weights_there(Path(source), allow_pickle)
        check_model_folder(Path(source))
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        if quantization == "nf4":
            options["quantization_config"] = nf4_config(config)
            if to_be_sharded:
                options[
                    "quantization_config"
                ].bnb_4bit_quant_storage = torch.bfloat16  # what is uint8 stays whole
        if not allow_pickle:
            options["use_safetensors"] = True
        with (
            quantized_on_gpu() if to_be_sharded else contextlib.nullcontext(),
            qorpos_quantizer(on_gpu=to_be_sharded),
            _without_load_report(),
        ):
            loaded: Any = auto_class(config).from_pretrained(
                source, config=config, dtype=dtype, device_map={"": torch.device(device)},
                output_loading_info=True, ignore_mismatched_sizes=True, **options,
            )  # fmt: skip
    except (pickle.UnpicklingError, EOFError) as error:  # torch's own words advise to run what is inside
        raise ModelError(
            f"{source}: the .bin weights are broken, or hold more than tensors; convert them to safetensors"
        ) from error
    except (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{source}: the model could not be loaded: {_first_line(error)}") from error
    model, report = loaded
    if getattr(model, "_hf_peft_config_loaded", False):  # of a hub id; local folders were looked at
        raise ModelError(
            f"model.path: {source} holds an adapter; give its base as model.path, and this as model.adapter"
        )
    _check_weights(source, model, report)
    if quantization == "nf4" and not keep_nf4_trainable(model):
        logger.warning("quantization: no layer of this model could be quantized; it trains in bfloat16")
    if to_be_sharded:
        keep_quant_states(model)
    model.requires_grad_(False)
    return model


def model_source(path: str) -> str:
    """A local folder or a hub id; raises ModelError for a path that is neither."""
    if path == "demo":
        return str(DEMO_BASE)
    local = Path(path).expanduser()
    if local.is_dir():
        return str(local)
    if local.exists():
        raise ModelError(
            f"model.path: {path} is a file; give the folder that holds config.json and the weights"
        )
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(
            f"model.path: there is no folder {path}; give a model folder, a hub id (org/name), or demo"
        )
    return path


def check_model_folder(folder: Path, *, with_weights: bool = True) -> None:
    """Hold a folder that qorpo wrote to its manifest; others have none. Of large files samples are read.

    Raises:
        DamageError: with each file that is damaged or missing.
    """
    remedy = f"make the model again, or remove {MANIFEST} if you changed it yourself"
    if (manifest := read_manifest(folder, remedy)) is None:
        return
    names = [name for name in manifest.files if with_weights or not name.endswith(".safetensors")]
    check_folder(folder, remedy, only=names, is_quick=True, for_people=["README.md"])


def ask_hub_once(name: str, revision: str | None, file: str = "config.json") -> None:
    """Raises ModelError where a model is neither cached nor in reach: transformers would retry for a minute."""
    if try_to_load_from_cache(name, file, revision=revision) is not None:
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, file, revision=revision), timeout=10)
    except HfHubHTTPError:
        pass  # the hub answered; transformers has the better words for what it said
    except Exception as error:  # of whichever HTTP library is underneath
        raise ModelError(
            f"{name}: there is no such folder, and the hub can't be reached ({_first_line(error)}); give a local folder"
        ) from error


def _check_config(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"model.path: {folder} holds an adapter (adapter_config.json), which would be loaded and then trained over; "
            "give its base as model.path, and this folder as model.adapter (or move that file away)"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: no config.json; give a folder that transformers can open")
    try:
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{folder / 'config.json'}: not JSON: {error}") from error


def check_weights_there(folder: Path, allow_pickle: bool) -> None:
    if any(folder.glob("*.safetensors")):
        return
    if not any(folder.glob("*.bin")):
        raise ModelError(f"{folder}: no weights (*.safetensors); is the download complete?")
    if not allow_pickle:
        raise ModelError(
            f"{folder}: weights only as .bin; convert them to safetensors, or set model.allow_pickle: true to read "
            "them by torch's weights-only reader"
        )


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Without transformers' table of what didn't fit: `_check_weights` says that in one line."""

    def is_other(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    theirs = logging.getLogger("transformers.modeling_utils")
    theirs.addFilter(is_other)
    try:
        yield
    finally:
        theirs.removeFilter(is_other)


def _check_weights(source: str, model: nn.Module, report: Mapping[str, Any]) -> None:
    """Raises ModelError for what transformers lets pass: it fills missing weights with random numbers, and takes
    weights of any shape where it quantizes them; warns of weights that the config has no place for.
    """
    if mismatched := sorted(report["mismatched_keys"]):
        name, there, expected = mismatched[0]
        raise ModelError(
            f"{source}: {len(mismatched)} weights have other shapes than config.json says, such as {name}: {tuple(there)}, "
            f"and by config.json {tuple(expected)}; config.json and weights are not one model's"
        )
    if missing := report["missing_keys"]:
        raise ModelError(
            f"{source}: {len(missing)} weights are missing, such as {min(missing)}; is the download complete?"
        )
    if unused := report["unexpected_keys"]:
        logger.warning(
            "%s: %d weights are not used, such as %s: config.json has no place for them; is it this model's?",
            source, len(unused), min(unused),
        )  # fmt: skip
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and tuple(state.shape) != (module.out_features, module.in_features):
            raise ModelError(
                f"{source}: {name} has weights of {tuple(state.shape)}, and by config.json "
                f"{(module.out_features, module.in_features)}; config.json and weights are not one model's"
            )


def keep_nf4_trainable(model: nn.Module) -> int:
    """Keep bitsandbytes from what makes training on the CPU silently wrong; returns how many parameters are in 4 bits.

    On processors with avx512_bf16 evaluation would repack weights for a kernel that has no autograd, and a later
    training forward would run it. On those with AVX-512 rows of some lengths are dequantized wrongly.
    """
    quantized = four_bit_parameters(model)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if quantized:
        fix_dequantization()
    return len(quantized)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"
    return lines[0] if lines else type(error).__name__


def read_chat_template(path: str | None) -> str | None:
    """The Jinja text of a template file, or None for none."""
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"model.chat_template: {path} can't be read: {_first_line(error)}") from error
