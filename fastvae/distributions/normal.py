"""Normal distributions."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td

from .. import ops, random
from .._checks import check_same_device, check_same_shape, check_tensor, shape_of
from ..ops.latent import Form, form_of, options
from ..ops.op import accumulator
from ..reference.latent import log_variance
from .base import Distribution, is_still, register_kl


class StandardNormal(Distribution):
    """p(z) = N(0, I), the default prior.

    Example:
        >>> import fastvae
        >>> fastvae.StandardNormal().sample(5, 2).shape
        torch.Size([5, 2])
    """

    def log_prob(self, z: Tensor) -> Tensor:
        z = z.to(accumulator(z.dtype))
        return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)

    def sample(
        self,
        n: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return random.normal(random.draw_seed(device or "cpu", generator), 1, n, dim)[0]

    def as_torch(self) -> td.Normal | None:
        return td.Normal(0.0, 1.0, validate_args=False) if is_still(self, StandardNormal) else None


class DiagonalNormal(Distribution):
    r"""N(mu, diag σ²), with σ² = exp(logvar) or what ``scale`` says: the posterior that a pair ``(mu,
    logvar)`` stands for, or a prior, fixed or learned.

    .. math:: \log p(z) = -½ \sum_d \big[(z - μ)^2 / σ^2 + \log 2πσ^2\big]

    A posterior's σ is computed inside the kernels, whatever the scale, and kept in no tensor.

    Args:
        mu, logvar: mean, and log variance or what ``scale`` says: each [B, D] of a posterior; of a prior
            broadcastable to [B, D], ``nn.Parameter`` for a learned one, what a network computed for a
            conditional one.
        scale: what ``logvar`` is: ``"logvar"``, log σ²; ``"log_scale"``, log σ; ``"scale"``, σ, which must be
            positive (a negative one gives NaN); ``"softplus"``, r of σ² = log(1 + exp(r)) + floor.
        floor: of a softplus: the least variance, such as 1e-4, which keeps it from collapsing; 0 for none.
        logvar_range: clamp a log variance to (lo, hi), with zero gradient outside. Default: no clamp.

    Raises:
        TypeError, ValueError: if they are not floating-point tensors on one device, the scale is unknown, or
            a floor or a range is given that has no meaning with it.

    Example:
        >>> import torch, fastvae
        >>> q = fastvae.DiagonalNormal(torch.zeros(4, 2), torch.zeros(4, 2), logvar_range=(-10.0, 10.0))
        >>> q.batch
        4
        >>> mu, logvar = (torch.nn.Parameter(torch.zeros(2)) for _ in range(2))
        >>> len(list(fastvae.DiagonalNormal(mu, logvar).parameters()))
        2
        >>> q = fastvae.DiagonalNormal(torch.zeros(4, 2), torch.zeros(4, 2), scale="softplus", floor=1e-4)
        >>> q.log_variance()[0]  # log(log 2 + 1e-4)
        tensor([-0.3664, -0.3664])
    """

    mu: Tensor
    logvar: Tensor
    form: Form | None  # what logvar is, where it is not a log variance as it is

    def __init__(
        self,
        mu: Tensor,
        logvar: Tensor,
        *,
        scale: str = "logvar",
        floor: float = 0.0,
        logvar_range: tuple[float, float] | None = None,
    ):
        super().__init__()
        check_tensor("mu", mu)
        check_tensor("logvar", logvar)
        check_same_device("logvar", logvar, "mu", mu)
        self.form = form_of(scale, floor, logvar_range)
        for name, value in (("mu", mu), ("logvar", logvar)):
            if isinstance(value, nn.Parameter):
                setattr(self, name, value)
            elif value.requires_grad:
                # Computed by a network: no state of ours, and it must stay in its graph.
                self.__dict__[name] = value
            else:
                self.register_buffer(name, value)

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self.mu.shape[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.mu.device

    @property
    def mean(self) -> Tensor:  # type: ignore[override]
        return self.mu

    @property
    def per_row(self) -> bool:  # type: ignore[override]
        return any(v.dim() > 1 and v.shape[0] > 1 for v in (self.mu, self.logvar))

    def extra_repr(self) -> str:
        if self.form is None:
            return ""
        default = Form()._asdict()
        return ", ".join(f"{k}={v!r}" for k, v in self.form._asdict().items() if v != default[k])

    @property
    def has_logvar(self) -> bool:
        """Whether ``logvar`` is a log variance."""
        return self.form is None or self.form.scale == "logvar"

    def log_variance(self) -> Tensor:
        """log σ², of whatever ``logvar`` is."""
        return self.logvar if self.form is None else log_variance(self.logvar, self.form)

    def _wide(self) -> tuple[Tensor, Tensor]:
        """mu and the log variance, in the dtype of the computation."""
        dtype = accumulator(torch.promote_types(self.mu.dtype, self.logvar.dtype))
        logvar = self.logvar.to(dtype)
        return self.mu.to(dtype), logvar if self.form is None else log_variance(logvar, self.form)

    def log_prob(self, z: Tensor) -> Tensor:
        mu, logvar = self._wide()
        white = (z.to(accumulator(z.dtype)) - mu) * torch.exp(-0.5 * logvar)
        return -0.5 * (white.square() + logvar + math.log(2 * math.pi)).sum(-1)

    def rsample(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        place: dict[str, Any] = {"sample_offset": sample_offset, "row_offset": row_offset}
        z, _ = ops.rsample_kl(self.mu, self.logvar, samples=samples, seed=seed, **options(self.form), **place)
        # The noise by itself: nothing of the density goes through z, where sigma cancels.
        _, logvar = self._wide()
        eps = random.normal(seed, *z.shape, dtype=accumulator(z.dtype), **place)
        return z, -0.5 * (eps.square() + logvar + math.log(2 * math.pi)).sum(-1)

    def sample(
        self,
        n: int,
        dim: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        eps = random.normal(random.draw_seed(self.mu.device, generator), 1, n, dim)[0]
        mu, logvar = self._wide()
        return mu + torch.exp(0.5 * logvar) * eps

    def rows(self, start: int, stop: int) -> DiagonalNormal | None:
        if type(self) is not DiagonalNormal:
            return None
        return diagonal(self.mu[start:stop], self.logvar[start:stop], self.form)

    def as_torch(self) -> td.Normal | None:
        if not is_still(self, DiagonalNormal):
            return None
        mu, logvar = self._wide()
        return td.Normal(mu, torch.exp(0.5 * logvar), validate_args=False)


def diagonal(mu: Tensor, logvar: Tensor, form: Form | None = None) -> DiagonalNormal:
    """The posterior of a pair that has been checked: making a module costs more than a small batch's
    kernels.
    """
    q = DiagonalNormal.__new__(DiagonalNormal)
    attributes = q.__dict__
    attributes["mu"], attributes["logvar"], attributes["form"] = mu, logvar, form
    return q


def check_posterior(q: DiagonalNormal) -> DiagonalNormal:
    """That mu and logvar are [B, D] each.

    Raises:
        TypeError, ValueError: where they are not.
    """
    mu, logvar = q.mu, q.logvar
    if isinstance(mu, Tensor) and mu.dim() > 2:
        raise ValueError(
            f"mu has shape {shape_of(mu)}; expected [B, D], that is 2 axes. Flatten latents that have axes "
            "of their own, mu.flatten(1) and logvar.flatten(1), and begin the decoder with "
            f"torch.nn.Unflatten(1, {tuple(mu.shape[1:])})"
        )
    check_tensor("mu", mu, 2, "[B, D]")
    check_tensor("logvar", logvar, 2, "[B, D]")
    check_same_shape("logvar", logvar, "mu", mu)
    check_same_device("logvar", logvar, "mu", mu)
    return q


@register_kl(DiagonalNormal, StandardNormal)
@register_kl(DiagonalNormal, DiagonalNormal)
def _kl(q: DiagonalNormal, p: StandardNormal | DiagonalNormal) -> Tensor:
    """Of each dimension, where the fused op does not serve."""
    mu, logvar = q._wide()
    prior_mu, prior_logvar = p._wide() if isinstance(p, DiagonalNormal) else (0.0, torch.zeros_like(logvar))
    u = logvar - prior_logvar
    white = (mu - prior_mu) * torch.exp(-0.5 * prior_logvar)
    return 0.5 * (white.square() + torch.expm1(u) - u)
