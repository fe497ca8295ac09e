"""The benchmark scripts, each on an input too small to measure anything: they run, agree, and print what they say."""

import argparse
import importlib
import importlib.util
import json
import re
import shlex
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import changed
from transformers import AutoModelForCausalLM

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
        "torch", "transformers", "peft", "bitsandbytes", "flash-attn", "trl", "liger-kernel", "unsloth", "qorpo",
    }  # fmt: skip
    assert line["versions"]["torch"] == torch.__version__
    assert line["command"].startswith("python ")
    assert "error" not in line["figures"], line["figures"]


@pytest.fixture
def bench(monkeypatch):
    """Imports a benchmark's module by its name."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture
def refuse(bench, monkeypatch, capsys):
    """Runs a script's main with options that it has to refuse; returns the one message."""

    def run(script: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as ended:
            bench(script).main()
        assert ended.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        (message,) = re.findall(r"error: (.*)", err)
        return message

    return run


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


def test_sft_computes_fewer_tokens_and_ends_where_orpo_without_its_own_term_does():
    (line,) = run(
        "sft.py", "--steps", 4, "--pairs-per-step", 4, "--rounds", 1, "--max-length", 128, "--threads", 1
    )
    check_line(line, "sft")
    figures = line["figures"]
    assert figures["pairs"]["sft"] == figures["pairs"]["orpo"]
    assert figures["tokens"]["sft"] < figures["tokens"]["orpo"]
    assert figures["train_nll"]["sft"] == pytest.approx(figures["train_nll"]["orpo"], abs=1e-4)
    assert figures["sft_change"]["chosen_logps"]["mean"] > 0


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
        "--quantization", "none", "--sides", ",".join(sides), "--activation-checkpointing", "auto",
        "--trl-checkpointing", "on",
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
        assert ratios["figures"]["peer"]["batch"] == 2
        assert ratios["figures"]["padding"] > 1
        assert ratios["figures"]["speed"] > 0
        assert ratios["figures"]["memory"] > 0
        # TRL's batch is the whole step here, so both name the same loss; both compute in bfloat16.
        assert abs(ratios["figures"]["first_loss_difference"]) < 1e-2


# --- shapes and lengths ---


def shrunk(config):
    for name, value in {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    }.items():  # fmt: skip
        if hasattr(config, name):
            setattr(config, name, value)
    if hasattr(config, "layer_types"):
        config.layer_types = config.layer_types[:2]
    return config


@pytest.mark.parametrize("shape", ["llama-3-8b", "mistral-7b", "qwen2.5-14b", "qwen2.5-32b", "tiny"])
def test_a_model_made_by_layers_is_the_model_of_its_shape(bench, shape):
    models = bench("_models")
    made = models.random_model(shrunk(models.config_of(shape)), torch.device("cpu"), quantization="none")
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(shrunk(models.config_of(shape)), dtype=torch.bfloat16)
    shapes = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()}
        for model in (made, whole)
    ]
    assert shapes[0] == shapes[1]
    assert made(torch.arange(3, 9)[None]).logits.isfinite().all()
    quantized = models.random_model(shrunk(models.config_of(shape)), torch.device("cpu"))
    assert {type(layer.mlp.up_proj).__name__ for layer in quantized.model.layers} == {"Linear4bit"}
    rows = torch.randn(5, 64, dtype=torch.bfloat16)
    exact, rounded = (model.model.layers[0].self_attn.k_proj(rows) for model in (made, quantized))
    assert 0.01 < (rounded - exact).norm() / exact.norm() < 0.2  # the same weights, in 4 bits


def test_lengths_are_drawn_around_the_medians_that_are_stated(bench):
    lengths = bench("_lengths")
    medians = {"ultrafeedback": (75, 300, 240), "hh-rlhf": (127, 59, 59), "long-prompt": (2000, 200, 200)}
    for name, stated in medians.items():
        drawn = lengths.draw_lengths(lengths.MIXES[name], 4000)
        found = [statistics.median(side) for side in zip(*drawn, strict=True)]
        assert found == pytest.approx(stated, rel=0.06)
        assert len(set(drawn)) > 1000
        assert drawn[:7] == lengths.draw_lengths(lengths.MIXES[name], 7)
    assert lengths.draw_lengths(lengths.MIXES["pair-2x2048"], 2) == [(1, 2047, 2047)] * 2
    packed = lengths.MIXES["packed-8192"]
    assert sum(map(sum, lengths.draw_lengths(packed, packed.pairs_per_step))) == 8192


