"""The Bernoulli likelihood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from .declared import Declared
from .natural import check_flag, logits_of


class Bernoulli(Declared):
    r"""Bernoulli likelihood p(x|z) of independent pixels, for decoders that return logits.

    x may be soft, in [0, 1].

    .. math:: \log p(x|z_k) = \sum_i \big[x_i l_{ki} - \mathrm{softplus}(l_{ki})\big]
              = -\sum_i \big[t_{ki} |l_{ki}| + \log(1 + e^{-|l_{ki}|})\big],
              \quad t = x \text{ if } l ≤ 0 \text{ else } 1 - x

    The second form neither cancels nor overflows, and :math:`0 \cdot ∞ = 0`: a pixel predicted correctly with
    certainty contributes 0. With the upstream gradient :math:`g_k`:
    :math:`\bar l_{ki} = g_k (x_i - σ(l_{ki}))` and :math:`\bar x_i = \sum_k g_k l_{ki}`.

    The op is ``fastvae.ops.bernoulli_log_prob(x, logits)``. Of a ``torch.distributions.Bernoulli(probs)`` the
    logits are those that torch computes, from probabilities clamped to the dtype's resolution.

    Args:
        probs: the decoder returns probabilities (it ends in a sigmoid). They are converted to logits
            :math:`\log p - \log(1 - p)`, each logarithm at least −100, with the slope
            :math:`1 / \max(p (1 - p), 10^{-12})`: the limits of
            ``torch.nn.functional.binary_cross_entropy``. In float16 the gradient saturates at that dtype's
            range. Logits are more precise near 0 and 1.

    Example:
        >>> import torch, fastvae
        >>> fastvae.likelihoods.Bernoulli().log_prob(torch.ones(4, 7), torch.zeros(4, 7)).shape
        torch.Size([4, 7])
        >>> x, logits = torch.ones(4, 8, 8), torch.zeros(50, 4, 8, 8)
        >>> fastvae.ops.bernoulli_log_prob(x, logits)[0, 0]  # 64 log ½
        tensor(-44.3614)
    """

    name = "bernoulli"
    elementary = True
    outputs = ("logits",)
    family = td.Bernoulli
    low, high = 0.0, 1.0
    reads, option = "logits", "probs"
    hint = (
        "for images scaled to [-1, 1] use (x + 1) / 2, for bytes x / 255, and for data that is not bounded "
        "likelihood='gaussian'"
    )

    def __init__(self, *, probs: bool = False):
        super().__init__()
        self.probs = check_flag("probs", probs)
        if probs:
            self.converts, self.reads = True, ""  # type: ignore[misc]

    def _natural(self, parameters: Any, seen: Tensor | None = None) -> Any:
        return logits_of(parameters, "Bernoulli(probs=True)", seen) if self.probs else parameters

    def extra_repr(self) -> str:
        return "probs=True" if self.probs else ""

    def parameters_of(self, d: Any) -> Any:
        return d.logits

    @staticmethod
    def value(x: Tensor, logits: Tensor) -> Tensor:
        # For l > 0 this is -(1 - x) l - log(1 + exp(-l)): no cancellation, and certain pixels (0 * inf) are
        # 0, not NaN.
        miss = torch.where(logits > 0, 1 - x, x)
        magnitude = logits.abs()
        linear = torch.where(miss == 0, 0.0, miss * magnitude)
        return -(linear + torch.log1p(torch.exp(-magnitude)))

    @staticmethod
    def gradient(g: Tensor, x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        return g * logits, g * (x - torch.sigmoid(logits))

    mean_of = staticmethod(torch.sigmoid)

    @staticmethod
    def information(logits: Tensor) -> tuple[Tensor, ...]:
        return (torch.sigmoid(logits) * torch.sigmoid(-logits),)

    @staticmethod
    def draw(logits: Tensor, *, generator: torch.Generator | None) -> Tensor:
        return torch.bernoulli(torch.sigmoid(logits), generator=generator)
