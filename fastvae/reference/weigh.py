"""The bound of a batch from the log-likelihoods of its rows, in plain PyTorch.

``how`` is the record of the reduction: coefficient, over, reduction, alpha, groups, share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .importance import log_mean_exp, log_mean_exp_backward, shift


def weigh(
    log_likelihood: Tensor,
    term: Tensor | None,
    beta: Tensor | None,
    how: Any,
    terms: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the bound, the mean log-likelihood, and the normalised weights.

    The bound is [B], or its sum or mean; the mean log-likelihood is [B], None without ``terms``; the weights
    are [K, B], None for a mean. The inputs are log_likelihood [K, B] and a term [K, B], [B] or None.
    """
    mean = log_likelihood.mean(0)
    factor = _factor(beta, how.coefficient, log_likelihood)
    if how.over == "mean":
        bound = mean
        if term is not None:
            bound = bound + times(factor, (term if term.dim() == 1 else term.mean(0)).to(mean.dtype))
        weights = None
    else:
        log_w = log_likelihood if term is None else log_likelihood + times(factor, term.to(mean.dtype))
        if how.is_plain:
            bound, *sums = log_mean_exp(log_w)
            weights = log_mean_exp_backward(torch.ones_like(bound), log_w, *sums)
        else:
            wide, grads = power_mean(log_w.double(), how.alpha, how.groups, how.share)
            bound, weights = wide.to(log_w.dtype), without_denormals(grads, log_w.dtype)
    return _reduce(bound, how.reduction), mean if terms else None, weights


def weigh_backward(
    grad_bound: Tensor | None,
    grad_mean: Tensor | None,
    weights: Tensor | None,
    beta: Tensor | None,
    how: Any,
    samples: int,
    batch: int,
    term_axes: int,
) -> tuple[Tensor, Tensor | None]:
    """Return gradients of the log-likelihoods [K, B] and of a term with ``term_axes`` axes, None for 0."""
    if grad_bound is None:
        assert grad_mean is not None
        grad_bound = grad_mean.new_zeros(())
    grad_bound = (grad_bound / batch if how.reduction == "mean" else grad_bound).expand(batch)
    if weights is not None:
        grad = torch.where(weights == 0, 0.0, without_denormals(grad_bound * weights, weights.dtype))
    else:
        grad = (grad_bound / samples).expand(samples, batch)
    grad_term = None
    if term_axes:
        # A term [B] under a mean gets the whole upstream gradient: summing K shares would round K times.
        once = grad_bound if weights is None else grad.sum(0)
        grad_term = _factor(beta, how.coefficient, grad) * (grad if term_axes == 2 else once)
    if grad_mean is not None:
        grad = grad + grad_mean / samples
    return grad, grad_term


def power_mean(
    log_w: Tensor, alpha: float | Tensor = 0.0, groups: int = 1, share: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return the power-mean bound [B] of log_w [M K, B] in float64, and its derivatives by log_w.

    The bound is the mean over groups of (1/(1 - alpha)) log (1/K) sum_k w^(1 - alpha), mixed with a share of
    the mean of the log weights. A tensor alpha [] may be 1, where the bound is that mean; a number may not.
    """
    each = log_w.unflatten(0, (groups, -1))  # [M, K, B]
    power, is_mean = 1 - alpha, None
    if isinstance(power, Tensor):
        is_mean = power == 0
        power = torch.where(is_mean, 1.0, power.to(log_w))
    scaled = power * each
    maximum = scaled.amax(1, keepdim=True)
    exps = torch.exp(scaled - shift(maximum))
    total = exps.sum(1, keepdim=True)
    bounds = (maximum + torch.log(total / each.shape[1])) / power  # [M, 1, B]
    weights = torch.where(total == 0, 0.0, exps / total)
    if is_mean is not None:
        bounds = torch.where(is_mean, each.mean(1, keepdim=True), bounds)
        weights = torch.where(is_mean, 1 / each.shape[1], weights)
    bound, weights = bounds.mean((0, 1)), weights.flatten(0, 1) / groups
    if share == 0:
        return bound, weights
    return share * log_w.mean(0) + (1 - share) * bound, share / log_w.shape[0] + (1 - share) * weights


def without_denormals(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast to another dtype, and flush values below its normal numbers to 0; NaN is kept.

    Denormals would slow the decoder's backward pass many times over.
    """
    values = torch.where(values.abs() < torch.finfo(dtype).tiny, 0.0, values)
    return values.to(dtype)


def _factor(beta: Tensor | None, coefficient: float, like: Tensor) -> float | Tensor:
    return coefficient if beta is None else coefficient * beta.to(like.dtype)


def times(factor: float | Tensor, term: Tensor) -> Tensor:
    """Return factor times term, where 0 times infinity is 0."""
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, 0.0, factor * term)
    return torch.zeros_like(term) if factor == 0 else factor * term


def _reduce(bound: Tensor, reduction: str) -> Tensor:
    return bound if reduction == "none" else bound.sum() if reduction == "sum" else bound.mean()
