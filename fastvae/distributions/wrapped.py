"""Wrapper of torch.distributions objects as distributions over z."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td
from torch.distributions.relaxed_bernoulli import LogitRelaxedBernoulli
from torch.distributions.relaxed_categorical import ExpRelaxedCategorical

from .. import random
from ..core.checks import check_count, check_same_device
from ..core.seeding import check_philox, seeded
from ..core.special import gumbel_noise, laplace_noise, logistic_noise
from ..ops.gamma import dirichlet, standard_gamma
from ..ops.op import accumulator
from .base import Distribution
from .location_scale import student_t_noise
from .tensors import mapped, tensors_of
from .words import count_latents

# Families whose noise has a formula that takes less time than torch's quantile function.
_NOISE: dict[type, Callable[[Tensor], Tensor]] = {
    ExpRelaxedCategorical: gumbel_noise,
    LogitRelaxedBernoulli: logistic_noise,
    td.Gumbel: gumbel_noise,
    td.Laplace: laplace_noise,
}
# Families with elementwise parameters, which are also their constructor's arguments.
ELEMENTWISE = (
    td.Beta,
    td.Cauchy,
    td.Exponential,
    td.Gamma,
    td.Gumbel,
    td.HalfCauchy,
    td.HalfNormal,
    td.InverseGamma,
    td.Kumaraswamy,
    td.Laplace,
    td.LogNormal,
    td.Normal,
    td.Pareto,
    td.StudentT,
    td.Uniform,
    td.Weibull,
)


class TorchDistribution(Distribution):
    r"""Distribution from a ``torch.distributions`` object: a posterior, if it has ``rsample``, or a prior.

    A posterior's axes are [B, D], with D in the batch or the event; an objective also accepts [B, \*latent].
    A prior's axes may also be [D] or []. If it is a function of normal noise (Normal, MultivariateNormal),
    has a quantile function ``icdf`` (Laplace, Cauchy, Uniform, …), or transforms one of these (LogNormal,
    Gumbel, flows), a sample's noise is a function of its address, as in fastvae's own families. Otherwise
    torch's generator draws, from a state that the seed and the indices of the first sample and row determine:
    the same call gives the same samples, but different chunks give different samples.

    Args:
        distribution: the torch.distributions object.

    Example:
        >>> import torch, fastvae
        >>> x, decoder = torch.ones(4, 7), torch.nn.Linear(3, 7)
        >>> q = torch.distributions.Laplace(torch.zeros(4, 3), torch.ones(4, 3))
        >>> p = torch.distributions.Laplace(0.0, 1.0)
        >>> fastvae.elbo(x, q, decoder, likelihood="bernoulli", prior=p).shape
        torch.Size([])
    """

    def __init__(self, distribution: td.Distribution):
        super().__init__()
        self.distribution = distribution

    @property
    def _summed(self) -> bool:
        """True if log_prob sums over the dimensions."""
        return len(self.distribution.event_shape) > 0

    @property
    def batch(self) -> int:  # type: ignore[override]
        return self.distribution.batch_shape[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return next(tensors_of(self.distribution), torch.empty(())).device

    @property
    def loc(self) -> Tensor:
        return self._univariate.loc  # type: ignore[no-any-return]

    @property
    def scale(self) -> Tensor:
        return self._univariate.scale  # type: ignore[no-any-return]

    @property
    def mean(self) -> Tensor:
        try:
            return self.distribution.mean
        except NotImplementedError:  # raised by most transformed distributions
            raise NotImplementedError(f"{self._name} has no mean in closed form") from None

    @property
    def variance(self) -> Tensor:
        try:
            return self.distribution.variance
        except NotImplementedError:
            raise NotImplementedError(f"{self._name} has no variance in closed form") from None

    def entropy(self) -> Tensor:
        try:
            value = self.distribution.entropy()
        except NotImplementedError:
            raise NotImplementedError(f"{self._name} has no entropy in closed form") from None
        if not (self._summed or value.dim()):
            raise ValueError(f"{self._name} has parameters [], which do not determine D; expand them")
        return value if self._summed else value.sum(-1)

    @property
    def _univariate(self) -> Any:
        return univariate(self.distribution)

    @property
    def _name(self) -> str:
        d: Any = self.distribution
        while type(d).__name__ == "_Flattened":
            d = d.base_dist
        return type(d).__name__

    @property
    def support(self) -> Any:
        d: Any = self.distribution
        while type(d).__name__ == "_Flattened":
            d = d.base_dist
        try:
            return d.support
        except NotImplementedError:  # raised by a user's own class
            return td.constraints.real

    @property
    def is_posterior(self) -> bool:
        """True if the axes are [B, D]."""
        d = self.distribution
        return (len(d.batch_shape), len(d.event_shape)) in ((2, 0), (1, 1))

    @property
    def has_rows(self) -> bool:
        return self.is_posterior

    @property
    def per_row(self) -> bool:  # type: ignore[override]
        return self.is_posterior and self.batch > 1

    def log_prob(self, z: Tensor) -> Tensor:
        d = self.distribution
        shape = (*d.batch_shape, *d.event_shape)
        if len(shape) > 2 or any(n not in (1, m) for n, m in zip(shape[::-1], z.shape[::-1], strict=False)):
            raise ValueError(
                f"the distribution {type(d).__name__} of shape {list(shape)} does not broadcast to z's [B, "
                f"D] = {list(z.shape[1:])}"
            )
        if self.device != z.device and any(t.dim() for t in tensors_of(d)):
            check_same_device(f"the distribution {type(d).__name__}", next(tensors_of(d)), "z", z)
        value = d.log_prob(z)
        return value if self._summed else value.sum(-1)

    def rsample_log_prob(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        shape = (samples, *self.distribution.batch_shape, *self.distribution.event_shape)
        place = {"sample_offset": sample_offset, "row_offset": row_offset}
        z = at_address(self.distribution, shape, seed, place)
        if z is None:
            z = _by_ops(self.distribution, shape, seed, (sample_offset, row_offset))
        if z is None:
            with seeded(seed, self.device, sample_offset, row_offset):
                z = self.distribution.rsample((samples,))
        return z, self.log_prob(z)

    def sample(
        self,
        k: int = 1,
        *,
        dim: int | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        if self.has_rows and self.distribution.has_rsample:
            return super().sample(k, dim=dim, generator=generator)
        k = check_count("k", k, "the number of draws")
        return self._draw_by_torch(self.distribution.sample, k, dim, random.draw_seed(self.device, generator))

    def _draw_alone(self, k: int, dim: int | None, seed: Tensor) -> Tensor:
        if not self.distribution.has_rsample:
            raise NotImplementedError(f"{self._name} has no rsample; use sample, without gradients")
        return self._draw_by_torch(self.distribution.rsample, k, dim, seed)

    def _draw_by_torch(self, draw: Callable[..., Tensor], k: int, dim: int | None, seed: Tensor) -> Tensor:
        """Draw z with torch's generator, from a state that the seed determines."""
        shape = (*self.distribution.batch_shape, *self.distribution.event_shape)
        with seeded(seed, self.device, 0, 0):
            if self.has_rows:
                return draw((k,))
            dim = count_latents(self._name, shape, dim)
            return draw((k,) if shape == (dim,) else (k, dim)).reshape(k, dim)

    def expand(self, batch: int, like: Tensor) -> TorchDistribution:
        d = self.distribution
        return TorchDistribution(d.expand((batch,) if d.event_shape else (batch, like.shape[-1])))

    @property
    def reaches_others(self) -> bool:
        # A transform may be any callable.
        kind = type(self.distribution)
        own = kind.__module__.startswith("torch.distributions.")
        return not own or issubclass(kind, td.TransformedDistribution)

    def as_torch(self) -> td.Distribution:
        return self.distribution

    def prepared(self) -> TorchDistribution:
        wide, z_dtype = in_single(self.distribution)
        if z_dtype is None:
            return self
        made = TorchDistribution(wide)
        made.latent, made.z_dtype = self.latent, z_dtype
        return made


