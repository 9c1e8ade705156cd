"""Row-reduced diagonal Gaussian log-likelihood, in Triton.

:mod:`fastvae.ops.gaussian` is the mathematics. A tile is [BLOCK_K, BLOCK_B, BLOCK_X]: samples that share x,
rows, pixels. The log variance's tile has size 1 along the axes over which it does not vary, so its
exponential is computed once for all that share it.
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
    exp,
    launch,
    load,
    pixel_span,
    split_program,
    store,
    strides,
    sum_of_parts,
    triton_dtype,
)

LOG_2_PI = tl.constexpr(1.8378770664093453)

# Where the gradient of the log variance goes: one per element, one per pixel, or one per row.
NONE, FULL, COLUMN, ROW = (tl.constexpr(i) for i in range(4))


@triton.jit
def load_logvar(
    p_logvar,
    i_k,
    i_b,
    i_x,
    K,
    B,
    X,
    stride_k,
    stride_b,
    stride_x,
    VARIES_K: tl.constexpr,
    VARIES_B: tl.constexpr,
    VARIES_X: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """The tile of the log variance: [BLOCK_K or 1, BLOCK_B or 1, BLOCK_X or 1]."""
    o_k = event_offsets(i_k if VARIES_K else 0, BLOCK_K if VARIES_K else 1, 0)
    o_b = event_offsets(i_b if VARIES_B else 0, BLOCK_B if VARIES_B else 1, 1)
    o_x = event_offsets(i_x if VARIES_X else 0, BLOCK_X if VARIES_X else 1, 2)
    mask = (o_k < K) & (o_b < B) & (o_x < X)
    return load(p_logvar, o_k * stride_k + o_b * stride_b + o_x * stride_x, mask, DTYPE)


@triton.jit(do_not_specialize=["K", "B", "x_tiles"], do_not_specialize_on_alignment=["k_splits"])
def gaussian_log_prob_kernel(
    p_x,  # [B, X] data
    p_mean,  # [K, B, X]
    p_logvar,  # [K or 1, B or 1, X or 1] log variance
    p_out,  # [x_splits, K, B] out, contiguous: parts of the log-likelihood
    K,  # samples
    B,  # rows
    X,  # pixels
    k_splits,  # programs along the samples
    x_tiles,  # blocks of pixels of one program
    stride_x_b,
    stride_x_x,
    stride_mean_k,
    stride_mean_b,
    stride_mean_x,
    stride_logvar_k,
    stride_logvar_b,
    stride_logvar_x,
    VARIES_K: tl.constexpr,  # whether the log variance varies along each axis
    VARIES_B: tl.constexpr,
    VARIES_X: tl.constexpr,
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
    b_sum = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_X], dtype=DTYPE)  # [BLOCK_K, BLOCK_B, BLOCK_X]
    o_k = event_offsets(i_k, BLOCK_K, 0)  # [BLOCK_K, 1, 1]
    o_b = event_offsets(i_b, BLOCK_B, 1)  # [1, BLOCK_B, 1]
    for i_x in range(x_start, x_stop, BLOCK_X):
        o_x = event_offsets(i_x, BLOCK_X, 2)  # [1, 1, BLOCK_X]
        m_x = o_x < X
        b_x = load(p_x, o_b * stride_x_b + o_x * stride_x_x, (o_b < B) & m_x, DTYPE)
        o_m = o_k * stride_mean_k + o_b * stride_mean_b + o_x * stride_mean_x
        b_mean = load(p_mean, o_m, (o_k < K) & (o_b < B) & m_x, DTYPE)
        b_logvar = load_logvar(
            p_logvar, i_k, i_b, i_x, K, B, X, stride_logvar_k, stride_logvar_b, stride_logvar_x,
            VARIES_K, VARIES_B, VARIES_X, DTYPE, BLOCK_K, BLOCK_B, BLOCK_X,
        )  # fmt: skip
        # exp(-logvar) itself overflows long before what it is a factor of does, here and below.
        b_white = (b_x - b_mean) * exp(-0.5 * b_logvar)
        b_sum += tl.where(m_x, LOG_2_PI + b_logvar + b_white * b_white, 0.0)
    o_out = (tl.program_id(1).to(tl.int64) * K + o_k) * B + o_b
    tl.store(p_out + o_out, -0.5 * tl.sum(b_sum, axis=2, keep_dims=True), mask=(o_k < K) & (o_b < B))


@triton.jit(
    do_not_specialize=["K", "B", "k_per_program", "b_per_program", "x_tiles"],
    do_not_specialize_on_alignment=["k_splits", "stride_grad_k", "stride_grad_b"],
)
def gaussian_log_prob_backward_kernel(
    p_grad,  # [K, B] gradient of the log-likelihood
    p_x,  # [B, X] data
    p_mean,  # [K, B, X]
    p_logvar,  # [K or 1, B or 1, X or 1] log variance
    p_grad_x,  # [k_splits, B, X] out, contiguous, or None where not needed
    p_grad_mean,  # [K, B, X] out, contiguous, or None where not needed
    p_grad_logvar,  # out, contiguous: FULL [K, B, X], COLUMN [k_splits * b_splits, X], ROW [x_splits, K, B]
    K,  # samples
    B,  # rows
    X,  # pixels
    k_per_program,  # samples of one program; with ROW one block of them
    b_per_program,  # rows of one program; with ROW one block of them
    k_splits,  # programs along the samples
    x_tiles,  # blocks of pixels of one program
    stride_grad_k,
    stride_grad_b,
    stride_x_b,
    stride_x_x,
    stride_mean_k,
    stride_mean_b,
    stride_mean_x,
    stride_logvar_k,
    stride_logvar_b,
    stride_logvar_x,
    MERGE_K: tl.constexpr,  # a program takes more than one block of samples,
    MERGE_B: tl.constexpr,  # or of rows
    LAYOUT: tl.constexpr,  # of the log variance's gradient: NONE, FULL, COLUMN or ROW
    VARIES_K: tl.constexpr,  # whether the log variance varies along each axis
    VARIES_B: tl.constexpr,
    VARIES_X: tl.constexpr,
    DTYPE: tl.constexpr,  # of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """One program per split of the samples, of the rows and of the pixels."""
    i_b_split, i_split = split_program(k_splits)
    k_start = i_split * k_per_program
    b_start = i_b_split * b_per_program
    # One block, where the compiler can see that it is one, or it takes twice the registers.
    k_stop = k_start + 1
    if MERGE_K:
        k_stop = tl.minimum(k_start + k_per_program, K)
    b_stop = b_start + 1
    if MERGE_B:
        b_stop = tl.minimum(b_start + b_per_program, B)
    x_start, x_stop = pixel_span(X, x_tiles, BLOCK_X)
    # Sums a lane each until they are complete: over the pixels of a row,
    s_row = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_X], dtype=DTYPE)  # [BLOCK_K, BLOCK_B, BLOCK_X]
    for i_x in range(x_start, x_stop, BLOCK_X):
        o_x = event_offsets(i_x, BLOCK_X, 2)  # [1, 1, BLOCK_X]
        m_x = o_x < X
        # over samples and rows,
        s_column = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_X], dtype=DTYPE)  # [BLOCK_K, BLOCK_B, BLOCK_X]
        for i_b in range(b_start, b_stop, BLOCK_B):
            o_b = event_offsets(i_b, BLOCK_B, 1)  # [1, BLOCK_B, 1]
            m_b = o_b < B
            b_x = load(p_x, o_b * stride_x_b + o_x * stride_x_x, m_b & m_x, DTYPE)
            # and over samples.
            s_x = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_X], dtype=DTYPE)  # [BLOCK_K, BLOCK_B, BLOCK_X]
            for i_k in range(k_start, k_stop, BLOCK_K):
                o_k = event_offsets(i_k, BLOCK_K, 0)  # [BLOCK_K, 1, 1]
                m_row = (o_k < K) & m_b
                mask = m_row & m_x
                o_g = o_k * stride_grad_k + o_b * stride_grad_b
                b_g = load(p_grad, o_g, m_row, DTYPE)  # [BLOCK_K, BLOCK_B, 1]
                o_m = o_k * stride_mean_k + o_b * stride_mean_b + o_x * stride_mean_x
                b_mean = load(p_mean, o_m, mask, DTYPE)
                b_logvar = load_logvar(
                    p_logvar, i_k, i_b, i_x, K, B, X,
                    stride_logvar_k, stride_logvar_b, stride_logvar_x,
                    VARIES_K, VARIES_B, VARIES_X, DTYPE, BLOCK_K, BLOCK_B, BLOCK_X,
                )  # fmt: skip
                o_out = (o_k * B + o_b) * X + o_x
                b_inverse_s = exp(-0.5 * b_logvar)
                b_white = (b_x - b_mean) * b_inverse_s
                b_part = b_g * b_white
                if p_grad_x is not None or p_grad_mean is not None:
                    b_out = b_part * b_inverse_s
                    if p_grad_mean is not None:
                        store(p_grad_mean, o_out, b_out, mask)
                    if p_grad_x is not None:
                        # Outside, g is 0, but an infinite distance would make it NaN.
                        s_x -= tl.where(m_row, b_out, 0.0)
                if LAYOUT != NONE:
                    b_out = 0.5 * (b_part * b_white - b_g)
                    if LAYOUT == FULL:
                        store(p_grad_logvar, o_out, b_out, mask)
                    elif LAYOUT == COLUMN:
                        s_column += tl.where(m_row, b_out, 0.0)
                    else:
                        s_row += tl.where(m_x, b_out, 0.0)
            if p_grad_x is not None:
                o_part = (i_split.to(tl.int64) * B + o_b) * X + o_x
                store(p_grad_x, o_part, tl.sum(s_x, axis=0, keep_dims=True), m_b & m_x)
        if LAYOUT == COLUMN:
            b_column = tl.sum(tl.sum(s_column, axis=0, keep_dims=True), axis=1, keep_dims=True)
            tl.store(p_grad_logvar + tl.program_id(0).to(tl.int64) * X + o_x, b_column, mask=m_x)
    if LAYOUT == ROW:
        o_k = event_offsets(k_start, BLOCK_K, 0)  # [BLOCK_K, 1, 1]
        o_b = event_offsets(b_start, BLOCK_B, 1)  # [1, BLOCK_B, 1]
        o_out = (tl.program_id(1).to(tl.int64) * K + o_k) * B + o_b
        mask = (o_k < K) & (o_b < B)
        tl.store(p_grad_logvar + o_out, tl.sum(s_row, axis=2, keep_dims=True), mask=mask)


def _varies(logvar: torch.Tensor) -> dict[str, bool]:
    """Along which axes the log variance has more than one value, whether it broadcasts or was expanded."""
    return {f"VARIES_{axis}": s != 0 for axis, s in zip("KBX", strides(logvar, 3), strict=True)}


def gaussian_log_prob(x: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """log N(x; mean, exp(logvar)) summed over the last axis: [K, B].

    x is [B, X], mean [K, B, X], logvar broadcastable to mean.
    """
    k, b, size = mean.shape
    dtype = accumulator(x, mean, logvar)
    if mean.numel() == 0:
        return torch.zeros((k, b), dtype=dtype, device=mean.device)
    parameters = LAUNCH["likelihood"]
    tiles = event_tiles(k, b, size, parameters.tile)
    out = torch.empty((tiles.x_splits, k, b), dtype=dtype, device=mean.device)
    launch(
        gaussian_log_prob_kernel,
        tiles.grid,
        (x, mean, logvar, out),
        (
            *(k, b, size, tiles.k_splits, tiles.x_tiles),
            *(*strides(x, 2), *strides(mean, 3), *strides(logvar, 3)),
        ),
        {**_varies(logvar), "DTYPE": triton_dtype(dtype), **tiles.blocks},
        parameters.warps(dtype),
    )
    return sum_of_parts(out)


def gaussian_log_prob_backward(
    grad: torch.Tensor, x: torch.Tensor, mean: torch.Tensor, logvar: torch.Tensor, need: list[bool]
) -> tuple[torch.Tensor | None, ...]:
    """Gradients for (x, mean, logvar), None where not needed."""
    k, b, size = mean.shape
    need_x, need_mean, need_logvar = need
    if mean.numel() == 0 or not any(need):
        return tuple(torch.zeros_like(t) if n else None for t, n in zip((x, mean, logvar), need, strict=True))
    dtype = accumulator(x, mean, logvar)
    layout = NONE
    if need_logvar:
        if logvar.shape[2] == 1 and size > 1:
            layout = ROW
        elif logvar.shape[:2] == (1, 1) and k * b > 1:
            layout = COLUMN
        else:
            layout = FULL
    # A sum over samples or rows is the shorter the more of them a program takes; a sum over a row needs one
    # block of rows.
    column = layout.value == COLUMN.value
    parameters = LAUNCH["likelihood_backward"]
    tiles = event_tiles(
        k, b, size, parameters.tile, merge_k=(need_x or column) and layout.value != ROW.value, merge_b=column
    )
    grad_x = grad_mean = grad_logvar = None
    if need_x:
        part = x.dtype if tiles.k_splits == 1 else dtype
        grad_x = torch.empty((tiles.k_splits, b, size), dtype=part, device=mean.device)
    if need_mean:
        grad_mean = torch.empty(mean.shape, dtype=mean.dtype, device=mean.device)
    if need_logvar:
        shape = {
            FULL.value: (k, b, size),
            COLUMN.value: (tiles.k_splits * tiles.b_splits, size),
            ROW.value: (tiles.x_splits, k, b),
        }[layout.value]
        whole = layout.value == FULL.value and logvar.shape == mean.shape
        grad_logvar = torch.empty(shape, dtype=logvar.dtype if whole else dtype, device=mean.device)
    launch(
        gaussian_log_prob_backward_kernel,
        tiles.grid,
        (grad, x, mean, logvar, grad_x, grad_mean, grad_logvar),
        (
            *(k, b, size, tiles.k_per_program, tiles.b_per_program, tiles.k_splits, tiles.x_tiles),
            *(*strides(grad, 2), *strides(x, 2), *strides(mean, 3), *strides(logvar, 3)),
        ),
        {
            "MERGE_K": tiles.k_per_program > tiles.block_k,
            "MERGE_B": tiles.b_per_program > tiles.block_b,
            "LAYOUT": layout.value,
            **_varies(logvar),
            "DTYPE": triton_dtype(dtype),
            **tiles.blocks,
        },
        parameters.warps(dtype),
    )
    if need_x:
        grad_x = sum_of_parts(grad_x).to(x.dtype)
    if need_logvar and not whole:
        if column:
            grad_logvar = sum_of_parts(grad_logvar).view(1, 1, size)
        elif layout.value == ROW.value:
            grad_logvar = sum_of_parts(grad_logvar)[:, :, None]
        grad_logvar = grad_logvar.sum_to_size(logvar.shape).to(logvar.dtype)
    return grad_x, grad_mean, grad_logvar
