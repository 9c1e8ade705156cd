"""log-mean-exp over importance samples, in Triton.

See :mod:`fastvae.ops.logsumexp` for the mathematics. One pass over memory, with a running maximum per column
and a running sum per lane.
"""

from __future__ import annotations

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
from .elementary import exp, exp_of_negative, log, quotient
from .launching import Call, Result, planned

# Columns of a tile. With few columns, 8 float32 fill a 32-byte sector, the unit of memory access, and leave
# more programs. With many, a thread holds all of a tile's samples: fewer exchanges.
TILE_N, TILE_N_WIDE = 8, 256
MANY_COLUMNS = 16384
# Minimum elements of a tile with few samples: 16 bytes per thread.
MIN_TILE = 512
# Minimum samples per program if they are split to get enough programs: merging parts costs another kernel.
MIN_SAMPLES = 512


@triton.jit
def finite_shift(b_max):
    """Return the shift subtracted before exp: the maximum, or 0 where infinite (inf - inf would be NaN)."""
    return tl.where(tl.abs(b_max) == float("inf"), 0.0, b_max)


@triton.jit
def next_block(b_x, b_max):
    """Update the running maximum with a block [BLOCK_N, BLOCK_K].

    Returns the new maximum, the factor that rescales the running sum, and the block's exponentials.
    """
    # tl.max may drop NaN, so drop it consistently; the sum keeps it.
    b_block = tl.max(tl.where(b_x == b_x, b_x, float("-inf")), axis=1, keep_dims=True)
    b_new = tl.maximum(b_max, b_block)
    b_shift = finite_shift(b_new)
    # If the maximum is infinite, so is the sum, and rescaling by 0 must not turn it into NaN.
    b_rescale = tl.where(b_new == float("inf"), 1.0, exp(b_max - b_shift))
    return b_new, b_rescale, exp(b_x - b_shift)


@triton.jit
def add_exponential(b_s, b_top, b_sum):
    """Add s to a running maximum and sum of exp(s - maximum); return both."""
    above = b_s > b_top
    b_e = exp_of_negative(tl.where(above, b_top - b_s, b_s - b_top))
    return tl.where(above, b_s, b_top), tl.where(above, b_sum * b_e + 1.0, b_sum + b_e)


@triton.jit
def combined(b_top, b_sum):
    """Return the maximum and sum over lanes [BLOCK_N, lanes] of running maxima and sums, [BLOCK_N, 1]."""
    b_most = tl.max(b_top, axis=1, keep_dims=True)
    b_below = tl.where(b_top == b_most, 0.0, b_top - b_most)
    return b_most, tl.sum(b_sum * exp_of_negative(b_below), axis=1, keep_dims=True)


