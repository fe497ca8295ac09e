"""A run from its recipe to its folder, and a disk that fills up on the way."""

import contextlib
import errno
import hashlib
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from helpers.tiny import changed, preference_records, read_metrics, short_recipe, write_records

import qorpo
from qorpo import Trainer
from qorpo.recipe import load_recipe
from qorpo.reports.pair_values import PairValues, held_out_file
from qorpo.training.progress import Progress


class Recorder(Progress):
    """Notes what a run tells."""

    def __init__(self):
        self.told = []

    def start(self, done_steps, total_steps):
        self.told.append(("start", done_steps, total_steps))

    def step(self, done_steps):
        self.told.append(("step", done_steps))

    def logged(self, step, metrics):
        self.told.append(("logged", step, metrics))

    def evaluated(self, step, metrics):
        self.told.append(("evaluated", step, metrics))

    def close(self):
        self.told.append(("close",))


@pytest.fixture(scope="module")
def run(base, pairs_file, tmp_path_factory):
    """A finished run of 4 steps, with what it was told and what it told."""
    output = tmp_path_factory.mktemp("runs") / "first"
    recipe = changed(
        short_recipe(base, pairs_file, output), train__max_steps=4, data__eval=0.25, train__report_to="auto"
    )
    progress = Recorder()
    return recipe, qorpo.train(recipe, progress=progress), progress.told


def test_the_folder_explains_the_run(run):
    recipe, result, _ = run
    names = {path.name for path in result.output.iterdir()}
    assert names == {
        "recipe.yaml", "environment.json", "data.json", "metrics.jsonl", "checkpoints", "trackers", "adapter",
        "held_out", "report.html",
    }  # fmt: skip
    assert result.output.name == "first"
    assert result.trained == result.output / "adapter"
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (result.trained / name).is_file()
    config = json.loads((result.trained / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == recipe["model"]["path"]


def test_the_saved_recipe_says_what_auto_became(run):
    recipe, result, _ = run
    text = (result.output / "recipe.yaml").read_text()
    assert "auto" not in text.replace("budget_gib: auto", "")
    saved = load_recipe(result.output / "recipe.yaml")
    assert saved == result.trainer.recipe
    assert saved.model.quantization == "nf4"
    assert saved.model.attention == "sdpa"
    assert saved.train.optimizer == "paged_adamw_8bit"
    assert saved.train.report_to == ("tensorboard",)
    assert saved.train.learning_rate == recipe["train"]["learning_rate"]


def test_the_environment_is_written_down(run):
    _, result, _ = run
    environment = json.loads((result.output / "environment.json").read_text())
    import torch

    assert environment["packages"]["torch"] == torch.__version__
    assert environment["device"].startswith("cpu")
    for name in ("qorpo", "commit", "command", "python", "platform", "threads", "base_commit"):
        assert name in environment


def test_the_data_is_written_down_with_its_hash(run, pairs_file):
    _, result, _ = run
    data = json.loads((result.output / "data.json").read_text())
    assert data["split_from"]["kept"] == 40
    assert data["train"]["kept"] + data["eval"]["kept"] == 40
    assert data["eval"]["kept"] == 10
    assert data["eval_prompts_in_train"] == 0
    (source,) = data["train"]["sources"]
    assert source["sha256"] == hashlib.sha256(pairs_file.read_bytes()).hexdigest()


def test_the_result_is_what_the_folder_holds(run):
    _, result, _ = run
    assert result.steps == 4
    rows = read_metrics(result.output)
    assert result.metrics == {name: value for name, value in rows[-1].items() if name != "step"}
    losses = {row["step"]: row["eval_loss"] for row in rows if row.get("eval_loss") and row["step"]}
    assert result.best_step == min(losses, key=losses.get)


def test_progress_hears_of_every_step_and_interval(run):
    _, _, told = run
    assert [event[:2] for event in told] == [
        ("start", 0), ("evaluated", 0), ("step", 1), ("step", 2), ("logged", 2), ("evaluated", 2),
        ("step", 3), ("step", 4), ("logged", 4), ("evaluated", 4), ("close",),
    ]  # fmt: skip
    assert told[0] == ("start", 0, 4)


def test_progress_is_told_the_means_of_its_interval(run):
    _, result, told = run
    rows = {row["step"]: row for row in read_metrics(result.output) if "loss" in row}
    logged = next(event[2] for event in told if event[:2] == ("logged", 4))
    assert logged["loss"] == pytest.approx((rows[3]["loss"] + rows[4]["loss"]) / 2)


def test_a_recipe_may_be_a_file_a_mapping_or_a_recipe(recipe_dict, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe_dict))
    adapters = set()
    for number, recipe in enumerate((recipe_dict, path, load_recipe(recipe_dict))):
        overrides = [f"output={tmp_path / str(number)}", "train.max_steps=1"]
        result = qorpo.train(recipe, overrides)
        assert result.steps == 1
        adapters.add((result.trained / "adapter_model.safetensors").read_bytes())
    assert len(adapters) == 1


def test_evaluation_pairs_of_their_own(recipe_dict, tmp_path, caplog):
    records = preference_records()
    train = write_records(tmp_path / "a.jsonl", records[:30])
    held_out = write_records(tmp_path / "b.jsonl", records[28:])
    recipe = changed(recipe_dict, data__train=str(train), data__eval=str(held_out), train__max_steps=1)
    result = qorpo.train(recipe)
    data = json.loads((result.output / "data.json").read_text())
    assert (data["train"]["kept"], data["eval"]["kept"], data["split_from"]) == (30, 12, None)
    assert data["eval_prompts_in_train"] == 2
    assert "2 evaluation prompts occur in training too" in caplog.text


# --- a disk that fills up ---


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 2 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if sys.platform != "linux" or os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk, room_kib):
    """Leave only so much room."""
    with (disk / "ballast").open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(0, file.tell() - room_kib * 1024))


