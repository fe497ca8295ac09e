"""Twenty families through 16 and 4 bits, each held to its own forward and to PEFT's merge; all by scripts/bench/families.py."""

import sys
from pathlib import Path

import pytest

pytest.importorskip("bitsandbytes")
sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))

from families import measured, table

SHARED = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo3", "smollm3", "minicpm3", "falcon", "granite",
    "mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss", "phimoe",
]  # fmt: skip
SEPARATE = ["qwen3_next", "jamba"]


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", [*SHARED, *SEPARATE])
def test_a_family_is_exact(name, quantization):
    figures = measured(name, quantization)
    assert figures["verdict"] == f"exact, {'separate' if name in SEPARATE else 'shared'}", figures


def test_the_table_has_a_row_a_verdict():
    lines = [
        {"settings": {"family": family, "quantization": quantization}, "figures": figures}
        for family, quantization, figures in [
            ("a", "none", {"verdict": "exact, shared"}),
            ("a", "nf4", {"verdict": "wrong"}),
            ("b", "none", {"verdict": "refused", "why": "no"}),
            ("a", "nf4", {"verdict": "exact, shared"}),  # measured again
        ]
    ]
    assert table(lines).splitlines()[2:] == ["| exact, shared | a |", "| refused: no | b |"]
