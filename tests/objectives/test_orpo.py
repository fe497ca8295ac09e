"""ORPO's loss by hand, by the paper's gradient, and by arithmetic of fifty digits. Legend: P pairs."""

import math

import mpmath
import pytest
import torch

from qorpo.objectives.orpo import ObjectiveOutput, log_odds, orpo_loss

METRICS = {
    "loss",
    "nll",
    "odds_ratio_loss",
    "log_odds_ratio",
    "chosen_logps",
    "rejected_logps",
    "rewards/accuracies",
    "rewards/margins",
}


def logps(*values: float, dtype=torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, requires_grad=True)


# --- by hand ---

# P_w = 1/2: odds 1. P_l = 1/4: odds 1/3. OR = 3 (Eq. 1), so L_OR = −log σ(log 3) = −log(3/4) = log(4/3) (Eq. 5).
# The other way round OR = 1/3 and L_OR = −log(1/4) = log 4. Equal sides: OR = 1 and L_OR = −log(1/2) = log 2.
# P_w = 4/5: odds 4. P_l = 1/3: odds 1/2. OR = 8 and L_OR = −log(8/9) = log(9/8).
BY_HAND = {
    "chosen likelier": (1 / 2, 1 / 4, 3, math.log(4 / 3)),
    "rejected likelier": (1 / 4, 1 / 2, 1 / 3, math.log(4)),
    "equal": (1 / 3, 1 / 3, 1, math.log(2)),
    "above one half": (4 / 5, 1 / 3, 8, math.log(9 / 8)),
}


@pytest.mark.parametrize(("p_chosen", "p_rejected", "odds_ratio", "odds_loss"), BY_HAND.values(), ids=BY_HAND)
def test_one_pair_by_hand(p_chosen, p_rejected, odds_ratio, odds_loss):
    chosen, rejected = logps(math.log(p_chosen)), logps(math.log(p_rejected))
    loss, metrics = orpo_loss(chosen, rejected, nll=torch.tensor([0.75]), weight=0.2)
    expected = {
        "loss": 0.75 + 0.2 * odds_loss,  # Eq. 4
        "nll": 0.75,
        "odds_ratio_loss": odds_loss,
        "log_odds_ratio": math.log(odds_ratio),
        "chosen_logps": math.log(p_chosen),
        "rejected_logps": math.log(p_rejected),
        "rewards/accuracies": float(p_chosen > p_rejected),
        "rewards/margins": 0.2 * math.log(p_chosen / p_rejected),
    }
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-14)
    assert metrics.keys() == METRICS == expected.keys()
    for name, value in expected.items():
        assert metrics[name].item() == pytest.approx(value, rel=1e-14, abs=1e-15), name


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """The four pairs above at once, each with an NLL of its own."""
    return {
        "chosen_logps": logps(*(math.log(p_chosen) for p_chosen, *_ in BY_HAND.values())),
        "rejected_logps": logps(*(math.log(p_rejected) for _, p_rejected, *_ in BY_HAND.values())),
        "nll": logps(0.5, 1.0, 2.0, 4.0),
    }


LOSSES = [
    nll + 0.1 * odds_loss for nll, (*_, odds_loss) in zip((0.5, 1.0, 2.0, 4.0), BY_HAND.values(), strict=True)
]


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [("mean", sum(LOSSES) / 4), ("sum", sum(LOSSES)), ("none", LOSSES)],
)
def test_reductions_are_over_pairs(batch, reduction, expected):
    loss, metrics = orpo_loss(**batch, reduction=reduction)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    # Metrics are one a pair, however the loss is reduced.
    assert {value.shape for value in metrics.values()} == {(4,)}
    torch.testing.assert_close(metrics["loss"].tolist(), LOSSES, rtol=1e-14, atol=0)


def test_mean_and_weight_of_one_tenth_are_the_defaults(batch):
    assert orpo_loss(**batch).loss == orpo_loss(**batch, weight=0.1, reduction="mean").loss


@pytest.mark.parametrize("nll", [0.75, 2, torch.tensor(0.75), torch.tensor([0.75])])
def test_one_nll_for_all_pairs_is_every_pairs(batch, nll):
    output = orpo_loss(**batch | {"nll": nll}, reduction="none")
    each = orpo_loss(**batch | {"nll": torch.full((4,), float(nll))}, reduction="none")
    assert torch.equal(output.loss, each.loss)
    assert torch.equal(output.metrics["nll"], each.metrics["nll"])


