"""Gradients of aggregate posteriors and their marginals, in Triton. See :mod:`fastvae.ops.aggregate`.

One kernel adds the gradient of z over the components, and another those of the components over the rows, each
from the stored gradients of the scores of all dimensions together and a recomputed exponential of each
dimension's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .aggregate_parts import log_weights, marginal_parts, weighted
from .common import LAUNCH, accumulator, cdiv, load, power_of_two, split_program, strides, triton_dtype
from .elementary import exp
from .launching import Call, Result, fixed, planned
from .logsumexp import finite_shift
from .mixture import (
    MAX_SHARES,
    ROWS_UNROLLED,
    THREAD,
    TILE_D,
    matrix_strides,
    prepare,
    scores,
    splits_of,
    tile_of,
)


@triton.jit
def share_of(b_grad, b_score, b_log_q, TINY: tl.constexpr):
    """Return g exp(score - log q); 0 where it is below the smallest normal number, or log q is infinite."""
    b_scale = tl.where(tl.abs(b_log_q) == float("inf"), 0.0, b_grad)
    b_r = b_scale * exp(b_score - finite_shift(b_log_q))
    return tl.where((b_scale == 0) | (tl.abs(b_r) < TINY), 0.0, b_r)


@triton.jit(do_not_specialize=["N", "U", "dataset_size"], do_not_specialize_on_alignment=["u_tiles"])
def aggregate_shares_kernel(
    p_grad,  # [N]
    p_log_q,  # [N]
    p_z,  # [N, D]
    p_mean,  # [D, UP]
    p_inverse,  # [D, UP]
    p_constant,  # [U]
    p_share,  # [N, UP] out, 0 beyond U
    N,
    U,
    D,
    UP,
    u_tiles,  # blocks of components
    dataset_size,
    stride_grad,
    stride_log_q,
    stride_z_n,
    stride_z_d,
    STRATIFIED: tl.constexpr,
    TINY: tl.constexpr,  # the smallest normal number of the computation
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    """Compute the gradient of the scores of all dimensions together; one program per tile."""
    i_n, i_u = split_program(u_tiles)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]  # [BLOCK_N, 1]
    o_own = o_n % U
    o_u = (i_u * BLOCK_U + tl.arange(0, BLOCK_U)).to(tl.int64)[None, :]  # [1, BLOCK_U]
    m_n = o_n < N
    b_own, b_next, b_others = log_weights(U, dataset_size, STRATIFIED, DTYPE)
    b_s = scores(p_z, p_mean, p_inverse, p_constant, o_n, o_u, N, U, D, UP, stride_z_n, stride_z_d, DTYPE)
    b_s = weighted(b_s, o_own, o_u, U, b_own, b_next, STRATIFIED) + b_others
    b_grad = load(p_grad, o_n * stride_grad, m_n, DTYPE)
    b_log_q = load(p_log_q, o_n * stride_log_q, m_n, DTYPE)
    tl.store(p_share + o_n * UP + o_u, share_of(b_grad, b_s, b_log_q, TINY), mask=m_n)


@triton.jit(
    do_not_specialize=["N", "U", "u_per_program", "dataset_size"], do_not_specialize_on_alignment=["u_splits"]
)
def aggregate_rows_kernel(
    p_share,  # [N, UP], or None
    p_grad,  # [N, D] of the marginals, or None
    p_log_q,  # [N, D], the marginals
    p_z,  # [N, D]
    p_mu,  # [U, D]
    p_logvar,  # [U, D]
    p_scale,  # [U, D], exp(-logvar / 2)
    p_out,  # [u_splits, N, D] out, - sum_u r w exp(-logvar / 2)
    N,
    U,
    D,
    UP,
    u_per_program,  # components of one program
    u_splits,  # programs along the components
    dataset_size,
    stride_grad_n,
    stride_grad_d,
    stride_log_q_n,
    stride_log_q_d,
    stride_z_n,
    stride_z_d,
    stride_mu_u,
    stride_mu_d,
    stride_logvar_u,
    stride_logvar_d,
    STRATIFIED: tl.constexpr,
    TINY: tl.constexpr,  # the smallest normal number of the computation
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradient of z; one program per block of rows and dimensions and split of the components."""
    i_n, i_split = split_program(u_splits)
    o_n = (i_n * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)[:, None]  # [BLOCK_N, 1]
    o_own = o_n % U
    o_d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]  # [1, BLOCK_D]
    m_n, m_d = o_n < N, o_d < D
    mask = m_n & m_d
    b_own, b_next, b_others = log_weights(U, dataset_size, STRATIFIED, DTYPE)
    b_z = load(p_z, o_n * stride_z_n + o_d * stride_z_d, mask, DTYPE)
    if p_grad is not None:
        b_grad = load(p_grad, o_n * stride_grad_n + o_d * stride_grad_d, mask, DTYPE)
        b_log_q = load(p_log_q, o_n * stride_log_q_n + o_d * stride_log_q_d, mask, DTYPE)
    b_sum = tl.zeros([BLOCK_N, BLOCK_D], dtype=DTYPE)
    s_mu, s_logvar = (stride_mu_u, stride_mu_d), (stride_logvar_u, stride_logvar_d)
    u_start = i_split * u_per_program
    for i_u in range(u_start, tl.minimum(u_start + u_per_program, U)):
        o_u = tl.zeros([1, 1], dtype=tl.int64) + i_u
        b_mu, b_inverse, b_constant = marginal_parts(
            p_mu, p_logvar, p_scale, o_u, o_d, m_d, D, s_mu, s_logvar, DTYPE
        )
        b_white = (b_z - b_mu) * b_inverse
        b_r = tl.zeros([BLOCK_N, BLOCK_D], dtype=DTYPE)
        if p_grad is not None:
            b_t = b_constant - 0.5 * (b_white * b_white)
            b_t = weighted(b_t, o_own, o_u, U, b_own, b_next, STRATIFIED) + b_others
            b_r += share_of(b_grad, b_t, b_log_q, TINY)
        if p_share is not None:
            b_r += tl.load(p_share + o_n * UP + o_u, mask=m_n, other=0.0)  # [BLOCK_N, 1]
        b_sum -= b_r * b_white * b_inverse
    tl.store(p_out + (i_split.to(tl.int64) * N + o_n) * D + o_d, b_sum, mask=mask)


