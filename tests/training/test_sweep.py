"""Sweeps: every combination a run of its own, gone on with after a kill, compared at the end."""

import json

import pytest
import yaml
from helpers.tiny import changed

from qorpo.errors import RecipeError, RunError
from qorpo.training.progress import Progress
from qorpo.training.sweep import sweep

VALUES = ["objective.lambda=0.1,1.0"]


@pytest.fixture
def recipe(recipe_dict, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            changed(recipe_dict, train__max_steps=4, data__eval=0.25, output=str(tmp_path / "out"))
        )
    )
    return path


class Killed(BaseException):
    """What no `except Exception` holds."""


class KilledAt(Progress):
    """Ends the process's work at the nth step that any run takes."""

    def __init__(self, nth):
        self.left = nth

    def step(self, done_steps):
        self.left -= 1
        if not self.left:
            raise Killed


def what_it_says(output, tmp_path):
    """The comparison without what clocks say of it."""
    from qorpo.reports.write import write_report

    runs = sorted(path for path in output.iterdir() if path.is_dir())
    found = json.loads(write_report(runs, tmp_path / "c.json")[0].read_text().replace(str(output), "OUT"))
    return [
        {name: value for name, value in run.items() if name != "machine"} for run in found["runs"]
    ], found["recipes"]


@pytest.mark.slow
def test_a_sweep_killed_twice_ends_with_the_same_page(recipe, tmp_path):
    whole = sweep(str(recipe), [*VALUES, f"output={tmp_path / 'whole'}"])
    assert [run.name for run in whole.runs] == ["lambda_0.1", "lambda_1.0"]
    assert whole.report == tmp_path / "whole" / "report.html"
    assert [verdict.split(":")[0] for verdict in whole.verdicts] == ["lambda_0.1", "lambda_1.0"]
    for nth in (3, 5):  # in the first run, then in the second
        with pytest.raises(Killed):
            sweep(str(recipe), VALUES, progress=KilledAt(nth))
    assert not (tmp_path / "out" / "report.html").exists()
    sweep(str(recipe), VALUES)
    assert (tmp_path / "out" / "report.html").exists()
    assert what_it_says(tmp_path / "out", tmp_path) == what_it_says(tmp_path / "whole", tmp_path)
    for run in ("lambda_0.1", "lambda_1.0"):
        one, other = (
            tmp_path / name / run / "adapter" / "adapter_model.safetensors" for name in ("out", "whole")
        )
        assert one.read_bytes() == other.read_bytes()
    with pytest.raises(RunError, match="holds another sweep"):
        sweep(str(recipe), ["objective.lambda=0.1,0.5"])


@pytest.mark.slow
def test_the_hopeless_end_early_where_that_is_asked_for(recipe, tmp_path):
    values = ["train.learning_rate=0.005,0.004,1e-9"]
    result = sweep(str(recipe), values, stop_early=True)
    assert list(result.stopped) == ["learning_rate_1e_9"]
    assert "is worse than the" in result.stopped["learning_rate_1e_9"]
    assert not (result.runs[2] / "adapter").exists()
    again = sweep(str(recipe), values, stop_early=True)
    assert again.stopped == result.stopped
    assert not (result.runs[2] / "adapter").exists()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["train.max_steps=1"], "nothing to try"),
        (["objective.lambda=0.1,0.1"], "each value once"),
        (["objective.lambda=0.1,"], "none empty"),
        (["objective.lamda=0.1,0.5"], "did you mean objective.lambda"),
        (["train.seed=" + ",".join(map(str, range(101)))], "101 runs; 100 at most"),
        (["model.path=a/b,a_b"], "two runs would have one name"),
    ],
)
def test_what_makes_no_sweep_is_refused_before_anything_is_written(recipe, tmp_path, values, said):
    with pytest.raises(RecipeError, match=said):
        sweep(str(recipe), values)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_a_run_is_no_sweeps(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.yaml").write_text("")
    with pytest.raises(RunError, match="holds a run"):
        sweep(str(recipe), VALUES)