# --- a step ---


def test_the_flops_of_a_step_are_those_counted_by_hand(bench):
    step, models = bench("step"), bench("_models")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(models.config_of("llama-3-8b"))
    layer = (
        2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    )  # query and output, key and value, the MLP's three
    assert step.layer_weights(model) == [layer] * 32
    # Forward and input gradients of every layer, and forward again of the first 5.
    assert step.step_flops([layer] * 32, 8192, 5) == 8192 * (32 * 4 + 5 * 2) * layer
    tiny = models.random_model(
        models.config_of("tiny"), torch.device("cpu")
    )  # packed weights have other shapes
    assert step.layer_weights(tiny) == [2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768] * 4


def test_a_step_on_the_cpu(bench):
    settings = {
        "shape": "tiny", "mix": "hh-rlhf", "pairs_per_step": 2, "cap_gib": None, "repeats": 2,
        "attention": "dense", "device": "cpu",
    }  # fmt: skip
    figures, memory = bench("step").measure(settings)
    assert figures["attention"] == "dense"
    assert memory["activation_checkpointing"] is False  # as auto has it where memory is plenty
    assert figures["checkpointed_layers"] == 0
    assert len(figures["step_seconds"]) == 2
    assert figures["tokens_per_second"] / figures["pairs_per_second"] == pytest.approx(
        figures["row_tokens"] / 2
    )
    assert 0 < figures["flops_share"] < 1
    assert figures["extra_memory_mib"] > 0
    assert "peak_gib" not in figures  # nothing of a GPU is claimed
    assert figures["losses"][-1] < figures["losses"][0]


# --- beside peers ---


def test_tokens_padded_by_trl_and_the_ratios_made_of_them(bench):
    peers, sides = bench("_peers"), bench("_sides")
    lengths = [(10, 5, 3), (2, 1, 8), (4, 4, 4)]
    assert peers.padded_tokens(lengths, 1) == 2 * 15 + 2 * 10 + 2 * 8
    assert peers.padded_tokens(lengths, 2) == 2 * 2 * 15 + 2 * 8
    pairs = [qorpo.data.groups.Group.of(((5,) * count for count in each), "test") for each in lengths[:2] * 2]
    job = sides.Job(pairs, pairs_per_step=2)

    def figures(speed: float, mib: float) -> dict:
        return {
            "pairs_per_second": speed, "pairs_per_cpu_second": speed / 2, "extra_memory_mib": mib, "first_loss": 3.0,
        }  # fmt: skip

    slow = ({"side": "trl", "batch": 1}, figures(1.0, 50.0))
    fast = ({"side": "trl", "batch": 2}, figures(1.5, 200.0))
    broken = ({"side": "trl", "batch": 4}, {"error": "out of memory", "out_of_memory": True})
    found = peers.compare(figures(6.0, 50.0), [slow, fast, broken], job)
    assert found["peer"] == fast[0]
    assert found["speed"] == found["speed_by_cpu_time"] == 4.0
    assert found["padding"] == round(60 / 29, 3)  # of the second step: the first is not timed
    assert found["speed_over_padding"] == round(4 / (60 / 29), 3)
    assert found["memory"] == 0.25
    assert peers.reached(found, {"speed": 4.0, "memory": 0.2}) == {"speed": True, "memory": False}
    assert peers.compare(figures(6.0, 50.0), [broken], job) == {}


