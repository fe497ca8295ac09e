"""A session stands without the loop: another loop can take its gradients, steps and scores."""

import pytest
import torch
from helpers.tiny import changed

from qorpo.build import build_objective
from qorpo.data.groups import Group
from qorpo.engine.device import resolve_on
from qorpo.errors import ModelError
from qorpo.model.load import load_model
from qorpo.recipe import load_recipe
from qorpo.training.session import Session, trained_of

GROUPS = [
    Group((5, 9, 30), ((7, 8, 9, 10), (11, 12)), "a"),
    Group((6,), ((70, 80), (90, 91, 92)), "b"),
]


@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_loop_of_ones_own_trains_with_it(recipe_dict, base, tmp_path, tuning):
    changes = {"tuning": tuning, "train__learning_rate": 1e-3, "train__warmup_ratio": 0.0}
    recipe_dict["model"].pop("quantization", None)
    recipe = resolve_on(load_recipe(changed(recipe_dict, output=str(tmp_path / "run"), **changes)), "cpu")
    quantization = "nf4" if tuning == "lora" else "none"
    session = Session(
        load_model(str(base), quantization=quantization), recipe, longest=(3, 4, 2), total_steps=10
    )
    objective = build_objective(recipe.objective)
    before = session.evaluate(GROUPS, objective)
    assert all(parameter.grad is None for parameter in session.trained)
    for step in range(5):
        means = session.backward(GROUPS, objective, seed=step)
        assert means["grad_norm"] > 0
        session.optimizer.step()
        session.schedule.step()
        session.optimizer.zero_grad()
    assert session.evaluate(GROUPS, objective)["loss"].mean() < before["loss"].mean()
    assert "auto" not in session.recipe.memory.model_dump(exclude={"budget_gib"}).values()
    assert session.weights.name == {"lora": "adapter", "full": "model"}[tuning]
    assert not (tmp_path / "run").exists()  # what is written is the loop's


def test_a_model_in_which_nothing_trains_is_refused():
    with pytest.raises(ModelError, match="nothing in the model trains"):
        trained_of(torch.nn.Linear(2, 2).requires_grad_(False))
