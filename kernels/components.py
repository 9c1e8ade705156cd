"""Mixtures over a component axis, in Triton. See :mod:`fastvae.ops.components` for the mathematics.

A program takes a block of rows and positions and loops over the components with running maxima and sums, so
nothing with the component axis is kept.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import LAUNCH, accumulator, cdiv, load, power_of_two, store, strides, triton_dtype
from .elementary import exp, exp_of_negative, expm1_parts, log_positive, tanh_half
from .launching import Call, Result, planned
from .logsumexp import add_exponential


@triton.jit
def inverse_scale(log_scale):
    """Return exp(-log_scale), log_scale clamped to [-60, 60] so that the ends of a bin stay finite."""
    clamped = tl.where(log_scale > 60, 60.0, tl.where(log_scale < -60, -60.0, log_scale))
    return exp(-clamped)


@triton.jit
def bin_value(x, location, log_scale, half):
    """Compute log sigmoid(upper) sigmoid(-lower) (1 - exp(lower - upper)) of a bin.

    In the first bin lower is -inf, in the last upper is inf.
    """
    inverse = inverse_scale(log_scale)
    delta = x - location
    upper, lower = (delta + half) * inverse, (delta - half) * inverse
    first, last = x < half - 1.0, x > 1.0 - half
    below = tl.where(first, 0.0, exp_of_negative(-tl.abs(lower)))
    above = tl.where(last, 0.0, exp_of_negative(-tl.abs(upper)))
    inner, _ = expm1_parts(-2.0 * half * inverse)
    share = tl.where(first | last, 1.0, -inner)
    linear = tl.where(first, 0.0, tl.maximum(lower, 0.0)) - tl.where(last, 0.0, tl.minimum(upper, 0.0))
    value = log_positive(share / ((1.0 + below) * (1.0 + above))) - linear
    return tl.where(delta == delta, value, delta)


@triton.jit
def bin_gradient(x, location, log_scale, half):
    """Compute the derivatives of :func:`bin_value` by location and by log scale."""
    inverse = inverse_scale(log_scale)
    delta = x - location
    upper, lower = (delta + half) * inverse, (delta - half) * inverse
    width = 2.0 * half * inverse
    first, last = x < half - 1.0, x > 1.0 - half
    k_below, k_above = exp_of_negative(-tl.abs(lower)), exp_of_negative(-tl.abs(upper))
    large_below, large_above = 1.0 / (1.0 + k_below), 1.0 / (1.0 + k_above)
    below = tl.where(first, 0.0, tl.where(lower > 0, large_below, k_below * large_below))
    above = tl.where(last, 0.0, tl.where(upper > 0, k_above * large_above, large_above))
    bounded = tl.where(width < 80, width, 80.0)
    inner, _ = expm1_parts(bounded)
    share = tl.where(first | last, 0.0, bounded / inner)
    return (below - above) * inverse, lower * below - upper * above - share


@triton.jit
def channel(p_p, row, index, o_p, m_p, stride_n, stride_c, stride_p, DTYPE: tl.constexpr):
    """Load one channel of a row's parameter along the positions."""
    return load(p_p, row * stride_n + index * stride_c + o_p * stride_p, m_p, DTYPE)


