"""Counts over an event, in Triton. See :mod:`fastvae.ops.multinomial` for the mathematics.

Lanes are elements of the event: each keeps a maximum and a sum, which are combined in the end, and the
products of counts and logits. The logits are read once in each direction.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..reference.multinomial import dense, log_coefficient
from .common import LAUNCH, accumulator, cdiv, load, power_of_two, store, strides, triton_dtype
from .elementary import exp, log_positive
from .launching import Call, Result, fixed, planned
from .logsumexp import add_exponential, combined


@triton.jit(do_not_specialize=["B", "N"])
def multinomial_kernel(
    p_x,  # [B, X] counts, of any type
    p_coefficient,  # [B], or None
    p_mask,  # [B, X] bool, or None
    p_a,  # [N, X] logits
    p_out,  # [N] out, log-likelihoods
    p_normaliser,  # [N] out
    p_total,  # [B] out, numbers of counts
    B,
    N,
    X,
    stride_x_b,
    stride_x_x,
    stride_mask_b,
    stride_mask_x,
    stride_a_n,
    stride_a_x,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Compute log p; one program per block of rows."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # [BLOCK_N, 1]
    b = row % B
    m_n = row < N
    b_top = tl.full([BLOCK_N, BLOCK_X], -3.0e38, dtype=DTYPE)
    b_sum = tl.zeros([BLOCK_N, BLOCK_X], dtype=DTYPE)
    b_product = tl.zeros([BLOCK_N, BLOCK_X], dtype=DTYPE)
    b_count = tl.zeros([BLOCK_N, BLOCK_X], dtype=DTYPE)
    # Products are relative to a number close to the logits, lest they cancel.
    b_near = tl.zeros([BLOCK_N, 1], dtype=DTYPE)
    for start in range(0, X, BLOCK_X):
        o_x = (start + tl.arange(0, BLOCK_X))[None, :].to(tl.int64)
        m_x = m_n & (o_x < X)
        b_a = load(p_a, row * stride_a_n + o_x * stride_a_x, m_x, DTYPE, float("-inf"))
        b_x = load(p_x, b * stride_x_b + o_x * stride_x_x, m_x, DTYPE)
        if p_mask is not None:
            m_seen = tl.load(p_mask + b * stride_mask_b + o_x * stride_mask_x, mask=m_x, other=0) != 0
            b_a, b_x = tl.where(m_seen, b_a, float("-inf")), tl.where(m_seen, b_x, 0.0)
        b_top, b_sum = add_exponential(b_a, b_top, b_sum)
        if start == 0:
            b_most = tl.max(b_top, axis=1, keep_dims=True)
            b_near = tl.where((b_most > -1.0e38) & (b_most < 1.0e38), b_most, 0.0)
        b_product += tl.where(b_x == 0, 0.0, b_x * (b_a - b_near))
        b_count += b_x
    b_most, b_all = combined(b_top, b_sum)
    b_log = log_positive(b_all)
    b_total = tl.sum(b_count, axis=1, keep_dims=True)
    b_value = tl.sum(b_product, axis=1, keep_dims=True) + b_total * (b_near - b_most) - b_total * b_log
    if p_coefficient is not None:
        b_value += load(p_coefficient, b, m_n, DTYPE)
    # Without counts nothing depends on the logits.
    tl.store(p_out + row, tl.where(b_total == 0, 0.0, b_value), mask=m_n)
    tl.store(p_normaliser + row, tl.where(b_total == 0, 0.0, b_most + b_log), mask=m_n)
    tl.store(p_total + row, b_total, mask=row < B)


@triton.jit(do_not_specialize=["B", "N"])
def multinomial_backward_kernel(
    p_grad,  # [N]
    p_normaliser,  # [N]
    p_total,  # [B]
    p_x,  # [B, X] counts, of any type
    p_mask,  # [B, X] bool, or None
    p_a,  # [N, X] logits
    p_grad_a,  # [N, X] out, contiguous
    B,
    N,
    X,
    stride_grad,
    stride_x_b,
    stride_x_x,
    stride_mask_b,
    stride_mask_x,
    stride_a_n,
    stride_a_x,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Compute the gradient; one program per block of rows and block of elements."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # [BLOCK_N, 1]
    b = row % B
    m_n = row < N
    o_x = (tl.program_id(1).to(tl.int64) * BLOCK_X + tl.arange(0, BLOCK_X))[None, :]  # [1, BLOCK_X]
    m_out = m_n & (o_x < X)
    g = load(p_grad, row * stride_grad, m_n, DTYPE)
    b_normaliser = load(p_normaliser, row, m_n, DTYPE)
    b_total = load(p_total, b, m_n, DTYPE)
    b_a = load(p_a, row * stride_a_n + o_x * stride_a_x, m_out, DTYPE)
    b_x = load(p_x, b * stride_x_b + o_x * stride_x_x, m_out, DTYPE)
    b_grad = tl.where(b_total == 0, 0.0, g * (b_x - b_total * exp(b_a - b_normaliser)))
    if p_mask is not None:
        m_seen = tl.load(p_mask + b * stride_mask_b + o_x * stride_mask_x, mask=m_out, other=0) != 0
        b_grad = tl.where(m_seen, b_grad, 0.0)
    store(p_grad_a, row * X + o_x, b_grad, m_out)


def _blocks(logits: torch.Tensor, tile: int) -> dict[str, int]:
    rows, size = logits.shape
    block = min(power_of_two(size), tile)
    return {"BLOCK_N": min(power_of_two(rows), tile // block), "BLOCK_X": block}


def _numbers(x: torch.Tensor, mask: torch.Tensor | None, logits: torch.Tensor) -> tuple[Any, ...]:
    """Return strides, known to the compiler, which aligns loads."""
    return tuple(map(fixed, (*strides(x, 2), *strides(mask, 2), *strides(logits, 2))))


@planned
def _forward(x, coefficient, mask, logits) -> Call:
    dtype, launching = accumulator(x, logits), LAUNCH["multinomial"]
    blocks = _blocks(logits, launching.tile)
    rows, size = logits.shape
    return Call(
        multinomial_kernel,
        (cdiv(rows, blocks["BLOCK_N"]),),
        (Result((rows,), dtype), Result((rows,), dtype), Result((x.shape[0],), dtype)),
        (x.shape[0], rows, fixed(size), *_numbers(x, mask, logits)),
        {"DTYPE": triton_dtype(dtype), **blocks},
        launching.warps(logits.dtype),
    )


@planned
def _backward(grad, normaliser, total, x, mask, logits) -> Call:
    launching = LAUNCH["likelihood_backward"]
    blocks = _blocks(logits, launching.tile)
    rows, size = logits.shape
    return Call(
        multinomial_backward_kernel,
        (cdiv(rows, blocks["BLOCK_N"]), cdiv(size, blocks["BLOCK_X"])),
        (Result((rows, size), logits.dtype),),
        (x.shape[0], rows, fixed(size), *strides(grad, 1), *_numbers(x, mask, logits)),
        {"DTYPE": triton_dtype(grad.dtype), **blocks},
        launching.warps(grad.dtype),
    )


def multinomial_log_prob(
    x: torch.Tensor,
    begins: torch.Tensor | None,
    columns: torch.Tensor | None,
    mask: torch.Tensor | None,
    logits: torch.Tensor,
    coefficient: bool,
) -> tuple[torch.Tensor, ...]:
    """Return log p [N], log-sums [N] and numbers of counts [B]; a sparse x is made dense."""
    dtype = accumulator(x, logits)
    x = dense(x, begins, columns, logits.shape[1])
    if not logits.numel():
        empty = logits.new_zeros(logits.shape[0], dtype=dtype)
        return empty, empty.clone(), logits.new_zeros(x.shape[0], dtype=dtype)
    own = None
    if coefficient:
        # Depends on x alone.
        counts = x.to(dtype) if mask is None else torch.where(mask, x.to(dtype), 0.0)
        own = log_coefficient(counts).to(dtype)
    return tuple(_forward((x, own, mask, logits)))


def multinomial_log_prob_backward(
    grad: torch.Tensor,
    normaliser: torch.Tensor,
    total: torch.Tensor,
    x: torch.Tensor,
    begins: torch.Tensor | None,
    columns: torch.Tensor | None,
    mask: torch.Tensor | None,
    logits: torch.Tensor,
) -> torch.Tensor:
    """Return the gradient of the logits."""
    x = dense(x, begins, columns, logits.shape[1])
    if not logits.numel():
        return torch.zeros_like(logits)
    given = grad, normaliser.contiguous(), total.contiguous(), x, mask, logits
    return _backward(given)[0]
