"""A run that is stopped at any moment and resumed ends as if it had never stopped, to the last bit."""

import contextlib
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers.tiny import changed, preference_records, read_metrics, short_recipe, write_records

from qorpo import train
from qorpo.errors import Interrupted
from qorpo.reports.write import write_report
from qorpo.training.progress import Progress
from qorpo.training.signals import StopSignals

TIMES = {"tokens_per_second", "pairs_per_second", "eval_pairs_per_second", "peak_memory_gib"}


class Killed(BaseException):
    """Passes every `except Exception`, as a kill would."""


class KillAt(Progress):
    """Ends a run after a step, before anything of that step is written."""

    def __init__(self, step):
        self.at = step

    def step(self, done_steps):
        if done_steps == self.at:
            raise Killed


@pytest.fixture(scope="module")
def resumable(base, pairs_file):
    """NF4, dropout, 8-bit states (a rank high enough that they are 8-bit), evaluation, checkpoints on another beat."""
    return changed(
        short_recipe(base, pairs_file, "unset"),
        lora__rank=64,
        lora__dropout=0.1,
        data__eval=0.25,
        train__max_steps=12,
        train__eval_every=4,
        train__save_every=3,
        train__log_every=2,
        train__optimizer="paged_adamw_8bit",
    )


@pytest.fixture(scope="module")
def reference(resumable, tmp_path_factory):
    """The run that nothing stopped."""
    output = tmp_path_factory.mktemp("reference") / "run"
    train(at(resumable, output))
    return output


@pytest.fixture(scope="module")
def stopped_at_8(resumable, tmp_path_factory):
    output = tmp_path_factory.mktemp("stopped") / "run"
    run_until_killed(at(resumable, output), 8)
    return output


@pytest.fixture
def stopped(stopped_at_8, resumable, tmp_path):
    """A run killed at step 8, for `resume` to go on with."""
    shutil.copytree(stopped_at_8, tmp_path / "run")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(at(resumable, tmp_path / "run")))
    return tmp_path / "run"


@pytest.fixture
def finished(reference, resumable, tmp_path):
    """A run that came to its end; its page names its folder."""
    shutil.copytree(reference, tmp_path / "run")
    write_report([tmp_path / "run"])
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(at(resumable, tmp_path / "run")))
    return tmp_path / "run"


@pytest.fixture
def resume(command, tmp_path):
    """resume(overrides…) is (exit code, stdout, stderr) of the command."""

    def run(*overrides):
        return command("train", tmp_path / "recipe.yaml", "--resume", *overrides)

    return run


def at(recipe, output, **changes):
    return changed(recipe, output=str(output), **changes)


def run_until_killed(recipe, step, **options):
    with pytest.raises(Killed):
        train(recipe, progress=KillAt(step), **options)


def adapter(output):
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def measured(output):
    """metrics.jsonl without what depends on the clock and the machine."""
    return [{name: value for name, value in row.items() if name not in TIMES} for row in read_metrics(output)]


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def assert_same_end(output, reference):
    assert adapter(output) == adapter(reference)
    assert measured(output) == measured(reference)
    states = [
        json.loads(max(run.glob("checkpoints/step-*/state.json"), key=lambda path: path.stat().st_mtime).read_text())
        for run in (output, reference)
    ]  # fmt: skip
    assert states[0] == states[1]
    assert not list(output.rglob(".*"))


def assert_each_row_once(output, steps, eval_every):
    rows = read_metrics(output)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, steps + 1))
    assert [row["step"] for row in rows if "eval_loss" in row] == list(range(0, steps + 1, eval_every))


# --- killed from outside ---


@pytest.mark.slow
def test_a_command_killed_again_and_again_ends_bit_for_bit_the_same(resumable, tmp_path):
    seed = int(os.environ.get("QORPO_TEST_SEED", random.randrange(10**6)))
    print(f"kills drawn from QORPO_TEST_SEED={seed}")
    draw = random.Random(seed)
    steps, kills = 18, 3
    resumable = changed(
        resumable, train__max_steps=steps, train__log_every=1, train__eval_every=3, train__save_every=2
    )
    reference, output = tmp_path / "reference", tmp_path / "run"
    train(at(resumable, reference))

    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(at(resumable, output)))
    log = tmp_path / "log"
    for kill in range(kills + 1):
        started = (output / "recipe.yaml").exists()
        with log.open("a") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "qorpo", "train", str(recipe), *(["--resume"] if started else [])],
                stdout=file,
                stderr=file,
            )
            if kill < kills:
                wait_for_step(process, output, draw.randint(kill * 5, kill * 5 + 4))
                time.sleep(draw.uniform(0, 0.3))
                process.kill()
            process.wait(timeout=120)
        expected = {0, -signal.SIGKILL} if kill < kills else {0}
        assert process.returncode in expected, log.read_text()
        print("killed with", sorted(path.name for path in output.glob("checkpoints/*")) or "no checkpoint")

    assert_same_end(output, reference)
    assert_each_row_once(output, steps, 3)
    state = torch.load(output / "checkpoints" / f"step-{steps}" / "optimizer.pt", weights_only=True)
    assert torch.uint8 in {tensor.dtype for tensor in tensors_in(state)}, "no 8-bit state was part of this"