@triton.jit
def component(
    p_x, p_location, p_log_scale, p_coefficients, b_a, b, row, c, o_p, m_p, half,
    stride_x_b, stride_x_e, stride_x_p, stride_1_n, stride_1_c, stride_1_p, stride_2_n, stride_2_c,
    stride_2_p, stride_3_n, stride_3_c, stride_3_p, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return a component's logit plus its log-likelihood."""
    b_s = b_a
    for e in tl.static_range(CHANNELS):
        i = c * CHANNELS + e
        b_x = channel(p_x, b, e, o_p, m_p, stride_x_b, stride_x_e, stride_x_p, DTYPE)
        b_mean = channel(p_location, row, i, o_p, m_p, stride_1_n, stride_1_c, stride_1_p, DTYPE)
        b_scale = channel(p_log_scale, row, i, o_p, m_p, stride_2_n, stride_2_c, stride_2_p, DTYPE)
        if p_coefficients is not None:
            b_mean = coupled(
                p_x, p_coefficients, b_mean, b, row, c, o_p, m_p, stride_x_b, stride_x_e, stride_x_p,
                stride_3_n, stride_3_c, stride_3_p, e, DTYPE,
            )  # fmt: skip
        b_s += bin_value(b_x, b_mean, b_scale, half)
    return b_s


@triton.jit
def coupled(
    p_x, p_coefficients, b_mean, b, row, c, o_p, m_p, stride_x_b, stride_x_e, stride_x_p, stride_3_n,
    stride_3_c, stride_3_p, e: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Shift green's location by red, and blue's by red and green."""
    if e >= 1:
        b_red = channel(p_x, b, 0, o_p, m_p, stride_x_b, stride_x_e, stride_x_p, DTYPE)
        i = c * 3 + e - 1
        b_t = channel(p_coefficients, row, i, o_p, m_p, stride_3_n, stride_3_c, stride_3_p, DTYPE)
        b_mean += tanh_half(2.0 * b_t) * b_red
    if e == 2:
        b_green = channel(p_x, b, 1, o_p, m_p, stride_x_b, stride_x_e, stride_x_p, DTYPE)
        i = c * 3 + 2
        b_t = channel(p_coefficients, row, i, o_p, m_p, stride_3_n, stride_3_c, stride_3_p, DTYPE)
        b_mean += tanh_half(2.0 * b_t) * b_green
    return b_mean


@triton.jit(do_not_specialize=["B", "N"])
def components_kernel(
    p_x,  # [B, E, P] data, of any type
    p_a,  # [N, C, P] logits
    p_location,  # [N, C E, P]
    p_log_scale,
    p_coefficients,  # or None
    p_out,  # [tiles, N] out, partial log-likelihoods
    p_normaliser,  # [N, P] out
    p_joint,  # [N, P] out
    B,
    N,
    C,
    P,
    stride_x_b,
    stride_x_e,
    stride_x_p,
    stride_0_n,
    stride_0_c,
    stride_0_p,
    stride_1_n,
    stride_1_c,
    stride_1_p,
    stride_2_n,
    stride_2_c,
    stride_2_p,
    stride_3_n,
    stride_3_c,
    stride_3_p,
    HALF: tl.constexpr,  # half a bin's width
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute log p; one program per block of rows and block of positions."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # [BLOCK_N, 1]
    b = row % B
    o_p = (tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]  # [1, BLOCK_P]
    m_p = (row < N) & (o_p < P)
    b_top = tl.full([BLOCK_N, BLOCK_P], -3.0e38, dtype=DTYPE)
    b_sum = tl.zeros([BLOCK_N, BLOCK_P], dtype=DTYPE)
    b_top_own = tl.full([BLOCK_N, BLOCK_P], -3.0e38, dtype=DTYPE)
    b_sum_own = tl.zeros([BLOCK_N, BLOCK_P], dtype=DTYPE)
    for c in range(C):
        b_a = channel(p_a, row, c, o_p, m_p, stride_0_n, stride_0_c, stride_0_p, DTYPE)
        b_top, b_sum = add_exponential(b_a, b_top, b_sum)
        b_s = component(
            p_x, p_location, p_log_scale, p_coefficients, b_a, b, row, c, o_p, m_p, HALF, stride_x_b,
            stride_x_e, stride_x_p, stride_1_n, stride_1_c, stride_1_p, stride_2_n, stride_2_c, stride_2_p,
            stride_3_n, stride_3_c, stride_3_p, CHANNELS, DTYPE,
        )  # fmt: skip
        b_top_own, b_sum_own = add_exponential(b_s, b_top_own, b_sum_own)
    b_normaliser = b_top + log_positive(b_sum)
    b_joint = b_top_own + log_positive(b_sum_own)
    o_out = row * P + o_p
    tl.store(p_normaliser + o_out, b_normaliser, mask=m_p)
    tl.store(p_joint + o_out, b_joint, mask=m_p)
    b_value = tl.where(m_p, b_joint - b_normaliser, 0.0)
    o_row = tl.program_id(1).to(tl.int64) * N + row
    tl.store(p_out + o_row, tl.sum(b_value, axis=1, keep_dims=True), mask=row < N)


@triton.jit(do_not_specialize=["B", "N"])
def components_backward_kernel(
    p_grad,  # [N]
    p_normaliser,  # [N, P]
    p_joint,  # [N, P]
    p_x,  # [B, E, P] data, of any type
    p_a,  # [N, C, P] logits
    p_location,  # [N, C E, P]
    p_log_scale,
    p_coefficients,  # or None
    p_grad_a,  # out, contiguous, with the parameters' shapes; None where not needed
    p_grad_location,
    p_grad_log_scale,
    p_grad_coefficients,
    B,
    N,
    C,
    P,
    stride_grad,
    stride_x_b,
    stride_x_e,
    stride_x_p,
    stride_0_n,
    stride_0_c,
    stride_0_p,
    stride_1_n,
    stride_1_c,
    stride_1_p,
    stride_2_n,
    stride_2_c,
    stride_2_p,
    stride_3_n,
    stride_3_c,
    stride_3_p,
    HALF: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute the gradients; one program per block of rows and block of positions."""
    row = (tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N))[:, None]  # [BLOCK_N, 1]
    b = row % B
    o_p = (tl.program_id(1).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P))[None, :]  # [1, BLOCK_P]
    m_p = (row < N) & (o_p < P)
    g = load(p_grad, row * stride_grad, row < N, DTYPE)  # [BLOCK_N, 1]
    b_normaliser = load(p_normaliser, row * P + o_p, m_p, DTYPE)
    b_joint = load(p_joint, row * P + o_p, m_p, DTYPE)
    for c in range(C):
        b_a = channel(p_a, row, c, o_p, m_p, stride_0_n, stride_0_c, stride_0_p, DTYPE)
        b_share = exp(b_a - b_normaliser)
        b_s = component(
            p_x, p_location, p_log_scale, p_coefficients, b_a, b, row, c, o_p, m_p, HALF, stride_x_b,
            stride_x_e, stride_x_p, stride_1_n, stride_1_c, stride_1_p, stride_2_n, stride_2_c,
            stride_2_p, stride_3_n, stride_3_c, stride_3_p, CHANNELS, DTYPE,
        )  # fmt: skip
        b_r = g * exp(b_s - b_joint)
        if p_grad_a is not None:
            store(p_grad_a, (row * C + c) * P + o_p, b_r - g * b_share, m_p)
        for e in tl.static_range(CHANNELS):
            i = c * CHANNELS + e
            b_x = channel(p_x, b, e, o_p, m_p, stride_x_b, stride_x_e, stride_x_p, DTYPE)
            b_mean = channel(p_location, row, i, o_p, m_p, stride_1_n, stride_1_c, stride_1_p, DTYPE)
            b_scale = channel(p_log_scale, row, i, o_p, m_p, stride_2_n, stride_2_c, stride_2_p, DTYPE)
            if p_coefficients is not None:
                b_mean = coupled(
                    p_x, p_coefficients, b_mean, b, row, c, o_p, m_p, stride_x_b, stride_x_e, stride_x_p,
                    stride_3_n, stride_3_c, stride_3_p, e, DTYPE,
                )  # fmt: skip
            b_by_mean, b_by_scale = bin_gradient(b_x, b_mean, b_scale, HALF)
            b_by_mean = b_r * b_by_mean
            o_out = (row * C * CHANNELS + i) * P + o_p
            if p_grad_location is not None:
                store(p_grad_location, o_out, b_by_mean, m_p)
            if p_grad_log_scale is not None:
                store(p_grad_log_scale, o_out, b_r * b_by_scale, m_p)
            if p_grad_coefficients is not None:
                if e >= 1:
                    store_coefficient_gradient(
                        p_grad_coefficients, p_coefficients, p_x, b_by_mean, b, row, C, P, c, e - 1, 0,
                        o_p, m_p, stride_x_b, stride_x_e, stride_x_p, stride_3_n, stride_3_c, stride_3_p,
                        DTYPE,
                    )  # fmt: skip
                if e == 2:
                    store_coefficient_gradient(
                        p_grad_coefficients, p_coefficients, p_x, b_by_mean, b, row, C, P, c, 2, 1,
                        o_p, m_p, stride_x_b, stride_x_e, stride_x_p, stride_3_n, stride_3_c, stride_3_p,
                        DTYPE,
                    )  # fmt: skip


