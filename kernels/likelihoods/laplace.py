"""log Laplace(x; location, exp(log_scale)). See fastvae/likelihoods/laplace.py for the mathematics."""

import triton
import triton.language as tl

from ..elementary import LOG_2, exp, sign

FACTOR = -1.0


@triton.jit
def value(x, data, location, log_scale):
    return LOG_2 + log_scale + tl.abs(x - location) * exp(-log_scale)


@triton.jit
def gradient(g, x, location, log_scale):
    inverse_s = exp(-log_scale)
    delta = x - location
    grad_location = g * sign(delta) * inverse_s
    return -grad_location, grad_location, g * (tl.abs(delta) * inverse_s - 1.0)
