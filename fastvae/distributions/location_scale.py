"""Location-scale families: z = loc + exp(log_scale) w, with w of one standard density per dimension."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from .. import random
from ..core.checks import check_same_device, check_same_shape, check_tensor, may_look
from ..core.numbers import as_tensor
from ..core.special import (
    gumbel_noise,
    half_step,
    half_step_slope,
    laplace_noise,
    log_normal_cdf,
    logistic_noise,
)
from ..core.torch_private import functorch_is_active
from ..ops.op import accumulator
from .base import Distribution, Located, hold, is_still
from .words import count_latents

# The mean of the standard Gumbel distribution.
EULER = 0.57721566490153286


class LocationScale(Located):
    r"""Base class of location-scale families.

    .. math:: \log p(z) = \sum_d \big[\log f(w_d) - \mathrm{log\_scale}_d\big],
              \quad w = (z - \mathrm{loc})\, e^{-\mathrm{log\_scale}}

    Args:
        loc, log_scale: location and log scale: [B, D] each for a posterior; for a prior broadcastable to
            [B, D], an ``nn.Parameter`` if learned.

    Raises:
        TypeError, ValueError: if they are not floating-point tensors of one shape on one device.
    """

    loc: Tensor
    log_scale: Tensor

    def __init__(self, loc: Tensor, log_scale: Tensor):
        super().__init__()
        check_tensor("loc", loc)
        check_tensor("log_scale", log_scale)
        check_same_device("log_scale", log_scale, "loc", loc)
        if loc.dim() > 1 or log_scale.dim() > 1:
            check_same_shape("log_scale", log_scale, "loc", loc)
        hold(self, loc=loc, log_scale=log_scale)

    # A family defines these.

    def _log_density(self, w: Tensor) -> Tensor:
        """Return log f(w), elementwise."""
        raise NotImplementedError

    def _white(self, normals: Tensor) -> Tensor:
        """Transform standard normals, float64 if several per w, to w: [..., D · normals] to [..., D]."""
        raise NotImplementedError

    _normals = 1  # per w

    # Variance and entropy of w.
    _variance: float
    _entropy: float

    @property
    def scale(self) -> Tensor:
        return torch.exp(self.log_scale)

    @property
    def variance(self) -> Tensor:
        return self._elementwise(self._variance * torch.exp(2 * self.wide()[1]))

    def entropy(self) -> Tensor:
        return self._summed(self.wide()[1] + self._entropy)

    @property
    def _shape(self) -> torch.Size:
        shape: torch.Size = torch.broadcast_shapes(self.loc.shape, self.log_scale.shape)
        return shape

    def _elementwise(self, value: Tensor) -> Tensor:
        """Return the value in the shape and dtype of z."""
        return value.expand(self._shape).to(torch.promote_types(self.loc.dtype, self.log_scale.dtype))

    def _summed(self, value: Tensor) -> Tensor:
        """Sum over D."""
        if not self._shape:
            raise ValueError(
                f"{self.family.__name__} has parameters [], which do not determine D; expand them"
            )
        return value.expand(self._shape).sum(-1)

    def wide(self) -> tuple[Tensor, Tensor]:
        """Return loc and log_scale in the accumulation dtype."""
        dtype = accumulator(torch.promote_types(self.loc.dtype, self.log_scale.dtype))
        return self.loc.to(dtype), self.log_scale.to(dtype)

    def log_prob(self, z: Tensor) -> Tensor:
        loc, log_scale = self.wide()
        w = (z.to(accumulator(z.dtype)) - loc) * torch.exp(-log_scale)
        return (self._log_density(w) - log_scale).sum(-1)

    def _noise(self, seed: Tensor, shape: tuple[int, int, int], place: dict[str, Any]) -> Tensor:
        k, b, d = shape
        dtype = torch.float64 if self._normals > 1 else self.wide()[0].dtype
        normals = random.normal(seed, k, b, d * self._normals, dtype=dtype, **place)
        return self._white(normals)

    def rsample_log_prob(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        loc, log_scale = self.wide()
        place = {"sample_offset": sample_offset, "row_offset": row_offset}
        w = self._noise(seed, (samples, *loc.shape), place).to(loc.dtype)
        # The density uses the noise, not z.
        z = loc + torch.exp(log_scale) * w
        return z.to(torch.promote_types(self.loc.dtype, self.log_scale.dtype)), (
            self._log_density(w) - log_scale
        ).sum(-1)

    def _draw_alone(self, k: int, dim: int | None, seed: Tensor) -> Tensor:
        loc, log_scale = self.wide()
        dim = count_latents(self.family.__name__, self._shape, dim)
        w = self._noise(seed, (1, k, dim), {})[0].to(loc.dtype)
        return loc + torch.exp(log_scale) * w

    def rows(self, start: int, stop: int) -> LocationScale | None:
        return self._of(lambda t: t[start:stop]) if self.is_own else None

    def expand(self, batch: int, like: Tensor) -> Distribution:
        if not self.is_own:
            return super().expand(batch, like)
        return self._of(lambda t: t.expand(batch, like.shape[-1]))

    def _of(self, change: Callable[[Tensor], Tensor]) -> LocationScale:
        """Return the family with ``change`` applied to its parameters."""
        family: Any = self.family
        made: LocationScale = family(change(self.loc), change(self.log_scale))
        return made

    def _torch(self, loc: Tensor, scale: Tensor) -> td.Distribution | None:
        """Return torch's equivalent distribution, for its KL registry, or None."""
        return None

    def as_torch(self) -> td.Distribution | None:
        if not is_still(self, next(c for c in self.family.__mro__ if c.__module__ == __name__)):
            return None
        loc, log_scale = self.wide()
        return self._torch(loc, torch.exp(log_scale))


