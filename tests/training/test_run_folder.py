"""The run folder: nothing in the way is overwritten, and nothing half written looks whole."""

import errno
import json
import os
import signal
import subprocess
import sys

import pytest
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from qorpo.errors import RunError
from qorpo.training.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    return RunFolder(tmp_path / "runs" / "first")


def begun(folder):
    folder.path.mkdir(parents=True)
    folder.recipe.write_text("output: x\n")
    return folder


def checkpoints(folder, *steps):
    for step in steps:
        folder.checkpoint(step).mkdir(parents=True)
        (folder.checkpoint(step) / "state.json").write_text("{}")


# --- what is in the way ---


def test_a_new_or_an_empty_folder_is_free(folder):
    folder.check_free()
    assert not folder.path.exists()
    folder.path.mkdir(parents=True)
    folder.check_free()


@pytest.mark.parametrize("file", ["recipe.yaml", "notes.txt"])
def test_a_folder_with_something_in_it_is_not(folder, file):
    folder.path.mkdir(parents=True)
    (folder.path / file).touch()
    with pytest.raises(RunError, match="--resume" if file == "recipe.yaml" else "not empty"):
        folder.check_free()


def test_what_a_kill_before_the_first_step_leaves_is_in_nobodys_way(folder):
    folder.path.mkdir(parents=True)
    for name in ("data.json", ".environment.json.qorpo-unfinished", ".recipe.yaml.qorpo-unfinished"):
        (folder.path / name).touch()
    folder.check_free()
    with pytest.raises(RunError, match="holds no run to resume"):
        folder.check_resumable()


def test_only_a_folder_with_a_recipe_is_resumable(folder):
    with pytest.raises(RunError, match="leave out --resume"):
        folder.check_resumable()
    begun(folder).check_resumable()


def test_home_is_meant_by_a_tilde(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert RunFolder("~/runs/x").path == tmp_path / "runs" / "x"


# --- whole or not at all ---


def test_a_whole_folder_appears_at_its_end(folder):
    begun(folder)
    with folder.new_folder(folder.checkpoint(2)) as unfinished:
        (unfinished / "a").write_text("1")
        assert folder.checkpoint_steps() == []
        assert not folder.checkpoint(2).exists()
    assert folder.checkpoint_steps() == [2]
    assert (folder.checkpoint(2) / "a").read_text() == "1"
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-2"]


def test_a_whole_folder_takes_the_place_of_the_one_before(folder):
    begun(folder)
    for content in ("1", "2"):
        with folder.new_folder(folder.adapter) as unfinished:
            (unfinished / content).write_text(content)
    assert [path.name for path in folder.adapter.iterdir()] == ["2"]


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, RunError])
def test_an_error_inside_leaves_nothing_and_keeps_its_kind(folder, kind):
    begun(folder)
    with pytest.raises(kind), folder.new_folder(folder.checkpoint(2)) as unfinished:  # noqa: PT012 (a write, then an error)
        (unfinished / "a").write_text("1")
        raise kind("stop")
    assert list(folder.checkpoints.iterdir()) == []


def test_an_error_inside_leaves_the_one_before(folder):
    begun(folder)
    with folder.new_folder(folder.adapter) as unfinished:
        (unfinished / "a").write_text("1")
    with pytest.raises(ValueError, match="stop"), folder.new_folder(folder.adapter):
        raise ValueError("stop")
    assert (folder.adapter / "a").read_text() == "1"


def test_a_kill_inside_leaves_nothing_that_looks_whole_and_the_next_sweeps_it_away(folder):
    begun(folder)
    checkpoints(folder, 1)
    script = (
        "import os, signal, sys; from qorpo.training.run_folder import RunFolder\n"
        "folder = RunFolder(sys.argv[1])\n"
        "with folder.new_folder(folder.checkpoint(2)) as unfinished:\n"
        "    (unfinished / 'a').write_text('1')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(folder.path)])
    assert done.returncode == -signal.SIGKILL
    assert (folder.checkpoints / ".step-2.qorpo-unfinished" / "a").exists()
    assert folder.checkpoint_steps() == [1]

    with folder.new_folder(folder.checkpoint(2)) as unfinished:
        assert list(unfinished.iterdir()) == []
        (unfinished / "b").touch()
    assert [path.name for path in folder.checkpoint(2).iterdir()] == ["b"]
    (folder.path / ".data.json.qorpo-unfinished").touch()
    (folder.checkpoints / ".step-3.qorpo-unfinished").mkdir()
    folder.prune_checkpoints(keep=2, best_step=None)
    assert not list(folder.path.glob("**/.*"))
    assert folder.checkpoint_steps() == [1, 2]


# --- pruning ---


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [(1, None, [10]), (2, None, [8, 10]), (2, 4, [4, 8, 10]), (2, 10, [8, 10]), (9, 2, [2, 4, 6, 8, 10])],
)
def test_the_latest_and_the_best_are_kept(folder, keep, best, left):
    begun(folder)
    checkpoints(folder, 2, 4, 6, 8, 10)
    folder.prune_checkpoints(keep, best)
    assert folder.checkpoint_steps() == left
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == sorted(f"step-{n}" for n in left)


