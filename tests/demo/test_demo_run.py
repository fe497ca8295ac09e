"""The demo as people run it: preference moves from chance to nearly all, along the committed loss curve.

To commit a new curve after a change that is meant to move it: QORPO_WRITE_CURVE=1 python -m pytest tests/demo
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CURVE = Path(__file__).parent / "loss_curve.json"
WINDOW = 10  # steps averaged: a single step's loss depends on its pairs more than on anything else


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """What the demo printed, and its run folder."""
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "demo.py")],
        cwd=folder, capture_output=True, text=True, timeout=580, env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (run,) = (folder / "runs").iterdir()
    return done.stdout, run


def rows_of(run, metric):
    rows = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [row for row in rows if metric in row]


@pytest.mark.slow
def test_accuracy_goes_from_chance_to_nine_in_ten(demo):
    printed, run = demo
    before, *_, after = rows_of(run, "eval_loss")
    assert before["step"] == 0
    assert 0.4 <= before["eval_rewards/accuracies"] <= 0.6
    assert after["eval_rewards/accuracies"] >= 0.9
    report = json.loads((run / "data.json").read_text(encoding="utf-8"))
    assert report["eval"]["kept"] >= 200
    assert report["eval_prompts_in_train"] == 0
    shown = re.search(r"reward accuracy.*?(\d\.\d+).*?(\d\.\d+)", printed)
    assert float(shown[1]) == pytest.approx(before["eval_rewards/accuracies"], abs=1e-3)
    assert "mean log-prob of chosen" in printed
    assert "greedy answers" in printed


@pytest.mark.slow
def test_the_loss_follows_the_committed_curve(demo):
    losses = [row["loss"] for row in rows_of(demo[1], "loss")]
    means = [
        sum(losses[start : start + WINDOW]) / WINDOW for start in range(0, len(losses) - WINDOW + 1, WINDOW)
    ]
    if os.environ.get("QORPO_WRITE_CURVE"):
        CURVE.write_text(json.dumps([round(mean, 4) for mean in means]) + "\n", encoding="utf-8")
    assert means == pytest.approx(json.loads(CURVE.read_text(encoding="utf-8")), rel=0.1)
