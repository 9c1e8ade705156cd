"""Annealed importance sampling on models of known log p(x): bounds from both sides, and the audit."""

from __future__ import annotations

import functools
import importlib
import math

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch import distributions as td

import fastvae
from fastvae.core.nested import Conditioning
from fastvae.core.options import STARTS
from fastvae.distributions import (
    DiagonalNormal,
    Distribution,
    FullNormal,
    Hierarchy,
    Laplace,
    Level,
    Mixture,
    NormalMixture,
)
from fastvae.estimation.audit.annealing import Annealing, Settings, simulate
from fastvae.estimation.evaluation.audit import Sample
from fastvae.estimation.stream import Chunks
from fastvae.inputs.batch import Inputs
from fastvae.likelihoods import Gaussian, Joint, NegativeBinomial, Poisson

from .conftest import DEVICE
from .models import LinearGaussian, evaluate_parts, generator, networks, rand, randn, seed_of
from .test_families import PAIRS, POSTERIORS, PRIORS, Parameters

pytestmark = pytest.mark.usefixtures("one_thread")

B, D, X, C = 5, 3, 7, 4


@pytest.fixture(autouse=True)
def same_networks():
    """Fix the networks, so that comparisons with a standard error do not vary between runs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        yield


def _settings(steps=20, chains=C, leapfrog=2, start="posterior", chunk=None):
    return Settings(steps, chains, leapfrog, start, Chunks(chunk))


def _chains_of(model, x, q, **settings):
    inputs = Inputs.read(x, q, model.decoder, model.likelihood, None)
    return Annealing(inputs, seed_of(5), _settings(**settings))


def _exact_draws(model, x, seed=6):
    mu, logvar = model.posterior(x)
    return mu + torch.exp(0.5 * logvar) * randn(*mu.shape, seed=seed, dtype=mu.dtype)


# Truth


@torch.no_grad()
@pytest.mark.parametrize("start", STARTS)
def test_weights_are_unbiased_forward_and_backward(start, monkeypatch):
    """E[w] = p(x) forward and E[1/w] = 1/p(x) backward, for an inexact q and 4000 copies of one x.

    The bounds enclose the truth, and more temperatures bring them together. The temperatures are unevenly
    spaced, so that their order matters.
    """
    monkeypatch.setattr(
        "fastvae.estimation.audit.annealing.temperatures", lambda n: [(t / n) ** 2 for t in range(n + 1)]
    )
    model, n = LinearGaussian(2, X), 4000
    x = model.sample(1).expand(n, X)
    exact, q = model.log_px(x), model.posterior(x, 0.5, 0.4)
    gaps = []
    for steps in (3, 30):
        a = _chains_of(model, x, q, steps=steps, chains=1, leapfrog=2, start=start)
        forward, back = a.forward().log_w[0], a.reverse(_exact_draws(model, x)).log_w[0]
        for log_w in (forward - exact, exact - back):
            ratio = log_w.exp()
            assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / math.sqrt(n)
        # By Jensen's inequality the logarithms lie on either side, by far more than their errors.
        error = math.sqrt(float(forward.var() + back.var()) / n)
        if steps == 3:
            assert float((exact - forward).mean()) > 5 * error
            assert float((back - exact).mean()) > 5 * error
        gaps.append(float((back - forward).mean()))
    assert gaps[1] < 0.3 * gaps[0]


@torch.no_grad()
def test_every_weight_is_exact_from_the_exact_posterior():
    model = LinearGaussian(D, X)
    x = model.sample(B)
    a = _chains_of(model, x, model.posterior(x))
    exact = model.log_px(x)
    for run in (a.forward(), a.reverse(_exact_draws(model, x))):
        torch.testing.assert_close(run.log_w, exact.expand(C, B), rtol=1e-11, atol=1e-11)


@torch.no_grad()
@pytest.mark.parametrize("mixture", [False, True])
def test_a_single_step_is_importance_sampling(mixture):
    """A single step with the same draws gives log_marginal's log p(x); a mixture's strata are weighted."""
    model = LinearGaussian(D, X)
    x = model.sample(B)
    q, options = model.posterior(x, 0.3, 0.2), {"likelihood": model.likelihood}
    if mixture:
        q = Mixture([q, model.posterior(x, 1.0, 0.5)], torch.tensor([1.0, -1.0]).double())
    result = fastvae.audit.ais(x, q, model.decoder, steps=1, k=40, generator=generator(1), **options)
    expected = fastvae.log_marginal(x, q, model.decoder, k=40, generator=generator(1), **options)
    for name in ("log_px", "log_px_stderr", "ess"):
        torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=1e-10, atol=1e-10)
    assert bool(result.acceptance.isnan().all())


@torch.no_grad()
def test_accurate_where_importance_sampling_is_wrong():
    """Estimates are accurate for a q half as wide as the posterior and 3 of its widths off."""
    model = LinearGaussian(D, X)
    x = model.sample(20)
    exact, q = model.log_px(x), model.posterior(x, 1.5, -1.4)
    options = {"likelihood": model.likelihood, "generator": generator(2)}
    plain = fastvae.log_marginal(x, q, model.decoder, k=1000, **options)
    result = fastvae.audit.ais(x, q, model.decoder, steps=200, k=16, **options)
    # Low by the mean of 20 biases, whose spread is far smaller.
    assert float((exact - plain.log_px).mean()) > 0.3
    assert abs(float((exact - result.log_px).mean())) < 0.1
    score = (result.log_px - exact) / result.log_px_stderr
    assert float((score.abs() < 4).double().mean()) >= 0.9
    assert bool(((result.acceptance > 0.55) & (result.acceptance < 0.85)).all())
    assert bool(((result.ess > 1) & (result.ess <= 16)).all())


# Transitions


@torch.no_grad()
def test_trajectories_are_reversible():
    """A trajectory with reversed momentum returns, so transitions are reversible; it preserves volume."""
    model = LinearGaussian(2, X)
    x = model.sample(1)
    a = _chains_of(model, x, model.posterior(x, 0.5, 0.3), steps=2, chains=1, leapfrog=3)
    size, beta = torch.full((1,), 0.7, dtype=torch.float64), 0.4

    def trajectory(z, momentum):
        """Return the end point of a transition that the given noise always accepts."""
        noise = torch.cat([momentum, torch.tensor([0.0, -8.0], dtype=torch.float64)])[None, None]
        point, _ = a._move(a._at(z[None, None]), beta, size, noise)
        return point.z[0, 0]

    def ended(z, momentum):
        """Return the end's position and its momentum, reversed so that it leads back."""
        step, end = size * a.scale[0], (z, momentum)
        for _ in range(3):
            z, momentum = end
            momentum = momentum + 0.5 * step * a._at(z[None, None]).slope(beta)[0, 0]
            z = z + step * momentum
            end = z, momentum + 0.5 * step * a._at(z[None, None]).slope(beta)[0, 0]
        return end

    z, momentum = randn(2, seed=7, dtype=torch.float64), randn(2, seed=8, dtype=torch.float64)
    there, with_momentum = ended(z, momentum)
    torch.testing.assert_close(trajectory(z, momentum), there, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(trajectory(there, -with_momentum), z, rtol=1e-12, atol=1e-12)
    h = 1e-5
    columns = []
    for i in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[i] = h
        ends = [torch.cat(ended(z + s * step[:2], momentum + s * step[2:])) for s in (1, -1)]
        columns.append((ends[0] - ends[1]) / (2 * h))
    assert float(torch.linalg.det(torch.stack(columns))) == pytest.approx(1, abs=1e-8)


@torch.no_grad()
@pytest.mark.parametrize("beta", [0.3, 0.8])
def test_a_transition_leaves_its_distribution_invariant(beta):
    """A transition from exact draws of π_β, a normal, keeps the moments.

    The acceptance rate is well inside (0, 1), so that the test is not trivial.
    """
    model, n = LinearGaussian(2, X), 20_000
    x = model.sample(1)
    q = model.posterior(x, 1.0, 0.7)
    a = _chains_of(model, x, q, steps=2, chains=1, leapfrog=2)
    mu, logvar = (v[0] for v in model.posterior(x))
    precision = (1 - beta) * (-q[1][0]).exp() + beta * (-logvar).exp()
    mean = ((1 - beta) * q[0][0] * (-q[1][0]).exp() + beta * mu * (-logvar).exp()) / precision
    z = mean + precision.rsqrt() * randn(n, 1, 2, seed=9, dtype=torch.float64)
    size = torch.full((1,), 1.3, dtype=torch.float64)
    point, probability = a._move(a._at(z), beta, size, randn(n, 1, 4, seed=10, dtype=torch.float64))
    moved = (point.z != z).all(-1).double().mean()
    assert 0.2 < float(moved) < 0.97
    assert abs(float(moved - probability.mean())) < 5 / math.sqrt(n)
    white = ((point.z - mean) * precision.sqrt())[:, 0]
    assert float(white.mean(0).abs().max()) < 5 / math.sqrt(n)
    assert float((white.square().mean(0) - 1).abs().max()) < 5 * math.sqrt(2 / n)
    assert abs(float((white[:, 0] * white[:, 1]).mean())) < 5 / math.sqrt(n)


def test_gradients_equal_those_of_the_densities_and_reach_no_parameter():
    encoder, decoder = networks(X, D, dtype=torch.float64)
    prior = DiagonalNormal(nn.Parameter(randn(D, seed=1).double()), nn.Parameter(torch.zeros(D)))
    prior = prior.to(DEVICE)
    x = randn(B, X, seed=2, dtype=torch.float64)
    inputs = Inputs.read(x, encoder(x), decoder, "gaussian", prior)
    with torch.no_grad():
        a = Annealing(inputs, seed_of(1), _settings(steps=3))
        a.forward()
        z = randn(C, B, D, seed=3, dtype=torch.float64)
        point = a._at(z)
        for name, slope in (("base", point.slope_base), ("joint", point.slope_joint)):
            for d in range(D):
                step = torch.zeros(D, dtype=torch.float64, device=DEVICE)
                step[d] = 1e-6
                ends = [getattr(a._at(z + s * step), name) for s in (1, -1)]
                torch.testing.assert_close(slope[..., d], (ends[0] - ends[1]) / 2e-6, rtol=1e-5, atol=1e-7)
    parts = [*encoder.parameters(), *decoder.parameters(), *prior.parameters()]
    assert all(p.grad is None and p.requires_grad for p in parts)


# The address of noise


@torch.no_grad()
@pytest.mark.parametrize("family", ["diagonal", "full"])
@pytest.mark.parametrize("start", STARTS)
def test_results_do_not_depend_on_chunks_rows_or_batches(start, family):
    """Nor for a family whose scale is estimated from draws."""
    model = LinearGaussian(D, X)
    x = model.sample(B)
    mu, logvar = model.posterior(x, 0.5, 0.3)
    tril = 0.3 * randn(B, D * (D + 1) // 2, seed=2, dtype=mu.dtype)
    options = {"steps": 15, "k": 6, "start": start, "likelihood": model.likelihood}

    def estimate(rows=slice(None), **more):
        q = (mu[rows], logvar[rows]) if family == "diagonal" else FullNormal(mu[rows], tril[rows])
        more = {"generator": generator(3), **options, **more}
        return fastvae.audit.ais(x[rows], q, model.decoder, **more)

    whole = estimate()
    for other in (estimate(k_chunk=1), estimate(k_chunk=4)):
        for a, b in zip(vars(whole).values(), vars(other).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    part = estimate(slice(2, 4), row_offset=2)
    for a, b in zip(vars(whole).values(), vars(part).values(), strict=True):
        torch.testing.assert_close(a[2:4], b, rtol=1e-10, atol=1e-10)
    other = estimate(generator=generator(4))
    assert bool((other.log_px != whole.log_px).all())


@torch.no_grad()
def test_no_noise_is_used_twice(monkeypatch):
    """Each chain and transition of pilot, forward and backward runs has a unique address, in any chunks."""
    drawn, used = Annealing._noise, []

    def noise(self, level, transition, chains):
        used.extend((level, transition * chains + i) for i in range(chains))
        return drawn(self, level, transition, chains)

    monkeypatch.setattr(Annealing, "_noise", noise)
    model = LinearGaussian(D, X)
    x = model.sample(B)
    inputs = Inputs.read(x, model.posterior(x), model.decoder, model.likelihood, None)
    chains = Annealing(inputs, seed_of(1), _settings(steps=6, chains=7, chunk=3))
    chains.bounds(_exact_draws(model, x))
    assert len(used) == len(set(used)) == 5 * (2 + 7 + 7)
    assert min(level for level, _ in used) > 2**31  # no hierarchy's


# Families, likelihoods, masks, sizes and contexts


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("q", "p"), [p for p in PAIRS if "standard" in p or p[0] in ("diagonal", "mixture")])
def test_any_posterior_with_any_prior(q, p):
    """Close to very many plain draws for any families; a mixture's strata are weighted."""
    posterior, prior = POSTERIORS[q](Parameters()), PRIORS[p](Parameters())
    x = (randn(B, X, seed=7) > 0).double()
    weight = randn(D, X, seed=6).double()
    options = {"prior": prior, "likelihood": "bernoulli", "generator": generator(1)}

    def decoder(z):
        return torch.tanh(z) @ weight

    with torch.no_grad():
        result = fastvae.audit.ais(x, posterior, decoder, steps=20, k=32, **options)
        plain = fastvae.log_marginal(x, posterior, decoder, k=4000, **options)
    spread = (result.log_px_stderr.square() + plain.log_px_stderr.square()).sqrt()
    assert bool(((result.log_px - plain.log_px).abs() < 6 * spread + 0.02).all())


@torch.no_grad()
def test_masks_size_factors_and_contexts():
    """A mask excludes elements, a size factor scales the mean, and the context reaches the decoder."""
    x, q = torch.poisson(3 * rand(B, X, seed=1)), (randn(B, D, seed=2), randn(B, D, seed=3))
    mask, size, context = rand(B, X, seed=4) > 0.3, 1 + rand(B, seed=5), randn(B, X, seed=6)
    linear = nn.Linear(D, X).to(DEVICE)
    options = {"likelihood": "poisson", "mask": mask, "size_factor": size, "context": context}

    def decoder(z, context):
        return linear(z) + context

    x = torch.where(mask, x, math.nan)
    result = fastvae.audit.ais(x, q, decoder, steps=1, k=30, generator=generator(1), **options)
    expected = fastvae.log_marginal(x, q, decoder, k=30, generator=generator(1), **options)
    torch.testing.assert_close(result.log_px, expected.log_px.double(), rtol=1e-5, atol=1e-5)
    many = fastvae.log_marginal(x, q, decoder, k=20_000, generator=generator(1), **options)
    result = fastvae.audit.ais(x, q, decoder, steps=30, k=30, generator=generator(1), **options)
    spread = (result.log_px_stderr.square() + many.log_px_stderr.square()).sqrt()
    assert bool(((result.log_px - many.log_px).abs() < 5 * spread).all())


@torch.no_grad()
def test_latents_of_several_axes_and_joint_likelihoods():
    pixels, counts = nn.Linear(4, 6).to(DEVICE), nn.Linear(4, X).to(DEVICE)

    def decoder(z):
        assert z.shape[1:] == (1, 2, 2)
        return {"pixels": pixels(z.flatten(1)), "counts": counts(z.flatten(1))}

    joint = Joint(pixels="bernoulli", counts="poisson")
    x = {"pixels": (rand(B, 6, seed=1) > 0.5).float(), "counts": torch.poisson(3 * rand(B, X, seed=2)).int()}
    q = torch.zeros(B, 1, 2, 2, device=DEVICE), torch.zeros(B, 1, 2, 2, device=DEVICE)
    options = {"likelihood": joint, "generator": generator(1)}
    many = fastvae.log_marginal(x, q, decoder, k=5000, **options)
    for chunk in (None, 7):
        result = fastvae.audit.ais(x, q, decoder, steps=20, k=30, k_chunk=chunk, **options)
        spread = (result.log_px_stderr.square() + many.log_px_stderr.square()).sqrt()
        assert bool(((result.log_px - many.log_px).abs() < 5 * spread).all())


def test_a_hierarchy():
    """The modules of a hierarchy's levels are called for each position of the chains."""
    hierarchy = Hierarchy(
        [
            Level(2, nn.Linear(X, 4)),
            Level(1, lambda h, z: (h[:, :1], 0 * h[:, :1]), prior=nn.Linear(2, 2)),
        ]
    ).to(DEVICE)
    decoder = nn.Linear(3, X).to(DEVICE)
    x = (rand(B, X, seed=1) > 0.5).float()
    options = {"likelihood": "bernoulli", "generator": generator(1)}
    result = fastvae.audit.ais(x, hierarchy(x), decoder, steps=20, k=32, **options)
    many = fastvae.log_marginal(x, hierarchy(x), decoder, k=5000, **options)
    spread = (result.log_px_stderr.square() + many.log_px_stderr.square()).sqrt()
    assert bool(((result.log_px - many.log_px).abs() < 5 * spread).all())
    assert all(p.grad is None for p in (*hierarchy.parameters(), *decoder.parameters()))
    bounds = fastvae.audit.bdmc(hierarchy, decoder, latent_dim=3, n=6, steps=30, prior=hierarchy, **options)
    assert bounds.lower.shape == bounds.upper.shape == (6,)


@torch.no_grad()
def test_chains_stay_within_a_bounded_support():
    """A trajectory that leaves the support, where torch's distributions raise, is rejected."""
    q = td.Uniform(torch.zeros(B, D).double(), 1.0, validate_args=True)
    prior = td.Independent(td.Uniform(torch.zeros(D).double(), 2.0, validate_args=True), 1)
    decoder, x = nn.Linear(D, X).double(), (rand(B, X, seed=1) > 0.5).double()
    options = {"likelihood": "bernoulli", "prior": prior, "generator": generator(1)}
    result = fastvae.audit.ais(x, q, decoder, steps=10, k=200, **options)
    many = fastvae.log_marginal(x, q, decoder, k=5000, **options)
    spread = (result.log_px_stderr.square() + many.log_px_stderr.square()).sqrt()
    assert bool(((result.log_px - many.log_px).abs() < 5 * spread).all())
    with pytest.raises(ValueError, match="within the support"):  # the user's object is unchanged
        q.log_prob(torch.full((B, D), -1.0).double())


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:fastvae. memory ran out:RuntimeWarning")
def test_out_of_memory_reduces_the_chains_per_chunk():
    model = LinearGaussian(D, X)
    x = model.sample(B)
    q, asked = model.posterior(x, 0.5, 0.3), []

    def decoder(z):
        asked.append(len(z))
        if len(z) > 2 * B:
            raise torch.OutOfMemoryError
        return model.decoder(z)

    options = {"steps": 5, "k": 8, "likelihood": model.likelihood}
    expected = fastvae.audit.ais(x, q, model.decoder, generator=generator(1), **options)
    with pytest.warns(RuntimeWarning, match=r"going on with 2 \(k_chunk=2 starts there\)"):
        result = fastvae.audit.ais(x, q, decoder, generator=generator(1), **options)
    torch.testing.assert_close(result.log_px, expected.log_px, rtol=1e-10, atol=1e-10)
    assert max(asked[-20:]) == 2 * B


def test_modules_run_in_eval_mode_and_are_restored():
    decoder = nn.Sequential(nn.Linear(D, X), nn.Dropout(0.5)).to(DEVICE)
    x, q = torch.ones(B, X, device=DEVICE), torch.zeros(B, 2 * D, device=DEVICE)
    options = {"steps": 5, "likelihood": "bernoulli"}
    first, again = (fastvae.audit.ais(x, q, decoder, generator=generator(1), **options) for _ in range(2))
    assert torch.equal(first.log_px, again.log_px)
    assert decoder.training
    assert decoder[1].training
    # A function's modules must be named, or be in eval mode already.
    function = lambda z: decoder(z)  # noqa: E731
    run = functools.partial(fastvae.audit.ais, x, q, function, generator=generator(1), **options)
    with pytest.raises(ValueError, match=r"returns another output.*modules=\[net\]"):
        run()
    named = fastvae.audit.ais(x, q, function, modules=[decoder], generator=generator(1), **options)
    assert torch.equal(named.log_px, first.log_px) and decoder.training
    with pytest.raises(TypeError, match="modules must be a list"):
        run(modules=decoder)
    with pytest.raises(ValueError, match=r"returns another output.*modules=\[net\]"):
        fastvae.audit.bdmc(nn.Linear(X, 2 * D), function, latent_dim=D, n=3, **options)
    encoder = nn.Sequential(nn.Linear(X, 2 * D), nn.Dropout(0.5)).to(DEVICE)
    vae = fastvae.VAE(encoder, function, latent_dim=D, modules=[decoder], likelihood="bernoulli")
    assert vae.bdmc(n=3, steps=5).lower.isfinite().all() and vae.ais(x, steps=5).log_px.isfinite().all()
    assert vae.training and decoder.training
    decoder.eval()
    assert torch.equal(run(generator=generator(1)).log_px, first.log_px)


@pytest.mark.parametrize("prior", [None, "Laplace"])
@pytest.mark.parametrize("entry", ["posterior", "prior", "bdmc", "audit"])
def test_a_decoder_that_changes_z_in_place(entry, prior):
    """A first layer in place changes a copy of the chains' z, and no density."""
    prior = prior and Laplace(torch.zeros(D, device=DEVICE), torch.zeros(D, device=DEVICE))
    encoder, layer = nn.Linear(X, 2 * D, device=DEVICE), nn.Linear(D, X, device=DEVICE)
    x, results = rand(B, X, seed=1).round(), []
    for inplace in (False, True):
        decoder = nn.Sequential(nn.LeakyReLU(0.2, inplace=inplace), layer)
        vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli", prior=prior, latent_dim=D)
        options = {"generator": generator(3)}
        if entry == "bdmc":
            results.append(vae.bdmc(n=B, k=C, steps=6, **options).lower)
        elif entry == "audit":
            found = vae.evaluate(x, k=60, audit=2, progress=False, **options)
            results.append(found.audit.difference)
        else:
            results.append(vae.ais(x, k=C, steps=6, start=entry, **options).log_px)
    assert torch.equal(*results)


@torch.no_grad()
def test_nan_propagates():
    decoder = nn.Linear(D, X).to(DEVICE)
    x, q = rand(B, X, seed=1), torch.zeros(B, 2 * D, device=DEVICE)
    x[2] = math.nan
    log_px = fastvae.audit.ais(x, q, decoder, steps=5, likelihood=Gaussian(scale=1.0)).log_px
    assert log_px.isnan().tolist() == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be at least 1"),
        ({"k": 1.5}, "k must be an int"),
        ({"leapfrog": 0}, "leapfrog must be at least 1"),
        ({"start": "encoder"}, "start='encoder' is unknown; known: 'posterior', 'prior'"),
        ({"k_chunk": 0}, "k_chunk must be at least 1"),
        ({"decoder": lambda z: torch.zeros(len(z), X)}, "log p\\(x\\|z\\) has no gradient for z"),
        (
            {"decoder": lambda z: torch.zeros(X, requires_grad=True) + z.detach().sum(1, keepdim=True)},
            "log p\\(x\\|z\\) has no gradient for z",
        ),
        (
            {"start": "prior", "prior": NormalMixture(torch.zeros(2, D), torch.zeros(2, D))},
            "start='prior' needs draws of the prior for each example",
        ),
    ],
)
def test_errors(options, message):
    decoder = options.pop("decoder", nn.Linear(D, X))
    options = {"likelihood": "bernoulli", **options}
    with pytest.raises((TypeError, ValueError), match=message):
        fastvae.audit.ais(torch.ones(B, X), torch.zeros(B, 2 * D), decoder, **options)