class Laplace(LocationScale):
    """Laplace distribution with scale exp(log_scale) in each dimension: log f(w) = −|w| − log 2.

    Args:
        loc, log_scale: location and log scale: [B, D] each for a posterior; broadcastable to it for a prior.

    Raises:
        TypeError, ValueError: if they are not floating-point tensors of one shape on one device.

    Example:
        >>> import torch, fastvae
        >>> x, decoder = torch.ones(4, 7), torch.nn.Linear(3, 7)
        >>> q = fastvae.distributions.Laplace(torch.zeros(4, 3), torch.zeros(4, 3))
        >>> p = fastvae.distributions.Laplace(torch.zeros(3), torch.zeros(3))
        >>> fastvae.elbo(x, q, decoder, likelihood="bernoulli", prior=p).shape
        torch.Size([])
    """

    _variance, _entropy = 2.0, 1 + math.log(2)

    @property
    def mean(self) -> Tensor:
        return self.loc

    def _log_density(self, w: Tensor) -> Tensor:
        return -w.abs() - math.log(2)

    def _white(self, normals: Tensor) -> Tensor:
        return laplace_noise(normals)

    def _torch(self, loc: Tensor, scale: Tensor) -> td.Distribution:
        return td.Laplace(loc, scale, validate_args=False)


class Logistic(LocationScale):
    """Logistic distribution in each dimension: log f(w) = −w − 2 log(1 + exp(−w)).

    Args:
        loc, log_scale: location and log scale: [B, D] each for a posterior; broadcastable to it for a prior.

    Raises:
        TypeError, ValueError: if they are not floating-point tensors of one shape on one device.

    Example:
        >>> import torch, fastvae
        >>> from fastvae.distributions import Logistic
        >>> Logistic(torch.zeros(2), torch.zeros(2)).log_prob(torch.zeros(5, 4, 2)).shape
        torch.Size([5, 4])
    """

    _variance, _entropy = math.pi**2 / 3, 2.0

    @property
    def mean(self) -> Tensor:
        return self.loc

    def _log_density(self, w: Tensor) -> Tensor:
        return -w.abs() - 2 * torch.log1p(torch.exp(-w.abs()))

    def _white(self, normals: Tensor) -> Tensor:
        return logistic_noise(normals)


class Gumbel(LocationScale):
    """Gumbel distribution in each dimension: log f(w) = −w − exp(−w).

    Args:
        loc, log_scale: location and log scale: [B, D] each for a posterior; broadcastable to it for a prior.

    Raises:
        TypeError, ValueError: if they are not floating-point tensors of one shape on one device.

    Example:
        >>> import torch, fastvae
        >>> fastvae.distributions.Gumbel(torch.zeros(2), torch.zeros(2)).log_prob(torch.zeros(5, 4, 2)).shape
        torch.Size([5, 4])
    """

    _variance, _entropy = math.pi**2 / 6, 1 + EULER

    @property
    def mean(self) -> Tensor:
        return self.loc + EULER * torch.exp(self.log_scale)

    def _log_density(self, w: Tensor) -> Tensor:
        return -w - torch.exp(-w)

    def _white(self, normals: Tensor) -> Tensor:
        return gumbel_noise(normals)

    def _torch(self, loc: Tensor, scale: Tensor) -> td.Distribution:
        return td.Gumbel(loc, scale, validate_args=False)


