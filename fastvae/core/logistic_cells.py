"""Log-probability of a discretised logistic variable's cells, and locations coupled over colours."""

from __future__ import annotations

import torch
from torch import Tensor


def cell_log_prob(x: Tensor, location: Tensor, log_scale: Tensor, half: float) -> Tensor:
    """Return the log probability of a logistic variable's bin around x in [-1, 1]; the end bins are open."""
    inverse = torch.exp(-log_scale.clamp(-60, 60))
    upper, lower = (x - location + half) * inverse, (x - location - half) * inverse
    first, last = x < half - 1, x > 1 - half
    inner = torch.log(-torch.expm1(-2 * half * inverse))
    below, above = torch.nn.functional.logsigmoid(-lower), torch.nn.functional.logsigmoid(upper)
    return torch.where(first, above, torch.where(last, below, above + below + inner))


def cell_slopes(x: Tensor, location: Tensor, log_scale: Tensor, half: float) -> tuple[Tensor, Tensor]:
    """Return the derivatives of :func:`cell_log_prob` by location and by log scale."""
    inverse = torch.exp(-log_scale.clamp(-60, 60))
    upper, lower = (x - location + half) * inverse, (x - location - half) * inverse
    width = (2 * half * inverse).clamp(max=80)
    first, last = x < half - 1, x > 1 - half
    below, above = (
        torch.where(first, 0.0, torch.sigmoid(lower)),
        torch.where(last, 0.0, torch.sigmoid(-upper)),
    )
    share = torch.where(first | last, 0.0, width / torch.expm1(width))
    return (below - above) * inverse, lower * below - upper * above - share


def coupled(x: Tensor, location: Tensor, coefficients: Tensor) -> Tensor:
    """Return locations [N, C, 3, P], green's shifted by red, blue's by red and green."""
    t, (red, green) = torch.tanh(coefficients), (x[:, :, 0], x[:, :, 1])
    first, second, third = location.unbind(2)
    return torch.stack([first, second + t[:, :, 0] * red, third + t[:, :, 1] * red + t[:, :, 2] * green], 2)
