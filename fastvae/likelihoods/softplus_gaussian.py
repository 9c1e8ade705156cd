"""The Gaussian likelihood with a softplus variance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..core.special import softplus
from .gaussian import NAMED_SCALES, Gaussian
from .scaled import normal_like


class SoftplusGaussian(Gaussian):
    r"""Gaussian likelihood p(x|z) = N(mean, softplus(raw) + floor).

    The decoder returns ``(mean, raw)``. ``fastvae.likelihoods.Gaussian(scale="softplus", floor=1e-4)``
    creates it.

    .. math:: \log p(x|z_k) = -½ \sum_i \big[\log 2π σ_{ki}^2 + (x_i - m_{ki})^2 / σ_{ki}^2\big],
              \quad σ^2 = \log(1 + e^r) + \text{floor}

    With the upstream gradient :math:`g_k`, and :math:`d = x - m`:

    .. math::
        \bar m_{ki} = g_k d_{ki} / σ_{ki}^2, \quad
        \bar r_{ki} = ½ g_k \big[d_{ki}^2 / σ_{ki}^2 - 1\big] \frac{σ(r_{ki})}{σ_{ki}^2}, \quad
        \bar x_i = -\sum_k \bar m_{ki}

    raw is clamped below at -80. The op is
    ``fastvae.ops.softplus_gaussian_log_prob(x, mean, raw, log_floor)``.

    Args:
        scale: always ``"softplus"``, the name by which :class:`Gaussian` creates it.
        floor: lower bound of the variance, which prevents collapse; 0 for none.
        learned: always False, as the decoder returns the scale.

    Raises:
        TypeError, ValueError: if floor is not a number, or negative.

    Example:
        >>> import torch, fastvae
        >>> likelihood = fastvae.likelihoods.Gaussian(scale="softplus", floor=0.0)
        >>> x, zeros = torch.zeros(2, 3), torch.zeros(2, 3)
        >>> likelihood.log_prob(x, (zeros, zeros))[0]  # -½ log(2π log 2)
        tensor([-0.7357, -0.7357, -0.7357])
    """

    name = "softplus_gaussian"
    elementary = True
    outputs = ("mean", "raw", "log_floor")  # type: ignore[assignment]
    constants = ("log_floor",)
    family = None  # a Normal's scale would have to be inverted through the softplus

    def __init__(
        self,
        scale: Any = "softplus",
        *,
        floor: float = 1e-4,
        learned: bool = False,
    ):
        if scale != "softplus" or learned:
            raise ValueError(
                "the scale of a softplus Gaussian comes from the decoder; to hold or learn one use "
                "fastvae.likelihoods.Gaussian(scale=0.1, learned=True)"
            )
        super().__init__()
        if isinstance(floor, bool) or not isinstance(floor, (int, float)):
            raise TypeError(f"floor must be a number, the least variance, got {type(floor).__name__}")
        if not 0 <= floor < math.inf:
            raise ValueError(f"floor is the least variance and must be finite and not negative, got {floor}")
        self.floor = float(floor)

    def extra_repr(self) -> str:
        return f"floor={self.floor}"

    @staticmethod
    def value(x: Tensor, mean: Tensor, raw: Tensor, log_floor: Tensor) -> Tensor:  # type: ignore[override]
        variance, _, _ = _variance(raw, log_floor)
        delta = x - mean
        return -0.5 * (math.log(2 * math.pi) + torch.log(variance) + delta * (delta / variance))

    @staticmethod
    def gradient(  # type: ignore[override]
        g: Tensor, x: Tensor, mean: Tensor, raw: Tensor, log_floor: Tensor
    ) -> tuple[Tensor, ...]:
        variance, by_raw, floor = _variance(raw, log_floor)
        delta = x - mean
        grad_mean = g * (delta / variance)
        by_variance = 0.5 * (grad_mean * delta - g)
        return -grad_mean, grad_mean, by_variance * (by_raw / variance), by_variance * (floor / variance)

    @staticmethod
    def draw(  # type: ignore[override]
        mean: Tensor, raw: Tensor, log_floor: Tensor, *, generator: torch.Generator | None
    ) -> Tensor:
        return mean + _variance(raw, log_floor)[0].sqrt() * normal_like(mean, generator)

    def _given(self, x: Tensor) -> tuple[float | Tensor, ...]:
        return (math.log(self.floor) if self.floor else -math.inf,)

    def _example(self, names: list[str], more: str = "") -> str:
        return f"fastvae.likelihoods.Gaussian(scale=0.1{more})"

    @property
    def scale(self) -> None:
        """Always None: the decoder returns the scale."""


NAMED_SCALES["softplus"] = SoftplusGaussian


def _variance(raw: Tensor, log_floor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the variance, its derivative by raw, and the floor, its derivative by log_floor."""
    raw, floor = raw.clamp(-80, 1e38), torch.exp(log_floor.clamp(max=80))
    variance, by_raw = softplus(raw)
    return variance + floor, by_raw, floor
