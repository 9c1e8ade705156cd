"""fastvae: the objectives of variational autoencoders on fused kernels. See README.md."""

from . import ops, random, weights
from ._backend import use_backend
from .evaluate import Evaluation, evaluate
from .likelihoods import Bernoulli, Gaussian, Likelihood, Poisson
from .objectives import LogMarginal, Terms, elbo, iwae, log_marginal, reconstruction_log_prob
from .posteriors import DiagonalGaussian, Posterior
from .priors import DiagonalNormal, Prior, StandardNormal
from .vae import VAE

__version__ = "0.1.0"
__all__ = [
    "VAE",
    "Bernoulli",
    "DiagonalGaussian",
    "DiagonalNormal",
    "Evaluation",
    "Gaussian",
    "Likelihood",
    "LogMarginal",
    "Poisson",
    "Posterior",
    "Prior",
    "StandardNormal",
    "Terms",
    "elbo",
    "evaluate",
    "iwae",
    "log_marginal",
    "ops",
    "random",
    "reconstruction_log_prob",
    "use_backend",
    "weights",
]
