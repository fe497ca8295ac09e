"""Runs compared: paired intervals, recipes' differences, names that tell them apart."""

import json

import pytest
from helpers.run_folders import make_run, pair_values

from qorpo.reports.compare import comparison_page, labels, reached_table
from qorpo.reports.run_files import read_run
from qorpo.reports.write import write_report


@pytest.fixture
def runs(tmp_path):
    def recipe(weight):
        return {"objective": {"name": "orpo", "lambda": weight}}

    return [
        make_run(tmp_path / "a", values={0: pair_values(), 40: pair_values(loss=0.6)}, recipe=recipe(0.1)),
        make_run(
            tmp_path / "b",
            values={0: pair_values(), 40: pair_values(loss=0.5, accuracy=0.9)},
            recipe=recipe(1.0),
        ),
        make_run(
            tmp_path / "c", values={0: pair_values(50), 40: pair_values(50, loss=0.5)}, recipe=recipe(0.1)
        ),
    ]


def test_differences_are_paired_and_marked_where_sure(runs):
    table = reached_table([read_run(run) for run in runs])
    assert table.head[:4] == ["run", "kept step", "accuracy", "loss"]
    first, second, third = table.rows
    assert first[:2] == ["a", "40"]
    assert "Δ" not in first[3]
    # The noise of a pair is the same in both runs, so the difference of each pair is exactly -0.1.
    assert second[3] == "0.50, Δ -0.10 (-0.10 to -0.10) ●"
    assert "Δ" not in third[3]  # of other pairs


def test_the_page_says_how_recipes_differ_and_draws_all_curves(runs, tmp_path):
    page = comparison_page([read_run(run) for run in runs])
    keys = {row[0]: row[1:] for section in page.sections for table in section.tables for row in table.rows}
    assert keys["objective.lambda"] == ["0.1", "1.0", "0.1"]
    assert "output" not in keys
    assert {len(chart.series) for chart in page.charts} == {3}
    path, verdicts = write_report(runs, tmp_path / "c.html")
    html = path.read_text(encoding="utf-8")
    assert "different objectives, so their losses are not of one kind" in html
    assert [line.split(":")[0] for line in verdicts] == ["a", "b", "c"]
    found = json.loads(write_report(runs, tmp_path / "c.json")[0].read_text())
    assert found["recipes"] == {"objective.lambda": {"a": "0.1", "b": "1.0", "c": "0.1"}}
    assert found["runs"][1]["differences_from_first"]["loss"]["mean"] == pytest.approx(-0.1)
    assert found["runs"][2]["differences_from_first"] == {}
    assert write_report(runs, tmp_path / "c.png")[0].read_bytes().startswith(b"\x89PNG")


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    runs = [read_run(make_run(tmp_path / name / "run", evaluations={})) for name in ("x", "y")]
    assert labels(runs) == ["x/run", "y/run"]
    long = [read_run(make_run(tmp_path / name / ("z" * 60), evaluations={})) for name in ("x", "y")]
    assert len(set(labels(long))) == 2
    assert max(map(len, labels(long))) <= 45


def test_runs_without_evaluations_and_torn_ones_are_compared_too(runs, tmp_path):
    bare = make_run(tmp_path / "bare")
    (bare / "metrics.jsonl").write_text('{"step"')
    html = write_report([bare, *runs], tmp_path / "c.html")[0].read_text(encoding="utf-8")
    assert "No verdict: no pairs were held out" in html
