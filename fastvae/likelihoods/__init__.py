"""Likelihoods p(x|z), a file each."""

from .base import Likelihood
from .bernoulli import Bernoulli
from .gaussian import Gaussian
from .poisson import Poisson

__all__ = ["Bernoulli", "Gaussian", "Likelihood", "Poisson"]
