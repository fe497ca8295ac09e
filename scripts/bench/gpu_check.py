"""The parts of gpu_check.sh, one a call: what qorpo does on a CUDA device.

    python scripts/bench/gpu_check.py --part train [--cap-gib 24] [--output FILE]
    python scripts/bench/gpu_check.py --part losses --device cpu --tiny

Parts:
    tests   pytest -m gpu
    train   qorpo.Trainer on the shape of Llama-3-8B: random weights, made on the device a layer at a time and held in
            NF4, LoRA rank 16 on all linear layers, paged 8-bit AdamW, pairs of 2 × 2,048 tokens (prompt 1,024 and two
            answers of 1,024), under a cap on what PyTorch may allocate. The cap leaves out the CUDA context (about
            half a GiB) and the paged optimizer states, which bitsandbytes allocates by itself.
    losses  a small model's losses over a few steps, on the device and on the CPU: no more than LOSS_TOLERANCE apart
    head    head.py at 4,096 tokens × 4,096 × 128,256 in bfloat16

`--device cpu --tiny` runs the same code on a tiny shape, which proves that it runs and measures nothing. No figure of
these parts has been measured on a GPU yet.
"""

import argparse
import json
import multiprocessing
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _record import ROOT, add_output_option, emit
from tokenizers import Tokenizer, models
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import qorpo
from qorpo.data.pack import PairLengths
from qorpo.data.records import DataReport
from qorpo.data.tokenize import Tokenized, TokenizedPair
from qorpo.planning.auto import planned_bytes
from qorpo.recipe import load_recipe
from qorpo.training.progress import Progress

LLAMA_3_8B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}
SMALL: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that a wrong digit shows in the loss
}
PAIR_TOKENS = (1024, 1024, 1024)  # prompt, chosen, rejected
SMALL_PAIR_TOKENS = (32, 24, 16)
PAIRS_PER_STEP = 4
STEPS = 6

# Nats a token, while the loss falls by several: bfloat16 has 8 bits, the CPU's and the GPU's kernels round differently,
# and steps carry it on. Two ways of attending on the CPU, or float32 in its place, were 0.004 apart.
LOSS_TOLERANCE = 0.02

HEAD = shlex.split("--tokens 4096 --hidden 4096 --vocab 128256 --dtype bfloat16 --chunk-tokens 512")
TINY_HEAD = shlex.split("--tokens 64 --hidden 32 --vocab 512 --repeats 2 --sides plain,qorpo,products")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=list(PARTS), required=True)
    parser.add_argument("--cap-gib", type=float, default=24.0, help="most memory PyTorch may take on the GPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to see that the code runs")
    add_output_option(parser)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch sees no CUDA device; nothing was measured", file=sys.stderr)
        return 2
    return 0 if PARTS[options.part](options) else 1


# --- the parts: each says whether it went well ---


def check_tests(options: argparse.Namespace) -> bool:
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch) / "report.xml"
        options_text = "-q -p no:cacheprovider --continue-on-collection-errors -m gpu tests"
        command = [sys.executable, "-m", "pytest", *shlex.split(options_text), f"--junitxml={report}"]
        status = subprocess.run(command, cwd=ROOT, stdout=sys.stderr).returncode
        if not report.exists():
            return False  # pytest is not installed
        (suite,) = xml.etree.ElementTree.parse(report).getroot()
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    emit("gpu_tests", {}, counts | {"seconds": float(suite.attrib["time"])}, options.device, options.output)
    return status == 0


def check_train(options: argparse.Namespace) -> bool:
    device, cuda = torch.device(options.device), options.device == "cuda"
    if cuda:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap_gib * 2**30 / total))
    shape, lengths = (SMALL, SMALL_PAIR_TOKENS) if options.tiny else (LLAMA_3_8B, PAIR_TOKENS)
    model = random_llama(shape, device)
    figures: dict[str, Any] = {"model_gib": gib("memory_allocated") if cuda else None}
    if cuda:
        figures["building_peak_reserved_gib"] = gib("max_memory_reserved")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    pairs = random_pairs(shape["vocab_size"], lengths)
    clock = Clock(cuda)
    trainer, losses = train(model, pairs, "paged_adamw_8bit", 1e-3, clock)
    pairs_per_second = PAIRS_PER_STEP * (STEPS - 1) / (clock.step_ends[-1] - clock.step_ends[0])
    prompt, chosen, rejected = lengths
    figures |= {
        "steps": STEPS,
        "pairs_per_second": pairs_per_second,
        "row_tokens_per_second": pairs_per_second * (prompt + chosen + rejected),
        "sequence_tokens_per_second": pairs_per_second * (2 * prompt + chosen + rejected),
        "peak_reserved_gib": gib("max_memory_reserved") if cuda else None,
        "peak_allocated_gib": gib("max_memory_allocated") if cuda else None,
        "planned_reserved_gib": planned_bytes(trainer.recipe, model, PairLengths(*lengths)) / 2**30,
        "paged_states_gib": paged_states_gib(trainer.optimizer.optimizer),
        "attention": trainer.recipe.model.attention,
        "losses": losses,
    }
    settings = {
        "model": shape, "quantization": "nf4", "lora_rank": 16, "optimizer": "paged_adamw_8bit",
        "pair_tokens": lengths, "pairs_per_step": PAIRS_PER_STEP, "cap_gib": options.cap_gib if cuda else None,
        "memory": trainer.recipe.memory.model_dump(), "tiny": options.tiny,
    }  # fmt: skip
    emit("gpu_train", settings, figures, options.device, options.output)
    return losses[-1] < losses[0]


