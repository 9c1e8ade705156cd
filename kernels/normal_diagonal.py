"""Reparameterised sampling with analytic KL or with log p(z) - log q(z|x), in Triton.

See :mod:`fastvae.ops.normal_diagonal` for the mathematics. A tile is [BLOCK_K, BLOCK_B, BLOCK_D]: samples,
rows, columns. A program keeps a block of rows and loops over its samples, so that quantities of the row alone
are read and computed once. Rows longer than a tile, and samples where there are few rows, are split over
programs, each of which writes its part of the sums. The noise never leaves the registers.

``draw`` is the record of a draw's settings: samples, sample_offset, row_offset, logvar_min, logvar_max, and
the meaning of ``logvar``: scale, floor.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import LAUNCH, accumulator, split_program, store
from .elementary import expm1_parts
from .launching import Call, Result, fixed, planned
from .normal_diagonal_backward import rsample_kl_backward, rsample_log_ratio_backward
from .normal_tiles import (
    compile_time,
    form_of,
    input_strides,
    inverse_scale,
    latent_tiles,
    load_inputs,
    scale,
)
from .random import address_of_rows, normals

__all__ = ["rsample_kl", "rsample_kl_backward", "rsample_log_ratio", "rsample_log_ratio_backward"]


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
    rows = address_of_rows(o_b, row_offset)
    b_eps = normals(seed, o_k + sample_offset, rows, i_d, DTYPE, BLOCK_K, BLOCK_B, BLOCK_D)
    b_z = b_mu + b_sigma * b_eps  # [BLOCK_K, BLOCK_B, BLOCK_D]
    store(p_z, (o_k * B + o_b) * D + o_d, b_z, (o_k < k_stop) & (o_b < B) & (o_d < D))
    return b_eps, b_z


@triton.jit
def zero_first(p_counter):
    """Set a counter to zero, in the first program."""
    if p_counter is not None:  # noqa: SIM102 (compile-time condition outside, run-time condition inside)
        if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
            tl.store(p_counter, 0)


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
    p_counter,  # [1] int32 out, zero, or None
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
    zero_first(p_counter)
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
    p_counter,  # [1] int32 out, zero, or None
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
    zero_first(p_counter)
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


_COUNTER = Result((1,), torch.int32)


@planned
def _draw_kl(mu, logvar, prior_mu, prior_logvar, seed, samples, form, per_dimension, counts) -> Call:
    b, d = mu.shape
    dtype, launching = accumulator(mu), LAUNCH["normal_diagonal"]
    tiles = latent_tiles(samples, b, d, launching.tile, loop_d=True)
    kl = Result((b, d), dtype) if per_dimension else Result((b,), dtype, tiles.d_splits)
    return Call(
        rsample_kl_kernel,
        tiles.grid,
        (Result((samples, b, d), mu.dtype), kl, _COUNTER if counts else None),
        (
            samples,
            b,
            fixed(d),
            *tiles.numbers,
            tiles.d_tiles,
            *input_strides(mu, logvar, prior_mu, prior_logvar),
        ),
        {"LOOP_D": tiles.d_tiles > 1, "PER_DIMENSION": per_dimension}
        | compile_time(dtype, form, tiles, logvar),
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
    counts: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """Return z [K, B, D], KL(q || p) [B], or [B, D] with ``per_dimension``, and a counter or None.

    A counter, [1] int32, is zero; it is for :func:`fastvae.kernels.likelihood.log_prob_bound`.
    """
    b, d = mu.shape
    if b == 0 or d == 0:
        kl = mu.new_zeros((b, d) if per_dimension else b, dtype=accumulator(mu))
        return mu.new_empty((draw.samples, b, d)), kl, None
    settings = draw.samples, form_of(draw), per_dimension, counts
    tensors = mu, logvar, prior_mu, prior_logvar, seed
    return _draw_kl(tensors, settings, (draw.sample_offset, draw.row_offset))


@planned
def _draw_log_ratio(mu, logvar, prior_mu, prior_logvar, seed, samples, form, counts) -> Call:
    b, d = mu.shape
    dtype, launching = accumulator(mu), LAUNCH["normal_diagonal"]
    tiles = latent_tiles(samples, b, d, launching.tile)
    return Call(
        rsample_log_ratio_kernel,
        tiles.grid,
        (
            Result((samples, b, d), mu.dtype),
            Result((samples, b), dtype, tiles.d_splits),
            _COUNTER if counts else None,
        ),
        (samples, b, fixed(d), *tiles.numbers, *input_strides(mu, logvar, prior_mu, prior_logvar)),
        compile_time(dtype, form, tiles, logvar),
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
    counts: bool = False,
) -> tuple[torch.Tensor | None, ...]:
    """Return z [K, B, D], log p(z) - log q(z|x) [K, B], and a counter or None, as :func:`rsample_kl`.

    Only the backward pass uses the estimator.
    """
    b, d = mu.shape
    samples = draw.samples
    if samples == 0 or b == 0 or d == 0:
        return mu.new_empty((samples, b, d)), mu.new_zeros((samples, b), dtype=accumulator(mu)), None
    settings = samples, form_of(draw), counts
    tensors = mu, logvar, prior_mu, prior_logvar, seed
    return _draw_log_ratio(tensors, settings, (draw.sample_offset, draw.row_offset))