@triton.jit
def store_coefficient_gradient(
    p_grad, p_coefficients, p_x, b_by_mean, b, row, C, P, c, i, e, o_p, m_p, stride_x_b, stride_x_e,
    stride_x_p, stride_3_n, stride_3_c, stride_3_p, DTYPE: tl.constexpr,
):  # fmt: skip
    """Store the gradient of coefficient i, which shifts a location by channel e."""
    b_t = tanh_half(
        2.0 * channel(p_coefficients, row, c * 3 + i, o_p, m_p, stride_3_n, stride_3_c, stride_3_p, DTYPE)
    )
    b_x = channel(p_x, b, e, o_p, m_p, stride_x_b, stride_x_e, stride_x_p, DTYPE)
    store(p_grad, (row * C * 3 + c * 3 + i) * P + o_p, b_by_mean * b_x * (1.0 - b_t) * (1.0 + b_t), m_p)


def _launch(logits: torch.Tensor, dtype: torch.dtype) -> tuple[tuple[int, int], dict[str, int], int]:
    """Return the grid, a program's rows and positions, and its warps."""
    rows, _, positions = logits.shape
    launching = LAUNCH["components"]
    block = min(power_of_two(positions), launching.tile)
    block_n = min(power_of_two(rows), launching.tile // block)
    grid = cdiv(rows, block_n), cdiv(positions, block)
    return grid, {"BLOCK_N": block_n, "BLOCK_P": block}, launching.warps(dtype)


def _numbers(x: torch.Tensor, parameters: tuple[torch.Tensor | None, ...]) -> tuple[int, ...]:
    return *strides(x, 3), *(n for p in parameters for n in strides(p, 3))


def _constants(x: torch.Tensor, half: float, dtype: torch.dtype, blocks: dict[str, int]) -> dict[str, Any]:
    return {"HALF": half, "CHANNELS": x.shape[1], "DTYPE": triton_dtype(dtype), **blocks}


@planned
def _forward(x, logits, location, log_scale, coefficients, half) -> Call:
    rows, groups, positions = logits.shape
    parameters = (logits, location, log_scale, coefficients)
    dtype = accumulator(x, *(p for p in parameters if p is not None))
    grid, blocks, warps = _launch(logits, dtype)
    return Call(
        components_kernel,
        grid,
        (Result((rows,), dtype, grid[1]), Result((rows, positions), dtype), Result((rows, positions), dtype)),
        (x.shape[0], rows, groups, positions, *_numbers(x, parameters)),
        _constants(x, half, dtype, blocks),
        warps,
    )


@planned
def _backward(grad, normaliser, joint, x, logits, location, log_scale, coefficients, half, need) -> Call:
    parameters = (logits, location, log_scale, coefficients)
    dtype = grad.dtype
    grid, blocks, warps = _launch(logits, dtype)
    needed = [*need, *[False] * (4 - len(need))]
    return Call(
        components_backward_kernel,
        grid,
        tuple(
            Result(tuple(p.shape), p.dtype) if n and p is not None else None
            for p, n in zip(parameters, needed, strict=True)
        ),
        (x.shape[0], *logits.shape, *strides(grad, 1), *_numbers(x, parameters)),
        _constants(x, half, dtype, blocks),
        warps,
    )


def discretized_logistic_mixture_log_prob(
    x: torch.Tensor,
    logits: torch.Tensor,
    location: torch.Tensor,
    log_scale: torch.Tensor,
    coefficients: torch.Tensor | None,
    half: float,
) -> tuple[torch.Tensor, ...]:
    """Return log p [N] and both log-sums [N, P] (normaliser, joint), of x [B, E, P] and logits [N, C, P]."""
    if not logits.numel() or not x.numel():
        dtype = accumulator(x, logits)
        empty = logits.new_zeros((logits.shape[0], logits.shape[2]), dtype=dtype)
        return logits.new_zeros(logits.shape[0], dtype=dtype), empty, empty.clone()
    return _forward((x, logits, location, log_scale, coefficients), (half,))


def discretized_logistic_mixture_log_prob_backward(
    grad: torch.Tensor,
    normaliser: torch.Tensor,
    joint: torch.Tensor,
    x: torch.Tensor,
    logits: torch.Tensor,
    location: torch.Tensor,
    log_scale: torch.Tensor,
    coefficients: torch.Tensor | None,
    half: float,
    need: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of (x, logits, location, log_scale, coefficients), None where not needed.

    That of x is always None.
    """
    parameters = (logits, location, log_scale, coefficients)
    needed = [*need[1:], *[False] * (5 - len(need))]
    if not logits.numel() or not x.numel() or not any(needed):
        grads = [
            torch.zeros_like(p) if n and p is not None else None
            for p, n in zip(parameters, needed, strict=True)
        ]
        return None, *grads
    sums = normaliser.contiguous(), joint.contiguous()
    return None, *_backward((grad, *sums, x, *parameters), (half, tuple(needed)))
