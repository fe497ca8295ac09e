"""A trained run asked: by a file of prompts, killed in the middle and gone on with, by odd ones, and in a conversation."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chain import qorpo
from rows import COMMITTED

OPTIONS = [
    "--samples", "3", "--temperature", "0.8", "--top-p", "0.95", "--max-new-tokens", "64", "--batch-size", "4",
]  # fmt: skip
PROMPTS = [
    {"id": "plain", "prompt": "Name the opposite of warm."},
    {"id": "long", "messages": [{"role": "user", "content": "Count. " * 60}]},
    {"id": 300, "prompt": "¿Qué? \u732b \U0001f408 <|assistant|> </s>"},
    *({"prompt": f"What is {number} plus {number}?"} for number in range(20)),
]

# What no model can be asked, and what the message has to name.
ODD = {
    b'{"prompt": "  "}': "prompts.jsonl:2: the prompt is empty",
    b'{"prompt": "\xff\xfe"}': "prompts.jsonl:3: byte 0xff is not UTF-8",
    b'{"id": "plain", "prompt": "Again?"}': "prompts.jsonl:4: id 'plain' is prompts.jsonl:1's too",
    b"What?": "prompts.jsonl:5: not JSON",
}
TOO_LONG = {"prompt": "long " * 9000}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("asked")
    qorpo("train", COMMITTED[1].write_recipe(folder))
    return folder / "run"


def test_prompts_answered_through_a_kill_are_the_same_file(run: Path, tmp_path: Path):
    prompts, whole, output = (tmp_path / name for name in ("prompts.jsonl", "whole.jsonl", "answers.jsonl"))
    prompts.write_text("".join(json.dumps(each) + "\n" for each in PROMPTS), encoding="utf-8")
    arguments = ["generate", run, "--prompts", prompts, *OPTIONS, "--output"]
    said = qorpo(*arguments, whole)
    assert f"answers: {whole}" in said.stdout
    answers = [json.loads(line) for line in whole.read_text(encoding="utf-8").splitlines()]
    ids = [each.get("id", place) for place, each in enumerate(PROMPTS)]
    assert [(each["id"], each["sample"]) for each in answers] == [(each, n) for each in ids for n in range(3)]

    command = [sys.executable, "-m", "qorpo", *map(str, arguments), str(output)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part, deadline = tmp_path / "answers.jsonl.part", time.monotonic() + 300
    while process.poll() is None and not (part.exists() and part.read_bytes().count(b"\n") > 8):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "ended before it could be killed"
    assert not output.exists()
    qorpo(*arguments, output, "--seed", 1, code=2)  # other answers don't mix with those kept
    qorpo(*arguments, output)
    assert output.read_bytes() == whole.read_bytes()
    assert not part.exists()
    assert "something is there already" in qorpo(*arguments, output, code=2).stderr


@pytest.mark.parametrize("odd", [ODD, {json.dumps(TOO_LONG).encode(): "prompts.jsonl:2: the prompt has"}])
def test_odd_prompts_are_refused_together_before_anything_is_written(
    run: Path, tmp_path: Path, odd: dict[bytes, str]
):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_bytes(b"\n".join([json.dumps(PROMPTS[0]).encode(), *odd, b""]))
    said = qorpo("generate", run, "--prompts", prompts, "--output", tmp_path / "answers.jsonl", code=2).stderr
    assert [named for named in odd.values() if named not in said] == [], said
    assert [each.name for each in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_a_conversation_through_a_pipe(run: Path):
    said = "Name the opposite of warm.\n\nAnd of high?\n/reset\nName the opposite of warm.\n/quit\nUnheard.\n"
    alone = qorpo("chat", run, "--max-new-tokens", 16, said=said).stdout.splitlines()
    assert len(alone) == 3
    assert alone[0] == alone[2]
    both = qorpo("chat", run, "--max-new-tokens", 16, "--beside", "base", said=said).stdout.splitlines()
    assert [line.split(":")[0] for line in both] == ["base", "run"] * 3
    assert both[1::2] == alone
