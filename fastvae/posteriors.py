"""Approximate posteriors q(z|x): what the encoder's output means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from . import ops
from ._checks import (
    are_rows,
    check_logvar_range,
    check_result,
    check_same_device,
    check_same_shape,
    check_tensor,
    shape_of,
)
from .ops.latent import flat_kl, flat_log_ratio
from .priors import STANDARD, DiagonalNormal, Prior, StandardNormal

__all__ = ["DiagonalGaussian", "Posterior", "as_posterior"]


class Posterior:
    """What the objectives ask of q(z|x). Subclass it for families that fastvae does not have yet.

    ``batch`` is the number of rows B, ``device`` where they lie. Both methods take a prior object and an
    int64 ``seed``, and draw samples [K, B, D] addressed by (seed, ``sample_offset`` + k, ``row_offset`` + b).
    What they return is checked: floating-point tensors of these shapes, on ``device``. An offset of 0 may be
    left out of the call.
    """

    batch: int
    device: torch.device

    def rsample_kl(
        self,
        prior: Prior,
        *,
        samples: int,
        seed: Tensor,
        per_dimension: bool = False,
        row_offset: int = 0,
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
        self.mu, self.logvar, self.logvar_range = mu, logvar, logvar_range
        if logvar_range is None and are_rows(mu, logvar):
            return
        if isinstance(mu, Tensor) and mu.dim() > 2:
            raise ValueError(
                f"mu has shape {shape_of(mu)}; expected [B, D], that is 2 axes. Flatten latents that have "
                "axes of their own, mu.flatten(1) and logvar.flatten(1), and begin the decoder with "
                f"torch.nn.Unflatten(1, {tuple(mu.shape[1:])})"
            )
        check_tensor("mu", mu, 2, "[B, D]")
        check_tensor("logvar", logvar, 2, "[B, D]")
        check_same_shape("logvar", logvar, "mu", mu)
        check_same_device("logvar", logvar, "mu", mu)
        check_logvar_range(logvar_range)

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

    def rsample_kl(self, prior, *, samples, seed, per_dimension=False, row_offset=0):
        return ops.rsample_kl(
            self.mu,
            self.logvar,
            samples=samples,
            prior=_normal_parts(prior),
            logvar_range=self.logvar_range,
            per_dimension=per_dimension,
            seed=seed,
            row_offset=row_offset,
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


def diagonal(mu: Tensor, logvar: Tensor) -> DiagonalGaussian:
    """The posterior of a pair that has been checked."""
    q = DiagonalGaussian.__new__(DiagonalGaussian)
    q.mu, q.logvar, q.logvar_range = mu, logvar, None
    return q


# What a decoder takes: z [K·B, D] as the ops write it, without a view.


def draw_kl(
    q: Posterior, prior: Prior, samples: int, seed: Tensor, row_offset: int, per_dimension: bool = False
) -> tuple[Tensor, Tensor]:
    """z [K·B, D] and the KL by ``q.rsample_kl``, its results checked where they are not fastvae's own."""
    if type(q) is DiagonalGaussian:
        parts = None if prior is STANDARD else _normal_parts(prior)
        return flat_kl((q.mu, q.logvar, q.logvar_range), parts, seed, samples, row_offset, per_dimension)
    options = _offset(row_offset)
    z, kl = q.rsample_kl(prior, samples=samples, seed=seed, per_dimension=per_dimension, **options)
    _check_draws(q, "rsample_kl", z, samples)
    if per_dimension:
        axes, shape, fix = "[B, D]", (q.batch, z.shape[2]), "per_dimension=True asks for each dimension's"
    else:
        axes, shape, fix = "[B]", (q.batch,), "sum over the latent dimensions, not over the batch"
    check_result(q, "rsample_kl", "the KL", kl, axes, shape, q.device, fix)
    return z.flatten(0, 1), kl


def draw_ratio(
    q: Posterior, prior: Prior, samples: int, seed: Tensor, row_offset: int, estimator: str = "iwae"
) -> tuple[Tensor, Tensor]:
    """z [K·B, D] and the log-ratio [K, B] by ``q.rsample_log_ratio``, likewise."""
    if type(q) is DiagonalGaussian:
        parts = None if prior is STANDARD else _normal_parts(prior)
        return flat_log_ratio((q.mu, q.logvar, q.logvar_range), parts, seed, samples, row_offset, estimator)
    options = _offset(row_offset)
    z, log_ratio = draw_log_ratio(q, prior, samples=samples, seed=seed, estimator=estimator, **options)[:2]
    return z.flatten(0, 1), log_ratio


def _offset(row_offset: int) -> dict[str, int]:
    """As an option of a draw; none for 0, so that a posterior that knows none need not take it."""
    return {"row_offset": row_offset} if row_offset else {}


