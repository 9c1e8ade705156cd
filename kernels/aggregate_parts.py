"""Weights and parameters of the components of an aggregate posterior, in Triton."""

from __future__ import annotations

import triton
import triton.language as tl

from .common import load
from .elementary import exp, log, quotient
from .mixture import LOG_2_PI


@triton.jit
def log_weights(U, dataset_size, STRATIFIED: tl.constexpr, DTYPE: tl.constexpr):
    """Return the log weights of a row's own component and of the next one, and that of the others.

    The first two are less the third.
    """
    b_zero = tl.zeros([1, 1], dtype=DTYPE)
    b_own, b_next, b_others = b_zero, b_zero, -log(b_zero + U)
    if STRATIFIED:
        b_count, b_size = b_zero + (U - 1), b_zero + dataset_size
        b_own = log(quotient(b_count, b_size))
        b_next = log(quotient(b_size - b_count, b_size))
        b_others = -log(b_count)
    return b_own, b_next, b_others


@triton.jit
def weighted(b_s, o_own, o_u, U, b_own, b_next, STRATIFIED: tl.constexpr):
    """Add log weights, less that of the others, to scores of components o_u for rows of examples o_own."""
    if STRATIFIED:
        o_next = tl.where(o_own + 1 == U, 0, o_own + 1)
        b_s += tl.where(o_u == o_own, b_own, tl.where(o_u == o_next, b_next, 0.0))
    return b_s


@triton.jit
def marginal_parts(
    p_mu, p_logvar, p_scale, o_u, o_d, m_d, D, strides_mu, strides_logvar, DTYPE: tl.constexpr
):
    """Load mean, inverse scale and constant [1, BLOCK_D] of a component, or [BLOCK_U, BLOCK_D] of several."""
    b_mu = load(p_mu, o_u * strides_mu[0] + o_d * strides_mu[1], m_d, DTYPE)
    b_logvar = load(p_logvar, o_u * strides_logvar[0] + o_d * strides_logvar[1], m_d, DTYPE)
    b_inverse = exp(-0.5 * b_logvar) if p_scale is None else load(p_scale, o_u * D + o_d, m_d, DTYPE)
    return b_mu, b_inverse, -0.5 * (b_logvar + LOG_2_PI)
