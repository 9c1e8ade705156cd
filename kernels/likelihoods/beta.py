"""log Beta(x; exp(c1), exp(c0)). See fastvae/likelihoods/beta.py for the mathematics."""

import triton
import triton.language as tl

from ..elementary import (
    LOG_2,
    exp,
    exp_of_negative,
    expm1_minus_near,
    expm1_parts,
    log1p,
    log_factorial_excess,
)
from ..special import digamma_excess, log1p_and_rest, log_in_parts, stirling_error

HEAVY = True


@triton.jit
def data(x):
    low = x < 0.5
    y = tl.where(low, x, 1.0 - x)
    of_rest, _ = log1p_and_rest(-y)
    # In float32, denormal numbers are scaled to normal ones first.
    denormal = y < (0.0 if x.dtype == tl.float64 else 1.1754943508222875e-38)
    high, small = log_in_parts(tl.where(denormal, y * 16777216.0, y))
    high -= tl.where(denormal, 24 * LOG_2, 0.0)
    near, _ = log1p_and_rest((2.0 * y - 1.0) / (1.0 - y))
    # At an end, where logarithms are infinite, the term of x alone is 0. The logit is in two parts.
    end, middle = y == 0, y > 0.25
    first = tl.where(end, float("-inf"), tl.where(middle, near, high))
    second = tl.where(middle | end, 0.0, small - of_rest)
    own = tl.where(end, 0.0, -(high + of_rest))
    return own, (tl.where(low, first, -first), tl.where(low, second, -second))


@triton.jit
def clamped(c):
    """Clamp a log concentration so that its exponential is finite and nonzero; NaN stays NaN."""
    return tl.where(c > 80.0, 80.0, tl.where(c < -80.0, -80.0, c))


@triton.jit
def shares(c1, c0):
    """Return logs of the lesser and larger concentration, their ratio k, log(1 + k), and whether c0 < c1."""
    a, b = clamped(c1), clamped(c0)
    other = a > b
    p, q = tl.where(other, b, a), tl.where(other, a, b)
    k = exp_of_negative(p - q)
    return p, q, k, log1p(k), other


@triton.jit
def distances(x, first, second, p, q, k, fold, other):
    """Compute the logs of the shares x and 1 - x over those of the concentrations: see the C++."""
    logit, low = tl.where(other, -first, first), tl.where(other, -second, second)
    s = (logit + (q - p)) + low
    near = tl.abs(s) < 1.0
    s = tl.where(near, s, 0.0)
    less_line = expm1_minus_near(s)
    log_1pt, rest = log1p_and_rest(k / (1.0 + k) * (less_line + s))
    # Far from the mode use the logarithms themselves, log(1 + exp(+-logit)).
    logit += low
    of_rest, _ = log1p_and_rest(-tl.where(x < 0.5, x, 1.0 - x))
    rise = (q - p) + fold - (tl.where(logit > 0, 0.0, -logit) - of_rest)
    rise = tl.where(near, s - log_1pt, rise)
    fall = tl.where(near, log_1pt, tl.where(logit > 0, logit, 0.0) - of_rest - fold)
    return rise, fall, near, less_line, rest


@triton.jit
def value(x, log_odds, c1, c0):
    p, q, k, fold, other = shares(c1, c0)
    rise, fall, near, less_line, rest = distances(x, log_odds[0], log_odds[1], p, q, k, fold, other)
    least, largest = exp(p), exp(q)
    n = least + largest
    distance = tl.where(near, least * less_line - n * rest, largest * fall - least * rise)
    of_n = stirling_error(n, q + fold) - stirling_error(largest, q)
    inside = ((p - 0.5 * fold) + (of_n - log_factorial_excess(least, p))) - distance
    # At an end one concentration decides: above 1 the density is 0, below 1 infinite.
    decides, at_end = tl.where(x < 0.5, c1, c0), tl.where(x < 0.5, c0, c1)
    at_end += tl.where(decides == 0, 0.0, decides * float("-inf"))
    return tl.where((x == 0) | (x == 1), at_end, inside)


@triton.jit
def gradient(g, x, c1, c0):
    p, q, k, fold, other = shares(c1, c0)
    least, largest, v = exp(p), exp(q), 1.0 / (1.0 + k)
    of_n = digamma_excess(least + largest, q + fold)
    of_least = 0.5 * v + (digamma_excess(least, p) - k * v * of_n)
    of_largest = 0.5 * k * v + (digamma_excess(largest, q) - v * of_n)
    _, log_odds = data(x)
    rise, fall, _, _, _ = distances(x, log_odds[0], log_odds[1], p, q, k, fold, other)
    of_least += least * rise
    of_largest -= largest * fall
    # Zero upstream gradient gives zero, even where log p is infinite.
    none = g == 0
    to_1 = tl.where(none, 0.0, g * tl.where(other, of_largest, of_least))
    to_0 = tl.where(none, 0.0, g * tl.where(other, of_least, of_largest))
    low, _ = expm1_parts(clamped(c1))
    high, _ = expm1_parts(clamped(c0))
    of_x = tl.where(low == 0, 0.0, low / x) - tl.where(high == 0, 0.0, high / (1.0 - x))
    return tl.where(none, 0.0, g * of_x), to_1, to_0
