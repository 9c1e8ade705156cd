"""Poisson x r - exp(r) - log x! of log rates r. See fastvae/likelihoods/poisson.py for the mathematics."""

import triton
import triton.language as tl

from ..elementary import exp, expm1_minus_near, log, log_factorial_excess

# Rate 0: log p of x = 0 is 0.
PADDING = float("-inf")


@triton.jit
def data(x):
    # Not used for a count of 0.
    log_x = log(x)
    return -log_factorial_excess(x, log_x), log_x


@triton.jit
def value(x, log_x, log_rate):
    # With d = r - log x this is x (1 + d) - exp(r), or -x (exp(d) - 1 - d), which cancels less for small d.
    d = log_rate - log_x
    # Avoids inf - inf for an infinite rate.
    linear = 1.0 + tl.minimum(d, 710.0)
    far = tl.where(x == 0, 0.0, x * linear) - exp(log_rate)
    return tl.where(tl.abs(d) < 0.69, -x * expm1_minus_near(d), far)


@triton.jit
def gradient(g, x, log_rate):
    # Zero upstream gradient gives zero, even where the rate overflows.
    return 0.0, tl.where(g == 0, 0.0, g * (x - exp(log_rate)))
