"""The discretised logistic likelihood."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_count
from ..core.deferred import LastLayer
from ..core.nested import Conditioning
from ..ops.head import Layers
from .base import Fused
from .scaled import OwnParameter, Scaled, exponential_like


class DiscretizedLogistic(Scaled):
    r"""Discretised logistic likelihood p(x|z): a logistic variable rounded to a grid, such as 8-bit pixels.

    p(x|z) is the probability of the bin of x. The decoder returns ``(mean, log_scale)``, or ``mean`` alone
    when ``scale`` is given.

    .. math:: \log p(x|z_k) = \sum_i \log\Big[σ\Big(\frac{x + ½ w - m}s\Big) - σ\Big(\frac{x - ½ w -
              m}s\Big)\Big], \quad w = \frac{\text{high} - \text{low}}{\text{levels} - 1}

    where the first σ is 1 at high and the second 0 at low: the end bins are open. With r = \|x − m\| / s and
    h = w / 2s a bin's probability is :math:`σ(r + h) σ(h - r) (1 - e^{-2h})`, whose logarithms are all
    negative: nothing cancels, however narrow the bin or distant the mean. An end bin's probability is
    :math:`σ(h - r)`, with r signed, positive outwards. With the upstream gradient :math:`g_k`, :math:`v = r -
    h` and :math:`S = σ(v) σ(r + h) (1 - e^{-2r})`:

    .. math::
        \bar m_{ki} = ± g_k S / s, \quad
        \overline{\log s}_{ki} = g_k [r S - \bar w], \quad
        \bar w = h [σ(v) + σ(-r - h)] + \frac{2h}{e^{2h} - 1}

    with the sign of x − m. Scales are clamped to [e⁻⁶⁰, e⁶⁰]. The op,
    ``fastvae.ops.discretized_logistic_log_prob(x, mean, log_scale, log_bin_width)``, assumes low = 0 and
    high = 1; elements equal to 0 or 1 are in the end bins.

    Args:
        levels: number of values of x.
        low, high: the least and the greatest value. mean and scale are in the units of x.
        scale: s > 0, the standard deviation times √3/π: a number, a tensor broadcastable to the event, or a
            tensor that a network computed. Default: the decoder returns its logarithm, too.
        learned: train the scale, starting from this value, as the parameter ``log_scale``.

    Raises:
        TypeError, ValueError: if scale is not positive, or is an ``nn.Parameter``.
        ValueError: for fewer than two levels, or if low is not below high.

    References:
        Kingma et al., Improved variational inference with inverse autoregressive flow, 2016; Salimans et al.,
        PixelCNN++, 2017, section 2.1.

    Example:
        >>> import torch, fastvae
        >>> pixels = torch.randint(256, (4, 7)) / 255
        >>> likelihood = fastvae.likelihoods.DiscretizedLogistic(scale=0.05, learned=True)
        >>> likelihood.log_prob(pixels, torch.full((4, 7), 0.5)).shape
        torch.Size([4, 7])
        >>> signs = fastvae.likelihoods.DiscretizedLogistic(levels=2, low=-1.0)
        >>> signs.log_prob(torch.ones(1, 1), (torch.zeros(1, 1), torch.zeros(1, 1)))  # log σ(0)
        tensor([[-0.6931]])
    """

    name = "discretized_logistic"
    outputs = ("mean", "log_scale", "log_bin_width")
    constants = ("log_bin_width",)
    low, high = 0.0, 1.0
    differentiable = False
    hint = (
        "for data with other ends give them, such as fastvae.likelihoods.DiscretizedLogistic(low=-1.0, "
        "high=1.0), and "
        "for bytes high=255.0"
    )
    own_parameters = {"scale": "the standard deviation times √3/π"}

    def __init__(
        self,
        levels: int = 256,
        low: float = 0.0,
        high: float = 1.0,
        scale: OwnParameter = None,
        *,
        learned: bool = False,
    ):
        super().__init__(scale, learned=learned)
        levels = check_count("levels", levels, "the number of values of x", least=2)
        if not (low < high and math.isfinite(high - low)):
            raise ValueError(f"low must be below high, the ends of the data; got {low} and {high}")
        self.levels, self._origin, self._range = levels, float(low), float(high) - float(low)
        self._is_unit = (low, high) == (0, 1)

    def extra_repr(self) -> str:
        high = self._origin + self._range
        settings = {"levels": (self.levels, 256), "low": (self._origin, 0.0), "high": (high, 1.0)}
        own = [f"{name}={value}" for name, (value, default) in settings.items() if value != default]
        return ", ".join([*own, *filter(None, [super().extra_repr()])])

    @staticmethod
    def value(x: Tensor, mean: Tensor, log_scale: Tensor, log_bin_width: Tensor) -> Tensor:
        _, r, half, far, end, _ = _parts(x, mean, log_scale, log_bin_width)
        v = r - half
        rest = torch.log1p((far + torch.exp(-2 * half)) / -torch.expm1(-2 * half))
        return -(v.clamp(min=0) + torch.log1p(torch.exp(-v.abs())) + torch.where(end, 0.0, rest))

    @staticmethod
    def gradient(
        g: Tensor, x: Tensor, mean: Tensor, log_scale: Tensor, log_bin_width: Tensor
    ) -> tuple[Tensor | None, ...]:
        inverse_s, r, half, far, end, turned = _parts(x, mean, log_scale, log_bin_width)
        sigmoid = torch.sigmoid(r - half)
        beyond = 1 / (1 + far)
        by_r = torch.where(end, sigmoid, sigmoid * beyond * -torch.expm1(-2 * r))
        inside = half * (far * beyond) + 2 * half * (torch.exp(-2 * half) / -torch.expm1(-2 * half))
        by_width = half * sigmoid + torch.where(end, 0.0, inside)
        push = g * by_r * inverse_s
        return None, torch.where(turned, -push, push), g * (r * by_r - by_width), g * by_width

    @staticmethod
    def mean_of(mean: Tensor, log_scale: Tensor, log_bin_width: Tensor) -> Tensor:  # type: ignore[override]
        # 1 minus the distribution function, averaged over the edges between bins.
        width, inverse_s = torch.exp(log_bin_width), torch.exp(-log_scale.clamp(-60, 60))
        below = torch.zeros_like(mean)
        for i in range(_edges(width)):
            below += torch.sigmoid(((i + 0.5) * width - mean) * inverse_s)
        return 1 - width * below

    @staticmethod
    def draw(
        mean: Tensor, log_scale: Tensor, log_bin_width: Tensor, *, generator: torch.Generator | None
    ) -> Tensor:
        first, second = exponential_like(mean, generator), exponential_like(mean, generator)
        edges = torch.exp(-log_bin_width).round()
        level = (mean + torch.exp(log_scale) * torch.log(first / second)) * edges
        return torch.minimum(level.round().clamp(min=0), edges) / edges

    def _given(self, x: Tensor) -> tuple[float | Tensor, ...]:
        return (*super()._given(x), -math.log(self.levels - 1))

    def _arranged(self, returned: Any, own: Any) -> tuple[Any, ...]:
        every = (*returned, *own)
        if self._is_unit:
            return every
        return (every[0] - self._origin) / self._range, every[1] - math.log(self._range), every[2]

    def _layers(
        self, x: Tensor, layer: LastLayer, samples: int, conditioning: Conditioning | None
    ) -> Layers | None:
        # For any other range the outputs are shifted and scaled first, so they must be computed.
        return super()._layers(x, layer, samples, conditioning) if self._is_unit else None

    def _unit(self, x: Tensor) -> Tensor:
        """Map x to [0, 1], exactly 0 and 1 at the ends."""
        if self._is_unit:
            return x
        level = ((x - self._origin) * ((self.levels - 1) / self._range)).round()
        return level / (self.levels - 1)

    def _of_unit(self, x: Tensor) -> Tensor:
        """Map x from [0, 1] to the range of the data."""
        return x if self._is_unit else self._origin + self._range * x

    def _elements(self, x: Tensor, parameters: Any) -> Tensor:
        return super()._elements(self._unit(x), parameters)

    def log_likelihood(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Return log p(x|z) [K, B] for the decoder's output for K·B rows of z, sample-major."""
        x = self._unit(x) if self.is_declared else x
        return super().log_likelihood(x, parameters, samples, conditioning)

    def fused(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Fused | None:
        """Return the validated arguments of the fused op, or None if they do not fit it."""
        return super().fused(self._unit(x), parameters, samples, conditioning)

    def mean(self, parameters: Any) -> Tensor:
        """Return the mean of x [N, *event] over the grid's values."""
        return self._of_unit(super().mean(parameters))

    def sample(self, parameters: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw x [N, *event] on the grid."""
        return self._of_unit(super().sample(parameters, generator=generator))


def _edges(width: Tensor) -> int:
    """Return the number of edges between bins, for one common bin width."""
    return max(int((1 / width.flatten()[0]).round()), 1) if width.numel() else 0


def _parts(x: Tensor, mean: Tensor, log_scale: Tensor, log_bin_width: Tensor) -> tuple[Tensor, ...]:
    """Return 1/s, the distance r to the mean, half the bin width h, exp(-(r + h)), end-bin and sign flags.

    r and h are in scales; r is measured outwards in an end bin, and exp(-(r + h)) is 0 there.
    """
    log_s = log_scale.clamp(-60, 60)
    inverse_s = torch.exp(-log_s)
    z = (x - mean) * inverse_s
    half = 0.5 * torch.exp(log_bin_width - log_s)
    low, high = x <= 0, x >= 1
    turned = low | (~high & (z < 0))
    r = torch.where(turned, -z, z)
    end = low | high
    return inverse_s, r, half, torch.where(end, 0.0, torch.exp(-(r + half))), end, turned
