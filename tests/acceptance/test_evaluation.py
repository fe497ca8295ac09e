"""A run evaluated from the command line: odd rows counted, killed in the middle, and the same results afterwards."""

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chain import qorpo, read_json, train_killed_and_resumed
from rows import COMMITTED, EVERY_REASON

ROW = COMMITTED[0]  # every reason to drop or cut a row
INSTRUCTIONS = [
    {"key": 1, "prompt": "Name the opposite of warm. No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]},
    {
        "key": 2, "prompt": "Write two words in capitals.", "instruction_id_list": ["change_case:capital_word_frequency"],
        "kwargs": [{"capital_relation": "at least", "capital_frequency": 2}],
    },
    {
        "key": 3, "prompt": "Answer in 3 sentences, in lowercase.",
        "instruction_id_list": ["length_constraints:number_sentences", "change_case:english_lowercase"],
        "kwargs": [{"relation": "at least", "num_sentences": 3}, {}],
    },
] * 3  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    train_killed_and_resumed(ROW.write_recipe(folder), folder / "run")
    return folder / "run"


@pytest.mark.slow
def test_pairs_of_every_kind_are_counted_as_in_training(run: Path, tmp_path: Path):
    output = tmp_path / "results.json"
    asked = ("evaluate", run, "--on", f"pairs:{EVERY_REASON}", "--output", output)
    said = qorpo(*asked).stdout
    (found,) = read_json(output)["results"].values()
    assert found["notes"]["dropped"] == ROW.dropped
    assert {name: count for name, count in found["notes"]["cut"].items() if count} == ROW.cut
    for reason in ROW.dropped:
        assert reason in said
    nll = found["figures"]["nll"]
    assert nll["difference"]["low"] <= nll["difference"]["value"] < 0, "the run did not learn"
    assert read_json(run / "evaluation.json")[f"pairs:{EVERY_REASON}"] == found
    # Once more, merged, against the base: the same but for roundings.
    qorpo("merge", run, "--output", tmp_path / "merged", "--onto", "dequantized", "--no-verify")
    qorpo(
        "evaluate", tmp_path / "merged", "--on", f"pairs:{EVERY_REASON}", "--output", output, code=2
    )  # no skipping
    assert read_json(output)["results"][f"pairs:{EVERY_REASON}"] == found, (
        "a refused evaluation wrote something"
    )


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="the extra eval is not installed")
def test_killed_in_the_middle_it_goes_on_to_the_same_results(run: Path, tmp_path: Path):
    prompts = tmp_path / "instructions.jsonl"
    records = [record | {"key": number} for number, record in enumerate(INSTRUCTIONS)]
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
    other = Path(shutil.copytree(run, tmp_path / "run"))
    asked = ["--on", f"ifeval:{prompts}", "--max-new-tokens", "96", "--batch-size", "1"]
    command = [sys.executable, "-m", "qorpo", "evaluate", str(run), *asked]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while process.poll() is None and answers_in(run) < 2:
        assert time.monotonic() < deadline, "no answer after a quarter of an hour"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "ended by itself before it could be killed"
    assert 2 <= answers_in(run) < len(records), "killed too late to be resumed"
    for each in (run, other):
        qorpo("evaluate", each, *asked)
    (found,), (whole,) = (
        [result for on, result in read_json(each / "evaluation.json").items() if on.startswith("ifeval")]
        for each in (run, other)
    )
    assert found["figures"] == whole["figures"]
    assert texts(run) == texts(other)
    # A third time nothing is answered.
    assert "are taken" in qorpo("evaluate", run, *asked).stderr


def answers_in(run: Path) -> int:
    """How many answers a killed evaluation has kept; the first line says what they were made with."""
    parts = list((run / "evaluation").glob("*.part")) if (run / "evaluation").is_dir() else []
    return max(0, parts[0].read_bytes().count(b"\n") - 1) if parts else 0


def texts(run: Path) -> list[str]:
    (path,) = (run / "evaluation").glob("ifeval-*.jsonl")
    return [json.loads(line)["response"] for line in path.read_text().splitlines()]
