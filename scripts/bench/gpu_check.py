"""What gpu_check.sh asks of a CUDA device beside the benches' figures: that results are right.

    python scripts/bench/gpu_check.py --part tests [--output FILE]
    python scripts/bench/gpu_check.py --part losses [--device cpu]

Parts:
    tests   pytest -m gpu
    losses  a small model's losses over a few steps, on the device and on the CPU: no more than LOSS_TOLERANCE apart
"""

import argparse
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

import torch
from _lengths import random_pairs
from _models import plain_tokenizer, random_model
from _record import ROOT, add_output_option, check_device, emit
from _training import train
from transformers import AutoConfig

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # large enough that a wrong digit shows in the loss
}
PAIR = (32, 24, 16)
PAIRS_PER_STEP = 4
STEPS = 6

# Nats a token, while the loss falls by several: bfloat16 has 8 bits, the CPU's and the GPU's kernels round differently,
# and steps carry it on. Two ways of attending on the CPU, or float32 in its place, were 0.004 apart.
LOSS_TOLERANCE = 0.02


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", choices=list(PARTS), required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    add_output_option(parser)
    options = parser.parse_args()
    check_device(parser, options.device)
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
    model = random_model(AutoConfig.for_model(**SMALL), torch.device(device), made_on=torch.device("cpu"))
    run = train(
        model, plain_tokenizer(), random_pairs([PAIR] * PAIRS_PER_STEP, SMALL["vocab_size"]),
        steps=STEPS, pairs_per_step=PAIRS_PER_STEP,
        recipe={
            "train": {"optimizer": "adamw_torch", "learning_rate": 3e-3},
            "memory": {"activation_checkpointing": True},
        },
    )  # fmt: skip
    pipe.send(run.losses)


PARTS = {"tests": check_tests, "losses": check_losses}

if __name__ == "__main__":
    sys.exit(main())
