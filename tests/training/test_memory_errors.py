"""Memory runs out in a run: each kind of error at each place is a step done again, or an end with advice and a checkpoint."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.shortages import CUDA, SHORTAGES
from helpers.tiny import read_metrics

from qorpo.engine.distributed import Ranks
from qorpo.errors import RunError
from qorpo.recipe import load_recipe
from qorpo.training.last_state import ending_with_advice
from qorpo.training.run_folder import RunFolder


def failing_at(monkeypatch, trainer, calls):
    """The trainer's scorer runs out of memory at these of its calls in training."""
    inner = trainer.session.unwrapped.forward
    seen = [0]

    def forward(packed):
        if torch.is_grad_enabled():
            seen[0] += 1
            if calls is None or seen[0] in calls:
                raise torch.OutOfMemoryError(CUDA)
        return inner(packed)

    monkeypatch.setattr(trainer.session.unwrapped, "forward", forward)


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
    trainer.session.ranks = Ranks(index=1, count=2)
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


# --- each kind of error at each place ---

STEPS = 3
SETTINGS = {
    "train__max_steps": STEPS, "train__save_every": 2, "train__eval_every": 2, "train__log_every": 1,
    "train__warmup_ratio": 0.0, "train__report_to": ["tensorboard"],
}  # fmt: skip


@dataclass(frozen=True)
class Place:
    """A call of a run, which runs out of memory at one of its times: before it does anything, or once all is done."""

    owner: Callable[[Any], Any]  # of a Trainer
    name: str
    at: int = 1
    when: Callable[[], bool] = lambda: True
    is_done: bool = False

    def break_it(self, monkeypatch, trainer, error) -> list[int]:
        """Returns the number of calls so far, in a list."""
        owner, seen = self.owner(trainer), [0]
        inner = getattr(owner, self.name)

        def broken(*args, **kwargs):
            seen[0] += self.when()
            fails = self.when() and seen[0] == self.at
            result = None if fails and not self.is_done else inner(*args, **kwargs)
            if fails:
                raise error()
            return result

        monkeypatch.setattr(owner, self.name, broken)
        return seen


def scorer(trainer):
    return trainer.session.unwrapped


def accelerator(trainer):
    return trainer.session.accelerator


REDONE = {
    "forward": Place(scorer, "forward", when=torch.is_grad_enabled),
    "backward": Place(accelerator, "backward", is_done=True),
    "clipping": Place(accelerator, "clip_grad_norm_", is_done=True),
    "evaluation": Place(scorer, "forward", when=lambda: not torch.is_grad_enabled()),
}
ENDS = {
    "the optimizer's step": Place(lambda trainer: trainer.session.optimizer, "step", at=3),
    "the optimizer's step, half way": Place(
        lambda trainer: trainer.session.optimizer, "step", at=2, is_done=True
    ),
    "figures": Place(lambda trainer: trainer.metrics, "_read", at=2),
    "metrics": Place(lambda trainer: trainer.folder, "append_metrics", at=3),
    "a tracker": Place(accelerator, "log", at=3),
    "the evaluation's figures": Place(lambda trainer: trainer.metrics, "write_evaluation", at=2),
    "a checkpoint's adapter": Place(lambda trainer: trainer.model, "save_pretrained", at=2),
    "a checkpoint's optimizer": Place(
        lambda trainer: trainer.session.optimizer.optimizer, "state_dict", at=2
    ),
    "the adapter at the end": Place(lambda trainer: trainer, "save"),
}


def adapter_bytes(trainer):
    return (trainer.folder.adapter / "adapter_model.safetensors").read_bytes()


def resumed(make_trainer, broken, settings=None):
    again = make_trainer(**settings or {**SETTINGS, "memory__microbatch_tokens": 600})
    again.metrics.folder = again.checkpoints.folder = again.folder = RunFolder(broken.folder.path)
    again.train(resume=True)
    return again


@pytest.fixture(scope="module")
def undisturbed():
    """Adapters and rows of runs that nothing disturbed, by the size of their micro-batches; made when asked for."""
    made: dict[int, tuple[bytes, list[tuple[int, bool]]]] = {}

    def run(make_trainer, microbatch_tokens):
        if microbatch_tokens not in made:
            trainer = make_trainer(**SETTINGS, memory__microbatch_tokens=microbatch_tokens)
            trainer.train()
            made[microbatch_tokens] = adapter_bytes(trainer), rows(trainer)
        return made[microbatch_tokens]

    return run


def rows(trainer):
    return [(row["step"], "loss" in row) for row in read_metrics(trainer.folder.path)]