def check_losses(options: argparse.Namespace) -> bool:
    found = {device: losses_in_own_process(device) for device in {"cpu", options.device}}
    apart = [abs(a - b) for a, b in zip(found["cpu"], found[options.device], strict=True)]
    agrees = max(apart) <= LOSS_TOLERANCE
    figures = {
        "cpu_losses": found["cpu"], "device_losses": found[options.device],
        "largest_difference": max(apart), "tolerance": LOSS_TOLERANCE, "agrees": agrees,
    }  # fmt: skip
    emit("gpu_losses", {"model": SMALL, "quantization": "nf4"}, figures, options.device, options.output)
    return agrees


def check_head(options: argparse.Namespace) -> bool:
    command = [sys.executable, str(Path(__file__).parent / "head.py"), "--device", options.device]
    output = [] if options.output is None else ["--output", str(options.output)]
    return subprocess.run([*command, *(TINY_HEAD if options.tiny else HEAD), *output]).returncode == 0


# --- what they train ---


def random_llama(
    shape: dict[str, Any], device: torch.device, made_on: torch.device | None = None
) -> LlamaForCausalLM:
    """A Llama of random weights, made a layer at a time, each quantized before the next is made.

    As `load_model` would leave it: linear layers of the trunk in NF4 with double quantization, the rest in bfloat16.
    The same weights come out on every device if they are `made_on` the CPU.
    """
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    torch.manual_seed(0)
    config = LlamaConfig(**{**shape, "num_hidden_layers": 0}, attn_implementation="sdpa", use_cache=False)
    with bfloat16_on(made_on or device):
        model = LlamaForCausalLM(config)
    for index in range(shape["num_hidden_layers"]):
        with bfloat16_on(made_on or device):
            layer = LlamaDecoderLayer(config, index)
        quantize(layer, device)
        model.model.layers.append(layer)
    model.config.num_hidden_layers = shape["num_hidden_layers"]
    model.is_loaded_in_4bit = True  # what PEFT asks for
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
            packed.support_avx512bf16_for_cpu = False  # its kernel has no gradient
            setattr(module, name, packed)


def random_pairs(vocab_size: int, lengths: tuple[int, int, int]) -> Tokenized:
    """One step's pairs of random tokens; every step sees them again, so that the loss falls if gradients are right."""
    draw = random.Random(0)

    def tokens(number: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, vocab_size) for _ in range(number))

    pairs = [TokenizedPair(*map(tokens, lengths), f"random:{number}") for number in range(PAIRS_PER_STEP)]
    return Tokenized(pairs, DataReport(kept=len(pairs)))


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


def train(
    model: LlamaForCausalLM,
    pairs: Tokenized,
    optimizer: str,
    learning_rate: float,
    progress: Progress | None = None,
) -> tuple[qorpo.Trainer, list[float]]:
    """The trainer after its run, and the loss of every step."""
    longest = max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in pairs.pairs)
    with tempfile.TemporaryDirectory() as scratch:
        recipe = load_recipe(
            {
                "model": {"path": "random"},
                "data": {"train": "random", "max_length": longest, "max_prompt_length": longest - 1},
                "train": {
                    "pairs_per_step": PAIRS_PER_STEP, "max_steps": STEPS, "learning_rate": learning_rate,
                    "optimizer": optimizer, "save_every": STEPS, "log_every": STEPS, "report_to": [],
                },
                "memory": {"activation_checkpointing": True},
                "output": str(Path(scratch) / "run"),
            }
        )  # fmt: skip
        trainer = qorpo.Trainer(model, plain_tokenizer(), recipe, pairs, progress=progress)
        trainer.train()
        lines = trainer.folder.metrics.read_text(encoding="utf-8").splitlines()
    return trainer, [json.loads(line)["loss"] for line in lines]


class Clock(Progress):
    """When each step ended, the device's work included."""

    def __init__(self, cuda: bool):
        self.cuda = cuda
        self.step_ends: list[float] = []

    def step(self, done_steps: int) -> None:
        if self.cuda:
            torch.cuda.synchronize()
        self.step_ends.append(time.perf_counter())


# --- the figures ---


def losses_in_own_process(device: str) -> list[float]:
    """A device each: libraries remember the first one they saw."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    before = dict(os.environ)
    os.environ.update(hidden)
    process = context.Process(target=send_losses, args=(device, theirs))
    process.start()
    os.environ.clear()
    os.environ.update(before)
    theirs.close()
    losses = mine.recv()
    process.join()
    return losses


def send_losses(device: str, pipe: Any) -> None:
    os.dup2(2, 1)  # what the libraries print is no result
    model = random_llama(SMALL, torch.device(device), made_on=torch.device("cpu"))
    pairs = random_pairs(SMALL["vocab_size"], SMALL_PAIR_TOKENS)
    pipe.send(train(model, pairs, "adamw_torch", 3e-3)[1])


def gib(count: str) -> float:
    return getattr(torch.cuda, count)() / 2**30


def paged_states_gib(optimizer: torch.optim.Optimizer) -> float:
    states = (tensor for state in optimizer.state.values() for tensor in state.values())
    return sum(tensor.nbytes for tensor in states if getattr(tensor, "is_paged", False)) / 2**30


PARTS = {"tests": check_tests, "train": check_train, "losses": check_losses, "head": check_head}

if __name__ == "__main__":
    sys.exit(main())
