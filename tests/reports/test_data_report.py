"""`qorpo data`: what it prints, writes and refuses."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import qorpo
from qorpo.build import chat_format_of, load_data
from qorpo.errors import RunError
from qorpo.recipe import load_recipe
from qorpo.reports.data_report import REASONS, save

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "bench"))
from _syscalls import Fault, is_possible, run_child


@pytest.fixture
def recipe(base, tmp_path):
    records = [
        {"prompt": f"Why is {n} odd?", "chosen": f"It is [bold]{n}[/bold].", "rejected": "No."}
        for n in range(20)
    ]
    records += [{"prompt": "Why?", "chosen": "", "rejected": "No."}, records[0]]
    records += [{"prompt": records[1]["prompt"], "chosen": "No.", "rejected": "Maybe."}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    path = tmp_path / "r.yaml"
    keys = {"path": str(base)}, {"train": str(tmp_path / "pairs.jsonl"), "eval": 0.2}
    path.write_text(yaml.safe_dump({"model": keys[0], "data": keys[1], "output": str(tmp_path / "run")}))
    return path


def test_tables_say_what_was_dropped_why_and_where(command, recipe, tmp_path):
    code, out, err = command("data", recipe, "--show", "2")
    assert code == 0, err
    assert "read 23, kept 22" in out
    for reason, place in (
        ("empty", "pairs.jsonl:21"),
        ("duplicate", "pairs.jsonl:22"),
        ("contradiction", "pairs.jsonl:23"),
    ):
        assert re.search(rf"{reason} +│ +1 +│", out), reason
        assert place in out
    assert "saved" in out
    assert "chosen is the longer one in" in out
    assert "Why is 0 odd?<|end|>" in out.replace("\n", "")
    assert "It is [bold]0[/bold].<|end|>" in out  # text, and no markup of the console's
    assert not (tmp_path / "run").exists()


def test_json_is_one_object(command, recipe):
    code, out, _ = command("data", recipe, "--json", "--show", "1", "data.eval=null")
    values = json.loads(out)
    assert code == 0
    assert values["train"]["dropped"] == {"empty": 1}
    assert values["train"]["noted"] == {"duplicate": 1, "contradiction": 1}
    assert values["eval"] is None
    assert len(values["shown"]) == 1


def test_html_and_png(command, recipe, tmp_path):
    code, _, err = command("data", recipe, "--show", "1", "--output", tmp_path / "data.html")
    assert code == 0, err
    html = (tmp_path / "data.html").read_text(encoding="utf-8")
    assert "kept 22" in html
    assert "Why is 0 odd?" in html
    code, _, err = command("data", recipe, "--output", tmp_path / "data.png")
    assert code == 0, err
    assert (tmp_path / "data.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("data.txt", "unknown extension '.txt'; expected .html or .png"),
        (
            "no/such/folder.html",
            "can't be written (No such file or directory); make its folder, or give another --output",
        ),
        (
            "no/such/folder.png",
            "can't be written (No such file or directory); make its folder, or give another --output",
        ),
        ("taken.html", "is a folder; give the name of a file"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_before_all_else(
    command, recipe, tmp_path, output, said, monkeypatch
):
    monkeypatch.setattr("qorpo.build.load_data", None)
    (tmp_path / "taken.html").mkdir()
    code, out, err = command("data", recipe, "--output", tmp_path / output)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert out == ""


@pytest.mark.skipif(not is_possible(), reason="needs Linux 5.5 or newer with seccomp, on x86_64 or aarch64")
@pytest.mark.parametrize("ending", ["png", "html"])
def test_a_write_that_fails_ends_in_one_message_and_leaves_the_old_file(recipe, tmp_path, ending):
    keys = load_recipe(recipe)
    data = load_data(keys, chat_format_of(keys))
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / f"data.{ending}"
    save(tmp_path / path.name, data)  # what libraries write when they are imported is not looked at

    def body():
        try:
            save(path, data)
        except RunError as error:
            return 2 if "can't be written (No space left on device); make room" in str(error) else 1
        return 0

    whole = run_child(body, folder, None)
    assert (whole.code, whole.outside) == (0, set())
    content = path.read_bytes()
    for at in range(1, len(whole.calls) + 1):
        path.write_bytes(b"the old one")
        failed = run_child(body, folder, Fault(at, error=errno.ENOSPC))
        is_removal = whole.calls[at - 1][0].startswith("unlink")
        assert failed.code == 2 or is_removal, whole.calls[at - 1]
        if failed.code == 2:
            assert path.read_bytes() in (b"the old one", content)
        assert is_removal or list(folder.iterdir()) == [path], whole.calls[at - 1]
        [each.unlink() for each in folder.iterdir() if each != path]


def test_a_set_of_ties_exits_with_the_counts(command, recipe, tmp_path):
    tie = {"instruction": "Q", "output_1": "a", "output_2": "b", "preference": 1.5}
    (tmp_path / "ties.json").write_text(json.dumps([{**tie, "instruction": f"Q{n}"} for n in range(4)]))
    for name in ("data", "train"):
        code, _, err = command(name, recipe, f"data.train={tmp_path / 'ties.json'}")
        assert code == 2
        assert "0 usable pairs" in err
        assert "read 4, dropped 4 tie" in err


def test_every_reason_is_explained():
    source = "".join(
        path.read_text(encoding="utf-8") for path in Path(qorpo.__file__).parent.glob("data/*.py")
    )
    used = set(re.findall(r'(?:Unusable|BadRecord|report\.drop|report\.note)\(\s*"(\w+)"', source))
    assert {"tie", "empty", "wrong_type", "left_out_by_weight", "further_vote", "tools_left_out"} <= used
    found_in_texts = {"role_label_in_response", "replacement_character", "nul_character", "scores_disagree"}
    assert used | found_in_texts | {"duplicate", "contradiction"} <= REASONS.keys()


def test_the_place_of_a_row_is_whole_on_a_narrow_terminal(recipe, tmp_path):
    name = "a-long-name-" * 12 + "[bold].jsonl"
    moved = (tmp_path / "pairs.jsonl").rename(tmp_path / name)
    # In a process of its own: in this one rich may have looked at the terminal before.
    command = [sys.executable, "-m", "qorpo", "data", str(recipe), f"data.train='{moved}'", "--show", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "COLUMNS": "60"})
    assert done.returncode == 0, done.stderr
    out = done.stdout
    assert f"  empty: {name}:21\n" in out
    assert f"  duplicate: {name}:22\n" in out
    assert re.search(rf"^── {re.escape(name)}:\d+$", out, re.MULTILINE)
    assert max(len(line) for line in out.splitlines() if line[:1] in ("┃", "│", "┏", "└")) <= 60