def test_a_side_out_of_memory_is_a_result(bench, monkeypatch, capsys):
    peers, sides = bench("_peers"), bench("_sides")
    good = {
        "pairs_per_second": 1.0, "pairs_per_cpu_second": 1.0, "extra_memory_mib": 1.0, "first_loss": 3.0,
    }  # fmt: skip

    def outcome(run: dict, job: object) -> dict:
        if run.get("batch") == 8:
            return sides.failure(
                torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
            )
        return good

    monkeypatch.setattr(peers, "in_own_process", outcome)
    runs = [{"side": "qorpo"}, {"side": "trl", "batch": 8}, {"side": "trl", "batch": 4}]
    pair = qorpo.data.groups.Group((5,), ((5,), (5,)), "test")
    peers.compare_runs_of("train_vs_peers", {}, runs, sides.Job([pair] * 2, 1), {})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["settings"]["side"] for line in lines] == ["qorpo", "trl", "trl", "ratios"]
    assert lines[1]["figures"] == {
        "error": "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB.", "out_of_memory": True,
    }  # fmt: skip
    assert lines[3]["figures"]["peer"]["batch"] == 4
    assert sides.failure(ValueError("no such thing"))["out_of_memory"] is False


def test_a_side_that_is_not_installed_has_one_line(bench, monkeypatch):
    peers, sides = bench("_peers"), bench("_sides")
    monkeypatch.setitem(sides.NEEDS, "unsloth", ("no_such_package",))
    assert sides.in_own_process({"side": "unsloth"}, None) == {"error": "can't be imported: no_such_package"}
    parser = argparse.ArgumentParser()
    peers.add_run_options(parser)
    options = parser.parse_args(
        ["--sides", "qorpo,trl,unsloth", "--trl-batches", "1,2", "--trl-liger", "off"]
    )
    monkeypatch.setitem(sides.NEEDS, "trl", ())
    assert peers.runs_of(parser, options) == [
        {"side": "qorpo", "microbatch_tokens": "auto", "activation_checkpointing": "auto"},
        *({"side": "trl", "batch": b, "checkpointing": on, "liger": False} for b in (1, 2) for on in (True, False)),
        {"side": "unsloth"},
    ]  # fmt: skip


@pytest.mark.slow
def test_training_beside_peers(tmp_path):
    lines = run(
        "train_vs_peers.py", "--shape", "tiny", "--mix", "hh-rlhf", "--steps", 2, "--pairs-per-step", 2,
        "--trl-batches", 2, "--trl-checkpointing", "on", "--threads", 1, "--device", "cpu", "--sides", "qorpo,trl",
        "--output", tmp_path / "results.jsonl",
    )  # fmt: skip
    if importlib.util.find_spec("trl") is None or importlib.util.find_spec("datasets") is None:
        pytest.skip("TRL is not installed")
    for line in lines:
        check_line(line, "train_vs_peers")
    assert [line["settings"]["side"] for line in lines] == ["qorpo", "trl", "ratios"]
    assert lines[1]["settings"] | {"batch": 2, "checkpointing": True, "liger": False} == lines[1]["settings"]
    # TRL's batch is the whole step here, so both name the same loss; both compute in bfloat16.
    assert abs(lines[2]["figures"]["first_loss_difference"]) < 1e-2
    assert str(tmp_path) not in json.dumps(lines)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("step", "--shape gpt-5", "--shape: invalid choice: 'gpt-5'"),
        ("step", "--shape tiny --repeats 0", "--repeats: invalid count value: '0'"),
        ("step", "--shape tiny --cap-gib -1", "--cap-gib: invalid gib value: '-1'"),
        (
            "train_vs_peers",
            "--shape tiny --sides qorpo,axolotl",
            "--sides: 'qorpo,axolotl'; expected qorpo, trl",
        ),
        ("train_vs_peers", "--shape tiny --trl-batches 0", "--trl-batches: '0'; expected whole numbers"),
        (
            "train_vs_peers",
            "--shape tiny --trl-batches 3",
            "--trl-batches: 3 is no part of --pairs-per-step 8",
        ),
        ("train_vs_peers", "--shape tiny --steps 1", "8 pairs make no two steps of 8"),
        (
            "train_vs_trl",
            "--microbatch-tokens many",
            "--microbatch-tokens: 'many'; expected auto, whole numbers",
        ),
    ],
)
def test_a_wrong_option_is_refused_by_one_message(refuse, script, arguments, message):
    assert message in refuse(script, *arguments.split())


