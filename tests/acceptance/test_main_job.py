"""The main job from the command line: adapters from preference data, merged into the base."""

import json
from pathlib import Path

import pytest
from chain import Row, check_counts, check_opens, check_run, qorpo, read_json, train_killed_and_resumed
from rows import ROWS


@pytest.mark.parametrize("row", ROWS)
def test_adapters(row: Row, tmp_path: Path):
    recipe, run, merged = row.write_recipe(tmp_path), tmp_path / "run", tmp_path / "merged"
    data = json.loads(qorpo("data", recipe, "--json").stdout)
    check_counts(row, data)
    assert json.loads(qorpo("plan", recipe, "--json").stdout)["fits"]
    train_killed_and_resumed(recipe, run)
    check_run(row, run, data)
    qorpo("merge", run, "--output", merged)
    verification = read_json(merged / "verification.json")
    assert verification["verdict"] == "pass"
    assert verification["pairs"] == data["eval"]["kept"]
    check_opens(merged)
