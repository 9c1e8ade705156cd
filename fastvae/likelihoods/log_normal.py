"""The log-normal likelihood."""

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from .natural import log_of_positive
from .scaled import Scaled, normal_like


class LogNormal(Scaled):
    r"""Log-normal likelihood of positive data: log x given z is N(location, s²).

    The decoder returns ``(location, log_scale)``, or ``location`` alone when ``scale`` is given.

    .. math::
        \log p(x|z_k) = -½ \sum_i \big[\log 2π + 2 \log s_{ki} + t_{ki}^2\big] - \sum_i \log x_i,
        \quad t = (\log x - m) / s

    The last sum depends on the data alone and is computed once for all samples. With the upstream gradient
    :math:`g_k`:

    .. math::
        \bar m_{ki} = g_k t_{ki} / s_{ki}, \quad \overline{\log s}_{ki} = g_k \big[t_{ki}^2 - 1\big], \quad
        \bar x_i = -\sum_k \big[g_k + \bar m_{ki}\big] / x_i

    At x = 0 log p is -∞; its gradient is 0 where g is 0.

    The op is ``fastvae.ops.log_normal_log_prob(x, location, log_scale)``.

    Args:
        scale: standard deviation s > 0 of log x: a number, a tensor broadcastable to the event, or a tensor
            that a network computed. Default: the decoder returns its logarithm, too.
        learned: train the scale, starting from this value, as the parameter ``log_scale``.

    Raises:
        TypeError, ValueError: if scale is not positive, or is an ``nn.Parameter``.

    Example:
        >>> import torch, fastvae
        >>> likelihood = fastvae.likelihoods.LogNormal(scale=0.1)
        >>> likelihood.log_prob(torch.ones(4, 7), torch.zeros(4, 7)).shape
        torch.Size([4, 7])
        >>> fastvae.ops.log_normal_log_prob(torch.ones(2, 2), torch.zeros(2, 2), 0.0)  # -log 2π
        tensor([-1.8379, -1.8379])
    """

    name = "log_normal"
    elementary = True
    outputs = ("location", "log_scale")
    family = td.LogNormal
    low, inside = 0.0, 1.0
    hint = "pass the positive data themselves, not their logarithms"
    own_parameters = {"scale": "the standard deviation of log x"}

    def parameters_of(self, d: Any) -> tuple[Tensor, ...]:
        return d.loc, log_of_positive(d.scale)

    @staticmethod
    def value(x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        t = (torch.log(x) - location) * torch.exp(-log_scale)
        return -0.5 * (math.log(2 * math.pi) + 2 * log_scale + t**2)

    @staticmethod
    def gradient(g: Tensor, x: Tensor, location: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse_s = torch.exp(-log_scale)
        t = (torch.log(x) - location) * inverse_s
        # Zero upstream gradient gives zero gradient, even where x is 0.
        push = torch.where(g == 0, 0.0, g * t)
        grad_location = push * inverse_s
        grad_x = torch.where(g == 0, 0.0, -(g + grad_location) / x)
        return grad_x, grad_location, torch.where(g == 0, 0.0, push * t - g)

    @staticmethod
    def data(x: Tensor) -> Tensor:
        # At x = 0 the squared term is -inf already; adding inf would give NaN.
        return torch.where(x == 0, 0.0, -torch.log(x))

    @staticmethod
    def mean_of(location: Tensor, log_scale: Tensor) -> Tensor:  # type: ignore[override]
        return torch.exp(location + 0.5 * torch.exp(2 * log_scale))

    @staticmethod
    def draw(location: Tensor, log_scale: Tensor, *, generator: torch.Generator | None) -> Tensor:
        return torch.exp(location + torch.exp(log_scale) * normal_like(location, generator))
