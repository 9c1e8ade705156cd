"""Row-reduced diagonal Gaussian log-likelihood, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .latent import _upcast


def gaussian_log_prob(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    """log N(x; mean, exp(logvar)) summed over the last axis: x [B, X], mean [K, B, X] -> [K, B]."""
    x, mean, logvar = _upcast(x, mean, logvar)
    delta = x - mean
    return -0.5 * (math.log(2 * math.pi) + logvar + delta**2 * torch.exp(-logvar)).sum(2)


def gaussian_log_prob_backward(
    grad: Tensor, x: Tensor, mean: Tensor, logvar: Tensor, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients for (x, mean, logvar), None where not needed."""
    dtypes = (x.dtype, mean.dtype, logvar.dtype)
    shape = logvar.shape
    x, mean, logvar = _upcast(x, mean, logvar)
    g = grad[:, :, None]
    precision = torch.exp(-logvar)
    delta = x - mean
    grad_mean = g * delta * precision
    grad_logvar = 0.5 * g * (delta**2 * precision - 1)
    grads = (-grad_mean.sum(0), grad_mean, grad_logvar.sum_to_size(shape))
    return tuple(v.to(d) if n else None for v, d, n in zip(grads, dtypes, need, strict=True))
