"""Reading of the argument ``likelihood=``: a name or an object."""

from __future__ import annotations

from typing import Any

from ..core.hints import LOSSES, did_you_mean, word_of
from .base import NAMED, Likelihood
from .declared import SHARED

# What the losses of core/hints.py are, by their likelihoods.
_LOSSES = {
    "gaussian": (
        "A squared error is a Gaussian likelihood of fixed scale: half the sum is "
        "fastvae.likelihoods.Gaussian(scale=1.0), the sum Gaussian(scale=0.5**0.5), and a mean of P numbers "
        "the latter with beta=w * P for a KL of weight w; the class's docstring has the formulas"
    ),
    "bernoulli": (
        "A sum of binary cross-entropies is minus its log-likelihood, of logits, or of probabilities with "
        "fastvae.likelihoods.Bernoulli(probs=True)"
    ),
    "categorical": "A sum of cross-entropies is minus its log-likelihood, of logits [N, C, *event]",
    "laplace": (
        "A sum of absolute errors is minus the log-likelihood of fastvae.likelihoods.Laplace(scale=1.0), but "
        "for log 2 an element"
    ),
}


def _loss(name: str) -> str:
    """Explain which likelihood a loss of this name is, or return ""."""
    likelihood = LOSSES.get(word_of(name))
    return "" if likelihood is None else f" {_LOSSES[likelihood]}"


def _hint(likelihood: Any) -> str:
    """Explain the mistake if a distribution over z was passed in place of a likelihood."""
    kind = likelihood if isinstance(likelihood, type) else type(likelihood)
    if not kind.__module__.startswith("fastvae.distributions."):
        return ""
    named = [c.__name__ for c in map(type, SHARED.values()) if c.__name__ == kind.__name__]
    also = f"; the likelihood of this name is fastvae.likelihoods.{named[0]}" if named else ""
    return f", fastvae.distributions.{kind.__name__}: a distribution over z{also}"


def as_likelihood(likelihood: Any, shared: bool = False) -> Likelihood:
    """Return the likelihood for a name, or the given likelihood object itself.

    Args:
        likelihood: a name or a :class:`Likelihood`.
        shared: return the shared instance of a name instead of a new module.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if shared and type(likelihood) is str and likelihood in SHARED:
        return SHARED[likelihood]
    known = ", ".join(map(repr, sorted(NAMED)))
    if not isinstance(likelihood, str):
        raise TypeError(
            f"likelihood must be a name ({known}) or an object such as "
            "fastvae.likelihoods.Gaussian(scale=0.1); got "
            f"{likelihood!r}{_hint(likelihood)}"
        )
    if likelihood not in NAMED:
        raise ValueError(
            f"likelihood={likelihood!r} is unknown; known: {known}{did_you_mean(likelihood, NAMED)}"
            f"{_loss(likelihood)}"
        )
    return NAMED[likelihood]()
