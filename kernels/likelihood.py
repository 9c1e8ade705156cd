"""Likelihood engine in Triton: log p(x|z) of rows, summed over the event, and its gradients.

A likelihood is a few scalar functions in a file of :mod:`fastvae.kernels.likelihoods`; iteration,
broadcasting, dtypes, sums and launches are written once, here. A tile is [BLOCK_K, BLOCK_B, BLOCK_X]: samples
that share x, rows, pixels. A parameter's tile has size 1 along the axes over which it does not vary, so
functions of it alone are computed once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from .common import (
    EventTiles,
    accumulator,
    event_offsets,
    event_tiles,
    load,
    pixel_span,
    split_program,
    store,
    strides,
    triton_dtype,
)
from .elementary import log1p, log1p_of_odds, odds_of_both
from .launching import Call, Result, fixed, planned
from .likelihood_flat import bound_backward, flat_gradients, is_flat
from .likelihood_parameters import (
    ALONG_ALL,
    ALONG_B,
    ALONG_K,
    ALONG_X,
    COLUMN,
    FULL,
    MAX_PARAMETERS,
    NONE,
    ROW,
    all_parameters,
    described,
    launching_of,
    observed,
    scalar_functions,
)
from .reduce import LAST_SIZE, bound_constants, bound_strides, on_device, reduce_rows, unit_of

# Maximum tiles of a row per program where logarithms are shared: the product of four factors of up to 2 from
# each tile must stay below 2^127.
MAX_TILES = 28
# Parts of a row that the reduction adds itself, which takes less time than another launch.
MAX_ADDED = 16
# Elements of a launch that also computes the bound. It takes more registers, which costs a larger one more
# time than a second launch does.
MAX_ELEMENTS = 2**20


__all__ = ["bound_backward", "log_prob", "log_prob_backward", "log_prob_bound"]


@triton.jit
def load_parameter(
    p_p, i_k, i_b, i_x, K, B, X, stride_k, stride_b, stride_x, VARIES: tl.constexpr, PADDING: tl.constexpr,
    DTYPE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """Load a parameter's tile [BLOCK_K or 1, BLOCK_B or 1, BLOCK_X or 1]; PADDING beyond the bounds."""
    o_k = event_offsets(i_k if ALONG_K & VARIES else 0, BLOCK_K if ALONG_K & VARIES else 1, 0)
    o_b = event_offsets(i_b if ALONG_B & VARIES else 0, BLOCK_B if ALONG_B & VARIES else 1, 1)
    o_x = event_offsets(i_x if ALONG_X & VARIES else 0, BLOCK_X if ALONG_X & VARIES else 1, 2)
    mask = (o_k < K) & ((o_b < B) & (o_x < X))
    return load(p_p, o_k * stride_k + o_b * stride_b + o_x * stride_x, mask, DTYPE, PADDING)


@triton.jit
def value_of_tile(
    b_x, b_0, b_1, b_2, OUTPUTS: tl.constexpr,
    VALUE: tl.constexpr, DATA: tl.constexpr, SHARED_LOG: tl.constexpr,
):  # fmt: skip
    """Return the terms of a tile of log p(x|z) / FACTOR, and the odds whose log1p is a part of them.

    Without SHARED_LOG the odds are the terms again, to be ignored. b_1 and b_2 are ignored beyond OUTPUTS.
    """
    b_data = b_x
    if DATA is not None:
        # Depends on x alone: computed once for all samples of the tile.
        b_data_value, b_data = DATA(b_x)
    if OUTPUTS == 1:
        b_value = VALUE(b_x, b_data, b_0)
    elif OUTPUTS == 2:
        b_value = VALUE(b_x, b_data, b_0, b_1)
    else:
        b_value = VALUE(b_x, b_data, b_0, b_1, b_2)
    if SHARED_LOG:
        b_value, b_odds = b_value
    if DATA is not None:
        b_value += b_data_value
    if not SHARED_LOG:
        b_odds = b_value
    return b_value, b_odds


