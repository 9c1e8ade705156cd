"""Mixtures of diagonal normal distributions, in PyTorch; :mod:`fastvae.ops.mixture` gives the mathematics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.reductions import shift

# Elements of [N, U, D] computed at a time.
MOST = 1 << 22


def _scores(z: Tensor, mu: Tensor, logvar: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return s [N, U], whitened differences [N, U, D] and inverse scales [U, D]."""
    inverse = torch.exp(-0.5 * logvar)
    white = (z[:, None] - mu) * inverse
    constant = log_weight - 0.5 * (logvar + math.log(2 * math.pi)).sum(1)
    return constant - 0.5 * white.square().sum(2), white, inverse


def _rows(mu: Tensor) -> int:
    return max(1, MOST // max(1, mu.numel()))


def mixture_log_prob(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p [N], the maximum max_u s, and sum_u exp(s - maximum).

    The inputs are z [N, D] and components [U, D], [U, D], [U].
    """
    if z.shape[0] == 0:
        return tuple(z.new_empty(0) for _ in range(3))  # type: ignore[return-value]
    maxima, totals = [], []
    for rows in z.split(_rows(mu)):
        s, _, _ = _scores(rows, mu, logvar, log_weight)
        maxima.append(s.amax(1))
        totals.append(torch.exp(s - shift(maxima[-1])[:, None]).sum(1))
    maximum, total = torch.cat(maxima), torch.cat(totals)
    return maximum + torch.log(total), maximum, total


def mixture_log_prob_backward(
    grad: Tensor,
    maximum: Tensor,
    total: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_weight: Tensor,
    need: list[bool],
) -> tuple[Tensor | None, ...]:
    """Return gradients of (z, mu, logvar, log_weight), None where not needed."""
    tiny = torch.finfo(z.dtype).tiny
    by_z = []
    by_mu, by_logvar, by_weight = torch.zeros_like(mu), torch.zeros_like(logvar), torch.zeros_like(log_weight)
    parts = (t.split(_rows(mu)) for t in (z, grad, maximum, total))
    for rows, g, m, n in zip(*parts, strict=True):
        s, white, inverse = _scores(rows, mu, logvar, log_weight)
        scale = torch.where(n == 0, 0.0, g / n)[:, None]
        r = scale * torch.exp(s - shift(m)[:, None])
        r = torch.where((scale == 0) | (r.abs() < tiny), 0.0, r)[:, :, None]
        slope = r * white
        by_z.append(-(slope * inverse).sum(1))
        by_mu += (slope * inverse).sum(0)
        by_logvar += 0.5 * (slope * white - r).sum(0)
        by_weight += r.sum((0, 2))
    grads = torch.cat(by_z) if by_z else torch.zeros_like(z), by_mu, by_logvar, by_weight
    return tuple(g if n else None for g, n in zip(grads, need, strict=True))
