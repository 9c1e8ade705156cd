"""log of the density of x, whose logarithm is N(location, exp(log_scale)²). The mathematics stands in
fastvae/likelihoods/log_normal.py.
"""

import triton
import triton.language as tl

from ..common import exp, log_positive
from .gaussian import LOG_2_PI


@triton.jit
def data(x):
    log_x = log_positive(x)
    # Of a zero, whose square is infinite, nothing is added: inf - inf would be NaN.
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
    # A sample without weight has no gradient, also where x is 0.
    none = g == 0
    grad_x = tl.where(none, 0.0, -(g + grad_location) / x)
    return grad_x, tl.where(none, 0.0, grad_location), tl.where(none, 0.0, push * t - g)
