"""Digits as data of any likelihood, for ``demo --likelihood``, and the matching decoder outputs.

A pixel of scikit-learn's digits counts the ink in a block of 4×4 dots, 0 to 16. It can be read as a count, a
class, one of 17 levels, a fraction, and with dequantisation noise a real number.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastvae
from fastvae.likelihoods import (
    Bernoulli,
    Categorical,
    DiscretizedLogistic,
    DiscretizedLogisticMixture,
    Multinomial,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
)

from ..likelihoods.base import Likelihood

LEVELS, SIDE, COMPONENTS = 17, 8, 3


class Kind(NamedTuple):
    """Representation of the digits for a likelihood.

    Attributes:
        data: function of counts 0 to 16 and a generator that returns x.
        seen: function of x that returns the encoder's input, about [0, 1].
        shapes: shapes of the decoder's outputs.
        likelihood: constructor of the likelihood.
        start: initial bias of each output.
        says: description of x.
    """

    data: Callable[[Tensor, torch.Generator], Tensor]
    seen: Callable[[Tensor], Tensor]
    shapes: tuple[tuple[int, ...], ...]
    likelihood: Callable[[], Likelihood]
    start: tuple[float, ...]
    says: str


PIXELS = (SIDE * SIDE,)
_MIXED = (COMPONENTS, SIDE * SIDE)


def _noisy(v: Tensor, generator: torch.Generator) -> Tensor:
    """Dequantise levels with uniform noise, to (0, 1)."""
    u = torch.rand(v.shape, generator=generator, device=v.device)
    return ((v + u) / LEVELS).clamp(1e-4, 1 - 1e-4)


def _counts(v: Tensor, _: torch.Generator) -> Tensor:
    return v


def _shares(v: Tensor, _: torch.Generator) -> Tensor:
    return v / (LEVELS - 1)


def _binary(v: Tensor, generator: torch.Generator) -> Tensor:
    return torch.bernoulli(v / (LEVELS - 1), generator=generator)


def _as_it_is(x: Tensor) -> Tensor:
    return x


def _from_counts(x: Tensor) -> Tensor:
    return x / (LEVELS - 1)


def _kind(name: str) -> Kind:
    """Return the representation of the digits for a likelihood's name."""
    continuous = (_noisy, _as_it_is)
    counts = (_counts, _from_counts)
    share = "pixels as numbers in (0, 1), with the noise of their rounding"
    ink = "ink of each pixel, a count from 0 to 16"
    kinds: dict[str, Kind] = {
        "bernoulli": Kind(_binary, _as_it_is, (PIXELS,), Bernoulli, (0.0,), "binarised pixels"),
        "poisson": Kind(*counts, (PIXELS,), Poisson, (1.0,), ink),
        "negative_binomial": Kind(*counts, (PIXELS,) * 2, NegativeBinomial, (1.0, 0.0), ink),
        "zero_inflated_negative_binomial": Kind(
            *counts, (PIXELS,) * 3, ZeroInflatedNegativeBinomial, (1.0, 0.0, -1.0), ink
        ),
        "categorical": Kind(
            *counts, ((LEVELS, *PIXELS),), Categorical, (0.0,), "the level of each pixel, a class"
        ),
        "multinomial": Kind(
            *counts, (PIXELS,), Multinomial, (0.0,), "where the ink of an image is, dot by dot"
        ),
        "discretized_logistic_mixture": Kind(
            _shares, _as_it_is, (_MIXED,) * 3,
            lambda: DiscretizedLogisticMixture(levels=LEVELS), (0.0, 0.0, -1.0),
            "the level of each pixel, on a grid of 17",
        ),
    }  # fmt: skip
    if name in kinds:
        return kinds[name]
    declared = fastvae.likelihoods.declared.DECLARED[name]
    outputs = len(declared.outputs)
    if name == "discretized_logistic":
        likelihood: Callable[[], Likelihood] = lambda: DiscretizedLogistic(levels=LEVELS)  # noqa: E731
        return Kind(_shares, _as_it_is, (PIXELS,) * 2, likelihood, (0.0, -1.0), kinds[_MIXTURE].says)
    if name == "continuous_bernoulli":
        return Kind(_shares, _as_it_is, (PIXELS,), declared, (0.0,), "pixels as shares of ink, 0 to 1")
    if name == "student_t":
        return Kind(*continuous, (PIXELS,) * 3, declared, (0.0, -1.5, 1.5), share)
    start = (0.0, -1.5, 0.0)[:outputs] if name != "beta" else (0.0, 0.0)
    return Kind(*continuous, (PIXELS,) * outputs, declared, start, share)


_MIXTURE = "discretized_logistic_mixture"


def kind_of(name: str) -> Kind:
    """Return the representation of the digits for a likelihood, by name.

    Raises:
        ValueError: for a likelihood that the demo does not support.
    """
    if name not in fastvae.likelihoods.base.NAMED or name not in NAMES:
        raise ValueError(f"--likelihood {name} is unknown; known: {', '.join(NAMES)}")
    return _kind(name)


NAMES = tuple(n for n in sorted(fastvae.likelihoods.base.NAMED) if n != "softplus_gaussian")


class Outputs(nn.Module):
    """Last layers of a decoder: hidden layer [N, hidden] -> outputs, each [N, *shape]."""

    def __init__(self, hidden: int, kind: Kind):
        super().__init__()
        self.shapes = kind.shapes
        layers = [nn.Linear(hidden, _size(s)) for s in kind.shapes]
        self.layers = nn.ModuleList(layers)
        with torch.no_grad():
            for layer, start in zip(layers, kind.start, strict=True):
                layer.bias.add_(start)
            if kind.shapes[0] == _MIXED:
                # Separate the components initially.
                layers[1].bias.add_(torch.linspace(-1, 1, COMPONENTS).repeat_interleave(SIDE * SIDE))

    def forward(self, h: Tensor) -> Any:
        outputs = tuple(layer(h).reshape(-1, *s) for layer, s in zip(self.layers, self.shapes, strict=True))
        return outputs if len(outputs) > 1 else outputs[0]


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
