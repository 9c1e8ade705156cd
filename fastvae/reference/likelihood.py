"""Log-likelihood p(x|z) of rows and its gradients, from a likelihood's declaration, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.special import upcast


def _observed(value: Tensor, mask: Tensor | None, other: float = 0.0) -> Tensor:
    """Return value where x was observed, and ``other`` elsewhere."""
    return value if mask is None else torch.where(mask, value, other)


def log_prob(likelihood: Any, x: Tensor, mask: Tensor | None, *parameters: Tensor) -> Tensor:
    """Return log p(x|z) summed over the last axis: [K, B].

    x is [B, X]; the first parameter is [K, B, X], and the others broadcast to it. Elements of x where the
    mask [B, X] is False count 0.
    """
    x, *wide = upcast(x, *parameters)
    x = _observed(x, mask, likelihood.inside)
    value: Tensor = _observed(likelihood.value(x, *wide), mask).sum(2)
    return value if likelihood.data is None else value + _observed(likelihood.data(x), mask).sum(1)


def log_prob_backward(
    likelihood: Any, grad: Tensor, x: Tensor, mask: Tensor | None, *rest: Any
) -> tuple[Tensor | None, ...]:
    """Return gradients for (x, *parameters), None where not needed, as the last argument says."""
    *given, need = rest
    wide, *parameters = upcast(x, *given)
    to_x, *grads = likelihood.gradient(
        grad[:, :, None], _observed(wide, mask, likelihood.inside), *parameters
    )
    grads = [_observed(g, mask) for g in grads]
    summed: list[Any] = [None if to_x is None else _observed(to_x, mask).sum(0)]
    summed += [g.sum_to_size(p.shape) for g, p in zip(grads, given, strict=True)]
    return tuple(g.to(t.dtype) if n else None for g, t, n in zip(summed, (x, *given), need, strict=True))
