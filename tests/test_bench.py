"""The benchmark scripts, each on an input too small to measure anything: they run, agree, and print what they say."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import changed

import qorpo

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "scripts" / "bench"


def run(script: str, *arguments: object) -> list[dict]:
    """The JSON lines that a script prints."""
    command = [sys.executable, str(BENCH / script), *map(str, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr
    return [json.loads(line) for line in answer.stdout.splitlines()]


def check_line(line: dict, bench: str) -> None:
    assert line["bench"] == bench
    assert set(line) == {"bench", "settings", "figures", "device", "versions", "commit", "command"}
    assert line["device"]["name"]
    assert line["device"]["threads"] >= 1
    assert set(line["versions"]) == {
        "torch", "transformers", "peft", "bitsandbytes", "trl", "liger-kernel", "qorpo",
    }  # fmt: skip
    assert line["versions"]["torch"] == torch.__version__
    assert line["command"].startswith("python ")
    assert "error" not in line["figures"], line["figures"]


@pytest.fixture
def talks(tmp_path) -> Path:
    """ShareGPT records of several turns, and one of a single turn."""
    question, answer, better = ("word " * 20).strip(), ("reply " * 12).strip(), ("better " * 30).strip()
    turns = [
        {"from": "system", "value": "Be kind."},
        {"from": "human", "value": question},
        {"from": "gpt", "value": answer},
        {"from": "human", "value": question},
    ]
    records = [
        {
            "conversations": turns if number else turns[1:2],
            "chosen": {"from": "gpt", "value": f"{number} {better}"},
            "rejected": {"from": "gpt", "value": f"{number} {answer}"},
        }
        for number in range(6)
    ]
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    return path


def test_head_agrees_with_its_peers_and_writes_what_it_prints(tmp_path):
    output = tmp_path / "results.jsonl"
    sides = ["plain", "qorpo", "products"]
    if importlib.util.find_spec("liger_kernel"):
        sides.append("liger-eager")
    lines = run(
        "head.py", "--tokens", 48, "--hidden", 16, "--vocab", 300, "--chunk-tokens", 10, "--repeats", 2,
        "--threads", 1, "--sides", ",".join(sides), "--output", output,
    )  # fmt: skip
    for line in lines:
        check_line(line, "head")
        assert line["device"]["threads"] == 1
    assert [line["settings"]["side"] for line in lines] == [*sides, "ratios"]
    for line in lines[:-1]:
        assert line["settings"]["vocab"] == 300
        assert len(line["figures"]["seconds"]) == 2
        assert line["figures"]["seconds_median"] > 0
        assert line["figures"]["extra_memory_mib"] >= 0
    ratios = lines[-1]["figures"]
    assert ratios["agrees"], ratios["relative_differences"]
    assert set(ratios["relative_differences"]) == set(sides) - {"qorpo", "products"}
    assert set(ratios["ratios"]) == set(ratios["reached"]) <= set(ratios["targets"])
    assert [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] == lines


@pytest.mark.slow
def test_training_beside_trl(base, talks):
    sides = ["qorpo"]
    if importlib.util.find_spec("trl") and importlib.util.find_spec("datasets"):
        sides.append("trl")
    lines = run(
        "train_vs_trl.py", "--base", base, "--pairs", talks, "--mix", "multi-turn", "--mean-tokens", "80,40,30",
        "--max-pairs", 4, "--max-length", 240, "--pairs-per-step", 2, "--trl-batches", 2, "--threads", 1,
        "--quantization", "none", "--sides", ",".join(sides),
    )  # fmt: skip
    for line in lines:
        check_line(line, "train_vs_trl")
        assert line["settings"]["pairs"] == "talks.json"
    means = lines[0]["settings"]["mean_tokens"]
    assert means == pytest.approx({"prompt": 80, "chosen": 40, "rejected": 30}, rel=0.3)
    for line in lines[: len(sides)]:
        assert line["figures"]["steps"] == 2
        assert line["figures"]["pairs_per_second"] > 0
        assert line["figures"]["extra_memory_mib"] > 0
    if "trl" in sides:
        ratios = lines[-1]
        assert [line["settings"]["side"] for line in lines] == [*sides, "ratios"]
        assert ratios["figures"]["trl_batch"] == 2
        assert ratios["figures"]["speed"] > 0
        assert ratios["figures"]["memory"] > 0
        # TRL's batch is the whole step here, so both name the same loss; both compute in bfloat16.
        assert abs(ratios["figures"]["first_loss_difference"]) < 1e-2


@pytest.mark.slow
def test_gpu_check_trains_on_the_cpu():
    (line,) = run("gpu_check.py", "--part", "train", "--device", "cpu", "--tiny")
    check_line(line, "gpu_train")
    assert line["settings"]["tiny"] is True
    figures = line["figures"]
    assert figures["steps"] == len(figures["losses"])
    assert figures["losses"][-1] < figures["losses"][0] - 1
    assert figures["attention"] == "sdpa"
    assert figures["sequence_tokens_per_second"] > figures["row_tokens_per_second"] > 0
    assert figures["peak_reserved_gib"] is None  # nothing of a GPU is claimed


@pytest.mark.slow
def test_gpu_check_compares_losses():
    (line,) = run("gpu_check.py", "--part", "losses", "--device", "cpu", "--tiny")
    check_line(line, "gpu_losses")
    figures = line["figures"]
    assert figures["agrees"] is True
    assert figures["cpu_losses"][-1] < figures["cpu_losses"][0] - 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_gpu_check_claims_nothing_without_a_gpu(tmp_path):
    output = tmp_path / "results.jsonl"
    answer = subprocess.run(
        ["bash", str(BENCH / "gpu_check.sh"), "--output", str(output)],
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable},
        capture_output=True, text=True,
    )  # fmt: skip
    assert answer.returncode == 2
    assert "no CUDA device" in answer.stderr
    assert "nothing was measured" in answer.stderr
    assert answer.stdout == ""
    assert not output.exists()


@pytest.mark.slow
def test_merge_beside_a_copy(tmp_path):
    output = tmp_path / "results.jsonl"
    (line,) = run(
        "merge.py", "speed", "--shape", "tiny", "--folder", tmp_path, "--repeats", 1, "--output", output
    )
    check_line(line, "merge")
    figures = line["figures"]
    assert figures["speed_of_copy"] > 0
    assert 50 < figures["peak_rss_anon_mib"] < 500
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]  # nothing stays


@pytest.mark.slow
def test_merging_a_billion_weights_takes_no_memory(tmp_path):
    if shutil.disk_usage(tmp_path).free < 8 * 10**9:
        pytest.skip("twice 2.5 GB, and room to spare")
    (line,) = run("merge.py", "speed", "--shape", "1b", "--folder", tmp_path, "--repeats", 1)
    check_line(line, "merge")
    largest_mib = 32000 * 2048 * 2 / 2**20
    assert line["figures"]["peak_rss_anon_mib"] < 4 * largest_mib + 500


@pytest.mark.slow
def test_which_base_to_merge_onto(base, pairs_file, recipe_dict, tmp_path):
    qorpo.train(changed(recipe_dict, data__eval=0.25))
    (line,) = run("merge.py", "onto", tmp_path / "run")
    check_line(line, "merge")
    figures = line["figures"]
    near, far = (figures[onto]["against_adapter_on_nf4"]["kl_mean"] for onto in ("dequantized", "original"))
    assert 0 <= near < far
    assert set(figures["original-dequantized"]["nll"]) == {"mean", "low", "high"}
