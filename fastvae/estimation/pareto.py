"""Pareto k̂ of importance weights, and Pareto-smoothed importance sampling's fit to their tail."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_tensor, shape_of


def tail_length(k: int) -> int:
    """Return the number of largest weights, of k draws, that k̂ is fitted to: min(k/5, 3 √k), rounded up."""
    return math.ceil(min(k / 5, 3 * math.sqrt(k)))


def pareto_khat(log_w: Tensor) -> Tensor:
    r"""Compute Pareto k̂ of importance weights; estimates with k̂ above 0.7 are unreliable.

    It is the shape of the generalised Pareto distribution fitted to the upper tail of the weights. The
    M = min(K/5, 3√K) largest ratios, minus the next largest one, are fitted by Zhang and Stephens' method:
    with M excesses :math:`x_i` and :math:`ξ(θ) = \frac{1}{M} \sum_i \log(1 - θ x_i)`, the posterior mean of θ
    under their prior and the profile likelihood :math:`M (\log(-θ/ξ) - ξ - 1)` gives :math:`\hat k = ξ(\hat
    θ)`, shrunk towards ½ with the weight of ten draws.

    Args:
        log_w: log weights [K, B].

    Returns:
        [B] in float64. −∞ for a flat tail, whose log weights lie within 0.001 of each other, as for the exact
        posterior, whose weights are equal up to rounding. +∞ where fewer than five draws exceed the cutoff.
        NaN for K below 21, which leaves fewer than five draws to fit, and for NaN weights.

    Raises:
        TypeError, ValueError: if log_w is not a floating-point tensor [K, B].

    References:
        Vehtari, Simpson, Gelman, Yao & Gabry, Pareto Smoothed Importance Sampling, JMLR 25, 2024;
        Zhang & Stephens, A New and Efficient Estimation Method for the Generalized Pareto Distribution,
        Technometrics 51, 2009.

    Example:
        >>> import torch, fastvae
        >>> log_w = torch.randn(1000, 4, generator=torch.Generator().manual_seed(0))
        >>> bool((fastvae.diagnostics.pareto_khat(log_w) < 0.7).all())
        True
    """
    check_tensor("log_w", log_w, 2, "[K, B]")
    k, batch = log_w.shape
    if k == 0:
        raise ValueError(f"log_w has no draws: its shape is {shape_of(log_w)}; at least one is needed")
    count = torch.full((batch,), k, dtype=torch.int64, device=log_w.device)
    return fit_tail(largest_of(log_w, tail_length(k) + 1), count).khat


# Largest spread of log weights in a flat tail, due to rounding and harmless to every estimate.
_FLAT = 1e-3


# Largest intermediate of the fit, in numbers, such as candidates × tail × examples. On a GPU launches count.
_FIT_SIZE, _FIT_SIZE_ON_GPU = 2**21, 2**24


class TailFit(NamedTuple):
    """Generalised Pareto distribution fitted to the largest weights, relative to the maximum."""

    khat: Tensor  # [B], infinite or NaN without a fit, see pareto_khat
    scale: Tensor  # [B], σ
    cutoff: Tensor  # [B], log of the threshold of the tail
    inside: Tensor  # [T, B], True for weights above the cutoff
    n: Tensor  # [B], number of weights above the cutoff
    theta: Tensor  # [J, B], candidates for -ξ/σ
    xi: Tensor  # [J, B], the shape given θ
    weight: Tensor  # [J, B], posterior of the candidates


def fit_tail(tail: Tensor, count: Tensor) -> TailFit:
    """Fit the largest log weights [T, B], descending, of ``count`` [B] draws; T > tail_length(count)."""
    k = count.double()
    length = torch.minimum(k / 5, 3 * k.sqrt()).ceil().long()
    relative = tail.double() - finite_shift(tail[0])
    # The largest weight below the tail; ratios that underflow are excluded from the tail.
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
        parts = theta.split(rows_at_once(theta, excess))
        return torch.cat([torch.log1p(-t[:, None] * excess).sum(1) for t in parts]) / n

    xi = shape(theta)
    profile = n * (torch.log(-theta / xi) - xi - 1)
    weight = torch.softmax(torch.where(j <= m, profile, -math.inf), 0)
    weight = torch.where(weight >= 10 * torch.finfo(torch.float64).eps, weight, 0.0)
    # A candidate of zero weight may be infinite.
    best = torch.where(weight > 0, theta * weight, 0.0).sum(0) / weight.sum(0)
    found = shape(best[None])[0]
    khat = (n * found + 10 * 0.5) / (n + 10)

    khat = torch.where(n <= 4, math.inf, khat)
    khat = torch.where(relative[0] - cutoff < _FLAT, -math.inf, khat)
    unknown = (length <= 4) | tail[0].isnan() | (tail[0] == -math.inf)
    khat = torch.where(unknown, math.nan, khat)
    return TailFit(khat, -found / best, cutoff, inside, n, theta, xi, weight)


def rows_at_once(rows: Tensor, each: Tensor) -> int:
    """Return the number of rows to compute at a time, where each has an intermediate as large as ``each``."""
    if torch.compiler.is_exporting():
        # The batch of the program may vary, so that its size does not tell.
        return rows.shape[0]
    most = _FIT_SIZE_ON_GPU if each.is_cuda else _FIT_SIZE
    return max(1, most // max(1, each.numel()))


def finite_shift(maximum: Tensor) -> Tensor:
    """Return the maximum to subtract before exp, or 0 where it is infinite, to avoid inf - inf."""
    return torch.nan_to_num(maximum, nan=math.nan, posinf=0.0, neginf=0.0)


def largest_of(log_w: Tensor, count: int) -> Tensor:
    """Return the ``count`` largest of each column, descending, padded with -inf; NaN counts as largest."""
    return padded(log_w.topk(min(count, log_w.shape[0]), dim=0).values, count)


def padded(found: Tensor, count: int) -> Tensor:
    """Append rows of -inf to [K, B] up to ``count``."""
    if found.shape[0] == count:
        return found
    missing = found.new_full((count - found.shape[0], *found.shape[1:]), -math.inf)
    return torch.cat([found, missing])