def test_an_nll_shared_by_all_pairs_gets_its_whole_gradient(batch):
    nll = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    for reduction, expected in (("mean", 1.0), ("sum", 4.0)):
        (grad,) = torch.autograd.grad(orpo_loss(**batch | {"nll": nll}, reduction=reduction).loss, nll)
        assert grad.item() == expected


def test_with_weight_0_the_nll_is_all(batch):
    loss, metrics = orpo_loss(**batch, weight=0.0)
    assert loss.item() == (0.5 + 1 + 2 + 4) / 4
    chosen, rejected, nll = torch.autograd.grad(loss, list(batch.values()))
    assert not chosen.any()
    assert not rejected.any()
    assert nll.tolist() == [0.25] * 4
    assert metrics["rewards/margins"].tolist() == [0.0] * 4
    # Which is chosen or rejected is still told.
    assert metrics["rewards/accuracies"].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_only_the_loss_has_a_gradient_and_all_is_float64(batch):
    halved = {name: value.detach().float().requires_grad_() for name, value in batch.items()}
    output = orpo_loss(**halved)
    assert isinstance(output, ObjectiveOutput)
    assert output.loss.requires_grad
    assert output.loss.dtype == torch.float64
    for name, value in output.metrics.items():
        assert not value.requires_grad, name
        assert value.dtype == torch.float64, name
    grads = torch.autograd.grad(output.loss, list(halved.values()))
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_pairs_do_not_touch_each_other(batch):
    together = orpo_loss(**batch, reduction="none").loss
    for index in range(4):
        alone = orpo_loss(
            **{name: value[index : index + 1] for name, value in batch.items()}, reduction="none"
        )
        assert torch.equal(alone.loss, together[index : index + 1])


# --- by the paper's gradient ---


