"""Running out of memory: the step is done again in smaller micro-batches, and is the same step."""

import logging

import pytest
import torch
from helpers.tiny import read_metrics
from test_step import ARCHITECTURES, CPU, assert_same_step, gradients_of, make_pairs, model, objective_of
from test_trainer import make_trainer

from qorpo.data.pack import row_tokens, split_by_budget
from qorpo.engine.distributed import Ranks
from qorpo.engine.step import StepTooLargeError, run_step, within_memory
from qorpo.errors import RunError
from qorpo.model.scoring import PairScorer
from qorpo.recipe import load_recipe
from qorpo.training.run_folder import RunFolder

assert ARCHITECTURES
assert model
assert make_trainer  # fixtures of the neighbours

WHOLE = 10_000
SHORTAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 23.64 GiB"


class Failing:
    """Raises out-of-memory in the forward or in the backward of its nth micro-batch, once."""

    def __init__(self, scorer, failing_forward=None, failing_backward=None):
        self.scorer = scorer
        self.failing = {"forward": failing_forward, "backward": failing_backward}
        self.calls = {"forward": 0, "backward": 0}
        self.rows = []

    def _count(self, what):
        self.calls[what] += 1
        if self.calls[what] == self.failing[what]:
            raise torch.OutOfMemoryError(SHORTAGE)

    def __call__(self, packed):
        self._count("forward")
        self.rows.append(packed.lengths)
        return self.scorer(packed)

    def backward(self, loss):
        loss.backward()  # gradients are there before it fails
        self._count("backward")


def step_within_memory(model, pairs, failing, microbatch_tokens):
    def attempt(tokens):
        failing.rows.clear()
        return run_step(
            failing,
            pairs,
            objective_of("all", "token"),
            microbatch_tokens=tokens,
            device=CPU,
            backward=failing.backward,
        )

    with failing.scorer.packed_attention():
        metrics, took = within_memory(attempt, pairs, microbatch_tokens, undo=model.zero_grad)
    return (metrics, gradients_of(model)), took


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_the_step_is_the_undisturbed_one_with_the_smaller_budget(model, where, number):
    pairs = make_pairs()
    budget = 65
    assert len(split_by_budget(pairs, budget)) == 3
    scorer = PairScorer(model, "sdpa", chunk_tokens=7)
    failing = Failing(scorer, **{f"failing_{where}": number})
    disturbed, took = step_within_memory(model, pairs, failing, budget)
    longest = max(map(row_tokens, pairs))
    assert took == longest  # half of 65 would be less than the longest pair, which is alone then
    undisturbed, same = step_within_memory(model, pairs, Failing(scorer), took)
    assert same == took
    assert_same_step(disturbed, undisturbed, tolerance=1e-10)
    seen = sorted(lengths for row in failing.rows for lengths in row)
    assert seen == sorted(tuple(map(len, (p.prompt_ids, p.chosen_ids, p.rejected_ids))) for p in pairs)


def test_it_is_halved_again_and_again(model):
    pairs = make_pairs()[:5]  # 36 tokens, the longest pair 22
    scorer = PairScorer(model, "sdpa", chunk_tokens=7)
    attempts = []

    def attempt(tokens):
        attempts.append(tokens)
        if len(attempts) < 3:
            raise torch.OutOfMemoryError(SHORTAGE)
        with scorer.packed_attention(), torch.no_grad():
            return run_step(scorer, pairs, objective_of(), microbatch_tokens=tokens, device=CPU)

    total = sum(map(row_tokens, pairs))
    _, took = within_memory(attempt, pairs, WHOLE)
    assert attempts == [WHOLE, total // 2, took]
    assert max(map(row_tokens, pairs)) <= took < total // 2


def test_where_the_longest_pair_alone_is_too_much_it_ends():
    pairs = make_pairs()
    attempts = []

    def attempt(tokens):
        attempts.append(tokens)
        raise torch.OutOfMemoryError(SHORTAGE)

    with pytest.raises(StepTooLargeError, match="CUDA out of memory"):
        within_memory(attempt, pairs, WHOLE)
    assert attempts[-1] == max(map(row_tokens, pairs))


def test_other_errors_are_not_taken_for_it():
    def attempt(tokens):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        within_memory(attempt, make_pairs(), WHOLE)


# --- in a run ---


def failing_at(monkeypatch, trainer, calls):
    """The trainer's scorer runs out of memory at these of its calls in training."""
    inner = trainer._unwrapped.forward
    seen = [0]

    def forward(packed):
        if torch.is_grad_enabled():
            seen[0] += 1
            if calls is None or seen[0] in calls:
                raise torch.OutOfMemoryError(SHORTAGE)
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
    again.checkpoints.folder = again.folder = trainer.folder
    again.train(resume=True)
    assert [row["step"] for row in read_metrics(trainer.folder.path) if "loss" in row] == [1, 2, 3, 4]


def test_a_rank_of_several_leaves_its_adapter_as_a_whole_checkpoint(make_trainer):
    """Every rank has all of it, and the one that ran out of memory need not be the first."""
    trainer = make_trainer(train__max_steps=4, train__save_every=100)
    trainer.ranks = Ranks(index=1, count=2)
    trainer.checkpoints.folder = trainer.folder = RunFolder(trainer.folder.path, is_main=False)
    trainer.state.step = 3
    error = trainer._ended_for_memory("on rank 1 (2 GiB)")
    assert f"{trainer.folder.checkpoint(3)} holds the run so far" in str(error)
    again = make_trainer(train__max_steps=4, train__save_every=100)
    again.checkpoints.folder = again.folder = RunFolder(trainer.folder.path)
    again.train(resume=True)
    assert [row["step"] for row in read_metrics(trainer.folder.path) if "loss" in row] == [4]
