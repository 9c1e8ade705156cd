"""Log-likelihood p(x|z) of rows and its gradients, from a likelihood's declaration, in plain PyTorch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.special import upcast


def log_prob(likelihood: Any, x: Tensor, *parameters: Tensor) -> Tensor:
    """Return log p(x|z) summed over the last axis: [K, B].

    x is [B, X]; the first parameter is [K, B, X], and the others broadcast to it.
    """
    x, *wide = upcast(x, *parameters)
    value: Tensor = likelihood.value(x, *wide).sum(2)
    return value if likelihood.data is None else value + likelihood.data(x).sum(1)


def log_prob_backward(likelihood: Any, grad: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    """Return gradients for (x, *parameters), None where not needed, as the last argument says."""
    *given, need = rest
    wide, *parameters = upcast(x, *given)
    to_x, *grads = likelihood.gradient(grad[:, :, None], wide, *parameters)
    summed: list[Any] = [None if to_x is None else to_x.sum(0)]
    summed += [g.sum_to_size(p.shape) for g, p in zip(grads, given, strict=True)]
    return tuple(g.to(t.dtype) if n else None for g, t, n in zip(summed, (x, *given), need, strict=True))
