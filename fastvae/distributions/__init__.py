"""Distributions over z, as q(z|x) and as p(z): one file per family. :mod:`~fastvae.distributions.draws` finds
what is fused."""

from .base import Distribution, closed_kl, register_kl
from .draws import STANDARD, draw_chunk, draw_kl, draw_ratio, rsample
from .hierarchy import HierarchicalPosterior, Hierarchy, Level
from .normal import DiagonalNormal, StandardNormal, diagonal
from .read import as_posterior, as_prior, is_conditional
from .wrapped import TorchDistribution

__all__ = [
    "STANDARD",
    "DiagonalNormal",
    "Distribution",
    "HierarchicalPosterior",
    "Hierarchy",
    "Level",
    "StandardNormal",
    "TorchDistribution",
    "as_posterior",
    "as_prior",
    "closed_kl",
    "diagonal",
    "draw_chunk",
    "draw_kl",
    "draw_ratio",
    "is_conditional",
    "register_kl",
    "rsample",
]