# Bounds from both sides


def test_bdmc_bounds_of_simulated_data():
    model = LinearGaussian(D, X)

    def encoder(x):
        return model.posterior(x, 0.5, 0.4)

    def decoder(z):
        return model.decoder(z.double())

    options = {"n": 200, "likelihood": model.likelihood, "k": 4}
    few, many = (
        fastvae.audit.bdmc(encoder, decoder, latent_dim=D, steps=steps, generator=generator(1), **options)
        for steps in (3, 100)
    )
    assert few.gap > many.gap > -4 * many.gap_stderr
    assert few.gap > 5 * few.gap_stderr
    assert many.gap < 0.3 * few.gap
    exact = fastvae.audit.bdmc(
        model.posterior, decoder, latent_dim=D, steps=3, likelihood=model.likelihood, generator=generator(1)
    )
    torch.testing.assert_close(exact.lower, exact.upper, rtol=1e-9, atol=1e-9)
    assert few.gap == pytest.approx(float((few.upper - few.lower).mean()), rel=1e-12)
    assert float(exact.lower.std()) > 0.1  # of several x
    again = fastvae.audit.bdmc(
        model.posterior, decoder, latent_dim=D, steps=3, likelihood=model.likelihood, generator=generator(1)
    )
    assert torch.equal(again.lower, exact.lower)


