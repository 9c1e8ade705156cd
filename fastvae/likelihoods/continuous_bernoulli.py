"""The continuous Bernoulli likelihood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from ..core.special import log_sinhc, log_sinhc_slope
from .declared import Declared
from .natural import check_flag, logits_of


class ContinuousBernoulli(Declared):
    r"""Continuous Bernoulli likelihood p(x|z) = C(l) exp(x l), a density on [0, 1].

    The decoder returns logits. It suits soft pixels of images, for which a Bernoulli is not a normalised
    density.

    .. math:: \log p(x|z_k) = \sum_i \big[x_i l_{ki} - \log \frac{e^{l_{ki}} - 1}{l_{ki}}\big]
              = \sum_i \big[(x_i - ½) l_{ki} - \log \frac{\sinh ½ l_{ki}}{½ l_{ki}}\big]

    The second form's last term is even in l. It is a series for :math:`|l| < 1`; beyond, log p is computed as
    :math:`-\log(1 - e^{-|l|}) + \log|l|` plus a Bernoulli's term linear in :math:`|l|`. So nothing cancels
    around λ = ½. With the upstream gradient :math:`g_k`:

    .. math:: \bar l_{ki} = g_k \big[x_i - μ(l_{ki})\big], \quad \bar x_i = \sum_k g_k l_{ki}, \quad
              μ(l) = \frac1{1 - e^{-l}} - \frac1l

    ``mean`` is μ, not σ(l). The op is ``fastvae.ops.continuous_bernoulli_log_prob(x, logits)``.

    Args:
        probs: the decoder returns probabilities (it ends in a sigmoid). They are converted to logits
            :math:`\log p - \log(1 - p)`, each logarithm at least −100, with the slope
            :math:`1 / \max(p (1 - p), 10^{-12})`: the limits of
            ``torch.nn.functional.binary_cross_entropy``. In float16 the gradient saturates at that dtype's
            range. Logits are more precise near 0 and 1.

    References:
        Loaiza-Ganem & Cunningham, The continuous Bernoulli: fixing a pervasive error in variational
        autoencoders, 2019.

    Example:
        >>> import torch, fastvae
        >>> fastvae.likelihoods.ContinuousBernoulli().log_prob(torch.rand(4, 7), torch.zeros(4, 7)).shape
        torch.Size([4, 7])
        >>> x, logits = torch.ones(2, 3), torch.full((2, 3), 2.0)
        >>> fastvae.ops.continuous_bernoulli_log_prob(x, logits)  # 3 (log 2 - log(1 - e^-2))
        tensor([2.5157, 2.5157])
    """

    name = "continuous_bernoulli"
    outputs = ("logits",)
    family = td.ContinuousBernoulli
    low, high = 0.0, 1.0
    reads, option = "logits", "probs"
    hint = "for images scaled to [-1, 1] use (x + 1) / 2, and for bytes x / 255"

    def __init__(self, *, probs: bool = False):
        super().__init__()
        self.probs = check_flag("probs", probs)
        if probs:
            self.converts, self.reads = True, ""  # type: ignore[misc]

    def _natural(self, parameters: Any, seen: Tensor | None = None) -> Any:
        return logits_of(parameters, "ContinuousBernoulli(probs=True)", seen) if self.probs else parameters

    def extra_repr(self) -> str:
        return "probs=True" if self.probs else ""

    def parameters_of(self, d: Any) -> Any:
        return d.logits

    @staticmethod
    def value(x: Tensor, logits: Tensor) -> Tensor:
        # As in Bernoulli: fold to the side of the logit's sign; 0 * inf is 0.
        miss = torch.where(logits > 0, 1 - x, x)
        magnitude = logits.abs()
        linear = torch.where(miss == 0, 0.0, miss * magnitude)
        near = (0.5 - miss) * magnitude - log_sinhc(magnitude.clamp(max=1))
        # Clamped, so that an infinite logit does not produce inf - inf.
        most = torch.where(miss == 0, magnitude, magnitude.clamp(max=1e38))
        far = torch.log(most) - torch.log1p(-torch.exp(-magnitude)) - linear
        return torch.where(magnitude < 1, near, far)

    @staticmethod
    def gradient(g: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        rest = _rest(logits.abs())
        return g * logits, g * torch.where(logits > 0, (x - 1) + rest, x - rest)

    @staticmethod
    def mean_of(logits: Tensor) -> Tensor:
        # The slope is odd, so it needs no |l|, which has no gradient at 0.
        near = 0.5 + log_sinhc_slope(logits.clamp(-1, 1))
        rest = _rest(logits.abs())
        return torch.where(logits.abs() < 1, near, torch.where(logits > 0, 1 - rest, rest))

    @staticmethod
    def draw(logits: Tensor, *, generator: torch.Generator | None) -> Tensor:
        magnitude = logits.abs()
        u = torch.rand(logits.shape, dtype=logits.dtype, device=logits.device, generator=generator)
        # Invert the distribution function; uniform where the logit is 0.
        low = -torch.log1p(u * torch.expm1(-magnitude)) / magnitude
        low = torch.where(magnitude == 0, u, low).clamp(0, 1)
        return torch.where(logits > 0, 1 - low, low)


def _rest(magnitude: Tensor) -> Tensor:
    """Return the mean's distance from the nearer end: 1 / |l| - 1 / (exp|l| - 1), ½ at 0."""
    near = 0.5 - log_sinhc_slope(magnitude.clamp(max=1))
    # Clamped, since autograd also differentiates the branch not taken.
    beyond = magnitude.clamp(min=1)
    odds = torch.exp(-beyond)
    return torch.where(magnitude < 1, near, 1 / beyond - odds / (1 - odds))
