"""A run folder has one owner: who comes second is told who it is, and a death lets go."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml
from helpers.tiny import changed, read_metrics

from qorpo import train
from qorpo.errors import RunError
from qorpo.storage import LOCK, Lock
from qorpo.training.run_folder import RunFolder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no flock")


@pytest.fixture
def recipe(recipe_dict, tmp_path):
    """A run of many steps with a checkpoint after each, as a file."""
    settings = {"train__max_steps": 10_000, "train__save_every": 1, "train__log_every": 1}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed(recipe_dict, **settings)))
    return path


def started(*launcher, recipe):
    arguments = [sys.executable, *launcher, "-m", "qorpo", "train", str(recipe)]
    return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_of_two_processes_on_one_output_one_trains_and_one_is_told(recipe, tmp_path, command):
    run = tmp_path / "run"
    process = started(recipe=recipe)
    try:
        while not list(run.glob("checkpoints/step-*")):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        for options in ([], ["--resume"]):
            code, out, err = command("train", recipe, *options)
            assert (code, out) == (2, "")
            assert f"in use by process {process.pid} on {socket.gethostname()} since 20" in err
        assert process.poll() is None
    finally:
        process.kill()
        process.communicate()
    steps = max(RunFolder(run).checkpoint_steps())
    code, _, err = command("train", recipe, "--resume", f"train.max_steps={steps + 1}")
    assert code == 0, err
    assert [row["step"] for row in read_metrics(run)] == list(range(1, steps + 2))
    assert not (run / LOCK).exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_end_together_where_another_has_the_folder(recipe, tmp_path):
    with Lock(tmp_path / "run"):
        launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
        process = started(*launcher, recipe=recipe)
        _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert f"in use by process {os.getpid()} on" in err
    assert "exitcode  : 2 " in err
    assert not (tmp_path / "run").exists()


def test_a_lock_that_a_kill_left_is_in_nobodys_way(recipe_dict, tmp_path):
    run = tmp_path / "run"
    script = (
        "import sys; from qorpo.storage import *; Lock(Path(sys.argv[1])).take(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(run)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert [path.name for path in run.iterdir()] == [LOCK]
    train(changed(recipe_dict, train__max_steps=1))
    assert not (run / LOCK).exists()


def test_what_is_refused_leaves_no_folder(recipe_dict, tmp_path):
    with pytest.raises(RunError, match="holds no run to resume"):
        train(changed(recipe_dict, output=str(tmp_path / "a" / "b")), resume=True)
    assert not (tmp_path / "a").exists()


def test_the_owner_may_take_it_again_and_sweeps_what_a_kill_left(tmp_path):
    folder = RunFolder(tmp_path / "run")
    for name in (
        ".adapter.qorpo-unfinished",
        ".model.qorpo-replaced",
        "checkpoints/.step-2.qorpo-unfinished",
    ):
        (folder.path / name).mkdir(parents=True)
    (folder.path / ".mine").mkdir()
    with folder.owned():
        with RunFolder(folder.path).owned():
            pass
        assert sorted(path.name for path in folder.path.iterdir()) == [LOCK, ".mine", "checkpoints", "model"]
        assert list(folder.checkpoints.iterdir()) == []
        assert json.loads((folder.path / LOCK).read_text())["process"] == os.getpid()
    assert not (folder.path / LOCK).exists()


def test_a_forked_child_does_not_hold_it_on(tmp_path):
    lock = Lock(tmp_path)
    lock.take()
    child = os.fork()
    if child == 0:
        lock.release()  # not the child's
        time.sleep(60)
        os._exit(0)
    try:
        time.sleep(0.2)
        assert lock.path.exists()
        lock.release()
        script = "import sys; from qorpo.storage import *; Lock(Path(sys.argv[1])).take()"
        subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
