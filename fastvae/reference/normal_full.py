"""Reparameterised sampling of a Gaussian with a full covariance, in plain PyTorch.

:mod:`fastvae.ops.normal_full` gives the mathematics. ``draw`` is the record of a draw's parameters: samples,
sample_offset, row_offset.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.special import upcast
from .random import normal

LOG_2_PI = math.log(2 * math.pi)


def _noise(seed: Tensor, draw: Any, mu: Tensor) -> Tensor:
    """Return the noise [B, K, D], the layout for batched products."""
    b, d = mu.shape
    eps = normal(seed, draw.samples, b, d, draw.sample_offset, draw.row_offset, dtype=mu.dtype)
    return eps.transpose(0, 1)


def _positions(d: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the positions of the packed entries in a matrix [D * D], and the indices of its diagonal."""
    rows, columns = torch.tril_indices(d, d, device=device)
    diagonal = torch.arange(d, device=device)
    return rows * d + columns, diagonal * (diagonal + 3) // 2


def _matrices(tril: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """Return L [B, D, D] and the logarithms of its diagonal [B, D]."""
    index, diagonal = _positions(d, tril.device)
    logs = tril[:, diagonal]
    entries = tril.index_copy(1, diagonal, torch.exp(logs))
    flat = tril.new_zeros(tril.shape[0], d * d).index_copy(1, index, entries)
    return flat.unflatten(1, (d, d)), logs


def rsample_tril(mu: Tensor, tril: Tensor, seed: Tensor, draw: Any) -> tuple[Tensor, Tensor]:
    """Return z [K, B, D] and log q(z) [K, B]."""
    dtype = mu.dtype
    mu, tril = upcast(mu, tril)
    eps = _noise(seed, draw, mu)
    scale, logs = _matrices(tril, mu.shape[1])
    z = mu + torch.bmm(eps, scale.mT).transpose(0, 1)
    log_q = -0.5 * (eps.square() + LOG_2_PI).sum(2).T - logs.sum(1)
    return z.to(dtype).contiguous(), log_q.contiguous()


def rsample_tril_backward(
    grad_z: Tensor | None,
    grad_log_q: Tensor | None,
    mu: Tensor,
    tril: Tensor,
    seed: Tensor,
    draw: Any,
    need: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return gradients for (mu, tril), None where not needed."""
    dtype, d = mu.dtype, mu.shape[1]
    mu, tril = upcast(mu, tril)
    index, diagonal = _positions(d, tril.device)
    by_mu, by_tril = torch.zeros_like(mu), torch.zeros_like(tril)
    if grad_z is not None:
        grad_z = grad_z.to(mu.dtype)
        by_mu = grad_z.sum(0)
        if need[1]:
            by_scale = torch.bmm(grad_z.permute(1, 2, 0), _noise(seed, draw, mu))
            by_tril = by_scale.flatten(1)[:, index]
            by_tril[:, diagonal] *= torch.exp(tril[:, diagonal])
    if grad_log_q is not None:
        by_tril[:, diagonal] -= grad_log_q.sum(0)[:, None]
    grads = by_mu.to(dtype).contiguous(), by_tril.to(dtype).contiguous()
    return grads[0] if need[0] else None, grads[1] if need[1] else None
