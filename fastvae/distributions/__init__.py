"""Distributions over z, for q(z|x) and for p(z): one file per family.

:mod:`~fastvae.distributions.draws` selects the fused op for a pair of families.
"""

from .base import Distribution
from .closed_form import register_kl
from .covariance import FullNormal, LowRankNormal
from .draws import rsample_log_prob
from .encoded import AggregatePosterior, VampPrior
from .flow import Flow
from .hierarchy import HierarchicalPosterior, Hierarchy
from .level import Level
from .location_scale import Exponential, Gumbel, Laplace, Logistic, LogNormal, StudentT
from .mixture import NormalMixture
from .normal import DiagonalNormal, StandardNormal
from .read import as_posterior, as_prior
from .stratified import Mixture
from .wrapped import TorchDistribution

__all__ = [
    "AggregatePosterior",
    "DiagonalNormal",
    "Distribution",
    "Exponential",
    "Flow",
    "FullNormal",
    "Gumbel",
    "HierarchicalPosterior",
    "Hierarchy",
    "Laplace",
    "Level",
    "LogNormal",
    "Logistic",
    "LowRankNormal",
    "Mixture",
    "NormalMixture",
    "StandardNormal",
    "StudentT",
    "TorchDistribution",
    "VampPrior",
    "as_posterior",
    "as_prior",
    "register_kl",
    "rsample_log_prob",
]
