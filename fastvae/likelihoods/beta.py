"""The beta likelihood."""

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from ..core.special import digamma_excess, expm1_minus, log1p_rest, stirling_error
from ..core.torch_private import standard_gamma
from .declared import Declared
from .natural import log_of_positive

# Largest log concentration a: float32 represents both exp(a) and exp(-a).
_MOST = 80.0


class Beta(Declared):
    r"""Beta likelihood p(x|z) = Beta(a, b) on (0, 1).

    The decoder returns ``(log_concentration1, log_concentration0)``: log a and log b, named like the
    concentrations of ``torch.distributions.Beta``.

    .. math:: \log p(x|z_k) = \sum_i (a - 1) \log x + (b - 1) \log(1 - x) - \log B(a, b)

    These terms cancel where a and b are large. The kernels compute, with :math:`n = a + b`, a the smaller
    (the other case is the mirror image), :math:`s = \mathrm{logit}(x) - \log(a/b)` and Stirling's error
    :math:`δ`,

    .. math::
        -n \Big[\log\big(1 + \tfrac an (e^s - 1)\big) - \tfrac an s\Big] + \log a - ½ \log(1 + a/b)
        + δ(n) - δ(b) - \big[δ(a) + ½ \log 2πa\big] - \log x - \log(1 - x)

    whose first part vanishes at the mean; the last two terms depend on the data alone. With the upstream
    gradient :math:`g`:

    .. math::
        \overline{\log a} = g a [ψ(n) - ψ(a) + \log x], \quad
        \overline{\log b} = g b [ψ(n) - ψ(b) + \log(1 - x)], \quad
        \bar x = \sum_k g \Big[\frac{a - 1}x - \frac{b - 1}{1 - x}\Big]

    At x = 0 and x = 1 log p is its limit: infinite, except for a concentration of 1. Concentrations are
    clamped to [e⁻⁸⁰, e⁸⁰]. The op is
    ``fastvae.ops.beta_log_prob(x, log_concentration1, log_concentration0)``.

    References:
        Loader, Fast and Accurate Computation of Binomial Probabilities, 2000, for the form.

    Example:
        >>> import torch, fastvae
        >>> zeros = torch.zeros(4, 7)
        >>> fastvae.likelihoods.Beta().log_prob(torch.rand(4, 7), (zeros, zeros)).shape
        torch.Size([4, 7])
        >>> x = torch.full((2, 3), 0.5)
        >>> fastvae.ops.beta_log_prob(x, torch.full((2, 3), 2.0).log(), 0.0)  # 3 log 2x
        tensor([0., 0.])
    """

    name = "beta"
    outputs = ("log_concentration1", "log_concentration0")
    family = td.Beta
    low, high, inside = 0.0, 1.0, 0.5
    hint = "scale the data to (0, 1); at the ends themselves the density may be infinite"

    def parameters_of(self, d: Any) -> tuple[Tensor, ...]:
        return log_of_positive(d.concentration1), log_of_positive(d.concentration0)

    @staticmethod
    def value(x: Tensor, log_concentration1: Tensor, log_concentration0: Tensor) -> Tensor:
        p, q, least, largest, fold, _, _, _, _, distance, _ = _parts(
            x, log_concentration1, log_concentration0
        )
        gammas = stirling_error(least + largest) - stirling_error(largest) - stirling_error(least)
        inside = 0.5 * p - 0.5 * fold - 0.5 * math.log(2 * math.pi) + gammas - distance
        # At an end one concentration decides: if it is above 1, the density is 0.
        decides = torch.where(x < 0.5, log_concentration1, log_concentration0)
        at_end = torch.where(x < 0.5, log_concentration0, log_concentration1)
        at_end = torch.where(
            decides > 0, at_end - math.inf, torch.where(decides < 0, at_end + math.inf, at_end + decides)
        )
        return torch.where((x == 0) | (x == 1), at_end, inside)

    @staticmethod
    def gradient(
        g: Tensor, x: Tensor, log_concentration1: Tensor, log_concentration0: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        _, _, least, largest, _, w, v, rise, fall, _, other = _parts(
            x, log_concentration1, log_concentration0
        )
        of_n = digamma_excess(least + largest)
        of_least = least * rise + 0.5 * v + (digamma_excess(least) - w * of_n)
        of_largest = 0.5 * w + (digamma_excess(largest) - v * of_n) - largest * fall
        low, high = (torch.expm1(c.clamp(max=_MOST)) for c in (log_concentration1, log_concentration0))
        of_x = torch.where(low == 0, 0.0, low / x) - torch.where(high == 0, 0.0, high / (1 - x))
        # Zero upstream gradient gives zero gradient, even if log p is infinite.
        return (
            torch.where(g == 0, 0.0, g * of_x),
            torch.where(g == 0, 0.0, g * torch.where(other, of_largest, of_least)),
            torch.where(g == 0, 0.0, g * torch.where(other, of_least, of_largest)),
        )

    @staticmethod
    def data(x: Tensor) -> Tensor:
        return torch.where((x == 0) | (x == 1), 0.0, -(torch.log(x) + torch.log1p(-x)))

    @staticmethod
    def mean_of(log_concentration1: Tensor, log_concentration0: Tensor) -> Tensor:
        return torch.sigmoid(log_concentration1 - log_concentration0)

    @staticmethod
    def draw(
        log_concentration1: Tensor, log_concentration0: Tensor, *, generator: torch.Generator | None
    ) -> Tensor:
        first, second = (_log_gamma(c, generator) for c in (log_concentration1, log_concentration0))
        return torch.sigmoid(first - second)


def _log_gamma(log_concentration: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw log Gamma(a, 1) as log Gamma(a + 1, 1) + log(u) / a, which cannot underflow."""
    a = torch.exp(log_concentration.clamp(max=_MOST))
    exponential = torch.empty_like(a).exponential_(generator=generator)
    return torch.log(standard_gamma(a + 1, generator)) - exponential / a


def _parts(x: Tensor, log_concentration1: Tensor, log_concentration0: Tensor) -> tuple[Tensor, ...]:
    """Return both concentrations, sorted, their shares of the sum, and the deviations of x and 1 - x."""
    a, b = log_concentration1.clamp(-_MOST, _MOST), log_concentration0.clamp(-_MOST, _MOST)
    other = a > b
    p, q = torch.where(other, b, a), torch.where(other, a, b)
    k = torch.exp(p - q)
    fold, v = torch.log1p(k), 1 / (1 + k)
    w, least, largest = k * v, torch.exp(p), torch.exp(q)
    low = x < 0.5
    y = torch.where(low, x, 1 - x)
    of_rest = torch.log1p(-y)
    logit = torch.where(y > 0.25, torch.log1p((2 * y - 1) / (1 - y)), torch.log(y) - of_rest)
    logit = torch.where(low == other, -logit, logit)
    s = logit - (p - q)
    clamped, near = s.clamp(-1, 1), s.abs() < 1
    t = w * torch.expm1(clamped)
    log_1pt = torch.log1p(t)
    # Far from the mode use the logarithms themselves, log(1 + exp(±logit)).
    rise = torch.where(near, clamped - log_1pt, fold - (p - q) - ((-logit).clamp(min=0) - of_rest))
    fall = torch.where(near, log_1pt, logit.clamp(min=0) - of_rest - fold)
    close = least * expm1_minus(clamped) - (least + largest) * log1p_rest(t)
    distance = torch.where(near, close, largest * fall - least * rise)
    return p, q, least, largest, fold, w, v, rise, fall, distance, other
