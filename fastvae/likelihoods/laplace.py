"""The Laplace likelihood."""

import math
from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from .natural import log_of_positive
from .scaled import Scaled, exponential_like


class Laplace(Scaled):
    r"""Laplace likelihood p(x|z) = Laplace(location, s): absolute errors instead of squared ones.

    The decoder returns ``(location, log_scale)``, or ``location`` alone when ``scale`` is given.

    .. math:: \log p(x|z_k) = -\sum_i \big[\log 2 + \log s_{ki} + |x_i - m_{ki}| / s_{ki}\big]

    With the upstream gradient :math:`g_k`:

    .. math::
        \bar m_{ki} = g_k \operatorname{sign}(x_i - m_{ki}) / s_{ki}, \quad
        \overline{\log s}_{ki} = g_k \big[|x_i - m_{ki}| / s_{ki} - 1\big], \quad
        \bar x_i = -\sum_k \bar m_{ki}

    The sign is 0 where x equals the location.

    The op is ``fastvae.ops.laplace_log_prob(x, location, log_scale)``.

    Args:
        scale: s > 0, the mean distance of x from the location: a number, a tensor broadcastable to the event,
            or a tensor that a network computed. Default: the decoder returns its logarithm, too.
        learned: train the scale, starting from this value, as the parameter ``log_scale``.

    Raises:
        TypeError, ValueError: if scale is not positive, or is an ``nn.Parameter``.

    Example:
        >>> import torch, fastvae
        >>> likelihood = fastvae.likelihoods.Laplace(scale=0.1)
        >>> likelihood.log_prob(torch.zeros(4, 7), torch.zeros(4, 7)).shape
        torch.Size([4, 7])
        >>> fastvae.ops.laplace_log_prob(torch.ones(2, 3), torch.zeros(2, 3), 0.0)  # -3 log 2 - 3
        tensor([-5.0794, -5.0794])
    """

    name = "laplace"
    family = td.Laplace
    elementary = True
    outputs = ("location", "log_scale")
    own_parameters = {"scale": "the mean distance from the location"}

    def parameters_of(self, d: Any) -> tuple[Tensor, ...]:
        return d.loc, log_of_positive(d.scale)

    @staticmethod
    def value(x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        distance = (x - location).abs() * torch.exp(-log_scale)
        return -(math.log(2) + log_scale + distance)

    @staticmethod
    def gradient(g: Tensor, x: Tensor, location: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse_s = torch.exp(-log_scale)
        delta = x - location
        # torch.sign(NaN) is 0; keep the NaN.
        sign = torch.where(delta.abs() >= 0, torch.sign(delta), delta)
        grad_location = g * sign * inverse_s
        return -grad_location, grad_location, g * (delta.abs() * inverse_s - 1)

    @staticmethod
    def information(location: Tensor, log_scale: Tensor) -> tuple[Tensor, ...]:
        return torch.exp(-2 * log_scale), torch.ones_like(log_scale)

    @staticmethod
    def draw(location: Tensor, log_scale: Tensor, *, generator: torch.Generator | None) -> Tensor:
        first, second = exponential_like(location, generator), exponential_like(location, generator)
        return location + torch.exp(log_scale) * (first - second)
