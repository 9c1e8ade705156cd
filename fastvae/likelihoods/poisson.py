"""The Poisson likelihood."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributions as td

from ..core.special import expm1_minus
from .declared import Declared
from .natural import check_flag, log_of, log_of_positive


class Poisson(Declared):
    r"""Poisson likelihood p(x|z) of independent counts, for decoders that return log rates.

    .. math:: \log p(x|z_k) = \sum_i \big[x_i r_{ki} - e^{r_{ki}} - \log x_i!\big]
              = \sum_i \big[-x_i (e^{d_{ki}} - 1 - d_{ki}) + x_i \log x_i - x_i - \log x_i!\big],
              \quad d = r - \log x

    The second form omits the terms that cancel for large counts; its last terms depend on the data alone and
    are computed once for all samples. With the upstream gradient :math:`g_k`:
    :math:`\bar r_{ki} = g_k (x_i - e^{r_{ki}})`. Counts may be integers of any dtype and have no gradient;
    non-integer values cause a warning.

    The op is ``fastvae.ops.poisson_log_prob(x, log_rate)``.

    Args:
        rate: the decoder returns rates (it ends in a softplus or an exponential). Their logarithms are at
            least −100, so a rate of 0 gives a positive count a finite log probability, with the slope
            :math:`1 / \max(\text{rate}, 10^{-30})`; in float16 the gradient saturates at that dtype's range.

    Example:
        >>> import torch, fastvae
        >>> counts, q = torch.tensor([[0, 3], [1, 2]]), torch.zeros(2, 2 * 5)
        >>> fastvae.iwae(counts, q, torch.nn.Linear(5, 2), k=7, likelihood="poisson").shape
        torch.Size([])
        >>> fastvae.ops.poisson_log_prob(counts, torch.zeros(2, 2))  # -2 - log 3!, -2 - log 2!
        tensor([-3.7918, -2.6931])
    """

    name = "poisson"
    outputs = ("log_rate",)
    family = td.Poisson
    low = 0.0
    takes_integers = takes_size = True
    differentiable = False
    reads, option, counts = "log rates", "rate", True
    hint = "pass the raw counts, neither centred nor on a log scale"

    def __init__(self, *, rate: bool = False):
        super().__init__()
        self.rate = check_flag("rate", rate)
        if rate:
            self.converts, self.reads = True, ""  # type: ignore[misc]

    def _natural(self, parameters: Any, seen: Tensor | None = None) -> Any:
        return (
            log_of(parameters, "Poisson(rate=True)", "rates", "log rates", seen) if self.rate else parameters
        )

    def extra_repr(self) -> str:
        return "rate=True" if self.rate else ""

    def parameters_of(self, d: Any) -> Tensor:
        return log_of_positive(d.rate)

    @staticmethod
    def value(x: Tensor, log_rate: Tensor) -> Tensor:
        d = log_rate - torch.log(x.clamp(min=torch.finfo(x.dtype).tiny))
        far = torch.where(x == 0, 0.0, x * (1 + d.clamp(max=710))) - torch.exp(log_rate)
        return torch.where(d.abs() < 1, -x * expm1_minus(d), far)

    @staticmethod
    def gradient(g: Tensor, x: Tensor, log_rate: Tensor) -> tuple[None, Tensor]:
        # A sample with zero upstream gradient gets zero gradient, even if its rate overflows.
        return None, torch.where(g == 0, 0.0, g * (x - torch.exp(log_rate)))

    @staticmethod
    def data(x: Tensor) -> Tensor:
        wide = x.double()
        return (torch.xlogy(wide, wide) - wide - torch.lgamma(wide + 1)).to(x.dtype)

    mean_of = staticmethod(torch.exp)

    @staticmethod
    def information(log_rate: Tensor) -> tuple[Tensor, ...]:
        return (torch.exp(log_rate),)

    @staticmethod
    def draw(log_rate: Tensor, *, generator: torch.Generator | None) -> Tensor:
        return torch.poisson(torch.exp(log_rate), generator=generator)
