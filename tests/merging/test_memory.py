"""Anonymous resident memory of a merging process: its libraries, and no more than the largest tensor four times."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.lora_folders import add_adapter, save_base
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="Linux tells what is anonymous"
)

MIB = 2**20
SCRIPT = """
import sys, threading
from pathlib import Path
from qorpo.merging.merge import merge
peak, done = 0, threading.Event()
def watch():
    global peak
    while not done.wait(0.002):
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = max(peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))
thread = threading.Thread(target=watch)
thread.start()
merge(sys.argv[1], sys.argv[2], onto=sys.argv[3], dtype=sys.argv[4], verify=False)
done.set()
thread.join()
print(peak)
"""


def llama():
    """A layer as in a 7B model, a small one in all: 90 MB in its largest tensor, 290 MB in its weights."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 1000}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=2560, n_layer=1, n_head=20, vocab_size=1000))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "onto", "settings"), [
    (llama, "original", {}),
    (llama, "dequantized", {"use_dora": True}),
    (gpt2, "dequantized", {"use_dora": True, "fan_in_fan_out": True}),
])  # fmt: skip
def test_memory_is_the_largest_tensors_not_the_models(model, onto, settings, tmp_path):
    with torch.device("meta"):
        made = model()
    made = made.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.02)
    base = save_base(made, tmp_path / "base", torch.bfloat16)
    adapter = add_adapter(made, base, tmp_path / "adapter", **settings)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(adapter), str(tmp_path / "out"), onto, "bfloat16"],
        capture_output=True, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    largest = 2 * max(parameter.numel() for parameter in made.parameters())
    peak = json.loads(done.stdout.splitlines()[-1])
    print(f"peak {peak / MIB:.0f} MiB, largest tensor {largest / MIB:.0f} MiB")
    assert peak < 4 * largest + 500 * MIB
