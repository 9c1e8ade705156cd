"""Priors p(z)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td

from . import random
from ._checks import check_same_device, check_tensor

__all__ = ["DiagonalNormal", "Prior", "StandardNormal", "as_prior"]


class Prior(nn.Module):
    """What the objectives and ``VAE.sample`` ask of p(z); a module, so that a learned prior's parameters are
    found.
    """

    def sample(self, n: int, dim: int, *, device=None, generator: torch.Generator | None = None) -> Tensor:
        """Draw z [n, dim]."""
        raise NotImplementedError


class StandardNormal(Prior):
    """p(z) = N(0, I), the default.

    Example:
        >>> import fastvae
        >>> fastvae.StandardNormal().sample(5, 2).shape
        torch.Size([5, 2])
    """

    def sample(self, n, dim, *, device=None, generator=None):
        return random.normal(random.draw_seed(device or "cpu", generator), 1, n, dim)[0]


class DiagonalNormal(Prior):
    r"""p(z) = N(mu, diag exp(logvar)), fixed or learned.

    Args:
        mu, logvar: mean and log variance, each broadcastable to [B, D]; ``nn.Parameter`` for a learned prior,
            tensors [B, D] that a network computed for a conditional one.

    Raises:
        TypeError, ValueError: if they are not floating-point tensors on one device.

    Example:
        >>> import torch, fastvae
        >>> mu, logvar = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        >>> prior = fastvae.DiagonalNormal(mu, logvar)
        >>> len(list(prior.parameters()))
        2
    """

    def __init__(self, mu: Tensor, logvar: Tensor):
        super().__init__()
        check_tensor("prior mu", mu)
        check_tensor("prior logvar", logvar)
        check_same_device("prior logvar", logvar, "prior mu", mu)
        for name, value in (("mu", mu), ("logvar", logvar)):
            if isinstance(value, nn.Parameter):
                setattr(self, name, value)
            elif value.requires_grad:
                # Computed by a network: no state of ours, and it must stay in its graph.
                self.__dict__[name] = value
            else:
                self.register_buffer(name, value)

    @property
    def per_row(self) -> bool:
        """Whether each row of the batch has its own."""
        return any(v.dim() > 1 and v.shape[0] > 1 for v in (self.mu, self.logvar))

    def sample(self, n, dim, *, device=None, generator=None):
        eps = random.normal(random.draw_seed(self.mu.device, generator), 1, n, dim)[0]
        return self.mu + torch.exp(0.5 * self.logvar) * eps


_NAMES = {"standard_normal": StandardNormal}
# It has no state; making a module costs more than the kernels of a small batch.
STANDARD = StandardNormal()


def as_prior(prior: Any) -> Prior:
    """None or "standard_normal", a prior object, or a Normal / Independent(Normal)."""
    if prior is None:
        return STANDARD
    if isinstance(prior, Prior):
        return prior
    if isinstance(prior, str):
        if prior not in _NAMES:
            raise ValueError(
                f"prior={prior!r} is unknown; known: {', '.join(map(repr, _NAMES))}, or a prior object"
            )
        return _NAMES[prior]()
    if isinstance(prior, td.Independent) and prior.reinterpreted_batch_ndims == 1:
        prior = prior.base_dist
    if isinstance(prior, td.Normal):
        return DiagonalNormal(prior.loc, 2 * prior.scale.log())
    raise TypeError(
        f"prior must be None for N(0, I), a name ({', '.join(map(repr, _NAMES))}), "
        f"fastvae.DiagonalNormal(mu, logvar), or a torch.distributions.Normal; got {type(prior).__name__}"
    )
