"""log N(x; mean, exp(logvar)). See fastvae/likelihoods/gaussian.py for the mathematics."""

import triton
import triton.language as tl

from ..elementary import exp

FACTOR = -0.5
LOG_2_PI = tl.constexpr(1.8378770664093453)


@triton.jit
def value(x, data, mean, logvar):
    # exp(-logvar) overflows long before the products that contain it, here and below.
    white = (x - mean) * exp(-0.5 * logvar)
    return LOG_2_PI + logvar + white * white


@triton.jit
def gradient(g, x, mean, logvar):
    inverse_s = exp(-0.5 * logvar)
    white = (x - mean) * inverse_s
    part = g * white
    grad_mean = part * inverse_s
    return -grad_mean, grad_mean, 0.5 * (part * white - g)
