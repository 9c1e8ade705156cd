"""Likelihoods p(x|z), one file each."""

from .base import Likelihood
from .bernoulli import Bernoulli
from .beta import Beta
from .categorical import Categorical
from .columns import Columns
from .continuous_bernoulli import ContinuousBernoulli
from .discretized_logistic import DiscretizedLogistic
from .discretized_logistic_mixture import DiscretizedLogisticMixture
from .gaussian import Gaussian
from .joint import Joint
from .laplace import Laplace
from .log_normal import LogNormal
from .logistic import Logistic
from .multinomial import Multinomial
from .negative_binomial import NegativeBinomial
from .optimal_gaussian import OptimalGaussian
from .own import from_distribution
from .poisson import Poisson
from .softplus_gaussian import SoftplusGaussian
from .student_t import StudentT
from .zero_inflated_negative_binomial import ZeroInflatedNegativeBinomial

__all__ = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "Columns",
    "ContinuousBernoulli",
    "DiscretizedLogistic",
    "DiscretizedLogisticMixture",
    "Gaussian",
    "Joint",
    "Laplace",
    "Likelihood",
    "LogNormal",
    "Logistic",
    "Multinomial",
    "NegativeBinomial",
    "OptimalGaussian",
    "Poisson",
    "SoftplusGaussian",
    "StudentT",
    "ZeroInflatedNegativeBinomial",
    "from_distribution",
]