@pytest.mark.parametrize(
    ("shape", "conditional"), [((D,), False), ((D,), True), ((D, 1, 1), False), ((D, 1, 1), True)]
)
def test_bdmc_bounds_with_any_prior(shape, conditional):
    """Both bounds are log p(x) for the exact posterior, with shared and conditional priors of any shape."""
    model, n, made = LinearGaussian(D, X), 7, []
    latent_dim = shape if len(shape) > 1 else D
    shift = randn(n, D, seed=3, dtype=torch.float64) if conditional else randn(D, seed=3, dtype=torch.float64)

    def prior(context):
        mu = context.view(-1, *shape)
        return DiagonalNormal(mu, torch.zeros_like(mu))

    def encoder(x, context=shift):
        made.append(x)
        mu, logvar = model.posterior(x - context @ model.weight.T)
        return (mu + context).view(-1, *shape), logvar.view(-1, *shape)

    def decoder(z, context=None):
        assert z.shape[1:] == shape
        return model.decoder(z.flatten(1).double())

    if conditional:
        options = {"prior": prior, "context": shift}
    else:
        options = {"prior": DiagonalNormal(shift.view(shape), torch.zeros(shape).to(shift))}
    found = fastvae.audit.bdmc(
        encoder,
        decoder,
        latent_dim=latent_dim,
        n=n,
        steps=3,
        likelihood=model.likelihood,
        generator=generator(1),
        **options,
    )
    exact = model.log_px(made[0] - shift @ model.weight.T)
    torch.testing.assert_close(found.lower, exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.upper, found.lower, rtol=1e-9, atol=1e-9)
    if conditional:
        with pytest.raises(ValueError, match="context"):
            fastvae.audit.bdmc(
                encoder, decoder, latent_dim=latent_dim, n=n + 1, likelihood=model.likelihood, **options
            )


