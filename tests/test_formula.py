"""Formulas as one autograd node: the values and gradients of their compositions."""

from __future__ import annotations

import pytest
import torch

import fastvae
from fastvae.core.formula import Formula
from fastvae.distributions import FullNormal, Hierarchy, Level, LowRankNormal, StandardNormal
from fastvae.distributions import covariance as of_covariance
from fastvae.distributions import level as of_level
from fastvae.distributions.closed_form import closed_kl

from .models import randn

B, D, R, K = 6, 5, 3, 2


ROW, PAIR = (B, D), ((B, D), (B, D))
# Formula, tensors, other arguments, and the number of tensors that require a gradient.
CASES = {
    "full": (of_covariance._kl_full, [ROW, (B, D * (D + 1) // 2)], (), 2),
    "full, one latent": (of_covariance._kl_full, [(B, 1), (B, 1)], (), 2),
    "low rank": (of_covariance._kl_factors, [*PAIR, (B, D, R)], (), 3),
    "draw": (of_covariance._factors_drawn, [*PAIR, (B, D, R), (1, B, D), (1, B, R)], (), 3),
    "draws": (of_covariance._factors_drawn, [*PAIR, (B, D, R), (K, B, D), (K, B, R)], (), 3),
    "direct": (of_level.draw_direct, [*PAIR, *PAIR, ROW], (True,), 4),
    "direct, per dimension": (of_level.draw_direct, [*PAIR, *PAIR, ROW], (False,), 4),
    "direct, standard": (of_level.draw_direct, [*PAIR, None, None, ROW], (True,), 4),
    "relative": (of_level.draw_relative, [*PAIR, *PAIR, ROW], (True,), 4),
    "relative, per dimension": (of_level.draw_relative, [*PAIR, *PAIR, ROW], (False,), 4),
    "relative, standard": (of_level.draw_relative, [*PAIR, None, None, ROW], (True,), 4),
}


def _case(name, dtype=torch.float64, scale=1.0):
    formula, shapes, options, learned = CASES[name]
    given = []
    for i, shape in enumerate(shapes):
        t = None if shape is None else scale * randn(*shape, seed=i, dtype=torch.float64)
        given.append(t if t is None else t.to(dtype).requires_grad_(i < learned))
    return formula, given, options


def _results(function, given, options):
    results = function(*given, *options)
    return results if isinstance(results, tuple) else (results,)


def _gradients(results, given, create_graph=False):
    upstream = [randn(*r.shape, seed=9, dtype=torch.float64).to(r.dtype) for r in results]
    learned = [t for t in given if t is not None and t.requires_grad]
    return torch.autograd.grad(results, learned, upstream, create_graph=create_graph)


@pytest.mark.parametrize("scale", [1e-3, 0.3, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_composition(name, dtype, scale):
    formula, given, options = _case(name, dtype, scale)
    exact = [t if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in given]
    results, expected = _results(formula, given, options), _results(formula._composed, exact, options)
    tol = 1e-5 if dtype == torch.float32 else 1e-11
    for got, want in zip(results, expected, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=tol, atol=tol * scale**2)
    for got, want in zip(_gradients(results, given), _gradients(expected, exact), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=10 * tol, atol=tol * scale)


@pytest.mark.parametrize("name", CASES)
def test_a_value_without_gradients_is_the_same(name):
    formula, given, options = _case(name, torch.float32)
    with torch.no_grad():
        plain = _results(formula, given, options)
    for got, want in zip(plain, _results(formula, given, options), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", CASES)
def test_one_of_several_results_or_inputs(name):
    formula, given, options = _case(name)
    for i, result in enumerate(_results(formula, given, options)):
        want = _results(formula._composed, given, options)[i]
        for t in [t for t in given if t is not None and t.requires_grad]:
            got, expected = (
                torch.autograd.grad(r.sum(), t, retain_graph=True, allow_unused=True, materialize_grads=True)
                for r in (result, want)
            )
            torch.testing.assert_close(got[0], expected[0], rtol=1e-10, atol=1e-12)
    alone = [t if t is None else t.detach().requires_grad_(i == 0) for i, t in enumerate(given)]
    (got,), (want,) = (_gradients(_results(f, alone, options), alone) for f in (formula, formula._composed))
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives(name):
    formula, given, options = _case(name)
    found = []
    for function in (formula, formula._composed):
        first = _gradients(_results(function, given, options), given, create_graph=True)
        learned = [t for t in given if t is not None and t.requires_grad]
        total = sum(g.square().sum() for g in first)
        found.append(torch.autograd.grad(total, learned, allow_unused=True, materialize_grads=True))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_a_tensor_as_two_arguments():
    mu, eps = (randn(B, D, seed=n, dtype=torch.float64) for n in (1, 2))
    mu.requires_grad_()
    for function in (of_level.draw_direct, of_level.draw_direct._composed):
        _, kl = function(mu, mu, mu.detach(), mu, eps, True)
        first = torch.autograd.grad(kl.sum(), mu, create_graph=True)[0]
        second = torch.autograd.grad(first.sum(), mu)[0]
        torch.testing.assert_close(first.detach(), torch.zeros_like(first), atol=1e-12, rtol=0)
        if function is of_level.draw_direct:
            of_node = second
    torch.testing.assert_close(of_node, second)


@pytest.mark.parametrize("name", ["full", "low rank"])
def test_transforms_and_batched_gradients(name):
    formula, given, options = _case(name)
    per_row = torch.func.vmap(torch.func.grad(lambda *row: formula(*[t[None] for t in row]).sum()))
    got = per_row(*[t.detach() for t in given])
    want = torch.autograd.grad(formula(*given, *options).sum(), given[0])[0]
    torch.testing.assert_close(got, want)
    result = formula(*given, *options)
    each = torch.eye(result.numel(), dtype=result.dtype).reshape(-1, *result.shape)
    found = [
        torch.autograd.grad(r, given, each, is_grads_batched=True)
        for r in (result, formula._composed(*given, *options))
    ]
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_a_backend_runs_the_composition():
    calls = []

    def composed(t):
        calls.append("composed")
        return t.exp()

    def forward(t):
        calls.append("forward")
        return t.exp(), ()

    formula = Formula(composed, forward, lambda grads, kept, t: (grads[0] * t.exp(),), 1)
    t = randn(3, seed=1).requires_grad_()
    formula(t)
    with fastvae.use_backend("reference"):
        formula(t)
    assert calls == ["forward", "composed"]


def test_the_kl_is_one_node():
    mu, tril = (randn(B, n, seed=1).requires_grad_() for n in (D, D * (D + 1) // 2))
    node = closed_kl(FullNormal(mu, tril), StandardNormal()).grad_fn
    assert [type(n).__name__ for n, _ in node.next_functions] == ["AccumulateGrad"] * 2
    factor = randn(B, D, R, seed=2).requires_grad_()
    node = closed_kl(LowRankNormal(mu, mu, factor), StandardNormal()).grad_fn
    assert [type(n).__name__ for n, _ in node.next_functions] == ["AccumulateGrad"] * 3


@pytest.mark.parametrize("merge", [None, "residual", "precision"])
@pytest.mark.parametrize("k", [1, 3])
def test_a_hierarchy_is_the_same_on_every_backend(merge, k):
    torch.manual_seed(0)
    below = torch.nn.Linear(4, 6)
    posterior = (lambda h: below(h)) if merge == "precision" else (lambda h, z: below(h) + z.repeat(1, 3))
    levels = [
        Level(2, lambda h: h, merge=merge),
        Level(3, posterior, prior=torch.nn.Linear(2, 6), merge=merge),
    ]
    hierarchy, x, decoder = Hierarchy(levels), torch.rand(B, 4).round(), torch.nn.Linear(5, 4)
    features, found = randn(B, 4, seed=1).requires_grad_(), []
    for backend in ("native", "reference"):
        with fastvae.use_backend(backend):
            torch.manual_seed(1)
            bound = fastvae.elbo(x, hierarchy(features), decoder, likelihood="bernoulli", k=k)
            learned = [features, *below.parameters(), *hierarchy.parameters()]
            found.append([bound.detach(), *torch.autograd.grad(bound, learned, allow_unused=False)])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
