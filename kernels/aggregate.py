"""Aggregate posteriors and their marginals, in Triton. See :mod:`fastvae.ops.aggregate` for the mathematics.

All dimensions together are a mixture, whose scores are computed as in :mod:`.mixture`. For the marginals
lanes are elements of z, and the components follow one another: a pass for the maxima, one for the sums, and
no exchange between threads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .aggregate_backward import aggregate_log_prob_backward
from .aggregate_parts import log_weights, marginal_parts, weighted
from .common import (
    LANES,
    LAUNCH,
    PROGRAMS,
    accumulator,
    cdiv,
    load,
    power_of_two,
    split_program,
    triton_dtype,
)
from .elementary import exp, log
from .launching import Call, Result, fixed, planned
from .logsumexp import finite_shift, merged, next_block
from .mixture import THREAD, matrix_strides, prepare, scores, splits_of, tile_of

__all__ = ["aggregate_log_prob", "aggregate_log_prob_backward"]

# Exponentials of a marginal that are added one after the other.
TERMS = tl.constexpr(64)
# Of the marginals' tiles: minimum elements; elements of a thread, 16 bytes; and maximum dimensions, fewer
# than a warp's threads, as for TILE_D.
MIN_TILE, ELEMENTS, MARGINALS = 128, 4, 16


@triton.jit(
    do_not_specialize=["N", "U", "u_tiles", "dataset_size"], do_not_specialize_on_alignment=["u_splits"]
)
def aggregate_kernel(
    p_z,  # [N, D]
    p_mean,  # [D, UP]
    p_inverse,  # [D, UP]
    p_constant,  # [U]
    p_out,  # [N] out, log q(z), or None when writing parts
    p_maximum,  # [u_splits, N] out, maximum of each split's scores, or None
    p_total,  # [u_splits, N] out, sum_u exp(s - maximum), or None
    N,
    U,
    D,
    UP,
    u_tiles,  # blocks of components of one program
    u_splits,  # programs along the components
    dataset_size,
    stride_z_n,
    stride_z_d,
    STRATIFIED: tl.constexpr,
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Reduce the scores of all dimensions together; one program per block of rows and split.

    The splits are of the components.
    """
    i_n, i_split = split_program(u_splits)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]  # [BLOCK_N, 1]
    o_own = o_n % U
    b_own, b_next, b_others = log_weights(U, dataset_size, STRATIFIED, DTYPE)
    b_max = tl.full([BLOCK_N, 1], float("-inf"), dtype=DTYPE)
    b_sum = tl.zeros([BLOCK_N, 1], dtype=DTYPE)
    # Visibly a multiple of BLOCK_U: loads are aligned.
    u_start = i_split * u_tiles * BLOCK_U
    for i_u in range(u_start, tl.minimum(u_start + u_tiles * BLOCK_U, U), BLOCK_U):
        o_u = (i_u + tl.arange(0, BLOCK_U)).to(tl.int64)[None, :]  # [1, BLOCK_U]
        b_s = scores(p_z, p_mean, p_inverse, p_constant, o_n, o_u, N, U, D, UP, stride_z_n, stride_z_d, DTYPE)
        b_s = weighted(b_s, o_own, o_u, U, b_own, b_next, STRATIFIED) + b_others
        b_max, b_rescale, b_term = next_block(b_s, b_max)
        b_sum = b_sum * b_rescale + tl.sum(b_term, axis=1, keep_dims=True)
    # The maximum drops NaN; the sum keeps it.
    b_max = tl.where(b_sum == b_sum, b_max, b_sum)
    if p_out is not None:
        tl.store(p_out + o_n, b_max + log(b_sum), mask=o_n < N)
    else:
        o_out = i_split.to(tl.int64) * N + o_n
        tl.store(p_maximum + o_out, b_max, mask=o_n < N)
        tl.store(p_total + o_out, b_sum, mask=o_n < N)


