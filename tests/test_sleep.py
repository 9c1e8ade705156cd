"""Sleep phase, against its gradient written out and the exact posterior."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae.distributions import DiagonalNormal, Distribution, FullNormal, Mixture, StandardNormal, StudentT
from fastvae.likelihoods.read import as_likelihood

from .conftest import DEVICE
from .models import LinearGaussian, generator, networks, randn

N, D, X = 6, 3, 7


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_the_objective_is_the_density_of_the_drawn_latents(backend, likelihood):
    encoder, decoder = networks(X, D, likelihood, dtype=torch.float64)
    noise = generator(1)
    z = StandardNormal().sample(N, dim=D, device=DEVICE, generator=noise).double()
    with torch.no_grad():
        x = as_likelihood(likelihood).sample(decoder(z), generator=noise)
    mu, logvar = encoder(x)
    expected = td.Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(1)
    options = {"latent_dim": D, "likelihood": likelihood}
    found = fastvae.sleep(encoder, decoder, N, reduction="none", generator=generator(1), **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for reduction in ("mean", "sum"):
        value = fastvae.sleep(encoder, decoder, N, reduction=reduction, generator=generator(1), **options)
        whole = getattr(expected, reduction)()
        torch.testing.assert_close(value, whole, rtol=1e-12, atol=1e-12)
        gradients = (
            torch.autograd.grad(v, list(encoder.parameters()), retain_graph=True) for v in (value, whole)
        )
        for got, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
        value.backward()
    assert all(p.grad is None for p in decoder.parameters())


def test_training_finds_the_exact_posterior():
    """The sleep phase finds the exact posterior of a linear-Gaussian model.

    With fixed noise it is a least-squares problem, whose solution is within six standard errors of the truth.
    """
    model, n = LinearGaussian(D, X), 5000
    encoder = nn.Linear(X, D).to(DEVICE, torch.float64)
    log_variance = torch.zeros(D, dtype=torch.float64, device=DEVICE, requires_grad=True)
    parameters = [*encoder.parameters(), log_variance]
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=200, line_search_fn="strong_wolfe", tolerance_grad=1e-9
    )
    seen = []

    def q(x):
        seen.append(x)
        return encoder(x), log_variance.expand(len(x), D)

    def loss():
        optimizer.zero_grad()
        value = -fastvae.sleep(
            q, model.decoder, n, latent_dim=D, likelihood=model.likelihood, generator=generator(2),
            prior=DiagonalNormal(*torch.zeros(2, D, dtype=torch.float64, device=DEVICE)), modules=[encoder],
        )  # fmt: skip
        value.backward()
        return value

    optimizer.step(loss)
    x = model.sample(20)
    mu, logvar = model.posterior(x)
    design, at = (torch.cat([t, torch.ones_like(t[:, :1])], 1) for t in (seen[-1], x))
    leverage = (at @ torch.linalg.inv(design.T @ design) * at).sum(1)
    errors = leverage.sqrt()[:, None] * (0.5 * logvar).exp()
    assert bool(((encoder(x) - mu).abs() < 6 * errors).all())
    assert bool(((log_variance - logvar[0]).abs() < 6 * math.sqrt(2 / n)).all())


def test_sleep_of_a_vae():
    encoder, decoder = networks(X, D, "bernoulli")
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli", latent_dim=D)
    expected = fastvae.sleep(
        encoder, decoder, N, latent_dim=D, likelihood="bernoulli", generator=generator(3)
    )
    assert torch.equal(vae.sleep(N, generator=generator(3)), expected)
    assert torch.equal(vae(N, objective="sleep", generator=generator(3)), expected)
    # The encoder's inputs are the model's own draws.
    seen = []
    encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    vae.sleep(N, generator=generator(3))
    assert torch.equal(seen[0], vae.sample(N, generator=generator(3)))


def test_contexts_shapes_and_counts():
    context = randn(N, 2, seed=4)
    shapes = []

    class Conditional(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.linear = nn.Linear(X + 2, width)

        def forward(self, x, c):
            return self.linear(torch.cat([x, c], 1)).unflatten(1, (4, 1, 3))

    encoder, weight = Conditional(12).to(DEVICE), randn(6, X, seed=5)

    def decoder(z, c):
        shapes.append((tuple(z.shape), tuple(c.shape)))
        return z.flatten(1) @ weight

    prior = lambda c: (c[:, :1].expand(N, 6), torch.zeros(N, 6, device=DEVICE))  # noqa: E731
    options = {"latent_dim": (2, 1, 3), "likelihood": "poisson", "context": context}
    value = fastvae.sleep(encoder, decoder, N, prior=prior, reduction="none", **options)
    assert value.shape == (N,) and shapes == [((N, 2, 1, 3), (N, 2))]
    value.sum().backward()
    assert bool((encoder.linear.weight.grad != 0).any())


@pytest.mark.parametrize("q", [FullNormal, StudentT, "mixture"])
def test_other_posteriors(q):
    width = {FullNormal: [D, 6], StudentT: [D] * 3, "mixture": [D] * 4}[q]
    encoder = nn.Linear(X, sum(width)).to(DEVICE)

    def posterior(x):
        parts = encoder(x).split(width, 1)
        if q == "mixture":
            return Mixture([DiagonalNormal(*parts[:2]), DiagonalNormal(*parts[2:])])
        return q(*parts) if q is FullNormal else q(parts[0], parts[1], 1 + parts[2].exp())

    value = fastvae.sleep(posterior, nn.Linear(D, X).to(DEVICE), N, latent_dim=D, likelihood="bernoulli")
    value.backward()
    assert value.isfinite() and bool((encoder.weight.grad != 0).any())


ENCODER, DECODER = networks(X, D, "bernoulli")
WRONG = {
    "no encoder": ((3, DECODER, N), {}, TypeError, "encoder must be a module.*int"),
    "no draws": ((ENCODER, DECODER, 0), {}, ValueError, "n must be at least 1"),
    "another reduction": (
        (ENCODER, DECODER, N),
        {"reduction": "max"},
        ValueError,
        "reduction='max' is unknown",
    ),
    "another D than the encoder's": (
        (lambda x: ENCODER(x)[0], DECODER, N),
        {},
        ValueError,
        "q has shape",
    ),
    "fewer latents than the encoder's": (
        (ENCODER, lambda z: DECODER(z.repeat(1, 3)[:, :D]), N),
        {"latent_dim": 2},
        ValueError,
        "has D = 3 latents, but latent_dim=2",
    ),
    "fewer rows": ((lambda x: ENCODER(x[:2]), DECODER, N), {}, ValueError, "2 rows for x of n = 6"),
    "no dimension": ((ENCODER, DECODER, N), {"latent_dim": 0}, ValueError, "latent_dim must be at least 1"),
    "a context of other rows": (
        (ENCODER, DECODER, N),
        {"context": torch.zeros(2, 1, device=DEVICE)},
        ValueError,
        "context has shape",
    ),
    "a prior without draws": (
        (ENCODER, DECODER, N),
        {"prior": Distribution()},
        NotImplementedError,
        "has no sample",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name):
    args, options, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        fastvae.sleep(*args, **{"latent_dim": D, "likelihood": "bernoulli", **options})