def test_bdmc_requires_sampling_from_the_model():
    class Odd(Distribution):
        def log_prob(self, z):
            return -0.5 * z.square().sum(-1)

    encoder, decoder = nn.Linear(X, 2 * D), nn.Linear(D, X)
    with pytest.raises(NotImplementedError, match="Odd has no sample"):
        fastvae.audit.bdmc(encoder, decoder, latent_dim=D, n=3, steps=3, likelihood="bernoulli", prior=Odd())
    with pytest.raises(ValueError, match="latent_dim must be at least 1"):
        fastvae.audit.bdmc(encoder, decoder, latent_dim=0, likelihood="bernoulli")


@pytest.mark.parametrize("likelihood", ["poisson", Poisson(rate=True)])
@torch.no_grad()
def test_simulated_data_use_the_size_factors_and_context_of_a_batch(likelihood):
    """Simulated data use the batch's size factors and context; unobserved elements stay as they are."""
    n = 4000
    x = torch.full((n, X), math.nan, device=DEVICE)
    mask = (torch.arange(X, device=DEVICE) < 5).expand(n, X)
    size, context = torch.linspace(1, 3, n, device=DEVICE), torch.linspace(-1, 1, n, device=DEVICE)[:, None]
    x = torch.where(mask, 0.0, x)

    def decoder(z, context):
        log_rate = 0.3 * z[:, :1] + context.expand(-1, X)
        return log_rate if likelihood == "poisson" else log_rate.exp()

    q = torch.zeros(n, 2 * D, device=DEVICE)
    inputs = Inputs.read(x, q, decoder, likelihood, None, Conditioning(mask, size, context))
    z, made = simulate(inputs, D, torch.float32, generator(1))
    assert made.shape == x.shape
    assert bool((made.isnan() == ~mask).all())
    mean = size[:, None] * torch.exp(0.3 * z[:, :1] + context)
    score = ((made[:, :5] - mean) / mean.sqrt()).flatten()
    assert abs(float(score.mean())) < 5 / math.sqrt(5 * n)
    assert float(score.square().mean()) == pytest.approx(1, abs=5 * math.sqrt(3 / (5 * n)))