@triton.jit(do_not_specialize=["N", "U", "dataset_size"])
def aggregate_marginals_kernel(
    p_z,  # [N, D]
    p_mu,  # [U, D]
    p_logvar,  # [U, D]
    p_scale,  # [U, D], exp(-logvar / 2)
    p_out,  # [N, D] out, log q(z_d)
    N,
    U,
    D,
    dataset_size,
    stride_z_n,
    stride_z_d,
    stride_mu_u,
    stride_mu_d,
    stride_logvar_u,
    stride_logvar_d,
    STRATIFIED: tl.constexpr,
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the marginals' log densities; one program per block of rows and dimensions."""
    o_n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]  # [BLOCK_N, 1]
    o_own = o_n % U
    o_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
    m_d = o_d < D
    mask = (o_n < N) & m_d
    b_own, b_next, b_others = log_weights(U, dataset_size, STRATIFIED, DTYPE)
    b_z = load(p_z, o_n * stride_z_n + o_d * stride_z_d, mask, DTYPE)
    b_max = tl.full([BLOCK_N, BLOCK_D], float("-inf"), dtype=DTYPE)
    s_mu, s_logvar = (stride_mu_u, stride_mu_d), (stride_logvar_u, stride_logvar_d)
    for i_u in range(U):
        o_u = tl.zeros([1, 1], dtype=tl.int64) + i_u
        b_mu, b_inverse, b_constant = marginal_parts(
            p_mu, p_logvar, p_scale, o_u, o_d, m_d, D, s_mu, s_logvar, DTYPE
        )
        b_white = (b_z - b_mu) * b_inverse
        b_t = b_constant - 0.5 * (b_white * b_white)
        b_t = weighted(b_t, o_own, o_u, U, b_own, b_next, STRATIFIED)
        # Not tl.max's choice of NaN: a NaN is dropped here, and reaches the sum.
        b_max = tl.where(b_t > b_max, b_t, b_max)
    b_shift = finite_shift(b_max)
    b_sum = tl.zeros([BLOCK_N, BLOCK_D], dtype=DTYPE)
    for u_start in range(0, U, TERMS):
        b_part = tl.zeros([BLOCK_N, BLOCK_D], dtype=DTYPE)
        for i_u in range(u_start, tl.minimum(u_start + TERMS, U)):
            o_u = tl.zeros([1, 1], dtype=tl.int64) + i_u
            b_mu, b_inverse, b_constant = marginal_parts(
                p_mu, p_logvar, p_scale, o_u, o_d, m_d, D, s_mu, s_logvar, DTYPE
            )
            b_white = (b_z - b_mu) * b_inverse
            b_t = b_constant - 0.5 * (b_white * b_white)
            b_part += exp(weighted(b_t, o_own, o_u, U, b_own, b_next, STRATIFIED) - b_shift)
        b_sum += b_part
    tl.store(p_out + o_n * D + o_d, b_max + (log(b_sum) + b_others), mask=mask)


@planned
def _whole(z, mean, inverse, constant, dataset_size) -> Call:
    (n, d), u = z.shape, len(constant)
    dtype = accumulator(z)
    # Half of a mixture's scores per thread: with D = 50 and more tiles of components the others spill.
    block_n, block_u, warps = tile_of(n, u, dtype, THREAD // 2)
    each, splits = splits_of(cdiv(u, block_u), cdiv(n, block_n), 2)
    part = Result((splits, n), dtype) if splits > 1 else None
    return Call(
        aggregate_kernel,
        (splits * cdiv(n, block_n),),
        (None if splits > 1 else Result((n,), dtype), part, part),
        (
            *(n, u, fixed(d), mean.shape[1], each, splits, dataset_size),
            *matrix_strides(z),
        ),
        {
            "STRATIFIED": dataset_size > 0,
            "DTYPE": triton_dtype(dtype),
            "BLOCK_N": block_n,
            "BLOCK_U": block_u,
        },
        warps,
    )


@planned
def _marginals(z, mu, logvar, scale, dataset_size) -> Call:
    (n, d), u = z.shape, len(mu)
    dtype = accumulator(z)
    launch = LAUNCH["mixture_backward"]
    block_d = min(power_of_two(d), MARGINALS)
    # Fewer rows where programs would be few.
    enough = power_of_two(max(1, n * cdiv(d, block_d) // PROGRAMS))
    block_n = min(power_of_two(n), launch.tile // block_d, max(MIN_TILE // block_d, enough))
    return Call(
        aggregate_marginals_kernel,
        (cdiv(n, block_n), cdiv(d, block_d)),
        (Result((n, d), dtype),),
        (
            *(n, u, fixed(d), dataset_size),
            *(*matrix_strides(z), *matrix_strides(mu), *matrix_strides(logvar)),
        ),
        {
            "STRATIFIED": dataset_size > 0,
            "DTYPE": triton_dtype(dtype),
            "BLOCK_N": block_n,
            "BLOCK_D": block_d,
        },
        min(launch.warps(dtype), max(1, block_n * block_d // (ELEMENTS * LANES))),
    )


def aggregate_log_prob(
    z: torch.Tensor, mu: torch.Tensor, logvar: torch.Tensor, dataset_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log q(z) [N] and log q(z_d) [N, D] of z [N, D] and components [U, D]."""
    if z.numel() == 0:
        return z.new_zeros(len(z)), torch.empty_like(z)
    mean, inverse, scale, constant = prepare((mu, logvar, None), (True,))
    whole, maximum, total = _whole((z, mean, inverse, constant), (dataset_size,))
    (each,) = _marginals((z, mu, logvar, scale), (dataset_size,))
    return merged(maximum, total)[0] if whole is None else whole, each
