"""The bound of a batch from the log-likelihoods of its rows, in plain PyTorch.

``how`` is the record of the reduction: coefficient, over, reduction, alpha, groups, share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.reductions import power_mean, times, without_denormals
from .logsumexp import log_mean_exp, log_mean_exp_backward


def reduce(
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


def reduce_backward(
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


def _factor(beta: Tensor | None, coefficient: float, like: Tensor) -> float | Tensor:
    return coefficient if beta is None else coefficient * beta.to(like.dtype)


def _reduce(bound: Tensor, reduction: str) -> Tensor:
    return bound if reduction == "none" else bound.sum() if reduction == "sum" else bound.mean()
