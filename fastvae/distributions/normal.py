"""Normal distributions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from .. import ops, random
from ..core.checks import check_same_device, check_same_shape, check_tensor, shape_of
from ..core.special import expm1_minus
from ..core.spread import log_variance
from ..ops.normal_arguments import Form, form_of, options
from ..ops.op import accumulator
from .base import Distribution, hold, is_family, is_still
from .closed_form import difference, register_kl
from .location_scale import EULER, Gumbel, Laplace
from .words import count_latents

# A standard deviation in place of a log variance, as in torch's Normal.
SCALE = form_of("scale", None, None)


class StandardNormal(Distribution):
    """Standard normal p(z) = N(0, I), the default prior.

    Example:
        >>> import fastvae
        >>> fastvae.distributions.StandardNormal().sample(5, dim=2).shape
        torch.Size([5, 2])
    """

    # Parameters [], which broadcast to [D].

    @property
    def loc(self) -> Tensor:
        return torch.zeros(())

    @property
    def mean(self) -> Tensor:
        return torch.zeros(())

    @property
    def scale(self) -> Tensor:
        return torch.ones(())

    @property
    def variance(self) -> Tensor:
        return torch.ones(())

    def log_prob(self, z: Tensor) -> Tensor:
        z = z.to(accumulator(z.dtype))
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)

    def _draw_alone(self, k: int, dim: int | None, seed: Tensor) -> Tensor:
        return random.normal(seed, 1, k, count_latents("StandardNormal", (), dim))[0]

    def expand(self, batch: int, like: Tensor) -> Distribution:
        zeros = like.new_zeros(batch, like.shape[-1])
        return diagonal(zeros, zeros) if is_still(self, StandardNormal) else super().expand(batch, like)

    def as_torch(self) -> td.Normal | None:
        return td.Normal(0.0, 1.0, validate_args=False) if is_still(self, StandardNormal) else None


class DiagonalNormal(Distribution):
    r"""Diagonal normal N(mu, diag σ²), with σ² = exp(logvar), or as set by ``scale_form``.

    It is the posterior that a pair ``(mu, logvar)`` stands for, or a prior, fixed or learned.

    .. math:: \log p(z) = -½ \sum_d \big[(z - μ)^2 / σ^2 + \log 2πσ^2\big]

    A posterior's σ is computed inside the kernels for every form, and never stored as a tensor.

    Args:
        mu, logvar: mean, and log variance or as set by ``scale_form``: [B, D] or [B, \*latent] each for a
            posterior; for a prior broadcastable to that, an ``nn.Parameter`` if learned, a network's output
            if conditional.
        scale_form: the meaning of ``logvar``: ``"logvar"``, log σ²; ``"log_scale"``, log σ; ``"scale"``, σ,
            which must be positive (a negative σ gives NaN); ``"softplus"``, r in σ² = log(1 + exp(r)) +
            floor.
        floor: lower bound of a softplus variance, such as 1e-4, which prevents collapse. Default: none.
        logvar_range: clamp a log variance to (lo, hi), with zero gradient outside. Default: no clamp.

    Raises:
        TypeError, ValueError: if mu and logvar are not floating-point tensors on one device, the form is
            unknown, or floor or logvar_range does not apply to it.

    Example:
        >>> import torch, fastvae
        >>> from fastvae.distributions import DiagonalNormal
        >>> q = DiagonalNormal(torch.zeros(4, 2), torch.zeros(4, 2), logvar_range=(-10.0, 10.0))
        >>> q.batch
        4
        >>> mu, logvar = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        >>> len(list(fastvae.distributions.DiagonalNormal(mu, logvar).parameters()))
        2
        >>> q = DiagonalNormal(torch.zeros(4, 2), torch.zeros(4, 2), scale_form="softplus", floor=1e-4)
        >>> q.log_variance()[0]  # log(log 2 + 1e-4)
        tensor([-0.3664, -0.3664])
    """

    mu: Tensor
    logvar: Tensor
    form: Form | None  # the meaning of logvar; None: an unclamped log variance

    def __init__(
        self,
        mu: Tensor,
        logvar: Tensor,
        *,
        scale_form: str = "logvar",
        floor: float | None = None,
        logvar_range: tuple[float, float] | None = None,
    ):
        super().__init__()
        check_tensor("mu", mu)
        check_tensor("logvar", logvar)
        check_same_device("logvar", logvar, "mu", mu)
        self.form = form_of(scale_form, floor, logvar_range, "scale_form")
        hold(self, mu=mu, logvar=logvar)

    @property
    def batch(self) -> int:  # type: ignore[override]
        return (self.mu if self.mu.dim() > 1 else self.logvar).shape[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.mu.device

    @property
    def loc(self) -> Tensor:
        return self.mu

    @property
    def mean(self) -> Tensor:
        return self.mu

    @property
    def scale(self) -> Tensor:
        """Standard deviation, whatever the form of ``logvar``."""
        if self.form is not None and self.form.scale == "scale":
            return self.logvar.expand(self._shape)
        return self._elementwise(torch.exp(0.5 * self.wide()[1]))

    @property
    def stddev(self) -> Tensor:
        return self.scale

    @property
    def variance(self) -> Tensor:
        return self._elementwise(torch.exp(self.wide()[1]))

    def entropy(self) -> Tensor:
        logvar = self.wide()[1].expand(self._shape)
        if logvar.dim() not in (1, 2):
            shapes = f"mu has shape {shape_of(self.mu)} and logvar {shape_of(self.logvar)}"
            raise ValueError(f"entropy needs parameters [B, D] or [D]; {shapes}")
        return 0.5 * (logvar + (1 + math.log(2 * math.pi))).sum(-1)

    @property
    def _shape(self) -> torch.Size:
        shape: torch.Size = torch.broadcast_shapes(self.mu.shape, self.logvar.shape)
        return shape

    def _elementwise(self, value: Tensor) -> Tensor:
        """Return the value in the shape and dtype of z."""
        return value.expand(self._shape).to(torch.promote_types(self.mu.dtype, self.logvar.dtype))

    @property
    def has_rows(self) -> bool:
        return self.mu.dim() == 2 or self.logvar.dim() == 2

    @property
    def per_row(self) -> bool:  # type: ignore[override]
        return any(v.dim() > 1 and v.shape[0] > 1 for v in (self.mu, self.logvar))

    def _set(self) -> dict[str, Any]:
        values = super()._set()
        del values["form"]
        shown = options(self.form)
        form = shown.pop("scale", "logvar")
        return values | ({} if form == "logvar" else {"scale_form": form}) | shown

    @property
    def has_logvar(self) -> bool:
        """True if ``logvar`` is a log variance."""
        return self.form is None or self.form.scale == "logvar"

    def log_variance(self) -> Tensor:
        """Return log σ², whatever the meaning of ``logvar``."""
        return self.logvar if self.form is None else log_variance(self.logvar, self.form)

    def wide(self) -> tuple[Tensor, Tensor]:
        """Return mu and the log variance in the accumulation dtype."""
        dtype = accumulator(torch.promote_types(self.mu.dtype, self.logvar.dtype))
        logvar = self.logvar.to(dtype)
        return self.mu.to(dtype), logvar if self.form is None else log_variance(logvar, self.form)

    def log_prob(self, z: Tensor) -> Tensor:
        mu, logvar = self.wide()
        white = (z.to(accumulator(z.dtype)) - mu) * torch.exp(-0.5 * logvar)
        return -0.5 * (white.square() + logvar + math.log(2 * math.pi)).sum(-1)

    def rsample_log_prob(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        place: dict[str, Any] = {"sample_offset": sample_offset, "row_offset": row_offset}
        if self.mu.shape != self.logvar.shape:  # of a prior
            rows = self.of(self.mu.expand(self._shape), self.logvar.expand(self._shape))
            return rows.rsample_log_prob(samples, seed, **place)
        mu, logvar = self.wide()
        # The density uses the noise, not z: sigma would cancel in (z - mu) / sigma.
        eps = random.normal(seed, samples, *mu.shape, dtype=mu.dtype, **place)
        if seed.dim():
            dtype = torch.promote_types(self.mu.dtype, self.logvar.dtype)
            z = (mu + torch.exp(0.5 * logvar) * eps).to(dtype)
        else:
            kwargs = options(self.form) | place
            z, _ = ops.rsample_kl(self.mu, self.logvar, k=samples, seed=seed, **kwargs)
        return z, -0.5 * (eps.square() + logvar + math.log(2 * math.pi)).sum(-1)

    def _draw_alone(self, k: int, dim: int | None, seed: Tensor) -> Tensor:
        eps = random.normal(seed, 1, k, count_latents(self.family.__name__, self._shape, dim))[0]
        mu, logvar = self.wide()
        return mu + torch.exp(0.5 * logvar) * eps

    def rows(self, start: int, stop: int) -> DiagonalNormal | None:
        if not is_family(self, DiagonalNormal):
            return None
        return self.of(self.mu[start:stop], self.logvar[start:stop], self.latent)

    def of(self, mu: Tensor, logvar: Tensor, latent: tuple[int, ...] | None = None) -> DiagonalNormal:
        """Return the same distribution with other parameters, which are not validated."""
        if is_family(self, DiagonalNormal):
            made = diagonal(mu, logvar, self.form)
        else:
            made = object.__new__(type(self))
            for name in self.__dict__:
                made.__dict__[name] = self.__dict__[name]
            # Attributes shadow a module's parameters and buffers, where the old values remain.
            made.__dict__["mu"], made.__dict__["logvar"] = mu, logvar
        if latent is not None:
            made.__dict__["latent"] = latent
        return made

    def expand(self, batch: int, like: Tensor) -> Distribution:
        if not is_family(self, DiagonalNormal):
            return super().expand(batch, like)
        shape = (batch, like.shape[-1])
        return diagonal(self.mu.expand(shape), self.logvar.expand(shape), self.form)

    def as_torch(self) -> td.Normal | None:
        if not is_still(self, DiagonalNormal):
            return None
        mu, logvar = self.wide()
        return td.Normal(mu, torch.exp(0.5 * logvar), validate_args=False)


def diagonal(mu: Tensor, logvar: Tensor, form: Form | None = None) -> DiagonalNormal:
    """Return the posterior of a validated pair; a module's constructor costs more than small kernels."""
    q = object.__new__(DiagonalNormal)
    attributes = q.__dict__
    attributes["mu"], attributes["logvar"], attributes["form"] = mu, logvar, form
    return q


