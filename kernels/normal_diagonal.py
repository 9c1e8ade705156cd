"""Reparameterised sampling with analytic KL or with log p(z) - log q(z|x), in Triton.

See :mod:`fastvae.ops.normal_diagonal` for the mathematics. A tile is [BLOCK_K, BLOCK_B, BLOCK_D]: samples,
rows, columns. A program keeps a block of rows and loops over its samples, so that quantities of the row alone
are read and computed once. Rows longer than a tile, and samples where there are few rows, are split over
programs, each of which writes its part of the sums. The noise never leaves the registers.

``draw`` is the record of a draw's settings: samples, sample_offset, row_offset, logvar_min, logvar_max, and
the meaning of ``logvar``: scale, floor.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_hip

from .common import (
    INTERPRETED,
    LAUNCH,
    PROGRAMS,
    accumulator,
    cdiv,
    computed,
    load,
    row_alignment,
    split_program,
    store,
    strides,
    triton_dtype,
)
from .elementary import exp, expm1_parts, log, log_positive, quotient, softplus
from .launching import Call, Result, fixed, planned
from .random import noise_tile, normals

# Steps of a backward program's loop over samples. Minimum: every split writes its part of the sums, which is
# wasteful if it is short. Maximum: float32 sums of that length are as accurate as torch's blockwise ones.
MIN_STEPS = 8
MAX_STEPS = 32


# Below it softplus(raw) is exp(raw) to the last digit, and may underflow.
TAIL = tl.constexpr(-40.0)


@triton.jit
def log_variance(b_raw, SCALE: tl.constexpr, FLOOR: tl.constexpr):
    """Convert ``b_raw`` (log scale, scale or softplus) to log sigma^2."""
    if SCALE == "log_scale":
        b_logvar = 2.0 * b_raw
    elif SCALE == "scale":
        b_logvar = 2.0 * log_positive(b_raw)
    else:
        b_variance, _ = softplus(b_raw)
        # Normal unless infinite.
        b_logvar = log(b_variance + FLOOR)
        b_right = b_raw < float("inf")
        if FLOOR == 0.0:
            b_right = b_right & (b_raw >= TAIL)
        b_logvar = tl.where(b_right, b_logvar, b_raw)
    return b_logvar


@triton.jit
def scale(b_logvar, b_raw, SCALE: tl.constexpr, FLOOR: tl.constexpr):
    """Return sigma, from the log variance if SCALE is "logvar", else from the raw parameter."""
    if SCALE == "logvar":
        b_sigma = exp(0.5 * b_logvar)
    elif SCALE == "log_scale":
        b_sigma = exp(b_raw)
    elif SCALE == "scale":
        b_sigma = b_raw
    else:
        b_variance, _ = softplus(b_raw)
        b_sigma = tl.sqrt(b_variance + FLOOR)
        if FLOOR == 0.0:
            b_sigma = tl.where(b_raw < TAIL, exp(0.5 * b_raw), b_sigma)
    return b_sigma


@triton.jit
def chain(b_raw, SCALE: tl.constexpr, FLOOR: tl.constexpr):
    """Return the derivative of :func:`log_variance`."""
    if SCALE == "log_scale":
        b_chain = 2.0
    elif SCALE == "scale":
        b_chain = quotient(tl.zeros_like(b_raw) + 2.0, b_raw)
    else:
        b_variance, b_slope = softplus(b_raw)
        b_chain = quotient(b_slope, b_variance + FLOOR)
        if FLOOR == 0.0:
            b_chain = tl.where(b_raw < TAIL, 1.0, b_chain)
    return b_chain


@triton.jit
def load_inputs(
    p_mu,
    p_logvar,
    p_prior_mu,
    p_prior_logvar,
    o_b,
    o_d,
    B,
    D,
    stride_mu_b,
    stride_mu_d,
    stride_logvar_b,
    stride_logvar_d,
    stride_prior_mu_b,
    stride_prior_mu_d,
    stride_prior_logvar_b,
    stride_prior_logvar_d,
    LOGVAR_MIN: tl.constexpr,
    LOGVAR_MAX: tl.constexpr,
    CLAMP: tl.constexpr,
    SCALE: tl.constexpr,
    FLOOR: tl.constexpr,
    ALIGN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Load mu, logvar, its origin, the prior's mean and logvar: [1, BLOCK_B, BLOCK_D] each.

    The origin is the raw parameter if SCALE is not "logvar", else a mask of the elements the clamp leaves
    unchanged.
    """
    mask = (o_b < B) & (o_d < D)
    b_mu = load(p_mu, o_b * stride_mu_b + o_d * stride_mu_d, mask, DTYPE)
    b_logvar = load(p_logvar, o_b * stride_logvar_b + o_d * stride_logvar_d, mask, DTYPE, ALIGN=ALIGN)
    b_given = mask
    if SCALE != "logvar":
        b_given = b_logvar
        b_logvar = log_variance(b_given, SCALE, FLOOR)
    elif CLAMP:
        # NaN compares as inside and is kept.
        b_low = b_logvar < LOGVAR_MIN
        b_high = b_logvar > LOGVAR_MAX
        b_logvar = tl.where(b_low, LOGVAR_MIN, tl.where(b_high, LOGVAR_MAX, b_logvar))
        b_given = (b_low | b_high) == 0
    if p_prior_mu is not None:
        b_prior_mu = load(p_prior_mu, o_b * stride_prior_mu_b + o_d * stride_prior_mu_d, mask, DTYPE)
        b_prior_logvar = load(
            p_prior_logvar, o_b * stride_prior_logvar_b + o_d * stride_prior_logvar_d, mask, DTYPE
        )
    else:
        b_prior_mu = tl.zeros([1, 1, 1], dtype=DTYPE)
        b_prior_logvar = tl.zeros([1, 1, 1], dtype=DTYPE)
    return b_mu, b_logvar, b_given, b_prior_mu, b_prior_logvar


