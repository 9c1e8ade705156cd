"""Bernoulli x l - log(1 + exp(l)) of logits l. See fastvae/likelihoods/bernoulli.py for the mathematics."""

import triton
import triton.language as tl

from ..elementary import exp_of_negative, reciprocal

FACTOR = -1.0
SHARED_LOG = True
# x = 0 with certainty: log p is 0.
PADDING = float("-inf")
FINITE = True


@triton.jit
def value(x, data, logits):
    # The distance of x from the favoured target times |l|, instead of x l - softplus(l): no cancellation, and
    # 0 * inf is 0.
    miss = tl.where(logits > 0, 1.0 - x, x)
    margin = tl.abs(logits)
    return tl.where(miss == 0, 0.0, miss * margin), exp_of_negative(-margin)


@triton.jit
def gradient(g, x, logits):
    # With sigmoid(-|l|), x - sigmoid(l) does not cancel at x = 0 and x = 1.
    t = exp_of_negative(-tl.abs(logits))
    t *= reciprocal(1.0 + t)
    return g * logits, g * tl.where(logits > 0, (x - 1.0) + t, x - t)
