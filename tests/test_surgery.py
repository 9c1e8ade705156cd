"""Decomposition of a VAE's KL over a data set, against exact models and written-out sums."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae.distributions import (
    AggregatePosterior,
    DiagonalNormal,
    FullNormal,
    Laplace,
    LowRankNormal,
    Mixture,
)

from .conftest import DEVICE
from .models import generator, randn

pytestmark = pytest.mark.usefixtures("one_thread")

N, D, X = 60, 3, 7


class Rows(nn.Module):
    """Encoder whose posterior for row n, its first feature, is the n-th."""

    def __init__(self, *parameters, family=lambda *p: p):
        super().__init__()
        self.parameters_of_rows, self.family = parameters, family

    def forward(self, x):
        rows = x[:, 0].long()
        return self.family(*(p[rows] for p in self.parameters_of_rows))


def model(*parameters, prior=None, **options):
    encoder = Rows(*parameters, **options)
    decoder = nn.Linear(D, X).to(DEVICE, torch.float64)
    return fastvae.VAE(encoder, decoder, prior=prior, latent_dim=D, modules=[])


def data(n=N):
    return torch.arange(n, dtype=torch.float64, device=DEVICE)[:, None].expand(n, X)


def parameters(seed=1):
    return randn(N, D, seed=seed).double(), 0.5 * randn(N, D, seed=seed + 1).double() - 1


def written_out(q, z, prior):
    """Compute log q(z|x), log q(z), log q(z_d) [N, D] and log p(z), of z [N, D] drawn from row n."""
    pairs = q.log_prob(z[:, None])  # [z, posteriors, D]
    log_n = math.log(N)
    each = torch.logsumexp(pairs, 1) - log_n
    return pairs.diagonal().T.sum(1), torch.logsumexp(pairs.sum(2), 1) - log_n, each, prior.log_prob(z)


def test_terms_equal_the_written_out_sums(backend):
    mu, logvar = parameters()
    found = fastvae.diagnostics.latents(model(mu, logvar), data(), batch_size=17, generator=generator(3))
    seed = fastvae.random.draw_seed(DEVICE, generator(3))
    z = DiagonalNormal(mu, logvar).rsample_log_prob(1, seed)[0][0]
    own, whole, each, log_p = written_out(td.Normal(mu, (0.5 * logvar).exp()), z, td.Normal(0.0, 1.0))
    expected = {
        "kl": own - log_p.sum(1),
        "mutual_information": own - whole,
        "marginal_kl": whole - log_p.sum(1),
        "total_correlation": whole - each.sum(1),
    }
    for name, values in expected.items():
        assert getattr(found, name) == pytest.approx(float(values.mean()), rel=1e-6)
        assert found.stderr[name] == pytest.approx(float(values.std() / math.sqrt(N)), rel=1e-6)
    torch.testing.assert_close(found.dimension_kl, (each - log_p).mean(0), rtol=1e-6, atol=1e-7)
    assert found.marginal_kl == pytest.approx(found.total_correlation + float(found.dimension_kl.sum()))
    assert found.log_n == pytest.approx(math.log(N)) and found.active_units == D
    assert f"{found.mutual_information:.3f} ± " in str(found)


def test_mutual_information_of_disjoint_posteriors_is_log_n():
    """For distant posteriors the mutual information is log N; for equal ones it is 0."""
    mu = 100 * torch.arange(N, dtype=torch.float64, device=DEVICE)[:, None].expand(N, D)
    zeros = torch.zeros(N, D, dtype=torch.float64, device=DEVICE)
    apart = fastvae.diagnostics.latents(model(mu, zeros), data())
    assert apart.mutual_information == pytest.approx(math.log(N))
    same = fastvae.diagnostics.latents(model(zeros, zeros), data())
    assert same.mutual_information == pytest.approx(0, abs=1e-6) and same.active_units == 0
    assert same.kl == pytest.approx(0, abs=1e-6) and same.total_correlation == pytest.approx(0, abs=1e-6)


def test_the_aggregate_posterior_is_the_best_prior():
    """The KL to the aggregate posterior is the mutual information; the other terms are 0."""
    mu, logvar = parameters()
    vae = model(mu, logvar)
    vae.prior = AggregatePosterior(vae.encoder, data(), batch_size=13)
    found = fastvae.diagnostics.latents(vae, data())
    assert found.marginal_kl == pytest.approx(0, abs=1e-6) and found.dimension_kl is None
    assert found.kl == pytest.approx(found.mutual_information)


def test_marginals_of_full_covariances():
    """A dimension's marginal has the covariance's diagonal; correlation enters the total correlation."""
    mu = torch.zeros(N, D, dtype=torch.float64, device=DEVICE)
    tril = torch.zeros(N, D * (D + 1) // 2, dtype=torch.float64, device=DEVICE)
    tril[:, 1] = 2.0  # z_2 is 2 z_1 and noise
    found = fastvae.diagnostics.latents(
        model(mu, tril, family=FullNormal), data(), examples=N, generator=generator(5)
    )
    assert found.mutual_information == pytest.approx(0, abs=1e-6)
    # −½ log(1 − ρ²) with ρ² = 4/5
    assert abs(found.total_correlation - 0.5 * math.log(5)) < 6 * found.stderr["total_correlation"]
    factor = torch.zeros(N, D, 1, dtype=torch.float64, device=DEVICE)
    factor[:, 1] = 2.0
    low = fastvae.diagnostics.latents(
        model(mu, torch.zeros_like(mu), factor, family=LowRankNormal), data(), generator=generator(5)
    )
    assert low.total_correlation == pytest.approx(0, abs=1e-6)


def test_draws_of_mixture_posteriors_count_by_their_weights():
    """Each example draws a component of its posterior by the weights, whatever the seed."""
    mu, logvar = parameters()
    logits = torch.tensor([0.5, -0.5], dtype=torch.float64, device=DEVICE)
    vae = model(mu, logvar, family=lambda m, v: Mixture([(m, v), (m + 6, v)], logits))
    q = vae.posterior(data())
    z = q.sample(4000, generator=generator(1))
    expected = (q.log_prob(z) - td.Normal(0.0, 1.0).log_prob(z).sum(-1)).mean()
    for seed in range(3):
        found = fastvae.diagnostics.latents(vae, data(), generator=generator(seed), batch_size=17)
        assert abs(found.kl - expected) < 5 * found.stderr["kl"]


def test_unknown_terms_are_none_and_not_printed():
    mu, logvar = parameters()
    vae = model(mu, logvar, family=Laplace, prior=Laplace(mu[0], logvar[0]))
    found = fastvae.diagnostics.latents(vae, data(), examples=7)
    assert found.total_correlation is None and found.dimension_kl is None
    assert "total correlation" not in str(found) and "mutual information" in str(found)


def test_loaders_contexts_and_modes():
    mu, logvar = parameters()
    vae = model(mu, logvar).train()
    loader = [data()[:20], data()[20:]]
    found = fastvae.diagnostics.latents(vae, loader, generator=generator(1))
    assert found.kl == pytest.approx(fastvae.diagnostics.latents(vae, data(), generator=generator(1)).kl)
    assert vae.training
    seen = []

    class Conditional(Rows):
        def forward(self, x, context):
            seen.append(context.shape)
            return super().forward(x)

    vae.encoder = Conditional(mu, logvar)
    labels = torch.ones(20, 2, dtype=torch.float64, device=DEVICE)
    fastvae.diagnostics.latents(
        vae, [(data()[:20], labels)], prepare_batch=lambda b: {"x": b[0], "context": b[1]}
    )
    assert seen == [(20, 2)]


def test_mistakes():
    mu, logvar = parameters()
    with pytest.raises(ValueError, match="no batches"):
        fastvae.diagnostics.latents(model(mu, logvar), [])
    with pytest.raises(ValueError, match="examples must be at least 1"):
        fastvae.diagnostics.latents(model(mu, logvar), data(), examples=0)
    with pytest.raises(ValueError, match="a function of the context"):
        fastvae.diagnostics.latents(model(mu, logvar, prior=lambda c: (c, c)), data())
