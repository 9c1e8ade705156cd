"""Row-reduced Bernoulli log-likelihood from logits, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .latent import _upcast


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """x l - softplus(l) summed over the last axis: x [B, X], logits [K, B, X] -> [K, B]."""
    x, logits = _upcast(x, logits)
    # For l > 0 the same is -(1 - x) l - log(1 + exp(-l)): no cancellation, and certain pixels (0 * inf) are
    # 0, not NaN.
    miss = torch.where(logits > 0, 1 - x, x.expand_as(logits))
    magnitude = logits.abs()
    linear = torch.where(miss == 0, torch.zeros_like(logits), miss * magnitude)
    return -(linear + torch.log1p(torch.exp(-magnitude))).sum(2)


def bernoulli_log_prob_backward(
    grad: Tensor, x: Tensor, logits: Tensor, need: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients for (x, logits), None where not needed."""
    dtypes = (x.dtype, logits.dtype)
    x, logits = _upcast(x, logits)
    g = grad[:, :, None]
    grads = ((g * logits).sum(0), g * (x - torch.sigmoid(logits)))
    return tuple(v.to(d) if n else None for v, d, n in zip(grads, dtypes, need, strict=True))
