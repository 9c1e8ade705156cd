"""What the definitions share."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor, overrides


@overload
def upcast(*tensors: Tensor) -> tuple[Tensor, ...]: ...
@overload
def upcast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]: ...
def upcast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """All in the dtype of the computation: float64 if any of them is, else float32; integers have no say."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    dtype = torch.float64 if wide else torch.float32
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def expm1_minus(u: Tensor) -> Tensor:
    """exp(u) - 1 - u without cancellation: by the series where |u| < 1/8 (next term < 1e-17)."""
    series = torch.zeros_like(u)
    for n in range(10, 1, -1):
        series = 1 / math.factorial(n) + series * u
    # Bounded above, so that an infinite variance has an infinite KL: inf - inf would be NaN.
    return torch.where(u.abs() < 0.125, u * u * series, torch.expm1(u) - u.clamp(max=710))


def log1p_rest(t: Tensor) -> Tensor:
    """t - log(1 + t) for t > -1 without cancellation: where |t| < 0.3 by the series of log(1 + t) = 2
    artanh(r), r = t / (2 + t) (next term < 1e-18).
    """
    if overrides.has_torch_function_unary(t):
        return overrides.handle_torch_function(log1p_rest, (t,), t)  # type: ignore[no-any-return]
    r = t / (2 + t)
    series = torch.zeros_like(t)
    for n in range(21, 1, -2):
        series = 1 / n + r * r * series
    return torch.where(t.abs() < 0.3, r * (t - 2 * r * r * series), t - torch.log1p(t))


def stirling_error(x: Tensor) -> Tensor:
    """log x! - (x + 1/2) log x + x - log(2 pi) / 2 for x > 0."""
    if overrides.has_torch_function_unary(x):
        return overrides.handle_torch_function(stirling_error, (x,), x)  # type: ignore[no-any-return]
    wide = x.double()
    u = 1 / (wide * wide)
    series = (
        1 / 12 - u * (1 / 360 - u * (1 / 1260 - u * (1 / 1680 - u * (1 / 1188 - u * 691 / 360360))))
    ) / wide
    exact = torch.lgamma(wide + 1) - (wide + 0.5) * wide.log() + wide - 0.5 * math.log(2 * math.pi)
    return torch.where(wide < 16, exact, series).to(x.dtype)


def digamma_excess(x: Tensor) -> Tensor:
    """x (log x - digamma(x)) - 1/2 for x > 0."""
    if overrides.has_torch_function_unary(x):
        return overrides.handle_torch_function(digamma_excess, (x,), x)  # type: ignore[no-any-return]
    wide = x.double()
    u = 1 / (wide * wide)
    series = (1 / 12 - u * (1 / 120 - u * (1 / 252 - u * (1 / 240 - u * (1 / 132 - u * 691 / 32760))))) / wide
    exact = wide * (wide.log() - torch.digamma(wide)) - 0.5
    return torch.where(wide < 16, exact, series).to(x.dtype)
