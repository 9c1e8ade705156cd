"""Student's t likelihood."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td

from ..core.special import half_step, half_step_slope, log1p_excess, log1p_square
from ..core.torch_private import standard_gamma
from .natural import log_of_positive
from .scaled import OwnParameter, Scaled, normal_like


class StudentT(Scaled):
    r"""Student's t likelihood p(x|z) with ν degrees of freedom.

    The decoder returns ``(location, log_scale, log_df)``, ``(location, log_scale)`` when ``df`` is given, or
    ``location`` alone when ``scale`` is given, too.

    .. math::
        \log p(x|z_k) = \sum_i \Big[\log Γ(\tfrac{ν_{ki} + 1}2) - \log Γ(\tfrac{ν_{ki}}2) - ½ \log(π ν_{ki})
        - \log s_{ki} - \frac{ν_{ki} + 1}2 \log(1 + r_{ki}^2)\Big], \quad r = \frac{x - m}{s \sqrt ν}

    The ratio of gamma functions is computed relative to its limit √(ν/2), so that large ν gives the normal
    distribution, where differences of log Γ would lose all digits. With the upstream gradient :math:`g_k` and
    :math:`y = r^2 / (1 + r^2)`:

    .. math::
        \bar m_{ki} = g_k \frac{ν_{ki} + 1}{s_{ki} \sqrt{ν_{ki}}} \frac{r_{ki}}{1 + r_{ki}^2}, \quad
        \overline{\log s}_{ki} = g_k \big[(ν_{ki} + 1) y_{ki} - 1\big], \quad \bar x_i = -\sum_k \bar m_{ki},

        \overline{\log ν}_{ki} = ½ g_k \Big[ν_{ki} \big(ψ(\tfrac{ν_{ki} + 1}2) - ψ(\tfrac{ν_{ki}}2)\big) - 1
        + y_{ki} - ν_{ki} \big(\log(1 + r_{ki}^2) - y_{ki}\big)\Big]

    ν is clamped at e⁸⁰, where the distribution is normal. The op is
    ``fastvae.ops.student_t_log_prob(x, location, log_scale, log_df)``.

    Args:
        df: ν > 0, the degrees of freedom: a number, a tensor broadcastable to the event, or a tensor that a
            network computed; about 4 is robust to outliers, 1 is the Cauchy distribution. Default: the
            decoder returns its logarithm, too, and a scale cannot be given.
        scale: s > 0, in the same forms. Default: the decoder returns its logarithm, too.
        learned: train the scale, starting from this value, as the parameter ``log_scale``.
        learned_df: train df, starting from this value, as the parameter ``log_df``.

    Raises:
        TypeError, ValueError: if df or scale is not positive, or is an ``nn.Parameter``.
        ValueError: if scale is given without df.

    Example:
        >>> import torch, fastvae
        >>> likelihood = fastvae.likelihoods.StudentT(df=4.0, scale=0.1, learned=True)
        >>> likelihood.log_prob(torch.zeros(4, 7), torch.zeros(4, 7)).shape
        torch.Size([4, 7])
        >>> x, location = torch.zeros(2, 3), torch.zeros(2, 3)
        >>> fastvae.ops.student_t_log_prob(x, location, 0.0, 0.0)  # of Cauchy's distribution: -3 log π
        tensor([-3.4342, -3.4342])
    """

    name = "student_t"
    outputs = ("location", "log_scale", "log_df")
    family = td.StudentT
    own_parameters = {"scale": "a scale", "df": "the degrees of freedom"}

    log_df: nn.Parameter

    def parameters_of(self, d: Any) -> tuple[Tensor, ...]:
        return d.loc, log_of_positive(d.scale), log_of_positive(d.df)

    @staticmethod
    def value(x: Tensor, location: Tensor, log_scale: Tensor, log_df: Tensor) -> Tensor:
        log_df = log_df.clamp(max=80)
        r = (x - location) * torch.exp(-log_scale) * torch.exp(-0.5 * log_df)
        tail = (torch.exp(log_df) + 1) * log1p_square(r)
        return half_step(log_df - math.log(2)) - 0.5 * (math.log(2 * math.pi) + 2 * log_scale + tail)

    @staticmethod
    def gradient(
        g: Tensor, x: Tensor, location: Tensor, log_scale: Tensor, log_df: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        log_df = log_df.clamp(max=80)
        df, inverse_root = torch.exp(log_df), torch.exp(-0.5 * log_df)
        distance = x - location
        r = distance * torch.exp(-log_scale) * inverse_root
        t = r**2
        # t / (1 + t), also for infinite t.
        rest = 1 / (1 + t)
        share = torch.where(t < 1, t * rest, 1 - rest)
        grad_location = g * (df + 1) * (share / torch.where(distance == 0, 1.0, distance))
        excess = log1p_excess(share, log1p_square(r))
        grad_df = half_step_slope(log_df - math.log(2)) + 0.5 * (share - df * excess)
        return -grad_location, grad_location, g * ((df + 1) * share - 1), g * grad_df

    @staticmethod
    def draw(
        location: Tensor, log_scale: Tensor, log_df: Tensor, *, generator: torch.Generator | None
    ) -> Tensor:
        half = 0.5 * torch.exp(log_df.clamp(max=80))
        spread = torch.sqrt(half / standard_gamma(half, generator))
        return location + torch.exp(log_scale) * spread * normal_like(location, generator)

    def __init__(
        self,
        df: OwnParameter = None,
        scale: OwnParameter = None,
        *,
        learned: bool = False,
        learned_df: bool = False,
    ):
        if scale is not None and df is None:
            raise ValueError(
                "a scale needs df, the degrees of freedom, such as "
                "fastvae.likelihoods.StudentT(df=4.0, scale=0.1): a decoder that returns log_df returns "
                "(location, log_scale, log_df)"
            )
        super().__init__(scale, learned=learned)
        self._set_parameter("df", df, learned_df)

    @property
    def df(self) -> OwnParameter:
        """Degrees of freedom, learned or fixed; None if the decoder returns them."""
        return self._own_parameter("df")
