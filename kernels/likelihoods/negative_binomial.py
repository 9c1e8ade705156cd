"""Negative binomial counts of mean exp(m) and variance exp(m) + exp(2 m - t).

See fastvae/likelihoods/negative_binomial.py for the mathematics.
"""

import triton
import triton.language as tl

from ..elementary import exp, exp_of_negative, expm1_parts, log, log_factorial_excess
from ..special import digamma_excess, log1p_and_rest, log_in_parts, rest_of_log, stirling_error

# A mean of 0.
PADDING = float("-inf")
HEAVY = True
# Maximum log inverse dispersion, near the end of float32's range.
TOP = tl.constexpr(85.0)


@triton.jit
def data(x):
    # log x in two parts; for x = 0 a value far below any log mean.
    high, low = log_in_parts(x)
    zero = x == 0
    own = tl.where(zero, 0.0, -log_factorial_excess(x, high))
    return own, (tl.where(zero, -1e30, high), tl.where(zero, 0.0, low))


@triton.jit
def clamped(v):
    """Clamp v so that exp(v) is finite and nonzero; NaN stays NaN."""
    most: tl.constexpr = 700.0 if v.dtype == tl.float64 else 87.0
    return tl.where(v > most, most, tl.where(v < -most, -most, v))


@triton.jit
def theta_of(t):
    """Compute the inverse dispersion; where negligible against counts, as the least normal number."""
    least: tl.constexpr = -700.0 if t.dtype == tl.float64 else -86.0
    return exp(tl.where(t < least, least, t))


@triton.jit
def value(x, log_x, log_mean, log_inverse_dispersion):
    t = tl.where(log_inverse_dispersion > TOP, TOP, log_inverse_dispersion)
    theta = theta_of(t)
    n = x + theta
    # log p where the mean equals x: the Stirling errors of the gamma functions.
    quotient = x / theta  # may be infinite
    spread, _ = log1p_and_rest(quotient)
    spread = tl.where(quotient < 1e30, spread, log_x[0] - t)
    own = (stirling_error(n, t + spread) - stirling_error(theta, t)) - 0.5 * spread
    inverse = 1.0 / n
    w, v = x * inverse, theta * inverse
    d = (log_mean - log_x[0]) - log_x[1]
    zero = x == 0
    other = w > v
    # n times log(1 + w (exp(d) - 1)) - w d, never below 0; of its two forms, the one with the smaller factor.
    a, least = tl.where(other, v, w), tl.where(other, theta, x)
    signed = tl.where(other, -d, d)
    # For a mean negligible against theta, theta log(1 + mean / theta) is the mean.
    ratio = log_mean - t
    small = ratio < (-40.0 if x.dtype == tl.float64 else -20.0)
    exponent = tl.where(zero, tl.where(small, log_mean, ratio), signed)
    top = clamped(exponent)
    less_one, less_line = expm1_parts(top)
    whole = exp(top)
    log_of, rest = log1p_and_rest(tl.where(zero, whole, a * less_one))
    beyond = exponent - top
    outside = tl.where(beyond > 0, (n - least) * beyond, -least * beyond)
    far = (n * log_of - least * top) + outside
    distance = tl.where(tl.abs(signed) < 1, least * less_line - n * rest, far)
    of_zero = tl.where(small, whole, theta * (log_of + tl.maximum(beyond, 0.0)))
    return tl.where(zero, -of_zero, own - distance)


@triton.jit
def slopes(x, log_mean, log_inverse_dispersion):
    """Compute log p of a count of 0, and the slopes by log mean and by log inverse dispersion."""
    t = tl.where(log_inverse_dispersion > TOP, TOP, log_inverse_dispersion)
    theta = theta_of(t)
    n = x + theta
    high, low = log_in_parts(x)
    zero = x == 0
    d = tl.where(zero, 1e30, (log_mean - high) - low)
    ratio = log_mean - t
    top = clamped(ratio)
    # The shares of theta and of the mean in their sum.
    k = exp_of_negative(-tl.abs(top))
    large = 1.0 / (1.0 + k)
    of_theta = tl.where(ratio > 0, k * large, large)
    of_mean = tl.where(ratio > 0, large, k * large)
    less_one, _ = expm1_parts(clamped(d))
    # Where the mean's share is too small for a number, the mean.
    of_zero = tl.where(ratio < top, exp(clamped(log_mean)), theta * of_mean)
    pull = tl.where(tl.abs(d) < 1, -x * less_one * of_theta, x * of_theta - of_zero)
    rest = rest_of_log(pull / theta, n * (of_theta / theta)) + tl.maximum(ratio - top, 0.0)
    gamma = 0.5 * (x / n) + (digamma_excess(theta, t) - theta / n * digamma_excess(n, log(n)))
    return pull - theta * rest, pull, tl.where(zero, 0.0, gamma) - theta * rest


@triton.jit
def gradient(g, x, log_mean, log_inverse_dispersion):
    _, by_mean, by_dispersion = slopes(x, log_mean, log_inverse_dispersion)
    # Beyond the rows, where g is 0, the slopes need not be finite.
    return 0.0, tl.where(g == 0, 0.0, g * by_mean), tl.where(g == 0, 0.0, g * by_dispersion)
