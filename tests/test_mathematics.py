"""Mathematical truths: exact likelihoods, bounds, biases, and mean and noise of gradient estimators.

The statistical checks have fixed seeds, so they cannot flake; their tolerances are multiples of measured
standard errors.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td

import fastvae
from fastvae.distributions import DiagonalNormal
from fastvae.likelihoods import Gaussian

from . import models
from .conftest import DEVICE
from .models import LinearGaussian, generator, rand, randn, seed_of

B, D, X = 5, 3, 7


def log_weight_rounding(model: LinearGaussian, x, q, k: int, dtype) -> float:
    """Return the rounding error of one log weight: some 2 (X + D) terms, each a square with a few roundings.

    A term's relative error is about 8 eps (subtract, scale, square, add, and the exp of a logvar); the error
    of a sum is at most that of the sum of magnitudes, bounded here with |eps| < 5 and the actual residuals.
    """
    mu, logvar = q
    z = mu.abs() + 5 * torch.exp(0.5 * logvar)
    residual = x.abs() + z @ model.weight.abs().T.to(z.dtype) + model.offset.abs().to(z.dtype)
    magnitude = (residual**2 / model.scale**2).sum(1) + (z**2 + 25 + logvar.abs()).sum(1) + 2 * X
    return float(8 * torch.finfo(dtype).eps * magnitude.max())


# Exact posterior: every weight is p(x).


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("k", [1, 4, 11])
def test_exact_posterior_makes_every_bound_exact(backend, dtype, k):
    model = LinearGaussian(D, X, dtype=dtype)
    x = model.sample(B)
    q, exact = model.posterior(x), model.log_px(x)
    options = {"likelihood": model.likelihood}
    tolerance = log_weight_rounding(model, x, q, k, dtype)
    # Otherwise the check would be weak: weights that differ show at 1e-2 and more.
    assert tolerance < 1e-3
    iwae = fastvae.iwae(x, q, model.decoder, k=k, reduction="none", **options)
    mc = fastvae.elbo(x, q, model.decoder, k=k, kl="mc", reduction="none", **options)
    estimate = fastvae.log_marginal(x, q, model.decoder, k=k, k_chunk=3, **options)
    for got in (iwae, mc, estimate.log_px):
        assert got.shape == (B,)
        assert got.dtype == dtype
        assert float((got.double() - exact).abs().max()) <= tolerance
    if k > 1:
        # The relative spread of the weights is that of their logarithms; its formula, a difference under a
        # square root in float64, resolves no less than the root of a few eps.
        resolved = math.sqrt(8 * torch.finfo(torch.float64).eps)
        assert float(estimate.log_px_stderr.max()) <= tolerance + resolved
        assert float((estimate.ess - k).abs().max()) <= k * tolerance


def test_analytic_elbo_at_the_exact_posterior_is_log_px():
    """The analytic ELBO is log p(x) in expectation over z, and its terms agree with their closed forms."""
    model = LinearGaussian(D, X)
    x = model.sample(400)
    mu, logvar = model.posterior(x)
    terms = fastvae.elbo(
        x,
        (mu, logvar),
        model.decoder,
        likelihood=model.likelihood,
        k=50,
        terms=True,
        generator=generator(0),
    )
    exact = model.log_px(x)
    error = terms.bound - exact
    assert abs(float(error.mean())) < 4 * float(error.std()) / 20
    # E_q log p(x|z) = log p(x|mu) - sum of gain^2 variance / (2 s^2), for orthogonal columns
    at_mean = td.Normal(model.decoder(mu), model.scale).log_prob(x).sum(1)
    expected = at_mean - 0.5 * (model.gain**2 * logvar.exp()).sum(1) / model.scale**2
    error = terms.log_likelihood - expected
    assert abs(float(error.mean())) < 4 * float(error.std()) / 20
    # and log p(x) is exactly that minus the KL.
    torch.testing.assert_close(expected - terms.kl, exact, rtol=1e-12, atol=1e-12)


# Inexact q, off by a known amount.

SHIFT, STRETCH = 0.3, 0.2


def test_log_marginal_is_within_its_standard_error():
    model = LinearGaussian(D, X, dtype=torch.float32)
    x = model.sample(300)
    k = 10_000
    result = fastvae.log_marginal(
        x, model.posterior(x, SHIFT, STRETCH), model.decoder, k=k, k_chunk=400, likelihood=model.likelihood,
        generator=generator(1),
    )  # fmt: skip
    score = (result.log_px.double() - model.log_px(x)) / result.log_px_stderr.double()
    assert float((score.abs() < 4).double().mean()) >= 0.99
    # 300 scores of variance one: the standard error of their deviation is 1/sqrt(600) = 0.041, of their
    # mean 0.058.
    assert abs(float(score.std()) - 1) < 4 * 0.041
    assert abs(float(score.mean())) < 4 * 0.058
    # The second moment of the weights is known, and so are the effective sample size and the standard error.
    second = model.moment(2, SHIFT, STRETCH)
    # 5 %: the sampling error of a second moment over 10 000 draws is 1 to 2 %.
    for got, expected in ((result.ess, k / second), (result.log_px_stderr, math.sqrt((second - 1) / k))):
        assert got.shape == (300,)
        assert float((got.double() / expected - 1).abs().max()) < 0.05


@pytest.mark.parametrize("k", [16, 32])
def test_bias_of_iwae(k):
    """E[bound] - log p = -m2 / (2 K) + (m3 / 3 - 3 m2^2 / 4) / K^2 + O(K^-3), m2, m3 central moments of w."""
    model = LinearGaussian(D, X)
    replicates = 40_000
    x = model.sample(1).expand(replicates, X)
    q = model.posterior(x, SHIFT, STRETCH)
    bound = fastvae.iwae(
        x, q, model.decoder, k=k, likelihood=model.likelihood, reduction="none", generator=generator(2)
    )
    relative = torch.exp(bound - model.log_px(x))
    second, third = model.moment(2, SHIFT, STRETCH), model.moment(3, SHIFT, STRETCH)
    m2, m3 = second - 1, third - 3 * second + 2
    # The mean weight is unbiased for p(x), with variance m2 / K ...
    assert abs(float(relative.mean()) - 1) < 4 * math.sqrt(m2 / k / replicates)
    assert abs(float(relative.var()) / (m2 / k) - 1) < 0.1
    # ... so it is a control variate of known mean for its logarithm, whose noise exceeds its bias.
    sample = bound - model.log_px(x) - (relative - 1)
    stderr = float(sample.std()) / math.sqrt(replicates)
    first_order, second_order = -m2 / (2 * k), (m3 / 3 - 3 * m2**2 / 4) / k**2
    assert 4 * stderr < 0.05 * abs(first_order), "the check would be weak"
    # The remainder is of third order: smaller than the second by about K.
    allowed = 4 * stderr + 4 * abs(second_order) / k + 4 * m2**3 / k**3
    assert abs(float(sample.mean()) - first_order - second_order) < allowed
    assert abs(float(sample.mean()) / first_order - 1) < 0.15


def test_bounds_are_ordered():
    """E elbo < E iwae_4 < E iwae_16 < E iwae_64 < log p(x), each by more than 4 standard errors."""
    model = LinearGaussian(D, X, dtype=torch.float32)
    x = model.sample(1).expand(20_000, X)
    q = model.posterior(x, 0.8, -0.3)
    options = {"likelihood": model.likelihood, "reduction": "none", "generator": generator(3)}
    bounds = [fastvae.elbo(x, q, model.decoder, **options)]
    bounds += [fastvae.iwae(x, q, model.decoder, k=k, **options) for k in (4, 16, 64)]
    bounds += [model.log_px(x).float()]
    for lower, higher in zip(bounds, bounds[1:], strict=False):
        gap = (higher - lower).double()
        assert float(gap.mean()) > 4 * float(gap.std()) / math.sqrt(gap.numel())


def test_iwae_of_one_sample_is_the_monte_carlo_elbo():
    model = LinearGaussian(D, X)
    x = model.sample(B)
    q = model.posterior(x, SHIFT, STRETCH)
    one = fastvae.iwae(
        x, q, model.decoder, k=1, likelihood=model.likelihood, reduction="none", generator=generator(4)
    )
    mc = fastvae.elbo(
        x, q, model.decoder, kl="mc", likelihood=model.likelihood, reduction="none", generator=generator(4)
    )
    torch.testing.assert_close(one, mc, rtol=1e-14, atol=1e-13)


# KL and likelihoods against torch.distributions.

PRIORS = ["standard", "row", "full"]


def _latents(prior: str, dtype=torch.float64):
    mu, logvar = randn(B, D, seed=10, dtype=dtype), randn(B, D, seed=11, dtype=dtype)
    shape = {"row": (D,), "full": (B, D)}.get(prior)
    if shape is None:
        return mu, logvar, None, td.Normal(torch.zeros_like(mu), torch.ones_like(mu))
    m, s = randn(*shape, seed=12, dtype=dtype), randn(*shape, seed=13, dtype=dtype)
    return mu, logvar, (m, s), td.Normal(m, torch.exp(0.5 * s))


@pytest.mark.parametrize("prior", PRIORS)
def test_analytic_kl(backend, prior):
    mu, logvar, parts, p = _latents(prior)
    expected = td.kl_divergence(td.Normal(mu, torch.exp(0.5 * logvar)), p)
    _, kl = fastvae.ops.rsample_kl(mu, logvar, prior=parts)
    torch.testing.assert_close(kl, expected.sum(1), rtol=1e-12, atol=1e-13)
    _, per_dimension = fastvae.ops.rsample_kl(mu, logvar, prior=parts, per_dimension=True)
    torch.testing.assert_close(per_dimension, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("prior", PRIORS)
def test_monte_carlo_kl(prior):
    """The mean of log q - log p over the draws is the analytic KL within 4.5 standard errors."""
    mu, logvar, parts, p = _latents(prior)
    k = 40_000
    z, log_ratio = fastvae.ops.rsample_log_ratio(mu, logvar, k=k, prior=parts, seed=seed_of(5))
    _, kl = fastvae.ops.rsample_kl(mu, logvar, prior=parts)
    score = (-log_ratio.mean(0) - kl) / (log_ratio.std(0) / math.sqrt(k))
    assert float(score.abs().max()) < 4.5
    q = td.Normal(mu, torch.exp(0.5 * logvar))
    expected = (p.log_prob(z) - q.log_prob(z)).sum(2)
    # log q is recomputed from the rounded z = mu + sigma eps here, which costs about |z| / sigma ulps.
    torch.testing.assert_close(log_ratio, expected, rtol=1e-11, atol=1e-11)


def test_learned_prior_reaches_its_optimum():
    """The best N(m, s^2) has the moments of the aggregate posterior, where the KL's gradient is 0."""
    mu, logvar = randn(B, D, seed=14, dtype=torch.float64), randn(B, D, seed=15, dtype=torch.float64)
    m = mu.mean(0)
    variance = (logvar.exp() + (mu - m) ** 2).mean(0)
    prior = DiagonalNormal(torch.nn.Parameter(m.clone()), torch.nn.Parameter(variance.log()))
    x = rand(B, X, seed=16, dtype=torch.float64)
    decoder = lambda z: z.new_zeros(z.shape[0], X)  # noqa: E731
    (-fastvae.elbo(x, (mu, logvar), decoder, likelihood="bernoulli", prior=prior)).backward()
    for parameter in prior.parameters():
        assert float(parameter.grad.abs().max()) < 1e-14
    # Away from it the gradient is nonzero.
    with torch.no_grad():
        prior.mu += 0.1
    (-fastvae.elbo(x, (mu, logvar), decoder, likelihood="bernoulli", prior=prior)).backward()
    assert float(prior.mu.grad.abs().min()) > 1e-3


