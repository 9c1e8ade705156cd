"""Zeros with probability sigmoid(l) of a dropout logit l, else a negative binomial count.

See fastvae/likelihoods/zero_inflated_negative_binomial.py for the mathematics.
"""

import triton
import triton.language as tl

from ..elementary import exp_of_negative, expm1_parts
from ..special import log1p_and_rest
from . import negative_binomial

HEAVY = True
data = negative_binomial.data
log_prob, slopes = negative_binomial.value, negative_binomial.slopes


@triton.jit
def shares(v):
    """Compute sigmoid(v), sigmoid(-v) and log(1 + exp(-|v|))."""
    k = exp_of_negative(-tl.abs(v))
    large = 1.0 / (1.0 + k)
    small = k * large
    log_of, _ = log1p_and_rest(k)
    return tl.where(v > 0, large, small), tl.where(v > 0, small, large), log_of


@triton.jit
def value(x, log_x, log_mean, log_inverse_dispersion, dropout_logit):
    counted = log_prob(x, log_x, log_mean, log_inverse_dispersion)
    _, alive, log_of = shares(dropout_logit)
    # Near p = 1 use 1 + alive (p - 1), else the sum of both ways to a 0.
    less_one, _ = expm1_parts(counted)
    change = alive * less_one
    near = change > -0.5
    log_sum, _ = log1p_and_rest(tl.where(near, change, exp_of_negative(-tl.abs(dropout_logit - counted))))
    softplus = tl.where(dropout_logit > 0, dropout_logit, 0.0) + log_of
    larger = tl.where(dropout_logit > counted, dropout_logit, counted)
    of_zero = tl.where(near, log_sum, (larger + log_sum) - softplus)
    return tl.where(x == 0, of_zero, counted - softplus)


@triton.jit
def gradient(g, x, log_mean, log_inverse_dispersion, dropout_logit):
    of_zero, by_mean, by_dispersion = slopes(x, log_mean, log_inverse_dispersion)
    zero = x == 0
    dropped, counted, _ = shares(dropout_logit - of_zero)
    dead, alive, _ = shares(dropout_logit)
    less_one, _ = expm1_parts(of_zero)
    part = tl.where(zero, g * counted, g)
    by_logit = tl.where(zero, -dropped * alive * less_one, -dead)
    # Beyond the rows, where g is 0, the slopes need not be finite.
    keep = g != 0
    return (
        0.0,
        tl.where(keep, part * by_mean, 0.0),
        tl.where(keep, part * by_dispersion, 0.0),
        tl.where(keep, g * by_logit, 0.0),
    )
