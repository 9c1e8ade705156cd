"""Draws by torch's samplers from a state that a seed determines."""

from __future__ import annotations

from torch import Tensor

from ..core.seeding import seeded
from ..core.torch_private import dirichlet_grad, sample_dirichlet, standard_gamma_grad
from ..core.torch_private import standard_gamma as draw_standard_gamma


def standard_gamma(concentration: Tensor, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
    """Draw Gamma(concentration, 1) for each element."""
    with seeded(seed, concentration.device, sample_offset, row_offset):
        return draw_standard_gamma(concentration.contiguous())


def standard_gamma_backward(concentration: Tensor, z: Tensor, grad: Tensor) -> Tensor:
    """Return the concentration's gradient, by implicit differentiation of the distribution function."""
    return grad * standard_gamma_grad(concentration.contiguous(), z)


def dirichlet(concentration: Tensor, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
    """Draw Dirichlet(concentration) for each row of the last axis."""
    with seeded(seed, concentration.device, sample_offset, row_offset):
        return sample_dirichlet(concentration.contiguous())


def dirichlet_backward(concentration: Tensor, z: Tensor, grad: Tensor) -> Tensor:
    """Return the concentration's gradient, by implicit differentiation."""
    concentration = concentration.contiguous()
    total = concentration.sum(-1, True).expand_as(concentration).contiguous()
    slope = dirichlet_grad(z, concentration, total)
    return slope * (grad - (z * grad).sum(-1, True))
