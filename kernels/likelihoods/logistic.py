"""log Logistic(x; location, exp(log_scale)). See fastvae/likelihoods/logistic.py for the mathematics."""

import triton
import triton.language as tl

from ..elementary import exp, exp_of_negative, tanh_half

# The value is halved, since the logarithm counts twice.
FACTOR = -2.0
SHARED_LOG = True


@triton.jit
def value(x, data, location, log_scale):
    distance = tl.abs(x - location) * exp(-log_scale)
    return 0.5 * (log_scale + distance), exp_of_negative(-distance)


@triton.jit
def gradient(g, x, location, log_scale):
    inverse_s = exp(-log_scale)
    delta = x - location
    grad_location = g * tanh_half(delta * inverse_s) * inverse_s
    return -grad_location, grad_location, grad_location * delta - g