@pytest.mark.parametrize("layout", ["full", "pixel", "number", "float"])
def test_gaussian_log_prob(backend, layout):
    k = 4
    x, mean = randn(B, X, seed=20, dtype=torch.float64), randn(k, B, X, seed=21, dtype=torch.float64)
    shape = {"full": (k, B, X), "pixel": (X,), "number": (), "float": ()}[layout]
    logvar = randn(*shape, seed=22, dtype=torch.float64)
    expected = td.Normal(mean, torch.exp(0.5 * logvar)).log_prob(x).sum(2)
    got = fastvae.ops.gaussian_log_prob(x, mean, float(logvar) if layout == "float" else logvar)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("targets", ["hard", "soft"])
def test_bernoulli_log_prob(backend, targets):
    k = 4
    x, logits = rand(B, X, seed=23, dtype=torch.float64), 3 * randn(k, B, X, seed=24, dtype=torch.float64)
    if targets == "hard":
        x = x.round()
    # validate_args=False: torch refuses soft targets, though its formula covers them.
    expected = td.Bernoulli(logits=logits, validate_args=False).log_prob(x.expand(k, B, X)).sum(2)
    formula = (x * logits - torch.nn.functional.softplus(logits)).sum(2)
    torch.testing.assert_close(expected, formula, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(fastvae.ops.bernoulli_log_prob(x, logits), expected, rtol=1e-13, atol=1e-12)


@pytest.mark.parametrize("kl", ["analytic", "mc"])
def test_beta_may_be_a_tensor(backend, kl):
    """A tensor β, shared or per example, acts like the number; its gradient is minus the KL."""
    encoder, decoder = models.networks(X, 3)
    x = randn(B, X, seed=21)

    def bound(beta, **options):
        shared = {"k": 2, "kl": kl, "reduction": "none", "generator": generator(1)}
        return fastvae.elbo(x, encoder(x), decoder, beta=beta, **shared, **options)

    each = bound(1.0, terms=True).kl
    one = torch.tensor(0.3, device=DEVICE)
    for beta in (one, one.double(), one.cpu(), one.expand(B)):
        got = bound(beta)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, bound(0.3), rtol=1e-6, atol=1e-5)
    rows = rand(B, seed=22).requires_grad_()
    got = bound(rows)
    torch.testing.assert_close(got, bound(0.0) - rows * each, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(torch.autograd.grad(got.sum(), rows)[0], -each, rtol=1e-6, atol=1e-6)
    assert torch.equal(bound(rows, terms=True).kl, each)


def test_tensor_weights_of_the_kl_are_not_read():
    """A tensor β is never read, which would synchronise a GPU; on the meta device reading raises."""
    x, mu, logvar = (torch.zeros(B, n, device="meta") for n in (X, 3, 3))
    decoder = torch.nn.Linear(3, X, device="meta")
    for options in (
        {"beta": torch.ones((), device="meta")},
        {"beta": torch.ones(B, device="meta")},
        {"beta": torch.tensor(0.3)},
        {"free_bits": torch.ones((), device="meta")},
    ):
        assert fastvae.elbo(x, (mu, logvar), decoder, likelihood="bernoulli", **options).is_meta


def test_free_bits_may_be_a_tensor(backend):
    encoder, decoder = models.networks(X, 3)
    x = randn(B, X, seed=23)

    def results(free_bits, *leaves):
        value = fastvae.elbo(x, encoder(x), decoder, free_bits=free_bits, generator=generator(1))
        return value, *torch.autograd.grad(value, [*leaves, *encoder.parameters()])

    free = torch.tensor(0.1, device=DEVICE, requires_grad=True)
    value, slope, *grads = results(free, free)
    for got, expected in zip((value, *grads), results(0.1), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)
    kl = fastvae.ops.rsample_kl(*encoder(x), per_dimension=True)[1].mean(0)
    assert float(slope) == -int((kl < 0.1).sum())


def test_gaussian_scale_is_a_standard_deviation():
    """A number or a tensor per pixel, fixed, learned or computed, gives Normal(mean, scale)."""
    k, x, mean = 4, randn(B, X, seed=25, dtype=torch.float64), randn(4, B, X, seed=26, dtype=torch.float64)
    row = rand(X, seed=27, dtype=torch.float64) + 0.5
    number = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    for scale, learned in ((0.3, False), (number, False), (row, False), (number, True), (row, True)):
        likelihood = Gaussian(scale=scale, learned=learned)
        got = likelihood.log_likelihood(x, mean.reshape(k * B, X), k)
        torch.testing.assert_close(got, td.Normal(mean, scale).log_prob(x).sum(2), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(likelihood.scale, scale)
    computed = row.clone().requires_grad_()
    (got,) = torch.autograd.grad(
        Gaussian(computed).log_likelihood(x, mean.reshape(k * B, X), k).sum(), computed
    )
    (expected,) = torch.autograd.grad(td.Normal(mean, computed).log_prob(x).sum(), computed)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# Gradient estimators.


def _replicated_gradients(
    model, estimator: str, k: int, replicates: int, shift: float, stretch: float, seed: int
):
    """Return independent draws [replicates, 2 D] of the encoder's gradient for one x.

    Rows have independent noise, so the gradient of a sum over equal rows is a draw per row.
    """
    x = model.sample(1).expand(replicates, -1)
    mu, logvar = (p.clone().requires_grad_() for p in model.posterior(x, shift, stretch))
    bound = fastvae.iwae(
        x, (mu, logvar), model.decoder, k=k, likelihood=model.likelihood, estimator=estimator,
        reduction="sum", generator=generator(seed),
    )  # fmt: skip
    return torch.cat(torch.autograd.grad(bound, (mu, logvar)), dim=1)


def _largest_score(sample) -> float:
    """Return the largest |mean| in units of its standard error, over the columns."""
    return float((sample.mean(0) / (sample.std(0) / math.sqrt(sample.shape[0]))).abs().max())


def test_dreg_has_the_mean_of_iwae():
    model = LinearGaussian(D, X)
    draws = {e: _replicated_gradients(model, e, 4, 40_000, 0.8, -0.3, 30) for e in ("iwae", "dreg", "stl")}
    # Same noise, so the differences are paired; over 6 columns, 5 standard errors.
    assert _largest_score(draws["dreg"] - draws["iwae"]) < 5
    # The means themselves are far from zero, or the comparison would be trivial.
    assert _largest_score(draws["iwae"]) > 50
    assert _largest_score(draws["dreg"]) > 50


def test_stl_is_unbiased_for_one_sample_and_biased_for_more():
    model = LinearGaussian(D, X)
    for k, biased in ((1, False), (4, True)):
        iwae, stl = (_replicated_gradients(model, e, k, 40_000, 0.8, -0.3, 31) for e in ("iwae", "stl"))
        score = _largest_score(stl - iwae)
        assert score > 10 if biased else score < 5
        assert _largest_score(iwae) > 50


def test_dreg_of_one_sample_is_stl():
    model = LinearGaussian(D, X)
    dreg, stl = (_replicated_gradients(model, e, 1, B, 0.8, -0.3, 32) for e in ("dreg", "stl"))
    torch.testing.assert_close(dreg, stl, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("k", [1, 4])
def test_path_gradients_vanish_at_the_exact_posterior(backend, k):
    """Path gradients vanish in every sample, as log w is constant in z; the score term does not."""
    model = LinearGaussian(D, X)
    for estimator in ("stl", "dreg", "iwae"):
        gradient = _replicated_gradients(model, estimator, k, B, 0.0, 0.0, 33)
        if estimator == "iwae":
            assert float(gradient.abs().min()) > 1e-5
        else:
            # Terms of size up to (x - mean) W / s^2 < 50 that cancel, a few hundred roundings.
            assert float(gradient.abs().max()) < 1e-12


def test_signal_to_noise_slopes():
    """The encoder's signal-to-noise ratio scales as K^-1/2 for iwae and as K^+1/2 for dreg."""
    model = LinearGaussian(2, 3, dtype=torch.float32)
    ks, replicates = (4, 16, 64, 256), 3000
    log_ratio = {"iwae": [], "dreg": []}
    for k in ks:
        # q is so close to the posterior, and wider, that K = 4 is nearly asymptotic: the weights' variance is
        # 0.25.
        iwae, dreg = (
            _replicated_gradients(model, e, k, replicates, 0.3, 0.3, 34).double() for e in ("iwae", "dreg")
        )
        # A common mean (equality is tested above), from the less noisy estimator, to 5 % or better.
        signal = dreg.mean(0).abs()
        assert bool((signal > 20 * dreg.std(0) / math.sqrt(replicates)).all())
        for name, sample in (("iwae", iwae), ("dreg", dreg)):
            log_ratio[name].append((signal / sample.std(0)).log())
    log_k = torch.tensor(ks, dtype=torch.float64, device=DEVICE).log()
    centred = log_k - log_k.mean()
    for name, slope in (("iwae", -0.5), ("dreg", 0.5)):
        fit = (centred[:, None] * torch.stack(log_ratio[name])).sum(0) / (centred**2).sum()
        # Signal and deviation are accurate to 5 %, over a span of log 64 = 4.2: 0.02 of noise. The rest is
        # curvature at small K.
        assert float((fit - slope).abs().max()) < 0.1, (name, fit)


@pytest.mark.parametrize("estimator", ["iwae", "dreg", "stl"])
@pytest.mark.parametrize("prior", PRIORS)
def test_estimators_equal_the_textbook(backend, estimator, prior):
    """Values and all gradients equal those of a surrogate loss in plain PyTorch on the same noise."""
    k = 4
    mu, logvar, parts, _ = _latents(prior)
    leaves = [t.clone().requires_grad_() for t in (mu, logvar, *(parts or ()))]
    weight = randn(D, X, seed=35, dtype=torch.float64).requires_grad_()
    x = randn(B, X, seed=36, dtype=torch.float64)
    bound = fastvae.iwae(
        x, tuple(leaves[:2]), lambda z: torch.tanh(z @ weight), k=k, likelihood=Gaussian(scale=1.3),
        prior=DiagonalNormal(*leaves[2:]) if parts else None, estimator=estimator, reduction="none",
        generator=generator(37),
    )  # fmt: skip
    # Rows have different weights in the loss, to detect a wrong scale per row.
    upstream = randn(B, seed=38, dtype=torch.float64)
    got = torch.autograd.grad(bound @ upstream, [*leaves, weight])

    def log_weights(detached):
        log_likelihood = lambda z: td.Normal(torch.tanh(z @ weight), 1.3).log_prob(x).sum(2)  # noqa: E731
        return models.textbook_log_weights(
            x, *leaves[:2], log_likelihood, k, seed_of(37), tuple(leaves[2:]) if parts else None, detached
        )

    exact = torch.logsumexp(log_weights(False), 0) - math.log(k)
    torch.testing.assert_close(bound, exact, rtol=1e-12, atol=1e-12)
    log_w = log_weights(estimator != "iwae")
    normalised = torch.softmax(log_w.detach(), 0)
    power = 2 if estimator == "dreg" else 1
    to_q = torch.autograd.grad((normalised**power * log_w).sum(0) @ upstream, leaves[:2])
    # The decoder's and the prior's gradients are always the bound's.
    to_model = torch.autograd.grad(exact @ upstream, [*leaves[2:], weight])
    for actual, expected in zip(got, (*to_q, *to_model), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_estimators_change_neither_the_value_nor_decoder_and_prior(likelihood):
    """Estimators leave the rest unchanged bit for bit, or to roundings where each has its own kernel."""
    k, x = 4, rand(B, X, seed=40)
    results = {}
    for estimator in ("iwae", "dreg", "stl"):
        encoder, decoder = models.networks(X, D, likelihood)
        prior = DiagonalNormal(torch.nn.Parameter(randn(D, seed=41)), torch.nn.Parameter(randn(D, seed=42)))
        bound = fastvae.iwae(
            x,
            encoder(x),
            decoder,
            k=k,
            likelihood=likelihood,
            prior=prior,
            estimator=estimator,
            generator=generator(43),
        )
        bound.backward()
        results[estimator] = [bound.detach()] + [p.grad for p in (*decoder.parameters(), *prior.parameters())]
        results[estimator + " encoder"] = encoder.linear.weight.grad
    for estimator in ("dreg", "stl"):
        for actual, expected in zip(results[estimator], results["iwae"], strict=True):
            near = 2e-6 if DEVICE.type == "cuda" else 0
            torch.testing.assert_close(actual, expected, rtol=near, atol=near)
        assert not torch.allclose(results[f"{estimator} encoder"], results["iwae encoder"], rtol=1e-2)


# Options of the ELBO.


def _elbo(**options):
    """Return an ELBO of fixed inputs and noise, and the leaves mu and logvar."""
    mu, logvar = (randn(B, D, seed=s, dtype=torch.float64).requires_grad_() for s in (50, 51))
    weight = randn(D, X, seed=52, dtype=torch.float64)
    x = rand(B, X, seed=53, dtype=torch.float64)
    result = fastvae.elbo(
        x, (mu, logvar), lambda z: z @ weight, likelihood="bernoulli", generator=generator(54), **options
    )
    return result, mu, logvar


def test_terms_add_up():
    for options in (
        {},
        {"beta": 0.25},
        {"beta": 0.0},
        {"kl": "mc", "k": 4},
        {"free_bits": 0.7, "beta": 3.0},
    ):
        terms, *_ = _elbo(terms=True, **options)
        bound, *_ = _elbo(reduction="none", **options)
        assert torch.equal(terms.bound, bound)
        assert terms.bound.shape == terms.log_likelihood.shape == terms.kl.shape == (B,)
        beta = options.get("beta", 1.0)
        torch.testing.assert_close(
            terms.bound, terms.log_likelihood - beta * terms.kl, rtol=1e-14, atol=1e-14
        )


def test_beta_scales_only_the_kl():
    one, *_ = _elbo(terms=True)
    four, *_ = _elbo(terms=True, beta=4.0)
    assert torch.equal(one.kl, four.kl)
    assert torch.equal(one.log_likelihood, four.log_likelihood)
    torch.testing.assert_close(one.bound - four.bound, 3 * one.kl, rtol=1e-13, atol=1e-13)


def test_samples_are_averaged():
    """The log-likelihood of L draws is the mean of the single ones; the analytic KL does not depend on L."""
    samples = 4
    terms, mu, logvar = _elbo(terms=True, k=samples)
    single, *_ = _elbo(terms=True)
    assert torch.equal(terms.kl, single.kl)
    eps = fastvae.random.normal(seed_of(54), samples, B, D, dtype=torch.float64)
    logits = (mu + torch.exp(0.5 * logvar) * eps) @ randn(D, X, seed=52, dtype=torch.float64)
    x = rand(B, X, seed=53, dtype=torch.float64)
    each = (x * logits - torch.nn.functional.softplus(logits)).sum(2)
    torch.testing.assert_close(terms.log_likelihood, each.mean(0), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(single.log_likelihood, each[0], rtol=1e-13, atol=1e-13)


def test_free_bits_is_kingmas_batch_variant():
    """The KL term is the sum over dimensions of max(floor, the batch's mean KL), equal for every example."""
    plain, mu, logvar = _elbo(terms=True)
    kl = td.kl_divergence(td.Normal(mu, torch.exp(0.5 * logvar)), td.Normal(0.0, 1.0)).detach()
    means = kl.mean(0)
    # A floor between the dimensions' means, with some examples on its other side, to tell it from the variant
    # per example.
    floor = float(means.sort().values[:2].mean())
    below = means < floor
    assert below.any() and not below.all()
    assert bool((kl[:, below] > floor).any()) or bool((kl[:, ~below] < floor).any())
    terms, mu, logvar = _elbo(terms=True, free_bits=floor)
    expected = torch.where(below, floor, means).sum()
    torch.testing.assert_close(terms.kl, expected.expand(B), rtol=1e-13, atol=1e-13)
    assert torch.equal(terms.log_likelihood, plain.log_likelihood)
    # The KL's gradient: 0 below the floor, the mean's above.
    gradients = torch.autograd.grad(terms.kl.mean(), (mu, logvar))
    expected = (mu.detach() / B, 0.5 * torch.expm1(logvar.detach()) / B)
    for got, full in zip(gradients, expected, strict=True):
        assert float(got[:, below].abs().max()) == 0
        torch.testing.assert_close(got[:, ~below], full[:, ~below], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
def test_free_bits_of_each_example(tensor):
    """The KL term is each example's own sum over dimensions of max(floor, KL)."""
    plain, mu, logvar = _elbo(terms=True)
    kl = td.kl_divergence(td.Normal(mu, torch.exp(0.5 * logvar)), td.Normal(0.0, 1.0)).detach()
    floor = float(kl.median()) + 1e-3
    below = kl < floor
    assert below.any() and not below.all()
    # Some examples are on the other side than their dimension's mean, unlike in the batch variant.
    assert bool((below != (kl.mean(0) < floor)).any())
    free_bits = torch.tensor(floor, dtype=torch.float64, device=DEVICE) if tensor else floor
    terms, mu, logvar = _elbo(terms=True, free_bits=free_bits, free_bits_per="example")
    torch.testing.assert_close(terms.kl, torch.where(below, floor, kl).sum(1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(terms.bound, terms.log_likelihood - terms.kl, rtol=1e-13, atol=1e-13)
    assert torch.equal(terms.log_likelihood, plain.log_likelihood)
    gradients = torch.autograd.grad(terms.kl.sum(), (mu, logvar))
    expected = mu.detach(), 0.5 * torch.expm1(logvar.detach())
    for got, full in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, torch.where(below, 0.0, full), rtol=1e-12, atol=1e-14)


def test_free_bits_of_an_example_do_not_depend_on_the_others():
    whole = _elbo(free_bits=0.4, free_bits_per="example", terms=True)[0]
    x, weight = rand(B, X, seed=53, dtype=torch.float64), randn(D, X, seed=52, dtype=torch.float64)
    mu, logvar = (randn(B, D, seed=s, dtype=torch.float64)[2:] for s in (50, 51))
    part = fastvae.elbo(
        x[2:], (mu, logvar), lambda z: z @ weight, likelihood="bernoulli", generator=generator(54),
        free_bits=0.4, free_bits_per="example", terms=True, row_offset=2,
    )  # fmt: skip
    for name in ("bound", "log_likelihood", "kl"):
        got, expected = getattr(part, name), getattr(whole, name)
        torch.testing.assert_close(got, expected[2:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("per", ["batch", "example"])
def test_free_bits_below_every_kl_have_no_effect(per):
    plain, *_ = _elbo()
    low, *_ = _elbo(free_bits=1e-6, free_bits_per=per)
    torch.testing.assert_close(low, plain, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("objective", ["elbo", "elbo mc", "iwae"])
def test_objectives_agree_across_backends(objective):
    """Values and gradients of every backend agree in float32; the normals are equal to a few ulps."""
    k = 4
    outcomes = {}
    for backend in ("native", "triton", "reference"):
        encoder, decoder = models.networks(X, D)
        x = randn(B, X, seed=60)
        with fastvae.use_backend(backend):
            if objective == "iwae":
                bound = fastvae.iwae(x, encoder(x), decoder, k=k, estimator="dreg", generator=generator(61))
            else:
                kind = "mc" if objective == "elbo mc" else "analytic"
                bound = fastvae.elbo(x, encoder(x), decoder, k=k, kl=kind, generator=generator(61))
            bound.backward()
        outcomes[backend] = [bound.detach(), *(p.grad for n in (encoder, decoder) for p in n.parameters())]
    for backend in ("native", "triton"):
        for actual, expected in zip(outcomes[backend], outcomes["reference"], strict=True):
            # 32 eps of the largest entry: sums of about K B X = 140 terms, each accurate to a few ulps, with
            # errors of random sign.
            tolerance = 32 * torch.finfo(torch.float32).eps * float(expected.abs().max().clamp(min=1))
            assert float((actual - expected).abs().max()) <= tolerance, backend


def test_device_is_used():
    """The tests above ran on the device under test."""
    assert randn(1, seed=0).device.type == DEVICE.type
