"""Memory runs out in a run: each kind of error at each place is a step done again, or an end with advice and a checkpoint."""

import logging

import pytest
import torch
from helpers.shortages import CUDA
from helpers.tiny import read_metrics

from qorpo.engine.distributed import Ranks
from qorpo.errors import RunError
from qorpo.recipe import load_recipe
from qorpo.training.last_state import ending_with_advice
from qorpo.training.run_folder import RunFolder


def failing_at(monkeypatch, trainer, calls):
    """The trainer's scorer runs out of memory at these of its calls in training."""
    inner = trainer._unwrapped.forward
    seen = [0]

    def forward(packed):
        if torch.is_grad_enabled():
            seen[0] += 1
            if calls is None or seen[0] in calls:
                raise torch.OutOfMemoryError(CUDA)
        return inner(packed)

    monkeypatch.setattr(trainer._unwrapped, "forward", forward)


def test_a_run_goes_on_in_smaller_micro_batches_and_remembers(make_trainer, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "qorpo")
    trainer = make_trainer(train__max_steps=4, memory__microbatch_tokens=600)
    trainer.folder.path.mkdir(parents=True)
    trainer.folder.write_recipe(trainer.recipe.to_yaml())
    failing_at(monkeypatch, trainer, {2})
    trainer.train()
    took = trainer.recipe.memory.microbatch_tokens
    assert took < 600
    assert load_recipe(trainer.folder.recipe).memory.microbatch_tokens == took
    assert [row["step"] for row in read_metrics(trainer.folder.path) if "loss" in row] == [1, 2, 3, 4]
    messages = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert len(messages) == 1
    assert f"the step is done again in micro-batches of {took}" in messages[0]


def test_at_the_floor_a_run_ends_with_advice_and_a_checkpoint_to_go_on_from(make_trainer, monkeypatch):
    trainer = make_trainer(train__max_steps=4, train__save_every=100, memory__microbatch_tokens=1)
    failing_at(monkeypatch, trainer, range(25, 10_000))  # a pair a micro-batch, ten a step: in the third step
    with pytest.raises(RunError, match="step 3: out of memory with one pair a micro-batch") as caught:
        trainer.train()
    assert "the plan" in str(caught.value)
    assert str(trainer.folder.checkpoint(2)) in str(caught.value)
    again = make_trainer(train__max_steps=4, train__save_every=100, memory__microbatch_tokens=1)
    again.metrics.folder = again.checkpoints.folder = again.folder = trainer.folder
    again.train(resume=True)
    assert [row["step"] for row in read_metrics(trainer.folder.path) if "loss" in row] == [1, 2, 3, 4]


def test_a_rank_of_several_leaves_its_adapter_as_a_whole_checkpoint(make_trainer):
    """Every rank has all of it, and the one that ran out of memory need not be the first."""
    trainer = make_trainer(train__max_steps=4, train__save_every=100)
    trainer.ranks = Ranks(index=1, count=2)
    trainer.checkpoints.folder = trainer.folder = RunFolder(trainer.folder.path, is_main=False)
    trainer.state.step = 3
    with (
        pytest.raises(RunError, match="step 4: out of memory on rank 1") as caught,
        ending_with_advice(trainer),
    ):
        raise torch.OutOfMemoryError(CUDA)
    assert f"{trainer.folder.checkpoint(3)} holds the run so far" in str(caught.value)
    again = make_trainer(train__max_steps=4, train__save_every=100)
    again.metrics.folder = again.checkpoints.folder = again.folder = RunFolder(trainer.folder.path)
    again.train(resume=True)
    assert [row["step"] for row in read_metrics(trainer.folder.path) if "loss" in row] == [4]