def draw_log_ratio(q: Posterior, prior: Prior, *, samples: int, **options: Any) -> tuple[Tensor, ...]:
    """``q.rsample_log_ratio``, z [K, B, D], its results checked in the same way; options are its others."""
    results = q.rsample_log_ratio(prior, samples=samples, **options)
    if type(q) is DiagonalGaussian:
        return results
    z, log_ratio, *_ = results
    _check_draws(q, "rsample_log_ratio", z, samples)
    check_result(
        q, "rsample_log_ratio", "log p(z) − log q(z|x)", log_ratio, "[K, B]", (samples, q.batch), q.device,
        "sum over the latent dimensions, not over samples or batch",
    )  # fmt: skip
    return results


def _check_draws(q: Posterior, method: str, z: Any, samples: int) -> None:
    shape = (samples, q.batch, z.shape[-1] if isinstance(z, Tensor) and z.dim() else "D")
    fix = "samples come first, and the latent dimensions last"
    check_result(q, method, "z", z, "[K, B, D]", shape, q.device, fix)


def _normal_parts(prior: Prior) -> tuple[Tensor, Tensor] | None:
    if isinstance(prior, StandardNormal):
        return None
    if isinstance(prior, DiagonalNormal):
        return prior.mu, prior.logvar
    raise TypeError(f"a diagonal Gaussian posterior has no fused op for the prior {type(prior).__name__}")


# What a mean and a log variance are called in an encoder's output: in plain code, diffusers, pythae.
_MEANS = ("mu", "mean", "loc", "embedding")
_LOGVARS = ("logvar", "log_var", "log_covariance")


def as_posterior(q: Any) -> Posterior:
    """Read what an encoder returned: a posterior object, a tensor [B, 2 D], a pair (mu, logvar), a Normal or
    Independent(Normal, 1), or an object or mapping that names its mean and log variance.
    """
    if isinstance(q, Posterior):
        return q
    if isinstance(q, Tensor):
        return DiagonalGaussian(*_halves(q))
    if type(q) in (tuple, list) and len(q) == 2:
        return DiagonalGaussian(*q)
    normal = q.base_dist if isinstance(q, td.Independent) and q.reinterpreted_batch_ndims == 1 else q
    if isinstance(normal, td.Normal):
        return DiagonalGaussian(normal.loc, 2 * normal.scale.log())
    if (inner := _named(q, "latent_dist")) is not None:
        return as_posterior(inner)
    # The log variance first: a distribution without one may have no mean to ask for either.
    logvar = _first_named(q, _LOGVARS)
    if isinstance(logvar, Tensor) and isinstance(mu := _first_named(q, _MEANS), Tensor):
        return DiagonalGaussian(mu, logvar)
    raise TypeError(
        "q must be a pair (mu, logvar) of tensors [B, D]; a tensor [B, 2 D], mu and logvar side by side; a "
        "torch.distributions.Normal or Independent(Normal, 1); a fastvae posterior; or an object or mapping "
        f"with a mean ({', '.join(_MEANS)}) and a log variance ({', '.join(_LOGVARS)}). Got {_describe(q)}"
    )


def _halves(q: Tensor) -> tuple[Tensor, Tensor]:
    check_tensor("q", q)
    if q.dim() != 2 or q.shape[1] % 2:
        hint = ", so that its width is even"
        if q.dim() > 2 and q.shape[1] % 2 == 0:
            event = (q.shape[1] // 2, *q.shape[2:])
            hint = (
                ". For channels that are mu and then logvar, pass [t.flatten(1) for t in q.chunk(2, dim=1)] "
                f"and begin the decoder with torch.nn.Unflatten(1, {event})"
            )
        raise ValueError(
            f"q has shape {shape_of(q)}; a tensor must be [B, 2 D], mu and logvar side by side{hint}"
        )
    return q.chunk(2, dim=1)


def _named(q: Any, name: str) -> Any:
    return q.get(name) if isinstance(q, Mapping) else getattr(q, name, None)


def _first_named(q: Any, names: tuple[str, ...]) -> Any:
    return next((value for name in names if (value := _named(q, name)) is not None), None)


def _describe(q: Any) -> str:
    kind = type(q).__name__
    if isinstance(q, Mapping):
        return f"a {kind} of {', '.join(map(str, q)) or 'nothing'}"
    if isinstance(q, td.Independent):
        return f"Independent({type(q.base_dist).__name__}, {q.reinterpreted_batch_ndims})"
    if hasattr(q, "_fields"):
        return f"a {kind} of {', '.join(q._fields)}"
    return f"a {kind} of length {len(q)}" if isinstance(q, (tuple, list)) else kind