@torch.no_grad()
def test_simulated_data_of_several_parts_and_outputs():
    """Simulate several parts and outputs, each with its size factors, masks, dtype and shape.

    z comes from a prior with a row per example.
    """
    n = 4000
    size = torch.linspace(1, 3, n, device=DEVICE)
    mask = (torch.arange(X, device=DEVICE) < 5).expand(n, X)
    x = {
        "counts": torch.full((n, X), -7, device=DEVICE),
        "other": torch.zeros(n, 3, dtype=torch.int32, device=DEVICE),
        "bits": torch.zeros(n, 2, 2, device=DEVICE),
    }
    likelihood = Joint(counts="negative_binomial", other=NegativeBinomial(2.0), bits="bernoulli")

    def decoder(z, context):
        log_mean = 0.3 * z[:, :1] + context
        return {
            "counts": (log_mean.expand(-1, X), torch.full((len(z), X), math.log(4.0), device=DEVICE)),
            "other": log_mean.expand(-1, 3),
            "bits": (z[:, :1] + 1).expand(-1, 4).unflatten(1, (2, 2)),
        }

    context = torch.linspace(-1, 1, n, device=DEVICE)[:, None]

    def prior(context):
        return FullNormal.of(5 * context.expand(-1, D), torch.eye(D, device=DEVICE).expand(n, D, D))

    conditioning = Conditioning({"counts": mask}, {"counts": size, "other": size}, context)
    inputs = Inputs.read(x, torch.zeros(n, 2 * D, device=DEVICE), decoder, likelihood, prior, conditioning)
    z, made = simulate(inputs, D, torch.float32, generator(1))
    assert abs(float((z - 5 * context).mean())) < 5 / math.sqrt(n * D)
    assert float((z - 5 * context).var()) == pytest.approx(1, abs=5 * math.sqrt(2 / (n * D)))
    assert all(made[name].dtype == part.dtype and made[name].shape == part.shape for name, part in x.items())
    assert bool((made["counts"] == -7)[~mask].all()) and not bool((made["counts"] == -7)[mask].any())
    mean = size[:, None] * torch.exp(0.3 * z[:, :1] + context)
    for drawn, theta in ((made["counts"][:, :5], 4.0), (made["other"], 2.0)):
        score = (drawn - mean) / (mean + mean.square() / theta).sqrt()
        each = score.square().mean(1)
        assert abs(float(score.mean())) < 5 / math.sqrt(score.numel())
        assert abs(float(each.mean()) - 1) < 5 * float(each.std()) / math.sqrt(n)
    score = (made["bits"] - torch.sigmoid(z[:, :1, None] + 1)).flatten(1).mean(1)
    assert abs(float(score.mean())) < 5 * float(score.std()) / math.sqrt(n)


