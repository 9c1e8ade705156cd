"""Reduction of the samples' log-likelihoods to the bound of each row, in Triton.

See :mod:`fastvae.ops.reduce` for the mathematics. A program takes blocks of rows with all their samples: one
pass for the sums and, if the weights are needed, another for these, out of the caches. Of a small batch one
program takes all rows, and returns their sum or mean.

``how`` is the record of the reduction (:class:`fastvae.ops.reduce.BoundReduction`). Only the plain ones are
here, the mean and one log-mean-exp; groups, powers and shares run as a few small torch kernels in float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .common import LAUNCH, cdiv, load, split_program, store, strides, triton_dtype
from .elementary import exp, log, quotient
from .launching import MAX_PARTS, PARTS, Call, Result, bits_of, planned
from .logsumexp import finite_shift, next_block, tile


@triton.jit
def term_factor(p_beta, coefficient, o_b, m_b, stride_beta, UNIT: tl.constexpr, DTYPE: tl.constexpr):
    """Return the term's factor: UNIT, which is 1 or -1, or else the float64 with these bits; times beta."""
    b_factor = tl.full(o_b.shape, UNIT, dtype=DTYPE)
    if UNIT == 0:
        b_factor += coefficient.to(tl.int64).to(tl.float64, bitcast=True).to(DTYPE)
    if p_beta is not None:
        b_factor *= load(p_beta, o_b * stride_beta, m_b, DTYPE)
    return b_factor