@triton.jit(
    do_not_specialize=["coefficient", "K", "B", "x_tiles"], do_not_specialize_on_alignment=["k_splits"]
)
def log_prob_kernel(
    p_x,  # [B, X] data, of any type
    p_mask,  # [B, X] bool, True where x was observed, or None
    p_p0,  # [K or 1, B or 1, X or 1] the parameters; None beyond the last
    p_p1,
    p_p2,
    p_term,  # for a bound, which the last program computes: [K, B], or [B], or None
    p_beta,  # [B], or [] with stride 0: a factor of the term, or None for 1
    p_counter,  # [1] int32, zero, of programs that have finished; None without a bound
    p_out,  # [x_splits, K, B] out, contiguous: partial log-likelihoods
    p_bound,  # [B] out, or [] for the sum or mean over the batch
    p_weights,  # [K, B] out, contiguous, or None
    coefficient,  # the bits of a further factor of the term, where UNIT is 0
    K,  # samples
    B,  # rows
    X,  # pixels
    k_splits,  # programs along the samples
    x_tiles,  # blocks of pixels of one program
    stride_x_b,
    stride_x_x,
    stride_mask_b,
    stride_mask_x,
    stride_0_k,
    stride_0_b,
    stride_0_x,
    stride_1_k,
    stride_1_b,
    stride_1_x,
    stride_2_k,
    stride_2_b,
    stride_2_x,
    stride_term_k,
    stride_term_b,
    stride_beta,
    VARIES_1: tl.constexpr,
    VARIES_2: tl.constexpr,
    BATCH: tl.constexpr,  # as UNIT to REDUCE_B for a bound: see fastvae.kernels.reduce
    UNIT: tl.constexpr,
    LOG_MEAN_EXP: tl.constexpr,
    TINY: tl.constexpr,
    REDUCE_K: tl.constexpr,
    REDUCE_B: tl.constexpr,
    VALUE: tl.constexpr,  # the likelihood's functions, see fastvae.kernels.likelihoods
    DATA: tl.constexpr,
    FACTOR: tl.constexpr,
    SHARED_LOG: tl.constexpr,
    PADDING: tl.constexpr,
    INSIDE: tl.constexpr,  # an x in the support
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Compute log p(x|z); one program per block of samples and rows, and split of the pixels.

    With a counter, the last program to finish reduces all of them to the bound, in an order that does not
    depend on which program that is.
    """
    i_b, i_k = split_program(k_splits)
    i_k *= BLOCK_K
    i_b *= BLOCK_B
    x_start, x_stop = pixel_span(X, x_tiles, BLOCK_X)
    # The terms log(1 + odds) of four pixels, over all tiles of a row, become one logarithm of a product.
    PRODUCT: tl.constexpr = SHARED_LOG and tl.float32 == DTYPE and BLOCK_X >= 4
    LANES: tl.constexpr = BLOCK_X // 4 if PRODUCT else BLOCK_X
    b_sum = tl.zeros([BLOCK_K, BLOCK_B, LANES], dtype=DTYPE)  # [BLOCK_K, BLOCK_B, LANES]
    if PRODUCT:
        b_product = tl.zeros([BLOCK_K, BLOCK_B, LANES], dtype=DTYPE)  # [BLOCK_K, BLOCK_B, LANES]
    o_k = event_offsets(i_k, BLOCK_K, 0)  # [BLOCK_K, 1, 1]
    o_b = event_offsets(i_b, BLOCK_B, 1)  # [1, BLOCK_B, 1]
    for i_x in range(x_start, x_stop, BLOCK_X):
        o_x = event_offsets(i_x, BLOCK_X, 2)  # [1, 1, BLOCK_X]
        m_x = o_x < X
        b_x = load(p_x, o_b * stride_x_b + o_x * stride_x_x, (o_b < B) & m_x, DTYPE)
        if p_mask is not None:
            o_mask = o_b * stride_mask_b + o_x * stride_mask_x
            b_x, m_seen = observed(p_mask, o_mask, b_x, (o_b < B) & m_x, INSIDE)
        b_0 = load_parameter(
            p_p0, i_k, i_b, i_x, K, B, X, stride_0_k, stride_0_b, stride_0_x,
            ALONG_ALL, 0.0 if PADDING is None else PADDING, DTYPE, BLOCK_K, BLOCK_B, BLOCK_X,
        )  # fmt: skip
        b_1, b_2 = b_0, b_0
        if p_p1 is not None:
            b_1 = load_parameter(
                p_p1, i_k, i_b, i_x, K, B, X, stride_1_k, stride_1_b, stride_1_x, VARIES_1, 0.0, DTYPE,
                BLOCK_K, BLOCK_B, BLOCK_X,
            )  # fmt: skip
        if p_p2 is not None:
            b_2 = load_parameter(
                p_p2, i_k, i_b, i_x, K, B, X, stride_2_k, stride_2_b, stride_2_x, VARIES_2, 0.0, DTYPE,
                BLOCK_K, BLOCK_B, BLOCK_X,
            )  # fmt: skip
        OUTPUTS: tl.constexpr = 1 + (p_p1 is not None) + (p_p2 is not None)
        b_value, b_odds = value_of_tile(b_x, b_0, b_1, b_2, OUTPUTS, VALUE, DATA, SHARED_LOG)
        if p_mask is not None:
            b_value = tl.where(m_seen, b_value, 0.0)
            if SHARED_LOG:
                b_odds = tl.where(m_seen, b_odds, 0.0)
        elif PADDING is None:
            b_value = tl.where(m_x, b_value, 0.0)
            if SHARED_LOG:
                b_odds = tl.where(m_x, b_odds, 0.0)
        if PRODUCT:
            b_value, b_more = tl.split(tl.reshape(b_value, [BLOCK_K, BLOCK_B, LANES, 2, 2]))
            b_value, b_more = tl.split(b_value + b_more)
            b_sum += b_value + b_more
            b_odds, b_more = tl.split(tl.reshape(b_odds, [BLOCK_K, BLOCK_B, LANES, 2, 2]))
            b_odds, b_more = tl.split(odds_of_both(b_odds, b_more))
            b_product = odds_of_both(b_product, odds_of_both(b_odds, b_more))
        elif SHARED_LOG:
            b_sum += b_value + log1p(b_odds)
        else:
            b_sum += b_value
    if PRODUCT:
        b_sum += log1p_of_odds(b_product)
    o_out = (tl.program_id(1).to(tl.int64) * K + o_k) * B + o_b
    tl.store(p_out + o_out, FACTOR * tl.sum(b_sum, axis=2, keep_dims=True), mask=(o_k < K) & (o_b < B))
    if p_counter is not None:
        # All threads have stored before one of them counts the program, which releases the stores to the
        # device, and acquires those of the programs counted before.
        tl.debug_barrier()
        finished = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu")
        if finished == tl.num_programs(0) * tl.num_programs(1) - 1:
            tl.debug_barrier()
            b_batch = reduce_rows(
                p_out, p_term, p_beta, p_bound, None, p_weights, coefficient, tl.num_programs(1), K, B,
                0, (B + REDUCE_B - 1) // REDUCE_B, stride_term_k, stride_term_b, stride_beta,
                True, BATCH, UNIT, LOG_MEAN_EXP, ".cg", TINY, DTYPE, REDUCE_K, REDUCE_B,
            )  # fmt: skip
            if BATCH != "none":
                tl.store(p_bound, b_batch)
            tl.store(p_counter, 0)


@triton.jit
def store_or_add(p_grad, s_grad, b_grad, o_out, m_row, m_x, m_full, LAYOUT: tl.constexpr):
    """Store a tile of a parameter's gradient, or add it to the per-lane sums; return the sums."""
    if LAYOUT == FULL:
        store(p_grad, o_out, b_grad, m_full)
    # Beyond the rows g is 0, but its factor may be infinite.
    elif LAYOUT == COLUMN:
        s_grad += tl.where(m_row, b_grad, 0.0)
    elif LAYOUT == ROW:
        s_grad += tl.where(m_x, b_grad, 0.0)
    return s_grad


@triton.jit
def store_column_sums(p_grad, s_grad, o_x, X, LAYOUT: tl.constexpr):
    """Store the sums over samples and rows, complete for these pixels; return them reset to zero."""
    if LAYOUT == COLUMN:
        b_sum = tl.sum(tl.sum(s_grad, axis=0, keep_dims=True), axis=1, keep_dims=True)
        tl.store(p_grad + tl.program_id(0).to(tl.int64) * X + o_x, b_sum, mask=o_x < X)
        s_grad = tl.zeros_like(s_grad)
    return s_grad


@triton.jit
def store_row_sums(p_grad, s_grad, o_k, o_b, K, B, LAYOUT: tl.constexpr):
    """Store the sums over the pixels of each row."""
    if LAYOUT == ROW:
        o_out = (tl.program_id(1).to(tl.int64) * K + o_k) * B + o_b
        tl.store(p_grad + o_out, tl.sum(s_grad, axis=2, keep_dims=True), mask=(o_k < K) & (o_b < B))


@triton.jit(
    do_not_specialize=["K", "B", "k_per_program", "b_per_program", "x_tiles"],
    do_not_specialize_on_alignment=["k_splits", "stride_grad_k", "stride_grad_b"],
)
def log_prob_backward_kernel(
    p_grad,  # [K, B] gradient of the log-likelihood
    p_x,  # [B, X] data, of any type
    p_mask,  # [B, X] bool, True where x was observed, or None
    p_p0,  # [K or 1, B or 1, X or 1] the parameters; None beyond the last
    p_p1,
    p_p2,
    p_grad_x,  # [k_splits, B, X] out, contiguous, or None where not needed
    p_grad_p0,  # out, contiguous: FULL [K, B, X], COLUMN [k_splits * b_splits, X], ROW [x_splits, K, B]
    p_grad_p1,
    p_grad_p2,
    K,  # samples
    B,  # rows
    X,  # pixels
    k_per_program,  # samples of one program; with ROW one block
    b_per_program,  # rows of one program; with ROW one block
    k_splits,  # programs along the samples
    x_tiles,  # blocks of pixels of one program
    stride_grad_k,
    stride_grad_b,
    stride_x_b,
    stride_x_x,
    stride_mask_b,
    stride_mask_x,
    stride_0_k,
    stride_0_b,
    stride_0_x,
    stride_1_k,
    stride_1_b,
    stride_1_x,
    stride_2_k,
    stride_2_b,
    stride_2_x,
    MERGE_K: tl.constexpr,  # a program takes more than one block of samples
    MERGE_B: tl.constexpr,  # a program takes more than one block of rows
    LAYOUT_0: tl.constexpr,  # layout of the parameter's gradient: NONE, FULL, COLUMN or ROW
    LAYOUT_1: tl.constexpr,
    LAYOUT_2: tl.constexpr,
    VARIES_1: tl.constexpr,
    VARIES_2: tl.constexpr,
    GRADIENT: tl.constexpr,  # the likelihood's function, see fastvae.kernels.likelihoods
    FINITE: tl.constexpr,
    INSIDE: tl.constexpr,  # an x in the support
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """Compute the gradients; one program per split of the samples, of the rows and of the pixels."""
    i_b_split, i_split = split_program(k_splits)
    k_start = i_split * k_per_program
    b_start = i_b_split * b_per_program
    # A single block is made visible to the compiler, which otherwise takes twice the registers.
    k_stop = k_start + 1
    if MERGE_K:
        k_stop = tl.minimum(k_start + k_per_program, K)
    b_stop = b_start + 1
    if MERGE_B:
        b_stop = tl.minimum(b_start + b_per_program, B)
    x_start, x_stop = pixel_span(X, x_tiles, BLOCK_X)
    # Per-lane sums until complete: over the pixels of a row, or over samples and rows.
    s_0 = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_X], dtype=DTYPE)  # [BLOCK_K, BLOCK_B, BLOCK_X]
    s_1 = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_X], dtype=DTYPE)  # [BLOCK_K, BLOCK_B, BLOCK_X]
    s_2 = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_X], dtype=DTYPE)  # [BLOCK_K, BLOCK_B, BLOCK_X]
    for i_x in range(x_start, x_stop, BLOCK_X):
        o_x = event_offsets(i_x, BLOCK_X, 2)  # [1, 1, BLOCK_X]
        m_x = o_x < X
        for i_b in range(b_start, b_stop, BLOCK_B):
            o_b = event_offsets(i_b, BLOCK_B, 1)  # [1, BLOCK_B, 1]
            m_b = o_b < B
            m_bx = m_b & m_x
            b_x = load(p_x, o_b * stride_x_b + o_x * stride_x_x, m_bx, DTYPE)
            if p_mask is not None:
                o_mask = o_b * stride_mask_b + o_x * stride_mask_x
                b_x, m_seen = observed(p_mask, o_mask, b_x, m_bx, INSIDE)
            # The gradient of x is summed over samples.
            s_x = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_X], dtype=DTYPE)  # [BLOCK_K, BLOCK_B, BLOCK_X]
            for i_k in range(k_start, k_stop, BLOCK_K):
                o_k = event_offsets(i_k, BLOCK_K, 0)  # [BLOCK_K, 1, 1]
                m_row = (o_k < K) & m_b
                o_g = o_k * stride_grad_k + o_b * stride_grad_b
                b_g = load(p_grad, o_g, m_row, DTYPE)  # [BLOCK_K, BLOCK_B, 1]
                b_0 = load_parameter(
                    p_p0, i_k, i_b, i_x, K, B, X, stride_0_k, stride_0_b, stride_0_x, ALONG_ALL, 0.0, DTYPE,
                    BLOCK_K, BLOCK_B, BLOCK_X,
                )  # fmt: skip
                if p_p1 is not None:
                    b_1 = load_parameter(
                        p_p1, i_k, i_b, i_x, K, B, X, stride_1_k, stride_1_b, stride_1_x, VARIES_1, 0.0,
                        DTYPE, BLOCK_K, BLOCK_B, BLOCK_X,
                    )  # fmt: skip
                if p_p2 is not None:
                    b_2 = load_parameter(
                        p_p2, i_k, i_b, i_x, K, B, X, stride_2_k, stride_2_b, stride_2_x, VARIES_2, 0.0,
                        DTYPE, BLOCK_K, BLOCK_B, BLOCK_X,
                    )  # fmt: skip
                if p_p1 is None:
                    b_grads = GRADIENT(b_g, b_x, b_0)
                elif p_p2 is None:
                    b_grads = GRADIENT(b_g, b_x, b_0, b_1)
                else:
                    b_grads = GRADIENT(b_g, b_x, b_0, b_1, b_2)
                o_out = (o_k * B + o_b) * X + o_x
                if p_grad_x is not None:
                    b_to_x = b_grads[0]
                    if p_mask is not None:
                        b_to_x = tl.where(m_seen, b_to_x, 0.0)
                    s_x += b_to_x if FINITE else tl.where(m_row, b_to_x, 0.0)
                b_to_0 = b_grads[1]
                if p_mask is not None:
                    b_to_0 = tl.where(m_seen, b_to_0, 0.0)
                s_0 = store_or_add(p_grad_p0, s_0, b_to_0, o_out, m_row, m_x, (o_k < K) & m_bx, LAYOUT_0)
                if p_p1 is not None:
                    b_to_1 = b_grads[2]
                    if p_mask is not None:
                        b_to_1 = tl.where(m_seen, b_to_1, 0.0)
                    s_1 = store_or_add(p_grad_p1, s_1, b_to_1, o_out, m_row, m_x, (o_k < K) & m_bx, LAYOUT_1)
                if p_p2 is not None:
                    b_to_2 = b_grads[3]
                    if p_mask is not None:
                        b_to_2 = tl.where(m_seen, b_to_2, 0.0)
                    s_2 = store_or_add(p_grad_p2, s_2, b_to_2, o_out, m_row, m_x, (o_k < K) & m_bx, LAYOUT_2)
            if p_grad_x is not None:
                o_part = (i_split.to(tl.int64) * B + o_b) * X + o_x
                store(p_grad_x, o_part, tl.sum(s_x, axis=0, keep_dims=True), m_b & m_x)
        s_0 = store_column_sums(p_grad_p0, s_0, o_x, X, LAYOUT_0)
        s_1 = store_column_sums(p_grad_p1, s_1, o_x, X, LAYOUT_1)
        s_2 = store_column_sums(p_grad_p2, s_2, o_x, X, LAYOUT_2)
    o_k = event_offsets(k_start, BLOCK_K, 0)  # [BLOCK_K, 1, 1]
    o_b = event_offsets(b_start, BLOCK_B, 1)  # [1, BLOCK_B, 1]
    store_row_sums(p_grad_p0, s_0, o_k, o_b, K, B, LAYOUT_0)
    store_row_sums(p_grad_p1, s_1, o_k, o_b, K, B, LAYOUT_1)
    store_row_sums(p_grad_p2, s_2, o_k, o_b, K, B, LAYOUT_2)


