"""The logistic likelihood."""

import torch
from torch import Tensor

from .scaled import Scaled, exponential_like


class Logistic(Scaled):
    r"""Logistic likelihood p(x|z) = Logistic(location, s): Gaussian in shape, with Laplace tails.

    The decoder returns ``(location, log_scale)``, or ``location`` alone when ``scale`` is given.

    .. math:: \log p(x|z_k) = -\sum_i \big[\log s_{ki} + |t_{ki}| + 2 \log(1 + e^{-|t_{ki}|})\big],
              \quad t = (x - m) / s

    With the upstream gradient :math:`g_k`:

    .. math::
        \bar m_{ki} = g_k \tanh(½ t_{ki}) / s_{ki}, \quad
        \overline{\log s}_{ki} = g_k \big[t_{ki} \tanh(½ t_{ki}) - 1\big], \quad
        \bar x_i = -\sum_k \bar m_{ki}

    The op is ``fastvae.ops.logistic_log_prob(x, location, log_scale)``.

    Args:
        scale: s > 0, the standard deviation times √3/π: a number, a tensor broadcastable to the event, or a
            tensor that a network computed. Default: the decoder returns its logarithm, too.
        learned: train the scale, starting from this value, as the parameter ``log_scale``.

    Raises:
        TypeError, ValueError: if scale is not positive, or is an ``nn.Parameter``.

    Example:
        >>> import torch, fastvae
        >>> likelihood = fastvae.likelihoods.Logistic(scale=0.1)
        >>> likelihood.log_prob(torch.zeros(4, 7), torch.zeros(4, 7)).shape
        torch.Size([4, 7])
        >>> fastvae.ops.logistic_log_prob(torch.zeros(2, 3), torch.zeros(2, 3), 0.0)  # -6 log 2
        tensor([-4.1589, -4.1589])
    """

    name = "logistic"
    elementary = True
    outputs = ("location", "log_scale")
    own_parameters = {"scale": "the standard deviation times √3/π"}

    @staticmethod
    def value(x: Tensor, location: Tensor, log_scale: Tensor) -> Tensor:
        # Written in the magnitude, which neither cancels nor overflows.
        distance = (x - location).abs() * torch.exp(-log_scale)
        return -(log_scale + distance + 2 * torch.log1p(torch.exp(-distance)))

    @staticmethod
    def gradient(g: Tensor, x: Tensor, location: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse_s = torch.exp(-log_scale)
        t = (x - location) * inverse_s
        slope = torch.tanh(0.5 * t)
        grad_location = g * slope * inverse_s
        return -grad_location, grad_location, g * (t * slope - 1)

    @staticmethod
    def draw(location: Tensor, log_scale: Tensor, *, generator: torch.Generator | None) -> Tensor:
        first, second = exponential_like(location, generator), exponential_like(location, generator)
        return location + torch.exp(log_scale) * torch.log(first / second)