# --- the table of results ---


def test_the_page_has_the_table_of_the_committed_results(bench):
    table = bench("table")
    text = table.PAGE.read_text(encoding="utf-8")
    rows = table.table(table.read(table.RESULTS))
    assert table.with_table(text, rows) == text, "run python scripts/bench/table.py"
    assert table.with_table(text, "other") != text
    for name in ("step", "train_vs_peers", "train_vs_trl", "head"):
        assert f"| `{name}.py` | " in rows


def test_a_newer_result_takes_the_place_of_an_older_one(bench):
    table = bench("table")
    line = {
        "bench": "step", "device": {"name": "a card"},
        "settings": {"shape": "llama-3-8b", "mix": "packed-8192", "attention": "auto", "cap_gib": 24.0},
        "figures": {"tokens_per_second": 1234.5, "pairs_per_second": 1.2, "flops_share": 0.456, "peak_gib": 17.04},
    }  # fmt: skip
    older = line | {"figures": {"error": "out of memory"}}
    elsewhere = line | {"device": {"name": "another card"}}
    assert table.table([older, elsewhere, line]).splitlines()[2:] == [
        f"| `step.py` | llama-3-8b, packed-8192, 24 GiB card | {card} | 1,234 tokens/s, 1.20 pairs/s, "
        "46% of the matmul rate | 17.0 GiB |"
        for card in ("another card", "a card")
    ]


def test_a_file_of_several_benches_is_read_too(bench, tmp_path):
    table = bench("table")
    names = ["head", "gpu_tests", "step"]
    (tmp_path / "gpu.jsonl").write_text("".join(json.dumps({"bench": name}) + "\n" for name in names))
    (tmp_path / "step.jsonl").write_text('{"bench": "step", "later": true}\n')
    (tmp_path / "README.md").write_text("not a result")
    assert table.read(tmp_path) == [{"bench": "step"}, {"bench": "step", "later": True}, {"bench": "head"}]


def test_results_name_no_folder_of_the_machine():
    for path in (BENCH / "results").glob("*.jsonl"):
        for line in path.read_text(encoding="utf-8").splitlines():
            assert not re.search(r"(^|[\s\"'=])/(?!proc)\w+/", json.loads(line)["command"]), line


# --- on a GPU ---


@pytest.mark.slow
def test_gpu_check_compares_losses():
    (line,) = run("gpu_check.py", "--part", "losses", "--device", "cpu")
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_gpu_check_runs_can_be_run_in_ten_minutes(refuse):
    text = (BENCH / "gpu_check.sh").read_text(encoding="utf-8").replace("\\\n", " ")
    parts = re.findall(r"^ *run (\d+) (\w+) (.*)$", text, re.MULTILINE)
    assert sum(int(seconds) for seconds, _, _ in parts) <= 600
    scripts = [script for _, script, _ in parts]
    (trl,) = re.findall(r"trl=\((.*)\)", text)
    assert scripts == ["gpu_check", "gpu_check", "step", "step", "head", "train_vs_peers", "train_vs_peers"]
    for _, script, arguments in parts:
        if script != "head":
            arguments = arguments.replace('"${cap[@]}"', "--cap-gib 24").replace('"${trl[@]}"', trl)
            words = shlex.split(arguments)
            assert "torch sees no CUDA device" in refuse(script, *words, "--device", "cuda")


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


@pytest.mark.slow
def test_generating_is_compared_on_equal_answers(tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        '{"prompt": "Name a colour."}\n{"prompt": "What is the opposite of warm, and of high?"}\n'
    )
    (line,) = run("generate.py", "--prompts", prompts, "--count", 2, "--max-new-tokens", 6, "--repeats", 1)
    check_line(line, "generate")
    figures = line["figures"]
    assert figures["equal_answers"] == 2
    assert all(len(rates) == 1 and rates[0] > 0 for rates in figures["tokens_per_second"].values())
