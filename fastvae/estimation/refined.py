r"""Gaussian approximation of each example's posterior p(z|x), refined from q by natural-gradient steps.

The Gaussian that maximises the ELBO satisfies (Opper & Archambeau 2009)

.. math:: E_r[\nabla \log p(x, z)] = 0, \quad Λ = -E_r[\nabla^2 \log p(x, z)]

A step of size ρ is (Khan & Nielsen 2018)

.. math:: Λ ← (1 - ρ) Λ + ρ H, \quad m ← m + ρ Λ^{-1} E_r[\nabla \log p(x, z)]

with the Gauss–Newton matrix :math:`H = E_r[J^\top W J] + Λ_p` in place of the negative Hessian: J is the
Jacobian of the decoder's outputs, W the likelihood's Fisher information of these, :math:`Λ_p` the prior's
precision. H is positive semidefinite for every likelihood and needs no second derivatives, which are zero for
a decoder of rectifiers.

The Gaussian of the largest ELBO is too narrow, and its mean is off where p(z|x) is skewed. Steps towards the
mean and covariance of p(z|x) itself follow, by importance weights. With :math:`z = m + L u`,
:math:`L L^\top = Λ^{-1}` and :math:`g = \nabla_u [\log p(x, z) - \log r(z)]`, integration by parts gives

.. math:: E_p[u] = E_p[g], \quad E_p[u u^\top] = I + E_p[u g^\top]

g is 0 where the posterior is normal, so that these means have far less noise than those of u and
:math:`u u^\top`: a few hundred draws are enough for fifty latents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import random
from ..core.checks import later_row
from ..core.nested import Conditioning, all_tensors, event_size
from ..core.torch_private import has_hooks
from ..distributions import Distribution, FullNormal, StandardNormal, rsample_log_prob
from ..distributions.base import is_family
from ..distributions.draws import check_everywhere, draw_z
from ..distributions.multivariate_t import MultivariateStudentT
from ..distributions.stratified import StratifiedMixture, derived_seed, expanded_at_address
from ..distributions.words import known_mean
from ..inputs.batch import Inputs
from ..inputs.modules import modules_of
from ..likelihoods.base import Likelihood
from ..likelihoods.categorical import Categorical
from ..likelihoods.declared import Declared
from ..likelihoods.joint import Joint
from . import stream as _stream
from .adaptive import tempered
from .draws import example_of, with_latent_of
from .stream import Chunks

# First level of the noise's address that belongs to the fit: the draws that estimate are independent of it.
_LEVEL = 2**31
# Draws for the moments of a q that does not name them, for q's ELBO, and to compare the weights.
_MOMENTS, _ELBO, _TRIAL = 256, 64, 32
# Numbers of their seeds, beyond those of the mixtures that the estimate draws from.
_SEEDS = {_MOMENTS: 10**6, _ELBO: 10**6 + 1, _TRIAL: 10**6 + 2}
# Relative variance of the weights below which the Gaussian itself is the proposal.
_EQUAL = 0.01
# Numbers of a decoder's Jacobian that are computed at a time.
_NUMBERS = 2**24
# Numbers that are simulated for each z in an estimate of the Fisher information: 4 to 64 copies of x.
_SIMULATED = 512
# Loss of the ELBO, in nats, up to which a step is kept: near the optimum differences are noise.
_SLACK = 0.2
# First step from which the precision is an average over steps, and the moments are.
_AVERAGED = 3
# Least effective sample size, relative to the draws, of the weights that moments are computed with.
_LEAST = 0.25
# Bounds of a step's factor of the variance in any direction.
_NARROWEST, _WIDEST = 0.5, 2.0


class NoDerivative(RuntimeError):
    """The decoder has no derivative by z, or none that forward mode can compute."""


class Fitted(NamedTuple):
    """Gaussian of each example, in float64."""

    mean: Tensor
    """[B, D]."""
    tril: Tensor
    """Cholesky factor of the covariance [B, D, D]."""


class Settings(NamedTuple):
    """Options of the fit, those of :class:`~fastvae.estimation.proposals.Refined`."""

    steps: int
    draws: int
    curvature_draws: int
    moment_steps: int
    moment_draws: int
    diagonal: bool
    posterior: float
    prior: float
    scale: float | None


class Begun(NamedTuple):
    """Inputs with the refined proposal in place of q, and q's ELBO [B]."""

    inputs: Inputs
    elbo: Tensor


