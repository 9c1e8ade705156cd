"""An empty batch gives empty results and zero gradients, for every q, prior, likelihood and objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributions as td

import fastvae
from fastvae import ops
from fastvae.distributions import (
    DiagonalNormal,
    FullNormal,
    Laplace,
    LowRankNormal,
    Mixture,
    NormalMixture,
    VampPrior,
)
from fastvae.likelihoods import Gaussian, Joint, Likelihood, NegativeBinomial
from fastvae.likelihoods.declared import DECLARED
from fastvae.objectives import bounds

from . import cases
from .conftest import DEVICE

D, X, C = 3, 5, 4


class Own(Likelihood):
    def log_prob(self, x, mean):
        return -(x - mean).abs()


class Summed(Likelihood):
    def log_prob(self, x, mean):
        return -(x - mean).abs().sum(1)


class Decoder(nn.Module):
    """Linear layer split into outputs of given shapes, a mapping if names are given."""

    def __init__(self, *shapes: tuple[int, ...], names: tuple[str, ...] = ()):
        super().__init__()
        self.shapes, self.names = shapes, names
        self.layer = nn.Linear(D, sum(math.prod(s) for s in shapes))

    def forward(self, z: Tensor) -> Any:
        parts = self.layer(z.flatten(1)).split([math.prod(s) for s in self.shapes], 1)
        outputs = [p.reshape(len(z), *s) for p, s in zip(parts, self.shapes, strict=True)]
        if self.names:
            return dict(zip(self.names, outputs, strict=True))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


row = (X,)
LIKELIHOODS: dict[str, tuple[Callable[[], Any], tuple[tuple[int, ...], ...]]] = {
    name: (lambda name=name: name, (row,) * cases.returned(name)) for name in DECLARED
}
LIKELIHOODS |= {
    "categorical": (lambda: "categorical", ((C, X),)),
    "multinomial": (lambda: "multinomial", (row,)),
    "mixture": (lambda: "discretized_logistic_mixture", ((C, X),) * 3),
    "optimal": (lambda: Gaussian(scale="optimal"), (row,)),
    "fixed": (lambda: Gaussian(scale=0.1), (row,)),
    "learned": (lambda: NegativeBinomial(torch.ones(X), learned=True), (row,)),
    "own": (Own, (row,)),
    "summed": (Summed, (row,)),
    "from_distribution": (
        lambda: fastvae.likelihoods.from_distribution(lambda logits: td.Bernoulli(logits=logits)),
        (row,),
    ),
    "joint": (lambda: Joint(a="bernoulli", b=Gaussian(scale=0.3)), (row, row)),
}


def _inputs(name):
    make, shapes = LIKELIHOODS[name]
    likelihood = make()
    if isinstance(likelihood, nn.Module):
        likelihood = likelihood.to(DEVICE)
    joint = isinstance(likelihood, Joint)
    decoder = Decoder(*shapes, names=("a", "b") if joint else ()).to(DEVICE)
    x = torch.zeros(0, X, device=DEVICE)
    mask = torch.ones(0, X, dtype=torch.bool, device=DEVICE)
    return likelihood, decoder, {"a": x, "b": x} if joint else x, {"a": mask, "b": mask} if joint else mask


def _pair():
    return tuple(torch.zeros(0, D, device=DEVICE, requires_grad=True) for _ in range(2))


def _check(bound: Tensor, reduction: str, asked: list[Tensor]) -> None:
    if reduction == "none":
        assert bound.shape == (0,)
    elif reduction == "sum":
        assert float(bound.detach()) == 0
    else:  # as torch does
        assert bool(bound.isnan())
    grads = torch.autograd.grad(bound.sum(), asked, allow_unused=True)
    for t, g in zip(asked, grads, strict=True):
        assert g is None or (g.shape == t.shape and bool((g == 0).all()))


OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "elbo": lambda *a, **o: fastvae.elbo(*a, k=2, **o),
    "free bits": lambda *a, **o: fastvae.elbo(*a, free_bits=0.1, free_bits_per="example", **o),
    "iwae": lambda *a, **o: fastvae.iwae(*a, k=4, **o),
    "dreg": lambda *a, **o: fastvae.iwae(*a, k=4, estimator="dreg", **o),
    "chunks": lambda *a, **o: fastvae.iwae(*a, k=4, k_chunk=3, **o),
    "groups": lambda *a, **o: fastvae.bound(*a, bounds.IWAE(groups=2, alpha=0.5), k=4, **o),
    "ciwae": lambda *a, **o: fastvae.bound(*a, bounds.CIWAE(0.5), k=4, **o),
    "jackknife": lambda *a, **o: fastvae.bound(*a, bounds.Jackknife(), k=4, **o),
    "tvo": lambda *a, **o: fastvae.bound(*a, bounds.TVO(), k=4, **o),
    "beta_tc": fastvae.beta_tc,
}


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("masked", [False, True])
def test_objectives(backend, name, masked):
    likelihood, decoder, x, mask = _inputs(name)
    if masked and name == "summed":
        return  # a mask needs log p of each element
    for objective in OBJECTIVES.values():
        for reduction in ("none", "sum", "mean"):
            q = _pair()
            bound = objective(
                x, q, decoder, likelihood=likelihood, reduction=reduction, mask=mask if masked else None
            )
            _check(bound, reduction, [*q, *decoder.parameters()])


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("masked", [False, True])
def test_estimates(backend, name, masked):
    likelihood, decoder, x, mask = _inputs(name)
    if masked and name == "summed":
        return
    options = {"likelihood": likelihood, "mask": mask if masked else None}
    for more in ({}, {"noise": "qmc"}, {"proposal": "adapted"}, {"proposal": "defensive"}):
        result = fastvae.log_marginal(x, _pair(), decoder, k=200, **more, **options)
        assert all(v.shape == (0,) for v in vars(result).values())
    assert fastvae.reconstruction_log_prob(x, _pair(), decoder, k=3, **options).shape == (0,)
    parts = fastvae.log_weights(x, _pair(), decoder, k=4, **options)
    assert parts.log_likelihood.shape == parts.log_ratio.shape == (4, 0)
    assert fastvae.audit.ais(x, _pair(), decoder, steps=2, k=2, **options).log_px.shape == (0,)


def _mixture(mu, raw):
    logits = torch.zeros(0, 2, device=DEVICE)
    return Mixture([DiagonalNormal(mu, raw), DiagonalNormal(mu + 1, raw)], logits)


POSTERIORS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "pair": lambda mu, raw: (mu, raw),
    "tensor": lambda mu, raw: torch.cat([mu, raw], 1),
    "spatial": lambda mu, raw: (mu[:, :, None, None], raw[:, :, None, None]),
    "softplus": lambda mu, raw: DiagonalNormal(mu, raw, scale_form="softplus"),
    "full": lambda mu, raw: FullNormal(mu, torch.cat([raw, mu], 1)),
    "low_rank": lambda mu, raw: LowRankNormal(mu, raw, mu.unsqueeze(2)),
    "laplace": lambda mu, raw: Laplace(mu, raw),
    "mixture": _mixture,
    "td.Normal": lambda mu, raw: td.Normal(mu, raw.exp()),
    "td.StudentT": lambda mu, raw: td.StudentT(raw.exp() + 3, mu, raw.exp()),
}
PRIORS: dict[str, Callable[[], Any]] = {
    "standard": lambda: None,
    "diagonal": lambda: DiagonalNormal(torch.zeros(D, device=DEVICE), torch.ones(D, device=DEVICE)),
    "mixture": lambda: NormalMixture(*(torch.zeros(s, device=DEVICE) for s in ((C, D), (C, D), C))),
    "vamp": lambda: VampPrior(nn.Linear(X, 2 * D), torch.rand(6, X)).to(DEVICE),
    "td.Laplace": lambda: td.Laplace(torch.zeros(D, device=DEVICE), torch.ones(D, device=DEVICE)),
}


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_posteriors_and_priors(backend, posterior):
    _, decoder, x, _ = _inputs("bernoulli")
    for prior in PRIORS.values():
        options = {"likelihood": "bernoulli", "prior": prior()}
        for estimator in ("iwae", "stl", *(() if posterior == "mixture" else ("dreg",))):
            given = _pair()
            q = POSTERIORS[posterior](*given)
            bound = fastvae.iwae(x, q, decoder, k=4, estimator=estimator, reduction="sum", **options)
            _check(bound, "sum", list(given))
        given = _pair()
        q = POSTERIORS[posterior](*given)
        _check(fastvae.elbo(x, q, decoder, kl="mc", reduction="none", **options), "none", list(given))
        q = POSTERIORS[posterior](*_pair())
        assert fastvae.log_marginal(x, q, decoder, k=9, **options).log_px.shape == (0,)


@pytest.mark.parametrize("likelihood", cases.LIKELIHOODS)
@pytest.mark.parametrize("k, b", [(0, 3), (3, 0), (0, 0)])
def test_all_pairs(backend, likelihood, k, b):
    x = cases.data(likelihood, b, X)
    outputs = [p.requires_grad_() for p in cases.parameters(likelihood, k, X)]
    given = outputs[0] if len(outputs) == 1 else tuple(outputs)
    found = ops.all_pairs_log_prob(x, given, likelihood=likelihood)
    assert found.shape == (k, b) and found.dtype == torch.float32
    for p, g in zip(outputs, torch.autograd.grad(found.sum(), outputs), strict=True):
        assert g.shape == p.shape and bool((g == 0).all())


COMPONENTS = {
    "categorical": ((C, X),),
    "discretized_logistic_mixture": ((C, X), (C, 3, X), (C, 3, X)),
    "coupled": ((C, X), (C, 3, X), (C, 3, X), (C, 3, X)),
}


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("k, b, x", [(2, 0, X), (0, 3, X), (2, 3, 0)])
def test_likelihoods_with_components(backend, name, k, b, x):
    """Gradients are tensors of zeros on every backend, as an optimiser expects."""
    data = torch.zeros(b, *([3] if name != "categorical" else []), x, device=DEVICE)
    shapes = [(k, b, *shape[:-1], x) for shape in COMPONENTS[name]]
    outputs = [torch.zeros(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    if name == "categorical":
        found = ops.categorical_log_prob(data, *outputs)
    else:
        found = ops.discretized_logistic_mixture_log_prob(data, *outputs)
    assert found.shape == (k, b) and not bool(found.any())
    for p, g in zip(outputs, torch.autograd.grad(found.sum(), outputs), strict=True):
        assert g.shape == p.shape and g.dtype == p.dtype and not bool(g.any())


def test_a_fully_masked_batch_does_not_change_the_variance():
    """Gaussian(scale='optimal') measures nothing from a masked batch, before and after the first one."""
    likelihood, decoder, _, _ = _inputs("optimal")
    x, q = torch.rand(4, X, device=DEVICE), tuple(torch.zeros(4, D, device=DEVICE) for _ in range(2))
    nothing = torch.zeros(4, X, dtype=torch.bool, device=DEVICE)
    for known in (False, True):
        before = likelihood.variance.clone()
        assert bool(before.isfinite()) == known
        bound = fastvae.elbo(x, q, decoder, likelihood=likelihood, mask=nothing, reduction="none")
        assert torch.equal(bound, torch.zeros(4, device=DEVICE))
        (g,) = torch.autograd.grad(bound.sum(), [decoder.layer.weight])
        assert bool((g == 0).all())
        torch.testing.assert_close(likelihood.variance, before, equal_nan=True)
        fastvae.elbo(x, q, decoder, likelihood=likelihood)
