"""log(1 − e^x) against arithmetic of fifty digits."""

import math

import mpmath
import pytest
import torch

from qorpo.ops.numerics import log1mexp

# From −50 to −1e-11, dense around the point where the formula changes, at its two neighbours and at it.
SWITCH = -math.log(2)
ENDS = [-50.0, -40.0, -37.0, -20.0, -5.0, -2.0, -0.5, -0.1]
GRID = sorted(
    {-(10.0**exponent) for exponent in torch.linspace(-11, 1.69, 60).tolist()}
    | {SWITCH, math.nextafter(SWITCH, 0), math.nextafter(SWITCH, -1), SWITCH - 1e-6, SWITCH + 1e-6}
    | set(ENDS)
)
# Some tens of roundings.
RELATIVE = 1e-14


def exact(x: float) -> tuple[float, float]:
    """log(1 − e^x) and its derivative −e^x / (1 − e^x)."""
    with mpmath.workdps(50):
        power = mpmath.exp(mpmath.mpf(x))
        return float(mpmath.log(1 - power)), float(-power / (1 - power))


def value_and_slope(values: list[float], dtype=torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    y = log1mexp(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def test_value_and_gradient_have_all_their_digits():
    value, slope = value_and_slope(GRID)
    expected = torch.tensor([exact(x) for x in GRID], dtype=torch.float64)
    torch.testing.assert_close(value, expected[:, 0], rtol=RELATIVE, atol=0)
    torch.testing.assert_close(slope, expected[:, 1], rtol=RELATIVE, atol=0)


def test_the_textbook_form_would_not_pass():
    # What the two branches are for: plain log(1 − e^x) is wrong at both ends.
    x = torch.tensor([-50.0, -1e-11], dtype=torch.float64)
    naive, expected = torch.log(1 - torch.exp(x)), torch.tensor([exact(value)[0] for value in x.tolist()])
    assert naive[0] == 0.0 != expected[0]
    assert abs(naive[1] / expected[1] - 1) > 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_finite_at_both_ends(dtype):
    tiny, huge = torch.finfo(dtype).tiny, torch.finfo(dtype).max
    value, slope = value_and_slope([-huge, -1000.0, -100.0, -50.0, -1e-11, -tiny], dtype)
    assert value.isfinite().all()
    assert slope.isfinite().all()
    assert value[:2].tolist() == [0.0, 0.0]
    assert slope[:2].tolist() == [0.0, 0.0]
    assert value[-1] == pytest.approx(math.log(tiny), rel=1e-6)


def test_float32_is_good_to_float32():
    values = torch.tensor(GRID, dtype=torch.float32).tolist()
    value, slope = value_and_slope(values, torch.float32)
    expected = torch.tensor([exact(x) for x in values], dtype=torch.float64)
    for got, want in ((value, expected[:, 0]), (slope, expected[:, 1])):
        torch.testing.assert_close(got.double(), want, rtol=5e-7, atol=0)


def test_each_value_gets_its_own_gradient():
    # Both branches side by side in one tensor, of any shape, with unequal upstream gradients.
    x = torch.tensor([[-0.1, -3.0], [-1e-9, -30.0]], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[1.0, -2.0], [0.0, 5.0]], dtype=torch.float64)
    (slope,) = torch.autograd.grad(log1mexp(x), x, upstream)
    expected = torch.tensor([[exact(value)[1] for value in row] for row in x.tolist()], dtype=torch.float64)
    torch.testing.assert_close(slope, upstream * expected, rtol=RELATIVE, atol=0)
