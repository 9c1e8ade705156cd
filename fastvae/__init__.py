"""Objectives of variational autoencoders on fused kernels; see README.md."""

from . import diagnostics, likelihoods, ops, random
from .core.backend import use_backend
from .distributions import (
    AggregatePosterior,
    DiagonalNormal,
    Distribution,
    Exponential,
    Flow,
    FullNormal,
    Gumbel,
    HierarchicalPosterior,
    Hierarchy,
    Laplace,
    Level,
    Logistic,
    LogNormal,
    LowRankNormal,
    Mixture,
    NormalMixture,
    StandardNormal,
    StudentT,
    TorchDistribution,
    VampPrior,
    register_kl,
)
from .estimation import proposals, weights
from .estimation.audit.annealed import AnnealedMarginal, MarginalBounds, ais, bdmc
from .estimation.audit.lattice import LatticeMarginal, lattice_log_marginal
from .estimation.evaluation import Audit, Evaluation, evaluate
from .estimation.log_marginal import log_marginal, reconstruction_log_prob
from .estimation.weights import LogMarginal
from .inputs.last_layer import FusedHead
from .likelihoods import (
    Bernoulli,
    Beta,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Gaussian,
    Joint,
    Likelihood,
    Multinomial,
    NegativeBinomial,
    OptimalGaussian,
    Poisson,
    SoftplusGaussian,
    ZeroInflatedNegativeBinomial,
)
from .objectives import bounds, schedules
from .objectives.beta_tc import BetaTCTerms, beta_tc
from .objectives.elbo import elbo
from .objectives.graphs import graphed
from .objectives.iwae import LogWeights, bound, iwae, log_weights
from .objectives.marginalize import Marginal, marginalize
from .objectives.options import Terms
from .objectives.wake_sleep import sleep
from .quantize import Quantized, VectorQuantizer
from .vae import VAE

__version__ = "0.1.0"
__all__ = [
    "VAE",
    "AggregatePosterior",
    "AnnealedMarginal",
    "Audit",
    "Bernoulli",
    "Beta",
    "BetaTCTerms",
    "Categorical",
    "ContinuousBernoulli",
    "DiagonalNormal",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Distribution",
    "Evaluation",
    "Exponential",
    "Flow",
    "FullNormal",
    "FusedHead",
    "Gaussian",
    "Gumbel",
    "HierarchicalPosterior",
    "Hierarchy",
    "Joint",
    "Laplace",
    "LatticeMarginal",
    "Level",
    "Likelihood",
    "LogMarginal",
    "LogNormal",
    "LogWeights",
    "Logistic",
    "LowRankNormal",
    "Marginal",
    "MarginalBounds",
    "Mixture",
    "Multinomial",
    "NegativeBinomial",
    "NormalMixture",
    "OptimalGaussian",
    "Poisson",
    "Quantized",
    "SoftplusGaussian",
    "StandardNormal",
    "StudentT",
    "Terms",
    "TorchDistribution",
    "VampPrior",
    "VectorQuantizer",
    "ZeroInflatedNegativeBinomial",
    "ais",
    "bdmc",
    "beta_tc",
    "bound",
    "bounds",
    "diagnostics",
    "elbo",
    "evaluate",
    "graphed",
    "iwae",
    "lattice_log_marginal",
    "likelihoods",
    "log_marginal",
    "log_weights",
    "marginalize",
    "ops",
    "proposals",
    "random",
    "reconstruction_log_prob",
    "register_kl",
    "schedules",
    "sleep",
    "use_backend",
    "weights",
]
