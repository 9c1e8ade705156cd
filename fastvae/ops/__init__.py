"""Fused ops, for code that has already run its decoder; each file's docstring gives the mathematics.

Each likelihood has its own op, ``<likelihood>_log_prob(x, *parameters)``, such as
``bernoulli_log_prob(x, logits)`` and ``gaussian_log_prob(x, mean, logvar)``.

CONTRIBUTING.md follows one objective through these ops, the kernels and back.
"""

from typing import TYPE_CHECKING, NoReturn

from . import likelihood as _likelihood
from . import reduce as _reduce
from .aggregate import aggregate_log_prob
from .all_pairs import all_pairs_log_prob
from .categorical import categorical_log_prob
from .components import discretized_logistic_mixture_log_prob
from .head import linear_log_prob
from .logsumexp import log_mean_exp
from .mixture import mixture_log_prob
from .multinomial import multinomial_log_prob
from .normal_diagonal import rsample_kl, rsample_log_ratio
from .normal_full import rsample_tril

__all__ = [
    "aggregate_log_prob",
    "all_pairs_log_prob",
    "categorical_log_prob",
    "discretized_logistic_mixture_log_prob",
    "linear_log_prob",
    "log_mean_exp",
    "mixture_log_prob",
    "multinomial_log_prob",
    "rsample_kl",
    "rsample_log_ratio",
    "rsample_tril",
]

if TYPE_CHECKING:  # the ops that declare() defines, in _declared.pyi
    from . import _declared
    from ._declared import *  # noqa: F403

    __all__ += _declared.__all__


def declare(likelihood: _likelihood.Declaration) -> None:
    """Register the ops of a likelihood, and export its ``<likelihood>_log_prob`` here."""
    name = f"{likelihood.name}_log_prob"
    globals()[name] = _likelihood.declare(likelihood)
    __all__.append(name)
    _reduce.declare(likelihood)


if not TYPE_CHECKING:  # to a type checker it would mean that every name exists

    def __getattr__(name: str) -> NoReturn:
        raise AttributeError(f"fastvae.ops has no {name!r}; it has {', '.join(__all__)}")
