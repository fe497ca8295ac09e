"""What a terminal would obey is shown, wherever it comes from: names, rows, templates, other libraries' log lines."""

import json
import logging
import os
import re
import warnings

import pytest
import yaml
from helpers.tiny import changed, preference_records, write_records

from qorpo.errors import DataError
from qorpo.printable import printable

HOSTILE = "\x1b[31m\x1b]0;title\x07\x9b2J\r\x7f\u202e[bold]"


def obeyed(text):
    """What of a text a terminal would obey."""
    return re.findall("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", text)


def test_controls_are_spelled_and_all_else_is_kept():
    assert printable("a\tb\nç 好 🙂 [bold]") == "a\tb\nç 好 🙂 [bold]"
    assert printable("\x1b[31m\x9b\r\u202e") == "\\x1b[31m\\x9b\\x0d\\u202e"
    assert printable(os.fsdecode(b"caf\xe9")) == "caf\\xe9"
    assert printable("\ud83d") == "\\ud83d"
    assert obeyed(HOSTILE)
    assert not obeyed(printable(HOSTILE))


@pytest.fixture
def recipe_file(recipe_dict, tmp_path):
    def write(**changes):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(changed(recipe_dict, **changes)), encoding="utf-8")
        return path

    return write


@pytest.mark.parametrize(
    "changes",
    [
        {"model__path": "/nowhere/" + HOSTILE},
        {"data__train": "/nowhere/" + HOSTILE},
        {"output": "/dev/null/" + HOSTILE},
        {"model__chat_template": HOSTILE},
        {"train__schedule": HOSTILE},
        {"lora__targets": [HOSTILE]},
    ],
)
def test_an_error_shows_them(command, recipe_file, changes):
    code, out, err = command("train", recipe_file(**changes))
    assert code == 2, err
    assert "31m" in err
    assert not obeyed(out + err)


def test_a_template_s_own_error_shows_them(command, recipe_file, tmp_path):
    template = tmp_path / "own.jinja"
    template.write_text("{{ raise_exception('" + HOSTILE + "') }}", encoding="utf-8")
    code, out, err = command("data", recipe_file(model__chat_template=str(template)))
    assert code == 2
    assert "title" in err
    assert not obeyed(out + err)


def test_the_tables_of_data_show_them(command, recipe_file, tmp_path):
    records = preference_records()
    records[0] = {"prompt": "P" + HOSTILE, "chosen": "C" + HOSTILE, "rejected": "<script>alert(1)</script>"}
    records[1] |= {"rejected": records[1]["chosen"]}
    path = write_records(tmp_path / f"{HOSTILE}.jsonl".replace("/", ""), records)
    recipe = recipe_file(data__train=str(path))
    page = tmp_path / "data.html"
    code, out, err = command("data", recipe, "--show", "40", "--output", page, "data.max_length=128")
    assert code == 0, err
    assert "[bold].jsonl:2" in re.sub(r"\s", "", out)  # in the table, whatever its width
    assert not obeyed(out + err)
    html = page.read_text(encoding="utf-8")
    assert not obeyed(html)
    assert "<script>alert" not in html  # the page has a script of its own
    assert "&lt;script&gt;" in html
    code, out, err = command("data", recipe, "--show", "40", "--json")
    assert code == 0
    assert not obeyed(out + err)
    assert json.loads(out)["train"]["read"] == 40


def test_a_log_line_of_any_library_shows_them(command, caplog):
    command("train", "missing.yaml")
    logging.getLogger("another.library").warning("%s: no such model", HOSTILE)
    assert "title" in caplog.text
    assert not obeyed(caplog.text.rstrip("\n"))


def test_so_does_a_warning(command, recipe_file, monkeypatch):
    def warns(*arguments):
        warnings.warn(HOSTILE, stacklevel=1)
        raise DataError("and ends")

    monkeypatch.setattr("qorpo.build.load_data", warns)
    code, out, err = command("data", recipe_file())
    assert (code, err.count("title")) == (2, 1)
    assert not obeyed(out + err)


def test_names_that_are_not_utf8_are_read_and_shown(command, recipe_file, tmp_path):
    name = os.fsencode(tmp_path) + b"/caf\xe9\x1b.jsonl"
    with open(name, "wb") as file:
        file.write("".join(json.dumps(each) + "\n" for each in preference_records()).encode())
    code, out, err = command("data", recipe_file(data__train=str(tmp_path)), "--show", "1")
    assert code == 0, err
    assert "caf\\xe9\\x1b.jsonl:1" in out
    assert not obeyed(out + err)