def begin(settings: Settings, inputs: Inputs, seed: Tensor, row_offset: int, chunks: Chunks) -> Begun:
    """Fit each example's Gaussian, and return the mixture to draw from.

    Raises:
        NoDerivative: if log p(x, z) cannot be differentiated by z.
    """
    fitted = refine(inputs, seed, settings, row_offset, chunks)
    r = with_latent_of(inputs.q, _mixture(inputs, fitted, seed, settings, row_offset, chunks))
    of_q = _stream.stream(inputs, _seed(seed, _ELBO), 0, _ELBO, chunks, row_offset=row_offset)
    return Begun(inputs._replace(q=r), torch.cat(list(of_q)).double().mean(0))


def _seed(seed: Tensor, use: int) -> Tensor:
    """Return the seed of draws that the estimate does not use."""
    return derived_seed(seed.reshape(-1)[0], _SEEDS[use])


def _mixture(
    inputs: Inputs, fitted: Fitted, seed: Tensor, settings: Settings, row_offset: int, chunks: Chunks
) -> Distribution:
    """Return the proposal: the Gaussian alone for examples whose posterior it is."""
    q, like = inputs.q, example_of(inputs.q, row_offset)
    batch, d = fitted.mean.shape
    exact = _gaussian(fitted, 1.0, like)
    wide = _gaussian(fitted, settings.scale or 1 + 0.4 / math.sqrt(d), like)
    shares = settings.posterior, settings.prior
    prior = expanded_at_address(inputs.prior, batch, like)
    if prior is None:
        return StratifiedMixture([exact, q, wide], [0.0, sum(shares), 1 - sum(shares)], dtype=like.dtype)
    stays = _is_posterior(inputs, exact, prior, _seed(seed, _TRIAL), row_offset, chunks)
    return StratifiedMixture([exact, q, prior, wide], [0.0, *shares, 1 - sum(shares)], 1, stays, like.dtype)


def _is_posterior(
    inputs: Inputs, r: Distribution, prior: Distribution, seed: Tensor, row_offset: int, chunks: Chunks
) -> Tensor:
    """Return True for the examples whose weights p(x, z) / r(z) are equal, [B].

    At draws of r they are equal, too, if r is one of several modes; at some of the prior's they then are far
    larger.
    """
    z, log_r = rsample_log_prob(r, _TRIAL, seed, row_offset=row_offset)
    log_w = _log_joint(inputs, z, chunks) - log_r.double()
    far = draw_z(prior, _TRIAL, seed + 1, 0, row_offset).to(z.dtype)
    log_p, log_r = _log_joint(inputs, far, chunks), r.log_prob(far).double()
    w = torch.softmax(log_w, 0)
    equal = len(w) * w.square().sum(0) - 1 < _EQUAL
    # Far from x both densities are large numbers, rounded.
    allowed = 0.1 + 1e-5 * (log_p.abs() + log_r.abs())
    return equal & (log_p - log_r <= log_w.mean(0) + allowed).all(0)


def _gaussian(fitted: Fitted, scale: float, like: Tensor) -> Distribution:
    tril = scale * fitted.tril
    if like.dtype.itemsize == 2:
        # Half precision would round the factor; a t of many degrees of freedom has float64 parameters.
        return MultivariateStudentT(fitted.mean, tril, max(8, like.shape[1]), like.dtype)
    return FullNormal.of(fitted.mean.to(like.dtype), tril.to(like.dtype))


