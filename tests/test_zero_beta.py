"""A KL of weight 0 is 0, also where it is infinite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae.distributions import DiagonalNormal

from .conftest import DEVICE
from .models import generator, rand, randn

B, D, X, L = 4, 3, 7, 2
ROW = 1  # the row with infinite KL


def _infinite(kind):
    """Return means, log variances and a prior such that one row's KL is infinite and its z finite."""
    mu, logvar = randn(B, D, seed=1), 0.3 * randn(B, D, seed=2)
    prior_mu, prior_logvar = torch.zeros(D, device=DEVICE), torch.zeros(D, device=DEVICE)
    if kind == "a narrow q":
        logvar[ROW, 0] = -math.inf
    elif kind == "a wide q":
        logvar[ROW, 0] = 100.0
    elif kind == "a narrow prior":
        prior_logvar[2] = -160.0
    elif kind == "a prior whose precision overflows":
        prior_logvar[2] = -200.0
    elif kind == "far away":
        mu[ROW, 1] = 1e25
    return (
        mu.requires_grad_(),
        logvar.requires_grad_(),
        prior_mu.requires_grad_(),
        prior_logvar.requires_grad_(),
    )


KINDS = ["a narrow q", "a wide q", "a narrow prior", "a prior whose precision overflows", "far away"]
BETAS = {
    "0": lambda: 0.0,
    "tensor": lambda: torch.zeros((), device=DEVICE),
    "each": lambda: torch.tensor([0.5, 0.0, 2.0, 0.0], device=DEVICE),
}


@pytest.mark.parametrize("kl", ["analytic", "mc"])
@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("kind", KINDS)
def test_terms_of_zero_weight_count_as_0(backend, kind, beta, kl):
    if kind in ("a narrow q", "a prior whose precision overflows") and kl == "mc":
        return  # the log density itself is infinite at z, and its gradient NaN
    x, decoder = rand(B, X, seed=3).round(), nn.Linear(D, X).to(DEVICE)
    weight, given = decoder.weight, BETAS[beta]()
    with torch.no_grad():
        weight.mul_(1e-20)
    if "prior" in kind and beta == "each":
        given = given * 0

    def step(counted, *tensors, **options):
        mu, logvar, *prior = tensors
        bound = fastvae.elbo(
            x[counted], (mu[counted], logvar[counted]), decoder, prior=DiagonalNormal(*prior), kl=kl,
            k=L, likelihood="bernoulli", generator=generator(5), reduction="none", **options,
        )  # fmt: skip
        return bound, *torch.autograd.grad(bound.sum(), [*tensors, weight])

    tensors = _infinite(kind)
    bound, *grads = step(slice(None), *tensors, beta=given)
    assert bool(bound.isfinite().all())
    for name, grad in zip(("mu", "logvar", "prior mu", "prior logvar", "decoder"), grads, strict=True):
        assert bool(grad.isfinite().all()), (name, grad)
    terms = fastvae.elbo(
        x, tensors[:2], decoder, prior=DiagonalNormal(*tensors[2:]), kl=kl, k=L, beta=given,
        likelihood="bernoulli", generator=generator(5), terms=True,
    )  # fmt: skip
    likelihood = terms.log_likelihood
    assert not bool(terms.kl[ROW].isfinite()) or kl == "mc"
    silent = torch.as_tensor(given, device=DEVICE).expand(B) == 0
    torch.testing.assert_close(bound[silent], likelihood[silent])


def test_an_infinite_kl_of_torch_distributions():
    mu = torch.zeros(B, D, device=DEVICE).requires_grad_()
    low, high = torch.zeros(D, device=DEVICE), torch.ones(D, device=DEVICE)
    x, decoder = rand(B, X, seed=3).round(), nn.Linear(D, X).to(DEVICE)
    q, prior = td.Normal(mu, torch.ones_like(mu)), td.Uniform(low, high, validate_args=False)
    for beta in (0.0, 0, torch.zeros((), device=DEVICE)):
        options = {"prior": prior, "likelihood": "bernoulli", "beta": beta, "generator": generator(5)}
        terms = fastvae.elbo(x, q, decoder, terms=True, **options)
        assert terms.kl.isposinf().all()
        torch.testing.assert_close(terms.bound, terms.log_likelihood)
        (grad,) = torch.autograd.grad(terms.bound.sum(), mu)
        assert bool(grad.isfinite().all()) and bool((grad != 0).any())


def test_a_prior_of_zero_weight_stays_in_the_graph():
    """Gradients of a prior with beta = 0 are 0 instead of missing, as DDP expects while beta rises."""
    prior_mu = torch.zeros(D, device=DEVICE, requires_grad=True)
    x, q = rand(B, X, seed=3).round(), torch.zeros(B, 2 * D, device=DEVICE)
    prior = DiagonalNormal(prior_mu, torch.zeros(D, device=DEVICE))
    decoder = nn.Linear(D, X).to(DEVICE)
    bound = fastvae.elbo(x, q, decoder, prior=prior, beta=0.0, likelihood="bernoulli")
    (grad,) = torch.autograd.grad(bound, prior_mu)
    assert torch.equal(grad, torch.zeros_like(grad))
