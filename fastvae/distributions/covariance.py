"""Normal distributions with correlated dimensions."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributions as td
from torch.nn import functional

from .. import ops, random
from ..core.checks import check_same_device, check_tensor, shape_of
from ..core.constants import cached_constant
from ..core.formula import Formula
from ..core.special import expm1_minus, log1p_rest
from ..ops.normal_diagonal import native_kl
from ..ops.op import accumulator
from .base import Distribution, Located, hold, is_family, is_still
from .closed_form import register_kl
from .draws import Drawable
from .normal import DiagonalNormal, StandardNormal
from .words import check_latents

_Same = TypeVar("_Same", bound=Distribution)
LOG_2_PI = math.log(2 * math.pi)


class _Correlated(Located):
    """Base class of this file's families, with a mean [B, D] or [D]."""

    mu: Tensor

    @property
    def loc(self) -> Tensor:  # type: ignore[override]
        return self.mu

    @property
    def mean(self) -> Tensor:
        return self.mu

    @property
    def _dtype(self) -> torch.dtype:
        return accumulator(self.mu.dtype)

    def _draw(self, eps: Tensor) -> Tensor:
        """Transform standard normals [K, B, …] to z [K, B, D]."""
        raise NotImplementedError

    def _normals(self) -> int:
        return self.mu.shape[-1]

    def _like(self, made: _Same) -> _Same:
        """Copy this distribution's ``z_dtype`` to ``made``."""
        if self.z_dtype is not None:
            made.z_dtype = self.z_dtype
        return made

    def _draw_alone(self, k: int, dim: int | None, seed: Tensor) -> Tensor:
        check_latents(self.family.__name__, self.mu.shape[0], dim)
        return self._draw(random.normal(seed, k, 1, self._normals(), dtype=self._dtype))[:, 0]

    def _covariance(self) -> tuple[Tensor, Tensor]:
        """Return the variances [..., D], and half the log determinant of the covariance [...]."""
        raise NotImplementedError

    @property
    def variance(self) -> Tensor:
        return self._covariance()[0].to(self.mu.dtype)

    def entropy(self) -> Tensor:
        return self._covariance()[1] + 0.5 * self.mu.shape[-1] * (1 + LOG_2_PI)