@triton.jit
def inverse_scale(b_prior_logvar, p_prior_logvar):
    """Return 1 / s of the prior, or 1 for N(0, I).

    Callers multiply by one 1 / s at a time: 1 / s^2 overflows long before a product that contains it.
    """
    b_inverse_s = b_prior_logvar + 1.0
    if p_prior_logvar is not None:
        b_inverse_s = exp(-0.5 * b_prior_logvar)
    return b_inverse_s


@triton.jit
def draw(
    p_z,
    b_mu,
    b_sigma,
    seed,
    o_k,
    o_b,
    i_d,
    o_d,
    k_stop,
    B,
    D,
    sample_offset,
    row_offset,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Draw the noise of a tile and store z; return both in the dtype of the computation, z unrounded."""
    b_eps = normals(seed, o_k + sample_offset, o_b + row_offset, i_d, DTYPE, BLOCK_K, BLOCK_B, BLOCK_D)
    b_z = b_mu + b_sigma * b_eps  # [BLOCK_K, BLOCK_B, BLOCK_D]
    store(p_z, (o_k * B + o_b) * D + o_d, b_z, (o_k < k_stop) & (o_b < B) & (o_d < D))
    return b_eps, b_z


@triton.jit(
    do_not_specialize=["K", "B", "sample_offset", "row_offset", "k_per_program"],
    do_not_specialize_on_alignment=["d_splits"],
)
def rsample_kl_kernel(
    p_mu,  # [B, D] mean of q
    p_logvar,  # [B, D] log variance of q
    p_prior_mu,  # [B, D] mean of the prior, or None for N(0, I)
    p_prior_logvar,  # [B, D] log variance of the prior, or None likewise
    p_seed,  # [] int64
    p_z,  # [K, B, D] out, contiguous
    p_kl,  # [d_splits, B] or [B, D] out, contiguous, in the dtype of the computation
    sample_offset,  # address of the first sample
    row_offset,  # address of the first row
    K,  # samples
    B,  # rows
    D,  # columns
    k_per_program,  # samples of one program
    d_splits,  # programs along the columns
    d_tiles,  # blocks of columns of one program
    stride_mu_b,
    stride_mu_d,
    stride_logvar_b,
    stride_logvar_d,
    stride_prior_mu_b,
    stride_prior_mu_d,
    stride_prior_logvar_b,
    stride_prior_logvar_d,
    LOGVAR_MIN: tl.constexpr,  # clamp of logvar, with CLAMP
    LOGVAR_MAX: tl.constexpr,
    CLAMP: tl.constexpr,  # whether logvar is clamped
    SCALE: tl.constexpr,  # form of p_logvar: "logvar", "log_scale", "scale", "softplus"
    FLOOR: tl.constexpr,  # added to a softplus
    ALIGN: tl.constexpr,  # alignment of logvar's rows in bytes, up to 16
    LOOP_D: tl.constexpr,  # True if a program takes more than one block of columns
    PER_DIMENSION: tl.constexpr,  # the KL is [B, D] instead of [B]
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sample z and compute the KL: one program per block of rows, split of the columns and of the samples.

    The first split of the samples computes the KL.
    """
    i_b, i_d_split = split_program(d_splits)
    i_b *= BLOCK_B
    i_split = tl.program_id(1)
    # Visibly a multiple of BLOCK_D for the compiler.
    d_start = i_d_split * d_tiles * BLOCK_D
    d_stop = d_start + 1
    if LOOP_D:
        d_stop = tl.minimum(d_start + d_tiles * BLOCK_D, D)
    k_start = i_split * k_per_program
    k_stop = tl.minimum(k_start + k_per_program, K)
    o_b = (i_b + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :, None]  # [1, BLOCK_B, 1]
    seed = tl.load(p_seed)
    b_kl = tl.zeros([1, BLOCK_B, BLOCK_D], dtype=DTYPE)  # [1, BLOCK_B, BLOCK_D]
    for i_d in range(d_start, d_stop, BLOCK_D):
        o_d = (i_d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, None, :]  # [1, 1, BLOCK_D]
        b_mu, b_logvar, b_given, b_prior_mu, b_prior_logvar = load_inputs(
            p_mu, p_logvar, p_prior_mu, p_prior_logvar, o_b, o_d, B, D,
            stride_mu_b, stride_mu_d, stride_logvar_b, stride_logvar_d,
            stride_prior_mu_b, stride_prior_mu_d, stride_prior_logvar_b, stride_prior_logvar_d,
            LOGVAR_MIN, LOGVAR_MAX, CLAMP, SCALE, FLOOR, ALIGN, DTYPE,
        )  # fmt: skip
        if i_split == 0:
            _, b_excess = expm1_parts(b_logvar - b_prior_logvar)
            b_white = (b_mu - b_prior_mu) * inverse_scale(b_prior_logvar, p_prior_logvar)
            b_term = 0.5 * (b_white * b_white + b_excess)
            if PER_DIMENSION:
                tl.store(p_kl + o_b * D + o_d, b_term, mask=(o_b < B) & (o_d < D))
            else:
                # The zeros loaded beyond D may have a nonzero KL if clamped.
                b_kl += tl.where(o_d < D, b_term, 0.0)
        b_sigma = scale(b_logvar, b_given, SCALE, FLOOR)
        for i_k in range(k_start, k_stop, BLOCK_K):
            o_k = (i_k + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None, None]  # [BLOCK_K, 1, 1]
            draw(
                p_z, b_mu, b_sigma, seed, o_k, o_b, i_d, o_d, k_stop, B, D, sample_offset, row_offset,
                DTYPE, BLOCK_K, BLOCK_B, BLOCK_D,
            )  # fmt: skip
    if not PER_DIMENSION:  # noqa: SIM102 (compile-time condition outside, run-time condition inside)
        if i_split == 0:
            o_kl = i_d_split.to(tl.int64) * B + o_b
            tl.store(p_kl + o_kl, tl.sum(b_kl, axis=2, keep_dims=True), mask=o_b < B)


@triton.jit(
    do_not_specialize=["K", "B", "sample_offset", "row_offset", "k_per_program"],
    do_not_specialize_on_alignment=["d_splits"],
)
def rsample_log_ratio_kernel(
    p_mu,  # [B, D] mean of q
    p_logvar,  # [B, D] log variance of q
    p_prior_mu,  # [B, D] mean of the prior, or None for N(0, I)
    p_prior_logvar,  # [B, D] log variance of the prior, or None likewise
    p_seed,  # [] int64
    p_z,  # [K, B, D] out, contiguous
    p_log_ratio,  # [d_splits, K, B] out, contiguous, in the dtype of the computation
    sample_offset,  # address of the first sample
    row_offset,  # address of the first row
    K,  # samples
    B,  # rows
    D,  # columns
    k_per_program,  # samples of one program
    d_splits,  # programs along the columns
    stride_mu_b,
    stride_mu_d,
    stride_logvar_b,
    stride_logvar_d,
    stride_prior_mu_b,
    stride_prior_mu_d,
    stride_prior_logvar_b,
    stride_prior_logvar_d,
    LOGVAR_MIN: tl.constexpr,  # clamp of logvar, with CLAMP
    LOGVAR_MAX: tl.constexpr,
    CLAMP: tl.constexpr,  # whether logvar is clamped
    SCALE: tl.constexpr,  # form of p_logvar: "logvar", "log_scale", "scale", "softplus"
    FLOOR: tl.constexpr,  # added to a softplus
    ALIGN: tl.constexpr,  # alignment of logvar's rows in bytes, up to 16
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Sample z and its log-ratio; one program per block of rows and of columns and split of the samples."""
    i_b, i_d_split = split_program(d_splits)
    i_b *= BLOCK_B
    i_d = i_d_split * BLOCK_D
    k_start = tl.program_id(1) * k_per_program
    k_stop = tl.minimum(k_start + k_per_program, K)
    o_b = (i_b + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :, None]  # [1, BLOCK_B, 1]
    o_d = (i_d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, None, :]  # [1, 1, BLOCK_D]
    seed = tl.load(p_seed)
    b_mu, b_logvar, b_given, b_prior_mu, b_prior_logvar = load_inputs(
        p_mu, p_logvar, p_prior_mu, p_prior_logvar, o_b, o_d, B, D,
        stride_mu_b, stride_mu_d, stride_logvar_b, stride_logvar_d,
        stride_prior_mu_b, stride_prior_mu_d, stride_prior_logvar_b, stride_prior_logvar_d,
        LOGVAR_MIN, LOGVAR_MAX, CLAMP, SCALE, FLOOR, ALIGN, DTYPE,
    )  # fmt: skip
    b_sigma = scale(b_logvar, b_given, SCALE, FLOOR)
    for i_k in range(k_start, k_stop, BLOCK_K):
        o_k = (i_k + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None, None]  # [BLOCK_K, 1, 1]
        b_eps, b_z = draw(
            p_z, b_mu, b_sigma, seed, o_k, o_b, i_d, o_d, k_stop, B, D, sample_offset, row_offset,
            DTYPE, BLOCK_K, BLOCK_B, BLOCK_D,
        )  # fmt: skip
        b_term = log_ratio_term(b_eps, b_z, b_logvar, b_prior_mu, b_prior_logvar, p_prior_logvar)
        b_term = tl.where(o_d < D, b_term, 0.0)
        mask = (o_k < k_stop) & (o_b < B)
        o_ratio = (i_d_split.to(tl.int64) * K + o_k) * B + o_b
        tl.store(p_log_ratio + o_ratio, tl.sum(b_term, axis=2, keep_dims=True), mask=mask)


@triton.jit
def log_ratio_term(b_eps, b_z, b_logvar, b_prior_mu, b_prior_logvar, p_prior_logvar):
    """Return a column's term of log p(z) - log q(z|x); a product of sums cancels less than squares."""
    b_white = (b_z - b_prior_mu) * inverse_scale(b_prior_logvar, p_prior_logvar)
    return 0.5 * ((b_eps - b_white) * (b_eps + b_white) + (b_logvar - b_prior_logvar))


@triton.jit
def load_upstream(
    p_grad_z,
    p_grad_log_ratio,
    p_weight,
    o_k,
    o_b,
    o_d,
    k_stop,
    B,
    D,
    stride_grad_z_k,
    stride_grad_z_b,
    stride_grad_z_d,
    stride_grad_log_ratio_k,
    stride_grad_log_ratio_b,
    stride_weight_k,
    stride_weight_b,
    Q: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Load a step's upstream gradients of z (as stored) and of the log-ratio, and the weights.

    Shapes: [BLOCK_K, BLOCK_B, BLOCK_D], [BLOCK_K, BLOCK_B, 1], [BLOCK_K, BLOCK_B, 1].
    """
    m_row = (o_k < k_stop) & (o_b < B)
    b_h = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_D], dtype=DTYPE)
    b_g = tl.zeros([BLOCK_K, BLOCK_B, 1], dtype=DTYPE)
    b_weight = tl.zeros([BLOCK_K, BLOCK_B, 1], dtype=DTYPE)
    if Q and p_grad_z is not None:
        o_z = o_k * stride_grad_z_k + o_b * stride_grad_z_b + o_d * stride_grad_z_d
        b_h = tl.load(p_grad_z + o_z, mask=m_row & (o_d < D), other=0.0)
    if p_grad_log_ratio is not None:
        o_g = o_k * stride_grad_log_ratio_k + o_b * stride_grad_log_ratio_b
        b_g = load(p_grad_log_ratio, o_g, m_row, DTYPE)
    if Q and p_weight is not None:
        o_w = o_k * stride_weight_k + o_b * stride_weight_b
        b_weight = load(p_weight, o_w, m_row, DTYPE)
    return b_h, b_g, b_weight


@triton.jit
def store_part(p_x, b_x, i_split, o_b, o_d, B, D):
    """Store one split's part of a sum over samples, [1, BLOCK_B, BLOCK_D] of [splits, B, D]."""
    o_b = o_b + i_split.to(tl.int64) * B
    store(p_x, o_b * D + o_d, b_x, (o_b < (i_split.to(tl.int64) + 1) * B) & (o_d < D))


@triton.jit(
    do_not_specialize=["K", "B", "sample_offset", "row_offset", "k_per_program"],
    # Strides of tensors with one number per row: they change with the batch, and specialising on them gains
    # nothing.
    do_not_specialize_on_alignment=[
        "d_splits",
        "stride_grad_log_ratio_k",
        "stride_grad_log_ratio_b",
        "stride_weight_k",
        "stride_weight_b",
    ],
)
def rsample_backward_kernel(
    p_grad_z,  # [K, B, D] gradient of z, or None
    p_grad_kl,  # [B], or [B, D] with PER_DIMENSION, gradient of the KL, or None
    p_grad_log_ratio,  # [K, B] gradient of the log-ratio, or None
    p_weight,  # [K, B] factor of the gradients of mu and logvar, or None
    p_mu,  # [B, D] mean of q
    p_logvar,  # [B, D] log variance of q
    p_prior_mu,  # [B, D] mean of the prior, or None for N(0, I)
    p_prior_logvar,  # [B, D] log variance of the prior, or None likewise
    p_seed,  # [] int64
    p_grad_mu,  # [splits, B, D] out, contiguous, or None where not needed
    p_grad_logvar,  # likewise
    p_grad_prior_mu,  # likewise
    p_grad_prior_logvar,  # likewise
    sample_offset,  # address of the first sample
    row_offset,  # address of the first row
    K,  # samples
    B,  # rows
    D,  # columns
    k_per_program,  # samples of one program
    d_splits,  # programs along the columns
    stride_grad_z_k,
    stride_grad_z_b,
    stride_grad_z_d,
    stride_grad_kl_b,
    stride_grad_kl_d,
    stride_grad_log_ratio_k,
    stride_grad_log_ratio_b,
    stride_weight_k,
    stride_weight_b,
    stride_mu_b,
    stride_mu_d,
    stride_logvar_b,
    stride_logvar_d,
    stride_prior_mu_b,
    stride_prior_mu_d,
    stride_prior_logvar_b,
    stride_prior_logvar_d,
    LOGVAR_MIN: tl.constexpr,  # clamp of logvar, with CLAMP
    LOGVAR_MAX: tl.constexpr,
    CLAMP: tl.constexpr,  # whether logvar is clamped
    SCALE: tl.constexpr,  # form of p_logvar: "logvar", "log_scale", "scale", "softplus"
    FLOOR: tl.constexpr,  # added to a softplus
    ALIGN: tl.constexpr,  # alignment of logvar's rows in bytes, up to 16
    PER_DIMENSION: tl.constexpr,  # the KL is [B, D] instead of [B]
    PATH: tl.constexpr,  # drop the direct dependence of log q on (mu, logvar)
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradients: one program per block of rows, block of columns and split of the samples.

    The first split adds the KL's gradients.
    """
    # Compile-time flags of the quantities needed per sample.
    Q: tl.constexpr = (p_grad_mu is not None) or (p_grad_logvar is not None)
    RATIO: tl.constexpr = p_grad_log_ratio is not None
    PRIOR: tl.constexpr = (p_grad_prior_mu is not None) or (p_grad_prior_logvar is not None)
    ENTROPY: tl.constexpr = RATIO and (not PATH) and (p_grad_logvar is not None)
    NOISE: tl.constexpr = RATIO or (p_grad_z is not None and p_grad_logvar is not None)
    SAMPLES: tl.constexpr = (Q and p_grad_z is not None) or (RATIO and (Q or PRIOR))
    # Loads are issued one step ahead, or a warp would wait for memory at each step; AMD's multiprocessors
    # hold enough other warps to hide the latency.
    AHEAD: tl.constexpr = INTERPRETED or not is_hip()

    i_b, i_d = split_program(d_splits)
    i_b *= BLOCK_B
    i_d *= BLOCK_D
    i_split = tl.program_id(1)
    o_b = (i_b + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :, None]  # [1, BLOCK_B, 1]
    o_d = (i_d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, None, :]  # [1, 1, BLOCK_D]
    b_mu, b_logvar, b_given, b_prior_mu, b_prior_logvar = load_inputs(
        p_mu, p_logvar, p_prior_mu, p_prior_logvar, o_b, o_d, B, D,
        stride_mu_b, stride_mu_d, stride_logvar_b, stride_logvar_d,
        stride_prior_mu_b, stride_prior_mu_d, stride_prior_logvar_b, stride_prior_logvar_d,
        LOGVAR_MIN, LOGVAR_MAX, CLAMP, SCALE, FLOOR, ALIGN, DTYPE,
    )  # fmt: skip
    b_sigma = scale(b_logvar, b_given, SCALE, FLOOR)
    b_half_sigma = 0.5 * b_sigma
    b_inverse_s = inverse_scale(b_prior_logvar, p_prior_logvar)
    b_delta = b_mu - b_prior_mu
    # Sums over samples, per lane until the end.
    s_mu = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_D], dtype=DTYPE)  # sum of h
    s_logvar = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_D], dtype=DTYPE)  # sum of h eps; with RATIO times sigma / 2
    s_entropy = tl.zeros([BLOCK_K, BLOCK_B, 1], dtype=DTYPE)  # sum of g
    s_prior_mu = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_D], dtype=DTYPE)  # without a factor 1 / s
    s_prior_logvar = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_D], dtype=DTYPE)
    if SAMPLES:
        seed = tl.load(p_seed)
        if PATH and RATIO:
            b_shift, b_spread = b_delta * b_inverse_s, b_sigma * b_inverse_s
        if PATH and RATIO and Q:
            if SCALE == "logvar":
                b_inverse_sigma = exp(-0.5 * b_logvar)
            else:
                b_inverse_sigma = quotient(tl.zeros_like(b_sigma) + 1.0, b_sigma)
        k_start = i_split * k_per_program
        k_stop = tl.minimum(k_start + k_per_program, K)
        o_k = (k_start + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None, None]  # [BLOCK_K, 1, 1]
        n_h, n_g, n_weight = load_upstream(
            p_grad_z, p_grad_log_ratio, p_weight, o_k, o_b, o_d, k_stop, B, D,
            stride_grad_z_k, stride_grad_z_b, stride_grad_z_d, stride_grad_log_ratio_k,
            stride_grad_log_ratio_b, stride_weight_k, stride_weight_b,
            Q, DTYPE, BLOCK_K, BLOCK_B, BLOCK_D,
        )  # fmt: skip
        for i_k in range(k_start, k_stop, BLOCK_K):
            o_k = (i_k + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None, None]  # [BLOCK_K, 1, 1]
            m_k = o_k < k_stop
            if AHEAD:
                b_h, b_g, b_weight = computed(n_h, DTYPE), n_g, n_weight
            n_h, n_g, n_weight = load_upstream(
                p_grad_z, p_grad_log_ratio, p_weight, o_k + BLOCK_K if AHEAD else o_k, o_b, o_d, k_stop, B, D,
                stride_grad_z_k, stride_grad_z_b, stride_grad_z_d, stride_grad_log_ratio_k,
                stride_grad_log_ratio_b, stride_weight_k, stride_weight_b,
                Q, DTYPE, BLOCK_K, BLOCK_B, BLOCK_D,
            )  # fmt: skip
            if not AHEAD:
                b_h, b_g, b_weight = computed(n_h, DTYPE), n_g, n_weight
            if NOISE:
                b_eps = normals(
                    seed, o_k + sample_offset, o_b + row_offset, i_d, DTYPE, BLOCK_K, BLOCK_B, BLOCK_D
                )
            if RATIO:
                # The distance from the prior's mean over s, its product with g, and that times sigma / (2 s).
                # A sample with zero upstream gradient contributes zero, even where the distance is infinite.
                # PATH keeps one more number, which leaves registers for fewer of these.
                if PATH:
                    b_white = tl.where(b_g == 0, 0.0, b_shift + b_spread * b_eps)
                    b_part = b_g * b_white
                    b_pull_scaled = (0.5 * b_part) * b_spread
                else:
                    b_white = tl.where(b_g == 0, 0.0, (b_delta + b_sigma * b_eps) * b_inverse_s)
                    b_part = b_g * b_white
                    b_pull_scaled = b_part * (b_half_sigma * b_inverse_s)
                b_pull = b_part * b_inverse_s
                # h sigma / 2, factor by factor: it can be finite where h overflows.
                b_scaled = b_h * b_half_sigma - b_pull_scaled
                b_h -= b_pull
                # Samples beyond the last have g = 0, and 0 times infinity would be NaN.
                if p_grad_prior_mu is not None:
                    s_prior_mu += tl.where(m_k, b_part, 0.0)
                if p_grad_prior_logvar is not None:
                    s_prior_logvar += tl.where(m_k, 0.5 * (b_part * b_white - b_g), 0.0)
                if PATH and Q:
                    b_push = b_g * b_eps
                    b_h += b_push * b_inverse_sigma
                    b_scaled += 0.5 * b_push
                b_h = tl.where(m_k, b_h, 0.0)
                b_scaled = tl.where(m_k, b_scaled, 0.0)
            else:
                b_scaled = b_h
            if p_weight is not None and Q:
                b_h *= b_weight
                b_scaled *= b_weight
                if ENTROPY:
                    s_entropy += b_g * b_weight
            elif ENTROPY:
                s_entropy += b_g
            if p_grad_mu is not None:
                s_mu += b_h
            if p_grad_logvar is not None:
                s_logvar += b_scaled * b_eps

    # Gradient of the KL; only the first split adds it.
    b_kl = tl.zeros([1, BLOCK_B, 1], dtype=DTYPE)  # [1, BLOCK_B, 1 or BLOCK_D]
    b_ratio = b_kl
    if p_grad_kl is not None:
        if PER_DIMENSION:
            o_kl = o_b * stride_grad_kl_b + o_d * stride_grad_kl_d
            b_kl = load(p_grad_kl, o_kl, (o_b < B) & (o_d < D), DTYPE)
        else:
            b_kl = load(p_grad_kl, o_b * stride_grad_kl_b, o_b < B, DTYPE)  # [1, BLOCK_B, 1]
        b_ratio, _ = expm1_parts(b_logvar - b_prior_logvar)
        b_ratio = tl.where(b_kl == 0, 0.0, b_ratio)
    # A KL with zero upstream gradient contributes zero, even where it is infinite.
    b_white = tl.where(b_kl == 0, 0.0, b_delta * b_inverse_s)
    b_part = b_kl * b_white
    b_push = tl.where(b_kl == 0, 0.0, b_part * b_inverse_s)
    if p_grad_mu is not None:
        b_out = tl.sum(s_mu, axis=0, keep_dims=True)
        if p_grad_kl is not None:
            b_out += tl.where(i_split == 0, b_push, 0.0)
        store_part(p_grad_mu, b_out, i_split, o_b, o_d, B, D)
    if p_grad_logvar is not None:
        b_out = tl.sum(s_logvar, axis=0, keep_dims=True)
        if SAMPLES and not RATIO:
            b_out *= b_half_sigma
        if ENTROPY:
            b_out += 0.5 * tl.sum(s_entropy, axis=0, keep_dims=True)
        if p_grad_kl is not None:
            b_out += tl.where(i_split == 0, 0.5 * b_kl * b_ratio, 0.0)
        if SCALE != "logvar":
            b_out *= chain(b_given, SCALE, FLOOR)
        elif CLAMP:
            b_out = tl.where(b_given, b_out, 0.0)
        store_part(p_grad_logvar, b_out, i_split, o_b, o_d, B, D)
    if p_grad_prior_mu is not None:
        b_out = tl.sum(s_prior_mu, axis=0, keep_dims=True)
        if RATIO:
            b_out *= b_inverse_s
        if p_grad_kl is not None:
            b_out -= tl.where(i_split == 0, b_push, 0.0)
        store_part(p_grad_prior_mu, b_out, i_split, o_b, o_d, B, D)
    if p_grad_prior_logvar is not None:
        b_out = tl.sum(s_prior_logvar, axis=0, keep_dims=True)
        if p_grad_kl is not None:
            b_square = 0.5 * (b_kl * b_ratio + b_part * b_white)
            b_out -= tl.where(i_split == 0, b_square, 0.0)
        store_part(p_grad_prior_logvar, b_out, i_split, o_b, o_d, B, D)


class LatentTiles(NamedTuple):
    """Partition of [K, B, D]: tile sizes, and one program's share of each axis."""

    k_per_program: int
    d_tiles: int
    k_splits: int
    b_tiles: int
    d_splits: int
    blocks: dict[str, int]  # the compile-time arguments

    @property
    def numbers(self) -> tuple[int, int]:
        """Integer arguments common to the kernels of this file."""
        return self.k_per_program, self.d_splits

    @property
    def grid(self) -> tuple[int, int]:
        """Grid of one program per split; columns vary fastest, so that neighbours read adjacent memory."""
        return self.b_tiles * self.d_splits, self.k_splits


@functools.lru_cache(4096)
def latent_tiles(
    k: int, b: int, d: int, tile: int, *, loop_d: bool = False, min_steps: int = 1, max_steps: int = 0
) -> LatentTiles:
    """Cut [K, B, D] into tiles and programs.

    Args:
        k: samples.
        b: rows, not 0.
        d: columns, not 0.
        tile: elements per tile.
        loop_d: let a program loop over several tiles of columns, as long as enough programs remain; otherwise
            each takes one.
        min_steps: minimum steps of a program's loop over samples, where there are as many. Samples are
            split to get enough programs.
        max_steps: maximum steps of that loop, which may split the samples further; 0 means no limit.
    """
    block_k, block_b, block_d = noise_tile(k, b, d, tile)
    k_tiles, b_tiles, d_tiles = cdiv(k, block_k), cdiv(b, block_b), cdiv(d, block_d)
    d_per = cdiv(d_tiles, max(1, PROGRAMS // b_tiles)) if loop_d else 1
    d_splits = cdiv(d_tiles, d_per)
    k_splits = min(PROGRAMS // (b_tiles * d_splits), cdiv(k_tiles, min_steps))
    k_splits = max(k_splits, cdiv(k_tiles, max_steps) if max_steps else 1, 1)
    # The limit of the grid's second axis.
    k_splits = min(k_splits, 65535)
    k_per = cdiv(max(k_tiles, 1), k_splits) * block_k
    blocks = {"BLOCK_K": block_k, "BLOCK_B": block_b, "BLOCK_D": block_d}
    return LatentTiles(k_per, d_per, max(cdiv(k, k_per), 1), b_tiles, d_splits, blocks)


@planned
def _draw_kl(mu, logvar, prior_mu, prior_logvar, seed, samples, form, per_dimension) -> Call:
    b, d = mu.shape
    dtype, launching = accumulator(mu), LAUNCH["normal_diagonal"]
    tiles = latent_tiles(samples, b, d, launching.tile, loop_d=True)
    kl = Result((b, d), dtype) if per_dimension else Result((b,), dtype, tiles.d_splits)
    return Call(
        rsample_kl_kernel,
        tiles.grid,
        (Result((samples, b, d), mu.dtype), kl),
        (samples, b, fixed(d), *tiles.numbers, tiles.d_tiles, *_inputs(mu, logvar, prior_mu, prior_logvar)),
        {"LOOP_D": tiles.d_tiles > 1, "PER_DIMENSION": per_dimension}
        | _constants(dtype, form, tiles, logvar),
        launching.warps(dtype),
    )


def rsample_kl(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    prior_mu: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    seed: torch.Tensor,
    draw: Any,
    per_dimension: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z [K, B, D] and KL(q || p) [B], or [B, D] with ``per_dimension``."""
    b, d = mu.shape
    if b == 0 or d == 0:
        kl = mu.new_zeros((b, d) if per_dimension else b, dtype=accumulator(mu))
        return mu.new_empty((draw.samples, b, d)), kl
    settings = draw.samples, _form(draw), per_dimension
    tensors = mu, logvar, prior_mu, prior_logvar, seed
    return _draw_kl(tensors, settings, (draw.sample_offset, draw.row_offset))


@planned
def _draw_log_ratio(mu, logvar, prior_mu, prior_logvar, seed, samples, form) -> Call:
    b, d = mu.shape
    dtype, launching = accumulator(mu), LAUNCH["normal_diagonal"]
    tiles = latent_tiles(samples, b, d, launching.tile)
    return Call(
        rsample_log_ratio_kernel,
        tiles.grid,
        (Result((samples, b, d), mu.dtype), Result((samples, b), dtype, tiles.d_splits)),
        (samples, b, fixed(d), *tiles.numbers, *_inputs(mu, logvar, prior_mu, prior_logvar)),
        _constants(dtype, form, tiles, logvar),
        launching.warps(dtype),
    )


def rsample_log_ratio(
    mu: torch.Tensor,
    logvar: torch.Tensor,
    prior_mu: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    seed: torch.Tensor,
    draw: Any,
    estimator: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z [K, B, D] and log p(z) - log q(z|x) [K, B]; only the backward pass uses the estimator."""
    b, d = mu.shape
    samples = draw.samples
    if samples == 0 or b == 0 or d == 0:
        return mu.new_empty((samples, b, d)), mu.new_zeros((samples, b), dtype=accumulator(mu))
    settings = samples, _form(draw)
    tensors = mu, logvar, prior_mu, prior_logvar, seed
    return _draw_log_ratio(tensors, settings, (draw.sample_offset, draw.row_offset))


def _inputs(mu, logvar, prior_mu, prior_logvar) -> tuple[Any, ...]:
    """Return the strides of the four inputs, in the kernels' order."""
    return tuple(fixed(s) for t in (mu, logvar, prior_mu, prior_logvar) for s in strides(t, 2))


def _form(draw: Any) -> tuple[float, float, str, float]:
    """Return the form of logvar: (logvar_min, logvar_max, scale, floor)."""
    return draw.logvar_min, draw.logvar_max, draw.scale, draw.floor


def _constants(
    dtype: torch.dtype, form: tuple[float, float, str, float], tiles: LatentTiles, logvar: torch.Tensor
) -> dict:
    """Return the kernels' common compile-time arguments, including the hyperparameters clamp and floor."""
    low, high, scale, floor = form
    return {
        "LOGVAR_MIN": low,
        "LOGVAR_MAX": high,
        "CLAMP": low > float("-inf") or high < float("inf"),
        "SCALE": scale,
        "FLOOR": floor,
        "ALIGN": row_alignment(logvar),
        "DTYPE": triton_dtype(dtype),
        **tiles.blocks,
    }


def rsample_kl_backward(
    grad_z: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    prior_mu: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    seed: torch.Tensor,
    draw: Any,
    need: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of (mu, logvar, prior_mu, prior_logvar), None where not needed."""
    return _backward(
        grad_z, grad_kl, None, None, mu, logvar, prior_mu, prior_logvar, seed, draw, False, need
    )  # fmt: skip


def rsample_log_ratio_backward(
    grad_z: torch.Tensor | None,
    grad_log_ratio: torch.Tensor | None,
    weight: torch.Tensor | None,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    prior_mu: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    seed: torch.Tensor,
    draw: Any,
    path: bool,
    need: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of (mu, logvar, prior_mu, prior_logvar), None where not needed.

    With ``path``, the direct dependence of log q on (mu, logvar) is dropped (sticking the landing).
    ``weight`` [K, B] multiplies the gradients of mu and logvar, and nothing else (DReG).
    """
    return _backward(
        grad_z, None, grad_log_ratio, weight, mu, logvar, prior_mu, prior_logvar, seed, draw, path, need
    )  # fmt: skip


@planned
def _gradients(
    grad_z, grad_kl, grad_log_ratio, weight, mu, logvar, prior_mu, prior_logvar, seed, samples, form, path,
    need,
) -> Call:  # fmt: skip
    """Plan either backward pass: absent upstream gradients are None and cost nothing."""
    b, d = mu.shape
    dtype, launching = accumulator(mu), LAUNCH["latent_backward"]
    per_dimension = grad_kl is not None and grad_kl.dim() == 2
    stride_kl = strides(grad_kl, 2) if per_dimension else (*strides(grad_kl, 1), 0)
    # The KL alone needs no samples.
    k = 1 if grad_z is None and grad_log_ratio is None else samples
    # Every split writes its part of the sums, wasteful if its loop is short; a long loop loses accuracy.
    tiles = latent_tiles(k, b, d, launching.tile, min_steps=MIN_STEPS, max_steps=MAX_STEPS)
    inputs = mu, logvar, prior_mu, prior_logvar
    stride_z = strides(grad_z, 3)
    return Call(
        rsample_backward_kernel,
        tiles.grid,
        tuple(
            Result((b, d), t.dtype, tiles.k_splits, dtype) if n else None
            for t, n in zip(inputs, need, strict=True)
        ),
        (
            *(
                k,
                b,
                fixed(d),
                *tiles.numbers,
                stride_z[0],
                fixed(stride_z[1]),
                fixed(stride_z[2]),
                *stride_kl,
            ),
            *(*strides(grad_log_ratio, 2), *strides(weight, 2), *_inputs(*inputs)),
        ),
        {"PER_DIMENSION": per_dimension, "PATH": path} | _constants(dtype, form, tiles, logvar),
        # With the prior's sums too, 8 half-precision elements per thread leave registers for too few threads.
        launching.warps(dtype if need[2] or need[3] else mu.dtype),
    )


def _backward(
    grad_z, grad_kl, grad_log_ratio, weight, mu, logvar, prior_mu, prior_logvar, seed, draw, path, need
):  # fmt: skip
    # Without a prior no tensor receives these gradients.
    need = need[0], need[1], need[2] and prior_mu is not None, need[3] and prior_logvar is not None
    if not any(need):
        return None, None, None, None
    tensors = mu, logvar, prior_mu, prior_logvar
    if mu.shape[0] == 0 or mu.shape[1] == 0:
        return tuple(torch.empty_like(t) if n else None for t, n in zip(tensors, need, strict=True))
    settings = draw.samples, _form(draw), path, need
    return _gradients(
        (grad_z, grad_kl, grad_log_ratio, weight, *tensors, seed),
        settings,
        (draw.sample_offset, draw.row_offset),
    )
