"""The fused ops, for code that has already run its decoder. Each file's docstring is its mathematics."""

from .bernoulli import bernoulli_log_prob
from .gaussian import gaussian_log_prob
from .importance import log_mean_exp
from .latent import rsample_kl, rsample_log_ratio

__all__ = ["bernoulli_log_prob", "gaussian_log_prob", "log_mean_exp", "rsample_kl", "rsample_log_ratio"]
