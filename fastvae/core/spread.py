"""Standard deviation of a Gaussian from its raw parameter: log variance, softplus, log scale or scale."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .special import softplus

# Below it softplus(raw) equals exp(raw) to the last digit, and may underflow.
TAIL = -40.0


class Spread(NamedTuple):
    """Quantities derived from a raw logvar argument: log σ², σ, 1/σ, and d log σ² / d raw."""

    logvar: Tensor
    sigma: Tensor
    inverse_sigma: Tensor
    chain: Tensor


def spread(raw: Tensor, draw: Any) -> Spread:
    """Compute the spread of a raw number in the computation's dtype; ``draw.scale`` is its meaning."""
    if draw.scale == "logvar":
        logvar = raw.clamp(draw.logvar_min, draw.logvar_max)
        # NaN counts as inside, so that it propagates.
        inside = ((raw >= draw.logvar_min) & (raw <= draw.logvar_max)) | raw.isnan()
        return Spread(logvar, torch.exp(0.5 * logvar), torch.exp(-0.5 * logvar), inside.to(raw.dtype))
    if draw.scale == "log_scale":
        return Spread(2 * raw, torch.exp(raw), torch.exp(-raw), torch.full_like(raw, 2.0))
    if draw.scale == "scale":
        return Spread(2 * raw.log(), raw, 1 / raw, 2 / raw)
    variance, slope = softplus(raw)
    variance = variance + draw.floor
    logvar, sigma, chain = variance.log(), variance.sqrt(), slope / variance
    if draw.floor == 0:
        tail = raw < TAIL
        logvar = torch.where(tail, raw, logvar)
        sigma = torch.where(tail, torch.exp(0.5 * raw), sigma)
        chain = torch.where(tail, 1.0, chain)
    return Spread(logvar, sigma, 1 / sigma, chain)


def log_variance(raw: Tensor, draw: Any) -> Tensor:
    """Return log σ² alone, by plain functions that autograd differentiates."""
    if draw.scale == "logvar":
        unbounded = draw.logvar_min == -math.inf and draw.logvar_max == math.inf
        return raw if unbounded else raw.clamp(draw.logvar_min, draw.logvar_max)
    if draw.scale == "log_scale":
        return 2 * raw
    if draw.scale == "scale":
        return 2 * torch.log(raw)
    # Softplus as -logsigmoid(-raw), which has the right slope at 0, too.
    if draw.floor > 0:
        return torch.log(draw.floor - logsigmoid(-raw))
    # In the tail the other branch gets a dummy input: its slope there would be 0 / 0.
    tail = raw < TAIL
    logvar: Tensor = torch.where(tail, raw, (-logsigmoid(-torch.where(tail, 0.0, raw))).log())
    return logvar
