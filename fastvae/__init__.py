"""Objectives of variational autoencoders on fused kernels; README.md and docs/ describe them."""

from typing import TYPE_CHECKING, NoReturn

from . import diagnostics, distributions, likelihoods, ops, quantize, random
from .core.backend import use_backend
from .estimation import audit, proposals
from .estimation.evaluation import Evaluation, evaluate
from .estimation.log_marginal import log_marginal, reconstruction_log_prob
from .estimation.weights import LogMarginal
from .inputs.last_layer import FusedHead
from .objectives import bounds, schedules
from .objectives.beta_tc import beta_tc
from .objectives.elbo import elbo
from .objectives.graphs import graphed
from .objectives.iwae import bound, iwae
from .objectives.log_weights import log_weights
from .objectives.marginalize import marginalize
from .objectives.options import Terms
from .objectives.wake_sleep import sleep
from .vae import VAE

__version__ = "0.1.0"
__all__ = [
    "VAE",
    "Evaluation",
    "FusedHead",
    "LogMarginal",
    "Terms",
    "audit",
    "beta_tc",
    "bound",
    "bounds",
    "diagnostics",
    "distributions",
    "elbo",
    "evaluate",
    "graphed",
    "iwae",
    "likelihoods",
    "log_marginal",
    "log_weights",
    "marginalize",
    "ops",
    "proposals",
    "quantize",
    "random",
    "reconstruction_log_prob",
    "schedules",
    "sleep",
    "use_backend",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


if not TYPE_CHECKING:  # to a type checker it would mean that every name exists

    def __getattr__(name: str) -> NoReturn:
        places = [m.__name__ for m in (likelihoods, distributions, audit, quantize) if name in m.__all__]
        hint = "; use " + " or ".join(f"fastvae.{place.rpartition('.')[2]}.{name}" for place in places)
        raise AttributeError(f"module 'fastvae' has no attribute {name!r}{hint if places else ''}")
