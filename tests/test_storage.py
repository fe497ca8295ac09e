"""Files and folders whole or not at all, and one owner at a time."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from qorpo import storage
from qorpo.errors import RunError
from qorpo.storage import Lock, sweep, whole_folder, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def in_another_process(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A Python process that prints "ready" when the script's part before `wait()` is done, then waits."""
    prefix = "import sys, time\nfrom pathlib import Path\ndef wait():\n print('ready', flush=True); time.sleep(60)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", prefix + textwrap.dedent(script), *map(str, arguments)],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    write_text(tmp_path / "notes.txt", "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "notes.txt", "new")
    assert names(tmp_path) == ["notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "old"


def test_a_folder_appears_at_its_end_with_one_mode(tmp_path):
    with whole_folder(tmp_path / "adapter") as folder:
        assert not (tmp_path / "adapter").exists()
        (folder / "shown").write_text("x")
        (folder / "part").mkdir()
        hidden = folder / "part" / "hidden"
        hidden.touch(mode=0o600)
    assert names(tmp_path) == ["adapter"]
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_a_broken_block_leaves_what_was_there(tmp_path):
    write_json(tmp_path / "adapter.json", 1)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()
    with contextlib.suppress(ZeroDivisionError), whole_folder(tmp_path / "adapter", replace=True) as folder:
        (folder / "new").touch()
        1 / 0  # noqa: B018
    assert names(tmp_path) == ["adapter", "adapter.json"]
    assert names(tmp_path / "adapter") == ["old"]


def test_a_folder_that_is_not_to_be_replaced_stays(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").touch()
    with pytest.raises(OSError, match="not empty"), whole_folder(tmp_path / "model") as folder:
        (folder / "new").touch()
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["mine"]


def test_of_a_kill_between_the_two_renames_the_old_folder_comes_back(tmp_path):
    old, new = tmp_path / ".adapter.qorpo-replaced", tmp_path / ".adapter.qorpo-unfinished"
    for folder in (old, new):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    sweep(tmp_path)
    assert names(tmp_path) == ["adapter"]
    assert (tmp_path / "adapter" / "file").read_text() == old.name


def test_a_sweep_removes_only_what_qorpo_made(tmp_path):
    for name in ("mine.unfinished", ".mine.unfinished", ".notes.swp"):
        (tmp_path / name).touch()
    (tmp_path / ".adapter.qorpo-unfinished").mkdir()
    (tmp_path / ".data.json.qorpo-unfinished").touch()
    sweep(tmp_path)
    assert names(tmp_path) == [".mine.unfinished", ".notes.swp", "mine.unfinished"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_one_process_fills_a_folder_and_a_killed_ones_is_taken_over(tmp_path):
    script = """
    from qorpo.storage import whole_folder
    with whole_folder(Path(sys.argv[1])) as folder:
        (folder / "theirs").touch()
        wait()
    """
    process = in_another_process(script, tmp_path / "model")
    sweep(tmp_path)
    with pytest.raises(RunError, match="another process is writing it"), whole_folder(tmp_path / "model"):
        pass
    assert names(tmp_path / ".model.qorpo-unfinished") == ["theirs"]
    process.send_signal(signal.SIGKILL)
    process.wait()
    with whole_folder(tmp_path / "model") as folder:
        (folder / "ours").touch()
    assert names(tmp_path) == ["model"]
    assert names(tmp_path / "model") == ["ours"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_a_lock_names_its_holder_and_ends_with_it(tmp_path):
    script = """
    from qorpo.storage import Lock
    Lock(Path(sys.argv[1])).take()
    wait()
    """
    process = in_another_process(script, tmp_path)
    with pytest.raises(RunError, match=f"in use by process {process.pid} on .* since 20"):
        Lock(tmp_path).take()
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Lock(tmp_path):
        pass
    with Lock(tmp_path):  # it was released
        pass


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_a_lock_ends_with_its_holder_though_a_worker_lives_on(tmp_path):
    script = """
    import os, time
    from qorpo.storage import Lock
    Lock(Path(sys.argv[1])).take()
    reader, writer = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.write(writer, b"here")
        time.sleep(60)
        os._exit(0)
    os.read(reader, 4)
    (Path(sys.argv[1]) / "worker").write_text(str(worker))
    wait()
    """
    process = in_another_process(script, tmp_path)
    worker = int((tmp_path / "worker").read_text())
    try:
        process.send_signal(signal.SIGKILL)
        process.wait()
        os.kill(worker, 0)  # it lives
        with Lock(tmp_path):
            pass
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")
def test_who_waits_gets_a_folder_once_it_is_free(tmp_path):
    script = """
    from qorpo.storage import whole_folder
    with whole_folder(Path(sys.argv[1]), replace=True) as folder:
        (folder / "theirs").touch()
        wait()
    """
    process = in_another_process(script, tmp_path / "model")
    threading.Timer(0.5, process.kill).start()
    with whole_folder(tmp_path / "model", wait=True) as folder:
        assert process.wait() != 0
        (folder / "ours").touch()
    assert names(tmp_path / "model") == ["ours"]


def test_a_folder_that_cannot_be_flushed_is_not_left(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(storage, "flush", fail)
    with pytest.raises(OSError, match="No space left"):
        storage.make_folder(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
