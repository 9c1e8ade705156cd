"""Mixtures of diagonal normal distributions, in Triton. See :mod:`fastvae.ops.mixture` for the mathematics.

The scores [N, U] are computed in tiles, one dimension at a time. The forward pass reduces them to maxima and
sums at once. The backward pass stores the scores' gradients, for some rows at a time; then one kernel loops
over the components for a block of rows, and another over the rows for a block of components.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .common import (
    LANES,
    LAUNCH,
    PROGRAMS,
    accumulator,
    cdiv,
    load,
    power_of_two,
    split_program,
    strides,
    tile_width,
    triton_dtype,
)
from .elementary import exp, log, quotient
from .launching import Call, Result, fixed, planned
from .logsumexp import finite_shift, merged, next_block

LOG_2_PI = tl.constexpr(math.log(2 * math.pi))
# Components of a tile of scores, along lanes: four per thread, in one load.
TILE_U = 256
# Scores per thread; it loads the numbers of their rows by itself.
THREAD = 32
# Unrolled dimensions of a score, which share the address computation.
UNROLLED = tl.constexpr(4)
# Unrolled rows of the components' gradients: with one, each load would stall; with four, registers would last
# for fewer threads.
ROWS_UNROLLED = tl.constexpr(2)
# Maximum rows and columns of a tile that is transposed, and maximum dimensions of a program that does it.
TILE_PREPARED, MAX_PREPARED = 32, 256
# Maximum dimensions of a backward program; other programs take the rest. Fewer than its threads, or the
# compiler loads a row with one number per thread and exchanges them.
TILE_D = 64
# Maximum elements of [N, U] in memory at a time.
MAX_SHARES = 1 << 24


@triton.jit(do_not_specialize=["U"], do_not_specialize_on_alignment=["d_splits"])
def prepare_kernel(
    p_mu,  # [U, D]
    p_logvar,  # [U, D]
    p_log_weight,  # [U], or None for zeros
    p_mean,  # [D, UP] out, 0 beyond U
    p_inverse,  # [D, UP] out, exp(-logvar / 2), 1 beyond U
    p_scale,  # [U, D] out, the same in the original layout, or None
    p_constant,  # [d_splits, U] out, parts of log weight - (sum_d logvar + log 2 pi) / 2
    U,
    D,
    UP,
    d_per_program,  # dimensions of one program
    d_splits,  # programs along the dimensions
    stride_mu_u,
    stride_mu_d,
    stride_logvar_u,
    stride_logvar_d,
    stride_log_weight,
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Prepare the other kernels' inputs; one program per block of components and split of the dimensions."""
    i_u, i_split = split_program(d_splits)
    o_u = (i_u * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)[:, None]  # [BLOCK_U, 1]
    m_u = o_u < U
    b_sum = tl.zeros([BLOCK_U, BLOCK_D], dtype=DTYPE)
    d_start = i_split * d_per_program
    for i_d in range(d_start, tl.minimum(d_start + d_per_program, D), BLOCK_D):
        o_d = (i_d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
        m_d = o_d < D
        mask = m_u & m_d
        b_mu = load(p_mu, o_u * stride_mu_u + o_d * stride_mu_d, mask, DTYPE)
        b_logvar = load(p_logvar, o_u * stride_logvar_u + o_d * stride_logvar_d, mask, DTYPE)
        b_inverse = exp(-0.5 * b_logvar)
        tl.store(p_mean + o_d * UP + o_u, b_mu, mask=m_d & (o_u < UP))
        tl.store(p_inverse + o_d * UP + o_u, b_inverse, mask=m_d & (o_u < UP))
        if p_scale is not None:
            tl.store(p_scale + o_u * D + o_d, b_inverse, mask=mask)
        b_sum += tl.where(mask, b_logvar + LOG_2_PI, 0.0)
    b_constant = -0.5 * tl.sum(b_sum, axis=1, keep_dims=True)
    if p_log_weight is not None:
        b_weight = load(p_log_weight, o_u * stride_log_weight, m_u, DTYPE)
        b_constant = tl.where(i_split == 0, b_weight, 0.0) + b_constant
    tl.store(p_constant + i_split.to(tl.int64) * U + o_u, b_constant, mask=m_u)


@triton.jit
def scores(
    p_z, p_mean, p_inverse, p_constant, o_n, o_u, N, U, D, UP, stride_z_n, stride_z_d, DTYPE: tl.constexpr
):
    """Compute the scores [BLOCK_N, BLOCK_U], one dimension at a time; -inf beyond U.

    The loop needs no masks: components are padded to whole blocks, and rows beyond the last repeat it.
    """
    b_sum = tl.zeros([o_n.shape[0], o_u.shape[1]], dtype=DTYPE)
    p_z += tl.minimum(o_n, N - 1) * stride_z_n
    p_mean += o_u
    p_inverse += o_u
    for _ in tl.range(D, loop_unroll_factor=UNROLLED):
        b_z = tl.load(p_z)  # [BLOCK_N, 1]
        b_white = (b_z - tl.load(p_mean)) * tl.load(p_inverse)
        b_sum += b_white * b_white
        p_z += stride_z_d
        p_mean += UP
        p_inverse += UP
    m_u = o_u < U
    return tl.where(m_u, load(p_constant, o_u, m_u, DTYPE) - 0.5 * b_sum, float("-inf"))


@triton.jit(do_not_specialize=["N", "u_per_program"], do_not_specialize_on_alignment=["u_splits"])
def mixture_kernel(
    p_z,  # [N, D]
    p_mean,  # [D, UP]
    p_inverse,  # [D, UP]
    p_constant,  # [U]
    p_bound,  # [N] out, log p, or None when writing parts
    p_maximum,  # [u_splits, N] out, maximum of each split's scores
    p_total,  # [u_splits, N] out, sum_u exp(s - maximum)
    N,
    U,
    D,
    UP,
    u_per_program,  # components of one program
    u_splits,  # programs along the components
    stride_z_n,
    stride_z_d,
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Reduce the scores; one program per block of rows and split of the components."""
    i_n, i_split = split_program(u_splits)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]  # [BLOCK_N, 1]
    b_max = tl.full([BLOCK_N, 1], float("-inf"), dtype=DTYPE)
    b_sum = tl.zeros([BLOCK_N, 1], dtype=DTYPE)
    u_start = i_split * u_per_program
    for i_u in range(u_start, tl.minimum(u_start + u_per_program, U), BLOCK_U):
        o_u = (i_u + tl.arange(0, BLOCK_U)).to(tl.int64)[None, :]  # [1, BLOCK_U]
        b_s = scores(p_z, p_mean, p_inverse, p_constant, o_n, o_u, N, U, D, UP, stride_z_n, stride_z_d, DTYPE)
        b_max, b_rescale, b_term = next_block(b_s, b_max)
        b_sum = b_sum * b_rescale + tl.sum(b_term, axis=1, keep_dims=True)
    # The maximum drops NaN; the sum keeps it.
    b_max = tl.where(b_sum == b_sum, b_max, b_sum)
    if p_bound is not None:
        tl.store(p_bound + o_n, b_max + log(b_sum), mask=o_n < N)
    o_out = i_split.to(tl.int64) * N + o_n
    tl.store(p_maximum + o_out, b_max, mask=o_n < N)
    tl.store(p_total + o_out, b_sum, mask=o_n < N)


@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["u_tiles"])
def mixture_shares_kernel(
    p_grad,  # [N]
    p_maximum,  # [N]
    p_total,  # [N]
    p_z,  # [N, D]
    p_mean,  # [D, UP]
    p_inverse,  # [D, UP]
    p_constant,  # [U]
    p_out,  # [N, UP] out, 0 beyond U
    N,
    U,
    D,
    UP,
    u_tiles,  # blocks of components
    stride_grad,
    stride_maximum,
    stride_total,
    stride_z_n,
    stride_z_d,
    TINY: tl.constexpr,  # the smallest normal number of the computation
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Compute the gradient of the scores; one program per tile."""
    i_n, i_u = split_program(u_tiles)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]  # [BLOCK_N, 1]
    o_u = (i_u * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)[None, :]  # [1, BLOCK_U]
    m_n = o_n < N
    b_s = scores(p_z, p_mean, p_inverse, p_constant, o_n, o_u, N, U, D, UP, stride_z_n, stride_z_d, DTYPE)
    b_max = load(p_maximum, o_n * stride_maximum, m_n, DTYPE)
    b_total = load(p_total, o_n * stride_total, m_n, DTYPE)
    b_grad = load(p_grad, o_n * stride_grad, m_n, DTYPE)
    b_scale = tl.where(b_total == 0, 0.0, quotient(b_grad, tl.where(b_total == 0, 1.0, b_total)))
    b_r = b_scale * exp(b_s - finite_shift(b_max))
    b_r = tl.where((b_scale == 0) | (tl.abs(b_r) < TINY), 0.0, b_r)
    tl.store(p_out + o_n * UP + o_u, b_r, mask=m_n)


@triton.jit(do_not_specialize=["N", "U", "u_per_program"], do_not_specialize_on_alignment=["u_splits"])
def mixture_rows_kernel(
    p_share,  # [N, UP]
    p_z,  # [N, D]
    p_mu,  # [U, D]
    p_scale,  # [U, D], exp(-logvar / 2)
    p_out,  # [u_splits, N, D] out, - sum_u r w exp(-logvar / 2)
    N,
    U,
    D,
    UP,
    u_per_program,  # components of one program
    u_splits,  # programs along the components
    stride_z_n,
    stride_z_d,
    stride_mu_u,
    stride_mu_d,
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradient of z; one program per block of rows and dimensions and split of the components."""
    i_n, i_split = split_program(u_splits)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]  # [BLOCK_N, 1]
    o_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
    m_n, m_d = o_n < N, o_d < D
    mask = m_n & m_d
    b_z = load(p_z, o_n * stride_z_n + o_d * stride_z_d, mask, DTYPE)
    b_sum = tl.zeros([BLOCK_N, BLOCK_D], dtype=DTYPE)
    u_start = i_split * u_per_program
    for i_u in range(u_start, tl.minimum(u_start + u_per_program, U)):
        o_u = tl.zeros([1, 1], dtype=tl.int64) + i_u
        b_r = tl.load(p_share + o_n * UP + o_u, mask=m_n, other=0.0)  # [BLOCK_N, 1]
        b_mu = load(p_mu, o_u * stride_mu_u + o_d * stride_mu_d, m_d, DTYPE)  # [1, BLOCK_D]
        b_inverse = tl.load(p_scale + o_u * D + o_d, mask=m_d, other=0.0)
        b_sum -= b_r * ((b_z - b_mu) * b_inverse) * b_inverse
    tl.store(p_out + (i_split.to(tl.int64) * N + o_n) * D + o_d, b_sum, mask=mask)


@triton.jit(do_not_specialize=["N", "U", "n_per_program"], do_not_specialize_on_alignment=["n_splits"])
def mixture_components_kernel(
    p_share,  # [N, UP]
    p_z,  # [N, D]
    p_mu,  # [U, D]
    p_logvar,  # [U, D]
    p_grad_mu,  # [n_splits, U, D] out, exp(-logvar / 2) sum_n r w
    p_grad_logvar,  # [n_splits, U, D] out, (sum_n r w^2 - sum_n r) / 2
    p_grad_log_weight,  # [n_splits, U] out, sum_n r
    N,
    U,
    D,
    UP,
    n_per_program,  # rows of one program
    n_splits,  # programs along the rows
    stride_z_n,
    stride_z_d,
    stride_mu_u,
    stride_mu_d,
    stride_logvar_u,
    stride_logvar_d,
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_U: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the components' gradients; one program per block of components, block of dimensions and split.

    The splits are of the rows.
    """
    i_u, i_split = split_program(n_splits)
    o_u = (i_u * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)[:, None]  # [BLOCK_U, 1]
    o_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
    m_u, m_d = o_u < U, o_d < D
    mask = m_u & m_d
    b_mu = load(p_mu, o_u * stride_mu_u + o_d * stride_mu_d, mask, DTYPE)
    b_inverse = exp(-0.5 * load(p_logvar, o_u * stride_logvar_u + o_d * stride_logvar_d, mask, DTYPE))
    b_first = tl.zeros([BLOCK_U, BLOCK_D], dtype=DTYPE)
    b_second = tl.zeros([BLOCK_U, BLOCK_D], dtype=DTYPE)
    b_share = tl.zeros([BLOCK_U, 1], dtype=DTYPE)
    n_start = i_split * n_per_program
    for i_n in tl.range(n_start, tl.minimum(n_start + n_per_program, N), loop_unroll_factor=ROWS_UNROLLED):
        o_n = tl.zeros([1, 1], dtype=tl.int64) + i_n
        b_r = tl.load(p_share + o_n * UP + o_u, mask=m_u, other=0.0)  # [BLOCK_U, 1]
        b_z = load(p_z, o_n * stride_z_n + o_d * stride_z_d, m_d, DTYPE)  # [1, BLOCK_D]
        b_white = (b_z - b_mu) * b_inverse
        b_part = b_r * b_white
        b_first += b_part
        b_second += b_part * b_white
        b_share += b_r
    o_out = (i_split.to(tl.int64) * U + o_u) * D + o_d
    if p_grad_mu is not None:
        tl.store(p_grad_mu + o_out, b_first * b_inverse, mask=mask)
    if p_grad_logvar is not None:
        tl.store(p_grad_logvar + o_out, 0.5 * (b_second - b_share), mask=mask)
    if p_grad_log_weight is not None:
        # The same for every block of dimensions; the first stores it.
        tl.store(
            p_grad_log_weight + i_split.to(tl.int64) * U + o_u, b_share, mask=m_u & (tl.program_id(1) == 0)
        )


def matrix_strides(matrix: torch.Tensor) -> tuple[tl.constexpr, ...]:
    return tuple(map(fixed, strides(matrix, 2)))


def _block_u(u: int) -> int:
    return tile_width(u, TILE_U)


@planned
def prepare(mu, logvar, log_weight, need_scale) -> Call:
    """Plan means and inverse scales [D, UP], inverse scales [U, D] with ``need_scale``, and constants [U]."""
    u, d = mu.shape
    dtype = accumulator(mu)
    block_u, block_d = min(power_of_two(u), TILE_PREPARED), min(power_of_two(d), TILE_PREPARED)
    padded = cdiv(u, _block_u(u)) * _block_u(u)
    splits = cdiv(d, MAX_PREPARED)
    each = cdiv(cdiv(d, block_d), splits) * block_d
    splits = cdiv(d, each)
    transposed = Result((d, padded), dtype)
    return Call(
        prepare_kernel,
        (splits * cdiv(padded, block_u),),
        (transposed, transposed, Result((u, d), dtype) if need_scale else None, Result((u,), dtype, splits)),
        (
            *(u, fixed(d), padded, each, splits),
            *(*matrix_strides(mu), *matrix_strides(logvar), *strides(log_weight, 1)),
        ),
        {"DTYPE": triton_dtype(dtype), "BLOCK_U": block_u, "BLOCK_D": block_d},
        LAUNCH["logsumexp"].warps(dtype),
    )


def tile_of(n: int, u: int, dtype: torch.dtype, thread: int = THREAD) -> tuple[int, int, int]:
    """Return (BLOCK_N, BLOCK_U, warps) of scores: fewer rows where programs would be few, and in float64.

    ``thread`` is the maximum number of float32 scores per thread.
    """
    block_u = _block_u(u)
    warps = max(1, block_u // (4 * LANES))
    maximum, minimum = (max(1, each * warps * LANES // block_u) for each in (thread * 4 // dtype.itemsize, 8))
    enough = power_of_two(max(1, n * cdiv(u, block_u) // PROGRAMS))
    return min(power_of_two(n), maximum, max(minimum, enough)), block_u, warps


def splits_of(steps: int, others: int, min_steps: int) -> tuple[int, int]:
    """Split a loop that ``others`` programs run into (steps per program, programs).

    A program runs at least ``min_steps`` steps. The programs are those along the loop; the grid has
    ``others`` times as many.
    """
    splits = max(1, min(PROGRAMS // others, steps // min_steps))
    each = cdiv(steps, splits)
    return each, cdiv(steps, each)


@planned
def _scores(z, mean, inverse, constant) -> Call:
    (n, d), u = z.shape, len(constant)
    dtype = accumulator(z)
    block_n, block_u, warps = tile_of(n, u, dtype)
    each, splits = splits_of(cdiv(u, block_u), cdiv(n, block_n), 2)
    shape = (splits, n) if splits > 1 else (n,)
    return Call(
        mixture_kernel,
        (splits * cdiv(n, block_n),),
        (None if splits > 1 else Result((n,), dtype), Result(shape, dtype), Result(shape, dtype)),
        (n, fixed(u), fixed(d), fixed(mean.shape[1]), each * block_u, splits, *matrix_strides(z)),
        {"DTYPE": triton_dtype(dtype), "BLOCK_N": block_n, "BLOCK_U": block_u},
        warps,
    )


def mixture_log_prob(
    z: torch.Tensor, mu: torch.Tensor, logvar: torch.Tensor, log_weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log p [N], max_u s and sum_u exp(s - maximum) of z [N, D] and components [U, D], [U, D], [U]."""
    if z.numel() == 0:
        return _without_rows(z, log_weight)
    mean, inverse, _, constant = prepare((mu, logvar, log_weight), (False,))
    value, maximum, total = _scores((z, mean, inverse, constant))
    return merged(maximum, total) if value is None else (value, maximum, total)


def _without_rows(z, log_weight):
    """Return the results for z without rows or without dimensions."""
    maximum = log_weight.max().expand(len(z)).contiguous()
    value = torch.logsumexp(log_weight, 0)
    return value.expand(len(z)).contiguous(), maximum, torch.exp(value - maximum)


@planned
def _shares(grad, maximum, total, z, mean, inverse, constant) -> Call:
    (n, d), u = z.shape, len(constant)
    dtype = accumulator(z)
    block_n, block_u, warps = tile_of(n, u, dtype)
    u_tiles = cdiv(u, block_u)
    return Call(
        mixture_shares_kernel,
        (u_tiles * cdiv(n, block_n),),
        (Result((n, mean.shape[1]), dtype),),
        (
            *(n, fixed(u), fixed(d), fixed(mean.shape[1]), u_tiles),
            *(*strides(grad, 1), *strides(maximum, 1), *strides(total, 1), *matrix_strides(z)),
        ),
        {
            "TINY": torch.finfo(dtype).tiny,
            "DTYPE": triton_dtype(dtype),
            "BLOCK_N": block_n,
            "BLOCK_U": block_u,
        },
        warps,
    )


@planned
def _rows(share, z, mu, scale) -> Call:
    (n, d), u = z.shape, len(mu)
    dtype = accumulator(z)
    block_d = min(power_of_two(d), TILE_D)
    block_n = min(power_of_two(n), LAUNCH["mixture_backward"].tile // block_d)
    each, splits = splits_of(u, cdiv(n, block_n) * cdiv(d, block_d), 32)
    return Call(
        mixture_rows_kernel,
        (splits * cdiv(n, block_n), cdiv(d, block_d)),
        (Result((n, d), dtype, splits),),
        (
            n,
            u,
            fixed(d),
            fixed(share.shape[1]),
            each,
            splits,
            *matrix_strides(z),
            *matrix_strides(mu),
        ),
        {"DTYPE": triton_dtype(dtype), "BLOCK_N": block_n, "BLOCK_D": block_d},
        LAUNCH["mixture_backward"].warps(dtype),
    )


@planned
def _components(share, z, mu, logvar, need) -> Call:
    (n, d), u = z.shape, len(mu)
    dtype = accumulator(z)
    block_d = min(power_of_two(d), TILE_D)
    block_u = min(power_of_two(u), LAUNCH["mixture_backward"].tile // block_d)
    each, splits = splits_of(n, cdiv(u, block_u) * cdiv(d, block_d), 32)
    results = [Result(shape, dtype, splits) for shape in ((u, d), (u, d), (u,))]
    return Call(
        mixture_components_kernel,
        (splits * cdiv(u, block_u), cdiv(d, block_d)),
        tuple(r if wanted else None for r, wanted in zip(results, need, strict=True)),
        (
            *(n, u, fixed(d), fixed(share.shape[1]), each, splits),
            *(*matrix_strides(z), *matrix_strides(mu), *matrix_strides(logvar)),
        ),
        {"DTYPE": triton_dtype(dtype), "BLOCK_U": block_u, "BLOCK_D": block_d},
        LAUNCH["mixture_backward"].warps(dtype),
    )


def mixture_log_prob_backward(
    grad: torch.Tensor,
    maximum: torch.Tensor,
    total: torch.Tensor,
    z: torch.Tensor,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    log_weight: torch.Tensor,
    need: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of (z, mu, logvar, log_weight), None where not needed."""
    tensors = z, mu, logvar, log_weight
    if z.numel() == 0:
        share = grad.sum() * torch.softmax(log_weight, 0)
        grads = *(torch.zeros_like(t) for t in tensors[:3]), share
        return tuple(g if n else None for g, n in zip(grads, need, strict=True))
    mean, inverse, scale, constant = prepare((mu, logvar, log_weight), (need[0],))
    rows_at_once = max(1, MAX_SHARES // len(mu))
    pieces = []
    for g, m, s, rows in zip(*(t.split(rows_at_once) for t in (grad, maximum, total, z)), strict=True):
        (share,) = _shares((g, m, s, rows, mean, inverse, constant))
        by_z = _rows((share, rows, mu, scale)) if need[0] else (None,)
        by_parameters = (
            _components((share, rows, mu, logvar), (tuple(need[1:]),)) if any(need[1:]) else (None,) * 3
        )
        pieces.append((*by_z, *by_parameters))
    if len(pieces) == 1:
        return pieces[0]
    by_z, *by_parameters = zip(*pieces, strict=True)
    sums = (None if p[0] is None else torch.stack(p).sum(0) for p in by_parameters)
    return torch.cat(by_z) if need[0] else None, *sums