# The audit


N = 37


def _narrow(model):
    """Return a q that is far too narrow, whose few draws cannot reveal the missing mass."""
    return lambda x: model.posterior(x, 1.0, -3.0)


def _evaluate(model, q, x, **options):
    options = {
        "k": 50,
        "likelihood": model.likelihood,
        "generator": generator(1),
        "progress": False,
        **options,
    }
    return evaluate_parts(q, model.decoder, x, **options)


def test_audit_detects_that_importance_sampling_is_biased_low():
    model = LinearGaussian(D, X)
    x = model.sample(N)
    exact = model.log_px(x).cpu()
    result = _evaluate(model, _narrow(model), x, audit=12)
    audit = result.audit
    assert audit.examples.tolist() == sorted(set(audit.examples.tolist()))
    low = float((exact - result.log_px)[audit.examples].mean())
    assert low > 1
    # The standard deviation over seeds is 0.10.
    assert abs(audit.mean - low) < 0.4
    assert audit.mean > 5 * audit.stderr
    assert audit.largest[0] == float(audit.difference.max())
    assert audit.largest[1] == int(audit.examples[audit.difference.argmax()])
    assert audit.gap < 0.3
    assert f"log p(x) higher by {audit.mean:.2f} ± {audit.stderr:.2f} nats on average" in str(result)
    assert f"the largest difference {audit.largest[0]:.2f} nats (example {audit.largest[1]})" in str(result)
    assert "on 12 simulated examples" in str(result)
    # A good q passes the audit, which does not change the evaluation's numbers.
    plain = _evaluate(model, lambda x: model.posterior(x, 0.1, 0.1), x)
    result = _evaluate(model, lambda x: model.posterior(x, 0.1, 0.1), x, audit=12)
    assert torch.equal(plain.log_px, result.log_px)
    assert plain.audit is None
    assert "audit" not in str(plain)
    assert abs(result.audit.mean) < 0.05
    assert "BDMC gap 0.0" in str(result)