def write_recipe(tmp_path, recipe):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def full_disk_message(code, out, err, remedy="make room"):
    assert code == 2, err
    assert out == ""
    assert "Traceback" not in err
    noise, _, message = err.rpartition("qorpo: ")
    assert "qorpo: " not in noise
    assert "could not be written" in message
    assert re.search(f"{re.escape(remedy)}, then (go on with --resume|start again)$", message.strip())
    assert "\n" not in message.strip()
    return message


@pytest.fixture(scope="module")
def whole_adapter(base, pairs_file, tmp_path_factory):
    """What the run ends with where there is room."""
    recipe = short_recipe(base, pairs_file, tmp_path_factory.mktemp("whole") / "run")
    return (qorpo.train(recipe).trained / "adapter_model.safetensors").read_bytes()


def before_step(monkeypatch, number, act):
    step = Trainer._step

    def step_after_act(trainer):
        if trainer.state.step == number:
            act()
        step(trainer)

    monkeypatch.setattr(Trainer, "_step", step_after_act)


@pytest.mark.parametrize(
    ("room_kib", "trackers"),
    [(0, []), (8, []), (32, []), (72, []), (160, []), (8, ["tensorboard"]), (72, ["tensorboard"])],
)
def test_a_full_disk_leaves_the_last_good_checkpoint_to_go_on_from(
    command, recipe_dict, tmp_path, small_disk, whole_adapter, monkeypatch, room_kib, trackers
):
    """The room decides which file is the one that does not fit: the metrics, or one of a checkpoint's."""
    run = small_disk / "run"
    path = write_recipe(tmp_path, changed(recipe_dict, output=str(run), train__report_to=trackers))
    before_step(monkeypatch, 3, lambda: fill(small_disk, room_kib))
    message = full_disk_message(*command("train", path))
    steps = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*"))
    assert f"the last good checkpoint is {run / 'checkpoints' / f'step-{steps[-1]}'};" in message
    assert "0.0" in message
    assert not (run / "adapter").exists()

    monkeypatch.undo()
    code, _, err = command("train", path, "--resume")
    full_disk_message(code, "", err)  # still full: as before
    assert sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")) >= steps

    (small_disk / "ballast").unlink()
    code, _, err = command("train", path, "--resume")
    assert code == 0, err
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == whole_adapter
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == list(range(1, 9))


