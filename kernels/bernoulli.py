"""Row-reduced Bernoulli log-likelihood from logits, in Triton.

:mod:`fastvae.ops.bernoulli` is the mathematics. A tile is [BLOCK_K, BLOCK_B, BLOCK_X]: samples that share
x, rows, pixels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import (
    LAUNCH,
    accumulator,
    event_offsets,
    event_tiles,
    exp_of_negative,
    launch,
    load,
    log1p,
    log1p_of_odds,
    odds_of_both,
    pixel_span,
    reciprocal,
    split_program,
    store,
    strides,
    sum_of_parts,
    triton_dtype,
)

# Tiles of a row for one program: the product of four factors of up to 2 from each must stay below 2^127.
MOST_TILES = 28


@triton.jit(do_not_specialize=["K", "B", "x_tiles"], do_not_specialize_on_alignment=["k_splits"])
def bernoulli_log_prob_kernel(
    p_x,  # [B, X] targets
    p_logits,  # [K, B, X]
    p_out,  # [x_splits, K, B] out, contiguous: parts of the log-likelihood
    K,  # samples
    B,  # rows
    X,  # pixels
    k_splits,  # programs along the samples
    x_tiles,  # blocks of pixels of one program
    stride_x_b,
    stride_x_x,
    stride_logits_k,
    stride_logits_b,
    stride_logits_x,
    DTYPE: tl.constexpr,  # of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One program per block of samples and rows, and split of the pixels."""
    i_b, i_k = split_program(k_splits)
    i_k *= BLOCK_K
    i_b *= BLOCK_B
    x_start, x_stop = pixel_span(X, x_tiles, BLOCK_X)
    # What four pixels, and all tiles of a row, add by log(1 + t) each is one logarithm of a product.
    PRODUCT: tl.constexpr = tl.float32 == DTYPE and BLOCK_X >= 4
    LANES: tl.constexpr = BLOCK_X // 4 if PRODUCT else BLOCK_X
    b_sum = tl.zeros([BLOCK_K, BLOCK_B, LANES], dtype=DTYPE)  # [BLOCK_K, BLOCK_B, LANES]
    if PRODUCT:
        b_odds = tl.zeros([BLOCK_K, BLOCK_B, LANES], dtype=DTYPE)  # [BLOCK_K, BLOCK_B, LANES]
    o_k = event_offsets(i_k, BLOCK_K, 0)  # [BLOCK_K, 1, 1]
    o_b = event_offsets(i_b, BLOCK_B, 1)  # [1, BLOCK_B, 1]
    for i_x in range(x_start, x_stop, BLOCK_X):
        o_x = event_offsets(i_x, BLOCK_X, 2)  # [1, 1, BLOCK_X]
        m_x = o_x < X
        b_x = load(p_x, o_b * stride_x_b + o_x * stride_x_x, (o_b < B) & m_x, DTYPE)
        o_l = o_k * stride_logits_k + o_b * stride_logits_b + o_x * stride_logits_x
        # Beyond the row a certain miss of 0 by -inf, which adds nothing.
        b_l = load(p_logits, o_l, (o_k < K) & (o_b < B) & m_x, DTYPE, float("-inf"))
        # The probability of a miss times the margin, instead of x l - softplus(l): no cancellation, and 0 *
        # inf is 0.
        b_miss = tl.where(b_l > 0, 1.0 - b_x, b_x)
        b_margin = tl.abs(b_l)
        b_linear = tl.where(b_miss == 0, 0.0, b_miss * b_margin)
        b_t = exp_of_negative(-b_margin)
        if PRODUCT:
            b_linear, b_more = tl.split(tl.reshape(b_linear, [BLOCK_K, BLOCK_B, LANES, 2, 2]))
            b_linear, b_more = tl.split(b_linear + b_more)
            b_sum += b_linear + b_more
            b_t, b_u = tl.split(tl.reshape(b_t, [BLOCK_K, BLOCK_B, LANES, 2, 2]))
            b_t, b_u = tl.split(odds_of_both(b_t, b_u))
            b_odds = odds_of_both(b_odds, odds_of_both(b_t, b_u))
        else:
            b_sum += b_linear + log1p(b_t)
    if PRODUCT:
        b_sum += log1p_of_odds(b_odds)
    b_out = tl.sum(b_sum, axis=2, keep_dims=True)
    o_out = (tl.program_id(1).to(tl.int64) * K + o_k) * B + o_b
    tl.store(p_out + o_out, -b_out, mask=(o_k < K) & (o_b < B))


