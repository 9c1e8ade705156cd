"""Torch distributions as outputs of decoders: their own log_prob."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td

import fastvae
from fastvae import likelihoods
from fastvae.likelihoods.read import as_likelihood

from . import cases
from .cases import DEVICE
from .outputs import (
    B,
    D,
    Decoder,
    K,
    X,
    as_tuple,
    positive,
    posterior,
)

DISTRIBUTIONS = {
    "bernoulli": ("bernoulli", lambda a, b, c: td.Bernoulli(logits=a)),
    "bernoulli, probs": ("bernoulli", lambda a, b, c: td.Bernoulli(probs=a.sigmoid())),
    "bernoulli, probs twice": (
        likelihoods.Bernoulli(probs=True),
        lambda a, b, c: td.Bernoulli(probs=a.sigmoid()),
    ),
    "continuous bernoulli": ("continuous_bernoulli", lambda a, b, c: td.ContinuousBernoulli(logits=3 * a)),
    "normal": ("gaussian", lambda a, b, c: td.Normal(a, positive(b))),
    "normal of one scale": ("gaussian", lambda a, b, c: td.Normal(a, 0.3)),
    "normal of one row of scales": ("gaussian", lambda a, b, c: td.Normal(a, positive(b[:1]))),
    "laplace": ("laplace", lambda a, b, c: td.Laplace(a, positive(b))),
    "log-normal": ("log_normal", lambda a, b, c: td.LogNormal(a, positive(b))),
    "student": ("student_t", lambda a, b, c: td.StudentT(positive(c), a, positive(b))),
    "beta": ("beta", lambda a, b, c: td.Beta(positive(a), positive(b))),
    "poisson": ("poisson", lambda a, b, c: td.Poisson(positive(a))),
    "poisson, rate twice": (likelihoods.Poisson(rate=True), lambda a, b, c: td.Poisson(positive(a))),
    "negative binomial": (
        "negative_binomial",
        lambda a, b, c: td.NegativeBinomial(positive(b), logits=a),
    ),
    "negative binomial, probs": (
        "negative_binomial",
        lambda a, b, c: td.NegativeBinomial(positive(b), probs=a.sigmoid()),
    ),
}


def _data_of(likelihood, shape):
    name = type(as_likelihood(likelihood)).name
    x = cases.data(name, *shape, dtype=torch.float64)
    # torch rejects counts that are not whole, and soft pixels.
    return x.round() if name in ("bernoulli", "poisson", "negative_binomial") else x


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("independent", [0, 1, 2])
def test_distributions_equal_their_own_log_prob(name, independent, backend):
    likelihood, make = DISTRIBUTIONS[name]
    event = (2, X)
    x, q = _data_of(likelihood, (B, *event)), posterior(torch.float64)

    def form(out):
        made = make(*out.values())
        return td.Independent(made, independent) if independent else made

    decoder = Decoder(dict.fromkeys("abc", event), form, dtype=torch.float64)

    def own(decoder):
        terms = fastvae.iwae(x, q, decoder, k=K, likelihood=likelihood, terms=True)
        d = terms.output
        assert isinstance(d, td.Distribution)  # what the decoder returned
        log_p = d.log_prob(x.repeat(K, 1, 1)).reshape(K, B, -1).sum(2)
        torch.testing.assert_close(terms.log_likelihood, log_p.mean(0), rtol=1e-9, atol=1e-9)
        mu, logvar = q.chunk(2, 1)
        ratio = (-0.5 * terms.z**2 + 0.5 * ((terms.z - mu) ** 2 / logvar.exp() + logvar)).sum(2)
        return (log_p + ratio).logsumexp(0).sub(math.log(K)).mean()

    def fused(decoder):
        return fastvae.iwae(x, q, decoder, k=K, likelihood=likelihood)

    def graded_where_used(run):
        torch.manual_seed(7)
        value = run(decoder)
        return [
            value, *torch.autograd.grad(value, list(decoder.parameters()), allow_unused=True)
        ]  # fmt: skip

    for got, expected in zip(graded_where_used(fused), graded_where_used(own), strict=True):
        if expected is None:
            assert got is None or not got.any()
            continue
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("probs", [False, True])
def test_categorical_and_multinomial_distributions(probs):
    x, z = torch.randint(4, (B, X), device=DEVICE), torch.randn(B, D, device=DEVICE)
    logits = Decoder({"logits": (X, 4)}, as_tuple)(z)
    d = td.Categorical(probs=logits.softmax(-1)) if probs else td.Categorical(logits=logits)
    for likelihood in (likelihoods.Categorical(), likelihoods.Categorical(probs=True)):
        torch.testing.assert_close(likelihood.log_prob(x, d), d.log_prob(x))
        assert likelihood.mean(d).shape == likelihood.sample(td.Independent(d, 1)).shape == (B, X)
        pairs = fastvae.ops.all_pairs_log_prob(x, d, likelihood=likelihood)
        torch.testing.assert_close(pairs.diagonal(), d.log_prob(x).sum(1))
    likelihood = likelihoods.Multinomial()
    counts = torch.randint(4, (B, 4), device=DEVICE)
    rows = td.Multinomial(6, logits=logits[:, 0], validate_args=False)
    torch.testing.assert_close(likelihood.log_prob(counts, rows), rows.log_prob(counts))
    with pytest.raises(ValueError, match=r"Multinomials of batch shape \[3, 7\].*expected the batch shape"):
        likelihood.log_prob(x, td.Multinomial(6, logits=logits))


def test_options_do_not_change_what_a_distribution_means():
    x, z = cases.data("bernoulli", B, X), torch.randn(B, D, device=DEVICE)
    logits = 40 * Decoder({"logits": (X,)}, as_tuple)(z)
    for d in (td.Bernoulli(logits=logits), td.Independent(td.Bernoulli(logits=logits), 1)):
        plain, probs = likelihoods.Bernoulli(), likelihoods.Bernoulli(probs=True)
        assert torch.equal(probs.log_prob(x, d), plain.log_prob(x, logits))
        assert torch.equal(probs.mean(d), plain.mean(logits))


def test_a_subclass_with_its_familys_density_is_read():
    class Named(td.Normal):
        """Subclass that adds no density."""

    class Shifted(td.Normal):
        def log_prob(self, value):
            return super().log_prob(value - 1)

    x, mean = cases.data("gaussian", B, X), torch.zeros(B, X, device=DEVICE)
    likelihood = likelihoods.Gaussian()
    expected = td.Normal(mean, 0.5).log_prob(x)
    torch.testing.assert_close(likelihood.log_prob(x, Named(mean, 0.5)), expected)
    with pytest.raises(TypeError, match="returned a Shifted, a distribution of your own.*from_distribution"):
        likelihood.log_prob(x, Shifted(mean, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, backend):
    x, z = cases.data("gaussian", B, X), torch.randn(K * B, D, device=DEVICE)
    mean, scale = Decoder({"a": (X,), "b": (X,)}, as_tuple)(z)
    mean, scale = mean.to(dtype), positive(scale).to(dtype)
    d = td.Normal(mean, scale)
    got = fastvae.elbo(x, posterior(), lambda z: d, k=K, terms=True).log_likelihood
    wide = td.Normal(mean.double(), scale.double()).log_prob(x.double().repeat(K, 1))
    torch.testing.assert_close(got.double(), wide.reshape(K, B, X).sum(2).mean(0), rtol=1e-5, atol=1e-5)


def test_a_masked_element_of_a_distribution_has_no_effect(backend):
    x, q = cases.data("gaussian", B, X), posterior()
    mask = torch.arange(X, device=DEVICE) != 2
    mean = torch.zeros(B, X, device=DEVICE, requires_grad=True)
    for bad in (0.0, math.nan):
        scale = torch.where(mask, 0.5, bad).expand(B, X).clone().requires_grad_()
        d = td.Normal(mean, scale, validate_args=False)
        bound = fastvae.elbo(x, q, lambda z, d=d: d, mask=mask)
        grads = torch.autograd.grad(bound, (mean, scale))
        assert bound.isfinite() and all(g.isfinite().all() and not g[:, 2].any() for g in grads)
