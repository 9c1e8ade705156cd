"""Distributions over z, for q(z|x) and for p(z): one file per family.

:mod:`~fastvae.distributions.draws` selects the fused op for a pair of families.
"""

from .base import Distribution, as_module, is_family
from .closed_form import closed_kl, register_kl
from .covariance import FullNormal, LowRankNormal
from .draws import (
    STANDARD,
    check_support,
    describe,
    draw_chunk,
    draw_kl,
    draw_prior,
    draw_ratio,
    draw_strata,
    draw_z,
    log_stratum_weights,
    rsample_log_prob,
)
from .encoded import AggregatePosterior, VampPrior
from .flow import Flow
from .hierarchy import HierarchicalPosterior, Hierarchy
from .level import Level
from .location_scale import Exponential, Gumbel, Laplace, Logistic, LogNormal, StudentT
from .mixture import NormalMixture
from .multivariate_t import MultivariateStudentT
from .normal import DiagonalNormal, StandardNormal, diagonal
from .read import as_posterior, as_prior, is_conditional
from .spatial import flat_prior
from .stratified import Mixture, StratifiedMixture, expanded_at_address
from .tensors import frozen, tensors_of
from .words import known_mean
from .wrapped import TorchDistribution

__all__ = [
    "STANDARD",
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
    "MultivariateStudentT",
    "NormalMixture",
    "StandardNormal",
    "StratifiedMixture",
    "StudentT",
    "TorchDistribution",
    "VampPrior",
    "as_module",
    "as_posterior",
    "as_prior",
    "check_support",
    "closed_kl",
    "describe",
    "diagonal",
    "draw_chunk",
    "draw_kl",
    "draw_prior",
    "draw_ratio",
    "draw_strata",
    "draw_z",
    "expanded_at_address",
    "flat_prior",
    "frozen",
    "is_conditional",
    "is_family",
    "known_mean",
    "log_stratum_weights",
    "register_kl",
    "rsample_log_prob",
    "tensors_of",
]
