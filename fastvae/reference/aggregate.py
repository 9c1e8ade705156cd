"""Aggregate posteriors and their marginals, in PyTorch. See :mod:`fastvae.ops.aggregate`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.reductions import shift, stratified_log_weights

# Elements of [N, U, D] computed at a time.
MOST = 1 << 22


def _scores(
    first: int, z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weighted scores [N, U] and [N, U, D], whitened differences [N, U, D], inverse scales [U, D]."""
    inverse = torch.exp(-0.5 * logvar)
    white = (z[:, None] - mu) * inverse
    constant = -0.5 * (logvar + math.log(2 * math.pi))
    if dataset_size:
        log_weight = stratified_log_weights(first, z.shape[0], mu.shape[0], dataset_size, z)
    else:
        log_weight = z.new_full((z.shape[0], mu.shape[0]), -math.log(mu.shape[0]))
    square = -0.5 * white.square()
    whole = log_weight + constant.sum(1) + square.sum(2)
    return whole, log_weight[:, :, None] + (constant + square), white, inverse


def _rows(mu: Tensor) -> int:
    return max(1, MOST // max(1, mu.numel()))


def aggregate_log_prob(z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int) -> tuple[Tensor, Tensor]:
    """Return log q(z) [N] and log q(z_d) [N, D] of z [N, D] and components [U, D]."""
    wholes, eaches, size = [], [], _rows(mu)
    for i, rows in enumerate(z.split(size)):
        whole, each, _, _ = _scores(i * size, rows, mu, logvar, dataset_size)
        wholes.append(torch.logsumexp(whole, 1))
        eaches.append(torch.logsumexp(each, 1))
    return torch.cat(wholes), torch.cat(eaches)


def _share(grad: Tensor, score: Tensor, log_q: Tensor) -> Tensor:
    """Return g exp(score - log q), 0 where it is below the smallest normal number or log q is infinite."""
    scale = torch.where(log_q.isinf(), 0.0, grad).unsqueeze(1)
    share = scale * torch.exp(score - shift(log_q).unsqueeze(1))
    return torch.where((scale == 0) | (share.abs() < torch.finfo(score.dtype).tiny), 0.0, share)


def aggregate_log_prob_backward(
    grad: Tensor | None,
    grad_each: Tensor | None,
    log_q: Tensor,
    log_q_each: Tensor,
    z: Tensor,
    mu: Tensor,
    logvar: Tensor,
    dataset_size: int,
    need: list[bool],
) -> tuple[Tensor | None, ...]:
    """Return gradients of (z, mu, logvar), None where not needed."""
    by_z, by_mu, by_logvar = torch.zeros_like(z), torch.zeros_like(mu), torch.zeros_like(logvar)
    size = _rows(mu)
    for first in range(0, z.shape[0], size):
        at = slice(first, first + size)
        whole, each, white, inverse = _scores(first, z[at], mu, logvar, dataset_size)
        share = torch.zeros_like(white)
        if grad_each is not None:
            share += _share(grad_each[at], each, log_q_each[at])
        if grad is not None:
            share += _share(grad[at], whole, log_q[at]).unsqueeze(2)
        slope = share * white
        by_z[at] = -(slope * inverse).sum(1)
        by_mu += (slope * inverse).sum(0)
        by_logvar += 0.5 * (slope * white - share).sum(0)
    return tuple(g if n else None for g, n in zip((by_z, by_mu, by_logvar), need, strict=True))
