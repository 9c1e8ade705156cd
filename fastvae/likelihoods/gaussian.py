"""The Gaussian likelihood."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch import distributions as td

from .natural import log_of_positive
from .scaled import Scaled, normal_like

# Subclasses by the name that ``scale=`` accepts.
NAMED_SCALES: dict[str, type[Gaussian]] = {}


class Gaussian(Scaled):
    r"""Gaussian likelihood p(x|z) = N(mean, s²).

    The decoder returns ``(mean, logvar)``, or ``mean`` alone when ``scale`` is given.

    .. math::
        \log p(x|z_k) = -½ \sum_i \big[\log 2π + \log s_{ki}^2 + (x_i - m_{ki})^2 / s_{ki}^2\big]

    With the upstream gradient :math:`g_k` and :math:`r = (x - m) / s^2`:

    .. math::
        \bar m_{ki} = g_k r_{ki}, \quad \overline{\log s^2}_{ki} = ½ g_k \big[(x_i - m_{ki}) r_{ki} - 1\big],
        \quad \bar x_i = -\sum_k \bar m_{ki}

    The op is ``fastvae.ops.gaussian_log_prob(x, mean, logvar)``.

    A ``torch.distributions.Normal(loc, scale)`` is read as (loc, 2 log scale).

    **Squared errors.** The negative ELBO [B], F, is a usual loss with a squared error
    :math:`E = \sum_i (x_i - m_i)^2` of P numbers, up to constants, which the log-likelihood keeps:

    - half the sum, :math:`½ E + \mathrm{KL}`: ``Gaussian(scale=1.0)``, :math:`F - \tfrac P2 \log 2π`;
    - the sum, :math:`E + \mathrm{KL}`: ``Gaussian(scale=0.5**0.5)``, :math:`F - \tfrac P2 \log π`;
    - the mean with a weight, :math:`E / P + w\, \mathrm{KL}`: ``Gaussian(scale=0.5**0.5)`` with
      ``beta=w * P``, :math:`(F - \tfrac P2 \log π) / P`. For a KL averaged over D latents divide w by D.

    So the mean squared error with a KL of weight 1 is a β-VAE with :math:`β = P`.

    Args:
        scale: standard deviation s > 0: a number, a tensor broadcastable to the event, or a tensor that a
            network computed. Default: the decoder returns the log variance, too. ``"softplus"``: the decoder
            returns (mean, raw), and the variance is softplus(raw) + ``floor``, see
            :class:`SoftplusGaussian`. ``"optimal"``: the decoder returns the mean alone, and one σ²
            is estimated, see :class:`OptimalGaussian`.
        learned: train the scale, starting from this value. The parameter is ``log_scale``, so an optimiser
            step cannot make the scale 0 or negative; the property ``scale`` returns its exponential.

    Raises:
        TypeError, ValueError: if scale is not positive, or is an ``nn.Parameter``.

    Example:
        >>> import math, torch, fastvae
        >>> likelihood = fastvae.likelihoods.Gaussian(scale=0.1, learned=True)
        >>> likelihood.log_prob(torch.zeros(4, 7), torch.zeros(4, 7)).shape
        torch.Size([4, 7])
        >>> [name for name, _ in likelihood.named_parameters()]
        ['log_scale']
        >>> x, mean = torch.zeros(4, 3, 8, 8), torch.zeros(50, 4, 3, 8, 8)
        >>> fastvae.ops.gaussian_log_prob(x, mean, 0.0).shape
        torch.Size([50, 4])

        The three losses with squared errors have the gradients of these bounds:

        >>> x, decoder = torch.randn(4, 7), torch.nn.Linear(3, 7)
        >>> mu, logvar = torch.randn(2, 4, 3, requires_grad=True)
        >>> kl = 0.5 * (mu**2 + logvar.exp() - 1 - logvar).sum(1).mean()
        >>> def error(terms):
        ...     return (x - terms.output).square()
        >>> def same(one, other):
        ...     wrt = mu, logvar, *decoder.parameters()
        ...     pairs = zip(*[torch.autograd.grad(f, wrt, retain_graph=True) for f in (one, other)])
        ...     return all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in pairs)
        >>> def elbo(scale, beta=1.0):
        ...     likelihood = fastvae.likelihoods.Gaussian(scale=scale)
        ...     return fastvae.elbo(x, (mu, logvar), decoder, likelihood=likelihood, beta=beta, terms=True)
        >>> terms = elbo(scale=1.0)
        >>> same(-terms.bound.mean(), 0.5 * error(terms).sum(1).mean() + kl)
        True
        >>> terms = elbo(scale=0.5**0.5)
        >>> same(-terms.bound.mean(), error(terms).sum(1).mean() + kl)
        True
        >>> w, p = 0.25, 7
        >>> terms = elbo(scale=0.5**0.5, beta=w * p)
        >>> loss = (-terms.bound.mean() - p / 2 * math.log(math.pi)) / p
        >>> same(loss, error(terms).mean() + w * kl), torch.allclose(
        ...     loss, error(terms).mean() + w * kl, rtol=1e-4
        ... )
        (True, True)
    """

    name = "gaussian"
    elementary = True
    outputs = ("mean", "logvar")
    family: ClassVar[type[td.Distribution] | None] = td.Normal
    own_parameters = {"scale": "a standard deviation"}

    def __new__(cls, scale: Any = None, **options: Any) -> Gaussian:
        """Create the subclass registered for a named scale, such as ``"softplus"``."""
        if isinstance(scale, str):
            if scale not in NAMED_SCALES:
                known = ", ".join(map(repr, NAMED_SCALES))
                raise TypeError(
                    f"scale must be a number or a tensor, or a name ({known}), got the str {scale!r}"
                )
            cls = NAMED_SCALES[scale]
        return super().__new__(cls)

    def parameters_of(self, d: Any) -> tuple[Tensor, ...]:
        return d.loc, 2 * log_of_positive(d.scale)

    @staticmethod
    def value(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        # exp(-logvar) overflows long before its product with (x - mean)² does, here and below.
        whitened = (x - mean) * torch.exp(-0.5 * logvar)
        return -0.5 * (math.log(2 * math.pi) + logvar + whitened**2)

    @staticmethod
    def gradient(g: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse_s = torch.exp(-0.5 * logvar)
        whitened = (x - mean) * inverse_s
        push = g * whitened
        grad_mean = push * inverse_s
        return -grad_mean, grad_mean, 0.5 * (push * whitened - g)

    @staticmethod
    def information(mean: Tensor, logvar: Tensor) -> tuple[Tensor, ...]:
        return torch.exp(-logvar), torch.full_like(logvar, 0.5)

    @staticmethod
    def draw(mean: Tensor, logvar: Tensor, *, generator: torch.Generator | None) -> Tensor:
        return mean + torch.exp(0.5 * logvar) * normal_like(mean, generator)

    def _given(self, x: Tensor) -> tuple[float | Tensor, ...]:
        return tuple([2 * log_scale for log_scale in super()._given(x)])  # the log variance