def _tiles(likelihood: Any, shape: torch.Size, masked: bool) -> EventTiles:
    """Return the tiles of log p(x|z) for a first parameter of this shape."""
    max_tiles = MAX_TILES if scalar_functions(likelihood.name)[0]["SHARED_LOG"] else 0
    return event_tiles(*shape, launching_of(likelihood, False, masked).tile, max_tiles=max_tiles)


def _rows(x, mask, given, likelihood, results, bound_numbers, bound_constants, varying, left_out) -> Call:
    """Plan the launch for its results, which are rows alone, or parts of them and a bound."""
    k, b, size = given[0].shape
    dtype = accumulator(x, *given)
    tiles = _tiles(likelihood, given[0].shape, mask is not None)
    numbers, varies = described(all_parameters(tuple(given)))
    return Call(
        log_prob_kernel,
        tiles.grid,
        results,
        (
            *((0,) if not varying else ()),
            *(k, b, fixed(size), tiles.k_splits, tiles.x_tiles),
            *(*map(fixed, (*strides(x, 2), *strides(mask, 2))), *numbers, *bound_numbers),
        ),
        {
            **varies,
            **bound_constants,
            **scalar_functions(likelihood.name)[0],
            "INSIDE": float(likelihood.inside),
            "DTYPE": triton_dtype(dtype),
            **tiles.blocks,
        },
        launching_of(likelihood, False, mask is not None).warps(dtype),
        left_out,
    )


