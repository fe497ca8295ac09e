"""Which groups each step takes: the same for a seed, all of them in each epoch, in an order of its own."""

import pytest
import torch

from qorpo.recipe.keys import TrainRecipe
from qorpo.training.order import Order


def order(num_groups=10, **keys) -> Order:
    return Order(num_groups, TrainRecipe(**({"pairs_per_step": 4, "epochs": 2} | keys)))


def test_each_epoch_takes_every_group_once_in_an_order_of_its_own():
    made = order()
    epochs = [[place for step in steps for place in made.of_step(step)] for steps in ((0, 1, 2), (3, 4, 5))]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert [len(made.of_step(step)) for step in range(3)] == [4, 4, 2]


def test_a_step_takes_the_same_groups_whatever_was_asked_before():
    """A resumed run asks for the middle of an epoch first."""
    made = order()
    forwards = [made.of_step(step) for step in range(6)]
    assert [made.of_step(step) for step in reversed(range(6))] == forwards[::-1]
    assert order().of_step(4) == forwards[4]
    assert order(seed=1).of_step(0) != forwards[0]


def test_an_epochs_order_is_made_once_not_each_step(monkeypatch):
    permutations = []
    randperm = torch.randperm
    monkeypatch.setattr(
        torch, "randperm", lambda *args, **options: permutations.append(args) or randperm(*args, **options)
    )
    made = order()
    for step in range(6):
        made.of_step(step)
    assert permutations == [(10,)] * 2


@pytest.mark.parametrize(
    ("keys", "steps"), [({}, 6), ({"epochs": 0.1}, 1), ({"epochs": 1.5}, 4), ({"max_steps": 7}, 7)]
)
def test_the_number_of_steps_is_that_of_the_epochs_or_the_one_given(keys, steps):
    assert order(**keys).total_steps == steps


def test_what_is_due_is_counted_in_steps_or_in_epochs_and_comes_at_the_end():
    made = order()
    assert [step for step in range(1, 7) if made.is_due(4, step)] == [4, 6]
    assert [step for step in range(1, 7) if made.is_due(0.5, step)] == [2, 4, 6]
    assert [step for step in range(1, 7) if made.is_due(0.01, step)] == [1, 2, 3, 4, 5, 6]
