"""Reparameterised sampling of a Gaussian with a full covariance, in Triton.

See :mod:`fastvae.ops.normal_full` for the mathematics. A program takes one row of the batch. Forward, it
takes a block of samples and computes z by blocks of columns, each a product of noise with blocks of the
triangle; the noise is drawn again for each. Backward, it takes one block of the triangle and adds a product
per step of samples. The packed triangle is read and written in place, and nothing else is stored.

``draw`` is the record of a draw's settings: samples, sample_offset, row_offset.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from .common import (
    LAUNCH,
    PROGRAMS,
    accumulator,
    cdiv,
    load,
    power_of_two,
    split_program,
    store,
    strides,
    triton_dtype,
)
from .elementary import exp
from .launching import Call, Result, fixed, planned
from .random import address_of_rows, normals

HALF_LOG_2_PI = tl.constexpr(0.5 * math.log(2 * math.pi))
# Maximum columns of a block, columns of noise per product, and the minimum size of a product's axis.
TILE_D, STEPS, MIN_AXIS = 64, 16, 16
# Maximum first axis of a product: for 64 rows Triton 3.7 computes the backward product on sm_100 in TF32,
# which keeps three digits, in spite of input_precision="ieee".
TILE_FIRST = 32
# Allow all registers, or NVIDIA's assembler spills some bytes to use fewer.
OPTIONS = {} if torch.version.hip else {"maxnreg": 255}
# Steps of a backward program's loop over samples: the minimum where samples are split to get enough programs;
# the maximum, as long sequential sums lose digits.
MIN_STEPS, MAX_STEPS = 8, 16


@triton.jit
def block_of_noise(
    seed, o_k, i_b, i_d, sample_offset, row_offset,
    DTYPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Generate the normals [BLOCK_K, BLOCK_D] of one row, from column i_d on."""
    o_b = tl.zeros([1, 1, 1], dtype=tl.int64) + address_of_rows(i_b.to(tl.int64), row_offset)
    b_eps = normals(seed, o_k[:, None, None] + sample_offset, o_b, i_d, DTYPE, BLOCK_K, 1, BLOCK_D)
    return tl.reshape(b_eps, [BLOCK_K, BLOCK_D])


@triton.jit
def packed(o_i, o_j):
    """Return the packed index of L_ij."""
    return o_i * (o_i + 1) // 2 + o_j


@triton.jit(
    do_not_specialize=["K", "B", "sample_offset", "row_offset"], do_not_specialize_on_alignment=["k_tiles"]
)
def rsample_tril_kernel(
    p_mu,  # [B, D] mean of q
    p_tril,  # [B, D (D + 1) / 2] lower triangle of L, row by row, with the logarithms of its diagonal
    p_seed,  # [] int64
    p_z,  # [K, B, D] out, contiguous
    p_log_q,  # [K, B] out, contiguous, in the dtype of the computation
    sample_offset,  # address of the first sample
    row_offset,  # address of the first row
    K,  # samples
    B,  # rows
    D,  # columns
    k_tiles,  # blocks of samples
    stride_mu_b,
    stride_mu_d,
    stride_tril_b,
    stride_tril_d,
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STEPS: tl.constexpr,  # columns of noise that a product takes
):
    """Sample z and compute log q(z); one program per row and block of samples."""
    i_b, i_k = split_program(k_tiles)
    o_k = (i_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)  # [BLOCK_K]
    m_k = o_k < K
    o_row = o_k * B + i_b
    seed = tl.load(p_seed)
    p_mu += i_b.to(tl.int64) * stride_mu_b
    p_tril += i_b.to(tl.int64) * stride_tril_b
    # Kept from the last block of columns, which uses all of the noise.
    b_squares = tl.zeros([BLOCK_K, STEPS], dtype=DTYPE)
    b_logs = tl.zeros([BLOCK_D], dtype=DTYPE)
    for i_d in range(0, D, BLOCK_D):
        o_i = (i_d + tl.arange(0, BLOCK_D)).to(tl.int64)  # [BLOCK_D]
        m_i = o_i < D
        b_move = tl.zeros([BLOCK_K, BLOCK_D], dtype=DTYPE)
        b_squares = tl.zeros([BLOCK_K, STEPS], dtype=DTYPE)
        for i_j in range(0, tl.minimum(i_d + BLOCK_D, D), STEPS):
            o_j = (i_j + tl.arange(0, STEPS)).to(tl.int64)  # [STEPS]
            b_eps = block_of_noise(seed, o_k, i_b, i_j, sample_offset, row_offset, DTYPE, BLOCK_K, STEPS)
            # Noise beyond the last column is multiplied by zeros of L.
            b_squares += tl.where(o_j[None, :] < D, b_eps * b_eps, 0.0)
            mask = (o_j[:, None] <= o_i[None, :]) & m_i[None, :]
            b_l = load(p_tril, packed(o_i[None, :], o_j[:, None]) * stride_tril_d, mask, DTYPE)
            b_l = tl.where(o_i[None, :] == o_j[:, None], exp(b_l), b_l)  # [STEPS, BLOCK_D]
            b_move = tl.dot(b_eps, b_l, b_move, input_precision="ieee", out_dtype=DTYPE)
        b_mu = load(p_mu, o_i * stride_mu_d, m_i, DTYPE)
        store(p_z, o_row[:, None] * D + o_i[None, :], b_mu[None, :] + b_move, m_k[:, None] & m_i[None, :])
        b_log = load(p_tril, packed(o_i, o_i) * stride_tril_d, m_i, DTYPE)
        b_logs += tl.where(m_i, b_log + HALF_LOG_2_PI, 0.0)
    b_log_q = -0.5 * tl.sum(b_squares, axis=1) - tl.sum(b_logs, axis=0)
    tl.store(p_log_q + o_row, b_log_q, mask=m_k)