def test_a_disk_that_is_full_from_the_start(command, recipe_dict, tmp_path, small_disk):
    path = write_recipe(tmp_path, changed(recipe_dict, output=str(small_disk / "run"), train__max_steps=1))
    fill(small_disk, 0)
    message = full_disk_message(*command("train", path))
    assert "no checkpoint was written yet; make room, then start again" in message
    (small_disk / "ballast").unlink()
    code, _, err = command("train", path)
    assert code == 0, err


def test_a_disk_that_is_full_at_the_end(
    command, recipe_dict, tmp_path, small_disk, whole_adapter, monkeypatch
):
    run = small_disk / "run"
    path = write_recipe(tmp_path, changed(recipe_dict, output=str(run)))
    save = Trainer.save

    def fill_and_save(trainer, folder):
        fill(small_disk, 12)
        save(trainer, folder)

    monkeypatch.setattr(Trainer, "save", fill_and_save)
    message = full_disk_message(*command("train", path))
    assert f"the last good checkpoint is {run / 'checkpoints' / 'step-8'};" in message
    assert [path.name for path in run.iterdir() if "adapter" in path.name] == []
    monkeypatch.undo()
    (small_disk / "ballast").unlink()
    code, _, err = command("train", path, "--resume")
    assert code == 0, err
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == whole_adapter


def test_a_write_cut_short_by_a_limit(command, recipe_dict, tmp_path, whole_adapter, monkeypatch):
    """Where no small disk can be made: a limit on the size of a file fails the same writes with another number."""
    resource = pytest.importorskip("resource")
    run = tmp_path / "run"
    path = write_recipe(tmp_path, recipe_dict)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before_step(monkeypatch, 3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard)))
    try:
        answer = command("train", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    message = full_disk_message(*answer, remedy="raise the limit on a file's size (ulimit -f)")
    assert f"the last good checkpoint is {run / 'checkpoints' / 'step-2'};" in message
    assert os.strerror(errno.EFBIG) in message or "inline_container" in message
    monkeypatch.undo()
    assert not (run / "checkpoints" / ".step-4.qorpo-unfinished").exists()
    code, _, err = command("train", path, "--resume")
    assert code == 0, err
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == whole_adapter


def test_the_values_of_each_held_out_pair_are_kept_at_the_start_the_best_and_the_end(run):
    _, result, _ = run
    files = {path.name for path in (result.output / "held_out").iterdir()}
    assert files >= {f"step-{step}.json" for step in (0, result.best_step, 4)}
    for step, metrics in result.evaluations.items():
        values = PairValues.read(held_out_file(result.output, step))
        if values is not None:
            assert len(values) == 10
            for name, column in values.metrics.items():
                assert sum(column) / 10 == pytest.approx(metrics[f"eval_{name}"], rel=1e-5)


def test_a_run_ends_in_its_page_with_a_verdict(run):
    _, result, _ = run
    assert result.report == result.output / "report.html"
    page = result.report.read_text(encoding="utf-8")
    assert "10 pairs" in result.verdict
    assert "</html>" in page


def test_a_page_that_cannot_be_drawn_ends_no_run(recipe_dict, monkeypatch, caplog):
    def broken(runs):
        raise ValueError("no ink")

    monkeypatch.setattr("qorpo.training.run.write_report", broken)
    result = qorpo.train(changed(recipe_dict, train__max_steps=1))
    assert (result.report, result.verdict) == (None, None)
    assert (result.trained / "adapter_model.safetensors").is_file()
    assert "the run's page could not be drawn (no ink)" in caplog.text