def tensors_in(nested):
    if torch.is_tensor(nested):
        yield nested
    elif isinstance(nested, dict | list):
        for each in nested.values() if isinstance(nested, dict) else nested:
            yield from tensors_in(each)


def wait_for_step(process, output, step):
    """Until metrics.jsonl has the step's row, or the process ends."""
    while process.poll() is None:
        # A line may be half written.
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            last = (output / "metrics.jsonl").read_text().splitlines()[-1]
            if json.loads(last)["step"] >= step:
                return
        time.sleep(0.01)


# --- killed from inside, where the moment is known ---


@pytest.mark.parametrize("step", [1, 2, 3, 4, 7, 12])
def test_a_kill_after_any_step(resumable, reference, tmp_path, step):
    """1 and 2 are before the first checkpoint; 3 before its own is written; 4 before its evaluation; 12 before the end."""
    output = tmp_path / "run"
    run_until_killed(at(resumable, output), step)
    assert not (output / "adapter").exists()
    train(at(resumable, output), resume=True)
    assert_same_end(output, reference)
    assert_each_row_once(output, 12, 4)


@pytest.mark.parametrize("optimizer", ["paged_adamw_32bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused"])
def test_every_optimizers_state_comes_back(resumable, tmp_path, optimizer):
    resumable = changed(resumable, train__optimizer=optimizer, train__max_steps=6, model__quantization="none")
    reference, output = tmp_path / "reference", tmp_path / "run"
    train(at(resumable, reference))
    run_until_killed(at(resumable, output), 5)
    train(at(resumable, output), resume=True)
    assert_same_end(output, reference)


def test_a_trained_head_comes_back(resumable, tmp_path):
    resumable = changed(resumable, train__max_steps=6, lora__modules_to_save=["lm_head"])
    reference, output = tmp_path / "reference", tmp_path / "run"
    train(at(resumable, reference))
    run_until_killed(at(resumable, output), 5)
    train(at(resumable, output), resume=True)
    assert_same_end(output, reference)


def test_the_best_before_a_kill_is_still_the_best_after(resumable, tmp_path, monkeypatch):
    from qorpo import Trainer

    evaluate = Trainer.evaluate

    def with_a_best_at_4(trainer):
        return evaluate(trainer) | {"eval_loss": abs(trainer.state.step - 4.0)}

    monkeypatch.setattr(Trainer, "evaluate", with_a_best_at_4)
    output = tmp_path / "run"
    resumable = changed(resumable, train__keep_checkpoints=1)
    run_until_killed(at(resumable, output), 11)
    result = train(at(resumable, output), resume=True)
    assert result.best_step == 4
    assert adapter(output) == (output / "checkpoints/step-4/adapter_model.safetensors").read_bytes()


def test_the_start_of_full_tuning_is_kept_and_gone_on_from(resumable, base, tmp_path, monkeypatch):
    """A checkpoint of step 0 has the weights alone: an optimizer that was asked for its state would count a step."""
    from safetensors.torch import load_file

    from qorpo import Trainer

    monkeypatch.setattr(Trainer, "evaluate", lambda trainer: {"eval_loss": 1.0 + trainer.state.step})
    resumable = changed(
        resumable, tuning="full", train__optimizer="adamw_torch", train__max_steps=4, train__eval_every=2
    )
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(at(resumable, whole))
    run_until_killed(at(resumable, killed), 2)
    assert sorted(path.name for path in killed.glob("checkpoints/*")) == ["step-0"]
    result = train(at(resumable, killed), resume=True)
    assert result.best_step == 0
    assert measured(killed) == measured(whole)
    kept, start = (load_file(folder / "model.safetensors") for folder in (killed / "model", base))
    assert all(torch.equal(kept[name], start[name]) for name in start)


