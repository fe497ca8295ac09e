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


def test_train_ends_with_before_and_after_side_by_side_and_the_next_commands(command, recipe, tmp_path):
    code, out, _ = command("train", recipe(data__eval=0.25, train__max_steps=4))
    assert code == 0
    run = tmp_path / "run"
    adapter, kept, head, *rest = out.splitlines()
    assert adapter == f"adapter: {run / 'adapter'}"
    assert kept == "kept: step 4 of 4, the best by held-out loss"
    assert re.split(r"  +", head.strip()) == [
        "held-out start",
        "held-out end",
        "last step",
    ]  # the best is the end
    rows = read_metrics(run)
    first, last = (row for row in rows if row["step"] in (0, 4) and "eval_loss" in row)
    step = next(row for row in rows if row["step"] == 4 and "loss" in row)
    loss = next(line for line in rest if line.startswith("loss"))
    assert loss.split() == [
        "loss",
        *(f"{value:#.4g}" for value in (first["eval_loss"], last["eval_loss"], step["loss"])),
    ]
    names = [line.split()[0] for line in rest[: rest.index("")]]
    assert names[:3] == ["loss", "nll", "odds_ratio_loss"]
    assert set(names) == (step.keys() | {name.removeprefix("eval_") for name in last}) - {"step"}
    verdict = rest[rest.index("") + 1]
    assert re.match(
        r"(Better than|Not told apart from) the base.*: held-out accuracy .* → .*, 10 pairs\.$", verdict
    )
    assert rest[rest.index("") :] == [
        "",
        verdict,
        f"report: {run / 'report.html'}",
        "",
        "next:",
        f"  qorpo chat {run}   # ask it something",
        f"  qorpo merge {run} --output {run}-merged   # one model, in the base's weights",
        f"  qorpo train {run}/recipe.yaml --resume train.max_steps=8   # to train on",
    ]


def test_a_run_that_made_the_model_worse_ends_with_that(command, recipe, monkeypatch, caplog):
    monkeypatch.setattr("qorpo.Trainer.evaluate", lambda trainer: {"eval_loss": 0.29 + trainer.state.step})
    code, out, _ = command("train", recipe(data__eval=0.25, train__max_steps=4))
    assert code == 0
    assert "kept: the start (step 0), the best by held-out loss" in out
    *_, last = out.splitlines()
    assert last == (
        "held-out loss rose from 0.2900 to 4.2900: this run made the model worse; lower train.learning_rate. "
        "What is kept is the start (step 0), which was best"
    )
    assert last in caplog.text
    assert "next:" not in out


def test_without_evaluation_it_prints_the_last_steps(command, recipe):
    code, out, _ = command("train", recipe(train__max_steps=2))
    assert code == 0
    assert "kept" not in out
    assert "held-out" not in out
    assert re.search(r"^loss +\d\.\d{3}$", out, re.MULTILINE)
    assert re.search(r"^learning_rate +0.005000$", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.29184, "0.2918"), (0.291, "0.2910"), (1.2e-05, "1.2e-05"), (0.0, "0"), (5953.2, "5953"), (71234.5, "7.123e+04"),
     (-0.5, "-0.5000"), (12.0, "12.00")],
)  # fmt: skip
def test_figures_have_significant_digits(value, shown):
    from qorpo.console import figure

    assert figure(value) == shown


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
@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent in another way there")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_a_checkpoint_and_the_way_on(command, recipe, tmp_path, sent, code):
    path = recipe(train__max_steps=500, train__log_every=1, train__save_every=400)
    process = subprocess.Popen(
        [*QORPO, "train", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that starts tests in the background has its children ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    run = tmp_path / "run"
    metrics = run / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.read_text().count("\n") > 2):
        time.sleep(0.02)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert out == ""
    stopped_at = read_metrics(run)[-1]["step"]
    assert err.splitlines()[-1] == (
        f"qorpo: stopped by {sent.name} after step {stopped_at} of 500; {run / 'checkpoints' / f'step-{stopped_at}'} "
        "holds the run so far; go on with --resume"
    )
    assert "Traceback" not in err

    # 500 steps would be too many to wait for.
    code, out, err = command("train", path, "--resume", f"train.max_steps={stopped_at + 3}")
    assert code == 0, err
    assert [row["step"] for row in read_metrics(run)] == list(range(1, stopped_at + 4))


def test_ctrl_c_before_anything_is_written_does_not_say_resume(command, recipe, tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("qorpo.training.run.load_model", interrupted)
    code, out, err = command("train", recipe())
    assert (code, out) == (130, "")
    assert err.splitlines()[-1] == "qorpo: stopped; nothing was written yet; start again"
    assert not (tmp_path / "run").exists()


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
