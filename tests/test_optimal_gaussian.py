"""Gaussian likelihood with the optimal variance."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

import fastvae
from fastvae.likelihoods import Gaussian

from .conftest import DEVICE
from .models import randn

K, B, X = 3, 4, 7


def inputs():
    return randn(B, X, seed=1), randn(K * B, X, seed=2).requires_grad_(), torch.zeros(B, 2, device=DEVICE)


def likelihood(**options):
    return Gaussian(scale="optimal", **options).to(DEVICE)


def test_training_uses_the_variance_of_the_batch(backend):
    """In training, bound and gradient equal those of a fixed scale, the batch's, which is the best of any."""
    x, mean, q = inputs()
    optimal = likelihood()
    terms = fastvae.elbo(x, q, lambda z: mean, k=K, likelihood=optimal, terms=True)
    variance = (x - mean.detach().view(K, B, X)).square().mean()
    torch.testing.assert_close(optimal.variance, variance)
    torch.testing.assert_close(optimal.scale, variance.sqrt())
    bounds = []
    for factor in (1.0, 0.95, 1.05):
        fixed = Gaussian(scale=factor * variance.sqrt())
        bounds.append(fastvae.elbo(x, q, lambda z: mean, k=K, likelihood=fixed, terms=True).bound)
    torch.testing.assert_close(terms.bound, bounds[0])
    assert all(float(bounds[0].sum()) > float(b.sum()) for b in bounds[1:])
    (found,), (expected,) = (
        torch.autograd.grad(b.sum(), mean, retain_graph=True) for b in (terms.bound, bounds[0])
    )
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(optimal.variance, variance)  # measured once
    direct = optimal.log_likelihood(x, mean, K)
    torch.testing.assert_close(direct, Gaussian(scale=variance.sqrt()).log_likelihood(x, mean, K))


def test_the_running_mean(backend):
    x, mean, q = inputs()
    optimal, expected = likelihood(momentum=0.25), None
    for factor in (1.0, 2.0, 0.5):
        optimal.log_prob(factor * x, mean[:B])
        now = (factor * x - mean[:B].detach()).square().mean()
        expected = now if expected is None else 0.75 * expected + 0.25 * now
    torch.testing.assert_close(optimal.variance, expected)
    fixed = Gaussian(scale=expected.sqrt()).log_prob(x, mean[:B])
    with torch.no_grad():
        torch.testing.assert_close(optimal.log_prob(x, mean[:B]), fixed)
    optimal.eval()
    torch.testing.assert_close(optimal.log_prob(x, mean[:B]), fixed)
    copy = likelihood()
    copy.load_state_dict(optimal.state_dict())
    torch.testing.assert_close(copy.eval().log_prob(x, mean[:B]), fixed)
    torch.testing.assert_close(pickle.loads(pickle.dumps(optimal)).log_prob(x, mean[:B]), fixed)
    torch.testing.assert_close(optimal.variance, expected)
    drawn = optimal.sample(torch.zeros(20_000, 1, device=DEVICE))
    assert abs(float(drawn.var() / expected) - 1) < 0.06


def test_all_draws_share_one_variance(backend):
    """All draws use one variance, also log_marginal's in training mode, in any chunks."""
    x, _, q = inputs()
    decoder = torch.nn.Linear(1, X).to(DEVICE)
    optimal = likelihood()
    fastvae.elbo(x, q, decoder, k=K, likelihood=optimal)
    before = optimal.variance.clone()
    fixed = Gaussian(scale=before.sqrt())
    for chunk in (1, 4, None):
        found, expected = (
            fastvae.log_marginal(
                x,
                q,
                decoder,
                k=10,
                k_chunk=chunk,
                likelihood=p,
                generator=torch.Generator(DEVICE).manual_seed(1),
            ).log_px
            for p in (optimal, fixed)
        )
        torch.testing.assert_close(found, expected)
    assert torch.equal(optimal.variance, before)
    vae = fastvae.VAE(torch.nn.Linear(X, 2), torch.nn.Linear(1, X), likelihood=optimal, latent_dim=1).to(
        DEVICE
    )
    assert bool(vae.evaluate(x, k=10, progress=False).log_px.isfinite().all())
    assert torch.equal(optimal.variance, before)


def test_masked_elements_are_ignored(backend):
    x, mean, q = inputs()
    mask = torch.rand(B, X, device=DEVICE) < 0.6
    mask[0, 0] = True
    optimal = likelihood()
    fastvae.elbo(x, q, lambda z: mean, k=K, likelihood=optimal, mask=mask)
    square = (x - mean.detach().view(K, B, X)).square()
    torch.testing.assert_close(optimal.variance, square[mask.expand(K, B, X)].mean())


def test_half_precision_is_measured_in_float32():
    x, mean, _ = inputs()
    optimal = likelihood()
    optimal.log_prob(x.bfloat16(), mean[:B].bfloat16())
    assert optimal.variance.dtype == torch.float32
    wide = (x.bfloat16().float() - mean[:B].detach().bfloat16().float()).square().mean()
    torch.testing.assert_close(optimal.variance, wide)


def test_a_perfect_fit_has_a_density():
    x = torch.ones(2, 3, device=DEVICE)
    assert bool(likelihood().log_prob(x, x.clone()).isfinite().all())


def test_mistakes():
    x, mean, q = inputs()
    for call in (
        lambda: likelihood().eval().log_prob(x, mean[:B]),
        lambda: likelihood().sample(mean),
        lambda: fastvae.log_marginal(x, q, lambda z: z[:, :1].expand(-1, X), k=2, likelihood=likelihood()),
    ):
        with pytest.raises(
            RuntimeError, match=r"has no variance yet.*train first.*fastvae.likelihoods.Gaussian\(scale=0.1\)"
        ):
            call()
    with pytest.raises(ValueError, match=r"momentum is .*in \(0, 1\], got 0"):
        Gaussian(scale="optimal", momentum=0)
    with pytest.raises(ValueError, match="measured, neither given nor learned"):
        Gaussian(scale="optimal", learned=True)
    with pytest.raises(TypeError, match="must return the mean alone, a tensor; got a tuple of 2"):
        likelihood().log_prob(x, (mean[:B], mean[:B]))


@pytest.mark.parametrize("masked", [False, True])
def test_a_nan_in_x_does_not_reach_the_running_variance(masked):
    x, mean = torch.rand(B, X, device=DEVICE), torch.rand(B, X, device=DEVICE, requires_grad=True)
    optimal = Gaussian(scale="optimal").to(DEVICE)
    mask = torch.ones(B, X, dtype=torch.bool, device=DEVICE) if masked else None
    q = torch.zeros(B, 4, device=DEVICE)
    fastvae.elbo(x, q, lambda z: mean, likelihood=optimal, mask=mask)
    before = optimal.variance.clone()
    x[1, 2] = math.nan
    assert fastvae.elbo(x, q, lambda z: mean, likelihood=optimal, mask=mask).isnan()
    assert torch.equal(optimal.variance, before)