def test_a_half_written_checkpoint_is_passed_over_and_swept_away(resumable, reference, stopped):
    half = stopped / "checkpoints" / ".step-8.qorpo-unfinished"
    shutil.copytree(stopped / "checkpoints" / "step-6", half)
    (half / "optimizer.pt").write_bytes(b"PK half")
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    train(at(resumable, stopped), resume=True)
    assert_same_end(stopped, reference)


# --- stopped by a signal ---


class SignalAt(Progress):
    """Sends this process a signal as a step is done."""

    def __init__(self, step, number):
        self.at, self.number = step, number

    def step(self, done_steps):
        if done_steps == self.at:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 5, 6])
def test_a_signal_ends_a_run_after_its_step_and_nothing_is_lost(resumable, reference, tmp_path, number, step):
    """5 is neither logged, saved nor evaluated; 6 is saved."""
    output = tmp_path / "run"
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match=f"stopped by {number.name} after step {step} of 12") as stopped:
        train(at(resumable, output), progress=SignalAt(step, number))
    assert stopped.value.signal == number
    assert signal.getsignal(number) is before
    assert (output / "checkpoints" / f"step-{step}").is_dir()
    assert [row["step"] for row in read_metrics(output) if "loss" in row] == list(range(1, step + 1))
    train(at(resumable, output), resume=True)
    assert_same_end(output, reference)
    assert_each_row_once(output, 12, 4)


def test_a_signal_in_the_last_step_lets_the_run_end(resumable, reference, tmp_path):
    train(at(resumable, tmp_path / "run"), progress=SignalAt(12, signal.SIGTERM))
    assert_same_end(tmp_path / "run", reference)


def test_a_second_interrupt_ends_it_at_once(monkeypatch):
    monkeypatch.setattr("qorpo.training.signals.SECONDS_OF_ONE", 0.0)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
        time.sleep(0.01)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# --- a run made longer ---