_NO_BOUND = {"BATCH": "none", "UNIT": 0, "LOG_MEAN_EXP": False, "TINY": 0.0, "REDUCE_K": 1, "REDUCE_B": 1}


@planned
def _log_prob(x, mask, *rest) -> Call:
    *given, likelihood, in_parts = rest
    k, b, _ = given[0].shape
    dtype, splits = accumulator(x, *given), _tiles(likelihood, given[0].shape, mask is not None).x_splits
    in_parts = in_parts and 1 < splits <= MAX_ADDED
    rows = Result((splits, k, b), dtype) if in_parts else Result((k, b), dtype, splits)
    left_out = MAX_PARAMETERS - len(given) + 3  # the bound's inputs are not given, either
    return _rows(x, mask, given, likelihood, (rows, None, None), (0, 0, 0), _NO_BOUND, False, left_out)


@planned
def _bound(x, _, p_0, p_1, p_2, term, beta, counter, likelihood, unit, log_mean_exp, batch) -> Call:
    given = [p for p in (p_0, p_1, p_2) if p is not None]
    k, b, _ = p_0.shape
    dtype = accumulator(x, *given)
    results = (
        Result((_tiles(likelihood, p_0.shape, False).x_splits, k, b), dtype),
        Result((b,) if batch == "none" else (), dtype),
        Result((k, b), dtype) if log_mean_exp else None,
    )
    constants = bound_constants(dtype, unit, k, b) | {"BATCH": batch, "LOG_MEAN_EXP": log_mean_exp}
    if not torch.version.hip:
        # Left to itself, NVIDIA's assembler spills some bytes to use fewer.
        constants["maxnreg"] = 255 if dtype == torch.float64 else 128
    return _rows(x, None, given, likelihood, results, bound_strides(term, beta), constants, True, 0)