def test_audit_does_not_depend_on_the_batches(monkeypatch):
    module = importlib.import_module("fastvae.estimation.evaluation.audit")
    monkeypatch.setattr(module, "STEPS", 30)
    monkeypatch.setattr(module, "_BLOCK", 3)
    model = LinearGaussian(D, X)
    x = model.sample(N)

    def loader():
        yield from x.split(5)

    whole = _evaluate(model, _narrow(model), x, audit=5).audit
    for other in (
        _evaluate(model, _narrow(model), x, audit=5, batch_size=7).audit,
        _evaluate(model, _narrow(model), loader(), audit=5, k_chunk=3).audit,
    ):
        assert torch.equal(other.examples, whole.examples)
        for name in ("log_px", "log_px_stderr", "acceptance", "lower", "upper"):
            torch.testing.assert_close(getattr(other, name), getattr(whole, name), rtol=1e-9, atol=1e-9)


def test_audit_of_a_loader_that_reuses_its_buffer(monkeypatch):
    """The audit keeps copies of the batches it samples from."""
    monkeypatch.setattr(importlib.import_module("fastvae.estimation.evaluation.audit"), "STEPS", 10)
    model = LinearGaussian(D, X)
    x, buffer = model.sample(N), torch.empty(5, X, dtype=torch.float64, device=DEVICE)

    def loader():
        for part in x.split(5):
            buffer[: len(part)] = part
            yield buffer[: len(part)]

    expected = _evaluate(model, _narrow(model), iter(x.split(5)), audit=5).audit
    found = _evaluate(model, _narrow(model), loader(), audit=5).audit
    torch.testing.assert_close(found.log_px, expected.log_px)
    torch.testing.assert_close(found.difference, expected.difference)


