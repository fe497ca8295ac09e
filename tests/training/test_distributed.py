"""Several gloo processes against one: the same gradients, losses, weights; kills, resumption, and what is refused."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from helpers.tiny import changed, read_metrics, short_recipe
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from qorpo.data.groups import Group, row_tokens
from qorpo.engine import distributed
from qorpo.engine.distributed import Ranks, shares, this_process
from qorpo.errors import RunError
from qorpo.planning.step_memory import StepShape, step_memory
from qorpo.recipe import load_recipe, resolve
from qorpo.training.export import export_model
from qorpo.training.session import check_ranks

pytestmark = pytest.mark.distributed
HERE = Path(__file__).parent


def start(jobs, ranks, folder):
    path = folder / f"jobs-{time.monotonic_ns()}.json"
    path.write_text(json.dumps(jobs))
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}
    return subprocess.run(
        [sys.executable, *launcher, str(HERE.parent / "helpers" / "ranks.py"), str(path)],
        cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


def seen(jobs, ranks, folder):
    """What the main rank of so many saw of each job, by its name; starting processes takes longer than what they do."""
    outputs = {name: str(folder / f"seen-{time.monotonic_ns()}.pt") for name in jobs}
    done = start([{**job, "output": outputs[name]} for name, job in jobs.items()], ranks, folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: torch.load(output) for name, output in outputs.items()}


def test_ranks_take_the_same_number_of_rows_and_every_pair_once():
    pairs = [Group((1,) * (n + 1), ((2,) * (3 * n + 1), (3,)), str(n)) for n in range(11)]
    for count in (1, 2, 4, 8, 11):
        rows = [Ranks(index, count).micro_batches(pairs, 40) for index in range(count)]
        assert len({len(mine) for mine in rows}) == 1
        assert sorted(pair.source for mine in rows for row in mine for pair in row) == sorted(
            p.source for p in pairs
        )
        loads = [sum(map(row_tokens, share)) for share in shares(pairs, count)]
        assert max(loads) - min(loads) <= max(map(row_tokens, pairs))


@pytest.fixture(scope="module")
def job(base, pairs_file, tmp_path_factory):
    """A run whose five pairs a step make shares that differ, with micro-batches of one or two pairs."""
    recipe = short_recipe(base, pairs_file, tmp_path_factory.mktemp("unused"))
    return {
        "recipe": changed(
            recipe, tuning="full", model__quantization="none", train__pairs_per_step=5, train__max_steps=20,
            train__optimizer="adamw_torch", train__log_every=1, train__save_every=100,
            memory__microbatch_tokens=150, memory__logprob_chunk_tokens=64, memory__activation_checkpointing=True,
        )
    }  # fmt: skip


def run(job, folder, name, **changes):
    own = ("dtype", "sgd", "kill", "resume", "profile", "per_node", "forgets")
    options = {key: changes.pop(key) for key in own if key in changes}
    return {**job, **options, "recipe": changed(job["recipe"], output=str(folder / name), **changes)}


PLAIN = {"dtype": "float64", "sgd": True, "train__learning_rate": 0.05}
LIKE_ON_A_CLUSTER = {
    "train__max_steps": 3, "train__save_every": 3, "train__learning_rate": 0.01,
    "model__attention": "sdpa",  # or it would not be said that the packed layout reached no layer
}  # fmt: skip
PLANNED = {
    "memory__budget_gib": 1, "memory__microbatch_tokens": "auto", "memory__logprob_chunk_tokens": "auto",
    "memory__activation_checkpointing": "auto", "memory__activation_offload": "auto",
}  # fmt: skip
# Rows of one pair each are the same rows wherever they are computed: the precision of 4 bits plays no part.
IN_4_BITS = {
    "tuning": "lora", "model__quantization": "nf4", "memory__microbatch_tokens": 1, "train__max_steps": 6,
    "train__save_every": 2, "train__learning_rate": 1e-3, "train__eval_every": 100, "model__attention": "sdpa",
}  # fmt: skip
KILLED = {"dtype": "float32", "train__max_steps": 12, "train__save_every": 2, "train__eval_every": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(job, folder):
    jobs = {tuning: run(job, folder, f"alone-{tuning}", tuning=tuning, **PLAIN) for tuning in TUNINGS}
    jobs["like on a cluster"] = run(job, folder, "alone", **LIKE_ON_A_CLUSTER)
    jobs["in 4 bits"] = run(job, folder, "alone-4-bits", **IN_4_BITS)
    jobs["not killed"] = run(job, folder, "not-killed", **KILLED)
    return seen(jobs, 1, folder)


TUNINGS = ["full", "lora"]
# Ranks, most tokens a row, sharding, and over how many ranks.
SETTINGS = [(2, 10_000, "auto", 2), (4, 60, "auto", 4), (4, 10_000, "hybrid", 2)]


@pytest.fixture(scope="module")
def together(job, bigger, folder):
    """Every run of two ranks, and every one of four, by their settings."""
    found = {}
    for count in (2, 4):
        jobs = {}
        for tuning in TUNINGS:
            for ranks, tokens, sharding, shards in SETTINGS:
                if ranks == count:
                    changes = {
                        "tuning": tuning,
                        "memory__microbatch_tokens": tokens,
                        "memory__sharding": sharding,
                    }
                    name = f"{tuning}-{ranks}-{sharding}"
                    jobs[name] = run(job, folder, name, per_node=shards, **changes, **PLAIN)
        if count == 2:
            jobs["like on a cluster"] = run(job, folder, "run", **LIKE_ON_A_CLUSTER)
            jobs |= {
                f"forgets-{tuning}": run(
                    job, folder, f"forgets-{tuning}", tuning=tuning, forgets=True, model__attention="sdpa",
                    memory__sharding="full",
                )
                for tuning in TUNINGS
            }  # fmt: skip
            jobs["planned"] = run(job, folder, "planned", **LIKE_ON_A_CLUSTER, **PLANNED)
            jobs |= {f"memory-{tuning}": bigger[tuning] for tuning in TUNINGS}
        found |= seen(jobs, count, folder)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize(("ranks", "microbatch_tokens", "sharding", "shards"), SETTINGS)
def test_several_ranks_train_as_one(alone, together, tuning, ranks, microbatch_tokens, sharding, shards):
    one, several = alone[tuning], together[f"{tuning}-{ranks}-{sharding}"]
    assert len(one["gradients"]) == len(several["gradients"]) == 20
    for mine, theirs in zip(one["gradients"], several["gradients"], strict=True):
        for gradient, other in zip(mine, theirs, strict=True):
            assert (gradient - other).norm() <= 1e-6 * gradient.norm() + 1e-12
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-5)
    for weight, other in zip(one["weights"], several["weights"], strict=True):
        assert (weight - other).norm() <= 1e-5 * weight.norm()
    is_sharded = tuning == "full" or sharding != "auto"
    for kind in ("parameters", "gradients"):
        share = one["bytes"][kind] / (shards if is_sharded else 1)
        assert several["bytes"][kind] == pytest.approx(share, rel=0.1)


@pytest.mark.slow
def test_two_ranks_score_one_reference_and_train_as_one(job, folder):
    """Sharded dpo, and kto, whose z₀ is over the rows of both ranks."""
    objectives = {
        "dpo": {"tuning": "full", "objective": {"name": "dpo", "beta": 0.5}},
        "kto": {"tuning": "lora", "objective": {"name": "kto", "beta": 0.5}},
    }
    changes = {**PLAIN, "train__max_steps": 5, "memory__microbatch_tokens": 100}

    def jobs(ranks):
        return {
            name: run(job, folder, f"{name}-{ranks}", **changes, **each) for name, each in objectives.items()
        }

    alone, together = (seen(jobs(ranks), ranks, folder) for ranks in (1, 2))
    for name, one in alone.items():
        several = together[name]
        own, others = (
            load_file(folder / f"{name}-{ranks}" / "reference" / "logps.safetensors") for ranks in (1, 2)
        )
        for part, logps in own.items():
            torch.testing.assert_close(others[part], logps, rtol=1e-6, atol=0)  # RMSNorm is in float32
        assert several["losses"] == pytest.approx(one["losses"], rel=1e-6)
        assert one["losses"][0] != pytest.approx(one["losses"][-1], rel=1e-3)
        for mine, theirs in zip(one["gradients"], several["gradients"], strict=True):
            for gradient, other in zip(mine, theirs, strict=True):
                assert (gradient - other).norm() <= 1e-5 * gradient.norm() + 1e-10
    assert any(row["kl"] > 0 for row in read_metrics(folder / "kto-2"))


@pytest.mark.slow
@pytest.mark.parametrize("tuning", TUNINGS)
def test_right_log_probs_with_wrong_gradients_are_refused_where_weights_are_sharded_too(together, tuning):
    assert "sdpa: gradients differ from the model's own by 0." in together[f"forgets-{tuning}"]


@pytest.fixture(scope="module")
def bigger(job, base, folder):
    """Runs on a base whose step is no rounding error, its memory to be profiled."""
    config = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        vocab_size=AutoConfig.from_pretrained(base).vocab_size, max_position_embeddings=2048,
    )  # fmt: skip
    AutoTokenizer.from_pretrained(base).save_pretrained(folder / "bigger")
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "bigger")
    quantization = {"full": "none", "lora": "nf4"}
    return {
        tuning: run(
            job, folder, f"memory-{tuning}", tuning=tuning, model__path=str(folder / "bigger"),
            model__quantization=quantization[tuning], model__attention="sdpa", memory__sharding="full",
            memory__microbatch_tokens=10_000, train__max_steps=3, train__learning_rate=1e-3, profile=2,
        )
        for tuning in TUNINGS
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_ranks_memory_is_the_planned_one(bigger, together, folder, tuning):
    """accelerate's FSDP2 over gloo, as torch's profiler sees it, against FSDP2 on fake ranks."""
    measured = together[f"memory-{tuning}"]
    recipe = resolve(load_recipe(bigger[tuning]["recipe"]), device_type="cpu")
    rows = tuple(tuple(lengths) for lengths in measured["rows"])
    shape = StepShape(
        rows, accumulates=False, attention="sdpa", chunk_tokens=64, checkpointed_layers=None, offload=False,
        on_cuda=False, shards=2,
    )  # fmt: skip
    planned = step_memory(AutoConfig.from_pretrained(folder / "bigger"), recipe, shape).peak
    # gloo copies what it gathers and sums, where NCCL does not, and lets go of it in its own time: of a layer's gradients
    # one copy at most, and of weights one of each of the two layers that are gathered.
    layer = 256 * (2 * 256 + 2 * 128) + 3 * 256 * 688
    copies = {"full": 4 * layer + 2 * 2 * layer, "lora": 2 * layer // 2}[tuning]
    measured_bytes = measured["standing_bytes"] + measured["added_bytes"]
    assert 0.95 * planned.total_bytes <= measured_bytes <= 1.05 * planned.total_bytes + copies


@pytest.mark.slow
def test_auto_is_planned_by_ranks_together(alone, together, folder):
    memory = load_recipe(folder / "planned" / "recipe.yaml").memory
    assert memory.activation_checkpointing is False  # by fixed values every layer would be recomputed
    assert "auto" not in memory.model_dump().values()
    assert together["planned"]["losses"] == pytest.approx(alone["like on a cluster"]["losses"], rel=0.02)


@pytest.mark.slow
def test_a_base_in_4_bits_is_sharded_and_its_adapters_saved_whole(job, alone, folder):
    one = alone["in 4 bits"]
    changes = {**IN_4_BITS, "memory__sharding": "full"}
    assert start([run(job, folder, "4-bits", kill=(1, 3), **changes)], 2, folder).returncode != 0
    sharded = seen({"": run(job, folder, "4-bits", resume=True, **changes)}, 2, folder)[""]
    assert sharded["losses"] == pytest.approx(one["losses"][2:], rel=1e-3)
    for kind in ("base", "parameters", "gradients", "optimizer"):
        assert sharded["bytes"][kind] == pytest.approx(one["bytes"][kind] / 2, rel=0.1)
    for weight, other in zip(one["weights"], sharded["weights"], strict=True):
        assert (weight - other).norm() <= 1e-2 * weight.norm()
    own, others = (
        load_file(folder / name / "adapter" / "adapter_model.safetensors")
        for name in ("alone-4-bits", "4-bits")
    )
    assert own.keys() == others.keys()
    for name, tensor in own.items():
        assert (tensor - others[name]).norm() <= 1e-2 * tensor.norm(), name


@pytest.mark.slow
def test_a_killed_run_goes_on_with_any_number_of_ranks(job, alone, folder):
    """Killed on two ranks, then on one, finished on four: the losses are those of a run that nothing happened to."""
    one = alone["not killed"]
    started = time.monotonic()
    killed = start([run(job, folder, "killed", kill=(1, 5), **KILLED)], 2, folder)
    assert killed.returncode != 0
    assert time.monotonic() - started < 60
    assert "SIGKILL" in killed.stderr
    again = start([run(job, folder, "killed", kill=(0, 7), resume=True, **KILLED)], 1, folder)
    assert again.returncode == -signal.SIGKILL
    resumed = seen({"": run(job, folder, "killed", resume=True, **KILLED)}, 4, folder)[""]
    for kind in ("parameters", "gradients", "optimizer"):
        assert resumed["bytes"][kind] == pytest.approx(one["bytes"][kind] / 4, rel=0.1)
    rows = read_metrics(folder / "killed")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["loss"] for row in rows] == pytest.approx(one["losses"], rel=1e-4)
    for weight, other in zip(one["weights"], resumed["weights"], strict=True):
        assert (weight - other).norm() <= 1e-3 * weight.norm()


@pytest.mark.slow
def test_the_model_that_ranks_leave_opens_in_plain_transformers(alone, together, folder, tmp_path):
    """bfloat16 in forward over float32 masters, the main rank alone with weights: as on a cluster."""
    ranks = together["like on a cluster"]
    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "model")
    assert model.dtype == torch.bfloat16
    loaded = dict(model.named_parameters())
    assert len(loaded) == len(ranks["weights"])
    for parameter, weight in zip(loaded.values(), ranks["weights"], strict=True):
        assert weight.dtype == torch.float32
        assert torch.equal(parameter, weight.bfloat16())
    assert AutoTokenizer.from_pretrained(folder / "run" / "model").chat_template
    assert ranks["losses"] == pytest.approx(alone["like on a cluster"]["losses"], rel=0.02)
    # What was left sharded gives the same folder again.
    checkpoint = folder / "run" / "checkpoints" / "step-3"
    assert sorted(path.name for path in checkpoint.iterdir()) == [
        "qorpo-manifest.json",
        "schedule.pt",
        "shards",
        "state.json",
    ]
    export_model(folder / "run", tmp_path / "exported")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        written = (folder / "run" / "model" / name).read_bytes()
        assert (tmp_path / "exported" / name).read_bytes() == written, name
    export_model(checkpoint, tmp_path / "masters", dtype="float32")
    masters = dict(
        AutoModelForCausalLM.from_pretrained(tmp_path / "masters", dtype="auto").named_parameters()
    )
    assert all(torch.equal(p, w) for p, w in zip(masters.values(), ranks["weights"], strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--full", "model.quantization=nf4"], "model.quantization: nf4 weights can't be trained; leave out --full"),
        (["--full"], "memory.sharding: full would be left out without a word by accelerate on cpu"),
    ],
)  # fmt: skip
def test_misuse_is_one_message_from_one_rank(job, tmp_path, arguments, said):
    recipe = changed(job["recipe"], tuning="lora", output=str(tmp_path / "run"))
    recipe["model"].pop("quantization")
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "qorpo", "train", str(tmp_path / "r.yaml"), *arguments],
        cwd=HERE.parents[1], env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count(said) == 1, done.stderr[-3000:]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "sharded", "said"),
    [
        ({"train__pairs_per_step": 1}, False, "1 pairs can't be shared by 2 processes"),
        ({"train__optimizer": "adamw_8bit"}, True, "adamw_8bit can't work on sharded parameters"),
    ],
)
def test_what_ranks_can_not_do(job, tmp_path, changes, sharded, said):
    with pytest.raises(RunError, match=said):
        check_ranks(load_recipe(changed(job["recipe"], **changes)), 2, sharded)


def test_a_port_in_use_is_one_message(job, tmp_path):
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(changed(job["recipe"], output=str(tmp_path / "run"))))
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        alone = {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": port,
        }
        done = subprocess.run(
            [sys.executable, "-m", "qorpo", "train", str(tmp_path / "r.yaml")], cwd=HERE.parents[1],
            env={**os.environ, **alone, "PYTHONPATH": str(HERE.parents[1])}, capture_output=True, text=True, timeout=120,
            check=False,
        )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"2 processes could not join at localhost:{port}: another run has this port" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_accelerate_launch_was_told_changes_no_step(job, monkeypatch, caplog):
    for name, value in {
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "FSDP_OFFLOAD_PARAMS": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    recipe = load_recipe(changed(job["recipe"], tuning="lora", memory__sharding="none"))
    accelerator = distributed.make_accelerator(recipe, SimpleNamespace(device=torch.device("cpu")), None)
    assert accelerator.gradient_accumulation_steps == 1
    assert accelerator.mixed_precision == "no"
    assert accelerator.distributed_type is DistributedType.NO
    assert "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" in caplog.text


def test_what_keeps_ranks_from_joining_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(RunError, match="4 processes were started on this machine, which has 2 GPUs"):
        this_process()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(distributed, "PartialState", lambda **options: SimpleNamespace(num_processes=1))
    with pytest.raises(RunError, match=r"2 processes were started \(WORLD_SIZE\), but 1 found each other"):
        this_process()

    def no_nccl(**options):
        raise RuntimeError("Distributed package doesn't have NCCL built in")

    monkeypatch.setattr(distributed, "PartialState", no_nccl)
    monkeypatch.setattr(distributed.dist, "is_nccl_available", lambda: False)
    with pytest.raises(RunError, match="this PyTorch has no NCCL"):
        this_process()


@pytest.mark.slow
def test_ranks_started_again_go_on_by_themselves(job, tmp_path):
    """As scripts/cluster/torchrun.sh starts them: adapters, data-parallel, one rank killed once."""
    changes = {"output": str(tmp_path / "run"), "train__max_steps": 6, "train__save_every": 2}
    recipe = changed(job["recipe"], tuning="lora", **changes)
    recipe["model"].pop("quantization")  # nf4
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    killed = str(tmp_path / "killed")
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, signal, sys\nimport qorpo.training.loop as loop\nfrom qorpo.cli import main\n"
        "step = loop.Trainer._step\n"
        "def stepping(self):\n"
        f"    if self.state.step == 3 and self.session.ranks.index == 1 and not os.path.exists({killed!r}):\n"
        f"        open({killed!r}, 'w').close()\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    step(self)\n"
        "loop.Trainer._step = stepping\nmain()\n"
    )
    script = (HERE.parents[1] / "scripts" / "cluster" / "torchrun.sh").read_text(encoding="utf-8")
    assert "\nexport TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n" in script
    environment = {
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1",
         str(worker), "train", str(tmp_path / "r.yaml")],
        cwd=HERE.parents[1], env={**os.environ, **environment}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "killed").exists()
    assert "resumed from" in done.stderr
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 7))
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    assert done.stdout.count("adapter: ") == 1