@pytest.mark.parametrize("weight", [0.1, 1.0])
def test_the_gradient_is_equations_7_and_8(weight):
    """∇L_OR = −δ·h with δ = 1 / (1 + odds_w / odds_l) (Eq. 7) and, in terms of the average log-likelihoods,
    h = ∇log P_w / (1 − P_w) − ∇log P_l / (1 − P_l) (Eq. 8): −δ / (1 − P_w) for chosen, δ / (1 − P_l) for rejected.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = (-4 * torch.rand(64, generator=generator, dtype=torch.float64) - 0.01).requires_grad_()
    rejected = (-4 * torch.rand(64, generator=generator, dtype=torch.float64) - 0.01).requires_grad_()
    loss = orpo_loss(chosen, rejected, nll=0.0, weight=weight).loss
    grad_chosen, grad_rejected = torch.autograd.grad(loss, [chosen, rejected])

    p_chosen, p_rejected = chosen.detach().exp(), rejected.detach().exp()
    odds_chosen, odds_rejected = p_chosen / (1 - p_chosen), p_rejected / (1 - p_rejected)
    delta = 1 / (1 + odds_chosen / odds_rejected)
    share = weight / 64
    torch.testing.assert_close(grad_chosen, -share * delta / (1 - p_chosen), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad_rejected, share * delta / (1 - p_rejected), rtol=1e-12, atol=0)


def test_the_gradient_reaches_the_tokens_as_in_equation_25():
    """With log P(y|x) the mean over m tokens, each token's log-probability gets 1/m of its side's gradient, and L_SFT
    adds −1/m to chosen's: descent raises every chosen token and lowers every rejected one.
    """
    tokens_chosen = torch.tensor([-0.3, -1.2, -0.1], dtype=torch.float64, requires_grad=True)
    tokens_rejected = torch.tensor([-0.9, -0.4, -2.0, -0.7, -0.2], dtype=torch.float64, requires_grad=True)
    chosen, rejected = tokens_chosen.mean()[None], tokens_rejected.mean()[None]
    loss = orpo_loss(chosen, rejected, nll=-chosen, weight=0.25).loss
    grad_chosen, grad_rejected = torch.autograd.grad(loss, [tokens_chosen, tokens_rejected])

    p_chosen, p_rejected = math.exp(-1.6 / 3), math.exp(-4.2 / 5)
    delta = 1 / (1 + (p_chosen / (1 - p_chosen)) / (p_rejected / (1 - p_rejected)))
    expected_chosen = -1 / 3 - 0.25 * delta / (1 - p_chosen) / 3
    expected_rejected = 0.25 * delta / (1 - p_rejected) / 5
    assert grad_chosen.tolist() == pytest.approx([expected_chosen] * 3, rel=1e-12)
    assert grad_rejected.tolist() == pytest.approx([expected_rejected] * 5, rel=1e-12)


# --- by fifty digits ---

RANGE = [-50.0, -36.0, -20.0, -8.0, -3.0, -1.0, -0.69, -0.5, -0.1, -1e-2, -1e-4, -1e-6, -1e-8, -1e-10, -1e-11]
RELATIVE = 1e-12  # 1e-9 is the promise


def exact_odds_loss(chosen: float, rejected: float) -> tuple[float, float, float]:
    """L_OR and its derivatives by chosen and rejected, straight from Eqs. 1, 5, 7 and 8."""
    with mpmath.workdps(50):
        p_chosen, p_rejected = mpmath.exp(mpmath.mpf(chosen)), mpmath.exp(mpmath.mpf(rejected))
        ratio = (p_chosen / (1 - p_chosen)) / (p_rejected / (1 - p_rejected))
        delta = 1 / (1 + ratio)
        loss = -mpmath.log(ratio / (1 + ratio))
        return float(loss), float(-delta / (1 - p_chosen)), float(delta / (1 - p_rejected))


def test_loss_and_gradient_have_their_digits_over_the_whole_range():
    grid = [(chosen, rejected) for chosen in RANGE for rejected in RANGE]
    chosen, rejected = (logps(*side) for side in zip(*grid, strict=True))
    losses = orpo_loss(chosen, rejected, nll=0.0, weight=1.0, reduction="none").loss
    grad_chosen, grad_rejected = torch.autograd.grad(losses.sum(), [chosen, rejected])
    expected = torch.tensor([exact_odds_loss(*pair) for pair in grid], dtype=torch.float64)
    for got, want in zip((losses.detach(), grad_chosen, grad_rejected), expected.T, strict=True):
        torch.testing.assert_close(got, want, rtol=RELATIVE, atol=0)


def test_log_odds_have_their_digits_over_the_whole_range():
    x = logps(*RANGE)
    value = log_odds(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    with mpmath.workdps(50):
        powers = [mpmath.exp(mpmath.mpf(logp)) for logp in RANGE]
        values = [float(mpmath.log(power / (1 - power))) for power in powers]
        slopes = [float(1 / (1 - power)) for power in powers]
    torch.testing.assert_close(value.detach().tolist(), values, rtol=RELATIVE, atol=0)
    torch.testing.assert_close(slope.tolist(), slopes, rtol=RELATIVE, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("chosen", "rejected"), [(0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (0.0, -50.0), (-1e-13, -1e-40)]
)
def test_certainty_is_finite_in_value_and_gradient(chosen, rejected, dtype):
    sides = logps(chosen, dtype=dtype), logps(rejected, dtype=dtype)
    loss, metrics = orpo_loss(*sides, nll=-sides[0])
    grads = torch.autograd.grad(loss, sides)
    assert loss.isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    assert all(value.isfinite().all() for value in metrics.values())


def test_two_certain_sides_have_equal_odds():
    _, metrics = orpo_loss(logps(0.0, -1e-13), logps(0.0, 0.0), nll=0.0)
    assert metrics["log_odds_ratio"].tolist() == [0.0, 0.0]
    assert metrics["odds_ratio_loss"].tolist() == pytest.approx([math.log(2)] * 2, rel=1e-15)


def test_a_certain_side_has_the_odds_of_the_clamp_and_no_gradient_from_them():
    x = logps(0.0, -1e-13, -1e-12)
    value = log_odds(x)
    (slope,) = torch.autograd.grad(value.sum(), x)
    # log(P / (1 − P)) at 1 − P = 1e-12.
    assert value.tolist() == pytest.approx([12 * math.log(10)] * 3, rel=1e-12)
    assert slope[:2].tolist() == [0.0, 0.0]
    # But the NLL's gradient is still there.
    chosen = logps(0.0)
    (grad,) = torch.autograd.grad(orpo_loss(chosen, logps(-1.0), nll=-chosen).loss, chosen)
    assert grad.item() == -1.0


# --- errors ---


@pytest.mark.parametrize("reduction", ["median", "", None])
def test_an_unknown_reduction_is_named(batch, reduction):
    with pytest.raises(ValueError, match=f"mean, sum or none, got {reduction!r}"):
        orpo_loss(**batch, reduction=reduction)


def test_sides_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match=r"chosen \(2,\) and rejected \(3,\)"):
        orpo_loss(logps(-1, -1), logps(-1, -1, -1), nll=0.0)
    with pytest.raises(ValueError, match=r"chosen \(2,\) and rejected \(1,\)"):
        orpo_loss(logps(-1, -1), logps(-1), nll=0.0)