@triton.jit(do_not_specialize=["K", "count", "k_per_program"], do_not_specialize_on_alignment=["k_splits"])
def log_mean_exp_kernel(
    p_log_w,  # [K, N] log weights; when merging, the maxima of the parts
    p_part,  # [K, N] sums of the parts when merging, else None
    p_bound,  # [N] out, log (1/count) sum_k exp(log_w), or None when writing parts
    p_maximum,  # [k_splits, N] out
    p_total,  # [k_splits, N] out, sum_k exp(log_w - maximum)
    K,  # samples, or parts
    N,  # columns
    count,  # samples in all
    k_per_program,  # samples of one program
    k_splits,  # programs along the samples
    stride_k,
    stride_n,
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Reduce the samples; one program per block of columns and split of the samples."""
    i_n, i_split = split_program(k_splits)
    k_start = i_split * k_per_program
    k_stop = tl.minimum(k_start + k_per_program, K)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]  # [BLOCK_N, 1]
    m_n = o_n < N
    b_max = tl.full([BLOCK_N, 1], float("-inf"), dtype=DTYPE)  # [BLOCK_N, 1]
    b_sum = tl.zeros([BLOCK_N, BLOCK_K], dtype=DTYPE)  # [BLOCK_N, BLOCK_K]
    for i_k in range(k_start, k_stop, BLOCK_K):
        o_k = (i_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]  # [1, BLOCK_K]
        mask = m_n & (o_k < k_stop)
        b_x = load(p_log_w, o_k * stride_k + o_n * stride_n, mask, DTYPE)
        b_x = tl.where(mask, b_x, float("-inf"))
        b_max, b_rescale, b_term = next_block(b_x, b_max)
        if p_part is not None:
            b_term *= load(p_part, o_k * N + o_n, mask, DTYPE)
        b_sum = b_sum * b_rescale + b_term
    b_total = tl.sum(b_sum, axis=1, keep_dims=True)  # [BLOCK_N, 1]
    b_max = tl.where(b_total == b_total, b_max, b_total)
    if p_bound is not None:
        b_bound = b_max + log(b_total) - log(tl.zeros([BLOCK_N, 1], dtype=DTYPE) + count)
        tl.store(p_bound + o_n, b_bound, mask=m_n)
    o_out = i_split.to(tl.int64) * N + o_n
    tl.store(p_maximum + o_out, b_max, mask=m_n)
    tl.store(p_total + o_out, b_total, mask=m_n)


@triton.jit(do_not_specialize=["K"], do_not_specialize_on_alignment=["k_tiles"])
def log_mean_exp_backward_kernel(
    p_grad,  # [N] gradient of the bound
    p_log_w,  # [K, N] log weights
    p_maximum,  # [N]
    p_total,  # [N]
    p_out,  # [K, N] out, contiguous
    K,  # samples
    N,  # columns
    k_tiles,  # blocks of samples
    stride_grad,
    stride_k,
    stride_n,
    stride_maximum,
    stride_total,
    TINY: tl.constexpr,  # the smallest normal number of the computation
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Compute the gradient; one program per tile, tiles of samples varying fastest."""
    i_n, i_k = split_program(k_tiles)
    i_k *= BLOCK_K
    i_n *= BLOCK_N
    o_k = (i_k + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None]  # [BLOCK_K, 1]
    o_n = (i_n + tl.arange(0, BLOCK_N)).to(tl.int64)[None, :]  # [1, BLOCK_N]
    m_n = o_n < N
    mask = (o_k < K) & m_n
    b_grad = load(p_grad, o_n * stride_grad, m_n, DTYPE)
    b_max = load(p_maximum, o_n * stride_maximum, m_n, DTYPE)
    b_total = load(p_total, o_n * stride_total, m_n, DTYPE)
    b_x = load(p_log_w, o_k * stride_k + o_n * stride_n, mask, DTYPE)  # [BLOCK_K, BLOCK_N]
    b_weight = quotient(exp(b_x - finite_shift(b_max)), tl.where(b_total == 0, 1.0, b_total))
    m_zero = (b_weight < TINY) | (b_total == 0)
    b_out = b_grad * b_weight
    # NaN compares false and is kept.
    b_out = tl.where(m_zero | (tl.abs(b_out) < TINY), 0.0, b_out)
    store(p_out, o_k * N + o_n, b_out, mask)


def tile(k: int, n: int) -> tuple[int, int]:
    """Return (BLOCK_K, BLOCK_N): columns along lanes, the remaining factor to samples."""
    block_k = power_of_two(k)
    block_n = TILE_N_WIDE if n >= MANY_COLUMNS else max(TILE_N, MIN_TILE // block_k)
    block_n = min(power_of_two(n), block_n)
    return min(block_k, LAUNCH["logsumexp"].tile // block_n), block_n


@planned
def _reduce(log_w, part, k_per_program, count, into_parts) -> Call:
    """Plan one pass, which writes parts, one per program, or the bound of ``count`` samples."""
    k, n = log_w.shape
    dtype = accumulator(log_w)
    block_k, block_n = tile(k, n)
    splits = max(cdiv(k, k_per_program), 1)
    shape = (splits, n) if into_parts else (n,)
    return Call(
        log_mean_exp_kernel,
        (splits * cdiv(n, block_n),),
        (None if into_parts else Result(shape, dtype), Result(shape, dtype), Result(shape, dtype)),
        (k, n, count, k_per_program, splits, *strides(log_w, 2)),
        {"DTYPE": triton_dtype(dtype), "BLOCK_K": block_k, "BLOCK_N": block_n},
        LAUNCH["logsumexp"].warps(dtype),
    )


def log_mean_exp(log_w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log (1/K) sum_k exp(log_w[k]), the maximum, and sum_k exp(log_w[k] - maximum): [N] each.

    ``log_w`` is [K, N]. A column of -inf has bound -inf and total 0.
    """
    k, n = log_w.shape
    if n == 0:
        return tuple(torch.empty(0, dtype=accumulator(log_w), device=log_w.device) for _ in range(3))
    block_k, block_n = tile(k, n)
    k_tiles = max(cdiv(k, block_k), 1)
    splits = max(1, min(PROGRAMS // cdiv(n, block_n), k // MIN_SAMPLES))
    k_per_program = cdiv(k_tiles, splits) * block_k
    splits = max(cdiv(k, k_per_program), 1)
    if splits == 1:
        return _reduce((log_w, None), (k_per_program, k, False))
    _, maxima, totals = _reduce((log_w, None), (k_per_program, k, True))
    return merged(maxima, totals, k)


def merged(
    maxima: torch.Tensor, totals: torch.Tensor, count: int = 1
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Merge maxima and sums [parts, N] of ``count`` samples into :func:`log_mean_exp`'s results."""
    # The parts' sums multiply exp of the parts' maxima.
    return _reduce((maxima, totals), (len(maxima), count, False))


@planned
def _weights(grad, log_w, maximum, total) -> Call:
    k, n = log_w.shape
    block_k, block_n = tile(k, n)
    dtype = accumulator(log_w)
    k_tiles = cdiv(k, block_k)
    return Call(
        log_mean_exp_backward_kernel,
        (k_tiles * cdiv(n, block_n),),
        (Result((k, n), log_w.dtype),),
        (
            *(k, n, k_tiles, *strides(grad, 1), *strides(log_w, 2)),
            *(*strides(maximum, 1), *strides(total, 1)),
        ),
        {
            "TINY": torch.finfo(dtype).tiny,
            "DTYPE": triton_dtype(dtype),
            "BLOCK_K": block_k,
            "BLOCK_N": block_n,
        },
        LAUNCH["logsumexp"].warps(dtype),
    )


def log_mean_exp_backward(
    grad: torch.Tensor, log_w: torch.Tensor, maximum: torch.Tensor, total: torch.Tensor
) -> torch.Tensor:
    """Return grad times the normalised weights softmax_k(log_w): [K, N].

    A column of -inf has zero gradient; weights and gradients below the smallest normal number are zero.
    """
    if log_w.numel() == 0:
        return torch.empty_like(log_w)
    return _weights((grad, log_w, maximum, total))[0]