@triton.jit(
    do_not_specialize=["K", "B", "sample_offset", "row_offset", "k_per_program"],
    do_not_specialize_on_alignment=["k_splits", "j_blocks", "stride_grad_log_q_k", "stride_grad_log_q_b"],
)
def rsample_tril_backward_kernel(
    p_grad_z,  # [K, B, D] gradient of z, or None
    p_grad_log_q,  # [K, B] gradient of log q, or None
    p_tril,  # [B, D (D + 1) / 2] lower triangle of L, row by row, with the logarithms of its diagonal
    p_seed,  # [] int64
    p_grad_mu,  # [k_splits, B, D] out, contiguous, or None where not needed
    p_grad_tril,  # [k_splits, B, D (D + 1) / 2] out, contiguous, or None where not needed
    sample_offset,  # address of the first sample
    row_offset,  # address of the first row
    K,  # samples
    B,  # rows
    D,  # columns
    k_per_program,  # samples of one program
    k_splits,  # programs along the samples
    j_blocks,  # blocks of columns of the triangle
    stride_grad_z_k,
    stride_grad_z_b,
    stride_grad_z_d,
    stride_grad_log_q_k,
    stride_grad_log_q_b,
    stride_tril_b,
    stride_tril_d,
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,  # rows of a block of the triangle
    BLOCK_D: tl.constexpr,  # columns of a block of the triangle
):
    """Compute the gradients; one program per row, split of the samples, and block of the triangle."""
    i_b, i_split = split_program(k_splits)
    i_i = tl.program_id(1) // j_blocks
    i_j = tl.program_id(1) - i_i * j_blocks
    if i_j * BLOCK_D < (i_i + 1) * ROWS:
        o_b = i_b.to(tl.int64)
        o_i = (i_i * ROWS + tl.arange(0, ROWS)).to(tl.int64)  # [ROWS]
        o_j = (i_j * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)  # [BLOCK_D]
        m_i = o_i < D
        k_start = i_split * k_per_program
        k_stop = tl.minimum(k_start + k_per_program, K)
        b_scale = tl.zeros([ROWS, BLOCK_D], dtype=DTYPE)
        s_mu = tl.zeros([ROWS, BLOCK_K], dtype=DTYPE)
        s_grad_log_q = tl.zeros([BLOCK_K], dtype=DTYPE)
        seed = tl.load(p_seed)
        for i_k in range(k_start, k_stop, BLOCK_K):
            o_k = (i_k + tl.arange(0, BLOCK_K)).to(tl.int64)  # [BLOCK_K]
            m_k = o_k < k_stop
            if p_grad_z is not None:
                o_z = o_k[None, :] * stride_grad_z_k + o_b * stride_grad_z_b + o_i[:, None] * stride_grad_z_d
                b_g = load(p_grad_z, o_z, m_k[None, :] & m_i[:, None], DTYPE)  # [ROWS, BLOCK_K]
                s_mu += b_g
                if p_grad_tril is not None:
                    b_eps = block_of_noise(
                        seed, o_k, i_b, i_j * BLOCK_D, sample_offset, row_offset, DTYPE, BLOCK_K, BLOCK_D
                    )
                    # Triton 3.7's compiler for sm_100 fails on an operand that is a reshaped tile.
                    b_eps = tl.where(o_j[None, :] < D, b_eps, 0.0)
                    b_scale = tl.dot(b_g, b_eps, b_scale, input_precision="ieee", out_dtype=DTYPE)
            if (p_grad_log_q is not None) and (p_grad_tril is not None):
                o_q = o_k * stride_grad_log_q_k + o_b * stride_grad_log_q_b
                s_grad_log_q += load(p_grad_log_q, o_q, m_k, DTYPE)
        o_out = i_split.to(tl.int64) * B + o_b
        if p_grad_mu is not None:
            store(p_grad_mu, o_out * D + o_i, tl.sum(s_mu, axis=1), m_i & (i_j == 0))
        if p_grad_tril is not None:
            m_diagonal = o_i[:, None] == o_j[None, :]
            o_l = packed(o_i, o_i) * stride_tril_d
            b_diagonal = exp(load(p_tril, o_b * stride_tril_b + o_l, m_i, DTYPE))[:, None]
            b_scale = tl.where(m_diagonal, b_scale * b_diagonal - tl.sum(s_grad_log_q, axis=0), b_scale)
            mask = (o_j[None, :] <= o_i[:, None]) & m_i[:, None]
            store(p_grad_tril, o_out * packed(D, 0) + packed(o_i[:, None], o_j[None, :]), b_scale, mask)


