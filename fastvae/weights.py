r"""Importance weights, folded as they come: what log p(x), its error and its diagnostics need of K draws, in
memory that does not grow with K but for the tail, :math:`3\sqrt K` numbers.

With the maximum M of the :math:`\log w_k`, :math:`S_1 = \sum_k e^{\log w_k - M}` and :math:`S_2 = \sum_k e^{2
(\log w_k - M)}`:

.. math::
    \log \hat p = M + \log S_1 - \log K, \quad \mathrm{ESS} = S_1^2 / S_2, \quad
    \mathrm{stderr} = \sqrt{(S_2 / S_1^2 - 1/K)\, K / (K - 1)}

The standard error is the delta method's, :math:`\mathrm{sd}(w) / (\sqrt K\, \bar w)`. The draws of another
chunk, or of another machine, are merged by the same rule: sums are added, never means.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import check_tensor, shape_of

__all__ = ["Weights", "pareto_khat", "tail_length"]


def tail_length(k: int) -> int:
    """How many of k draws, the largest, k̂ is fitted to: the least of k/5 and 3 √k, rounded up."""
    return math.ceil(min(k / 5, 3 * math.sqrt(k)))


class Weights(NamedTuple):
    """The weights of some draws for each example of a batch; the last axis of every field is the batch."""

    maximum: Tensor  # [B], of the log weights
    first: Tensor  # [B] float64, sum of w relative to the maximum
    second: Tensor  # [B] float64, sum of w^2 relative to the maximum
    log_sum: Tensor  # [B] float64, sum of the log weights
    count: Tensor  # type: ignore[assignment] # [B] int64
    tail: Tensor  # [T, B], the largest log weights, descending; -inf where there are fewer

    @classmethod
    def of(cls, log_w: Tensor, tail: int) -> Weights:
        """Of log weights [K, B], keeping the ``tail`` largest."""
        maximum, wide = log_w.amax(0), log_w.double()
        w = torch.exp(wide - _shift(maximum))
        count = torch.full(maximum.shape, log_w.shape[0], dtype=torch.int64, device=log_w.device)
        return cls(maximum, w.sum(0), w.square().sum(0), wide.sum(0), count, _largest(log_w, tail))

    def merge(self, other: Weights) -> Weights:
        """The weights of both sets of draws."""
        maximum = torch.maximum(self.maximum, other.maximum)
        shift = _shift(maximum)
        mine, its = (torch.exp(part.maximum.double() - shift) for part in (self, other))
        # A set of nothing but -inf has sums of 0, and its scale may be 0 too.
        return Weights(
            maximum,
            self.first * mine + other.first * its,
            self.second * mine.square() + other.second * its.square(),
            self.log_sum + other.log_sum,
            self.count + other.count,
            _largest(torch.cat([self.tail, other.tail]), self.tail.shape[0]),
        )

    def scaled(self, log_factor: float | Tensor) -> Weights:
        """All weights of an example multiplied by the same, given as its logarithm: a number, or [B]."""
        if isinstance(log_factor, Tensor):
            by = log_factor.to(self.maximum.dtype)
            return self._replace(
                maximum=self.maximum + by, log_sum=self.log_sum + log_factor * self.count, tail=self.tail + by
            )
        return self.scaled(torch.full_like(self.log_sum, log_factor)) if log_factor else self

    def at(self, rows: Tensor) -> Weights:
        """Of some examples."""
        return Weights(*(v[..., rows] for v in self))

    def put(self, rows: Tensor, part: Weights) -> Weights:
        """With those of some examples replaced."""
        return Weights(*(v.index_copy(-1, rows, p) for v, p in zip(self, part, strict=True)))

    @property
    def log_px(self) -> Tensor:
        """log p(x) [B]."""
        return _shift(self.maximum).double() + torch.log(self.first) - torch.log(self.count.double())

    @property
    def elbo(self) -> Tensor:
        """The mean of the log weights [B], the bound that k=1 has."""
        return self.log_sum / self.count

    @property
    def stderr(self) -> Tensor:
        """The standard error of log_px [B]; NaN for one draw."""
        k = self.count.double()
        return ((self.second / self.first.square() - 1 / k).clamp(min=0) * (k / (k - 1))).sqrt()

    @property
    def ess(self) -> Tensor:
        """Effective sample size [B]."""
        return self.first.square() / self.second

    @property
    def khat(self) -> Tensor:
        """Pareto k̂ [B], as :func:`pareto_khat` has it."""
        return _khat(self.tail, self.count)


def _shift(maximum: Tensor) -> Tensor:
    """What is subtracted before exp: the maximum, or 0 where it is infinite (inf minus inf would be NaN)."""
    return torch.nan_to_num(maximum, nan=math.nan, posinf=0.0, neginf=0.0)


def _largest(log_w: Tensor, count: int) -> Tensor:
    """The ``count`` largest of each column, descending, -inf where there are fewer; NaN counts as largest."""
    found = log_w.topk(min(count, log_w.shape[0]), dim=0).values
    if found.shape[0] == count:
        return found
    missing = found.new_full((count - found.shape[0], *found.shape[1:]), -math.inf)
    return torch.cat([found, missing])


def pareto_khat(log_w: Tensor) -> Tensor:
    r"""Pareto k̂ of importance weights: the shape of the generalised Pareto distribution that fits their
    upper tail; above 0.7 an estimate made with them is not to be trusted.

    The M = min(K/5, 3√K) largest ratios, less the next largest one, are fitted by Zhang and Stephens' method:
    with M excesses :math:`x_i` and :math:`ξ(θ) = \frac{1}{M} \sum_i \log(1 - θ x_i)`, the posterior mean of θ
    under their prior and the profile likelihood :math:`M (\log(-θ/ξ) - ξ - 1)` gives :math:`\hat k = ξ(\hat
    θ)`, drawn towards ½ as if by ten more draws.

    Args:
        log_w: log weights [K, B].

    Returns:
        [B] in float64. −∞ where the tail is flat, its weights within a thousandth of each other, as with the
        exact posterior, whose weights are all equal but for rounding. +∞ where fewer than five draws lie
        above the rest of the tail. NaN where K is below 21, which leaves fewer than five draws to fit, and
        for NaN weights.

    Raises:
        TypeError, ValueError: if log_w is no floating-point tensor [K, B].

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry, Pareto Smoothed Importance Sampling, JMLR 25, 2024;
        Zhang & Stephens, A New and Efficient Estimation Method for the Generalized Pareto Distribution,
        Technometrics 51, 2009.

    Example:
        >>> import torch, fastvae
        >>> log_w = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
        >>> bool((fastvae.weights.pareto_khat(log_w) < 0.7).all())
        True
    """
    check_tensor("log_w", log_w, 2, "[K, B]")
    k, batch = log_w.shape
    if k == 0:
        raise ValueError(f"log_w has no draws: its shape is {shape_of(log_w)}; at least one is needed")
    count = torch.full((batch,), k, dtype=torch.int64, device=log_w.device)
    return _khat(_largest(log_w, tail_length(k) + 1), count)


# Spread of the log weights in a tail that counts as flat: rounding, and no harm to any estimate.
_FLAT = 1e-3
# Numbers that the fit holds at a time: candidates times tail times examples.
_FIT_SIZE = 2**21


def _khat(tail: Tensor, count: Tensor) -> Tensor:
    """From the largest log weights [T, B], descending, of ``count`` [B] draws; T > tail_length(count)."""
    k = count.double()
    length = torch.minimum(k / 5, 3 * k.sqrt()).ceil().long()
    relative = tail.double() - _shift(tail[0])
    # The first that is not of the tail; ratios below the range of numbers are no part of it either.
    cutoff = relative.gather(0, length[None])[0].clamp(min=math.log(torch.finfo(torch.float64).tiny))
    cutoff = torch.where(tail[0].isnan(), math.nan, cutoff)
    inside = relative > cutoff
    excess = torch.where(inside, torch.expm1(relative - cutoff) * torch.exp(cutoff), 0.0)  # [T, B], 0 outside
    n = inside.sum(0)

    # Candidates: 1 / max + (1 - sqrt(m / (j - 1/2))) / (3 x_q), x_q the first quartile.
    m = 30 + n.double().sqrt().floor()
    j = torch.arange(1, 31 + math.isqrt(tail.shape[0]), device=tail.device)[:, None]
    quartile = (n - (n / 4 + 0.5).floor().long()).clamp(min=0, max=tail.shape[0] - 1)
    theta = 1 / excess[0] + (1 - (m / (j - 0.5)).sqrt()) / (3 * excess.gather(0, quartile[None])[0])  # [J, B]

    def shape(theta: Tensor) -> Tensor:
        size = max(1, _FIT_SIZE // max(1, excess.numel()))
        return torch.cat([torch.log1p(-t[:, None] * excess).sum(1) for t in theta.split(size)]) / n

    xi = shape(theta)
    profile = n * (torch.log(-theta / xi) - xi - 1)
    weight = torch.softmax(torch.where(j <= m, profile, -math.inf), 0)
    weight = torch.where(weight >= 10 * torch.finfo(torch.float64).eps, weight, 0.0)
    # A candidate that counts for nothing may be infinite.
    best = torch.where(weight > 0, theta * weight, 0.0).sum(0) / weight.sum(0)
    fitted = (n * shape(best[None])[0] + 10 * 0.5) / (n + 10)

    fitted = torch.where(n <= 4, math.inf, fitted)
    fitted = torch.where(relative[0] - cutoff < _FLAT, -math.inf, fitted)
    unknown = (length <= 4) | tail[0].isnan() | (tail[0] == -math.inf)
    return torch.where(unknown, math.nan, fitted)
