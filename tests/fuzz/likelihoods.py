"""Likelihoods: the library's argument, data, and elementwise log densities in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributions as td
from torch.nn import functional as F

import fastvae
from fastvae.likelihoods import (
    Bernoulli,
    Categorical,
    Columns,
    Gaussian,
    Joint,
    Likelihood,
    NegativeBinomial,
    Poisson,
)
from fastvae.likelihoods.declared import DECLARED

from ..oracles import ORACLES

EVENTS = ((7,), (3,), (1,), (2, 3), (2, 2, 3), (65,))
CLASSES, COMPONENTS = 4, 3


class Kind(NamedTuple):
    """Likelihood.

    Attributes:
        give: returns a fresh argument ``likelihood=`` for an event.
        data: x in float64, from standard uniforms.
        outputs: shapes of a decoder's outputs for an event.
        log_prob: float64, elementwise [N, *event] (or [N]), of x, the outputs, and the given likelihood.
    """

    give: Callable[[tuple[int, ...]], Any]
    data: Callable[[Tensor], Tensor]
    outputs: Callable[[tuple[int, ...]], list[tuple[int, ...]]]
    log_prob: Callable[[Tensor, list[Tensor], Any], Tensor]
    integers: bool = False
    masked: bool = True
    sized: bool = False
    differentiable: bool = False  # by x
    may_be_large: bool = False
    events: tuple[tuple[int, ...], ...] = EVENTS
    combine: Callable[[list[Tensor]], Any] = lambda o: o[0] if len(o) == 1 else tuple(o)
    native: Any = None  # the user's own log_prob, computed in the user's dtype
    scale: float = 1.0  # scale of the decoder's outputs


def _one(event):
    return [event]


def _many(n: int):
    return lambda event: [event] * n


def _counts(u: Tensor) -> Tensor:
    return torch.where(u < 0.3, 0.0, (-6 * torch.log1p(-u)).floor())


def _binary(u: Tensor) -> Tensor:
    return (u > 0.5).to(u.dtype)


def _real(u: Tensor) -> Tensor:
    return torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6))


def _positive(u: Tensor) -> Tensor:
    return _real(u).exp()


def _levels(u: Tensor) -> Tensor:
    return (u * 256).floor().clamp(max=255) / 255


DATA = {
    "bernoulli": lambda u: torch.where(u < 0.5, _binary(2 * u), u),
    "continuous_bernoulli": lambda u: u,
    "beta": lambda u: 0.01 + 0.97 * u,
    "poisson": _counts,
    "negative_binomial": _counts,
    "zero_inflated_negative_binomial": _counts,
    "discretized_logistic": _levels,
}


def _declared(name: str) -> Kind:
    """Return a likelihood with its own op, by name, against its declared independent distribution."""
    cls = DECLARED[name]
    returned = len(cls.outputs) - len(cls.constants)

    def log_prob(x, outputs, given):
        return ORACLES[name](
            *outputs, *(torch.full_like(outputs[0], c) for c in CONSTANTS.get(name, ()))
        ).log_prob(x)

    data = DATA.get(name, _positive if cls.low == 0 else _real)
    return Kind(
        lambda event: name, data, _many(returned), log_prob, integers=cls.takes_integers,
        sized=name in SIZED, differentiable=cls.differentiable, may_be_large=True,
        scale=0.5 if name == "student_t" else 1.0,
    )  # fmt: skip


CONSTANTS = {"discretized_logistic": (-math.log(255),)}
SIZED = ("poisson", "negative_binomial", "zero_inflated_negative_binomial")


class Own(Likelihood):
    """User's likelihood."""

    def log_prob(self, x: Tensor, parameters: Any) -> Tensor:
        mean, log_scale = parameters
        return -0.5 * ((x - mean) * torch.exp(-log_scale)).square() - log_scale


