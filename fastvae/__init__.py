"""fastvae: the objectives of variational autoencoders on fused kernels. See README.md."""

from . import likelihoods, ops, random, schedules, weights
from ._backend import use_backend
from .distributions import DiagonalNormal, Distribution, StandardNormal, TorchDistribution, register_kl
from .evaluate import Evaluation, evaluate
from .graphs import graphed
from .head import FusedHead, LinearOutput, fuse_head
from .likelihoods import (
    Bernoulli,
    Beta,
    Categorical,
    ContinuousBernoulli,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Gaussian,
    Joint,
    Laplace,
    Likelihood,
    Logistic,
    LogNormal,
    Multinomial,
    NegativeBinomial,
    OptimalGaussian,
    Poisson,
    SoftplusGaussian,
    StudentT,
    ZeroInflatedNegativeBinomial,
)
from .objectives import (
    LogMarginal,
    LogWeights,
    Terms,
    elbo,
    iwae,
    log_marginal,
    log_weights,
    reconstruction_log_prob,
)
from .quantize import Quantized, VectorQuantizer
from .vae import VAE

__version__ = "0.1.0"
__all__ = [
    "VAE",
    "Bernoulli",
    "Beta",
    "Categorical",
    "ContinuousBernoulli",
    "DiagonalNormal",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Distribution",
    "Evaluation",
    "FusedHead",
    "Gaussian",
    "Joint",
    "Laplace",
    "Likelihood",
    "LinearOutput",
    "LogMarginal",
    "LogNormal",
    "LogWeights",
    "Logistic",
    "Multinomial",
    "NegativeBinomial",
    "OptimalGaussian",
    "Poisson",
    "Quantized",
    "SoftplusGaussian",
    "StandardNormal",
    "StudentT",
    "Terms",
    "TorchDistribution",
    "VectorQuantizer",
    "ZeroInflatedNegativeBinomial",
    "elbo",
    "evaluate",
    "fuse_head",
    "graphed",
    "iwae",
    "likelihoods",
    "log_marginal",
    "log_weights",
    "ops",
    "random",
    "reconstruction_log_prob",
    "register_kl",
    "schedules",
    "use_backend",
    "weights",
]