@pytest.mark.parametrize("place", REDONE)
def test_what_can_be_done_again_is_in_smaller_micro_batches_and_is_the_same(
    make_trainer, monkeypatch, undisturbed, place
):
    trainer = make_trainer(**SETTINGS, memory__microbatch_tokens=600)
    seen = REDONE[place].break_it(monkeypatch, trainer, SHORTAGES["cuBLAS"])
    trainer.train()
    assert seen[0] > 1
    took = trainer.recipe.memory.microbatch_tokens
    assert took < 600
    assert (adapter_bytes(trainer), rows(trainer)) == undisturbed(make_trainer, took)


@pytest.mark.parametrize("place", ENDS)
def test_what_can_not_ends_with_advice_and_goes_on_to_the_same_result(
    make_trainer, monkeypatch, undisturbed, place
):
    trainer = make_trainer(**SETTINGS, memory__microbatch_tokens=600)
    with monkeypatch.context() as patch:
        ENDS[place].break_it(patch, trainer, SHORTAGES["host memory, by Python"])
        with pytest.raises(RunError, match=r"out of memory .*the plan.*go on with --resume") as caught:
            trainer.train()
    assert ("half changed" in str(caught.value)) == (place in HALF_WAY)
    again = resumed(make_trainer, trainer)
    assert (adapter_bytes(again), rows(again)) == undisturbed(make_trainer, 600)


HALF_WAY = ("the optimizer's step", "the optimizer's step, half way")


def failing_in_the_first_step(monkeypatch, trainer, *, is_last):
    """Memory runs out as the optimizer makes the state of its first tensor, or of its last one: others have changed."""
    trained = [each for group in trainer.session.optimizer.param_groups for each in group["params"]]
    failing = trained[-1 if is_last else 0]
    make_zeros, init_state = (
        torch.zeros_like,
        getattr(trainer.session.optimizer.optimizer, "init_state", None),
    )

    def zeros_like(tensor, *args, **kwargs):  # torch's make their states so
        if tensor is failing:
            raise torch.OutOfMemoryError(CUDA)
        return make_zeros(tensor, *args, **kwargs)

    def init(group, parameter, *args):
        if parameter is failing:
            raise torch.OutOfMemoryError(CUDA)
        return init_state(group, parameter, *args)

    monkeypatch.setattr(torch, "zeros_like", zeros_like)
    if init_state is not None:
        monkeypatch.setattr(trainer.session.optimizer.optimizer, "init_state", init)


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "paged_adamw_8bit"])
def test_a_shortage_as_states_are_made_ends_with_advice_and_goes_on_to_the_same_result(
    make_trainer, monkeypatch, optimizer
):
    settings = {**SETTINGS, "train__max_steps": 2, "train__report_to": [], "train__optimizer": optimizer}
    settings["memory__microbatch_tokens"] = 600
    whole = make_trainer(**settings)
    whole.train()
    for is_last in (False, True):
        trainer = make_trainer(**settings)
        with monkeypatch.context() as patch:
            failing_in_the_first_step(patch, trainer, is_last=is_last)
            with pytest.raises(RunError, match=r"step 1: out of memory .*half changed.*step-0 holds the run"):
                trainer.train()
        assert trainer.folder.checkpoint_steps() == [0]
        again = resumed(make_trainer, trainer, settings)
        assert (adapter_bytes(again), rows(again)) == (adapter_bytes(whole), rows(whole))


@pytest.mark.parametrize("place", ["the adapter", "the optimizer's states"])
def test_a_shortage_in_resuming_changes_nothing_and_blames_no_checkpoint(make_trainer, monkeypatch, place):
    trainer = make_trainer(**SETTINGS)
    with monkeypatch.context() as patch:
        ENDS["the optimizer's step"].break_it(patch, trainer, SHORTAGES["cuBLAS"])
        with pytest.raises(RunError):
            trainer.train()
    before = {path: path.stat().st_mtime_ns for path in trainer.folder.path.rglob("*")}
    name = {"the adapter": "load_adapter", "the optimizer's states": "load_optimizer_state"}[place]
    with monkeypatch.context() as patch:
        patch.setattr(f"qorpo.training.weights.{name}", fails)
        with pytest.raises(RunError, match=r"out of memory .*; nothing of the run was changed"):
            resumed(make_trainer, trainer)
    assert {path: path.stat().st_mtime_ns for path in trainer.folder.path.rglob("*")} == before
    resumed(make_trainer, trainer)


def fails(*_):
    raise SHORTAGES["torch's allocator"]()
