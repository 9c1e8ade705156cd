"""The zero-inflated negative binomial likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .negative_binomial import NegativeBinomial, Overdispersed, slopes


class ZeroInflatedNegativeBinomial(Overdispersed):
    r"""Zero-inflated negative binomial likelihood p(x|z) of independent counts.

    Each negative binomial count is replaced by 0 with probability σ(l). The decoder returns ``(log_mean,
    log_inverse_dispersion, dropout_logit)``, or ``(log_mean, dropout_logit)`` when ``inverse_dispersion`` is
    given, as in :class:`NegativeBinomial`.

    .. math:: p(x|z_k) = \prod_i \big[σ(l) [x_i = 0] + σ(-l)\, \mathrm{NB}(x_i; e^m, e^t)\big]

    For a count of 0, with :math:`a = σ(-l) (\mathrm{NB}(0) - 1)`, log p is computed as :math:`\log(1 + a)` if
    a > -½, and otherwise as the log-sum-exp of l and log NB(0), minus log(1 + exp(l)). With the upstream
    gradient :math:`g` and :math:`ω = σ(\log \mathrm{NB}(0) - l)` for a count of 0, else 1, the gradients of
    log mean and log inverse dispersion are ω times those of :class:`NegativeBinomial`, and that of
    the logit is :math:`g\, (1 - ω) σ(-l) (1 - \mathrm{NB}(0))` for a count of 0, else :math:`-g\, σ(l)`.

    The op is ``fastvae.ops.zero_inflated_negative_binomial_log_prob(x, log_mean,
    log_inverse_dispersion, dropout_logit)``.

    References:
        Lopez et al., Deep generative modeling for single-cell transcriptomics, 2018.

    Example:
        >>> import torch, fastvae
        >>> counts, zeros = torch.tensor([[0.0, 3.0]]), torch.zeros(1, 2)
        >>> op = fastvae.ops.zero_inflated_negative_binomial_log_prob
        >>> op(counts, zeros, 0.0, torch.full((), -100.0))  # nothing is dropped: -5 log 2
        tensor([-3.4657])
    """

    name = "zero_inflated_negative_binomial"
    outputs = ("log_mean", "log_inverse_dispersion", "dropout_logit")

    @staticmethod
    def value(x: Tensor, log_mean: Tensor, log_inverse_dispersion: Tensor, dropout_logit: Tensor) -> Tensor:
        counted = NegativeBinomial.value(x, log_mean, log_inverse_dispersion)
        softplus = dropout_logit.clamp(min=0) + torch.log1p(torch.exp(-dropout_logit.abs()))
        change = torch.sigmoid(-dropout_logit) * torch.expm1(counted)
        near = change > -0.5
        apart = torch.exp(-(dropout_logit - counted).abs())
        log_sum = torch.log1p(torch.where(near, change, apart))
        larger = torch.where(dropout_logit > counted, dropout_logit, counted)
        of_zero = torch.where(near, log_sum, (larger + log_sum) - softplus)
        return torch.where(x == 0, of_zero, counted - softplus)

    @staticmethod
    def gradient(
        g: Tensor, x: Tensor, log_mean: Tensor, log_inverse_dispersion: Tensor, dropout_logit: Tensor
    ) -> tuple[None, Tensor, Tensor, Tensor]:
        of_zero, by_mean, by_dispersion = slopes(x, log_mean, log_inverse_dispersion)
        gap = dropout_logit - of_zero
        part = torch.where(x == 0, g * torch.sigmoid(-gap), g)
        by_logit = -torch.sigmoid(gap) * torch.sigmoid(-dropout_logit) * torch.expm1(of_zero)
        by_logit = torch.where(x == 0, by_logit, -torch.sigmoid(dropout_logit))
        return None, part * by_mean, part * by_dispersion, g * by_logit

    def _returned(self, own: int) -> tuple[str, ...]:
        return self.outputs[::2] if own else self.outputs

    def _arranged(self, returned: Sequence[Any], own: Sequence[Any]) -> tuple[Any, ...]:
        return (returned[0], *own, *returned[1:])

    @staticmethod
    def mean_of(log_mean: Tensor, _: Tensor, dropout_logit: Tensor) -> Tensor:  # type: ignore[override]
        # A single exponential: the product of two could be inf · 0.
        return torch.exp(log_mean + logsigmoid(-dropout_logit))

    @staticmethod
    def draw(
        log_mean: Tensor,
        log_inverse_dispersion: Tensor,
        dropout_logit: Tensor,
        *,
        generator: torch.Generator | None,
    ) -> Tensor:
        counts = NegativeBinomial.draw(log_mean, log_inverse_dispersion, generator=generator)
        return counts * torch.bernoulli(torch.sigmoid(-dropout_logit), generator=generator)