def test_a_finished_run_is_extended(resumable, tmp_path, resume, caplog):
    short = changed(resumable, train__max_steps=6)
    recipe, output = at(short, tmp_path / "run"), tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(recipe)
    before = adapter(output)
    code, _, err = resume("train.max_steps=12")
    assert code == 0, err
    assert "train.max_steps: 6 in the saved run, 12 now" in caplog.text
    # Of 12 steps 2 are warm-up; after 6 the cosine stands at 4 of 10. Of 6 steps it would have come to its end.
    rate = 0.005 * (1 + math.cos(0.4 * math.pi)) / 2
    assert f"12 steps now, cosine: the learning rate of step 7 was to be 0 and is {rate:.3g}" in caplog.text
    rows = [row for row in read_metrics(output) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[6]["learning_rate"] == pytest.approx(rate)
    assert [row["step"] for row in read_metrics(output) if "eval_loss" in row] == [0, 4, 6, 8, 12]
    assert adapter(output) != before
    saved = yaml.safe_load((output / "recipe.yaml").read_text())
    assert saved["train"]["max_steps"] == 12

    # And again, killed on the way.
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for copy in (whole, killed):
        shutil.copytree(output, copy)
    longer = changed(resumable, train__max_steps=18)
    train(at(longer, whole), resume=True)
    run_until_killed(at(longer, killed), 17, resume=True)
    train(at(longer, killed), resume=True)
    assert_same_end(killed, whole)


def test_by_epochs_too(resumable, tmp_path, resume):
    """30 pairs, 10 a step."""
    output = tmp_path / "run"
    recipe = changed(
        at(resumable, output), train__max_steps=None, train__epochs=1, train__schedule="constant"
    )
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    train(recipe)
    code, out, err = resume("train.epochs=2")
    assert code == 0, err
    assert [row["step"] for row in read_metrics(output) if "loss" in row] == list(range(1, 7))
    code, out, err = resume("train.epochs=1")
    assert (code, out) == (2, "")
    assert f"train.epochs: 1 is 3 steps, and {output} has done 6; give more" in err


def test_a_length_already_passed_is_refused(stopped, resume):
    before = contents(stopped)
    code, out, err = resume("train.max_steps=5")
    assert (code, out) == (2, "")
    assert f"train.max_steps: 5 is 5 steps, and {stopped} has done 6; give more, or another output" in err
    assert contents(stopped) == before


# --- what --resume answers ---


def test_a_finished_run_is_left_as_it_is(finished, resume, caplog):
    before = contents(finished)
    code, out, err = resume()
    assert code == 0, err
    assert out.startswith(f"adapter: {finished / 'adapter'}\n")
    assert "Traceback" not in err
    assert "nothing left to do: all 12 steps are done; to go on, raise train.max_steps" in caplog.text
    assert "held-out start" in out
    assert contents(finished) == before


def test_a_finished_runs_adapter_is_made_again_where_it_was_lost(finished, resume):
    before = adapter(finished)
    shutil.rmtree(finished / "adapter")
    code, _, err = resume()
    assert code == 0, err
    assert adapter(finished) == before


def test_another_learning_rate_is_refused_with_both(stopped, resume):
    before = contents(stopped)
    code, out, err = resume("train.learning_rate=0.01", "lora.rank=8", "train.log_every=1")
    assert (code, out) == (2, "")
    assert "holds a run of another recipe; put these back, or give another output" in err
    assert "\n  train.learning_rate: 0.005 in the saved run, 0.01 now" in err
    assert "\n  lora.rank: 64 in the saved run, 8 now" in err
    assert "log_every" not in err
    assert contents(stopped) == before


def test_what_changes_no_result_may_change(stopped, reference, resume):
    code, _, err = resume(
        "train.log_every=1",
        "train.keep_checkpoints=1",
        "memory.logprob_chunk_tokens=16",
        "memory.activation_checkpointing=false",
    )
    assert code == 0, err
    assert adapter(stopped) == adapter(reference)
    assert_each_row_once(stopped, 12, 4)
    assert len(list(stopped.glob("checkpoints/*"))) == 1


def test_another_micro_batch_goes_on_to_nearly_the_same(resumable, tmp_path, resume):
    from safetensors.torch import load_file

    resumable = changed(
        resumable, lora__dropout=0.0, train__optimizer="adamw_torch", train__max_steps=6, train__save_every=2
    )
    reference, output = tmp_path / "reference", tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(at(resumable, output)))
    train(at(resumable, reference))
    run_until_killed(at(resumable, output), 4)
    code, _, err = resume("memory.microbatch_tokens=150")
    assert code == 0, err
    ours, theirs = (load_file(run / "adapter/adapter_model.safetensors") for run in (output, reference))
    start = load_file(output / "checkpoints/step-4/adapter_model.safetensors")
    moved = sum((theirs[name] - start[name]).abs().sum() for name in theirs)
    apart = sum((theirs[name] - ours[name]).abs().sum() for name in theirs)
    assert apart < 0.2 * moved


@pytest.mark.parametrize("what", ["train", "eval"])
def test_changed_data_is_refused(recipe_dict, tmp_path, resume, what):
    records = preference_records()
    files = {
        "train": write_records(tmp_path / "train.jsonl", records[:30]),
        "eval": write_records(tmp_path / "eval.jsonl", records[30:]),
    }
    recipe = at(recipe_dict, tmp_path / "run", **{f"data__{name}": str(path) for name, path in files.items()})
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_until_killed(recipe, 3)
    before = contents(tmp_path / "run")
    text = files[what].read_text()
    files[what].write_text(text.replace("fine", "poor", 1))
    code, out, err = resume()
    assert (code, out) == (2, "")
    assert f"data.{what}: the files have changed since {tmp_path / 'run'} began" in err
    assert contents(tmp_path / "run") == before
    files[what].write_text(text)
    assert resume()[0] == 0


@pytest.mark.parametrize("damage", [b"", b"no zip at all", None], ids=["empty", "garbage", "truncated"])
@pytest.mark.parametrize("file", ["optimizer.pt", "adapter_model.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_good(stopped, reference, resume, file, damage):
    assert sorted(path.name for path in stopped.glob("checkpoints/*")) == ["step-4", "step-6"]
    path = stopped / "checkpoints" / "step-6" / file
    path.write_bytes(path.read_bytes()[:-100] if damage is None and file != "state.json" else damage or b"{")
    before = contents(stopped)
    code, out, err = resume()
    assert (code, out) == (2, "")
    assert (
        f"{path}: is damaged (its sha256 is not the one it was written with); remove {path.parent} to go on from"
        in err
    )
    assert contents(stopped) == before
    if (file, damage) == ("optimizer.pt", None):
        shutil.rmtree(path.parent)
        assert resume()[0] == 0
        assert_same_end(stopped, reference)
