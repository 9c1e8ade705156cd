"""The negative binomial likelihood, and its base class shared with the zero-inflated one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td

from ..core.special import digamma_excess, expm1_minus, log1p_rest, stirling_error
from ..core.torch_private import standard_gamma
from .natural import log_of_positive
from .scaled import OwnParameter, Scaled

# Clamps: the log inverse dispersion, and other exponents, near the end of float32's range.
_TOP, _MOST = 85.0, 87.0
# Below it θ, negligible against counts, is replaced by its exponential, a normal number.
_LEAST = {torch.float32: -86.0, torch.float64: -700.0}


class Overdispersed(Scaled):
    """Base class of count likelihoods with an inverse dispersion, from the decoder or the constructor."""

    low = 0.0
    takes_integers = takes_size = True
    reads, counts = "log rates", True
    differentiable = False
    own_parameters = {"inverse_dispersion": "the inverse dispersion"}
    hint = "pass the raw counts, neither centred nor on a log scale"

    log_inverse_dispersion: nn.Parameter

    def __init__(self, inverse_dispersion: OwnParameter = None, *, learned: bool = False):
        super().__init__(inverse_dispersion, learned=learned)

    @property
    def inverse_dispersion(self) -> OwnParameter:
        """Inverse dispersion θ, learned or fixed; None if the decoder returns it."""
        return self._own_parameter("inverse_dispersion")

    @staticmethod
    def data(x: Tensor) -> Tensor:
        wide = x.double()
        return (torch.xlogy(wide, wide) - wide - torch.lgamma(wide + 1)).to(x.dtype)


class NegativeBinomial(Overdispersed):
    r"""Negative binomial likelihood p(x|z) of independent counts.

    The decoder returns ``(log_mean, log_inverse_dispersion)``, or ``log_mean`` alone when
    ``inverse_dispersion`` is given. The variance is :math:`μ + μ^2 / θ`; for large θ the distribution is
    Poisson.

    .. math:: \log p(x|z_k) = \sum_i \log Γ(x + θ) - \log Γ(θ) - \log x!
              + θ \log\frac{θ}{θ + μ} + x \log\frac{μ}{θ + μ}, \quad μ = e^m, θ = e^t

    These terms cancel for large θ or x. The kernels compute :math:`-θ \log(1 + μ/θ)` for a count of 0, and
    for other counts, with :math:`n = x + θ, w = x / n, d = m - \log x` and Stirling's error :math:`δ`,

    .. math:: -n \big[\log(1 + w (e^d - 1)) - w d\big] + δ(n) - δ(θ) - ½ \log(1 + x/θ)
              - \big[δ(x) + ½ \log 2πx\big]

    whose first part vanishes at :math:`μ = x`; the last depends on the data alone and is computed once. With
    the upstream gradient :math:`g`, :math:`\bar m = g (x - μ) θ / (θ + μ)`; for :math:`r = (x - μ) / (θ +
    μ)`, :math:`\bar t = g\, θ\, [\log(1 + r) - r + ψ(n) - \log n - ψ(θ) + \log θ]`.

    Counts may be integers of any dtype and have no gradient. From θ = e⁸⁵ on the distribution is Poisson.
    The op is ``fastvae.ops.negative_binomial_log_prob(x, log_mean, log_inverse_dispersion)``, whose last
    argument may be one row (one number per gene) or one number.

    Args:
        inverse_dispersion: θ > 0: a number, a tensor broadcastable to the event (one number per gene), or a
            tensor that a network computed. Default: the decoder returns its logarithm, too.
        learned: train θ, starting from this value, as the parameter ``log_inverse_dispersion``.

    Raises:
        TypeError, ValueError: if inverse_dispersion is not positive, or is an ``nn.Parameter``.

    References:
        Loader, Fast and Accurate Computation of Binomial Probabilities, 2000, for the form; Lopez et al.,
        Deep generative modeling for single-cell transcriptomics, 2018, for the use.

    Example:
        >>> import torch, fastvae
        >>> counts, q = torch.tensor([[0, 3], [1, 2]]), torch.zeros(2, 2 * 5)
        >>> of_genes = fastvae.likelihoods.NegativeBinomial(torch.full((2,), 10.0), learned=True)
        >>> fastvae.iwae(counts, q, torch.nn.Linear(5, 2), k=7, likelihood=of_genes).shape
        torch.Size([])
        >>> zeros = torch.zeros(2, 2)
        >>> fastvae.ops.negative_binomial_log_prob(counts, zeros, 0.0)  # -5 log 2, for geometric counts
        tensor([-3.4657, -3.4657])
    """

    name = "negative_binomial"
    outputs = ("log_mean", "log_inverse_dispersion")
    family = td.NegativeBinomial

    def parameters_of(self, d: Any) -> tuple[Tensor, ...]:
        # The total count is the inverse dispersion, and the odds are the mean over it.
        log_inverse_dispersion = log_of_positive(d.total_count)
        return log_inverse_dispersion + d.logits, log_inverse_dispersion

    @staticmethod
    def value(x: Tensor, log_mean: Tensor, log_inverse_dispersion: Tensor) -> Tensor:
        t = log_inverse_dispersion.clamp(max=_TOP)
        theta = torch.exp(t.clamp(min=_LEAST[t.dtype]))
        n = x + theta
        w, v = x / n, theta / n
        d, ratio = log_mean - torch.log(x), log_mean - t
        # Use, of two equivalent forms, the one with the smaller factor, which cancels less.
        a, least = torch.where(w > v, v, w), torch.where(w > v, theta, x)
        s = torch.where(w > v, -d, d)
        clamped = s.clamp(-_MOST, _MOST)
        y, beyond = a * torch.expm1(clamped), s - clamped
        outside = torch.where(beyond > 0, (n - least) * beyond, -least * beyond)
        far = n * torch.log1p(y) - least * clamped + outside
        distance = torch.where(s.abs() < 1, least * expm1_minus(clamped) - n * log1p_rest(y), far)
        quotient = x / theta  # may be infinite
        spread = torch.where(quotient < 1e30, torch.log1p(quotient), torch.log(x) - t)
        own = stirling_error(n) - stirling_error(theta) - 0.5 * (spread + (_LEAST[t.dtype] - t).clamp(min=0))
        low = ratio.clamp(max=_MOST)
        # For mean << theta, theta log(1 + mean / theta) is the mean.
        of_zero = theta * (torch.log1p(torch.exp(low)) + (ratio - low))
        of_zero = torch.where(ratio < -40, torch.exp(log_mean), of_zero)
        return torch.where(x == 0, -of_zero, own - distance)

    @staticmethod
    def gradient(
        g: Tensor, x: Tensor, log_mean: Tensor, log_inverse_dispersion: Tensor
    ) -> tuple[Tensor | None, ...]:
        _, by_mean, by_dispersion = slopes(x, log_mean, log_inverse_dispersion)
        return None, g * by_mean, g * by_dispersion

    @staticmethod
    def mean_of(log_mean: Tensor, *others: Tensor) -> Tensor:
        return torch.exp(log_mean)

    @staticmethod
    def draw(
        log_mean: Tensor, log_inverse_dispersion: Tensor, *, generator: torch.Generator | None
    ) -> Tensor:
        theta = torch.exp(log_inverse_dispersion.float().clamp(_LEAST[torch.float32], _TOP))
        gamma = standard_gamma(theta, generator)
        return torch.poisson(torch.exp(log_mean) * (gamma / theta), generator=generator)


def slopes(x: Tensor, log_mean: Tensor, log_inverse_dispersion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p of a count of 0, and the derivatives by log mean and log inverse dispersion."""
    t = log_inverse_dispersion.clamp(max=_TOP)
    theta = torch.exp(t.clamp(min=_LEAST[t.dtype]))
    n, d = x + theta, log_mean - torch.log(x)
    ratio = (log_mean - t).clamp(-_MOST, _MOST)
    of_theta = torch.sigmoid(-ratio)
    # Where the mean's share is too small for a number, the mean.
    of_zero = torch.where(log_mean - t < -_MOST, torch.exp(log_mean), theta * torch.sigmoid(ratio))
    pull = torch.where(d.abs() < 1, -x * torch.expm1(d) * of_theta, x * of_theta - of_zero)
    r, u = pull / theta, n * (of_theta / theta)
    rest = torch.where(r.abs() < 0.25, log1p_rest(r), r - torch.log(u)) + (log_mean - t - ratio).clamp(min=0)
    gamma = 0.5 * (x / n) + (digamma_excess(theta) - theta / n * digamma_excess(n))
    return pull - theta * rest, pull, torch.where(x == 0, 0.0, gamma) - theta * rest
