"""Log density of x whose logarithm is N(location, exp(log_scale)²).

See fastvae/likelihoods/log_normal.py for the mathematics.
"""

import triton
import triton.language as tl

from ..elementary import exp, log_positive
from .gaussian import LOG_2_PI


@triton.jit
def data(x):
    log_x = log_positive(x)
    # At x = 0 the square is infinite, and adding -log x would give inf - inf.
    return tl.where(x == 0, 0.0, -log_x), log_x


@triton.jit
def value(x, log_x, location, log_scale):
    t = (log_x - location) * exp(-log_scale)
    return -0.5 * (LOG_2_PI + t * t) - log_scale


@triton.jit
def gradient(g, x, location, log_scale):
    inverse_s = exp(-log_scale)
    t = (log_positive(x) - location) * inverse_s
    push = g * t
    grad_location = push * inverse_s
    # Zero upstream gradient gives zero, even where x is 0.
    none = g == 0
    grad_x = tl.where(none, 0.0, -(g + grad_location) / x)
    return grad_x, tl.where(none, 0.0, grad_location), tl.where(none, 0.0, push * t - g)
