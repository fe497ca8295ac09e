"""Functions of log-probabilities that stay exact where the textbook form loses its digits."""

import math

import torch

# Of an average log-probability log P: beyond it 1 − P has no digits left in float64.
LARGEST_LOGP = -1e-12


def log1mexp(x: torch.Tensor) -> torch.Tensor:
    """log(1 − exp(x)) for x < 0, to full precision in value and gradient at both ends.

    Near 0 it is log(−expm1(x)), far from it log1p(−exp(x)) (Mächler 2012). Each branch is fed a harmless
    argument where the other is taken: the gradient of an untaken branch is multiplied by 0, and 0 · inf is NaN.
    """
    near_zero = x > -math.log(2)
    log_of_expm1 = torch.log(-torch.expm1(x.where(near_zero, -1.0)))
    log1p_of_exp = torch.log1p(-torch.exp(x.where(~near_zero, -1.0)))
    return log_of_expm1.where(near_zero, log1p_of_exp)
