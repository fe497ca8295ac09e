"""The main job with --full: all parameters trained, and a checkpoint exported."""

import json
from pathlib import Path

import pytest
from chain import Row, check_opens, check_run, qorpo, train_killed_and_resumed
from rows import ROWS


@pytest.mark.parametrize("row", ROWS)
def test_all_parameters(row: Row, tmp_path: Path):
    recipe, run, exported = row.write_recipe(tmp_path), tmp_path / "run", tmp_path / "exported"
    data = json.loads(qorpo("data", recipe, "--json").stdout)
    assert json.loads(qorpo("plan", recipe, "--full", "--json").stdout)["fits"]
    train_killed_and_resumed(recipe, run, "--full")
    check_run(row, run, data)
    qorpo("export", run, "--output", exported)
    for folder in (run / "model", exported):
        check_opens(folder)
