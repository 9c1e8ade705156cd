"""Audits of log p(x): annealed importance sampling, bounds from both sides, and a lattice for few latents."""

from .annealed import AnnealedMarginal, MarginalBounds, ais, bdmc
from .lattices import LatticeMarginal, lattice

__all__ = ["AnnealedMarginal", "LatticeMarginal", "MarginalBounds", "ais", "bdmc", "lattice"]
