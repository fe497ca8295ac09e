"""The chunked head against its slow plain twin: values, gradients, precision and memory.

Legend: S scored tokens, H hidden, V vocabulary.
"""

import shutil
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from qorpo.ops import softmax
from qorpo.ops.log_probs import token_logps, token_logps_plain

S, H, V = 12, 8, 31
CHUNKS = {"one": 1, "divisor": 4, "ragged": 5, "all": S, "beyond": S + 100}
HEADS = {
    "plain": {},
    "scaled": {"logit_scale": 0.25},
    "capped": {"logit_softcap": 2.0},
    "scaled-capped": {"logit_scale": 1.7, "logit_softcap": 3.0},
}
# Which of hidden, weight and bias carry a gradient; None: the head has no bias.
TRAINED = {
    "hidden": (True, False, None),
    "hidden-biased": (True, False, False),
    "all": (True, True, True),
    "all-unbiased": (True, True, None),
    "weight": (False, True, False),
    "bias": (False, False, True),
    "hidden-bias": (True, False, True),
}


def head_inputs(trained=(True, True, True), dtype=torch.float64, seed=0) -> dict[str, torch.Tensor | None]:
    """hidden, weight, bias and targets; large enough logits that soft caps bite and probabilities differ."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, grad: bool | None) -> torch.Tensor | None:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        return None if grad is None else values.requires_grad_(grad)

    return {
        "hidden": normal(S, H, grad=trained[0]),
        "weight": normal(V, H, grad=trained[1]),
        "targets": torch.randint(V, (S,), generator=generator),
        "bias": normal(V, grad=trained[2]),
    }


def upstream_gradient(dtype=torch.float64) -> torch.Tensor:
    """A gradient as a loss gives it: another for every token, of both signs, one of them 0."""
    upstream = torch.linspace(-1.0, 2.0, S, dtype=dtype)
    upstream[3] = 0.0
    return upstream


def scored(function: Callable, inputs: dict, upstream: torch.Tensor, **options):
    """Log-probs and the gradients of hidden, weight and bias, None where there is none."""
    logps_S = function(**inputs, **options)
    leaves = {name: tensor for name, tensor in inputs.items() if tensor is not None and tensor.requires_grad}
    grads = torch.autograd.grad(logps_S, list(leaves.values()), upstream)
    return logps_S.detach(), dict(zip(leaves, grads, strict=True))


def assert_same(first, second, tolerance=1e-10):
    (logps, grads), (other_logps, other_grads) = first, second
    torch.testing.assert_close(logps, other_logps, rtol=0, atol=tolerance)
    assert grads.keys() == other_grads.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, other_grads[name], rtol=0, atol=tolerance, msg=name)


# --- equal to the twin ---


@pytest.mark.parametrize("trained", TRAINED.values(), ids=TRAINED)
@pytest.mark.parametrize("options", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("chunk_tokens", CHUNKS.values(), ids=CHUNKS)
def test_values_and_gradients_are_the_twins(chunk_tokens, options, trained):
    fast = scored(
        token_logps, head_inputs(trained), upstream_gradient(), chunk_tokens=chunk_tokens, **options
    )
    plain = scored(token_logps_plain, head_inputs(trained), upstream_gradient(), **options)
    assert_same(fast, plain)


needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no g++ to compile for the CPU")


@pytest.fixture
def compiler(caplog):
    """A compiler that has seen nothing, and a test that fails where it fails."""
    torch.compiler.reset()
    yield
    assert not [record for record in caplog.get_records("call") if record.levelname == "WARNING"]


@needs_compiler
@pytest.mark.parametrize("trained", [TRAINED["hidden-biased"], TRAINED["all"]], ids=["frozen", "trained"])
@pytest.mark.parametrize("options", [HEADS["plain"], HEADS["scaled-capped"]], ids=["plain", "scaled-capped"])
def test_fused_values_and_gradients_are_the_twins(options, trained, compiler):
    for chunk_tokens in (CHUNKS["ragged"], CHUNKS["all"]):
        fused = scored(
            token_logps,
            head_inputs(trained),
            upstream_gradient(),
            chunk_tokens=chunk_tokens,
            fused=True,
            **options,
        )
        plain = scored(token_logps_plain, head_inputs(trained), upstream_gradient(), **options)
        assert_same(fused, plain)


def test_where_nothing_can_be_compiled_a_warning_says_why_and_the_result_is_the_same(monkeypatch, caplog):
    tries = []

    def no_compiler(*inputs):
        tries.append(inputs)
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(softmax, "_can_compile", True)
    monkeypatch.setattr(softmax, "_compiled", lambda: no_compiler)
    fused = scored(token_logps, head_inputs(), upstream_gradient(), chunk_tokens=5, fused=True)
    assert_same(fused, scored(token_logps_plain, head_inputs(), upstream_gradient()))
    assert len(tries) == 1  # for several chunks
    (record,) = caplog.records
    assert record.getMessage().endswith("more time and memory: RuntimeError: Failed to find C compiler.")


def test_out_of_memory_is_no_reason_to_take_more(monkeypatch):
    def out_of_memory(*inputs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(softmax, "_compiled", lambda: out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        token_logps(**head_inputs(), fused=True)


def test_the_twin_is_log_softmax_of_scaled_and_capped_logits():
    inputs = head_inputs()
    logits_SV = 1.7 * (inputs["hidden"] @ inputs["weight"].T + inputs["bias"])
    probs_SV = torch.exp(3.0 * torch.tanh(logits_SV / 3.0))
    probs_SV = probs_SV / probs_SV.sum(1, keepdim=True)
    expected = torch.stack([probs_SV[row, target].log() for row, target in enumerate(inputs["targets"])])
    logps_S = token_logps_plain(**inputs, logit_scale=1.7, logit_softcap=3.0)
    torch.testing.assert_close(logps_S, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head_trains", [False, True])
def test_a_backward_is_linear_in_the_upstream_gradient(head_trains):
    inputs = head_inputs((True, head_trains, head_trains))
    logps, once = scored(token_logps, inputs, upstream_gradient(), chunk_tokens=5)
    _, thrice = scored(token_logps, inputs, 3 * upstream_gradient(), chunk_tokens=5)
    assert_same((logps, {name: 3 * grad for name, grad in once.items()}), (logps, thrice), 1e-12)
    _, none = scored(token_logps, inputs, torch.zeros(S, dtype=torch.float64), chunk_tokens=5)
    assert all(not grad.any() for grad in none.values())


@pytest.mark.parametrize("head_trains", [False, True])
def test_gradients_match_finite_differences(head_trains):
    # Independent of the twin: numerical derivatives of the values alone.
    inputs = head_inputs((True, head_trains, head_trains))
    leaves = [inputs[name] for name in ("hidden", "weight", "bias") if inputs[name].requires_grad]

    def score(*_):
        return token_logps(**inputs, chunk_tokens=5, logit_scale=1.7, logit_softcap=3.0)

    assert torch.autograd.gradcheck(score, leaves, fast_mode=True)


def test_a_tied_head_that_trains_gets_the_sum_of_both_gradients():
    def loss(function, weight_VH, **options):
        ids_S, targets = torch.arange(S) % 7, head_inputs()["targets"]  # ids repeat
        hidden_SH = torch.tanh(weight_VH[ids_S])
        return (function(hidden_SH, weight_VH, targets, **options) * upstream_gradient()).sum()

    weight_VH = head_inputs()["weight"]
    (fast,) = torch.autograd.grad(loss(token_logps, weight_VH, chunk_tokens=5), weight_VH)
    (plain,) = torch.autograd.grad(loss(token_logps_plain, weight_VH), weight_VH)
    torch.testing.assert_close(fast, plain, rtol=0, atol=1e-10)
    # Neither half of it alone would do.
    frozen_head = loss(lambda h, w, t: token_logps(h, w.detach(), t), weight_VH)
    (embedding_alone,) = torch.autograd.grad(frozen_head, weight_VH)
    assert (fast - embedding_alone).abs().max() > 0.1
    assert embedding_alone.abs().max() > 0.1


@pytest.mark.parametrize("trained", [(True, False, None), (True, True, True)])
def test_a_second_derivative_is_refused_rather_than_wrong(trained):
    inputs = head_inputs(trained)
    loss = token_logps(**inputs, chunk_tokens=5).square().sum()
    (grad,) = torch.autograd.grad(loss, inputs["hidden"], create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.square().sum().backward()


def test_a_frozen_tied_head_asks_for_no_gradient():
    inputs = head_inputs((True, False, None))
    token_logps(**inputs, chunk_tokens=5).sum().backward()
    assert inputs["hidden"].grad is not None
    assert inputs["weight"].grad is None


@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True), (False, False, False)])
def test_without_grad_mode_there_are_values_alone(trained):
    inputs = head_inputs(trained)
    with torch.no_grad():
        logps_S = token_logps(**inputs, chunk_tokens=5)
    assert not logps_S.requires_grad
    torch.testing.assert_close(logps_S, token_logps_plain(**inputs).detach(), rtol=0, atol=1e-10)


def test_nothing_that_trains_gives_nothing_to_train():
    assert not token_logps(**head_inputs((False, False, False))).requires_grad


@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True)])
def test_inputs_are_left_as_they_were(trained):
    inputs, before = head_inputs(trained), head_inputs(trained)
    scored(token_logps, inputs, upstream_gradient(), chunk_tokens=5, logit_scale=1.7, logit_softcap=3.0)
    assert all(torch.equal(inputs[name], before[name]) for name in inputs)


@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True)])
def test_no_scored_tokens_are_no_log_probs_and_zero_gradients(trained):
    inputs = head_inputs(trained)
    inputs["hidden"] = torch.empty(0, H, dtype=torch.float64, requires_grad=True)
    inputs["targets"] = torch.empty(0, dtype=torch.int64)
    fast = scored(token_logps, inputs, torch.empty(0, dtype=torch.float64))
    plain = scored(token_logps_plain, inputs, torch.empty(0, dtype=torch.float64))
    assert_same(fast, plain, 0.0)
    assert fast[0].shape == (0,)


# --- types ---


@pytest.mark.parametrize("function", [token_logps, token_logps_plain])
@pytest.mark.parametrize("trained", [(True, False, False), (True, True, True)])
@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_log_probs_are_float32_and_gradients_of_the_inputs_type(dtype, result, trained, function):
    logps_S, grads = scored(function, head_inputs(trained, dtype), upstream_gradient(result))
    assert logps_S.dtype == result
    assert {grad.dtype for grad in grads.values()} == {dtype}


def test_a_float32_head_serves_bfloat16_hidden_states_and_keeps_its_own_type():
    # As a head in modules_to_save is: its weight is float32, the activations are not.
    inputs = head_inputs()
    halved = {name: inputs[name].detach().bfloat16() for name in ("hidden", "weight", "bias")}
    mixed = {
        "hidden": halved["hidden"].clone().requires_grad_(),
        "weight": halved["weight"].float().requires_grad_(),
        "bias": halved["bias"].float().requires_grad_(),
        "targets": inputs["targets"],
    }
    logps_S, grads = scored(token_logps, mixed, upstream_gradient(torch.float32), chunk_tokens=5)
    same_type = {name: tensor.requires_grad_() for name, tensor in halved.items()} | {
        "targets": inputs["targets"]
    }
    expected_S, expected = scored(token_logps, same_type, upstream_gradient(torch.float32), chunk_tokens=5)
    assert torch.equal(logps_S, expected_S)
    assert grads["hidden"].dtype == torch.bfloat16
    assert grads["weight"].dtype == grads["bias"].dtype == torch.float32
    # Kept in float32, not rounded to the activations' type and back.
    for name in ("weight", "bias"):
        assert torch.equal(grads[name].bfloat16(), expected[name])
        assert not torch.equal(grads[name], grads[name].bfloat16().float())


# --- errors ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": torch.zeros(S, H + 1)}, r"hidden \(S, H\) and weight \(V, H\)"),
        ({"hidden": torch.zeros(1, S, H)}, r"\(1, 12, 8\)"),
        ({"weight": torch.zeros(V * H)}, r"\(248,\)"),
        ({"targets": torch.zeros(S - 1, dtype=torch.int64)}, r"one target a row of hidden, got \(11,\)"),
        ({"targets": torch.zeros(S, 1, dtype=torch.int64)}, r"\(12, 1\)"),
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
        ({"chunk_tokens": -5}, "chunk_tokens must be at least 1, got -5"),
    ],
)
def test_shapes_that_do_not_fit_are_named(changes, message):
    inputs = head_inputs((False, False, None), torch.float32)
    with pytest.raises(ValueError, match=message):
        token_logps(**(inputs | changes))


@pytest.mark.parametrize("target", [V, -1, -100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_target_outside_the_vocabulary_is_never_scored(dtype, target):
    inputs = head_inputs((True, False, None), dtype)
    inputs["targets"][5] = target
    with pytest.raises((IndexError, RuntimeError)):
        token_logps(**inputs, chunk_tokens=4)


# --- bfloat16: no further from the truth than the plain path ---

TOKENS, WIDTH, WORDS = 128, 64, 384


@cache
def tokens_of_probability(p: float, seed: int, scale: float, softcap: float | None):
    """bfloat16 hidden states, head and targets, every target's probability p (1 − p within a fifth).

    Each hidden state is a random one moved along its target's row of the head, as far as bisection says. Left out are
    the few that can't get there: a word has a near twin, a soft cap saturates first, rounding goes past.
    """
    generator = torch.Generator().manual_seed(seed)
    weight_VH = (torch.randn(WORDS, WIDTH, generator=generator) / WIDTH**0.5).bfloat16()
    targets_S = torch.randint(WORDS, (TOKENS,), generator=generator)
    start_SH = torch.randn(TOKENS, WIDTH, generator=generator).double()
    row_SH = weight_VH.double()[targets_S]

    def target_probability(hidden_SH: torch.Tensor) -> torch.Tensor:
        options = {"logit_scale": scale, "logit_softcap": softcap}
        return token_logps_plain(hidden_SH, weight_VH.double(), targets_S, **options).exp()[:, None]

    high = torch.full((TOKENS, 1), 40.0 / scale, dtype=torch.float64)
    low = -high
    for _ in range(40):
        middle = (low + high) / 2
        short = target_probability(start_SH + middle * row_SH) < p
        low, high = torch.where(short, middle, low), torch.where(short, high, middle)
    hidden_SH = (start_SH + high * row_SH).bfloat16()
    there_S = ((target_probability(hidden_SH.double()) - p).abs() < 0.2 * (1 - p)).squeeze(1)
    assert there_S.sum() >= 0.75 * TOKENS
    return hidden_SH[there_S], weight_VH, targets_S[there_S]


def relative_error(value: torch.Tensor, exact: torch.Tensor) -> float:
    return ((value.double() - exact).norm() / exact.norm()).item()


def assert_no_further_from_the_truth(
    hidden: torch.Tensor, head: dict[str, torch.Tensor], targets_S: torch.Tensor, *,
    seed: int, head_trains: bool, head_dtype: torch.dtype = torch.bfloat16, chunk_tokens: int = 50, fused: bool = False,
    **options,
):  # fmt: skip
    """Fast and plain path in bfloat16, each against float64 on the very same bfloat16 values."""
    upstream = torch.randn(len(targets_S), generator=torch.Generator().manual_seed(99 + seed))

    def run(function, dtype, kept_dtype, **more):
        leaves = {
            "hidden": hidden.to(dtype, copy=True).requires_grad_(),
            **{
                name: tensor.to(kept_dtype, copy=True).requires_grad_(head_trains)
                for name, tensor in head.items()
            },
        }

        def score(targets, **inputs):
            if function is token_logps_plain:  # which casts nothing itself
                inputs = {name: tensor.to(dtype) for name, tensor in inputs.items()}
            return function(targets=targets, **inputs, **options, **more)

        wide = torch.promote_types(dtype, torch.float32)
        return scored(score, leaves | {"targets": targets_S}, upstream.to(wide))

    exact_S, exact = run(token_logps_plain, torch.float64, torch.float64)
    fast_S, fast = run(token_logps, torch.bfloat16, head_dtype, chunk_tokens=chunk_tokens, fused=fused)
    plain_S, plain = run(token_logps_plain, torch.bfloat16, head_dtype)
    assert relative_error(fast_S, exact_S) <= relative_error(plain_S, exact_S)
    assert exact.keys() == fast.keys()
    for name in exact:
        error, budget = relative_error(fast[name], exact[name]), relative_error(plain[name], exact[name])
        # A hundredth for chance: where both round the same things, one or the other is a hair ahead.
        assert error <= 1.01 * budget, f"{name}: {error / budget:.2f} times the plain path's error"


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("p", [0.5, 0.99, 0.99999])
@pytest.mark.parametrize("head_trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (1.0, 40.0)])
def test_bfloat16_errs_no_more_than_the_plain_path_at_confident_tokens(scale, softcap, head_trains, p, seed):
    hidden, weight, targets_S = tokens_of_probability(p, seed, scale, softcap)
    assert_no_further_from_the_truth(
        hidden, {"weight": weight}, targets_S,
        seed=seed, head_trains=head_trains, logit_scale=scale, logit_softcap=softcap,
    )  # fmt: skip


@needs_compiler
@pytest.mark.parametrize(
    ("head_trains", "scale", "softcap"),
    [(False, 1.0, None), (True, 1.0, 40.0)],
    ids=["frozen", "trained-capped"],
)
def test_fused_bfloat16_errs_no_more_than_the_plain_path(scale, softcap, head_trains, compiler):
    for p in (0.5, 0.99, 0.99999):
        hidden, weight, targets_S = tokens_of_probability(p, 0, scale, softcap)
        assert_no_further_from_the_truth(
            hidden, {"weight": weight}, targets_S,
            seed=0, head_trains=head_trains, fused=True, logit_scale=scale, logit_softcap=softcap,
        )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("biased", [False, True], ids=["unbiased", "biased"])
@pytest.mark.parametrize("head", ["frozen", "trained", "trained-float32"])
def test_bfloat16_errs_no_more_than_the_plain_path_at_uncertain_tokens(head, biased, seed):
    # As at the start of training: every word about as likely as another.
    generator = torch.Generator().manual_seed(seed)
    tensors = {"weight": (torch.randn(WORDS, WIDTH, generator=generator) / WIDTH**0.5).bfloat16()}
    if biased:
        tensors["bias"] = (torch.randn(WORDS, generator=generator) / 10).bfloat16()
    hidden = torch.randn(TOKENS, WIDTH, generator=generator).bfloat16()
    targets_S = torch.randint(WORDS, (TOKENS,), generator=generator)
    assert_no_further_from_the_truth(
        hidden, tensors, targets_S,
        seed=seed, head_trains=head != "frozen",
        head_dtype=torch.float32 if head == "trained-float32" else torch.bfloat16,
    )  # fmt: skip


# --- memory ---


class _LiveMemory(TorchDispatchMode):
    """Bytes of the tensors that operations made: the largest, and the most that were alive at once."""

    def __init__(self):
        super().__init__()
        self.largest = self.peak = 0
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        storages = [leaf.untyped_storage() for leaf in tree_iter(result) if isinstance(leaf, torch.Tensor)]
        self._alive = {ref: size for ref, size in self._alive.items() if not ref.expired()}
        self._alive |= {StorageWeakRef(storage): storage.nbytes() for storage in storages}
        self.largest = max([self.largest, *(storage.nbytes() for storage in storages)])
        self.peak = max(self.peak, sum(self._alive.values()))
        return result


WATCHED_HIDDEN, WATCHED_VOCAB, WATCHED_CHUNK = 16, 400, 8


def memory_of(function, tokens: int, dtype: torch.dtype, head_trains: bool, **options) -> _LiveMemory:
    """What forward and backward allocate."""
    inputs = {
        "hidden": torch.randn(tokens, WATCHED_HIDDEN).to(dtype).requires_grad_(),
        "weight": torch.randn(WATCHED_VOCAB, WATCHED_HIDDEN).to(dtype).requires_grad_(head_trains),
        "targets": torch.randint(WATCHED_VOCAB, (tokens,)),
    }
    upstream = torch.randn(tokens)
    with _LiveMemory() as memory:
        scored(function, inputs, upstream, **options)
    return memory


@pytest.mark.parametrize("head_trains", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_memory_grows_with_the_hidden_states_and_never_with_all_logits(dtype, head_trains):
    few, many = 96, 192
    small, large = (
        memory_of(token_logps, tokens, dtype, head_trains, chunk_tokens=WATCHED_CHUNK)
        for tokens in (few, many)
    )
    # No tensor beyond a chunk's float32 logits, or the head's float32 gradient.
    assert large.largest <= 4 * WATCHED_VOCAB * max(WATCHED_CHUNK, WATCHED_HIDDEN)
    # A token more costs some vectors of its own size, in float32, and no chunk's logits stay behind.
    bytes_a_token = (large.peak - small.peak) / (many - few)
    assert bytes_a_token <= 4 * 4 * WATCHED_HIDDEN + 64 < 4 * WATCHED_VOCAB / 4
    # The same watch sees all logits where they are made.
    plain = memory_of(token_logps_plain, many, dtype, head_trains)
    assert plain.largest >= 4 * many * WATCHED_VOCAB
    assert plain.peak > 3 * large.peak


def test_a_fused_head_holds_a_chunk_in_the_hidden_states_own_type():
    apart, fused = (
        memory_of(token_logps, 16, torch.bfloat16, False, chunk_tokens=WATCHED_CHUNK, fused=fused)
        for fused in (False, True)
    )
    in_float32 = 4 * WATCHED_CHUNK * WATCHED_VOCAB
    assert 0.9 * in_float32 < apart.peak - fused.peak <= in_float32


def test_a_frozen_head_keeps_one_vector_a_token_and_needs_no_head_in_backward():
    inputs = head_inputs((True, False, False))
    expected = scored(token_logps_plain, head_inputs((True, False, False)), upstream_gradient())[1]["hidden"]
    kept: list[int] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logps_S = token_logps(**inputs, chunk_tokens=5)
    assert max(kept, default=0) <= S * H
    with torch.no_grad():
        inputs["weight"].zero_()
        inputs["hidden"].zero_()
    (grad,) = torch.autograd.grad(logps_S, inputs["hidden"], upstream_gradient())
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-10)