def check_posterior(q: DiagonalNormal) -> DiagonalNormal:
    """Validate mu and logvar, [B, D] or [B, *latent] each, flatten them and promote them to one dtype.

    Raises:
        TypeError, ValueError: for any other shape or dtype.
    """
    mu, logvar = q.mu, q.logvar
    spatial = isinstance(mu, Tensor) and mu.dim() > 2
    check_tensor("mu", mu, None if spatial else 2, "[B, D]")
    check_tensor("logvar", logvar, None if spatial else 2, "[B, D]")
    if spatial and logvar.shape != mu.shape:
        raise ValueError(
            f"logvar has shape {shape_of(logvar)} but mu has shape {shape_of(mu)}; they must be equal, "
            "[B, *latent] each, or else flat, [B, D] each"
        )
    check_same_shape("logvar", logvar, "mu", mu)
    check_same_device("logvar", logvar, "mu", mu)
    latent = tuple(mu.shape[1:]) if spatial else q.latent
    if spatial:
        mu, logvar = mu.flatten(1), logvar.flatten(1)
    if mu.dtype != logvar.dtype:
        dtype = torch.promote_types(mu.dtype, logvar.dtype)
        mu, logvar = mu.to(dtype), logvar.to(dtype)
    return q if mu is q.mu and logvar is q.logvar else q.of(mu, logvar, latent)