@triton.jit(
    do_not_specialize=["K", "B", "k_per_program", "x_tiles"],
    do_not_specialize_on_alignment=["k_splits", "stride_grad_k", "stride_grad_b"],
)
def bernoulli_log_prob_backward_kernel(
    p_grad,  # [K, B] gradient of the log-likelihood
    p_x,  # [B, X] targets, or None where grad_logits is not needed
    p_logits,  # [K, B, X]
    p_grad_x,  # [k_splits, B, X] out, contiguous, or None where not needed
    p_grad_logits,  # [K, B, X] out, contiguous, or None where not needed
    K,  # samples
    B,  # rows
    X,  # pixels
    k_per_program,  # samples of one program
    k_splits,  # programs along the samples
    x_tiles,  # blocks of pixels of one program
    stride_grad_k,
    stride_grad_b,
    stride_x_b,
    stride_x_x,
    stride_logits_k,
    stride_logits_b,
    stride_logits_x,
    MERGE_K: tl.constexpr,  # a program takes more than one block of samples
    DTYPE: tl.constexpr,  # of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One program per split of the samples, block of rows, and split of the pixels."""
    i_b, i_split = split_program(k_splits)
    k_start = i_split * k_per_program
    # One block, where the compiler can see that it is one, or it takes twice the registers.
    k_stop = k_start + 1
    if MERGE_K:
        k_stop = tl.minimum(k_start + k_per_program, K)
    x_start, x_stop = pixel_span(X, x_tiles, BLOCK_X)
    o_b = event_offsets(i_b * BLOCK_B, BLOCK_B, 1)  # [1, BLOCK_B, 1]
    m_b = o_b < B
    for i_x in range(x_start, x_stop, BLOCK_X):
        o_x = event_offsets(i_x, BLOCK_X, 2)  # [1, 1, BLOCK_X]
        m_x = m_b & (o_x < X)
        if p_grad_logits is not None:
            b_x = load(p_x, o_b * stride_x_b + o_x * stride_x_x, m_x, DTYPE)
        s_x = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_X], dtype=DTYPE)  # sum of g l over samples, a lane each
        for i_k in range(k_start, k_stop, BLOCK_K):
            o_k = event_offsets(i_k, BLOCK_K, 0)  # [BLOCK_K, 1, 1]
            m_k = o_k < K
            o_g = o_k * stride_grad_k + o_b * stride_grad_b
            b_g = load(p_grad, o_g, m_k & m_b, DTYPE)  # [BLOCK_K, BLOCK_B, 1]
            o_l = o_k * stride_logits_k + o_b * stride_logits_b + o_x * stride_logits_x
            b_l = load(p_logits, o_l, m_k & m_x, DTYPE)
            if p_grad_logits is not None:
                # sigmoid(-|l|) is what either target is missed by: x - sigmoid(l) without cancellation at x =
                # 0 and x = 1.
                b_t = exp_of_negative(-tl.abs(b_l))
                b_t *= reciprocal(1.0 + b_t)
                b_out = b_g * tl.where(b_l > 0, (b_x - 1.0) + b_t, b_x - b_t)
                store(p_grad_logits, (o_k * B + o_b) * X + o_x, b_out, m_k & m_x)
            if p_grad_x is not None:
                s_x += b_g * b_l
        if p_grad_x is not None:
            o_part = (i_split.to(tl.int64) * B + o_b) * X + o_x
            store(p_grad_x, o_part, tl.sum(s_x, axis=0, keep_dims=True), m_x)


def bernoulli_log_prob(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """x l - softplus(l) summed over the last axis: x [B, X], logits [K, B, X] -> [K, B]."""
    k, b, size = logits.shape
    dtype = accumulator(x, logits)
    if logits.numel() == 0:
        return torch.zeros((k, b), dtype=dtype, device=logits.device)
    parameters = LAUNCH["likelihood"]
    tiles = event_tiles(k, b, size, parameters.tile, most_tiles=MOST_TILES)
    out = torch.empty((tiles.x_splits, k, b), dtype=dtype, device=logits.device)
    launch(
        bernoulli_log_prob_kernel,
        tiles.grid,
        (x, logits, out),
        (k, b, size, tiles.k_splits, tiles.x_tiles, *strides(x, 2), *strides(logits, 3)),
        {"DTYPE": triton_dtype(dtype), **tiles.blocks},
        parameters.warps(dtype),
    )
    return sum_of_parts(out)


def bernoulli_log_prob_backward(
    grad: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, need: list[bool]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients for (x, logits), None where not needed."""
    k, b, size = logits.shape
    need_x, need_logits = need
    if logits.numel() == 0 or not any(need):
        return tuple(torch.zeros_like(t) if n else None for t, n in zip((x, logits), need, strict=True))
    dtype = accumulator(x, logits)
    parameters = LAUNCH["likelihood_backward"]
    tiles = event_tiles(k, b, size, parameters.tile, merge_k=need_x)
    grad_x = grad_logits = None
    if need_x:
        part = x.dtype if tiles.k_splits == 1 else dtype
        grad_x = torch.empty((tiles.k_splits, b, size), dtype=part, device=x.device)
    if need_logits:
        grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    launch(
        bernoulli_log_prob_backward_kernel,
        tiles.grid,
        (grad, x if need_logits else None, logits, grad_x, grad_logits),
        (
            *(k, b, size, tiles.k_per_program, tiles.k_splits, tiles.x_tiles),
            *(*strides(grad, 2), *strides(x, 2), *strides(logits, 3)),
        ),
        {"MERGE_K": tiles.k_per_program > tiles.block_k, "DTYPE": triton_dtype(dtype), **tiles.blocks},
        parameters.warps(dtype),
    )
    if need_x:
        grad_x = sum_of_parts(grad_x).to(x.dtype)
    return grad_x, grad_logits