@triton.jit
def log_weights(
    p_log_likelihood, p_term, b_factor, o_k, o_b, mask, parts, K, B, stride_k, stride_b,
    SPLIT: tl.constexpr, CACHE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Load a tile of log-likelihoods, and of the term times its factor (zero without a term)."""
    b_likelihood = load(p_log_likelihood, o_k * B + o_b, mask, DTYPE, CACHE=CACHE)
    if SPLIT:
        for i in range(1, parts, PARTS):
            for j in tl.static_range(PARTS):  # loads that do not wait for each other
                o_part = ((i + j) * K + o_k) * B + o_b
                m_part = mask & (i + j < parts)
                b_likelihood += load(p_log_likelihood, o_part, m_part, DTYPE, CACHE=CACHE)
    b_added = tl.zeros_like(b_likelihood)
    if p_term is not None:
        b_term = load(p_term, o_k * stride_k + o_b * stride_b, mask, DTYPE)
        # A factor of 0 leaves an infinite term out.
        b_added = tl.where(b_factor == 0, 0.0, b_factor * b_term)
    return b_likelihood, b_added


@triton.jit
def reduce_rows(
    p_log_likelihood, p_term, p_beta, p_bound, p_mean, p_weights, coefficient, parts, K, B, first, blocks,
    stride_k, stride_b, stride_beta, SPLIT: tl.constexpr, BATCH: tl.constexpr, UNIT: tl.constexpr,
    LOG_MEAN_EXP: tl.constexpr, CACHE: tl.constexpr, TINY: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """Reduce the samples of ``blocks`` blocks of rows, from the block ``first``.

    The arguments are those of :func:`reduce_kernel`. CACHE is ".cg" for log-likelihoods that other programs
    of the launch have written. Returns the sum, or mean, of the bounds over the rows; they are stored without
    one.
    """
    b_batch = tl.zeros([BLOCK_B, 1], dtype=DTYPE)
    b_rows = tl.zeros([BLOCK_B, 1], dtype=DTYPE) + B
    b_count = tl.zeros([BLOCK_B, 1], dtype=DTYPE) + K
    for i_b in range(first, first + blocks):
        o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]  # [BLOCK_B, 1]
        m_b = o_b < B
        b_factor = term_factor(p_beta, coefficient, o_b, m_b, stride_beta, UNIT, DTYPE)
        b_max = tl.full([BLOCK_B, 1], float("-inf"), dtype=DTYPE)
        b_sum = tl.zeros([BLOCK_B, BLOCK_K], dtype=DTYPE)  # sums of exponentials
        b_mean = tl.zeros([BLOCK_B, BLOCK_K], dtype=DTYPE)  # sums of log-likelihoods
        b_term = tl.zeros([BLOCK_B, BLOCK_K], dtype=DTYPE)
        for i_k in range(0, K, BLOCK_K):
            o_k = (i_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]  # [1, BLOCK_K]
            mask = m_b & (o_k < K)
            b_likelihood, b_added = log_weights(
                p_log_likelihood, p_term, b_factor, o_k, o_b, mask, parts, K, B, stride_k, stride_b,
                SPLIT, CACHE, DTYPE,
            )  # fmt: skip
            b_mean += b_likelihood
            b_term += b_added
            if LOG_MEAN_EXP:
                b_w = tl.where(mask, b_likelihood + b_added, float("-inf"))
                b_max, b_rescale, b_exp = next_block(b_w, b_max)
                b_sum = b_sum * b_rescale + b_exp
        b_average = quotient(tl.sum(b_mean, axis=1, keep_dims=True), b_count)  # [BLOCK_B, 1]
        if p_mean is not None:
            tl.store(p_mean + o_b, b_average, mask=m_b)
        if LOG_MEAN_EXP:
            b_total = tl.sum(b_sum, axis=1, keep_dims=True)  # [BLOCK_B, 1]
            b_max = tl.where(b_total == b_total, b_max, b_total)
            b_bound = b_max + log(b_total) - log(b_count)
            if p_weights is not None:
                b_shift = finite_shift(b_max)
                b_divisor = tl.where(b_total == 0, 1.0, b_total)
                for i_k in range(0, K, BLOCK_K):
                    o_k = (i_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
                    mask = m_b & (o_k < K)
                    b_likelihood, b_added = log_weights(
                        p_log_likelihood, p_term, b_factor, o_k, o_b, mask, parts, K, B, stride_k, stride_b,
                        SPLIT, CACHE, DTYPE,
                    )  # fmt: skip
                    b_weight = quotient(exp(b_likelihood + b_added - b_shift), b_divisor)
                    b_weight = tl.where((b_weight < TINY) | (b_total == 0), 0.0, b_weight)
                    store(p_weights, o_k * B + o_b, b_weight, mask)
        else:
            b_bound = b_average + quotient(tl.sum(b_term, axis=1, keep_dims=True), b_count)
        if BATCH == "none":
            tl.store(p_bound + o_b, b_bound, mask=m_b)
        else:
            b_batch += tl.where(m_b, b_bound, 0.0)
    if BATCH == "mean":
        b_batch = quotient(b_batch, b_rows)
    return tl.sum(tl.sum(b_batch, axis=1), axis=0)


@triton.jit(do_not_specialize=["coefficient", "parts", "K"])
def reduce_kernel(
    p_log_likelihood,  # [K, B], or with SPLIT [parts, K, B] of which it is the sum; contiguous
    p_term,  # [K, B], or [B] with no stride along the samples, or None
    p_beta,  # [B], or [] with stride 0: a factor of the term, or None for 1
    p_bound,  # [B] out; with BATCH [programs], sums over the rows of each
    p_mean,  # [B] out, the mean log-likelihood, or None
    p_weights,  # [K, B] out, contiguous, or None
    coefficient,  # the bits of a further factor, where UNIT is 0
    parts,
    K,  # samples
    B,  # rows
    blocks,  # blocks of rows of a program
    stride_k,  # strides of the term
    stride_b,
    stride_beta,
    SPLIT: tl.constexpr,
    BATCH: tl.constexpr,  # reduction over the batch: "none", "sum" or "mean"
    UNIT: tl.constexpr,  # the further factor if it is 1 or -1, else 0
    LOG_MEAN_EXP: tl.constexpr,  # reduce samples by log-mean-exp; else by their mean
    TINY: tl.constexpr,  # the smallest normal number of the computation
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Reduce the samples; one program per ``blocks`` blocks of rows."""
    b_batch = reduce_rows(
        p_log_likelihood, p_term, p_beta, p_bound, p_mean, p_weights, coefficient, parts, K, B,
        tl.program_id(0) * blocks, blocks, stride_k, stride_b, stride_beta,
        SPLIT, BATCH, UNIT, LOG_MEAN_EXP, "", TINY, DTYPE, BLOCK_K, BLOCK_B,
    )  # fmt: skip
    if BATCH != "none":
        tl.store(p_bound + tl.program_id(0), b_batch)


@triton.jit
def bound_gradient(p_grad_bound, o_b, m_b, B, stride_bound, OF_MEAN: tl.constexpr, DTYPE: tl.constexpr):
    """Load the upstream gradient of each row's bound."""
    b_bound = load(p_grad_bound, o_b * stride_bound, m_b, DTYPE)
    if OF_MEAN:
        b_bound = quotient(b_bound, tl.zeros_like(b_bound) + B)
    return b_bound


@triton.jit
def sample_gradient(p_weights, b_bound, o_k, o_b, mask, K, B, TINY: tl.constexpr, DTYPE: tl.constexpr):
    """Return the gradient of each sample's log-likelihood from that of the row's bound."""
    if p_weights is not None:
        b_weight = load(p_weights, o_k * B + o_b, mask, DTYPE)
        b_grad = b_bound * b_weight
        # NaN compares false and is kept.
        b_grad = tl.where((b_weight == 0) | (tl.abs(b_grad) < TINY), 0.0, b_grad)
    else:
        b_grad = quotient(b_bound, tl.zeros_like(b_bound) + K)
    return b_grad


@triton.jit(do_not_specialize=["coefficient", "K"], do_not_specialize_on_alignment=["k_tiles"])
def reduce_backward_kernel(
    p_grad_bound,  # upstream gradient of the bound: [B], or [] with stride 0
    p_grad_mean,  # [B] upstream gradient of the mean log-likelihood, or None
    p_weights,  # [K, B] contiguous, or None for 1 / K
    p_beta,  # [B], or [] with stride 0: a factor of the term, or None for 1
    p_grad,  # [K, B] out, contiguous: gradient of the log-likelihoods
    p_grad_term,  # [K, B] out, contiguous: gradient of a term per sample, or None
    p_grad_kl,  # [B] out: gradient of a term shared by all samples, or None
    coefficient,  # the bits of a further factor, where UNIT is 0
    K,  # samples
    B,  # rows
    k_tiles,  # blocks of samples
    stride_bound,
    stride_mean,
    stride_beta,
    OF_MEAN: tl.constexpr,  # the upstream gradient is that of the mean over the batch
    UNIT: tl.constexpr,  # the further factor if it is 1 or -1, else 0
    TINY: tl.constexpr,  # the smallest normal number of the computation
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Compute the gradients; one program per block of rows and of samples."""
    i_b, i_k = split_program(k_tiles)
    o_k = (i_k * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]  # [1, BLOCK_K]
    o_b = (i_b * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]  # [BLOCK_B, 1]
    m_b = o_b < B
    mask = m_b & (o_k < K)
    b_bound = bound_gradient(p_grad_bound, o_b, m_b, B, stride_bound, OF_MEAN, DTYPE)
    b_factor = term_factor(p_beta, coefficient, o_b, m_b, stride_beta, UNIT, DTYPE)
    b_grad = sample_gradient(p_weights, b_bound, o_k, o_b, mask, K, B, TINY, DTYPE)
    b_grad += tl.zeros([BLOCK_B, BLOCK_K], dtype=DTYPE)
    if p_grad_term is not None:
        store(p_grad_term, o_k * B + o_b, b_factor * b_grad, mask)
    if p_grad_kl is not None:
        store(p_grad_kl, o_b, b_factor * b_bound, m_b & (i_k == 0))
    if p_grad_mean is not None:
        b_mean = load(p_grad_mean, o_b * stride_mean, m_b, DTYPE)
        b_grad += quotient(b_mean, tl.zeros_like(b_mean) + K)
    store(p_grad, o_k * B + o_b, b_grad, mask)


def unit_of(how: Any) -> tuple[float, int]:
    """Return the further factor of the term if it is 1 or -1, else 0 and its bits."""
    # One that varies from call to call is of another type while a call is recorded.
    if type(how.coefficient) in (int, float) and abs(how.coefficient) == 1:
        return float(how.coefficient), 0
    return 0.0, bits_of(how.coefficient)


def on_device(beta: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """Return beta on the device: if 0-d it may be on the CPU, as for torch's operators."""
    return beta if beta is None or beta.device == like.device else beta.to(like.device)


def _stride(beta: torch.Tensor | None) -> int:
    return beta.stride(0) if beta is not None and beta.dim() else 0


def bound_strides(term: torch.Tensor | None, beta: torch.Tensor | None) -> tuple[int, int, int]:
    """Return the strides of a term, [K, B] or [B], and of beta."""
    of_term = (0, 0) if term is None else strides(term, 2) if term.dim() == 2 else (0, term.stride(0))
    return *of_term, _stride(beta)


# A bound that a likelihood's last program computes: the most elements [K, B], as the others are done by then,
# and those of a tile, as registers are few.
LAST_SIZE, LAST_TILE = 1024, 256


def bound_constants(dtype: torch.dtype, unit: float, k: int, b: int) -> dict[str, object]:
    """Return the constants of :func:`reduce_rows` in a likelihood's launch."""
    block_k, block_b = tile(k, b)
    while block_k * block_b > LAST_TILE:
        block_k, block_b = (block_k // 2, block_b) if block_k > block_b else (block_k, block_b // 2)
    constants = _constants(dtype, unit, block_k, block_b)
    return {"UNIT": unit, "TINY": constants["TINY"], "REDUCE_K": block_k, "REDUCE_B": block_b}


def _constants(dtype: torch.dtype, unit: float, block_k: int, block_b: int) -> dict[str, object]:
    return {
        "UNIT": unit,
        "TINY": torch.finfo(dtype).tiny,
        "DTYPE": triton_dtype(dtype),
        "BLOCK_K": block_k,
        "BLOCK_B": block_b,
    }


# Elements [K, B] of a program that sums the bounds of a batch.
BATCH_SIZE = 4096


@planned
def _reduce(log_likelihood, term, beta, unit, log_mean_exp, terms, batch) -> Call:
    *parts, k, b = log_likelihood.shape
    dtype = log_likelihood.dtype
    block_k, block_b = tile(k, b)
    all_blocks = cdiv(b, block_b)
    programs = all_blocks if batch == "none" else min(all_blocks, MAX_PARTS, cdiv(k * b, BATCH_SIZE))
    blocks = cdiv(all_blocks, programs)
    programs = cdiv(all_blocks, blocks)
    return Call(
        reduce_kernel,
        (programs,),
        (
            Result((b,), dtype) if batch == "none" else Result((), dtype, programs),
            Result((b,), dtype) if terms else None,
            Result((k, b), dtype) if log_mean_exp else None,
        ),
        (*(parts or (1,)), k, b, blocks, *bound_strides(term, beta)),
        {
            "SPLIT": bool(parts),
            "BATCH": batch,
            "LOG_MEAN_EXP": log_mean_exp,
            **_constants(dtype, unit, block_k, block_b),
        },
        LAUNCH["logsumexp"].warps(dtype),
    )


def reduce(
    log_likelihood: torch.Tensor,
    term: torch.Tensor | None,
    beta: torch.Tensor | None,
    how: Any,
    terms: bool,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Reduce log_likelihood [K, B] and a term ([K, B], [B] or None) over samples.

    log_likelihood may be the sum of the parts [parts, K, B].

    Returns the bound ([B], or its sum or mean), the mean log-likelihood [B] (None without ``terms``), and the
    normalised weights [K, B] (None if ``how.over`` is a mean).
    """
    k, b = log_likelihood.shape[-2:]
    log_mean_exp = how.over == "log_mean_exp"
    if b > 0:
        unit, bits = unit_of(how)
        tensors = log_likelihood, term, on_device(beta, log_likelihood)
        return _reduce(tensors, (unit, log_mean_exp, terms, how.reduction), (bits,))
    bound, mean = log_likelihood.new_empty(0), log_likelihood.new_empty(0) if terms else None
    weights = log_likelihood.new_empty((k, 0)) if log_mean_exp else None
    if how.reduction != "none":
        bound = bound.sum() if how.reduction == "sum" else bound.mean()
    return bound, mean, weights


@planned
def _gradients(grad_bound, grad_mean, weights, beta, k, b, unit, of_mean, term_axes) -> Call:
    dtype = grad_bound.dtype
    block_k, block_b = tile(k, b)
    k_tiles = cdiv(k, block_k)
    return Call(
        reduce_backward_kernel,
        (k_tiles * cdiv(b, block_b),),
        (
            Result((k, b), dtype),
            Result((k, b), dtype) if term_axes == 2 else None,
            Result((b,), dtype) if term_axes == 1 and weights is None else None,
        ),
        (
            *(k, b, k_tiles, *(strides(grad_bound, 1) if grad_bound.dim() else (0,))),
            *(*strides(grad_mean, 1), _stride(beta)),
        ),
        {"OF_MEAN": of_mean, **_constants(dtype, unit, block_k, block_b)},
        LAUNCH["logsumexp"].warps(dtype),
    )


def reduce_backward(
    grad_bound: torch.Tensor | None,
    grad_mean: torch.Tensor | None,
    weights: torch.Tensor | None,
    beta: torch.Tensor | None,
    how: Any,
    samples: int,
    batch: int,
    term_axes: int,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the gradients of the log-likelihoods [K, B] and of the term.

    ``term_axes`` is the term's number of axes: 2 for [K, B], 1 for [B], 0 for no term (gradient None).
    """
    of_mean = how.reduction == "mean"
    if grad_bound is None:
        grad_bound = grad_mean.new_zeros(())
    if samples == 0 or batch == 0:
        grad = grad_bound.new_zeros((samples, batch))
        return grad, None if term_axes == 0 else torch.zeros_like(grad) if term_axes == 2 else grad.sum(0)
    unit, bits = unit_of(how)
    settings = samples, batch, unit, of_mean, term_axes
    kept = weights if weights is None else weights.contiguous()
    beta = on_device(beta, grad_bound)
    grad, grad_term, grad_kl = _gradients((grad_bound, grad_mean, kept, beta), settings, (bits,))
    if term_axes == 1 and weights is not None:
        grad_kl = how.coefficient * grad.sum(0)
        grad_kl = grad_kl if beta is None else grad_kl * beta
    return grad, grad_kl if grad_term is None else grad_term