def _width(n: int, limit: int = TILE_D) -> int:
    """Return the width of a block along one axis."""
    return max(MIN_AXIS, min(power_of_two(n), limit))


@planned
def _draw(mu, tril, seed, samples) -> Call:
    b, d = mu.shape
    dtype, launching = accumulator(mu), LAUNCH["normal_full"]
    block_d = _width(d)
    block_k = _width(samples, min(TILE_FIRST, launching.tile // block_d))
    k_tiles = cdiv(samples, block_k)
    return Call(
        rsample_tril_kernel,
        (k_tiles * b,),
        (Result((samples, b, d), mu.dtype), Result((samples, b), dtype)),
        (samples, b, fixed(d), k_tiles, *map(fixed, (*strides(mu, 2), *strides(tril, 2)))),
        {
            "DTYPE": triton_dtype(dtype),
            "BLOCK_K": block_k,
            "BLOCK_D": block_d,
            "STEPS": min(block_d, STEPS),
            **OPTIONS,
        },
        launching.warps(dtype),
    )


def rsample_tril(
    mu: torch.Tensor, tril: torch.Tensor, seed: torch.Tensor, draw: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return z [K, B, D] and log q(z) [K, B]."""
    (b, d), samples = mu.shape, draw.samples
    if samples == 0 or b == 0 or d == 0:
        return mu.new_empty((samples, b, d)), mu.new_zeros((samples, b), dtype=accumulator(mu))
    return _draw((mu, tril, seed), (samples,), (draw.sample_offset, draw.row_offset))


@planned
def _gradients(grad_z, grad_log_q, tril, seed, samples, d, dtype, need) -> Call:
    b, packed_size = tril.shape
    computed, launching = accumulator(tril), LAUNCH["full_backward"]
    rows, block_d = _width(d, TILE_FIRST), _width(d)
    block_k = _width(samples, launching.tile // block_d)
    # The first column of blocks computes the gradient of mu.
    j_blocks, steps = cdiv(d, block_d) if need[1] else 1, cdiv(samples, block_k)
    blocks = cdiv(d, rows) * j_blocks
    splits = max(1, min(PROGRAMS // (b * blocks), steps // MIN_STEPS), cdiv(steps, MAX_STEPS))
    per_program = cdiv(steps, splits) * block_k
    splits = cdiv(samples, per_program)
    return Call(
        rsample_tril_backward_kernel,
        (splits * b, blocks),
        tuple(
            Result((b, n), dtype, splits, computed) if wanted else None
            for n, wanted in zip((d, packed_size), need, strict=True)
        ),
        (
            *(samples, b, fixed(d), per_program, splits, j_blocks, strides(grad_z, 3)[0]),
            *map(fixed, strides(grad_z, 3)[1:]),
            *strides(grad_log_q, 2),
            *map(fixed, strides(tril, 2)),
        ),
        {
            "DTYPE": triton_dtype(computed),
            "BLOCK_K": block_k,
            "ROWS": rows,
            "BLOCK_D": block_d,
            **OPTIONS,
        },
        launching.warps(computed),
    )


def rsample_tril_backward(
    grad_z: torch.Tensor | None,
    grad_log_q: torch.Tensor | None,
    mu: torch.Tensor,
    tril: torch.Tensor,
    seed: torch.Tensor,
    draw: Any,
    need: list[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of (mu, tril), None where not needed."""
    if not any(need):
        return None, None
    nothing = draw.samples == 0 or mu.numel() == 0 or (grad_z is None and grad_log_q is None)
    if nothing or (grad_z is None and not need[1]):
        return torch.zeros_like(mu) if need[0] else None, torch.zeros_like(tril) if need[1] else None
    settings = draw.samples, mu.shape[1], mu.dtype, tuple(need)
    return _gradients((grad_z, grad_log_q, tril, seed), settings, (draw.sample_offset, draw.row_offset))