class OwnOfRows(Likelihood):
    """User's likelihood that is not a sum over elements: [N]."""

    def log_prob(self, x: Tensor, parameters: Any) -> Tensor:
        return -(x - parameters).square().flatten(1).sum(1).add(1.0).log()


def _mixture_log_prob(x, outputs, given):
    logits, location, log_scale = outputs
    own = ORACLES["discretized_logistic"](
        0.5 * (location + 1), log_scale - math.log(2), torch.full_like(location, -math.log(255))
    )
    return torch.logsumexp(logits.log_softmax(1) + own.log_prob(x[:, None].expand(location.shape)), 1)


def _categorical(x, outputs, given):
    return outputs[0].log_softmax(1).gather(1, x[:, None].long())[:, 0]


COLUMNS = [("a", "categorical", 3), ("b", "gaussian"), ("c", "categorical", 20)]


def _columns(x, outputs, given):
    first, mean, logvar, last = outputs[0].split((3, 1, 1, 20), 1)
    classes = [td.Categorical(logits=h).log_prob(x[:, i].long()) for h, i in ((first, 0), (last, 2))]
    number = td.Normal(mean[:, 0], (0.5 * logvar[:, 0]).exp()).log_prob(x[:, 1])
    return torch.stack([classes[0], number, classes[1]], 1)


def _multinomial(x, outputs, given):
    x, logits = x.flatten(1), outputs[0].flatten(1)
    return torch.lgamma(x.sum(1) + 1) - torch.lgamma(x + 1).sum(1) + (x * logits.log_softmax(1)).sum(1)


def _joint(x, outputs, given):
    ink = td.Bernoulli(logits=outputs[0], validate_args=False).log_prob(x["ink"])
    return torch.cat([ink.flatten(1), td.Poisson(outputs[1].exp()).log_prob(x["count"]).flatten(1)], 1)


def _own(x, outputs, given):
    raise AssertionError("the user's own is computed as it is")


def _given_scale(cls, **options):
    return lambda event: cls(**options)