class Exponential(LocationScale):
    """Exponential distribution with mean exp(log_scale) in each dimension: log f(w) = −w for w ≥ 0.

    Args:
        log_scale: log of the mean: [B, D] for a posterior; broadcastable to it for a prior.

    Raises:
        TypeError, ValueError: if it is not a floating-point tensor.

    Example:
        >>> import torch, fastvae
        >>> fastvae.distributions.Exponential(torch.zeros(2)).log_prob(torch.ones(5, 4, 2)).shape
        torch.Size([5, 4])
    """

    _variance, _entropy = 1.0, 1.0
    support = td.constraints.nonnegative

    def __init__(self, log_scale: Tensor):
        check_tensor("log_scale", log_scale)
        super().__init__(torch.zeros_like(log_scale, requires_grad=False), log_scale)

    @property
    def mean(self) -> Tensor:
        return torch.exp(self.log_scale)

    def _log_density(self, w: Tensor) -> Tensor:
        return torch.where(w < 0, -math.inf, -w)

    def _white(self, normals: Tensor) -> Tensor:
        return -log_normal_cdf(-normals)

    def _set(self) -> dict[str, Any]:
        return {name: value for name, value in super()._set().items() if name != "loc"}

    def _of(self, change: Callable[[Tensor], Tensor]) -> Exponential:
        return Exponential(change(self.log_scale))

    def _torch(self, loc: Tensor, scale: Tensor) -> td.Distribution:
        return td.Exponential(1 / scale, validate_args=False)


class StudentT(LocationScale):
    r"""Student's t distribution in each dimension: log f(w) = −(ν + 1)/2 log(1 + w²/ν) + constant.

    A draw rescales the first of two normals by the ratio of a bivariate t's radius to theirs,
    :math:`w = ε_1 \sqrt{ν\,(e^{r^2/ν} - 1)/r^2}` with :math:`r^2 = ε_1^2 + ε_2^2`: a smooth function of ν.

    Args:
        loc, log_scale: location and log scale: [B, D] each for a posterior; broadcastable to it for a prior.
        df: degrees of freedom ν: a number, or a tensor broadcastable to [B, D].

    Raises:
        TypeError, ValueError: if they are not floating-point tensors of one shape on one device, or df is not
            above 0.

    References:
        Bailey, Polar generation of random variates with the t-distribution, 1994, theorem 1.

    Example:
        >>> import torch, fastvae
        >>> from fastvae.distributions import StudentT
        >>> StudentT(torch.zeros(2), torch.zeros(2), 4.0).log_prob(torch.zeros(5, 4, 2)).shape
        torch.Size([5, 4])
    """

    _normals = 2
    df: Tensor

    def __init__(self, loc: Tensor, log_scale: Tensor, df: float | Tensor):
        super().__init__(loc, log_scale)
        if not isinstance(df, Tensor):
            if not isinstance(df, (int, float)) or not 0 < df < math.inf:
                raise ValueError(f"df must be a number above 0, or a tensor of such; got {df!r}")
            df = as_tensor(float(df), torch.float64, loc.device)
        elif may_look(df) and not functorch_is_active() and bool((df <= 0).any()):
            raise ValueError(f"df must be above 0 everywhere; got a tensor with {float(df.min()):g}")
        hold(self, df=df)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        df, log_scale = self.df.to(torch.float64), self.wide()[1]
        variance = torch.where(df > 2, df / (df - 2), torch.where(df > 1, math.inf, math.nan))
        return self._elementwise(variance.to(log_scale.dtype) * torch.exp(2 * log_scale))

    def entropy(self) -> Tensor:
        df, log_scale = self._wide_df(), self.wide()[1]
        log_half = df.log() - math.log(2)
        # (ν + 1)/2 (ψ((ν + 1)/2) − ψ(ν/2)) + log B(ν/2, ½) + ½ log ν
        of_w = (1 + 1 / df) * (0.5 + half_step_slope(log_half)) - half_step(log_half)
        return self._summed((of_w + 0.5 * math.log(2 * math.pi)).to(log_scale.dtype) + log_scale)

    def _wide_df(self) -> Tensor:
        """Return ν in float64, at most e⁸⁰, where the distribution is normal."""
        return self.df.to(torch.float64).clamp(max=math.exp(80))

    def _log_density(self, w: Tensor) -> Tensor:
        df = self._wide_df()
        constant = _half_step(0.5 * df) - 0.5 * math.log(2 * math.pi)
        # In float64 no square of a float32 overflows; of a float64 what exceeds 2⁵⁰⁰ is a factor of its own.
        t = w.to(torch.float64) / df.sqrt()
        if w.dtype == torch.float64:
            near, far = t.clamp(-(2.0**500), 2.0**500), (t.abs() * 2.0**-500).clamp(min=1.0)
            tail = torch.log1p(near.square()) + 2 * torch.log(far)
        else:
            tail = torch.log1p(t.square()).to(w.dtype)
        return constant.to(w.dtype) - 0.5 * (df + 1).to(w.dtype) * tail

    def _white(self, normals: Tensor) -> Tensor:
        first, second = normals.chunk(2, -1)
        return student_t_noise(first, second, self.df)

    def _of(self, change: Callable[[Tensor], Tensor]) -> StudentT:
        of_rows = self.df.dim() > 1 and self.df.shape[0] > 1
        return StudentT(change(self.loc), change(self.log_scale), change(self.df) if of_rows else self.df)

    def _torch(self, loc: Tensor, scale: Tensor) -> td.Distribution:
        return td.StudentT(self.df.to(loc.dtype), loc, scale, validate_args=False)


