"""The continuous Bernoulli likelihood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reference.common import log_sinhc, log_sinhc_slope
from . import oracles
from .base import Declared
from .natural import check_flag, logits_of


class ContinuousBernoulli(Declared):
    r"""p(x|z) = C(l) exp(x l), a density on [0, 1], for decoders that return logits: soft pixels as an image
    has them, for which a Bernoulli has no normalised density.

    .. math:: \log p(x|z_k) = \sum_i \big[x_i l_{ki} - \log \frac{e^{l_{ki}} - 1}{l_{ki}}\big]
              = \sum_i \big[(x_i - ½) l_{ki} - \log \frac{\sinh ½ l_{ki}}{½ l_{ki}}\big]

    The second form, even but for its first term, is a series for :math:`|l| < 1`; beyond, :math:`-\log(1 -
    e^{-|l|}) + \log|l|` and what a Bernoulli has of :math:`|l|`. So nothing cancels around λ = ½. With
    :math:`g_k` what arrives:

    .. math:: \bar l_{ki} = g_k \big[x_i - μ(l_{ki})\big], \quad \bar x_i = \sum_k g_k l_{ki}, \quad
              μ(l) = \frac1{1 - e^{-l}} - \frac1l

    ``mean`` is μ, not σ(l). The op by itself is ``fastvae.ops.continuous_bernoulli_log_prob(x, logits)``.

    Args:
        probs: the decoder returns probabilities, as one that ends in a sigmoid does. They become logits
            :math:`\log p - \log(1 - p)`, each logarithm at least −100, with the slope
            :math:`1 / \max(p (1 - p), 10^{-12})`: the limits of
            ``torch.nn.functional.binary_cross_entropy``. In float16 the gradient saturates at that dtype's
            range. Logits keep more digits near 0 and 1.

    References:
        Loaiza-Ganem & Cunningham, The continuous Bernoulli: fixing a pervasive error in variational
        autoencoders, 2019.

    Example:
        >>> import torch, fastvae
        >>> fastvae.ContinuousBernoulli().log_prob(torch.rand(4, 7), torch.zeros(4, 7)).shape
        torch.Size([4, 7])
        >>> x, logits = torch.ones(2, 3), torch.full((2, 3), 2.0)
        >>> fastvae.ops.continuous_bernoulli_log_prob(x, logits)  # 3 (log 2 - log(1 - e^-2))
        tensor([2.5157, 2.5157])
    """

    name = "continuous_bernoulli"
    outputs = ("logits",)
    low, high = 0.0, 1.0
    reads, option = "logits", "probs"
    hint = "for images scaled to [-1, 1] use (x + 1) / 2, and for bytes x / 255"
    hazards = {"logits": (100.0,)}
    oracle = oracles.ContinuousBernoulli

    def __init__(self, *, probs: bool = False):
        super().__init__()
        self.probs = check_flag("probs", probs)
        if probs:
            self.converts, self.reads = True, ""  # type: ignore[misc]

    def _natural(self, parameters: Any) -> Any:
        return logits_of(parameters, "ContinuousBernoulli(probs=True)") if self.probs else parameters

    def extra_repr(self) -> str:
        return "probs=True" if self.probs else ""

    @staticmethod
    def value(x: Tensor, logits: Tensor) -> Tensor:
        # As a Bernoulli's, of the side that the logit is on; and 0 * inf is 0.
        miss = torch.where(logits > 0, 1 - x, x)
        magnitude = logits.abs()
        linear = torch.where(miss == 0, 0.0, miss * magnitude)
        near = (0.5 - miss) * magnitude - log_sinhc(magnitude.clamp(max=1))
        # Bounded, so that of an infinite logit no inf - inf is left.
        most = torch.where(miss == 0, magnitude, magnitude.clamp(max=1e38))
        far = torch.log(most) - torch.log1p(-torch.exp(-magnitude)) - linear
        return torch.where(magnitude < 1, near, far)

    @staticmethod
    def gradient(g: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        rest = _rest(logits.abs())
        return g * logits, g * torch.where(logits > 0, (x - 1) + rest, x - rest)

    @staticmethod
    def mean_of(logits: Tensor) -> Tensor:
        # The slope is odd, so that no |l| stands in the way of a gradient at 0.
        near = 0.5 + log_sinhc_slope(logits.clamp(-1, 1))
        rest = _rest(logits.abs())
        return torch.where(logits.abs() < 1, near, torch.where(logits > 0, 1 - rest, rest))

    @staticmethod
    def draw(logits: Tensor, *, generator: torch.Generator | None) -> Tensor:
        magnitude = logits.abs()
        u = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device, generator=generator)
        # By the inverse of the distribution function; uniform where the logit is 0.
        low = -torch.log1p(u * torch.expm1(-magnitude)) / magnitude
        low = torch.where(magnitude == 0, u, low).clamp(0, 1)
        return torch.where(logits > 0, 1 - low, low)


def _rest(magnitude: Tensor) -> Tensor:
    """What the mean lacks of the end that it leans to: 1 / |l| - 1 / (exp|l| - 1), ½ at 0."""
    near = 0.5 - log_sinhc_slope(magnitude.clamp(max=1))
    # Clamped: autograd differentiates the branch that is not taken, too.
    beyond = magnitude.clamp(min=1)
    odds = torch.exp(-beyond)
    return torch.where(magnitude < 1, near, 1 / beyond - odds / (1 - odds))
