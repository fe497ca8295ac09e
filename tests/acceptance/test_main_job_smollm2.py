"""The main job on a real model, SmolLM2-135M-Instruct: some minutes each."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
from chain import adapters, all_parameters
from rows import COMMITTED

MODEL = os.environ.get("QORPO_SMOLLM2", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not Path(MODEL, "config.json").is_file(),
        reason="QORPO_SMOLLM2 names no folder of the model; ../shared/models/smollm2.py FOLDER makes it",
    ),
]
ROW = replace(
    COMMITTED[1],
    name="SmolLM2",
    model={"path": MODEL},
    changes={"pairs_per_step": 4, "learning_rate": 3e-4},
    full_learning_rate=2e-5,
    # Of five short pairs bfloat16 alone changes the base's own log-probs by 0.012 nats, over a verification's threshold.
    merge_dtype="float32",
)


def test_adapters_on_a_real_model(tmp_path: Path):
    adapters(ROW, tmp_path)


def test_all_parameters_of_a_real_model(tmp_path: Path):
    all_parameters(ROW, tmp_path)
