"""The Gaussian likelihood."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_same_device, check_tensor, shape_of
from .base import Declared, describe


class Gaussian(Declared):
    r"""p(x|z) = N(mean, s²), for decoders that return ``(mean, logvar)``, or ``mean`` alone when ``scale`` is
    given.

    .. math::
        \log p(x|z_k) = -½ \sum_i \big[\log 2π + \log s_{ki}^2 + (x_i - m_{ki})^2 / s_{ki}^2\big]

    With :math:`g_k` what arrives, and :math:`r = (x - m) / s^2`:

    .. math::
        \bar m_{ki} = g_k r_{ki}, \quad \overline{\log s^2}_{ki} = ½ g_k \big[(x_i - m_{ki}) r_{ki} - 1\big],
        \quad \bar x_i = -\sum_k \bar m_{ki}

    The op by itself is ``fastvae.ops.gaussian_log_prob(x, mean, logvar)``.

    Args:
        scale: standard deviation s > 0: a number, a tensor broadcastable to the event, or a tensor that a
            network computed. Default: the decoder returns the log variance, too.
        learned: train the scale, beginning at this one. It is kept as the parameter ``log_scale``, so that no
            step of an optimiser can make it 0 or negative; ``scale`` reads it.

    Raises:
        TypeError, ValueError: if scale is not positive, or is an ``nn.Parameter``.

    Example:
        >>> import torch, fastvae
        >>> likelihood = fastvae.Gaussian(scale=0.1, learned=True)
        >>> likelihood.log_prob(torch.zeros(4, 7), torch.zeros(3 * 4, 7), samples=3).shape
        torch.Size([3, 4])
        >>> [name for name, _ in likelihood.named_parameters()]
        ['log_scale']
        >>> x, mean = torch.zeros(4, 3, 8, 8), torch.zeros(50, 4, 3, 8, 8)
        >>> fastvae.ops.gaussian_log_prob(x, mean, 0.0).shape
        torch.Size([50, 4])
    """

    name = "gaussian"
    outputs = ("mean", "logvar")
    oracle = staticmethod(lambda mean, logvar: torch.distributions.Normal(mean, torch.exp(0.5 * logvar)))

    @staticmethod
    def value(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        # exp(-logvar) itself overflows long before what it is a factor of does, here and below.
        whitened = (x - mean) * torch.exp(-0.5 * logvar)
        return -0.5 * (math.log(2 * math.pi) + logvar + whitened**2)

    @staticmethod
    def gradient(g: Tensor, x: Tensor, mean: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inverse_s = torch.exp(-0.5 * logvar)
        whitened = (x - mean) * inverse_s
        push = g * whitened
        grad_mean = push * inverse_s
        return -grad_mean, grad_mean, 0.5 * (push * whitened - g)

    # Which of the two there is, ``learned`` says.
    log_scale: nn.Parameter
    fixed_scale: float | Tensor | None

    def __init__(self, scale: float | Tensor | None = None, *, learned: bool = False):
        super().__init__()
        if isinstance(scale, nn.Parameter) or (learned and isinstance(scale, Tensor) and scale.requires_grad):
            raise TypeError(
                "scale must be a value to begin training at, not a parameter, which a step of an optimiser "
                "can make negative; use fastvae.Gaussian(scale=0.1, learned=True), which trains log_scale, "
                "the logarithm"
            )
        if learned and scale is None:
            raise ValueError(
                "learned=True needs a scale to begin at, such as fastvae.Gaussian(scale=0.1, learned=True)"
            )
        if scale is not None and not isinstance(scale, Tensor):
            if isinstance(scale, bool) or not isinstance(scale, (int, float)):
                raise TypeError(f"scale must be a number or a tensor, got {type(scale).__name__}")
            if not (scale > 0 and math.isfinite(scale)):
                raise ValueError(
                    f"scale is a standard deviation and must be positive and finite, got {scale}"
                )
            scale = float(scale)
        if isinstance(scale, Tensor):
            check_tensor("scale", scale)
            values = scale.detach()
            if scale.device.type == "cpu" and not bool(((values > 0) & values.isfinite()).all()):
                raise ValueError("scale is a standard deviation and must be positive and finite everywhere")
        self.learned = learned
        if learned:
            scale = scale if isinstance(scale, Tensor) else torch.tensor(scale)
            self.log_scale = nn.Parameter(scale.log())
        elif isinstance(scale, Tensor) and not scale.requires_grad:
            self.register_buffer("fixed_scale", scale)
        else:
            # A number, or computed by a network: no state of ours, and it must stay in its graph.
            self.__dict__["fixed_scale"] = scale

    @property
    def scale(self) -> float | Tensor | None:
        """The standard deviation, learned or not."""
        return self.log_scale.exp() if self.learned else self.fixed_scale

    def _log_scale(self) -> float | Tensor:
        if self.learned:
            return self.log_scale
        scale = self.fixed_scale
        return scale.log() if isinstance(scale, Tensor) else math.log(scale)  # type: ignore[arg-type]

    def _returns_logvar(self) -> bool:
        return not self.learned and self.fixed_scale is None

    def _given(self, x: Tensor) -> tuple[float | Tensor, ...]:
        if not self.learned and self.fixed_scale is None:  # _returns_logvar, without a call
            return ()
        log_scale = self._log_scale()
        _check_scale(log_scale, x)
        return (2 * log_scale,)

    def _wrong_output(self, came: Any) -> TypeError:
        if self._returns_logvar():
            hint = "; for a mean alone, give the standard deviation: likelihood=fastvae.Gaussian(scale=0.1)"
            return TypeError(
                "the decoder of a gaussian likelihood must return (mean, logvar), got "
                f"{describe(came)}{hint if isinstance(came, Tensor) else ''}"
            )
        return TypeError(
            "the decoder of Gaussian(scale=...) must return the mean alone, a tensor; got "
            f"{describe(came)}. For a decoder that returns (mean, logvar) use likelihood='gaussian', without "
            "a scale"
        )

    def mean(self, parameters: Any) -> Tensor:
        return parameters if isinstance(parameters, Tensor) else parameters[0]


def _check_scale(scale: float | Tensor, x: Tensor) -> None:
    if not isinstance(scale, Tensor):
        return
    check_same_device("the scale", scale, "x", x)
    missing = x.dim() - scale.dim()
    if missing < 0 or any(n not in (1, m) for n, m in zip(scale.shape, x.shape[missing:], strict=True)):
        raise ValueError(
            f"scale has shape {shape_of(scale)}, which does not broadcast to an x of shape {shape_of(x)}; "
            f"expected one number, or one for each element of the event, {list(x.shape[1:])}"
        )
