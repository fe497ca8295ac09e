"""A sweep by the command line alone, killed twice, and the page that compares its runs."""

import json
import signal
import subprocess
import sys
import time

import pytest
from chain import FILES, Row, qorpo, read_json

pytestmark = pytest.mark.slow

ROW = Row(
    "a sweep",
    FILES / "every_reason.jsonl",
    data={"on_bad_record": "skip"},
    changes={"max_steps": 4, "eval_every": 2},
)
VALUES = "objective.lambda=0.1,1.0"


def killed_once_in(run, *arguments):
    """Start a sweep, and kill it as soon as this run has a line of metrics."""
    process = subprocess.Popen(
        [sys.executable, "-m", "qorpo", "sweep", *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while process.poll() is None and not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, "no line of metrics after ten minutes"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "ended by itself before it could be killed"


def compared(output):
    """The comparison without paths and what clocks say."""
    runs = [output / name for name in ("lambda_0.1", "lambda_1.0")]
    qorpo("report", *runs, "--output", output / "c.json")
    found = json.loads((output / "c.json").read_text().replace(str(output), "OUT"))
    for run in found["runs"]:
        del run["machine"]
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="kills by a signal")
def test_a_sweep_killed_twice_ends_with_the_same_page(tmp_path):
    recipe, killed, whole = ROW.write_recipe(tmp_path), tmp_path / "killed", tmp_path / "whole"
    for name in ("lambda_0.1", "lambda_1.0"):
        killed_once_in(killed / name, recipe, VALUES, f"output={killed}")
        assert not (killed / "report.html").exists()
    said = [qorpo("sweep", recipe, VALUES, f"output={output}").stdout for output in (killed, whole)]
    assert f"report: {killed / 'report.html'}" in said[0]
    assert said[0].replace(str(killed), "OUT") == said[1].replace(str(whole), "OUT")
    assert compared(killed) == compared(whole)
    assert set(read_json(killed / "c.json")["recipes"]) == {"objective.lambda"}
    page = (killed / "report.html").read_text(encoding="utf-8")
    assert "objective.lambda" in page
    assert "different objectives" in page
