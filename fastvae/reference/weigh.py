"""The bound of a batch from the log-likelihoods of its rows, in plain PyTorch.

``how`` is the record of how: coefficient, over, reduction.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .importance import log_mean_exp, log_mean_exp_backward


def weigh(
    log_likelihood: Tensor,
    term: Tensor | None,
    beta: Tensor | None,
    how: Any,
    terms: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The bound ([B], or its sum or mean), the mean log-likelihood [B] (None without ``terms``), and the
    normalised weights [K, B] (None for a mean), of log_likelihood [K, B] and a term [K, B], [B] or None.
    """
    mean = log_likelihood.mean(0)
    factor = _factor(beta, how.coefficient, log_likelihood)
    if how.over == "mean":
        bound = mean
        if term is not None:
            bound = bound + factor * (term if term.dim() == 1 else term.mean(0)).to(mean.dtype)
        weights = None
    else:
        log_w = log_likelihood if term is None else log_likelihood + factor * term.to(mean.dtype)
        bound, *sums = log_mean_exp(log_w)
        weights = log_mean_exp_backward(torch.ones_like(bound), log_w, *sums)
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
    """Gradients of the log-likelihoods [K, B], and of a term of so many axes, [K, B] or [B]; None for 0."""
    if grad_bound is None:
        assert grad_mean is not None
        grad_bound = grad_mean.new_zeros(())
    grad_bound = (grad_bound / batch if how.reduction == "mean" else grad_bound).expand(batch)
    if weights is not None:
        grad = grad_bound * weights
        # Denormals would slow the decoder's backward pass many times over.
        tiny = torch.finfo(grad.dtype).tiny
        grad = torch.where((grad.abs() < tiny) | (weights == 0), torch.zeros_like(grad), grad)
    else:
        grad = (grad_bound / samples).expand(samples, batch)
    grad_term = None
    if term_axes:
        # Of the samples' mean a term [B] gets all that arrives: the sum of K shares would round K times.
        once = grad_bound if weights is None else grad.sum(0)
        grad_term = _factor(beta, how.coefficient, grad) * (grad if term_axes == 2 else once)
    if grad_mean is not None:
        grad = grad + grad_mean / samples
    return grad, grad_term


def _factor(beta: Tensor | None, coefficient: float, like: Tensor) -> float | Tensor:
    return coefficient if beta is None else coefficient * beta.to(like.dtype)


def _reduce(bound: Tensor, reduction: str) -> Tensor:
    return bound if reduction == "none" else bound.sum() if reduction == "sum" else bound.mean()