def test_steps_are_ordered_as_numbers_and_other_names_ignored(folder):
    begun(folder)
    checkpoints(folder, 100, 20, 3)
    (folder.checkpoints / "step-x").mkdir()
    assert folder.checkpoint_steps() == [3, 20, 100]


# --- metrics ---


def test_rows_are_appended_a_line_each(folder):
    begun(folder)
    folder.append_metrics([{"step": 1}, {"step": 2, "loss": 0.5}])
    folder.append_metrics([{"step": 3}])
    assert [json.loads(line) for line in folder.metrics.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2, "loss": 0.5},
        {"step": 3},
    ]


@pytest.mark.parametrize("broken", ["", '{"step": 3, "lo', "\n", "{}\n", "\0\0\0"])
def test_later_lines_and_a_broken_last_one_are_cut_off(folder, broken):
    begun(folder)
    folder.append_metrics([{"step": step} for step in (0, 1, 2, 2, 3)])
    with folder.metrics.open("a") as file:
        file.write(broken)
    folder.cut_metrics(2)
    folder.append_metrics([{"step": 3, "again": True}])
    rows = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert rows == [{"step": 0}, {"step": 1}, {"step": 2}, {"step": 2}, {"step": 3, "again": True}]


def test_cutting_what_is_not_there(folder):
    begun(folder)
    folder.cut_metrics(2)
    assert not folder.metrics.exists()


# --- writes that fail ---


def test_a_failed_write_names_the_last_good_checkpoint_and_the_room(folder):
    begun(folder)
    checkpoints(folder, 4)
    with pytest.raises(RunError) as caught, folder.writing():
        raise OSError(28, "No space left on device")
    message = str(caught.value)
    assert "No space left on device" in message
    assert "GiB free" in message
    assert f"the last good checkpoint is {folder.checkpoint(4)}" in message
    assert "make room, then go on with --resume" in message


def test_each_librarys_words_for_a_failed_write_are_known(folder):
    """Of torch.save into an open file, of torch.distributed.checkpoint, of safetensors and of tokenizers."""
    begun(folder)
    full = OSError(errno.ENOSPC, "No space left on device")
    try:
        try:
            raise full
        finally:
            raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    except RuntimeError as error:
        of_torch = error
    of_safetensors = SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )
    of_tokenizers = Exception("No space left on device (os error 28)")
    for error in (of_torch, CheckpointException("", {0: (full, None)}), of_safetensors, of_tokenizers):
        with pytest.raises(RunError, match="no checkpoint was written yet; make room"), folder.writing():
            raise error


def test_the_remedy_is_that_of_the_fault(folder):
    with pytest.raises(RunError, match="have the disk checked, then start again"), folder.writing():
        raise OSError(errno.EIO, "Input/output error")
    begun(folder)
    with pytest.raises(RunError, match="make it writable, then go on with --resume"), folder.writing():
        raise OSError(errno.EROFS, "Read-only file system")


def test_other_errors_pass(folder):
    with pytest.raises(ZeroDivisionError), folder.writing():
        raise ZeroDivisionError


def test_json_is_written_whole_or_not_at_all(folder):
    folder.write_json("data.json", {"kept": 3, "name": "gut – 好"})
    assert json.loads((folder.path / "data.json").read_text()) == {"kept": 3, "name": "gut – 好"}
    assert os.listdir(folder.path) == ["data.json"]


# --- torn notes ---


@pytest.mark.parametrize(
    "torn", ['{"step": 2, "lo', "\x00\x01", "[3]", "null", '{"step": "2"}', '{"step": 1, "loss": "x"}']
)
def test_torn_lines_of_metrics_are_left_out_and_said(folder, caplog, torn):
    begun(folder)
    folder.metrics.write_bytes(
        b'{"step": 1, "loss": 0.5}\n' + torn.encode() + b'\xff\n{"step": 2}\n{"step": 3}\n{"ste'
    )
    folder.cut_metrics(2)
    assert folder.read_metrics() == [{"step": 1, "loss": 0.5}, {"step": 2}]
    assert "1 lines can't be read, and are left out" in caplog.text


def test_a_last_line_that_a_kill_left_is_dropped_without_a_word(folder, caplog):
    begun(folder)
    folder.metrics.write_text('{"step": 1}\n{"step": 2, "lo')
    folder.cut_metrics(1)
    assert folder.read_metrics() == [{"step": 1}]
    assert not caplog.text
