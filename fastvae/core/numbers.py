"""Numbers as tensors on a device, without a copy from the host: it waits, and no CUDA graph captures it."""

from __future__ import annotations

import torch
from torch import Tensor


def as_tensor(value: float | Tensor, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """Return a tensor, or a number as one of shape [], in this dtype on this device.

    Args:
        value: number or tensor.
        dtype: dtype of the result. Default: a tensor's own; None requires a tensor.
        device: device of the result.
    """
    if isinstance(value, Tensor):
        return value.to(device, dtype)
    return torch.full((), value, dtype=dtype, device=device)
