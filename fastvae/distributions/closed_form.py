"""Closed forms of KL(q ‖ p), by the families of q and p."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch import distributions as td

from .base import Distribution, is_still
from .wrapped import univariate

_Closed = Callable[[Any, Any], Tensor]
_closed: dict[tuple[type, type], _Closed] = {}


def register_kl(q: type[Distribution], p: type[Distribution]) -> Callable[[_Closed], _Closed]:
    r"""Register a closed form of KL(q ‖ p) for two families, as ``torch.distributions.register_kl`` does.

    The function takes the two distributions and returns the KL of each dimension [B, D], or its sum [B]. It
    is also used for subclasses that override neither ``log_prob`` nor ``rsample_log_prob``.

    Args:
        q: family of the posterior.
        p: family of the prior.

    Example:
        >>> import torch, fastvae
        >>> class Laplace(fastvae.distributions.Distribution):
        ...     pass
        >>> @fastvae.distributions.register_kl(fastvae.distributions.DiagonalNormal, Laplace)
        ... def _(q, p):
        ...     return torch.zeros_like(q.mu)
    """

    for family in (q, p):
        if not (isinstance(family, type) and issubclass(family, Distribution)):
            raise TypeError(
                f"register_kl takes subclasses of fastvae.distributions.Distribution, got {family!r}; for "
                "families of torch.distributions use torch.distributions.register_kl, which is asked too"
            )

    def register(function: _Closed) -> _Closed:
        _closed[q, p] = function
        return function

    return register


def closed_kl(q: Distribution, p: Distribution) -> Tensor | None:
    """Return KL(q ‖ p), [B, D] or [B], or None if there is no closed form."""
    for a in type(q).__mro__:
        for b in type(p).__mro__:
            function = _closed.get((a, b))
            if function is not None and is_still(q, a) and is_still(p, b):
                kl = function(q, p)
                if kl is None:
                    raise TypeError(
                        f"the registered KL of {a.__name__} and {b.__name__} returned None; expected a "
                        "tensor, [B, D] or [B]"
                    )
                return kl
    one, other = q.as_torch(), p.as_torch()
    if one is None or other is None:
        return None
    try:
        return td.kl_divergence(one, other)
    except NotImplementedError:
        pass
    # Torch knows Independent(Laplace) with another Independent alone; elements of both are independent.
    base, other_base = univariate(one), univariate(other)
    unknown = base is one and other_base is other
    if unknown or base.event_shape or other_base.event_shape:
        return None
    try:
        return td.kl_divergence(base, other_base)
    except NotImplementedError:
        return None