@pytest.mark.parametrize("n", [1, 5, 6, 37, 100])
def test_audited_examples_are_evenly_spaced(n):
    count, x = 5, torch.arange(n)[:, None]
    chosen = []
    for size in (1, 3, n):
        sample = Sample(count)
        for start in range(0, n, size):
            sample.see(x[start : start + size], None, start)
        chosen.append(sample.examples)
        assert sample.batch(sample.examples)[0][:, 0].tolist() == sample.examples
    assert chosen[0] == chosen[1] == chosen[2]
    assert len(chosen[0]) == min(n, count)
    steps = np.diff(chosen[0])
    assert n <= count or (steps.min() >= n // count / 2 and steps.max() <= 2.1 * n / count)
    assert chosen[0][0] == 0
    assert chosen[0][-1] >= n - max(1, 2.1 * n / count)


def test_audit_with_masks_size_factors_and_context(tmp_path):
    """An audited example keeps its size factor and context, and the common mask; saved and loaded."""
    x = torch.poisson(3 * rand(N, X, seed=1)).int()
    size, context = 1 + rand(N, seed=5), randn(N, X, seed=6)
    mask = torch.tensor([True] * (X - 2) + [False] * 2, device=DEVICE)
    encoder, linear = nn.Linear(X, 2 * D).to(DEVICE), nn.Linear(D, X).to(DEVICE)
    batches = [(x[i : i + 9], size[i : i + 9], context[i : i + 9]) for i in range(0, N, 9)]
    result = evaluate_parts(
        lambda x, context: encoder(0.1 * x),
        lambda z, context: linear(z) + context,
        batches,
        k=500,
        likelihood="poisson",
        prepare_batch=lambda b: {"x": b[0], "size_factor": b[1], "context": b[2], "mask": mask},
        audit=6,
        generator=generator(1),
        progress=False,
    )
    assert abs(result.audit.mean) < 0.3
    assert abs(result.audit.gap) < 0.3
    file = tmp_path / "result.npz"
    result.save(file)
    again = fastvae.Evaluation.load(file)
    assert str(again) == str(result)
    for name in ("examples", "log_px", "log_px_stderr", "acceptance", "difference", "lower", "upper"):
        assert torch.equal(getattr(again.audit, name), getattr(result.audit, name))


def test_audit_reports_that_the_model_cannot_be_sampled(tmp_path):
    class Odd(Distribution):
        def log_prob(self, z):
            return -0.5 * (z.square() + math.log(2 * math.pi)).sum(-1)

    model = LinearGaussian(D, X)
    result = _evaluate(model, model.posterior, model.sample(N), audit=3, prior=Odd())
    assert len(result.audit.lower) == len(result.audit.upper) == 0
    assert "no BDMC: Odd has no sample" in str(result)
    file = tmp_path / "result.npz"
    result.save(file)
    assert str(fastvae.Evaluation.load(file)) == str(result)


def test_unsupported_audits_fail_before_evaluation():
    model = LinearGaussian(D, X)
    drawn = []

    class Counting(Gaussian):
        def log_likelihood(self, x, parameters, samples, conditioning=None):
            drawn.append(samples)
            return super().log_likelihood(x, parameters, samples, conditioning)

    with pytest.raises(ValueError, match="no gradient for z"):
        evaluate_parts(
            model.posterior,
            lambda z: model.decoder(z.detach()),
            model.sample(N),
            k=1000,
            likelihood=Counting(scale=model.scale),
            audit=3,
            progress=False,
        )
    assert sum(drawn) < 10
    for wrong in (-1, 2.5, True):
        with pytest.raises((TypeError, ValueError), match="audit must be"):
            _evaluate(model, model.posterior, model.sample(N), audit=wrong)


def test_a_vae_with_a_fused_last_layer():
    encoder, decoder = nn.Linear(X, 2 * D), nn.Sequential(nn.Linear(D, 9), nn.Tanh(), nn.Linear(9, X))
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli").to(DEVICE)
    x = (rand(N, X, seed=1) > 0.5).float()
    with pytest.raises(ValueError, match="latent dimension is not known yet"):
        vae.bdmc()
    result = vae.evaluate(x, k=2000, audit=4, generator=generator(1), progress=False)
    assert abs(result.audit.mean) < 0.1
    bounds = vae.bdmc(n=6, steps=50, generator=generator(1))
    assert bounds.gap < 0.3
    assert bounds.upper.shape == (6,)
    found = vae.ais(x, steps=50, generator=generator(1))
    exact = fastvae.audit.lattice(x, vae.decoder, latent_dim=D, likelihood="bernoulli")
    assert bool(
        ((found.log_px.cpu() - exact.log_px).abs() < 5 * found.log_px_stderr.cpu() + exact.error).all()
    )
    assert all(p.grad is None for p in vae.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_ranks_share_an_audit(tmp_path):
    """Two ranks in separate processes give one process's result, with a checkpoint."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    model = LinearGaussian(D, X)
    alone = _evaluate(model, _narrow(model), model.sample(N).cpu(), audit=5, batch_size=10)
    for rank in range(2):
        found = fastvae.Evaluation.load(tmp_path / f"{rank}.npz")
        torch.testing.assert_close(found.audit.log_px, alone.audit.log_px, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(found.audit.upper, alone.audit.upper, rtol=1e-9, atol=1e-9)


def _rank(rank, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = LinearGaussian(D, X)
    result = _evaluate(
        model, _narrow(model), model.sample(N).cpu(), audit=5, batch_size=10, checkpoint=f"{folder}/parts.npz"
    )
    result.save(f"{folder}/{rank}.npz")
    distributed.destroy_process_group()
