"""Running out of memory: the step is done again in smaller micro-batches, and is the same step."""

import sys

import psutil
import pytest
import torch
from test_step import ARCHITECTURES, CPU, assert_same_step, gradients_of, make_pairs, model, objective_of

from qorpo.data.groups import row_tokens
from qorpo.data.pack import split_by_budget
from qorpo.engine.step import run_step
from qorpo.engine.within_memory import StepTooLargeError, within_memory
from qorpo.model.scoring import Scorer

assert ARCHITECTURES
assert model  # fixtures of the neighbour

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
    scorer = Scorer(model, "sdpa", chunk_tokens=7)
    failing = Failing(scorer, **{f"failing_{where}": number})
    disturbed, took = step_within_memory(model, pairs, failing, budget)
    longest = max(map(row_tokens, pairs))
    assert took == longest  # half of 65 would be less than the longest pair, which is alone then
    undisturbed, same = step_within_memory(model, pairs, Failing(scorer), took)
    assert same == took
    assert_same_step(disturbed, undisturbed, tolerance=1e-10)
    seen = sorted(lengths for row in failing.rows for lengths in row)
    assert seen == sorted(tuple(map(len, (p.prompt_ids, p.responses[0], p.responses[1]))) for p in pairs)


def test_it_is_halved_again_and_again(model):
    pairs = make_pairs()[:5]  # 36 tokens, the longest pair 22
    scorer = Scorer(model, "sdpa", chunk_tokens=7)
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


@pytest.mark.skipif(sys.platform != "linux", reason="no limit of a process's memory is kept elsewhere")
@pytest.mark.parametrize("allocate", [lambda size: torch.empty(size, dtype=torch.uint8), bytearray])
def test_a_real_shortage_of_the_hosts_memory_is_got_over(allocate):
    import resource

    pairs = make_pairs()
    bytes_a_token = 3 * 2**30 // sum(map(row_tokens, pairs))
    attempts = []

    def attempt(tokens):
        attempts.append(tokens)
        longest = max(sum(map(row_tokens, row)) for row in split_by_budget(pairs, tokens))
        return len(allocate(longest * bytes_a_token))  # not touched, so it is asked for alone

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + 2 * 2**30, hard))
    try:
        size, took = within_memory(attempt, pairs, WHOLE)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert len(attempts) > 1
    assert took < attempts[0]
    assert size < 2 * 2**30