@register_kl(DiagonalNormal, StandardNormal)
@register_kl(DiagonalNormal, DiagonalNormal)
def _kl(q: DiagonalNormal, p: StandardNormal | DiagonalNormal) -> Tensor:
    """Return the KL of each dimension, where the fused op does not apply."""
    mu, logvar = q.wide()
    prior_mu, prior_logvar = p.wide() if isinstance(p, DiagonalNormal) else (0.0, torch.zeros_like(logvar))
    u = logvar - prior_logvar
    white = (mu - prior_mu) * torch.exp(-0.5 * prior_logvar)
    return 0.5 * (white.square() + expm1_minus(u))


def _loc_log_scale(d: StandardNormal | DiagonalNormal, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and log σ in the accumulation dtype."""
    if isinstance(d, StandardNormal):
        return like.new_zeros(()), like.new_zeros(())
    mu, logvar = d.wide()
    return mu, 0.5 * logvar


# As in closed_form: sums of positive terms, of the difference of the locations.


@register_kl(Laplace, StandardNormal)
@register_kl(Laplace, DiagonalNormal)
def _kl_laplace_normal(q: Laplace, p: StandardNormal | DiagonalNormal) -> Tensor:
    move, u, dtype = difference(q.wide(), _loc_log_scale(p, q.loc))
    rest = expm1_minus(2 * u + math.log(2), dtype) + (math.log(math.pi) - 1)
    return (0.5 * (rest + move.square())).to(dtype)


@register_kl(Gumbel, StandardNormal)
@register_kl(Gumbel, DiagonalNormal)
def _kl_gumbel_normal(q: Gumbel, p: StandardNormal | DiagonalNormal) -> Tensor:
    move, u, dtype = difference(q.wide(), _loc_log_scale(p, q.loc))
    rest = expm1_minus(2 * u + math.log(math.pi**2 / 6), dtype) + (math.log(math.pi**3 / 3) - 1 - 2 * EULER)
    return (0.5 * (rest + (move + EULER * torch.exp(u)).square())).to(dtype)


@register_kl(DiagonalNormal, Gumbel)
def _kl_normal_gumbel(q: DiagonalNormal, p: Gumbel) -> Tensor:
    move, u, dtype = difference(_loc_log_scale(q, q.mu), p.wide())
    rest = 0.5 * expm1_minus(2 * u, dtype) + (1 - 0.5 * math.log(2 * math.pi))
    return (expm1_minus(0.5 * torch.exp(2 * u) - move, dtype) + rest).to(dtype)
