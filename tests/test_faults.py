"""A sample of what `scripts/bench/faults.py` does in full: kills, failed writes and flipped bits in each command."""

import contextlib
import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[1] / "scripts" / "bench"
sys.path.insert(0, str(BENCH))

from _memory_faults import PLACES  # noqa: E402
from _syscalls import Fault, is_possible, run_child  # noqa: E402 (found by the line above)

pytestmark = pytest.mark.skipif(
    not is_possible(), reason="needs Linux 5.5 or newer with seccomp, on x86_64 or aarch64"
)


def some_writes(folder):
    """A call of each sort, also by a thread and by another program."""

    def body():
        os.chdir(folder)
        os.mkdir("a")
        Path("a/b").write_text("x")
        os.rename("a/b", "c")
        thread = threading.Thread(target=Path("d").write_text, args=("y",))
        thread.start()
        thread.join()
        subprocess.run(["sh", "-c", "echo z > e"], check=True)
        os.rmdir("a")
        return 0

    return body


EXPECTED = [
    ("mkdir", "a"), ("openat", "a/b"), ("write", "a/b"), ("rename", "c"), ("openat", "d"), ("write", "d"),
    ("openat", "e"), ("write", "e"), ("rmdir", "a"),
]  # fmt: skip


def test_every_call_that_changes_a_file_is_counted(tmp_path):
    outcome = run_child(some_writes(tmp_path), tmp_path, None)
    assert outcome.code == 0
    assert outcome.calls == EXPECTED
    assert outcome.outside == outcome.mapped == set()


def test_a_write_into_a_mapped_file_and_one_elsewhere_are_told(tmp_path):
    def body():
        import mmap

        with (tmp_path / "in" / "m").open("w+b") as file:
            file.truncate(4096)
            mmap.mmap(file.fileno(), 4096)
        (tmp_path / "elsewhere").touch()
        return 0

    (tmp_path / "in").mkdir()
    outcome = run_child(body, tmp_path / "in", None)
    assert (outcome.code, outcome.mapped, outcome.outside) == (0, {"m"}, {str(tmp_path / "elsewhere")})


@pytest.mark.parametrize(
    ("at", "left"), [(1, set()), (4, {"a", "a/b"}), (6, {"a", "c", "d"}), (9, {"a", "c", "d", "e"})]
)
def test_a_kill_comes_before_its_call(at, left, tmp_path):
    outcome = run_child(some_writes(tmp_path), tmp_path, Fault(at, kill=True))
    assert outcome.code == -9
    assert outcome.calls == EXPECTED[:at]
    assert {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")} == left


def test_a_call_fails_once_and_a_full_disk_stays_full(tmp_path):
    def body():
        for number in range(3):
            with contextlib.suppress(OSError):
                (tmp_path / str(number)).touch()
        os.rename(tmp_path / "0", tmp_path / "renamed")
        return 0

    assert run_child(body, tmp_path, Fault(2, error=errno.ENOSPC)).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"renamed", "2"}
    (tmp_path / "2").unlink()
    assert run_child(body, tmp_path, Fault(2, error=errno.ENOSPC, stays=True)).code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"renamed"}


@pytest.mark.slow
def test_a_sample_of_faults_loses_nothing_and_leaves_nothing():
    """The script ends with 1 where a kill or a failed write did, or a flipped bit was not noticed."""
    options = ("kills", "writes", "flips", "--every", "97", "--first", "40", "--modes", "EIO,full disk")
    answer = subprocess.run(
        [sys.executable, str(BENCH / "faults.py"), *options], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    found = [json.loads(line) for line in answer.stdout.splitlines()]
    for line in found:
        assert "not reached" not in line["figures"]["ends"]
        assert line["figures"].get("mapped", []) == line["figures"].get("outside", []) == []
    ended = {
        what: {
            line["settings"]["name"]
            for line in found
            if line["settings"]["what"] == what and line["figures"]["trials"]
        }
        for what in ("kills", "writes", "flips")
    }
    commands = {
        "train",
        "resume",
        "train again",
        "trackers",
        "full train",
        "full resume",
        "merge",
        "verify",
        "export",
        "data",
    }
    assert ended["kills"] == ended["writes"] == commands
    kinds = {"checkpoint", "full checkpoint", "exported checkpoint", "adapter", "merged", "cache"}
    assert ended["flips"] == kinds | {f"manifest of {kind}" for kind in kinds}


@pytest.mark.slow
def test_memory_that_runs_out_is_said_at_every_place():
    """Each by the first kind of error; the script ends with 1 where one was not caught, or a place not reached."""
    answer = subprocess.run(
        [sys.executable, str(BENCH / "faults.py"), "memory", "--every", "97"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    found = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [line["settings"]["name"] for line in found] == [place.name for place in PLACES]
    assert {end for line in found for end in line["figures"]["ends"]} == {"advice", "done again"}