def log_prob(
    likelihood: Any,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    *parameters: torch.Tensor,
    in_parts: bool = False,
) -> torch.Tensor:
    """Return log p(x|z) summed over the last axis: [K, B].

    x is [B, X]; the first parameter is [K, B, X], the others broadcast to it. Elements of x where the mask
    [B, X] is False count 0. With ``in_parts`` the result may be [parts, K, B], whose sum is log p(x|z).
    """
    first = parameters[0]
    if first.numel() == 0:
        return x.new_zeros(first.shape[:2], dtype=accumulator(x, *parameters))
    return _log_prob((x, mask, *parameters), (likelihood, in_parts))[0]


def log_prob_bound(
    likelihood: Any,
    x: torch.Tensor,
    parameters: Sequence[torch.Tensor],
    term: torch.Tensor | None,
    beta: torch.Tensor | None,
    how: Any,
    counter: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Return the bound and the weights by the launch of its rows, None if that does not apply.

    Args:
        likelihood: the declared likelihood.
        x: data [B, X], all of it observed.
        parameters: [K, B, X], the others broadcast to it.
        term: [K, B], [B] or None.
        beta: factor of the term, [B] or [], or None for 1.
        how: the reduction (:class:`fastvae.ops.reduce.BoundReduction`).
        counter: [1] int32, zero, and zero afterwards.
    """
    first = parameters[0]
    k, b, _ = first.shape
    if not how.is_plain or k * b > LAST_SIZE or not 0 < first.numel() <= MAX_ELEMENTS:
        return None
    if _tiles(likelihood, first.shape, False).x_splits > MAX_ADDED:
        return None
    unit, bits = unit_of(how)
    tensors = x, None, *all_parameters(tuple(parameters)), term, on_device(beta, first), counter
    settings = likelihood, unit, how.over == "log_mean_exp", how.reduction
    _, bound, weights = _bound(tensors, settings, (bits,))
    return bound, weights


def _layout(parameter: torch.Tensor | None, needed: bool, k: int, b: int, size: int) -> int:
    """Return the layout of a parameter's gradient."""
    if not needed:
        return NONE.value
    if parameter.shape[2] == 1 and size > 1:
        return ROW.value
    return COLUMN.value if parameter.shape[:2] == (1, 1) and k * b > 1 else FULL.value


@planned
def _gradients(grad, x, mask, *rest) -> Call:
    *given, likelihood, need = rest
    k, b, size = given[0].shape
    dtype = accumulator(x, *given)
    parameters = all_parameters(tuple(given))
    needed = [*need[1:], *[False] * (MAX_PARAMETERS - len(given))]
    layouts = [_layout(p, n, k, b, size) for p, n in zip(parameters, needed, strict=True)]
    if is_flat(parameters, layouts, need[0]):
        return flat_gradients(grad, x, mask, parameters, likelihood, needed)
    # The more samples or rows a program takes, the fewer parts remain to be summed; a sum over a row's pixels
    # needs one block of rows.
    column, row = COLUMN.value in layouts, ROW.value in layouts
    launching = launching_of(likelihood, True)
    merged = {"merge_k": (need[0] or column) and not row, "merge_b": column and not row}
    tiles = event_tiles(k, b, size, launching.tile, **merged)
    results: list[Result | None] = [Result((b, size), x.dtype, tiles.k_splits, dtype) if need[0] else None]
    for p, layout in zip(parameters, layouts, strict=True):
        if layout == NONE.value:
            results.append(None)
        elif layout == COLUMN.value:
            results.append(Result((size,), dtype, tiles.k_splits * tiles.b_splits))
        elif layout == ROW.value:
            results.append(Result((k, b), dtype, tiles.x_splits))
        else:
            results.append(Result((k, b, size), p.dtype if p.shape == (k, b, size) else dtype))
    numbers, varies = described(parameters)
    return Call(
        log_prob_backward_kernel,
        tiles.grid,
        tuple(results),
        (
            *(k, b, fixed(size), tiles.k_per_program, tiles.b_per_program, tiles.k_splits, tiles.x_tiles),
            *(*strides(grad, 2), *map(fixed, (*strides(x, 2), *strides(mask, 2))), *numbers),
        ),
        {
            "MERGE_K": tiles.k_per_program > tiles.block_k,
            "MERGE_B": tiles.b_per_program > tiles.block_b,
            **{f"LAYOUT_{i}": layout for i, layout in enumerate(layouts)},
            **varies,
            **scalar_functions(likelihood.name)[1],
            "INSIDE": float(likelihood.inside),
            "DTYPE": triton_dtype(dtype),
            **tiles.blocks,
        },
        launching.warps(dtype),
        MAX_PARAMETERS - len(given),
    )


def log_prob_backward(
    likelihood: Any, grad: torch.Tensor, x: torch.Tensor, mask: torch.Tensor | None, *rest: Any
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of (x, *parameters), None where the last argument, ``need``, is False."""
    *given, need = rest
    if given[0].numel() == 0 or not any(need):
        return tuple(torch.zeros_like(t) if n else None for t, n in zip((x, *given), need, strict=True))
    grad_x, *grads = _gradients((grad, x, mask, *given), (likelihood, tuple(need)))
    return grad_x, *(
        g if g is None or g.shape == p.shape else _sum_to_shape_of(g, p)
        for g, p in zip(grads, given, strict=False)
    )


def _sum_to_shape_of(grad: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """Reduce a kernel's gradient ([K, B, X], [K, B] for one per row, or [X]) to the parameter's shape."""
    if grad.dim() < 3:
        grad = grad[:, :, None] if grad.dim() == 2 else grad[None, None]
    return grad.sum_to_size(parameter.shape).to(parameter.dtype)