@triton.jit(
    do_not_specialize=["N", "U", "n_per_program", "dataset_size"], do_not_specialize_on_alignment=["n_splits"]
)
def aggregate_components_kernel(
    p_share,  # [N, UP], or None
    p_grad,  # [N, D] of the marginals, or None
    p_log_q,  # [N, D], the marginals
    p_z,  # [N, D]
    p_mu,  # [U, D]
    p_logvar,  # [U, D]
    p_grad_mu,  # [n_splits, U, D] out, exp(-logvar / 2) sum_n r w, or None
    p_grad_logvar,  # [n_splits, U, D] out, sum_n r (w^2 - 1) / 2, or None
    N,
    U,
    D,
    UP,
    n_per_program,  # rows of one program
    n_splits,  # programs along the rows
    dataset_size,
    stride_grad_n,
    stride_grad_d,
    stride_log_q_n,
    stride_log_q_d,
    stride_z_n,
    stride_z_d,
    stride_mu_u,
    stride_mu_d,
    stride_logvar_u,
    stride_logvar_d,
    STRATIFIED: tl.constexpr,
    TINY: tl.constexpr,  # the smallest normal number of the computation
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
    b_own, b_next, b_others = log_weights(U, dataset_size, STRATIFIED, DTYPE)
    b_mu, b_inverse, b_constant = marginal_parts(
        p_mu, p_logvar, None, o_u, o_d, mask, D,
        (stride_mu_u, stride_mu_d), (stride_logvar_u, stride_logvar_d), DTYPE,
    )  # fmt: skip
    b_first = tl.zeros([BLOCK_U, BLOCK_D], dtype=DTYPE)
    b_second = tl.zeros([BLOCK_U, BLOCK_D], dtype=DTYPE)
    n_start = i_split * n_per_program
    for i_n in tl.range(n_start, tl.minimum(n_start + n_per_program, N), loop_unroll_factor=ROWS_UNROLLED):
        o_n = tl.zeros([1, 1], dtype=tl.int64) + i_n
        o_own = tl.zeros([1, 1], dtype=tl.int32) + i_n % U
        b_z = load(p_z, o_n * stride_z_n + o_d * stride_z_d, m_d, DTYPE)  # [1, BLOCK_D]
        b_white = (b_z - b_mu) * b_inverse
        b_r = tl.zeros([BLOCK_U, BLOCK_D], dtype=DTYPE)
        if p_grad is not None:
            b_grad = load(p_grad, o_n * stride_grad_n + o_d * stride_grad_d, m_d, DTYPE)  # [1, BLOCK_D]
            b_log_q = load(p_log_q, o_n * stride_log_q_n + o_d * stride_log_q_d, m_d, DTYPE)
            b_t = b_constant - 0.5 * (b_white * b_white)
            b_t = weighted(b_t, o_own, o_u, U, b_own, b_next, STRATIFIED) + b_others
            b_r += share_of(b_grad, b_t, b_log_q, TINY)
        if p_share is not None:
            b_r += tl.load(p_share + o_n * UP + o_u, mask=m_u, other=0.0)  # [BLOCK_U, 1]
        b_part = b_r * b_white
        b_first += b_part
        b_second += b_part * b_white - b_r
    o_out = (i_split.to(tl.int64) * U + o_u) * D + o_d
    if p_grad_mu is not None:
        tl.store(p_grad_mu + o_out, b_first * b_inverse, mask=mask)
    if p_grad_logvar is not None:
        tl.store(p_grad_logvar + o_out, 0.5 * b_second, mask=mask)


@planned
def _shares(grad, log_q, z, mean, inverse, constant, dataset_size) -> Call:
    (n, d), u = z.shape, len(constant)
    dtype = accumulator(z)
    block_n, block_u, warps = tile_of(n, u, dtype, THREAD // 2)
    u_tiles = cdiv(u, block_u)
    return Call(
        aggregate_shares_kernel,
        (u_tiles * cdiv(n, block_n),),
        (Result((n, mean.shape[1]), dtype),),
        (
            *(n, u, fixed(d), mean.shape[1], u_tiles, dataset_size),
            *(*strides(grad, 1), *strides(log_q, 1), *matrix_strides(z)),
        ),
        {
            "STRATIFIED": dataset_size > 0,
            "TINY": torch.finfo(dtype).tiny,
            "DTYPE": triton_dtype(dtype),
            "BLOCK_N": block_n,
            "BLOCK_U": block_u,
        },
        warps,
    )


def _strides_of(grad, log_q, z, mu, logvar) -> tuple[tl.constexpr, ...]:
    none = fixed(0), fixed(0)
    of = (none if t is None else matrix_strides(t) for t in (grad, log_q, z, mu, logvar))
    return tuple(stride for pair in of for stride in pair)


@planned
def _rows(share, grad, log_q, z, mu, logvar, scale, dataset_size) -> Call:
    (n, d), u = z.shape, len(mu)
    dtype = accumulator(z)
    block_d = min(power_of_two(d), TILE_D)
    block_n = min(power_of_two(n), LAUNCH["mixture_backward"].tile // block_d)
    each, splits = splits_of(u, cdiv(n, block_n) * cdiv(d, block_d), 32)
    padded = 0 if share is None else share.shape[1]
    return Call(
        aggregate_rows_kernel,
        (splits * cdiv(n, block_n), cdiv(d, block_d)),
        (Result((n, d), dtype, splits),),
        (
            *(n, u, fixed(d), padded, each, splits, dataset_size),
            *_strides_of(grad, log_q, z, mu, logvar),
        ),
        {
            "STRATIFIED": dataset_size > 0,
            "TINY": torch.finfo(dtype).tiny,
            "DTYPE": triton_dtype(dtype),
            "BLOCK_N": block_n,
            "BLOCK_D": block_d,
        },
        LAUNCH["mixture_backward"].warps(dtype),
    )


@planned
def _components(share, grad, log_q, z, mu, logvar, dataset_size, need) -> Call:
    (n, d), u = z.shape, len(mu)
    dtype = accumulator(z)
    block_d = min(power_of_two(d), TILE_D)
    block_u = min(power_of_two(u), LAUNCH["mixture_backward"].tile // block_d)
    each, splits = splits_of(n, cdiv(u, block_u) * cdiv(d, block_d), 32)
    padded = 0 if share is None else share.shape[1]
    return Call(
        aggregate_components_kernel,
        (splits * cdiv(u, block_u), cdiv(d, block_d)),
        tuple(Result((u, d), dtype, splits) if wanted else None for wanted in need),
        (
            *(n, u, fixed(d), padded, each, splits, dataset_size),
            *_strides_of(grad, log_q, z, mu, logvar),
        ),
        {
            "STRATIFIED": dataset_size > 0,
            "TINY": torch.finfo(dtype).tiny,
            "DTYPE": triton_dtype(dtype),
            "BLOCK_U": block_u,
            "BLOCK_D": block_d,
        },
        LAUNCH["mixture_backward"].warps(dtype),
    )


def aggregate_log_prob_backward(
    grad: torch.Tensor | None,
    grad_each: torch.Tensor | None,
    log_q: torch.Tensor,
    log_q_each: torch.Tensor,
    z: torch.Tensor,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    dataset_size: int,
    need: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of (z, mu, logvar), None where not needed."""
    if z.numel() == 0 or (grad is None and grad_each is None):
        zeros = (torch.zeros_like(t) for t in (z, mu, logvar))
        return tuple(g if n else None for g, n in zip(zeros, need, strict=True))
    mean, inverse, scale, constant = prepare((mu, logvar, None), (need[0],))
    size, u = (dataset_size,), len(mu)
    # Whole draws of a batch: a row's own component is its index's remainder.
    rows_at_once = max(1, MAX_SHARES // u // u) * u if dataset_size else max(1, MAX_SHARES // u)
    pieces = []
    for first in range(0, len(z), rows_at_once):
        at = slice(first, first + rows_at_once)
        rows, share = z[at], None
        if grad is not None:
            (share,) = _shares((grad[at], log_q[at], rows, mean, inverse, constant), size)
        marginals = (None, None) if grad_each is None else (grad_each[at], log_q_each[at])
        by_z = _rows((share, *marginals, rows, mu, logvar, scale), size) if need[0] else (None,)
        by_parameters: tuple[torch.Tensor | None, ...] = (None, None)
        if any(need[1:]):
            by_parameters = _components(
                (share, *marginals, rows, mu, logvar), (dataset_size, tuple(need[1:]))
            )
        pieces.append((*by_z, *by_parameters))
    if len(pieces) == 1:
        return pieces[0]
    by_z, *by_parameters = zip(*pieces, strict=True)
    sums = (None if p[0] is None else torch.stack(p).sum(0) for p in by_parameters)
    return torch.cat(by_z) if need[0] else None, *sums
