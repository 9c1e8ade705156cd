"""Row-reduced diagonal Gaussian log-likelihood, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .latent import _upcast


def gaussian_log_prob(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log N(x; mean, exp(logvar)) summed over the last axis: x [B, X], mean [K, B, X] -> [K, B]."""
    x, mean, logvar = _upcast(x, mean, logvar)
    # exp(-logvar) itself overflows long before what it is a factor of does, here and below.
    whitened = (x - mean) * torch.exp(-0.5 * logvar)
    return -0.5 * (math.log(2 * math.pi) + logvar + whitened**2).sum(2)


def gaussian_log_prob_backward(
    grad: Tensor, x: Tensor, mean: Tensor, logvar: Tensor, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients for (x, mean, logvar), None where not needed."""
    dtypes = (x.dtype, mean.dtype, logvar.dtype)
    shape = logvar.shape
    x, mean, logvar = _upcast(x, mean, logvar)
    g = grad[:, :, None]
    inverse_s = torch.exp(-0.5 * logvar)
    whitened = (x - mean) * inverse_s
    push = g * whitened
    grad_mean = push * inverse_s
    grad_logvar = 0.5 * (push * whitened - g)
    grads = (-grad_mean.sum(0), grad_mean, grad_logvar.sum_to_size(shape))
    return tuple(v.to(d) if n else None for v, d, n in zip(grads, dtypes, need, strict=True))
