"""Lattices over few latents against models of known log p(x), and their error estimates."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import distributions as td
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae.distributions import DiagonalNormal, NormalMixture
from fastvae.estimation.audit import lattices
from fastvae.likelihoods import Gaussian, Joint

from .conftest import DEVICE
from .models import LinearGaussian, rand

pytestmark = pytest.mark.usefixtures("one_thread")

N, X = 23, 7


def _of(model, x, **options):
    return fastvae.audit.lattice(
        x, model.decoder, latent_dim=model.gain.numel(), likelihood=model.likelihood, **options
    )


@pytest.mark.parametrize(("dim", "points", "features"), [(1, 129, 5), (2, 96, 7), (3, 48, 4)])
def test_exact_models(dim, points, features):
    model = LinearGaussian(dim, features, scale=0.9)
    x = model.sample(N)
    result = _of(model, x, points=points)
    exact = model.log_px(x).cpu()
    torch.testing.assert_close(result.log_px, exact, rtol=0, atol=2e-8)
    assert bool((result.error >= (result.log_px - exact).abs() - 1e-12).all())
    assert float(result.error.max()) < 0.02
    # The default is finer.
    result = _of(model, x)
    torch.testing.assert_close(result.log_px, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dim", [1, 2, 3])
def test_the_error_estimate_shows_a_lattice_that_is_too_coarse(dim):
    """Error estimates are valid from far too coarse to fine lattices.

    An estimate below 0.1 nats exceeds the true error, and a true error of a tenth of a nat is reported.
    """
    seen = 0
    for scale in (0.05, 0.2, 0.8):
        model = LinearGaussian(dim, X, scale=scale)
        x = model.sample(N)
        for points in (9, 15, 33, 48):
            result = _of(model, x, points=points)
            off = (result.log_px - model.log_px(x).cpu()).abs()
            trusted = result.error < 0.1
            seen += int(trusted.sum())
            assert bool((off[trusted] <= result.error[trusted] + 1e-12).all())
            assert not bool(trusted[off > 0.01].any())
    assert seen > 20


def test_a_narrow_diagonal_ridge_is_detected():
    """A narrow ridge along a diagonal, invisible along any single axis, shows on every third point."""
    decoder, x = lambda z: z[:, :1] - z[:, 1:], torch.zeros(1, 1, dtype=torch.float64, device=DEVICE)
    for scale in (0.02, 0.1, 0.3, 1.0):
        for points in (33, 63, 129):
            result = fastvae.audit.lattice(
                x + 0.123, decoder, latent_dim=2, points=points, likelihood=Gaussian(scale=scale)
            )
            exact = -0.5 * (0.123**2 / (2 + scale**2) + math.log(2 * math.pi * (2 + scale**2)))
            off = abs(float(result.log_px) - exact)
            assert float(result.error) > 0.1 or off <= float(result.error) + 1e-12
            assert float(result.error) > 0.1 or off < 1e-3


def test_mass_beyond_the_ends_is_detected():
    model = LinearGaussian(2, X)
    x = model.sample(N)
    exact = model.log_px(x).cpu()
    for radius in (0.5, 1.0, 2.0, 4.0):
        result = _of(model, x, points=66, radius=radius)
        off = (result.log_px - exact).abs()
        trusted = result.error < 0.1
        assert bool((off[trusted] <= result.error[trusted]).all())
    assert bool(trusted.all())


@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson", "laplace", "negative_binomial"])
def test_likelihoods_with_and_without_products(likelihood):
    """The result equals a lattice sum written out with the likelihood, and importance sampling."""
    outputs = 2 if likelihood in ("laplace", "negative_binomial") else 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        linear = nn.Linear(2, outputs * X).to(DEVICE).double()
    x = (rand(N, X, seed=1, dtype=torch.float64) > 0.5).double()

    def decoder(z):
        parts = torch.tanh(linear(z)).chunk(outputs, 1)
        return parts if outputs > 1 else parts[0]

    result = fastvae.audit.lattice(x, decoder, latent_dim=2, points=66, likelihood=likelihood)
    # For a density with a kink the midpoint rule's error is O(h²).
    assert float(result.error.max()) < (1e-2 if likelihood == "laplace" else 1e-5)
    axis = (torch.arange(66, dtype=torch.float64, device=DEVICE) - 32.5) * 16 / 66
    z = torch.cartesian_prod(axis, axis)
    log_prob = getattr(fastvae.ops, f"{likelihood}_log_prob")
    with torch.no_grad():
        parameters = decoder(z)
        parameters = parameters if outputs > 1 else (parameters,)
        pairs = torch.stack([log_prob(row.expand(len(z), X), *parameters) for row in x], 1)
        prior = td.Normal(0.0, 1.0).log_prob(z).sum(1)
        expected = (pairs + prior[:, None]).logsumexp(0) + 2 * math.log(16 / 66)
        q = torch.zeros(N, 2).double(), torch.zeros(N, 2).double()
        sampled = fastvae.log_marginal(
            x, q, decoder, k=4000, likelihood=likelihood, generator=torch.Generator().manual_seed(1)
        )
    torch.testing.assert_close(result.log_px, expected.cpu(), rtol=1e-10, atol=1e-10)
    assert bool(((sampled.log_px - result.log_px).abs() < 5 * sampled.log_px_stderr + result.error).all())


def test_priors():
    """Priors may be a normal with any parameters, learned or not, or another with given ends."""
    model = LinearGaussian(2, X)
    x = model.sample(N)
    mu = nn.Parameter(torch.tensor([0.5, -1.0], dtype=torch.float64, device=DEVICE))
    logvar = torch.tensor([0.3, -0.7], dtype=torch.float64, device=DEVICE)
    covariance = model.weight @ torch.diag(logvar.exp()) @ model.weight.T
    covariance = covariance + model.scale**2 * torch.eye(X, dtype=torch.float64, device=DEVICE)
    exact = td.MultivariateNormal(model.decoder(mu[None])[0], covariance).log_prob(x).detach().cpu()
    prior = DiagonalNormal(mu, logvar)
    torch.testing.assert_close(_of(model, x, prior=prior).log_px, exact, rtol=0, atol=1e-9)
    full = td.MultivariateNormal(mu.detach(), torch.diag(logvar.exp()))
    result = _of(model, x, prior=full, box=([-9.0, -9.0], 9))
    torch.testing.assert_close(result.log_px, exact, rtol=0, atol=1e-9)
    mixture = NormalMixture(torch.stack([mu, mu]).detach(), torch.stack([logvar, logvar]))
    result = _of(model, x, prior=mixture, box=(-9, 9.0))
    torch.testing.assert_close(result.log_px, exact, rtol=0, atol=1e-9)


def test_forms_of_data_and_sizes_of_blocks(monkeypatch):
    model = LinearGaussian(2, X)
    x = model.sample(N)
    whole = _of(model, x, points=33)
    others = [
        _of(model, x.cpu().numpy(), points=33, batch_size=4),
        _of(model, DataLoader(TensorDataset(x.cpu()), 5), points=33),
        _of(model, (part for part in x.split(7)), points=33),
    ]
    monkeypatch.setattr(lattices, "_NUMBERS", 300)
    others.append(_of(model, x, points=33))
    for other in others:
        for a, b in zip(vars(whole).values(), vars(other).values(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_points_are_decoded_once_and_pairs_computed_in_blocks(monkeypatch):
    model, decoded, pairs = LinearGaussian(2, X), [], []
    all_pairs = fastvae.ops.all_pairs_log_prob

    def seen(x, parameters, **options):
        result = all_pairs(x, parameters, **options)
        pairs.append(result.numel())
        return result

    def decoder(z):
        decoded.append(len(z))
        return model.decoder(z)

    monkeypatch.setattr(fastvae.ops, "all_pairs_log_prob", seen)
    monkeypatch.setattr(lattices, "_NUMBERS", 1000)
    x = model.sample(N)
    fastvae.audit.lattice(x, decoder, latent_dim=2, points=33, likelihood=model.likelihood)
    assert decoded[:2] == [1, 1] and sum(decoded[2:]) == 33**2  # a function is called twice with one z
    assert sum(pairs) == N * 33**2
    assert max(pairs) <= 1000


def test_float32_and_integers():
    model = LinearGaussian(2, X, dtype=torch.float32)
    x = model.sample(N)
    result = _of(model, x)
    torch.testing.assert_close(result.log_px, model.log_px(x).cpu(), rtol=0, atol=1e-5)
    assert result.log_px.dtype == result.error.dtype == torch.float64
    linear = nn.Linear(1, X).to(DEVICE)
    counts = torch.poisson(3 * rand(N, X, seed=1))
    options = {"points": 129, "likelihood": "poisson"}
    one, other = (fastvae.audit.lattice(c, linear, latent_dim=1, **options) for c in (counts, counts.int()))
    torch.testing.assert_close(one.log_px, other.log_px, rtol=1e-6, atol=1e-5)
    assert all(p.grad is None for p in linear.parameters())


def test_modules_run_in_eval_mode_and_are_restored():
    decoder = nn.Sequential(nn.Linear(1, X), nn.Dropout(0.5)).to(DEVICE)
    x = rand(N, X, seed=1)
    options = {"points": 33, "likelihood": "bernoulli"}
    one, other = (fastvae.audit.lattice(x, decoder, latent_dim=1, **options) for _ in range(2))
    assert torch.equal(one.log_px, other.log_px)
    assert decoder.training
    with pytest.raises(ValueError, match=r"returns another output.*modules=\[net\]"):
        fastvae.audit.lattice(x, lambda z: decoder(z), latent_dim=1, **options)
    named = fastvae.audit.lattice(x, lambda z: decoder(z), latent_dim=1, modules=[decoder], **options)
    assert torch.equal(named.log_px, one.log_px) and decoder.training


def test_nan_and_impossible_examples():
    model = LinearGaussian(1, X)
    x = model.sample(3)
    x[1] = math.nan
    result = _of(model, x, points=33)
    assert result.log_px.isnan().tolist() == result.error.isnan().tolist() == [False, True, False]

    def decoder(z):
        return torch.full((len(z), X), -math.inf, dtype=z.dtype, device=z.device)

    ones = torch.ones(2, X, dtype=torch.float64, device=DEVICE)
    with np.errstate(all="ignore"):
        result = fastvae.audit.lattice(ones, decoder, latent_dim=1, points=6, likelihood="bernoulli")
    assert result.log_px.tolist() == [-math.inf] * 2
    assert result.error.tolist() == [math.inf] * 2


@pytest.mark.parametrize(
    ("dim", "options", "message"),
    [
        (4, {}, "latent_dim must be at most 3, got 4"),
        (0, {}, "latent_dim must be at least 1"),
        (2, {"points": 8}, "points must be a multiple of 3, got 8"),
        (2, {"radius": 0.0}, "must be wider than 0"),
        (2, {"box": 3.0}, "box must be a pair"),
        (2, {"box": (1.0, -1.0)}, "must be wider than 0"),
        (2, {"box": (torch.zeros(3), 1.0)}, r"an end of the lattice has shape \[3\]"),
        (2, {"prior": td.Laplace(torch.zeros(2), torch.ones(2))}, "give box="),
        (2, {"prior": DiagonalNormal(torch.zeros(5, 2), torch.zeros(5, 2))}, "of each example"),
        (2, {"prior": lambda context: context}, "of each example"),
        (2, {"data": {"x": torch.zeros(4, X)}, "likelihood": Joint(x="bernoulli")}, "several parts"),
        (2, {"data": []}, "no batches"),
        (2, {"decoder": None}, "decoder must be"),
    ],
)
def test_errors(dim, options, message):
    options = {"data": torch.zeros(4, X), "decoder": nn.Linear(2, X), "likelihood": "bernoulli", **options}
    with pytest.raises((TypeError, ValueError), match=message):
        fastvae.audit.lattice(options.pop("data"), options.pop("decoder"), latent_dim=dim, **options)