ZOO: dict[str, Kind] = {
    **{name: _declared(name) for name in DECLARED if name != "softplus_gaussian"},
    "gaussian of a scale": Kind(
        _given_scale(Gaussian, scale=0.7),
        _real,
        _one,
        lambda x, o, given: td.Normal(o[0], 0.7).log_prob(x),
        differentiable=True,
        may_be_large=True,
    ),
    "gaussian, learned": Kind(
        lambda event: Gaussian(scale=torch.full(event, 0.7), learned=True),
        _real,
        _one,
        lambda x, o, given: td.Normal(o[0], given["log_scale"].exp()).log_prob(x),
        differentiable=True,
        may_be_large=True,
    ),
    "laplace, learned": Kind(
        lambda event: fastvae.likelihoods.Laplace(scale=0.7, learned=True),
        _real,
        _one,
        lambda x, o, given: td.Laplace(o[0], given["log_scale"].exp()).log_prob(x),
        may_be_large=True,
    ),
    "softplus gaussian": Kind(
        _given_scale(Gaussian, scale="softplus", floor=1e-3),
        _real,
        _many(2),
        lambda x, o, given: td.Normal(o[0], (F.softplus(o[1]) + 1e-3).sqrt()).log_prob(x),
        differentiable=True,
        may_be_large=True,
    ),
    "student_t of df": Kind(
        lambda event: fastvae.likelihoods.StudentT(df=4.0),
        _real,
        _many(2),
        lambda x, o, given: td.StudentT(4.0, o[0], o[1].exp()).log_prob(x),
        may_be_large=True,
    ),
    "negative_binomial, learned": Kind(
        lambda event: NegativeBinomial(torch.full(event, 2.0), learned=True),
        _counts,
        _one,
        lambda x, o, given: ORACLES["negative_binomial"](
            o[0], given["log_inverse_dispersion"].expand(o[0].shape)
        ).log_prob(x),
        integers=True,
        sized=True,
        may_be_large=True,
    ),
    "categorical": Kind(
        lambda event: "categorical",
        lambda u: (u * CLASSES).floor(),
        lambda event: [(CLASSES, *event)],
        _categorical,
        integers=True,
    ),
    "categorical, classes last": Kind(
        lambda event: Categorical(axis=-1),
        lambda u: (u * CLASSES).floor(),
        lambda event: [(*event, CLASSES)],
        lambda x, o, given: o[0].log_softmax(-1).gather(-1, x[..., None].long())[..., 0],
        integers=True,
    ),
    "columns": Kind(
        lambda event: Columns(COLUMNS),
        lambda u: torch.stack([(u[..., 0] * 3).floor(), 4 * u[..., 1] - 2, (u[..., 2] * 20).floor()], -1),
        lambda event: [(25,)],
        _columns,
        events=((3,),),
    ),
    "multinomial": Kind(
        lambda event: "multinomial",
        _counts,
        _one,
        _multinomial,
        integers=True,
        masked=False,
        events=EVENTS[:2],
    ),
    "discretized_logistic_mixture": Kind(
        lambda event: "discretized_logistic_mixture",
        _levels,
        lambda e: [(COMPONENTS, *e)] * 3,
        _mixture_log_prob,
        masked=True,
        events=((7,), (2, 3)),
    ),
    "joint": Kind(
        lambda event: Joint(ink="bernoulli", count="poisson"),
        lambda u: {"ink": _binary(u), "count": _counts(u)},
        _many(2),
        _joint,
        masked=False,
        combine=lambda o: {"ink": o[0], "count": o[1]},
    ),
    "from_distribution": Kind(
        lambda event: fastvae.likelihoods.from_distribution(lambda logits: td.Bernoulli(logits=logits)),
        _binary,
        _one,
        _own,
        native=lambda x, logits: td.Bernoulli(logits=logits).log_prob(x),
    ),
    "own": Kind(lambda event: Own(), _real, _many(2), _own, native=Own().log_prob),
    "own of rows": Kind(
        lambda event: OwnOfRows(), _real, _one, _own, native=OwnOfRows().log_prob, masked=False
    ),
}


def _probabilities(name: str, cls: Any, **options: Any) -> None:
    """Register a likelihood whose decoder returns probabilities or rates, if it exists."""
    try:
        cls(**options)
    except TypeError:
        return
    of = {
        "bernoulli": lambda x, o, given: (
            x * o[0].log().clamp(min=-100) + (1 - x) * torch.log1p(-o[0]).clamp(min=-100)
        ),
        "poisson": lambda x, o, given: torch.xlogy(x, o[0]) - o[0] - torch.lgamma(x + 1),
        # Normalized, as torch.distributions does: in half precision a softmax does not sum to 1.
        "categorical": lambda x, o, given: (
            (o[0] / o[0].sum(1, keepdim=True)).log().gather(1, x[:, None].long())[:, 0]
        ),
    }
    plain = ZOO[name]
    squash = {"bernoulli": torch.sigmoid, "poisson": torch.exp, "categorical": lambda t: t.softmax(1)}[name]
    combine = lambda o: squash(o[0])  # noqa: E731
    ZOO[f"{name} of {next(iter(options))}"] = plain._replace(
        give=lambda event: cls(**options), log_prob=of[name], combine=combine
    )


_probabilities("bernoulli", Bernoulli, probs=True)
_probabilities("poisson", Poisson, rate=True)
_probabilities("categorical", Categorical, probs=True)


# A decoder returns one tensor of features.
PLAIN = tuple(
    name
    for name, kind in ZOO.items()
    if kind.outputs((7,)) == [(7,)] and kind.combine is Kind._field_defaults["combine"]
)


def read(parameters: Any) -> list[Tensor]:
    """Return a decoder's output as a list of tensors."""
    if isinstance(parameters, Mapping):
        return list(parameters.values())
    return [parameters] if isinstance(parameters, Tensor) else list(parameters)
