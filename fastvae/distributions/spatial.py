"""Latents with several axes [*latent], such as a convolutional encoder's channels, rows and columns.

Distributions in this shape are converted to distributions over flat z [D], which the rest of fastvae uses.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from ..core.checks import shape_of
from .base import Distribution, is_family
from .covariance import FullNormal, LowRankNormal
from .normal import SCALE, DiagonalNormal, diagonal
from .wrapped import ELEMENTWISE, TorchDistribution, univariate


class _Flattened(td.TransformedDistribution):
    """Distribution of any other family, with flattened draws."""

    @property
    def mean(self) -> Tensor:
        (shape,) = self.transforms
        return shape(self.base_dist.mean)  # type: ignore[no-any-return]

    @property
    def variance(self) -> Tensor:
        (shape,) = self.transforms
        return shape(self.base_dist.variance)  # type: ignore[no-any-return]

    def entropy(self) -> Tensor:
        value: Tensor = self.base_dist.entropy()
        return value.flatten(len(self.batch_shape)).sum(-1) if value.dim() > len(self.batch_shape) else value


def _flat(
    d: td.Distribution, latent: tuple[int, ...], lead: tuple[int, ...], q: Distribution | None = None
) -> td.Distribution:
    """Return a distribution of shape [*lead, D] for one that broadcasts to [*lead, *latent].

    A prior shares q's reshape transform, so that its own transforms recognise q's draws in their caches.
    """
    size, inner = math.prod(latent), univariate(d)
    if type(inner) in ELEMENTWISE:
        names: Any = inner.arg_constraints
        parameters = {n: getattr(inner, n).expand(*lead, *latent).reshape(*lead, size) for n in names}
        flat = type(inner)(**parameters, validate_args=False)
        flat._validate_args = inner._validate_args
        return flat
    batch = (*lead, *latent[: len(latent) - len(inner.event_shape)])
    whole = inner if inner.batch_shape == batch else inner.expand(batch)
    of_q = q.distribution if isinstance(q, TorchDistribution) else None
    if isinstance(of_q, _Flattened) and q is not None and q.latent == latent:
        (shape,) = of_q.transforms
    else:
        shape = td.transforms.ReshapeTransform(torch.Size(latent), torch.Size((size,)), cache_size=1)
    return _Flattened(whole, [shape], validate_args=False)


def flat_posterior(q: TorchDistribution) -> TorchDistribution:
    """Flatten a posterior [B, *latent] to [B, D]; its ``latent`` records the shape."""
    d = q.distribution
    batch, *latent = *d.batch_shape, *d.event_shape
    flat = TorchDistribution(_flat(d, tuple(latent), (batch,)))
    flat.latent, flat.z_dtype = tuple(latent), q.z_dtype
    return flat


def flat_prior(
    p: Distribution, latent: tuple[int, ...], batch: int, q: Distribution | None = None
) -> Distribution:
    """Return the prior for flat z [B, D] whose latents have this shape.

    It is returned unchanged if its parameters are [D] or [B, D], and flattened if they broadcast to [B,
    *latent].

    Raises:
        ValueError: if they fit neither shape.
    """
    if p.latent is not None and p.latent != latent:
        raise ValueError(
            f"the prior has latents of the shape {list(p.latent)}, but q has {list(latent)}; they must be "
            "equal"
        )
    if isinstance(p, DiagonalNormal):
        parts = [("mean", p.mu), ("logvar", p.logvar)]
        if all([_is_flat(v.shape, latent) for _, v in parts]):
            return p
        mu, logvar = (_flat_part(name, v, latent, batch) for name, v in parts)
        return p.of(mu, logvar)
    correlated = is_family(p, FullNormal) or is_family(p, LowRankNormal)
    if is_family(p, TorchDistribution) or correlated:
        d: td.Distribution = p.as_torch()  # type: ignore[assignment]
        shape = (*d.batch_shape, *d.event_shape)
        if _is_flat(shape, latent):
            return p
        lead, event = _lead(shape, latent, batch), tuple(d.event_shape)
        if lead is None or len(event) > len(latent) or (event and latent[-len(event) :] != event):
            name = f"prior, a {type(d).__name__} with event shape {list(event)},"
            raise _does_not_fit(name, list(shape), latent, batch)
        flat = _flat(d, latent, lead, q)
        if type(flat) is td.Normal:
            if p.z_dtype is not None:
                return diagonal(flat.loc.to(p.z_dtype), flat.scale.to(p.z_dtype), SCALE)
            return diagonal(flat.loc, 2 * flat.scale.log())
        return TorchDistribution(flat)
    return p


def _is_flat(shape: Any, latent: tuple[int, ...]) -> bool:
    return len(shape) == 0 or (len(shape) <= 2 and shape[-1] == math.prod(latent))


def _lead(shape: Any, latent: tuple[int, ...], batch: int) -> tuple[int, ...] | None:
    """Return a shape's batch axis, () if it has none, or None if it does not broadcast to [B, *latent]."""
    whole = (batch, *latent)
    if len(shape) > len(whole) or not all([n in (1, m) for n, m in zip(shape[::-1], whole[::-1])]):  # noqa: B905
        return None
    return tuple(shape[: len(shape) - len(latent)]) if len(shape) == len(whole) else ()


def _flat_part(name: str, value: Tensor, latent: tuple[int, ...], batch: int) -> Tensor:
    if _is_flat(value.shape, latent):
        return value
    lead = _lead(value.shape, latent, batch)
    if lead is None:
        raise _does_not_fit(f"prior {name}", shape_of(value), latent, batch)
    return value.expand(*lead, *latent).reshape(*lead, math.prod(latent))


def _does_not_fit(name: str, came: Any, latent: tuple[int, ...], batch: int) -> ValueError:
    return ValueError(
        f"{name} has shape {came}, which does not broadcast to [B, *latent] = {[batch, *latent]}, the shape "
        f"of q's latents; nor is it flat, [D] = [{math.prod(latent)}]"
    )
