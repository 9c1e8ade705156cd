"""Plain Python values, which JSON can represent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor


def json_value(value: Any) -> Any:
    """Return numbers, lists and dicts of Python: NaN as None, ±∞ as ``"Infinity"`` and ``"-Infinity"``."""
    if isinstance(value, Mapping):
        return {name: json_value(v) for name, v in value.items()}
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [json_value(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        if math.isnan(value):
            return None
        return "Infinity" if value > 0 else "-Infinity"
    return value
