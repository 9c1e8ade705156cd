"""Audits of log p(x) by annealed importance sampling and by a lattice."""
