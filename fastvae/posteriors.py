"""Approximate posteriors q(z|x): what the encoder's output means."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from . import ops
from ._checks import check_logvar_range, check_same_device, check_same_shape, check_tensor
from .priors import DiagonalNormal, Prior, StandardNormal

__all__ = ["DiagonalGaussian", "Posterior", "as_posterior"]


class Posterior:
    """What the objectives ask of q(z|x). Subclass it for families that fastvae does not have yet.

    ``batch`` is the number of rows B, ``device`` where they lie. Both methods take a prior object and an
    int64 ``seed``, and draw samples [K, B, D] addressed by (seed, ``sample_offset`` + k, ``row_offset`` + b).
    """

    batch: int
    device: torch.device

    def rsample_kl(
        self, prior: Prior, *, samples: int, seed: Tensor, per_dimension: bool = False
    ) -> tuple[Tensor, Tensor]:
        """z [K, B, D] and KL(q || prior) in closed form, [B] or [B, D]."""
        raise NotImplementedError(f"{type(self).__name__} has no analytic KL; use kl='mc'")

    def rsample_log_ratio(
        self,
        prior: Prior,
        *,
        samples: int,
        seed: Tensor,
        estimator: str = "iwae",
        sample_offset: int = 0,
        row_offset: int = 0,
        chunk: bool = False,
    ) -> tuple[Tensor, ...]:
        """z [K, B, D] and log p(z) - log q(z|x) [K, B]; with ``chunk`` also the zeros [B] that
        :func:`fastvae.ops.rsample_log_ratio` tells of.
        """
        raise NotImplementedError

    def rows(self, start: int, stop: int) -> Posterior | None:
        """The posterior of these rows alone, or None where that is not known."""
        return None


class DiagonalGaussian(Posterior):
    r"""q(z|x) = N(mu, diag exp(logvar)), the posterior that a pair ``(mu, logvar)`` stands for.

    Args:
        mu, logvar: mean and log variance, each [B, D].
        logvar_range: clamp logvar to (lo, hi), with zero gradient outside. Default: no clamp.

    Raises:
        TypeError, ValueError: if they are not two floating-point tensors of one shape [B, D] on one device.

    Example:
        >>> import torch, fastvae
        >>> q = fastvae.DiagonalGaussian(torch.zeros(4, 2), torch.zeros(4, 2), logvar_range=(-10.0, 10.0))
        >>> q.batch
        4
    """

    def __init__(self, mu: Tensor, logvar: Tensor, *, logvar_range: tuple[float, float] | None = None):
        self.mu = check_tensor("mu", mu, 2, "[B, D]")
        self.logvar = check_tensor("logvar", logvar, 2, "[B, D]")
        check_same_shape("logvar", logvar, "mu", mu)
        check_same_device("logvar", logvar, "mu", mu)
        check_logvar_range(logvar_range)
        self.logvar_range = logvar_range

    @property
    def batch(self) -> int:
        return self.mu.shape[0]

    @property
    def device(self) -> torch.device:
        return self.mu.device

    def rows(self, start, stop):
        if type(self) is not DiagonalGaussian:
            return None
        return DiagonalGaussian(self.mu[start:stop], self.logvar[start:stop], logvar_range=self.logvar_range)

    def rsample_kl(self, prior, *, samples, seed, per_dimension=False):
        return ops.rsample_kl(
            self.mu,
            self.logvar,
            samples=samples,
            prior=_normal_parts(prior),
            logvar_range=self.logvar_range,
            per_dimension=per_dimension,
            seed=seed,
        )

    def rsample_log_ratio(
        self, prior, *, samples, seed, estimator="iwae", sample_offset=0, row_offset=0, chunk=False
    ):
        return ops.rsample_log_ratio(
            self.mu,
            self.logvar,
            samples=samples,
            prior=_normal_parts(prior),
            estimator=estimator,
            logvar_range=self.logvar_range,
            seed=seed,
            sample_offset=sample_offset,
            row_offset=row_offset,
            chunk=chunk,
        )


def _normal_parts(prior: Prior) -> tuple[Tensor, Tensor] | None:
    if isinstance(prior, StandardNormal):
        return None
    if isinstance(prior, DiagonalNormal):
        return prior.mu, prior.logvar
    raise TypeError(f"a diagonal Gaussian posterior has no fused op for the prior {type(prior).__name__}")


def as_posterior(q: Any) -> Posterior:
    """Read what an encoder returned: a pair (mu, logvar), a Normal or Independent(Normal), or a posterior
    object.
    """
    if isinstance(q, Posterior):
        return q
    if isinstance(q, td.Independent) and q.reinterpreted_batch_ndims == 1:
        q = q.base_dist
    if isinstance(q, td.Normal):
        return DiagonalGaussian(q.loc, 2 * q.scale.log())
    if isinstance(q, (tuple, list)) and len(q) == 2:
        return DiagonalGaussian(*q)
    came = f"a {type(q).__name__} of length {len(q)}" if isinstance(q, (tuple, list)) else type(q).__name__
    hint = "; a tensor [B, 2 D] is split by q.chunk(2, dim=1)" if isinstance(q, Tensor) else ""
    raise TypeError(
        "q must be a pair (mu, logvar) of tensors [B, D], a torch.distributions.Normal, an "
        f"Independent(Normal, 1), or a fastvae posterior; got {came}{hint}"
    )