@cached_constant(64)
def triangle_positions(d: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Return the rows and columns of a packed lower triangle's entries, and the diagonal's indices [D]."""
    rows, columns = torch.tril_indices(d, d, device=device)
    row = torch.arange(d, device=device)
    return rows, columns, row * (row + 3) // 2


class FullNormal(_Correlated):
    r"""Normal distribution N(mu, L Lᵀ) with a full covariance.

    .. math:: \log p(z) = -½ \|L^{-1} (z - μ)\|^2 - \sum_d \log L_{dd} - \tfrac{D}{2} \log 2π

    A posterior's density at its own draws needs no triangular solve.

    Args:
        mu: the mean: [B, D] for a posterior, [D] for a prior.
        tril: the lower triangle of L, row by row, [..., D(D+1)/2], with logarithms on its diagonal, so that
            any numbers are valid. :meth:`of` takes L itself.

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.

    References:
        Kingma & Welling, An Introduction to Variational Autoencoders, 2019, section 2.5.1.

    Example:
        >>> import torch, fastvae
        >>> from fastvae.distributions import FullNormal
        >>> encoder, decoder = torch.nn.Linear(7, 3 + 6), torch.nn.Linear(3, 7)
        >>> x = torch.rand(4, 7)
        >>> mu, tril = encoder(x).split([3, 6], 1)
        >>> (-fastvae.elbo(x, FullNormal(mu, tril), decoder, likelihood="bernoulli")).backward()
    """

    tril: Tensor

    def __init__(self, mu: Tensor, tril: Tensor):
        super().__init__()
        check_tensor("mu", mu)
        check_tensor("tril", tril)
        check_same_device("tril", tril, "mu", mu)
        d = mu.shape[-1] if mu.dim() else 0
        expected = (*mu.shape[:-1], d * (d + 1) // 2)
        if mu.dim() not in (1, 2) or tril.shape != expected:
            raise ValueError(
                f"mu has shape {shape_of(mu)} and tril {shape_of(tril)}; expected mu [B, D] of a posterior "
                f"or [D] of a prior, and tril [..., D(D+1)/2] = {list(expected)}, the lower triangle row by "
                "row. For a matrix use fastvae.distributions.FullNormal.of(mu, scale_tril)"
            )
        hold(self, mu=mu, tril=tril)

    @classmethod
    def of(cls, mu: Tensor, scale_tril: Tensor) -> FullNormal:
        """Construct the distribution from a Cholesky factor.

        Args:
            mu: the mean [..., D].
            scale_tril: L [..., D, D], whose upper triangle is ignored.
        """
        check_tensor("mu", mu)
        check_tensor("scale_tril", scale_tril)
        if scale_tril.shape != (*mu.shape, mu.shape[-1]):
            raise ValueError(
                f"scale_tril has shape {shape_of(scale_tril)} for a mu of {shape_of(mu)}; expected "
                f"[..., D, D] = {[*mu.shape, mu.shape[-1]]}"
            )
        rows, columns, diagonal = triangle_positions(mu.shape[-1], mu.device)
        entries = scale_tril[..., rows, columns]
        return cls(mu, entries.index_copy(-1, diagonal, entries[..., diagonal].log()))

    def wide(self) -> tuple[Tensor, Tensor]:
        """Return mu and tril in the accumulation dtype."""
        dtype = accumulator(torch.promote_types(self.mu.dtype, self.tril.dtype))
        return self.mu.to(dtype), self.tril.to(dtype)

    def _parts(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Return mu, L [..., D, D], and the logarithms of its diagonal [..., D]; by default as wide."""
        mu, tril = (t.to(dtype or t.dtype) for t in self.wide())
        rows, columns, diagonal = triangle_positions(mu.shape[-1], mu.device)
        logs = tril[..., diagonal]
        entries = tril.index_copy(-1, diagonal, torch.exp(logs))
        scale = tril.new_zeros((*mu.shape, mu.shape[-1]))
        scale = scale.flatten(-2).index_copy(-1, rows * mu.shape[-1] + columns, entries)
        return mu, scale.unflatten(-1, (mu.shape[-1], mu.shape[-1])), logs

    @property
    def scale_tril(self) -> Tensor:
        """Cholesky factor L of the covariance, [..., D, D]."""
        return self._parts()[1].to(self.mu.dtype)

    def _covariance(self) -> tuple[Tensor, Tensor]:
        _, scale, logs = self._parts()
        return scale.square().sum(-1), logs.sum(-1)

    def _draw(self, eps: Tensor) -> Tensor:
        mu, scale, _ = self._parts()
        return mu + eps @ scale.mT

    def rsample_log_prob(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        place: dict[str, Any] = {"sample_offset": sample_offset, "row_offset": row_offset}
        if seed.dim():  # quasi-Monte-Carlo noise, which the op does not support
            mu, scale, logs = self._parts()
            eps = random.normal(seed, samples, *mu.shape, dtype=mu.dtype, **place)
            log_q = -0.5 * (eps.square() + LOG_2_PI).sum(-1) - logs.sum(-1)
            z = mu + rows_times(eps, scale.mT)
            return z.to(torch.promote_types(self.mu.dtype, self.tril.dtype)), log_q
        return ops.rsample_tril(self.mu, self.tril, k=samples, seed=seed, **place)

    def log_prob(self, z: Tensor) -> Tensor:
        mu, scale, logs = self._parts()
        white = triangular_solve(scale, z.to(mu.dtype) - mu)
        return -0.5 * (white.square() + LOG_2_PI).sum(-1) - logs.sum(-1)

    def rows(self, start: int, stop: int) -> FullNormal | None:
        if not is_family(self, FullNormal):
            return None
        return self._like(FullNormal(self.mu[start:stop], self.tril[start:stop]))

    def expand(self, batch: int, like: Tensor) -> Distribution:
        if not is_family(self, FullNormal):
            return super().expand(batch, like)
        return FullNormal(self.mu.expand(batch, -1), self.tril.expand(batch, -1))

    def as_torch(self) -> td.MultivariateNormal | None:
        if not is_still(self, FullNormal):
            return None
        mu, scale, _ = self._parts()
        return td.MultivariateNormal(mu, scale_tril=scale, validate_args=False)


def triangular_solve(scale: Tensor, delta: Tensor, upper: bool = False) -> Tensor:
    """Return L⁻¹ delta [K, B, D], or [..., D] for a single L."""
    solved: Tensor
    if scale.dim() == 2:
        solved = torch.linalg.solve_triangular(scale, delta.reshape(-1, delta.shape[-1]).mT, upper=upper)
        return solved.mT.reshape(delta.shape)
    solved = torch.linalg.solve_triangular(scale, delta.movedim(0, -1), upper=upper)
    return solved.movedim(-1, 0)


class LowRankNormal(Drawable, _Correlated):
    r"""Normal distribution N(mu, diag exp(logvar) + F Fᵀ): a diagonal plus rank-R covariance.

    With :math:`W = e^{-\mathrm{logvar}/2} F`, :math:`w = e^{-\mathrm{logvar}/2} (z - μ)`, the Cholesky
    factor C of :math:`I + WᵀW` and :math:`s = (I + WᵀW)^{-1} Wᵀ w`, the mean of the common factors given z,

    .. math:: \log p(z) = -½ \big(\|w - W s\|^2 + \|s\|^2 + D \log 2π\big)
              - ½ \sum_d \mathrm{logvar}_d - \sum_r \log C_{rr}

    A draw :math:`w = ε + W η` has :math:`w - W s = ε - W δ` and :math:`s = η + δ`, with
    :math:`δ = (I + WᵀW)^{-1} (Wᵀ ε - η)`: its density comes from the noise, without large numbers that
    cancel. The squares are minimal at s, so that its error enters only squared.

    Args:
        mu, logvar: mean and log variance of the diagonal part: [B, D] for a posterior, [D] for a prior.
        factor: F, [B, D, R] for a posterior, [D, R] for a prior.

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.

    Example:
        >>> import torch, fastvae
        >>> q = fastvae.distributions.LowRankNormal(torch.zeros(4, 3), torch.zeros(4, 3), torch.ones(4, 3, 2))
        >>> q.log_prob(torch.zeros(5, 4, 3)).shape
        torch.Size([5, 4])
    """

    logvar: Tensor
    factor: Tensor

    def __init__(self, mu: Tensor, logvar: Tensor, factor: Tensor):
        super().__init__()
        for name, value in (("mu", mu), ("logvar", logvar), ("factor", factor)):
            check_tensor(name, value)
            check_same_device(name, value, "mu", mu)
        fits = mu.dim() in (1, 2) and logvar.shape == mu.shape and factor.shape[:-1] == mu.shape
        if not fits:
            raise ValueError(
                f"mu has shape {shape_of(mu)}, logvar {shape_of(logvar)} and factor {shape_of(factor)}; "
                "expected [B, D], [B, D] and [B, D, R] of a posterior, [D], [D] and [D, R] of a prior"
            )
        hold(self, mu=mu, logvar=logvar, factor=factor)

    def _normals(self) -> int:
        return self.mu.shape[-1] + self.factor.shape[-1]

    def wide(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return mu, logvar and the factor in the accumulation dtype."""
        dtypes = (self.mu.dtype, self.logvar.dtype, self.factor.dtype)
        dtype = accumulator(functools.reduce(torch.promote_types, dtypes))
        return self.mu.to(dtype), self.logvar.to(dtype), self.factor.to(dtype)

    def _split(self, eps: Tensor) -> list[Tensor]:
        """Return the noise of each dimension [K, B, D], and that of the common factors [K, B, R]."""
        return list(eps.split([self.mu.shape[-1], self.factor.shape[-1]], -1))

    def _draw(self, eps: Tensor) -> Tensor:
        return self._of_noise(self.wide(), eps)

    def _of_noise(self, wide: tuple[Tensor, Tensor, Tensor], eps: Tensor) -> Tensor:
        given = *wide, *self._split(eps)
        # Autocast rounds the product, and its gradient.
        usual = self.mu.dim() == 2 and self.mu.is_cpu and not torch.is_autocast_enabled("cpu")
        z: Tensor = _factors_drawn(*given) if usual else _composed_draw(*given)
        return z

    def draw(self, samples: int, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
        place: dict[str, Any] = {"sample_offset": sample_offset, "row_offset": row_offset}
        if not is_still(self, LowRankNormal):
            return self.rsample_log_prob(samples, seed, **place)[0]
        wide = self.wide()
        eps = random.normal(seed, samples, self.batch, self._normals(), dtype=wide[0].dtype, **place)
        return self._of_noise(wide, eps).to(self.mu.dtype)

    def rsample_log_prob(
        self, samples: int, seed: Tensor, *, sample_offset: int = 0, row_offset: int = 0
    ) -> tuple[Tensor, Tensor]:
        place: dict[str, Any] = {"sample_offset": sample_offset, "row_offset": row_offset}
        mu, logvar, factor = self.wide()
        eps = random.normal(seed, samples, self.batch, self._normals(), dtype=mu.dtype, **place)
        own, common = self._split(eps)
        white, root = _capacitance(logvar, factor)
        shift = _solve(root, rows_times(own, white) - common)
        log_q = self._log_density(logvar, root, own - rows_times(shift, white.mT), common + shift)
        return self._draw(eps).to(self.mu.dtype), log_q

    def _covariance(self) -> tuple[Tensor, Tensor]:
        _, logvar, factor = self.wide()
        _, root = _capacitance(logvar, factor)
        return torch.exp(logvar) + factor.square().sum(-1), 0.5 * logvar.sum(-1) + _sum_of_logs(root)

    def log_prob(self, z: Tensor) -> Tensor:
        mu, logvar, factor = self.wide()
        white, root = _capacitance(logvar, factor)
        w = (z.to(mu.dtype) - mu) * torch.exp(-0.5 * logvar)
        common = _solve(root, rows_times(w, white))
        return self._log_density(logvar, root, w - rows_times(common, white.mT), common)

    def _log_density(self, logvar: Tensor, root: Tensor, rest: Tensor, common: Tensor) -> Tensor:
        """Return the log density of w = W s + rest, with s = ``common``."""
        square: Tensor = (rest.square() + logvar + LOG_2_PI).sum(-1) + common.square().sum(-1)
        return -0.5 * square - _sum_of_logs(root)

    def rows(self, start: int, stop: int) -> LowRankNormal | None:
        if not is_family(self, LowRankNormal):
            return None
        return self._like(LowRankNormal(*(t[start:stop] for t in (self.mu, self.logvar, self.factor))))

    def expand(self, batch: int, like: Tensor) -> Distribution:
        if not is_family(self, LowRankNormal):
            return super().expand(batch, like)
        factor = self.factor.expand(batch, *self.factor.shape[-2:])
        return LowRankNormal(self.mu.expand(batch, -1), self.logvar.expand(batch, -1), factor)

    def as_torch(self) -> td.LowRankMultivariateNormal | None:
        if not is_still(self, LowRankNormal):
            return None
        mu, logvar, factor = self.wide()
        return td.LowRankMultivariateNormal(mu, factor, torch.exp(logvar), validate_args=False)


def _composed_draw(mu: Tensor, logvar: Tensor, factor: Tensor, own: Tensor, common: Tensor) -> Tensor:
    return mu + torch.exp(0.5 * logvar) * own + rows_times(common, factor.mT)


def _value_draw(
    mu: Tensor, logvar: Tensor, factor: Tensor, own: Tensor, common: Tensor
) -> tuple[Tensor, tuple[Tensor]]:
    # The derivative of z by logvar.
    slope = torch.exp(0.5 * logvar).mul(own).mul_(0.5)
    return torch.add(mu, slope, alpha=2).add_(rows_times(common, factor.mT)), (slope,)


def _gradient_draw(
    grads: Sequence[Tensor],
    kept: Sequence[Tensor],
    mu: Tensor,
    logvar: Tensor,
    factor: Tensor,
    own: Tensor,
    common: Tensor,
) -> tuple[Tensor | None, ...]:
    grad, slope = grads[0], kept[0]
    of_factor = torch.bmm(grad.permute(1, 2, 0), common.transpose(0, 1))
    if len(grad) == 1:
        return grad[0], (grad * slope)[0], of_factor, None, None
    return grad.sum(0), (grad * slope).sum(0), of_factor, None, None


_factors_drawn = Formula(_composed_draw, _value_draw, _gradient_draw, 5)


def _capacitance(logvar: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Return W [..., D, R] and the Cholesky factor of I + WᵀW, which is computed in float64."""
    white = factor * torch.exp(-0.5 * logvar)[..., None]
    wide = white.to(torch.float64)
    gram = wide.mT @ wide
    root: Tensor = torch.linalg.cholesky(_one(gram) + gram)
    return white, root.to(factor.dtype)


def _one(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _solve(root: Tensor, rows: Tensor) -> Tensor:
    """Return (C Cᵀ)⁻¹ rows, of the Cholesky factor C and rows as in :func:`triangular_solve`."""
    return triangular_solve(root.mT, triangular_solve(root, rows), upper=True)


def _sum_of_logs(root: Tensor) -> Tensor:
    """Return half the log determinant of C Cᵀ."""
    logs: Tensor = root.diagonal(dim1=-2, dim2=-1).log().sum(-1)
    return logs


def rows_times(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply rows [K, B, N] by matrices [B, N, M], or by one matrix [N, M]."""
    if matrix.dim() == 2:
        return rows @ matrix
    return torch.bmm(rows.transpose(0, 1), matrix).transpose(0, 1)


def _of_prior(p: StandardNormal | DiagonalNormal, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the prior's mean and log variance."""
    if isinstance(p, DiagonalNormal):
        return p.wide()
    return torch.zeros_like(like), torch.zeros_like(like)


@register_kl(FullNormal, StandardNormal)
@register_kl(FullNormal, DiagonalNormal)
def _kl_full_diagonal(q: FullNormal, p: StandardNormal | DiagonalNormal) -> Tensor:
    """Return the KL of each dimension given those before it [B, D]; by the chain rule they sum to KL."""
    if isinstance(p, StandardNormal) and q.mu.dim() == 2:
        of_standard: Tensor = _kl_full(*q.wide())
        return of_standard
    mu, scale, logs = q._parts()
    prior_mu, prior_logvar = _of_prior(p, mu)
    inverse = torch.exp(-0.5 * prior_logvar)
    # Diagonal terms L² − 1 − log L², without cancellation, and squares of the off-diagonal entries.
    cross = torch.tril(scale * inverse[..., None], -1).square().sum(-1)
    move = (mu - prior_mu) * inverse
    return 0.5 * (expm1_minus(2 * logs - prior_logvar) + cross + move.square())


def _composed_kl_full(mu: Tensor, tril: Tensor) -> Tensor:
    """Return the KL to N(0, I) of each dimension given those before it [B, D]."""
    logs = tril.index_select(1, triangle_positions(mu.shape[1], mu.device)[2])
    return 0.5 * (expm1_minus(2 * logs) + _squares_below(tril, mu.shape[1]) + mu.square())


def _value_kl_full(mu: Tensor, tril: Tensor) -> tuple[Tensor, tuple[Tensor]]:
    logvar = 2 * tril.index_select(1, triangle_positions(mu.shape[1], mu.device)[2])
    kl = native_kl(mu, logvar, per_dimension=True).add_(_squares_below(tril, mu.shape[1]), alpha=0.5)
    return kl, (logvar,)


def _gradient_kl_full(
    grads: Sequence[Tensor], kept: Sequence[Tensor], mu: Tensor, tril: Tensor
) -> tuple[Tensor, Tensor]:
    grad = grads[0]
    rows, _, diagonal = triangle_positions(mu.shape[1], mu.device)
    grad_tril = grad.index_select(1, rows).mul_(tril)
    grad_logs = torch.expm1(kept[0]).mul_(grad)
    return grad * mu, grad_tril.index_copy_(1, diagonal, grad_logs)


_kl_full = Formula(_composed_kl_full, _value_kl_full, _gradient_kl_full, 2)


def _squares_below(tril: Tensor, d: int) -> Tensor:
    """Return the sum of squares left of the diagonal in each row of a packed triangle, [B, D]."""
    entries = functional.pad(tril, (0, 1)).index_select(1, _positions_below(d, tril.device))
    squares: Tensor = entries.unflatten(1, (d, d)).square().sum(-1)
    return squares


@cached_constant(64)
def _positions_below(d: int, device: torch.device) -> Tensor:
    """Return the packed index of each entry of a [D, D] matrix below its diagonal, D(D+1)/2 of the others."""
    row = torch.arange(d, device=device)[:, None]
    column = torch.arange(d, device=device)
    return torch.where(column < row, row * (row + 1) // 2 + column, d * (d + 1) // 2).flatten()


def _root(d: DiagonalNormal | FullNormal | LowRankNormal) -> tuple[Tensor, Tensor, Tensor]:
    """Return mu, a lower triangular root of the covariance [..., D, D], and the log of its diagonal.

    They are in float64: the inverse of a prior's root multiplies the roundings by its condition number.
    """
    if isinstance(d, FullNormal):
        return d._parts(torch.float64)
    if isinstance(d, DiagonalNormal):
        mu, logvar = (t.to(torch.float64) for t in d.wide())
        return mu, torch.diag_embed(torch.exp(0.5 * logvar)), 0.5 * logvar
    mu, logvar, factor = (t.to(torch.float64) for t in d.wide())
    # FFᵀ would absorb a small variance. The large rows come first: each row keeps its own relative accuracy.
    rows = torch.cat([factor.mT, torch.diag_embed(torch.exp(0.5 * logvar))], -2)
    upper = torch.linalg.qr(rows)[1]
    diagonal = upper.diagonal(dim1=-2, dim2=-1)
    return mu, upper.mT * diagonal.sign()[..., None, :], diagonal.abs().log()


@register_kl(FullNormal, FullNormal)
@register_kl(DiagonalNormal, FullNormal)
@register_kl(LowRankNormal, FullNormal)
@register_kl(FullNormal, LowRankNormal)
@register_kl(DiagonalNormal, LowRankNormal)
@register_kl(LowRankNormal, LowRankNormal)
def _kl_roots(q: DiagonalNormal | FullNormal | LowRankNormal, p: FullNormal | LowRankNormal) -> Tensor:
    mu, scale, logs = _root(q)
    prior_mu, prior_scale, prior_logs = _root(p)
    white = torch.linalg.solve_triangular(prior_scale, scale, upper=False)
    move = torch.linalg.solve_triangular(prior_scale, (mu - prior_mu)[..., None], upper=False)[..., 0]
    cross = torch.tril(white, -1).square().sum(-1)
    dtype = torch.promote_types(q.wide()[0].dtype, p.wide()[0].dtype)
    kl: Tensor = 0.5 * (expm1_minus(2 * (logs - prior_logs), dtype) + cross + move.square()).sum(-1)
    return kl.to(dtype)


@register_kl(LowRankNormal, StandardNormal)
@register_kl(LowRankNormal, DiagonalNormal)
def _kl_low_rank(q: LowRankNormal, p: StandardNormal | DiagonalNormal) -> Tensor:
    given = q.wide()
    if isinstance(p, StandardNormal) and q.mu.dim() == 2:
        of_standard: Tensor = _kl_factors(*given)
        return of_standard
    prior = _of_prior(p, given[0])
    dtype = torch.promote_types(given[0].dtype, prior[0].dtype)
    return _composed_kl_low_rank(*given, prior, dtype)


def _composed_kl_low_rank(
    mu: Tensor,
    logvar: Tensor,
    factor: Tensor,
    prior: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the KL [B] to a diagonal normal, by default to N(0, I)."""
    dtype = dtype or mu.dtype
    mu, logvar, factor = (t.to(torch.float64) for t in (mu, logvar, factor))
    white, root = _capacitance(logvar, factor)
    if prior is None:
        move, u, scaled = mu, logvar, factor
    else:
        prior_mu, prior_logvar = (t.to(torch.float64) for t in prior)
        inverse = torch.exp(-0.5 * prior_logvar)
        move, u, scaled = (mu - prior_mu) * inverse, logvar - prior_logvar, factor * inverse[..., None]
    # Column r of F adds ‖F/σ_p‖² − log C_rr². For a small W, which would cancel, log C_rr² is log(1 + t):
    # t is ‖W‖² less the squares left of C's diagonal.
    size, left = white.square().sum(-2), torch.tril(root, -1).square().sum(-1)
    more = (torch.expm1(u)[..., None] * white.square()).sum(-2)
    small = more + left + log1p_rest((size - left).clamp(0, 1), dtype)
    large = scaled.square().sum(-2) - 2 * root.diagonal(dim1=-2, dim2=-1).log()
    kl: Tensor = (expm1_minus(u, dtype) + move.square()).sum(-1) + torch.where(size < 1, small, large).sum(-1)
    return (0.5 * kl).to(dtype)


# For N(0, I), with Fᵀ and Wᵀ, whose rows are long.


def _value_kl_low_rank(
    mu: Tensor, logvar: Tensor, factor: Tensor
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    dtype = mu.dtype
    mu, logvar, factor = (t.to(torch.float64) for t in (mu, logvar, factor.mT.contiguous()))
    inverse = torch.exp(-0.5 * logvar)[:, None]
    white = factor * inverse
    gram = torch.bmm(white, white.mT)
    root = torch.linalg.cholesky(_one(gram) + gram)
    size, left = gram.diagonal(dim1=1, dim2=2), torch.tril(root, -1).square().sum(-1)
    rest = (size - left).clamp_(0, 1).log1p_()
    # t − log(1 + t) is e^v − 1 − v of v = log(1 + t), twice a KL.
    small = left.add_(native_kl(torch.zeros_like(rest), rest, per_dimension=True), alpha=2)
    small.add_(torch.bmm(white.square(), torch.expm1(logvar)[..., None])[..., 0])
    large = factor.square().sum(-1).sub_(root.diagonal(dim1=1, dim2=2).log(), alpha=2)
    kl = native_kl(mu, logvar).add_(torch.where(size < 1, small, large).sum(-1), alpha=0.5)
    return kl.to(dtype), (inverse, white, gram, root)


def _gradient_kl_low_rank(
    grads: Sequence[Tensor], kept: Sequence[Tensor], mu: Tensor, logvar: Tensor, factor: Tensor
) -> tuple[Tensor, ...]:
    # With P = W (I + WᵀW)⁻¹: F − P e^(−logvar/2) of F, and ½ (e^logvar − 1 + Σ_r W P) of logvar.
    inverse, white, gram, root = kept
    dtype = mu.dtype
    mu, logvar, grad = (t.to(torch.float64) for t in (mu, logvar, grads[0][:, None]))
    factor = factor.mT.contiguous().to(torch.float64)
    share = torch.cholesky_inverse(root)
    solved = torch.bmm(share, white)
    of_logvar = torch.expm1(logvar).add_((white * solved).sum(1)).mul_(0.5 * grad)
    # F − P e^(−logvar/2) = P WᵀW e^(−logvar/2) − F (e^−logvar − 1), where the left side would cancel.
    near = torch.bmm(torch.bmm(gram, share), white).mul_(inverse)
    near.sub_(factor * torch.expm1(-logvar)[:, None])
    of_factor = torch.where((logvar > -0.5)[:, None], near, factor - solved.mul_(inverse)).mul_(
        grad[..., None]
    )
    return (mu * grad).to(dtype), of_logvar.to(dtype), of_factor.to(dtype).mT


_kl_factors = Formula(_composed_kl_low_rank, _value_kl_low_rank, _gradient_kl_low_rank, 3)