class _Point(NamedTuple):
    """Gaussian of each example, and log p(x, z) at draws from it."""

    mean: Tensor
    """[B, D]."""
    precision: Tensor
    """[B, D, D]."""
    deviations: Tensor
    """z minus the mean, [n, B, D]."""
    log_p: Tensor
    """Mean of log p(x, z), [B]."""
    gradient: Tensor
    """Mean of its gradient by z, [B, D]."""

    def bound(self, curvature: Tensor) -> Tensor:
        """Return the ELBO without its constant [B], the curvature's quadratic form as a control variate."""
        steered = torch.einsum("nbi,bij->nbj", self.deviations, curvature)
        of_draws = (steered * self.deviations).sum(2).mean(0)
        covariance = torch.linalg.inv_ex(self.precision).inverse
        expected = (covariance * curvature).sum((1, 2))
        value: Tensor = self.log_p + 0.5 * (of_draws - expected) - 0.5 * torch.logdet(self.precision)
        return value

    def where(self, chosen: Tensor, other: _Point) -> _Point:
        """Return the other's values for the chosen examples [B]."""
        rows = chosen[:, None]
        return _Point(
            torch.where(rows, other.mean, self.mean),
            torch.where(rows[:, :, None], other.precision, self.precision),
            torch.where(rows, other.deviations, self.deviations),
            torch.where(chosen, other.log_p, self.log_p),
            torch.where(rows, other.gradient, self.gradient),
        )


def refined_posterior(
    inputs: Inputs, seed: Tensor, steps: int, diagonal: bool, chunks: Chunks
) -> Distribution:
    """Return the Gaussian of the largest ELBO of each example, in the dtype of q's draws.

    Raises:
        ValueError: unless q and the prior are over all of R^D.
    """
    check_everywhere("vae.refine", "a q and a prior over all of R^D", inputs.q, inputs.prior)
    settings = Settings(steps, 16, 2, 0, 0, diagonal, 0.0, 0.0, 1.0)
    fitted = refine(inputs, seed, settings, 0, chunks)
    return with_latent_of(inputs.q, _gaussian(fitted, 1.0, example_of(inputs.q)))


