"""Closed forms of KL(q ‖ p), by the families of q and p."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from ..core.special import expm1_minus
from ..core.torch_private import kl_applies
from .base import Distribution, is_still
from .location_scale import EULER, Exponential, Gumbel, Laplace, LogNormal
from .tensors import tensors_of
from .wrapped import ELEMENTWISE, in_double, univariate

_Closed = Callable[[Any, Any], Tensor]
_LocLogScale = tuple[Tensor, Tensor]
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
    base, other_base = univariate(one), univariate(other)
    if type(base) in ELEMENTWISE and type(other_base) in ELEMENTWISE:
        # Torch expands squares of differences, which cancel for a narrow prior far from 0.
        dtype = _dtype_of(base, other_base)
        # Some of torch's formulas index with a mask of p's shape, which may be [D] where q's is [B, D].
        wide = _by_torch(in_double(one), expanded(in_double(other), one))
        return None if wide is None else wide.to(dtype)
    return _by_torch(one, other)


def _dtype_of(q: td.Distribution, p: td.Distribution) -> torch.dtype:
    """Return the dtype that torch's promotion gives to a function of both distributions' parameters."""
    parameters = [t for t in (*tensors_of(q), *tensors_of(p)) if t.is_floating_point()]
    with_axes = [t.dtype for t in parameters if t.dim()]
    return functools.reduce(torch.promote_types, with_axes or [t.dtype for t in parameters])


def expanded(p: td.Distribution, q: td.Distribution) -> td.Distribution:
    """Expand p to q's batch, where p broadcasts to it."""
    fits = p.event_shape == q.event_shape and len(p.batch_shape) <= len(q.batch_shape)
    return p.expand(q.batch_shape) if fits and p.batch_shape != q.batch_shape else p


def _by_torch(one: td.Distribution, other: td.Distribution) -> Tensor | None:
    """Return the KL of torch's registry, or None if it has none."""
    if not (kl_applies(one, 0) and kl_applies(other, 1)):
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


def difference(q: _LocLogScale, p: _LocLogScale) -> tuple[Tensor, Tensor, torch.dtype]:
    """Return loc_q − loc_p in units of p's scale, log(scale_q / scale_p), and the dtype of a KL.

    The first two are in float64, where no ratio of float32 scales overflows.

    Args:
        q: location and log scale of q, in the accumulation dtype.
        p: those of p.
    """
    (loc, log_scale), (prior_loc, prior_log_scale) = q, p
    move = (loc.double() - prior_loc) * torch.exp(-prior_log_scale.double())
    return move, log_scale.double() - prior_log_scale, torch.promote_types(loc.dtype, prior_loc.dtype)


# KL(q ‖ p) of each dimension, with r = scale_q / scale_p = eᵘ, as a sum of positive terms such as eᵗ − 1 − t:
# torch's formulas cancel where q is close to p.


@register_kl(Exponential, Exponential)
def _kl_exponential(q: Exponential, p: Exponential) -> Tensor:
    _, u, dtype = difference(q.wide(), p.wide())
    return expm1_minus(u, dtype).to(dtype)


@register_kl(LogNormal, LogNormal)
def _kl_log_normal(q: LogNormal, p: LogNormal) -> Tensor:
    move, u, dtype = difference(q.wide(), p.wide())
    return (0.5 * (expm1_minus(2 * u, dtype) + move.square())).to(dtype)


@register_kl(Laplace, Laplace)
def _kl_laplace(q: Laplace, p: Laplace) -> Tensor:
    move, u, dtype = difference(q.wide(), p.wide())
    return (expm1_minus(u, dtype) + torch.exp(u) * expm1_minus(-move.abs() * torch.exp(-u), dtype)).to(dtype)


@register_kl(Gumbel, Gumbel)
def _kl_gumbel(q: Gumbel, p: Gumbel) -> Tensor:
    move, u, dtype = difference(q.wide(), p.wide())
    # log Γ(1 + r) = (1 − γ)(r − 1) + rest, with a rest of second order that is positive, too.
    excess = torch.expm1(u)
    log_gamma = torch.lgamma(2 + excess)
    rest = log_gamma - (1 - EULER) * excess
    return (expm1_minus(u, dtype) + rest + expm1_minus(log_gamma - move, dtype)).to(dtype)
