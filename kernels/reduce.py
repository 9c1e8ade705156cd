"""Reduction of the samples' log-likelihoods to the bound of each row, in Triton.

See :mod:`fastvae.ops.reduce` for the mathematics. A program takes a block of rows with all their samples: one
pass for the sums and, if the weights are needed, another for these, out of the caches.

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
from .launching import Call, Result, planned
from .logsumexp import finite_shift, next_block, tile


@triton.jit
def log_weights(
    p_log_likelihood, p_term, p_factor, o_k, o_b, mask, m_b, B, stride_k, stride_b, SIGN: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Load a tile of log-likelihoods, and of the term times its factor (zero without a term)."""
    b_likelihood = load(p_log_likelihood, o_k * B + o_b, mask, DTYPE)
    b_added = tl.zeros_like(b_likelihood)
    if p_term is not None:
        b_added = SIGN * load(p_term, o_k * stride_k + o_b * stride_b, mask, DTYPE)
        if p_factor is not None:
            b_factor = load(p_factor, o_b, m_b, DTYPE)
            b_added = tl.where(b_factor == 0, 0.0, b_factor * b_added)
    return b_likelihood, b_added


@triton.jit(do_not_specialize=["K"])
def reduce_kernel(
    p_log_likelihood,  # [K, B] contiguous
    p_term,  # [K, B], or [B] with no stride along the samples, or None
    p_factor,  # [B] contiguous: the term's factor, or None for 1
    p_bound,  # [B] out
    p_mean,  # [B] out, the mean log-likelihood, or None
    p_weights,  # [K, B] out, contiguous, or None
    K,  # samples
    B,  # rows
    stride_k,  # strides of the term
    stride_b,
    SIGN: tl.constexpr,  # sign of the factor
    LOG_MEAN_EXP: tl.constexpr,  # reduce samples by log-mean-exp; else by their mean
    TINY: tl.constexpr,  # the smallest normal number of the computation
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Reduce the samples; one program per block of rows."""
    o_b = (tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)).to(tl.int64)[:, None]  # [BLOCK_B, 1]
    m_b = o_b < B
    b_max = tl.full([BLOCK_B, 1], float("-inf"), dtype=DTYPE)
    b_sum = tl.zeros([BLOCK_B, BLOCK_K], dtype=DTYPE)  # sums of exponentials
    b_mean = tl.zeros([BLOCK_B, BLOCK_K], dtype=DTYPE)  # sums of log-likelihoods
    b_term = tl.zeros([BLOCK_B, BLOCK_K], dtype=DTYPE)
    for i_k in range(0, K, BLOCK_K):
        o_k = (i_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]  # [1, BLOCK_K]
        mask = m_b & (o_k < K)
        b_likelihood, b_added = log_weights(
            p_log_likelihood, p_term, p_factor, o_k, o_b, mask, m_b, B, stride_k, stride_b, SIGN, DTYPE
        )  # fmt: skip
        b_mean += b_likelihood
        b_term += b_added
        if LOG_MEAN_EXP:
            b_w = tl.where(mask, b_likelihood + b_added, float("-inf"))
            b_max, b_rescale, b_exp = next_block(b_w, b_max)
            b_sum = b_sum * b_rescale + b_exp
    b_count = tl.zeros([BLOCK_B, 1], dtype=DTYPE) + K
    b_average = quotient(tl.sum(b_mean, axis=1, keep_dims=True), b_count)  # [BLOCK_B, 1]
    if p_mean is not None:
        tl.store(p_mean + o_b, b_average, mask=m_b)
    if LOG_MEAN_EXP:
        b_total = tl.sum(b_sum, axis=1, keep_dims=True)  # [BLOCK_B, 1]
        b_max = tl.where(b_total == b_total, b_max, b_total)
        tl.store(p_bound + o_b, b_max + log(b_total) - log(b_count), mask=m_b)
        if p_weights is not None:
            b_shift = finite_shift(b_max)
            b_divisor = tl.where(b_total == 0, 1.0, b_total)
            for i_k in range(0, K, BLOCK_K):
                o_k = (i_k + tl.arange(0, BLOCK_K)).to(tl.int64)[None, :]
                mask = m_b & (o_k < K)
                b_likelihood, b_added = log_weights(
                    p_log_likelihood, p_term, p_factor, o_k, o_b, mask, m_b, B, stride_k, stride_b, SIGN,
                    DTYPE,
                )  # fmt: skip
                b_weight = quotient(exp(b_likelihood + b_added - b_shift), b_divisor)
                b_weight = tl.where((b_weight < TINY) | (b_total == 0), 0.0, b_weight)
                store(p_weights, o_k * B + o_b, b_weight, mask)
    else:
        b_bound = b_average + quotient(tl.sum(b_term, axis=1, keep_dims=True), b_count)
        tl.store(p_bound + o_b, b_bound, mask=m_b)


@triton.jit(do_not_specialize=["K"], do_not_specialize_on_alignment=["k_tiles"])
def reduce_backward_kernel(
    p_grad_bound,  # upstream gradient of the bound: [B], or [] with stride 0
    p_grad_mean,  # [B] upstream gradient of the mean log-likelihood, or None
    p_weights,  # [K, B] contiguous, or None for 1 / K
    p_factor,  # [B] contiguous: the term's factor, or None for 1
    p_grad,  # [K, B] out, contiguous: gradient of the log-likelihoods
    p_grad_term,  # [K, B] out, contiguous: gradient of a term per sample, or None
    p_grad_kl,  # [B] out: gradient of a term shared by all samples, or None
    K,  # samples
    B,  # rows
    k_tiles,  # blocks of samples
    stride_bound,
    stride_mean,
    OF_MEAN: tl.constexpr,  # the upstream gradient is that of the mean over the batch
    SIGN: tl.constexpr,  # sign of the factor
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
    b_bound = load(p_grad_bound, o_b * stride_bound, m_b, DTYPE)
    if OF_MEAN:
        b_bound = quotient(b_bound, tl.zeros([BLOCK_B, 1], dtype=DTYPE) + B)
    b_count = tl.zeros([BLOCK_B, 1], dtype=DTYPE) + K
    if p_weights is not None:
        b_weight = load(p_weights, o_k * B + o_b, mask, DTYPE)
        b_grad = b_bound * b_weight
        # NaN compares false and is kept.
        b_grad = tl.where((b_weight == 0) | (tl.abs(b_grad) < TINY), 0.0, b_grad)
    else:
        b_grad = quotient(b_bound, b_count) + tl.zeros([BLOCK_B, BLOCK_K], dtype=DTYPE)
    if p_grad_term is not None:
        b_term = SIGN * b_grad
        if p_factor is not None:
            b_term *= load(p_factor, o_b, m_b, DTYPE)
        store(p_grad_term, o_k * B + o_b, b_term, mask)
    if p_grad_kl is not None:
        b_kl = SIGN * b_bound
        if p_factor is not None:
            b_kl *= load(p_factor, o_b, m_b, DTYPE)
        store(p_grad_kl, o_b, b_kl, m_b & (i_k == 0))
    if p_grad_mean is not None:
        b_grad += quotient(load(p_grad_mean, o_b * stride_mean, m_b, DTYPE), b_count)
    store(p_grad, o_k * B + o_b, b_grad, mask)


def _factor(beta: torch.Tensor | None, coefficient: float, like: torch.Tensor, batch: int):
    """Return the term's factor as a sign and a tensor [B], None for 1."""
    sign = -1.0 if coefficient < 0 else 1.0
    if beta is None and abs(coefficient) == 1:
        return sign, None
    if beta is None:
        return sign, like.new_full((batch,), abs(coefficient))
    # A 0-d beta may be on the CPU, as for torch's operators.
    return sign, (abs(coefficient) * beta.to(like)).expand(batch).contiguous()


def _constants(dtype: torch.dtype, sign: float, block_k: int, block_b: int) -> dict[str, object]:
    return {
        "SIGN": sign,
        "TINY": torch.finfo(dtype).tiny,
        "DTYPE": triton_dtype(dtype),
        "BLOCK_K": block_k,
        "BLOCK_B": block_b,
    }


@planned
def _reduce(log_likelihood, term, factor, sign, log_mean_exp, terms) -> Call:
    k, b = log_likelihood.shape
    dtype = log_likelihood.dtype
    stride_term = (0, 0) if term is None else strides(term, 2) if term.dim() == 2 else (0, term.stride(0))
    block_k, block_b = tile(k, b)
    return Call(
        reduce_kernel,
        (cdiv(b, block_b),),
        (
            Result((b,), dtype),
            Result((b,), dtype) if terms else None,
            Result((k, b), dtype) if log_mean_exp else None,
        ),
        (k, b, *stride_term),
        {"LOG_MEAN_EXP": log_mean_exp, **_constants(dtype, sign, block_k, block_b)},
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

    Returns the bound ([B], or its sum or mean), the mean log-likelihood [B] (None without ``terms``), and the
    normalised weights [K, B] (None if ``how.over`` is a mean).
    """
    k, b = log_likelihood.shape
    log_mean_exp = how.over == "log_mean_exp"
    sign, factor = _factor(beta, how.coefficient, log_likelihood, b)
    if b > 0:
        bound, mean, weights = _reduce((log_likelihood, term, factor), (sign, log_mean_exp, terms))
    else:
        bound, mean = log_likelihood.new_empty(0), log_likelihood.new_empty(0) if terms else None
        weights = log_likelihood.new_empty((k, 0)) if log_mean_exp else None
    if how.reduction != "none":
        bound = bound.sum() if how.reduction == "sum" else bound.mean()
    return bound, mean, weights


@planned
def _gradients(grad_bound, grad_mean, weights, factor, k, b, sign, of_mean, term_axes) -> Call:
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
        (k, b, k_tiles, *(strides(grad_bound, 1) if grad_bound.dim() else (0,)), *strides(grad_mean, 1)),
        {"OF_MEAN": of_mean, **_constants(dtype, sign, block_k, block_b)},
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
    sign, factor = _factor(beta, how.coefficient, grad_bound, batch)
    settings = samples, batch, sign, of_mean, term_axes
    kept = weights if weights is None else weights.contiguous()
    grad, grad_term, grad_kl = _gradients((grad_bound, grad_mean, kept, factor), settings)
    if term_axes == 1 and weights is not None:
        grad_kl = sign * grad.sum(0) if factor is None else sign * factor * grad.sum(0)
    return grad, grad_kl if grad_term is None else grad_term