def _half_step(z: Tensor) -> Tensor:
    """Return log Γ(z + ½) − log Γ(z) − ½ log z in float64, within 1e-13.

    :func:`half_step` is within 1e-16, by ten times as many operations.
    """
    near, inverse = z.clamp(max=64.0), 1 / z.clamp(min=64.0)
    exact = torch.lgamma(near + 0.5) - torch.lgamma(near) - 0.5 * near.log()
    u = inverse.square()
    series = inverse * (-1 / 8 + u * (1 / 192 - u * (1 / 640 - u * (17 / 14336))))
    return torch.where(z < 64, exact, series)


def student_t_noise(first: Tensor, second: Tensor, df: Tensor) -> Tensor:
    """Transform two float64 normals to a draw of Student's t (Bailey, 1994)."""
    square = first.square() + second.square()
    ratio = square / df.to(torch.float64)
    return first * torch.sqrt(torch.expm1(ratio) / ratio)


class LogNormal(LocationScale):
    """Log-normal distribution, exp of N(loc, exp(log_scale)²), in each dimension.

    Its log density is the normal log density of log z, minus log z.

    Args:
        loc, log_scale: mean and log standard deviation of log z: [B, D] each for a posterior; broadcastable
            to it for a prior.

    Raises:
        TypeError, ValueError: if they are not floating-point tensors of one shape on one device.

    Example:
        >>> import torch, fastvae
        >>> from fastvae.distributions import LogNormal
        >>> LogNormal(torch.zeros(2), torch.zeros(2)).log_prob(torch.ones(5, 4, 2)).shape
        torch.Size([5, 4])
    """

    support = td.constraints.positive

    @property
    def mean(self) -> Tensor:
        return torch.exp(self.loc + 0.5 * torch.exp(2 * self.log_scale))

    @property
    def variance(self) -> Tensor:
        loc, log_scale = self.wide()
        square = torch.exp(2 * log_scale)
        return self._elementwise(torch.expm1(square) * torch.exp(2 * loc + square))

    def entropy(self) -> Tensor:
        loc, log_scale = self.wide()
        return self._summed(loc + log_scale + 0.5 * (1 + math.log(2 * math.pi)))

    def _log_density(self, w: Tensor) -> Tensor:
        return -0.5 * (w.square() + math.log(2 * math.pi))

    def _white(self, normals: Tensor) -> Tensor:
        return normals

    def log_prob(self, z: Tensor) -> Tensor:
        z = z.to(accumulator(z.dtype))
        outside = z <= 0
        log_z = torch.log(torch.where(outside, 1.0, z))
        return torch.where(outside.any(-1), -math.inf, super().log_prob(log_z) - log_z.sum(-1))

    def rsample_log_prob(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        log_z, log_q = super().rsample_log_prob(
            samples, seed, sample_offset=sample_offset, row_offset=row_offset
        )
        return torch.exp(log_z), log_q - log_z.to(log_q.dtype).sum(-1)

    def _draw_alone(self, k: int, dim: int | None, seed: Tensor) -> Tensor:
        return torch.exp(super()._draw_alone(k, dim, seed))

    def _torch(self, loc: Tensor, scale: Tensor) -> td.Distribution:
        return td.LogNormal(loc, scale, validate_args=False)
