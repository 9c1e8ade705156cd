"""Reparameterised sampling with analytic KL or with log p(z) - log q(z|x), in plain PyTorch.

``draw`` is the record of a draw's parameters: samples, sample_offset, row_offset, logvar_min, logvar_max, and
the meaning of ``logvar``: scale, floor.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.special import expm1_minus, upcast
from ..core.spread import spread
from ..core.torch_private import is_traced_on_gpu
from .random import normal


def _noise(seed, draw, mu):
    if is_traced_on_gpu(mu):
        # Inductor would inline all rounds into each other if it computed with a constant seed.
        seed = seed | (mu[0, 0].isnan() & False)
    return normal(seed, draw.samples, *mu.shape, draw.sample_offset, draw.row_offset, dtype=mu.dtype)  # type: ignore[call-arg, misc]


def _parts(mu, logvar, prior_mu, prior_logvar, draw):
    """Return the upcast mu, q's spread, and the prior's mean and log variance (zeros for N(0, I))."""
    mu, logvar, prior_mu, prior_logvar = upcast(mu, logvar, prior_mu, prior_logvar)
    zero = torch.zeros((), dtype=mu.dtype, device=mu.device)
    return (
        mu,
        spread(logvar, draw),
        zero if prior_mu is None else prior_mu,
        zero if prior_logvar is None else prior_logvar,
    )


def rsample_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor,
    draw: Any,
    per_dimension: bool,
) -> tuple[Tensor, Tensor]:
    """Return z [K, B, D] and KL(q || p) [B], or [B, D] with ``per_dimension``."""
    dtype = mu.dtype
    mu, q, prior_mu, prior_logvar = _parts(mu, logvar, prior_mu, prior_logvar, draw)
    eps = _noise(seed, draw, mu)
    z = mu + q.sigma * eps
    whitened = (mu - prior_mu) * torch.exp(-0.5 * prior_logvar)
    kl = 0.5 * (whitened**2 + expm1_minus(q.logvar - prior_logvar))
    return z.to(dtype), kl if per_dimension else kl.sum(1)


def rsample_kl_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor,
    draw: Any,
    need: list[bool],
) -> tuple[Tensor | None, ...]:
    """Return gradients for (mu, logvar, prior_mu, prior_logvar), None where not needed."""
    dtypes = [None if t is None else t.dtype for t in (mu, logvar, prior_mu, prior_logvar)]
    shape = mu.shape
    mu, q, prior_mu, prior_logvar = _parts(mu, logvar, prior_mu, prior_logvar, draw)
    grads = [torch.zeros(shape, dtype=mu.dtype, device=mu.device) for _ in range(4)]
    if grad_z is not None:
        eps = _noise(seed, draw, mu)
        grad_z = grad_z.to(mu.dtype)
        grads[0] += grad_z.sum(0)
        grads[1] += (grad_z * eps).sum(0) * 0.5 * q.sigma
    if grad_kl is not None:
        grad_kl = grad_kl if grad_kl.dim() == 2 else grad_kl[:, None]
        # One factor 1 / s at a time, here and below: 1 / s^2 overflows long before the product does.
        # Zero upstream gradient gives zero gradient, even where the KL is infinite.
        none = grad_kl == 0
        inverse_s = torch.where(none, 0.0, torch.exp(-0.5 * prior_logvar))
        whitened = torch.where(none, 0.0, (mu - prior_mu) * inverse_s)
        ratio = torch.where(none, 0.0, torch.expm1(q.logvar - prior_logvar))
        push = grad_kl * whitened
        grads[0] += push * inverse_s
        grads[1] += grad_kl * 0.5 * ratio
        grads[2] -= push * inverse_s
        grads[3] -= 0.5 * (grad_kl * ratio + push * whitened)
    return _finish(grads, q, dtypes, need)


def rsample_log_ratio(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor,
    draw: Any,
    estimator: str,
) -> tuple[Tensor, Tensor]:
    """Return z [K, B, D] and log p(z) - log q(z|x) [K, B]; the estimator affects the backward pass only."""
    dtype = mu.dtype
    mu, q, prior_mu, prior_logvar = _parts(mu, logvar, prior_mu, prior_logvar, draw)
    eps = _noise(seed, draw, mu)
    z = mu + q.sigma * eps
    whitened = (z - prior_mu) * torch.exp(-0.5 * prior_logvar)
    return z.to(dtype), 0.5 * (eps**2 - whitened**2 + q.logvar - prior_logvar).sum(2)


def rsample_log_ratio_backward(
    grad_z: Tensor | None,
    grad_log_ratio: Tensor | None,
    weight: Tensor | None,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
    seed: Tensor,
    draw: Any,
    path: bool,
    need: list[bool],
) -> tuple[Tensor | None, ...]:
    """Return gradients for (mu, logvar, prior_mu, prior_logvar), None where not needed.

    With ``path``, log q's own dependence on (mu, logvar) is dropped (sticking the landing). ``weight`` [K, B]
    multiplies the gradients of mu and logvar, and no others (DReG).
    """
    dtypes = [None if t is None else t.dtype for t in (mu, logvar, prior_mu, prior_logvar)]
    shape = mu.shape
    mu, q, prior_mu, prior_logvar = _parts(mu, logvar, prior_mu, prior_logvar, draw)
    eps = _noise(seed, draw, mu)
    grads = [torch.zeros(shape, dtype=mu.dtype, device=mu.device) for _ in range(4)]
    # The gradient of z, and its product with sigma / 2, each accumulated by factors: either may overflow
    # where the other does not.
    grad_sample = torch.zeros_like(eps) if grad_z is None else grad_z.to(mu.dtype)
    half_sigma = 0.5 * q.sigma
    grad_scaled = grad_sample * half_sigma
    entropy = None
    if grad_log_ratio is not None:
        g = grad_log_ratio[:, :, None]
        inverse_s = torch.exp(-0.5 * prior_logvar)
        # Zero upstream gradient gives zero gradient, however distant the sample.
        whitened = torch.where(g == 0, 0.0, (mu + q.sigma * eps - prior_mu) * inverse_s)
        push = g * whitened
        grad_sample = grad_sample - push * inverse_s
        grad_scaled = grad_scaled - push * (half_sigma * inverse_s)
        if path:
            grad_sample = grad_sample + g * eps * q.inverse_sigma
            grad_scaled = grad_scaled + 0.5 * g * eps
        else:
            entropy = g if weight is None else g * weight[:, :, None]
        grads[2] += (push * inverse_s).sum(0)
        grads[3] += (0.5 * (push * whitened - g)).sum(0)
    if weight is not None:
        grad_sample = grad_sample * weight[:, :, None]
        grad_scaled = grad_scaled * weight[:, :, None]
    grads[0] += grad_sample.sum(0)
    grads[1] += (grad_scaled * eps).sum(0)
    if entropy is not None:
        grads[1] += 0.5 * entropy.sum(0)
    return _finish(grads, q, dtypes, need)


def _finish(grads, q, dtypes, need):
    grads[1] = torch.where(q.chain == 0, torch.zeros_like(grads[1]), grads[1] * q.chain)
    return tuple(g.to(d) if n else None for g, d, n in zip(grads, dtypes, need, strict=True))
