"""Draws by torch's samplers from a state that a seed determines."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.seeding import seeded


def standard_gamma(concentration: Tensor, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
    """Draw Gamma(concentration, 1) for each element."""
    with seeded(seed, concentration.device, sample_offset, row_offset):
        return torch._standard_gamma(concentration.contiguous())


def standard_gamma_backward(concentration: Tensor, z: Tensor, grad: Tensor) -> Tensor:
    """Return the concentration's gradient, by implicit differentiation of the distribution function."""
    return grad * torch._standard_gamma_grad(concentration.contiguous(), z)


def dirichlet(concentration: Tensor, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
    """Draw Dirichlet(concentration) for each row of the last axis."""
    with seeded(seed, concentration.device, sample_offset, row_offset):
        return torch._sample_dirichlet(concentration.contiguous())


def dirichlet_backward(concentration: Tensor, z: Tensor, grad: Tensor) -> Tensor:
    """Return the concentration's gradient, by implicit differentiation."""
    concentration = concentration.contiguous()
    total = concentration.sum(-1, True).expand_as(concentration).contiguous()
    slope = torch._dirichlet_grad(z, concentration, total)
    return slope * (grad - (z * grad).sum(-1, True))
