"""Classes, in Triton. See :mod:`fastvae.ops.categorical` for the mathematics.

Where positions lie side by side in memory, a program takes a block of rows and positions and loops over the
classes with running maxima and sums. Where classes do, lanes are classes: each keeps a maximum and a sum of
its own, which are combined in the end. Nothing with the class axis is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import LAUNCH, accumulator, cdiv, load, power_of_two, store, strides, triton_dtype
from .elementary import exp, log_positive
from .launching import Call, Result, fixed, planned
from .logsumexp import add_exponential, combined


@triton.jit
def nothing_picked(b_x):
    """Return -inf where no class has been picked, and NaN for an x of NaN."""
    return tl.where(b_x == b_x, float("-inf"), b_x)


@triton.jit(do_not_specialize=["B", "N"])
def positions_kernel(
    p_x,  # [B, P] classes, of any type
    p_begins,  # None
    p_a,  # [N, C, P] logits
    p_out,  # [tiles, N] out, partial log-likelihoods
    p_normaliser,  # [N, P] out
    B,
    N,
    C,
    P,
    stride_x_b,
    stride_x_p,
    stride_a_n,
    stride_a_c,
    stride_a_p,
    IGNORED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute log p; one program per block of rows and block of positions."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # [BLOCK_N, 1]
    o_p = (tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]  # [1, BLOCK_P]
    m_p = (row < N) & (o_p < P)
    b_x = load(p_x, (row % B) * stride_x_b + o_p * stride_x_p, m_p, DTYPE)
    b_top = tl.full([BLOCK_N, BLOCK_P], -3.0e38, dtype=DTYPE)
    b_sum = tl.zeros([BLOCK_N, BLOCK_P], dtype=DTYPE)
    b_picked = nothing_picked(b_x)
    for c in range(C):
        b_a = load(p_a, row * stride_a_n + c * stride_a_c + o_p * stride_a_p, m_p, DTYPE)
        b_top, b_sum = add_exponential(b_a, b_top, b_sum)
        b_picked = tl.where(b_x == c, b_a, b_picked)
    b_normaliser = b_top + log_positive(b_sum)
    tl.store(p_normaliser + row * P + o_p, b_normaliser, mask=m_p)
    b_value = tl.where(m_p & (b_x != IGNORED), b_picked - b_normaliser, 0.0)
    o_row = tl.program_id(1).to(tl.int64) * N + row
    tl.store(p_out + o_row, tl.sum(b_value, axis=1, keep_dims=True), mask=row < N)


@triton.jit(do_not_specialize=["B", "N"])
def positions_backward_kernel(
    p_grad,  # [N]
    p_normaliser,  # [N, P]
    p_x,  # [B, P] classes, of any type
    p_begins,  # None
    p_a,  # [N, C, P] logits
    p_grad_a,  # [N, C, P] out, contiguous
    B,
    N,
    C,
    P,
    stride_grad,
    stride_x_b,
    stride_x_p,
    stride_a_n,
    stride_a_c,
    stride_a_p,
    IGNORED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute the gradient; one program per block of rows and block of positions."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # [BLOCK_N, 1]
    o_p = (tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]  # [1, BLOCK_P]
    m_p = (row < N) & (o_p < P)
    g = load(p_grad, row * stride_grad, row < N, DTYPE)  # [BLOCK_N, 1]
    b_normaliser = load(p_normaliser, row * P + o_p, m_p, DTYPE)
    b_x = load(p_x, (row % B) * stride_x_b + o_p * stride_x_p, m_p, DTYPE)
    for c in range(C):
        b_a = load(p_a, row * stride_a_n + c * stride_a_c + o_p * stride_a_p, m_p, DTYPE)
        b_grad = g * (tl.where(b_x == c, 1.0, 0.0) - exp(b_a - b_normaliser))
        store(p_grad_a, (row * C + c) * P + o_p, tl.where(b_x == IGNORED, 0.0, b_grad), m_p)


@triton.jit(do_not_specialize=["B", "N"])
def classes_kernel(
    p_x,  # [B, P] classes, of any type
    p_begins,  # [P + 1], or None
    p_a,  # [N, P, C] logits, or [N, W] with begins
    p_out,  # [splits, N] out, partial log-likelihoods
    p_normaliser,  # [N, P] out
    B,
    N,
    C,
    P,
    per_program,  # positions
    stride_x_b,
    stride_x_p,
    stride_a_n,
    stride_a_p,
    stride_a_c,
    IGNORED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute log p; one program per block of rows and range of positions, which it takes one by one."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # [BLOCK_N, 1]
    m_n = row < N
    first = tl.program_id(1).to(tl.int64) * per_program
    b_total = tl.zeros([BLOCK_N, 1], dtype=DTYPE)
    for p in range(first, tl.minimum(first + per_program, P)):
        b_x = load(p_x, (row % B) * stride_x_b + p * stride_x_p, m_n, DTYPE)
        b_top = tl.full([BLOCK_N, BLOCK_C], -3.0e38, dtype=DTYPE)
        b_sum = tl.zeros([BLOCK_N, BLOCK_C], dtype=DTYPE)
        column = p * C
        o_a = row * stride_a_n + p * stride_a_p
        classes = C
        if p_begins is not None:
            column = tl.load(p_begins + p)
            classes = tl.load(p_begins + p + 1) - column
            o_a = row * stride_a_n + column * stride_a_c
        for c in range(0, classes, BLOCK_C):
            o_c = (c + tl.arange(0, BLOCK_C))[None, :].to(tl.int64)
            b_a = load(p_a, o_a + o_c * stride_a_c, m_n & (o_c < classes), DTYPE, float("-inf"))
            b_top, b_sum = add_exponential(b_a, b_top, b_sum)
        b_most, b_all = combined(b_top, b_sum)
        b_normaliser = b_most + log_positive(b_all)
        tl.store(p_normaliser + row * P + p, b_normaliser, mask=m_n)
        m_x = m_n & (b_x >= 0) & (b_x < classes)
        b_index = tl.where(m_x, b_x, 0.0).to(tl.int64)
        b_picked = load(p_a, o_a + b_index * stride_a_c, m_x, DTYPE)
        b_picked = tl.where(m_x & (b_index.to(DTYPE) == b_x), b_picked, nothing_picked(b_x))
        b_total += tl.where(m_n & (b_x != IGNORED), b_picked - b_normaliser, 0.0)
    tl.store(p_out + tl.program_id(1).to(tl.int64) * N + row, b_total, mask=m_n)


@triton.jit(do_not_specialize=["B", "N"])
def classes_backward_kernel(
    p_grad,  # [N]
    p_normaliser,  # [N, P]
    p_x,  # [B, P] classes, of any type
    p_begins,  # [P + 1], or None
    p_a,  # [N, P, C] logits, or [N, W] with begins
    p_grad_a,  # out, contiguous, like the logits
    B,
    N,
    C,
    P,
    per_program,  # positions
    row_size,  # numbers of a row
    stride_grad,
    stride_x_b,
    stride_x_p,
    stride_a_n,
    stride_a_p,
    stride_a_c,
    IGNORED: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradient; one program per block of rows and range of positions."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # [BLOCK_N, 1]
    m_n = row < N
    first = tl.program_id(1).to(tl.int64) * per_program
    g = load(p_grad, row * stride_grad, m_n, DTYPE)
    for p in range(first, tl.minimum(first + per_program, P)):
        b_x = load(p_x, (row % B) * stride_x_b + p * stride_x_p, m_n, DTYPE)
        b_normaliser = load(p_normaliser, row * P + p, m_n, DTYPE)
        column = p * C
        o_a = row * stride_a_n + p * stride_a_p
        classes = C
        if p_begins is not None:
            column = tl.load(p_begins + p)
            classes = tl.load(p_begins + p + 1) - column
            o_a = row * stride_a_n + column * stride_a_c
        for c in range(0, classes, BLOCK_C):
            o_c = (c + tl.arange(0, BLOCK_C))[None, :].to(tl.int64)
            m_c = m_n & (o_c < classes)
            b_a = load(p_a, o_a + o_c * stride_a_c, m_c, DTYPE)
            b_grad = g * (tl.where(b_x == o_c.to(DTYPE), 1.0, 0.0) - exp(b_a - b_normaliser))
            store(p_grad_a, row * row_size + column + o_c, tl.where(b_x == IGNORED, 0.0, b_grad), m_c)


def _positions(logits: torch.Tensor, dtype: torch.dtype) -> tuple[tuple[int, int], dict[str, int], int]:
    """Return the grid, a program's rows and positions, and its warps, of logits [N, C, P]."""
    rows, _, positions = logits.shape
    launching = LAUNCH["likelihood_backward"]
    block = min(power_of_two(positions), launching.tile)
    block_n = min(power_of_two(rows), launching.tile // block)
    grid = cdiv(rows, block_n), cdiv(positions, block)
    return grid, {"BLOCK_N": block_n, "BLOCK_P": block}, launching.warps(dtype)


# Most programs that share a row's positions: their partial sums are added by one thread.
_MOST_SPLITS = 64


def _classes(
    logits: torch.Tensor, positions: int, dtype: torch.dtype
) -> tuple[tuple[int, int], int, dict[str, int], int]:
    """Return the grid, positions per program, a tile's rows and classes, and warps, of classes in a row."""
    rows = logits.shape[0]
    launching = LAUNCH["likelihood_backward"]
    # Of a table the number of classes is the average.
    classes = cdiv(logits.numel(), rows * positions)
    block = min(power_of_two(classes), launching.tile)
    block_n = min(power_of_two(rows), launching.tile // block)
    per_program = cdiv(positions, _MOST_SPLITS)
    grid = cdiv(rows, block_n), cdiv(positions, per_program)
    return grid, per_program, {"BLOCK_N": block_n, "BLOCK_C": block}, launching.warps(dtype)


def _constants(ignore_index: int, dtype: torch.dtype, blocks: dict[str, int]) -> dict[str, Any]:
    return {"IGNORED": float(ignore_index), "DTYPE": triton_dtype(dtype), **blocks}


def _numbers(
    x: torch.Tensor, begins: torch.Tensor | None, logits: torch.Tensor, last: bool, *more: Any
) -> tuple[Any, ...]:
    """Return sizes, ``more``, and strides; those of a row are known to the compiler, which aligns loads."""
    rows, positions = logits.shape[0], x.shape[1]
    classes = logits.shape[-1 if last else 1]
    steps = strides(logits, 3) if begins is None else (logits.stride(0), 0, logits.stride(1))
    if not last:
        return x.shape[0], rows, classes, positions, *more, *strides(x, 2), *steps
    return x.shape[0], rows, fixed(classes), positions, *more, *map(fixed, (*strides(x, 2), *steps))


@planned
def _forward(x, begins, logits, last, ignore_index) -> Call:
    dtype = accumulator(x, logits)
    if last:
        grid, per_program, blocks, warps = _classes(logits, x.shape[1], dtype)
        numbers = _numbers(x, begins, logits, last, per_program)
    else:
        grid, blocks, warps = _positions(logits, dtype)
        numbers = _numbers(x, begins, logits, last)
    rows, positions = logits.shape[0], x.shape[1]
    return Call(
        classes_kernel if last else positions_kernel,
        grid,
        (Result((rows,), dtype, grid[1]), Result((rows, positions), dtype)),
        numbers,
        _constants(ignore_index, dtype, blocks),
        warps,
    )


@planned
def _backward(grad, normaliser, x, begins, logits, last, ignore_index) -> Call:
    dtype = grad.dtype
    if last:
        grid, per_program, blocks, warps = _classes(logits, x.shape[1], dtype)
        more = per_program, fixed(logits.shape[1:].numel())
        numbers = _numbers(x, begins, logits, last, *more, *strides(grad, 1))
    else:
        grid, blocks, warps = _positions(logits, dtype)
        numbers = _numbers(x, begins, logits, last, *strides(grad, 1))
    return Call(
        classes_backward_kernel if last else positions_backward_kernel,
        grid,
        (Result(tuple(logits.shape), logits.dtype),),
        numbers,
        _constants(ignore_index, dtype, blocks),
        warps,
    )


def categorical_log_prob(
    x: torch.Tensor, begins: torch.Tensor | None, logits: torch.Tensor, last: bool, ignore_index: int
) -> tuple[torch.Tensor, ...]:
    """Return log p [N] and log-sums [N, P] of x [B, P], given logits [N, C, P], or [N, P, C] if ``last``.

    With ``begins`` [P + 1] logits are [N, W]; position p has the columns from begins[p] to begins[p + 1].
    """
    if not logits.numel() or not x.numel():
        dtype = accumulator(x, logits)
        empty = logits.new_zeros((logits.shape[0], x.shape[1]), dtype=dtype)
        return logits.new_zeros(logits.shape[0], dtype=dtype), empty
    return _forward((x, begins, logits), (last, ignore_index))


def categorical_log_prob_backward(
    grad: torch.Tensor,
    normaliser: torch.Tensor,
    x: torch.Tensor,
    begins: torch.Tensor | None,
    logits: torch.Tensor,
    last: bool,
    ignore_index: int,
) -> torch.Tensor:
    """Return the gradient of the logits."""
    if not logits.numel() or not x.numel():
        return torch.zeros_like(logits)
    sums = grad, normaliser.contiguous()
    return _backward((*sums, x, begins, logits), (last, ignore_index))[0]
