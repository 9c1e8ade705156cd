"""Log probability that a logistic variable falls in the bin of x.

See fastvae/likelihoods/discretized_logistic.py for the mathematics.
"""

import triton
import triton.language as tl

from ..elementary import exp, exp_of_negative, expm1_minus_near, expm1_parts, log, log1p, reciprocal
from ..special import log1p_and_rest

FACTOR = -1.0
SHARED_LOG = True
HEAVY = True


@triton.jit
def parts(x, mean, log_scale, log_bin_width):
    """Compute the common quantities of value and gradient.

    Returns 1 / s; the distance r of x from the mean in scales, outwards at an end; half the bin's width in
    scales; 1 - exp(-width); exp(-width); exp(-(r + half)), 0 at an end; whether x is at an end; whether r is
    negated.
    """
    log_s = tl.where(log_scale > 60.0, 60.0, tl.where(log_scale < -60.0, -60.0, log_scale))
    inverse_s = exp(-log_s)
    z = (x - mean) * inverse_s
    width = exp(log_bin_width - log_s)
    half = 0.5 * width
    end = (x <= 0) | (x >= 1)
    turned = tl.where(end, x, z) < tl.where(end, 0.5, 0.0)
    r = tl.where(turned, -z, z)
    minus_below, _ = expm1_parts(-width)
    far = tl.where(end, 0.0, exp_of_negative(-(r + half)))
    return inverse_s, r, half, -minus_below, exp_of_negative(-width), far, end, turned


@triton.jit
def value(x, data, mean, log_scale, log_bin_width):
    _, r, half, below, k, far, end, _ = parts(x, mean, log_scale, log_bin_width)
    # Depends on the scale alone, which many elements may share.
    log_below, _ = log1p_and_rest(-k)
    log_below = tl.where(k < 0.5, log_below, log(below))
    v = r - half
    return tl.where(v < 0, 0.0, v) + tl.where(end, 0.0, log1p(far) - log_below), exp_of_negative(-tl.abs(v))


@triton.jit
def gradient(g, x, mean, log_scale, log_bin_width):
    inverse_s, r, half, below, k, far, end, turned = parts(x, mean, log_scale, log_bin_width)
    v = r - half
    t = exp_of_negative(-tl.abs(v))
    sigmoid = tl.where(v >= 0, 1.0, t) * reciprocal(1.0 + t)
    beyond = reciprocal(1.0 + far)
    # Derivatives by r and by the log width. The two sides of an interior bin pull against each other, equally
    # at r = 0.
    by_width = half * (sigmoid + far * beyond) + tl.where(end, 0.0, 2.0 * half * (k / below))
    y = -2.0 * r
    less_one = tl.where(y > -0.69, expm1_minus_near(y) + y, exp_of_negative(y) - 1.0)
    by_r = tl.where(end, sigmoid, -sigmoid * beyond * less_one)
    push = g * by_r * inverse_s
    return 0.0, tl.where(turned, -push, push), g * (r * by_r - by_width), g * by_width