def univariate(d: td.Distribution) -> td.Distribution:
    """Strip ``Independent`` wrappers, but not a subclass, which may have a density of its own."""
    while type(d) is td.Independent:
        d = d.base_dist
    return d


def in_single(d: td.Distribution) -> tuple[td.Distribution, torch.dtype | None]:
    """Return the distribution in float32 and its dtype if its parameters are in half precision.

    Otherwise return the distribution itself and None.
    """
    dtypes = {t.dtype for t in tensors_of(d) if t.is_floating_point()}
    if all(dtype.itemsize > 2 for dtype in dtypes):
        return d, None
    return _converted(d, _single), functools.reduce(torch.promote_types, dtypes)


def in_double(d: td.Distribution) -> td.Distribution:
    """Return the distribution in float64."""
    made: td.Distribution = _converted(d, lambda t: t.double() if t.is_floating_point() else t)
    return made


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() and tensor.dtype.itemsize == 2 else tensor


def _converted(d: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Return the distribution with its parameters converted."""
    if type(d) is td.Independent:
        base = _converted(d.base_dist, convert)
        return td.Independent(base, d.reinterpreted_batch_ndims, validate_args=False)
    if type(d) in ELEMENTWISE:  # some also store constants in their dtype
        names: Any = d.arg_constraints
        made = type(d)(**{name: convert(getattr(d, name)) for name in names}, validate_args=False)
        made._validate_args = d._validate_args
        return made
    return mapped(d, convert)


def at_address(d: Any, shape: tuple[int, ...], seed: Tensor, place: dict[str, Any]) -> Tensor | None:
    """Return z of this shape as a function of addressed normal noise, or None if that is not possible."""
    if not type(d).rsample.__module__.startswith("torch.distributions."):  # a subclass may override it
        return None
    if isinstance(d, td.Independent):
        return at_address(d.base_dist, shape, seed, place)
    noise = _NOISE.get(type(d))
    transformed = isinstance(d, td.TransformedDistribution) and noise is None
    if transformed and type(d).rsample is td.TransformedDistribution.rsample:
        base = d.base_dist
        z = at_address(base, (shape[0], *base.batch_shape, *base.event_shape), seed, place)
        for transform in d.transforms if z is not None else ():
            z = transform(z)
        return z
    if len(shape) < 3:
        return None
    tensor = next(tensors_of(d), None)
    if tensor is None:
        return None
    rows = (*shape[:2], (2 if isinstance(d, td.StudentT) else 1) * math.prod(shape[2:]))
    # A quantile function of torch's needs double precision for normals out to 6.7 sigma.
    single = noise is not None or isinstance(d, (td.Normal, td.MultivariateNormal))
    dtype = accumulator(tensor.dtype) if single else torch.float64
    eps = random.normal(seed.to(tensor.device), *rows, dtype=dtype, **place)
    if isinstance(d, td.StudentT):
        first, second = eps.chunk(2, -1)
        return d.loc + d.scale * student_t_noise(first.reshape(shape), second.reshape(shape), d.df).to(
            tensor.dtype
        )
    eps = eps.reshape(shape)
    if isinstance(d, td.Normal):
        return d.loc + d.scale * eps.to(tensor.dtype)
    if noise is not None:
        return _scaled(d, noise(eps).to(tensor.dtype))
    if isinstance(d, td.MultivariateNormal):
        return d.loc + (d.scale_tril @ eps.to(tensor.dtype).unsqueeze(-1)).squeeze(-1)
    if type(d).icdf is td.Distribution.icdf or not d.has_rsample:
        return None
    quantile: Tensor = d.icdf(0.5 * torch.erfc(-eps / math.sqrt(2)))
    return quantile.to(tensor.dtype)


def _scaled(d: Any, noise: Tensor) -> Tensor:
    """Return z of a family of :data:`_NOISE`."""
    if type(d) in (td.Laplace, td.Gumbel):
        return d.loc + d.scale * noise  # type: ignore[no-any-return]
    scores: Tensor = (d.logits + noise) / d.temperature
    return scores if type(d) is LogitRelaxedBernoulli else scores - scores.logsumexp(-1, keepdim=True)


def _by_ops(d: Any, shape: tuple[int, ...], seed: Tensor, place: tuple[int, int]) -> Tensor | None:
    """Draw z of this shape with torch's generator, by ops that a compiler keeps in its graph.

    Return None for families without such an op.
    """
    if type(d) is td.Independent:
        return _by_ops(d.base_dist, shape, seed, place)
    if isinstance(d, td.TransformedDistribution) and type(d).rsample is td.TransformedDistribution.rsample:
        base = d.base_dist
        z = _by_ops(base, (shape[0], *base.batch_shape, *base.event_shape), seed, place)
        for transform in d.transforms if z is not None else ():
            z = transform(z)
        return z
    if type(d) not in (td.Gamma, td.Chi2, td.FisherSnedecor, td.Beta, td.Dirichlet):
        return None
    check_philox(seed)
    if isinstance(d, td.Gamma):
        z = standard_gamma(d.concentration.expand(shape), seed, *place) / d.rate
        z.detach().clamp_(min=torch.finfo(z.dtype).tiny)  # as torch does: the density takes the logarithm
        return z
    if isinstance(d, td.FisherSnedecor):
        df = torch.stack([d.df1, d.df2], -1)
        above, below = (standard_gamma((0.5 * df).expand(*shape, 2), seed, *place) / df).unbind(-1)
        tiny = torch.finfo(above.dtype).tiny
        z = above / below.clamp(min=tiny)
        z.detach().clamp_(min=tiny)
        return z
    if isinstance(d, td.Beta):
        pair = torch.stack([d.concentration1, d.concentration0], -1)
        return dirichlet(pair.expand(*shape, 2), seed, *place)[..., 0]
    return dirichlet(d.concentration.expand(shape), seed, *place)
