"""Exact log p(x) without an encoder, by a lattice over few latents, shared by all x."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ... import ops
from ...core.checks import check_count, check_number, shape_of
from ...core.hints import teaches
from ...core.nested import event_size
from ...core.records import registered
from ...distributions import Distribution, as_prior
from ...distributions.base import is_family
from ...distributions.normal import DiagonalNormal, StandardNormal
from ...distributions.read import is_conditional
from ...inputs.modules import check_modules, check_repeatable, evaluating, modules_of
from ...likelihoods.base import Likelihood
from ...likelihoods.read import as_likelihood
from ..evaluation.data import batches_of, data_of, place_of

__all__ = ["LatticeMarginal", "lattice"]

# Default points per dimension, by D.
_POINTS = {1: 3000, 2: 255, 3: 66}
# Largest block of the decoder's output and of log p(x|z), in numbers.
_NUMBERS = 2**22


@registered
@dataclass(frozen=True, eq=False)
class LatticeMarginal:
    """Log p(x) of each example by a lattice and its estimated error, each [N] in float64, in nats."""

    log_px: Tensor
    """Log p(x)."""
    error: Tensor
    """Estimated error of log_px."""


@teaches
@torch.no_grad()
def lattice(
    data: Tensor | np.ndarray | Dataset[Any] | Iterable[Any],
    decoder: Callable[..., Any],
    *,
    latent_dim: int,
    points: int | None = None,
    radius: float = 8.0,
    box: tuple[Any, Any] | None = None,
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    batch_size: int = 1000,
    modules: Sequence[nn.Module] = (),
) -> LatticeMarginal:
    r"""Compute log p(x) of every example of a data set without encoder or sampling, for one to three latents.

    .. math:: \log p(x) \approx \log \sum_u ω_u\, p(x | z_u), \quad ω_u = h_1 \cdots h_D\, p(z_u)

    The points :math:`z_u` are a product lattice of n points per dimension with spacing :math:`h_d`: the
    midpoint rule, whose error falls faster than any power of h for a smooth integrand that vanishes at the
    ends, like :math:`e^{-2 π^2 (s / h)^2}` for a normal posterior of standard deviation s. They are decoded
    once for all examples (:func:`fastvae.ops.all_pairs_log_prob`), block by block.

    The lattice estimates its error. It splits into :math:`3^D` lattices of three times the spacing, and
    ``error`` is the largest distance of their estimates from that of the whole lattice. This is the error of
    a coarse lattice, which far exceeds that of the whole lattice if it is below about 0.1 nats. A larger
    error only says that the posterior is too narrow for the lattice: use more points, or
    :func:`fastvae.evaluate`. ``error`` also includes the mass outside the lattice, estimated from the density
    at its ends, extended over half of its width. It excludes rounding, about 1e-6 of log p(x) in float32.

    Args:
        data: a tensor or array [N, \*event], a map-style Dataset, or an iterable of batches; kept in memory.
        decoder: z [U, D] -> parameters of the likelihood, called in eval mode.
        latent_dim: D, 1 to 3.
        points: n, a multiple of 3; :math:`n^D` points in all. Default: 3000, 255 and 66 for D = 1, 2 and 3,
            which for a standard normal prior is accurate to 1e-6 if the posterior's standard deviations are
            at least 0.005, 0.06 and 0.22.
        radius: half width of the lattice for a normal prior, in its standard deviations. Default 8.
        box: lower and upper ends of the lattice, each [D] or a number, in place of ``radius``. Required for
            a prior that is not a diagonal normal.
        likelihood: ``"gaussian"`` (default; the decoder returns (mean, logvar)), ``"bernoulli"`` (it returns
            logits), another name of :mod:`fastvae.likelihoods`, an object such as
            ``fastvae.likelihoods.Gaussian(scale=0.1)`` (it returns the mean), or a user-defined
            :class:`fastvae.likelihoods.Likelihood`. Bernoulli, Poisson and Gaussian likelihoods, whose pairs
            are matrix products, are far faster.
        prior: a pair (mu, logvar), each [D] or [B, D]; a :class:`fastvae.distributions.Distribution` or a
            torch.distributions object; or a function of the context that returns one of these. For shaped
            latents its parameters broadcast to [B, C, H, W], or are flat, [D]. Default: N(0, I), or the
            :class:`fastvae.distributions.Hierarchy` that produced q. It is the same for all examples.
        batch_size: examples per batch; it changes results only by rounding. Default 1000.
        modules: modules that a function as decoder or prior reaches, to be put into eval mode, too. A module
            and a method of a module need none. A function with modules that are not named must be in eval
            mode already: one whose output changes between two calls is rejected. Default: none.

    Returns:
        :class:`LatticeMarginal`, each field [N]. Memory is :math:`(3^D + 1) N` numbers, the data,
        and a block of points.

    Raises:
        TypeError, ValueError: for an invalid argument, which the message names.

    References:
        Trefethen & Weideman, The Exponentially Convergent Trapezoidal Rule, SIAM Review 56, 2014.

    Example:
        >>> import torch, fastvae
        >>> decoder, x = torch.nn.Linear(2, 8), torch.rand(16, 8)
        >>> result = fastvae.audit.lattice(x, decoder, latent_dim=2, likelihood="bernoulli")
        >>> result.log_px.shape, bool((result.error < 1e-4).all())
        (torch.Size([16]), True)
    """
    likelihood = as_likelihood(likelihood)
    if not callable(decoder):
        raise TypeError(f"decoder must be a module or another callable, got {type(decoder).__name__}")
    latent_dim = check_count("latent_dim", latent_dim, "the number of latents")
    if latent_dim > 3:
        raise ValueError(
            f"latent_dim must be at most 3, got {latent_dim}: the points of a lattice are n^D; use "
            "fastvae.evaluate"
        )
    points = _POINTS[latent_dim] if points is None else check_count("points", points, "in each dimension")
    if points % 3:
        raise ValueError(
            f"points must be a multiple of 3, got {points}: every third makes a lattice that tells the error"
        )
    batch_size = check_count("batch_size", batch_size, "the examples at a time")
    prior, reached = _shared(prior), check_modules(modules)
    device, dtype = place_of(decoder if not reached else nn.ModuleList(reached), decoder)
    xs = [x.to(device or x.device) for x in _examples(data, batch_size, likelihood, dtype)]
    if not xs:
        raise ValueError("data has no batches: there is nothing to evaluate")
    if dtype is None:
        dtype = xs[0].dtype if xs[0].is_floating_point() else torch.get_default_dtype()
    check_number("radius", radius, "in standard deviations of the prior")
    low, high = _ends(prior, box, radius, latent_dim, xs[0].device)
    spacing = (high - low) / points
    size = max(1, _NUMBERS // max(event_size(xs[0]), *(len(x) for x in xs)))
    reached += [m for f in (decoder, likelihood, prior) for m in modules_of(f)]
    with evaluating(reached):
        middle = (0.5 * (low + high))[None].to(dtype)
        check_repeatable(decoder, lambda: likelihood.read(decoder(middle), xs[0]))
        prior = prior.prepared()
        # Log sums of p(x, z) over each coarse lattice, and over the ends.
        sums, at_ends = [], _Sum(xs)
        for indices in _indices(points, latent_dim, size, xs[0].device):
            if indices is None:
                sums.append(_Sum(xs))
                continue
            z = low + (indices + 0.5) * spacing
            log_prior = prior.log_prob(z[None])[0].double()
            parameters = likelihood.read(decoder(z.to(dtype)), xs[0])
            is_end = ((indices == 0) | (indices == points - 1)).any(1)
            for i, x in enumerate(xs):
                joint = ops.all_pairs_log_prob(x, parameters, likelihood=likelihood) + log_prior[:, None]
                sums[-1].add(i, joint)
                at_ends.add(i, joint[is_end])
    parts = torch.stack([s.joined() for s in sums])
    whole = parts.logsumexp(0)
    apart = (parts + latent_dim * math.log(3) - whole).abs().amax(0)
    beyond = torch.log1p((at_ends.joined() - whole).exp() * (points / 2))
    error = torch.where(whole == -math.inf, math.inf, apart + beyond)
    return LatticeMarginal((whole + spacing.log().sum()).cpu(), error.cpu())


class _Sum:
    """Running log-sum-exp over points u of values [U, B], for each batch, in float64."""

    def __init__(self, xs: list[Tensor]):
        self._logs = [torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device) for x in xs]

    def add(self, index: int, values: Tensor) -> None:
        if len(values):
            self._logs[index] = torch.logaddexp(self._logs[index], values.logsumexp(0))

    def joined(self) -> Tensor:
        return torch.cat(self._logs)


def _indices(points: int, dim: int, size: int, device: torch.device) -> Iterator[Tensor | None]:
    """Yield the indices of all points, [U, D], in blocks, with None before each of the 3^D coarse lattices.

    The coarse lattices take every third point, not every second: two lattices would agree by chance if a
    posterior lies midway between two points.
    """
    third = points // 3
    for first in itertools.product(range(3), repeat=dim):
        yield None
        for start in range(0, third**dim, size):
            rest = torch.arange(start, min(start + size, third**dim), device=device)
            digits = []
            for offset in first:
                digits.append(3 * (rest % third) + offset)
                rest = rest // third
            yield torch.stack(digits, 1)


def _examples(
    data: Any, batch_size: int, likelihood: Likelihood, dtype: torch.dtype | None
) -> Iterator[Tensor]:
    axes = None
    for batch in batches_of(data, batch_size, "none"):
        x = data_of(batch, axes, likelihood)
        if isinstance(x, Mapping):
            raise TypeError("data is a dict of several parts, which a lattice does not take; use evaluate")
        axes = [x.dim()]
        if len(x):
            yield x.to(dtype) if dtype is not None and x.is_floating_point() else x


def _shared(prior: Any) -> Distribution:
    """Validate that the prior is the same for all examples, and return it."""
    found = None if is_conditional(prior) else as_prior(prior)
    if found is None or found.per_row:
        raise ValueError(
            "prior is of each example, but the points of a lattice are shared by all; use fastvae.evaluate"
        )
    return found


def _ends(
    prior: Distribution, box: Any, radius: float, dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the lattice's lower and upper ends, each [D]."""
    if box is None:
        if is_family(prior, StandardNormal):
            centre, scale = torch.zeros((), device=device), torch.ones((), device=device)
        elif is_family(prior, DiagonalNormal):
            centre, logvar = prior.wide()
            scale = torch.exp(0.5 * logvar)
        else:
            raise ValueError(
                f"prior is {type(prior).__name__}, of which it is not known where it lies; give "
                "box=(low, high), the lattice's ends, each [D] or a number"
            )
        box = centre - radius * scale, centre + radius * scale
    if not (isinstance(box, (tuple, list)) and len(box) == 2):
        raise TypeError(f"box must be a pair (low, high), each [D] or a number; got {type(box).__name__}")
    ends = [torch.as_tensor(end, dtype=torch.float64, device=device).squeeze() for end in box]
    for end in ends:
        if end.shape not in ((), (dim,)):
            raise ValueError(f"an end of the lattice has shape {shape_of(end)}; expected [D] = [{dim}] or []")
    low, high = (end.expand(dim) for end in ends)
    if not bool(((low < high) & (high - low).isfinite()).all()):
        raise ValueError(
            f"the lattice must be wider than 0 in each dimension; got {low.tolist()} to {high.tolist()}"
        )
    return low, high
