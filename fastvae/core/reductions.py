"""Reductions of log weights, in plain PyTorch, without NaN at infinities."""

from __future__ import annotations

import math

import torch
from torch import Tensor


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


def times(factor: float | Tensor, term: Tensor) -> Tensor:
    """Return factor times term, where 0 times infinity is 0; for the number 1 the term itself."""
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, 0.0, factor * term)
    return torch.zeros_like(term) if factor == 0 else term if factor == 1 else factor * term


def shift(maximum: Tensor) -> Tensor:
    """Return the shift before exp: the maximum, or 0 where it is infinite, as inf - inf would be NaN."""
    return torch.where(maximum.isinf(), torch.zeros_like(maximum), maximum)


def stratified_log_weights(first: int, rows: int, batch: int, dataset_size: int, like: Tensor) -> Tensor:
    """Return log weights [rows, batch] of minibatch-stratified sampling, for rows from ``first`` on.

    Row n is a draw of example n mod ``batch``. The weights are 1/N for its own posterior, (N − B + 1)/(N (B −
    1)) for the next and 1/(B − 1) for the others, with N = ``dataset_size`` and B = ``batch``.
    """
    others = batch - 1
    weights = like.new_full((rows, batch), -math.log(others))
    own = torch.arange(first, first + rows, device=like.device) % batch
    weights.scatter_(1, own[:, None], -math.log(dataset_size))
    following = (own + 1) % batch
    return weights.scatter_(
        1, following[:, None], math.log((dataset_size - others) / others) - math.log(dataset_size)
    )
