"""log of Student's t(x; location, exp(log_scale), exp(log_df)).

See fastvae/likelihoods/student_t.py for the mathematics.
"""

import triton
import triton.language as tl

from ..elementary import LOG_2, exp, half_step, log1p_excess, log1p_square
from .gaussian import LOG_2_PI

FACTOR = -0.5


@triton.jit
def value(x, data, location, log_scale, log_df):
    # From df = e^80 on it is the normal distribution.
    log_df = tl.where(log_df > 80, 80.0, log_df)
    df = exp(log_df)
    gammas, _ = half_step(0.5 * df, log_df - LOG_2)
    r = (x - location) * exp(-log_scale) * exp(-0.5 * log_df)
    return (LOG_2_PI - 2.0 * gammas) + 2.0 * log_scale + (df + 1.0) * log1p_square(r)


@triton.jit
def gradient(g, x, location, log_scale, log_df):
    log_df = tl.where(log_df > 80, 80.0, log_df)
    df, inverse_root = exp(log_df), exp(-0.5 * log_df)
    inverse_s = exp(-log_scale)
    distance = x - location
    r = distance * inverse_s * inverse_root
    t = r * r
    # t / (1 + t), also for infinite t.
    rest = 1.0 / (1.0 + t)
    share = tl.where(t < 0.5, t * rest, 1.0 - rest)
    # Any other order spills registers. Without a distance t is 0, or NaN.
    grad_location = g * ((df + 1.0) * tl.where(distance == 0, t, share / distance))
    _, slope = half_step(0.5 * df, log_df - LOG_2)
    grad_df = g * (slope + 0.5 * (share - df * log1p_excess(t, share, log1p_square(r))))
    return -grad_location, grad_location, g * ((df + 1.0) * share - 1.0), grad_df
