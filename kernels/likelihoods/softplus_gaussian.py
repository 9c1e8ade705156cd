"""log N(x; mean, log(1 + exp(raw)) + exp(log_floor)).

See fastvae/likelihoods/softplus_gaussian.py for the mathematics.
"""

import triton
import triton.language as tl

from ..elementary import exp, log, softplus
from .gaussian import LOG_2_PI

FACTOR = -0.5


@triton.jit
def variances(raw, log_floor):
    """Compute the variance, clamped to normal numbers, and its derivatives by raw and by log_floor."""
    raw = tl.where(raw > 1e38, 1e38, tl.where(raw < -80.0, -80.0, raw))
    floor = exp(tl.where(log_floor > 80.0, 80.0, log_floor))
    variance, by_raw = softplus(raw)
    return variance + floor, by_raw, floor


@triton.jit
def value(x, data, mean, raw, log_floor):
    variance, _, _ = variances(raw, log_floor)
    delta = x - mean
    return (LOG_2_PI + log(variance)) + delta * (delta / variance)


@triton.jit
def gradient(g, x, mean, raw, log_floor):
    variance, by_raw, floor = variances(raw, log_floor)
    inverse = 1.0 / variance
    by_raw, by_floor = by_raw * inverse, floor * inverse
    # Another order spills registers.
    white = (x - mean) * inverse
    by_variance = 0.5 * (g * white * (x - mean)) - 0.5 * g
    return -g * white, g * white, by_variance * by_raw, by_variance * by_floor
