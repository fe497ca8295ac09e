"""Several gloo processes against one: the same gradients, losses, weights; kills, resumption, and what is refused."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import changed, read_metrics

from qorpo.data.pack import row_tokens
from qorpo.data.tokenize import TokenizedPair
from qorpo.training.distributed import Ranks, shares

pytestmark = pytest.mark.distributed
HERE = Path(__file__).parent


def start(job, ranks, folder):
    path = folder / f"job-{time.monotonic_ns()}.json"
    path.write_text(json.dumps(job))
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, str(HERE / "ranks.py"), str(path)],
        cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip


def seen(job, ranks, folder):
    output = folder / f"seen-{time.monotonic_ns()}.pt"
    done = start({**job, "output": str(output)}, ranks, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output)


def test_ranks_take_the_same_number_of_rows_and_every_pair_once():
    pairs = [TokenizedPair((1,) * (n + 1), (2,) * (3 * n + 1), (3,), str(n)) for n in range(11)]
    for count in (1, 2, 4, 8, 11):
        rows = [Ranks(index, count).micro_batches(pairs, 40) for index in range(count)]
        assert len({len(mine) for mine in rows}) == 1
        assert sorted(pair.source for mine in rows for row in mine for pair in row) == sorted(
            p.source for p in pairs
        )
        loads = [sum(map(row_tokens, share)) for share in shares(pairs, count)]
        assert max(loads) - min(loads) <= max(map(row_tokens, pairs))


@pytest.fixture
def job(recipe_dict):
    """A run whose five pairs a step make shares that differ, with micro-batches of one or two pairs."""
    return {
        "recipe": changed(
            recipe_dict, model__quantization="none", train__pairs_per_step=5, train__max_steps=20,
            train__optimizer="adamw_torch", train__log_every=1, train__save_every=100,
            memory__microbatch_tokens=150, memory__logprob_chunk_tokens=64, memory__activation_checkpointing=True,
        )
    }  # fmt: skip


def run(job, folder, name, **changes):
    options = {key: changes.pop(key) for key in ("dtype", "sgd", "kill", "resume") if key in changes}
    return {**job, **options, "recipe": changed(job["recipe"], output=str(folder / name), **changes)}


@pytest.mark.parametrize("tuning", ["full", "lora"])
@pytest.mark.parametrize(("ranks", "microbatch_tokens"), [(2, 150), (2, 10_000), (4, 60)])
def test_several_ranks_train_as_one(job, tmp_path, tuning, ranks, microbatch_tokens):
    options = {"dtype": "float64", "sgd": True, "tuning": tuning, "train__learning_rate": 0.05}
    one = seen(run(job, tmp_path, "one", **options), 1, tmp_path)
    several = seen(
        run(job, tmp_path, "several", memory__microbatch_tokens=microbatch_tokens, **options), ranks, tmp_path
    )
    assert len(one["gradients"]) == len(several["gradients"]) == 20
    for mine, theirs in zip(one["gradients"], several["gradients"], strict=True):
        for gradient, other in zip(mine, theirs, strict=True):
            assert (gradient - other).norm() <= 1e-6 * gradient.norm() + 1e-12
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for weight, other in zip(one["weights"], several["weights"], strict=True):
        assert (weight - other).norm() <= 1e-5 * weight.norm()
    if tuning == "full":
        assert several["local_numel"] <= 1.1 * one["local_numel"] / ranks
