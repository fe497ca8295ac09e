"""The command line: what it prints where, its exit codes, and how it shows progress."""

import os
import re
import select
import signal
import subprocess
import sys
import time

import pytest
import yaml
from helpers.tiny import changed, read_metrics

from qorpo.errors import RecipeError

QORPO = [sys.executable, "-m", "qorpo"]


@pytest.fixture
def recipe(recipe_dict, tmp_path):
    """write(**changes) is the path of a recipe's file."""

    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(changed(recipe_dict, **changes)))
        return path

    return write


# --- help ---


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]])
def test_help_needs_no_torch_and_names_what_there_is(arguments):
    check = "import sys; from qorpo.cli import main\ntry: main()\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", check, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout
    if arguments[0] == "train":
        for word in ("recipe", "key.sub=value", "--resume", "--debug"):
            assert word in done.stdout.lower()


def test_the_module_and_the_installed_command_are_the_same():
    done = subprocess.run([*QORPO, "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "ORPO" in done.stdout


def test_no_argument_shows_help_and_a_wrong_one_usage(command):
    code, out, err = command()
    assert "train" in out + err
    code, out, err = command("train")
    assert code == 2
    assert "Missing argument" in err
    code, out, err = command("train", "recipe.yaml", "--reusme")
    assert code == 2
    assert "--reusme" in err
    assert "Traceback" not in err


# --- results ---


def test_train_prints_the_adapters_path_and_its_metrics(command, recipe, tmp_path):
    code, out, _ = command("train", recipe(data__eval=0.25, train__max_steps=4))
    assert code == 0
    adapter, best, *metrics = out.splitlines()
    assert adapter == f"adapter: {tmp_path / 'run' / 'adapter'}"
    assert re.fullmatch(r"best evaluation loss at step [24] of 4", best)
    printed = dict(line.split(": ") for line in metrics)
    last = read_metrics(tmp_path / "run")[-1]
    assert {name: f"{value:.4f}" for name, value in last.items() if name != "step"} == printed
    assert list(printed) == sorted(printed)


def test_without_evaluation_it_prints_the_last_steps(command, recipe):
    code, out, _ = command("train", recipe(train__max_steps=2))
    assert code == 0
    assert "best" not in out
    assert re.search(r"^loss: \d\.\d{4}$", out, re.MULTILINE)


def test_overrides_win_over_the_file(command, recipe, tmp_path):
    code, out, err = command(
        "train",
        recipe(),
        "train.max_steps=3",
        "lora.targets=[q_proj, v_proj]",
        "train.learning_rate=2e-4",
        f"output={tmp_path / 'elsewhere'}",
    )
    assert code == 0, err
    assert out.startswith(f"adapter: {tmp_path / 'elsewhere' / 'adapter'}\n")
    saved = yaml.safe_load((tmp_path / "elsewhere" / "recipe.yaml").read_text())
    assert saved["train"]["max_steps"] == 3
    assert saved["train"]["learning_rate"] == 2e-4
    assert saved["lora"]["targets"] == ["q_proj", "v_proj"]
    assert not (tmp_path / "run").exists()


# --- errors ---


def test_debug_shows_where_an_error_came_from(command, recipe):
    with pytest.raises(RecipeError, match=r"train\.sed"):
        command("train", recipe(train__sed=1), "--debug")
    code, _, err = command("train", recipe(train__sed=1))
    assert code == 2
    assert err.startswith("qorpo: ")


def test_a_fault_of_qorpos_own_is_not_dressed_up(command, recipe, monkeypatch):
    def fail(*_, **__):
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr("qorpo.training.run.train", fail)
    with pytest.raises(ZeroDivisionError, match="a fault"):
        command("train", recipe())


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="interrupts are sent in another way there")
def test_an_interrupt_ends_with_130_and_the_way_on(command, recipe, tmp_path):
    path = recipe(train__max_steps=500, train__log_every=1)
    process = subprocess.Popen(
        [*QORPO, "train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts tests in the background has its children ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert out == ""
    assert err.splitlines()[-1] == "qorpo: stopped; go on with --resume"
    assert "Traceback" not in err

    stopped_at = read_metrics(tmp_path / "run")[-1]["step"]
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    for file in (path, tmp_path / "run" / "recipe.yaml"):  # 500 steps would be too many to wait for
        file.write_text(text.replace("max_steps: 500", f"max_steps: {stopped_at + 3}"))
    code, out, err = command("train", path, "--resume")
    assert code == 0, err
    rows = read_metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, stopped_at + 4))


# --- progress ---


@pytest.mark.slow
def test_away_from_a_terminal_progress_is_a_line_an_interval(recipe):
    path = recipe(data__eval=0.25, train__eval_every=4)
    done = subprocess.run([*QORPO, "train", str(path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("step ")]
    intervals = [line for line in lines if "held out" not in line]
    assert [line.split("  ")[0] for line in intervals] == [f"step {step}/8" for step in (2, 4, 6, 8)]
    for line in intervals:
        assert re.search(r"  loss \d+\.\d{4}  .*  left \d+:\d\d:\d\d$", line), line
    assert [line.split("  ")[0] for line in lines if "held out" in line] == [
        "step 0/8",
        "step 4/8",
        "step 8/8",
    ]
    assert intervals[-1].endswith("left 0:00:00")
    # What else is said is qorpo's own, and nothing to worry about.
    assert "warn" not in done.stderr.lower()
    assert "data: train: " in done.stderr
    assert "attention: sdpa" in done.stderr


@pytest.mark.slow
def test_on_a_terminal_progress_is_a_bar(recipe):
    pty = pytest.importorskip("pty")
    path = recipe(data__eval=0.25, train__eval_every=4)
    parent, child = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "160"}
    process = subprocess.Popen(
        [*QORPO, "train", str(path)], stdin=child, stdout=child, stderr=child, env=environment
    )
    os.close(child)
    shown = b""
    while True:
        ready, _, _ = select.select([parent], [], [], 120)
        assert ready, shown.decode(errors="replace")
        try:
            data = os.read(parent, 65536)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        shown += data
    os.close(parent)
    assert process.wait(timeout=60) == 0, shown.decode(errors="replace")
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "\x1b[" in shown.decode()
    assert re.search(r"training ━+ +8/8 \d+:\d\d:\d\d left 0:00:00 +loss \d", text), text[-3000:]
    assert re.search(r"training [━╸╺ ]+[1-7]/8", text), text[-3000:]
    assert "step 4/8  held out: loss" in text
    assert not re.search(r"step \d/8  loss", text), "lines as well as a bar"
    assert "adapter: " in text
