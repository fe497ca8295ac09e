"""Models by shape: random weights, made on the device a layer at a time, so that nothing is downloaded."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from _record import ROOT
from tokenizers import Tokenizer, models
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedTokenizerFast

from qorpo.model.load import keep_nf4_trainable
from qorpo.model.parts import decoder_layers
from qorpo.planning.fake_model import shortened

# By the models whose published config.json has the shape; Llama 3 and 3.1 differ in their positions alone.
PUBLISHED = {
    "llama-3-8b": "meta-llama/Llama-3.1-8B",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "qwen2.5-14b": "Qwen/Qwen2.5-14B",
    "qwen2.5-32b": "Qwen/Qwen2.5-32B",
}
TINY: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
}
SHAPES = [*PUBLISHED, "tiny"]


def config_of(shape: str) -> PretrainedConfig:
    if shape == "tiny":
        return AutoConfig.for_model(**TINY)
    published = json.loads((ROOT / "configs" / "published.json").read_text(encoding="utf-8"))
    return AutoConfig.for_model(**published[PUBLISHED[shape]])


def random_model(
    config: PretrainedConfig,
    device: torch.device,
    *,
    quantization: str = "nf4",
    made_on: torch.device | None = None,
) -> Any:
    """A causal language model as `load_model` would leave it, of random weights; at most one layer is unquantized.

    Args:
        quantization: nf4 (the trunk's linear layers, with double quantization) or none; the rest is bfloat16.
        made_on: where weights are drawn; the same come out on every device if that is the CPU.
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        (first,) = decoder_layers(AutoModelForCausalLM.from_config(shortened(config, 1)))
    with bfloat16_on(made_on or device):
        model = AutoModelForCausalLM.from_config(
            shortened(config, 0), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    whole = model.config  # the layers hold on to it, to learn how they attend
    for name in {"num_hidden_layers", "layer_types"} & vars(config).keys():
        setattr(whole, name, getattr(config, name))
    for index in range(config.num_hidden_layers):
        with bfloat16_on(made_on or device):
            layer = type(first)(whole, index)
        if quantization == "nf4":
            quantize(layer, device)
        model.model.layers.append(layer.to(device))
    whole.use_cache = False
    if quantization == "nf4":
        model.is_loaded_in_4bit = True  # what PEFT asks for
        keep_nf4_trainable(model)
    model.requires_grad_(False)
    return model.to(device)


@contextmanager
def bfloat16_on(device: torch.device) -> Iterator[None]:
    """Modules made inside are bfloat16 and there. Not for quantizing: its tables are float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def quantize(layer: nn.Module, device: torch.device) -> None:
    """Replace every linear layer inside by its NF4 form."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for module in list(layer.modules()):
        for name, linear in list(module.named_children()):
            if type(linear) is not nn.Linear:
                continue
            packed = Linear4bit(
                linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                device="meta",
            )  # fmt: skip
            weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=packed)
            packed.weight = weight.to(device)  # quantized here, its statistics too
            packed.bias = linear.bias
            setattr(module, name, packed)


def plain_tokenizer() -> PreTrainedTokenizerFast:
    """The smallest tokenizer with a chat template: the pairs are tokens already."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")),
        unk_token="<unk>", bos_token="<s>", eos_token="</s>",
    )  # fmt: skip
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return tokenizer
