"""What the definitions share."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor


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
