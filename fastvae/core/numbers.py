"""Numbers as tensors on a device, without a copy from the host: it waits, and no CUDA graph captures it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def as_tensor(value: Any, dtype: torch.dtype | None, device: torch.device) -> Tensor:
    """Return ``torch.as_tensor(value, dtype=dtype, device=device)``, for a number without the copy."""
    if isinstance(value, (int, float)):
        return torch.full((), value, dtype=dtype, device=device)
    return torch.as_tensor(value, dtype=dtype, device=device)
