"""train.early_stopping: a run ends once so many evaluations in a row were no better, also over kills and resumes."""

import logging

import pytest
from helpers.tiny import changed, read_metrics, short_recipe

from qorpo import Trainer, train
from qorpo.console import closing
from qorpo.errors import RecipeError
from qorpo.training.progress import Progress

# Held-out losses by step, an evaluation every second one: the best is step 4's, and 6 and 8 are no better.
LOSSES = {0: 3.0, 2: 3.1, 4: 2.0, 6: 2.5, 8: 2.0, 10: 1.0, 12: 0.9}


class Killed(BaseException):
    """Passes every `except Exception`, as a kill would."""


class KillAt(Progress):
    def __init__(self, step):
        self.at = step

    def step(self, done_steps):
        if done_steps == self.at:
            raise Killed


@pytest.fixture
def recipe(base, pairs_file, tmp_path, monkeypatch):
    evaluate = Trainer.evaluate
    monkeypatch.setattr(
        Trainer, "evaluate", lambda self: evaluate(self) | {"eval_loss": LOSSES[self.state.step]}
    )
    recipe = short_recipe(base, pairs_file, tmp_path / "run")
    return changed(recipe, data__eval=0.25, train__max_steps=12, train__save_every=5, train__early_stopping=2)


def evaluated(output):
    return [row["step"] for row in read_metrics(output) if "eval_loss" in row]


def result_of(output):
    return (output / "adapter" / "adapter_model.safetensors").read_bytes()


def test_it_ends_after_so_many_evaluations_and_says_why(recipe, caplog):
    caplog.set_level(logging.INFO, logger="qorpo")
    result = train(recipe)
    assert evaluated(result.output) == [0, 2, 4, 6, 8]
    assert (result.steps, result.best_step) == (8, 4)
    assert result.stopped_early == (
        "stopped after step 8 of 12: 2 evaluations in a row with no better loss than step 4 has (train.early_stopping: 2)"
    )
    assert result.stopped_early in caplog.text
    lines = closing(result)
    assert result.stopped_early in lines
    assert any("--resume train.early_stopping=null" in line for line in lines)
    assert result.trainer.folder.checkpoint_steps()[-1] == 8
    best = result.trainer.folder.checkpoint(4) / "adapter_model.safetensors"
    assert result_of(result.output) == best.read_bytes()


@pytest.mark.parametrize("step", [3, 7, 8])
def test_killed_and_resumed_it_ends_at_the_same_step_with_the_same_bytes(recipe, tmp_path, step):
    whole = train(changed(recipe, output=str(tmp_path / "whole")))
    with pytest.raises(Killed):
        train(recipe, progress=KillAt(step))
    result = train(recipe, resume=True)
    assert (result.steps, result.stopped_early) == (8, whole.stopped_early)
    assert evaluated(result.output) == evaluated(whole.output)
    assert result_of(result.output) == result_of(whole.output)
    again = train(recipe, resume=True)
    assert (again.steps, again.stopped_early) == (8, whole.stopped_early)


def test_a_run_that_it_ended_goes_on_without_it(recipe):
    train(recipe)
    result = train(changed(recipe, train__early_stopping=None), resume=True)
    assert (result.steps, result.best_step, result.stopped_early) == (12, 12, None)
    assert evaluated(result.output) == [0, 2, 4, 6, 8, 10, 12]
    # The saved recipe knows it too: another resume has nothing left to do.
    assert train(result.output / "recipe.yaml", resume=True).steps == 12


def test_it_does_not_count_before_the_best_one_nor_at_the_last_step(recipe):
    result = train(changed(recipe, train__early_stopping=2, train__max_steps=8))
    assert (result.steps, result.stopped_early) == (8, None)
    assert (
        train(changed(recipe, train__early_stopping=3), ["output=" + str(result.output) + "-3"]).steps == 12
    )


def test_it_needs_something_to_evaluate_on(recipe, make_trainer):
    with pytest.raises(RecipeError, match=r"train\.early_stopping: 2 counts evaluations.*set data\.eval"):
        train(changed(recipe, data__eval=None))
    with pytest.raises(RecipeError, match=r"train\.early_stopping"):
        make_trainer(has_eval=False, train__early_stopping=1)