def refine(inputs: Inputs, seed: Tensor, settings: Settings, row_offset: int, chunks: Chunks) -> Fitted:
    """Fit a Gaussian with a full covariance to p(z|x) of each example.

    A step that lowers an example's ELBO, at the same noise, is repeated at a third of its size.

    Raises:
        NoDerivative: if log p(x, z) cannot be differentiated by z.
    """
    seed = seed.reshape(-1)[0]
    mean, variance = _moments(inputs.q, seed, row_offset)
    like = example_of(inputs.q, row_offset)
    batch, d = mean.shape

    def noise(draws: int, level: int) -> Tensor:
        return random.normal(seed, draws, batch, d, row_offset=row_offset, level=_LEVEL + level).double()

    def antithetic(draws: int, level: int) -> Tensor:
        half = noise(-(-draws // 2), level)
        return torch.cat([half, -half])

    eps = antithetic(settings.draws, 0)

    def at(mean: Tensor, precision: Tensor) -> _Point:
        z = _at(mean, precision, eps)
        log_p, gradient = _log_joint_gradient(inputs, z.to(like.dtype), chunks)
        return _Point(mean, precision, z - mean, log_p.mean(0), gradient.mean(0))

    first = point = at(mean, torch.diag_embed(1 / variance))
    size = mean.new_ones(batch)
    moved = torch.ones(batch, dtype=torch.bool, device=mean.device)
    curvature = point.precision
    for step in range(settings.steps):
        if bool(moved.any()):
            z = _at(point.mean, point.precision, noise(settings.curvature_draws, 1 + step)).to(like.dtype)
            found = _curvature(inputs, z, point.precision, int(seed) + step, row_offset, chunks)
            if settings.diagonal:
                found = torch.diag_embed(found.diagonal(dim1=1, dim2=2))
            curvature = torch.where(moved[:, None, None], found, curvature)
        share = size[:, None, None] / max(1, step - _AVERAGED + 1)
        precision = (1 - share) * point.precision + share * curvature
        new = at(
            point.mean + size[:, None] * torch.linalg.solve_ex(precision, point.gradient).result, precision
        )
        moved = new.bound(curvature) >= point.bound(curvature) - _SLACK  # False for NaN
        point = point.where(moved, new)
        size = torch.where(moved, (2 * size).clamp(max=1), size / 3)
    mean, precision, *_ = first.where(point.bound(curvature) >= first.bound(curvature) - _SLACK, point)
    covariance = torch.linalg.inv_ex(precision).inverse
    fitted = Fitted(mean, torch.linalg.cholesky_ex((covariance + covariance.mT) / 2).L)
    for step in range(settings.moment_steps):
        eps = antithetic(settings.moment_draws, 1 + settings.steps + step)
        step_size = 1 / max(1, step - _AVERAGED + 1)
        fitted = _towards_moments(inputs, fitted, eps, step_size, settings.diagonal, like.dtype, chunks)
    return fitted


def _towards_moments(
    inputs: Inputs, fitted: Fitted, eps: Tensor, share: float, diagonal: bool, dtype: torch.dtype,
    chunks: Chunks,
) -> Fitted:  # fmt: skip
    """Move the Gaussian by a share of the distance to the mean and covariance of p(z|x).

    The weights are tempered until their effective sample size is a quarter of the draws, and off-diagonal
    elements are shrunk by ESS / (ESS + D).
    """
    mean, tril = fitted
    z = mean + torch.einsum("bij,nbj->nbi", tril, eps)
    log_p, gradient = _log_joint_gradient(inputs, z.to(dtype), chunks)
    gap = torch.einsum("bij,nbi->nbj", tril, gradient) + eps
    log_w = log_p + 0.5 * eps.square().sum(2)
    w, ess, _ = tempered(log_w, log_w.new_ones(len(log_w), 1), math.ceil(_LEAST * len(log_w)))
    # A draw of weight 0 may have an infinite gradient.
    gap = torch.where(gap.isfinite(), gap, 0.0)
    shift = (w[:, :, None] * gap).sum(0)
    excess = (w[:, :, None] * eps).permute(1, 2, 0) @ gap.transpose(0, 1)
    excess = (excess + excess.mT) / 2 - shift[:, :, None] * shift[:, None]
    kept = 0.0 if diagonal else (ess / (ess + mean.shape[1]))[:, None, None]
    excess = kept * excess + (1 - kept) * torch.diag_embed(excess.diagonal(dim1=1, dim2=2))
    # One example that is not finite would fail all of the batch.
    excess = torch.where(excess.isfinite().all((1, 2), keepdim=True), excess, 0.0)
    try:
        values, vectors = torch.linalg.eigh(excess)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined] # gradients of any size
        return fitted
    factors = (1 + share * values).clamp(_NARROWEST, _WIDEST)
    root = torch.linalg.cholesky_ex((vectors * factors[:, None]) @ vectors.mT).L
    moved = Fitted(mean + share * (tril @ shift[:, :, None])[:, :, 0], tril @ root)
    sound = (moved.mean.isfinite().all(1) & moved.tril.isfinite().all((1, 2)))[:, None]
    return Fitted(torch.where(sound, moved.mean, mean), torch.where(sound[:, None], moved.tril, tril))


def _moments(q: Distribution, seed: Tensor, row_offset: int) -> tuple[Tensor, Tensor]:
    """Return mean and variance of q, [B, D] in float64, from draws if q does not name them."""
    mean = known_mean(q)
    try:
        variance = q.variance
    except NotImplementedError:
        variance = None
    if mean is None or variance is None or not bool(variance.isfinite().all()):
        z = rsample_log_prob(q, _MOMENTS, _seed(seed, _MOMENTS), row_offset=row_offset)[0].double()
        of_draws, spread = z.mean(0), z.var(0)
        if mean is None or variance is None:
            mean, variance = of_draws, spread
        # The other examples keep the moments that they have in any batch.
        sound = variance.isfinite().all(1, keepdim=True)
        mean, variance = torch.where(sound, mean, of_draws), torch.where(sound, variance, spread)
    return mean.double(), variance.double().clamp(min=1e-12)


def _at(mean: Tensor, precision: Tensor, eps: Tensor) -> Tensor:
    """Return z [n, B, D] of the Gaussian at this noise."""
    # With L Lᵀ = Λ, the solution of Lᵀ z = ε has the covariance Λ⁻¹.
    root = torch.linalg.cholesky_ex(precision).L
    moved: Tensor = torch.linalg.solve_triangular(root.mT, eps.permute(1, 2, 0), upper=True)
    return mean + moved.permute(2, 0, 1)


def _log_joint(inputs: Inputs, z: Tensor, chunks: Chunks) -> Tensor:
    """Return log p(x, z) for z [n, B, D], [n, B] in float64."""
    values = []
    while len(z):
        part, z = z.tensor_split([chunks.draws(inputs, z.shape[1], len(z))])
        values.append((inputs.log_likelihood(part, chunks.see) + inputs.prior.log_prob(part)).double())
    return torch.cat(values)


def _log_joint_gradient(inputs: Inputs, z: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """Return log p(x, z) [n, B] for z [n, B, D], and its gradient [n, B, D], in float64."""
    values, gradients = [], []
    while len(z):
        part, z = z.tensor_split([chunks.draws(inputs, z.shape[1], len(z))])
        with torch.enable_grad():
            leaf = part.detach().requires_grad_()
            log_likelihood = inputs.log_likelihood(leaf, chunks.see, frozen=True)
            if not log_likelihood.requires_grad:
                raise NoDerivative(
                    "the decoder's output has no gradient by z; it detaches z or computes in no_grad"
                )
            log_p = log_likelihood + inputs.prior.log_prob(leaf)
            (found,) = torch.autograd.grad(log_p.sum(), leaf)
        values.append(log_p.detach().double())
        gradients.append(found.double())
    return torch.cat(values), torch.cat(gradients)


def _curvature(
    inputs: Inputs, z: Tensor, precision: Tensor, key: int, row_offset: int, chunks: Chunks
) -> Tensor:
    """Return the mean of the Gauss–Newton matrix [B, D, D] over draws z [n, B, D] of this precision."""
    n, batch, d = z.shape
    total = torch.zeros(batch, d, d, dtype=torch.float64, device=z.device)
    size = max(1, _NUMBERS // max(1, d * event_size(inputs.x)))
    for start in range(0, batch, size):
        rows = torch.arange(start, min(start + size, batch), device=z.device)
        part = inputs.at(rows) if size < batch else inputs
        keys = [_key(key, later_row(row_offset, start + i)) for i in range(len(rows))]
        for draw in z[:, start : start + size]:
            for scores in _scores(part, draw, keys, chunks):
                total[start : start + size] += torch.einsum("dbe,cbe->bdc", scores, scores).double()
    return total / n + _prior_precision(inputs, z, precision)


def _key(key: int, row: int) -> int:
    return (key + 0x9E3779B97F4A7C15 * (row + 2)) % 2**63


def _scores(inputs: Inputs, z: Tensor, keys: list[int], chunks: Chunks) -> Iterator[Tensor]:
    """Yield arrays [D, B, E] whose outer products, summed over E, estimate Jᵀ W J at z [B, D]."""
    batch, d = z.shape
    units = torch.eye(d, dtype=z.dtype, device=z.device)[:, None].expand(d, batch, d)
    found = []
    for tangents in units.split(chunks.draws(inputs, batch, d)):
        try:
            found.append(_pushed(inputs, z, tangents))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise NoDerivative(f"forward-mode differentiation of the decoder failed: {error}") from error
    parameters, jacobian = found[0][0], _joined([tangent for _, tangent in found])
    conditioning = inputs.conditioning or Conditioning()
    for part in _parts(inputs.likelihood, inputs.x, parameters, jacobian, conditioning):
        yield from part.scores(keys)


def _pushed(inputs: Inputs, z: Tensor, tangents: Tensor) -> tuple[Any, Any]:
    """Return the decoder's output at z [B, D], and its derivatives in n directions [n, B, D]."""

    def output(rows: Tensor, copies: int) -> Any:
        return inputs.likelihood.read(inputs.output(rows, copies), inputs.x)

    def derivative(tangent: Tensor) -> Any:
        return torch.func.jvp(lambda at: output(at, 1), (z,), (tangent,))

    if not _is_unobserved(inputs.decoder):
        return _pushed_by_copies(output, z, tangents)
    try:
        # One pass of the decoder for all directions.
        out: Any = (None, 0)
        found: tuple[Any, Any] = torch.func.vmap(derivative, out_dims=out)(tangents)
        return found
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError, ValueError):
        return _pushed_by_copies(output, z, tangents)


def _pushed_by_copies(output: Callable[[Tensor, int], Any], z: Tensor, tangents: Tensor) -> tuple[Any, Any]:
    """Return the same from one pass of a copy of z for each direction."""
    n = len(tangents)
    with forward_ad.dual_level():
        found = output(forward_ad.make_dual(z.repeat(n, 1), tangents.flatten(0, 1)), n)
        if all([forward_ad.unpack_dual(t).tangent is None for t in all_tensors(found)]):
            raise NoDerivative("the decoder's output has no derivative by z; it detaches z or ignores it")
        return _unpacked(found, n)


def _is_unobserved(decoder: Any) -> bool:
    """Return True for modules without hooks.

    A tensor that a hook or a user's function stores under vmap has no storage that could be copied or saved.
    """
    owners = modules_of(decoder)
    return bool(owners) and not any(has_hooks(module) for owner in owners for module in owner.modules())


def _unpacked(output: Any, copies: int) -> tuple[Any, Any]:
    """Return the output for the first of several copies of the rows, and all tangents [n, B, ...]."""
    if isinstance(output, dict):
        pairs = {name: _unpacked(part, copies) for name, part in output.items()}
        return {n: p for n, (p, _) in pairs.items()}, {n: t for n, (_, t) in pairs.items()}
    if isinstance(output, (tuple, list)):
        found = [_unpacked(part, copies) for part in output]
        return tuple(p for p, _ in found), tuple(t for _, t in found)
    if not isinstance(output, Tensor):
        raise NoDerivative(f"the decoder returned {type(output).__name__}, whose derivatives are not known")
    primal, tangent = forward_ad.unpack_dual(output)
    if tangent is None:
        tangent = torch.zeros_like(primal)
    return primal.unflatten(0, (copies, -1))[0].detach(), tangent.detach().unflatten(0, (copies, -1))


def _joined(parts: list[Any]) -> Any:
    """Concatenate corresponding tensors of nested outputs along their first axis."""
    first = parts[0]
    if isinstance(first, dict):
        return {name: _joined([part[name] for part in parts]) for name in first}
    if isinstance(first, tuple):
        return tuple([_joined(list(same)) for same in zip(*parts, strict=True)])
    return first if len(parts) == 1 else torch.cat(parts)


class _Part(NamedTuple):
    """Part of the data, with the decoder's output for it and the Jacobian."""

    likelihood: Likelihood
    x: Tensor
    parameters: Any
    jacobian: Any
    conditioning: Conditioning | None
    weight: float

    def scores(self, keys: list[int]) -> Iterator[Tensor]:
        """Yield the products of the Jacobian and scores of simulated x, [D, B, E]."""
        outputs, jacobians = all_tensors(self.parameters), all_tensors(self.jacobian)
        if isinstance(self.likelihood, Declared):
            known = self.likelihood.information_of(self.parameters, self.conditioning)
            if known is not None:
                for information, jacobian in zip(known, jacobians, strict=True):
                    yield ((self.weight * information).sqrt() * jacobian).flatten(2)
                return
        found = [self._score(outputs, x) for x in self._simulated(keys)]
        scale = math.sqrt(self.weight / len(found))
        if len(outputs) == 1 and outputs[0].shape == self.x.shape:
            # One output for each element: one array serves for all simulations.
            size = torch.stack([score for (score,) in found]).square().sum(0).sqrt()
            yield (scale * size * jacobians[0]).flatten(2)
            return
        for scores in found:
            # Outputs of the same element are added; for other shapes the estimate leaves out their products.
            by_shape: dict[torch.Size, Tensor] = {}
            for score, jacobian in zip(scores, jacobians, strict=True):
                product = score * jacobian
                if isinstance(self.likelihood, Categorical):
                    product = product.sum(self.likelihood.axis + (self.likelihood.axis > 0))
                product = product.flatten(2)
                seen = by_shape.get(product.shape)
                by_shape[product.shape] = product if seen is None else seen + product
            for total in by_shape.values():
                yield scale * total

    def _simulated(self, keys: list[int]) -> list[Tensor]:
        """Simulate x [B, *event] from p(x|z), each row by its own key, or return the observed x."""
        generator = torch.Generator(self.x.device)
        number = min(64, max(4, _SIMULATED // max(1, event_size(self.x))))
        drawn = []
        try:
            for row, key in enumerate(keys):
                generator.manual_seed(key)
                given = [p[row].expand(number, *p[row].shape) for p in all_tensors(self.parameters)]
                drawn.append(self.likelihood.sample(self._packed(given), generator=generator))
            found = torch.stack(drawn, 1)
        except (NotImplementedError, TypeError, ValueError, RuntimeError):
            return [self.x]
        return list(found.to(self.x.dtype)) if found.shape[1:] == self.x.shape else [self.x]

    def _packed(self, outputs: list[Tensor]) -> Any:
        return outputs[0] if isinstance(self.parameters, Tensor) else tuple(outputs)

    def _score(self, outputs: list[Tensor], x: Tensor) -> list[Tensor]:
        """Return the gradient of log p(x|z) by the decoder's outputs."""
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in outputs]
            value = self.likelihood.log_likelihood(x, self._packed(leaves), 1, self.conditioning)
            return list(torch.autograd.grad(value.sum(), leaves, allow_unused=True, materialize_grads=True))


def _parts(
    likelihood: Likelihood, x: Any, parameters: Any, jacobian: Any, conditioning: Conditioning
) -> Iterator[_Part]:
    if not isinstance(likelihood, Joint):
        given = Conditioning.of(conditioning.mask, conditioning.size_factor, None)
        yield _Part(likelihood, x, parameters, jacobian, given, 1.0)
        return
    for name, part in likelihood.parts.items():
        weight = likelihood._weights[name]
        yield _Part(part, x[name], parameters[name], jacobian[name], conditioning.part(name), weight)  # type: ignore[arg-type]


def _prior_precision(inputs: Inputs, z: Tensor, precision: Tensor) -> Tensor:
    """Return the prior's precision [D, D], or the mean of its negative Hessian at z [n, B, D], [B, D, D].

    ``precision`` [B, D, D] is that of the draws z.
    """
    d = z.shape[2]
    eye = torch.eye(d, dtype=torch.float64, device=z.device)
    if is_family(inputs.prior, StandardNormal):
        return eye

    def gradient(at: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = at.to(z.dtype).detach().requires_grad_()
            (found,) = torch.autograd.grad(inputs.prior.log_prob(leaf).sum(), leaf)
        return found.double()

    # Central differences: the gradients of some priors have none themselves, or jump. A step of the example's
    # own standard deviation smooths them over its draws, whatever the rest of the batch is.
    wide = z.double()
    variance = torch.linalg.inv_ex(precision).inverse.diagonal(dim1=1, dim2=2)
    step = variance.nan_to_num(1.0).clamp(1e-8, 1e8).sqrt()
    columns = [
        (gradient(wide - s[:, None] * e) - gradient(wide + s[:, None] * e)).mean(0) / (2 * s[:, None])
        for s, e in zip(step.mT, eye, strict=True)
    ]
    hessian = torch.stack(columns, -1).nan_to_num()
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    # The density of a mixture is convex between its components.
    found: Tensor = (vectors * values.clamp(min=1e-3)[:, None]) @ vectors.mT
    return found
