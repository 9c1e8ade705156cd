"""Any q with any p: composed equals fused, torch.distributions objects, closed forms, errors."""

from __future__ import annotations

import contextlib
import math
import warnings

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae.core.seeding import seeded
from fastvae.distributions import (
    DiagonalNormal,
    Distribution,
    Exponential,
    LogNormal,
    Mixture,
    StandardNormal,
    TorchDistribution,
    draws,
    register_kl,
    rsample_log_prob,
)
from fastvae.distributions.closed_form import closed_kl
from fastvae.distributions.draws import draw_chunk, draw_kl, draw_ratio
from fastvae.distributions.tensors import frozen
from fastvae.objectives.bounds import IWAE, WakePhi
from fastvae.objectives.from_weights import bound_from_weights

from .conftest import DEVICE
from .models import LinearGaussian, evaluate_parts, generator, randn, seed_of

K, B, D, X = 4, 5, 3, 7
SEED = torch.tensor(11, device=DEVICE)
BERNOULLI = {"likelihood": "bernoulli"}


class Own(DiagonalNormal):
    """Subclass, for which nothing is fused."""


def wide(*shape, seed):
    return randn(*shape, seed=seed).double().requires_grad_()


# Forms of the log variance. The prior has the same form, without a range.
FORMS = [
    {},
    {"logvar_range": (-0.5, 0.5)},
    {"scale_form": "log_scale"},
    {"scale_form": "scale"},
    {"scale_form": "softplus"},
    {"scale_form": "softplus", "floor": 0.01},
]


def pairs(kinds=(DiagonalNormal, DiagonalNormal), prior=True, **form):
    """Return q, p, and their parameters in float64."""
    positive = form.get("scale_form") == "scale"
    raw = lambda *shape, seed: (  # noqa: E731
        wide(*shape, seed=seed).detach().exp().requires_grad_() if positive else wide(*shape, seed=seed)
    )
    mu, logvar = wide(B, D, seed=1), raw(B, D, seed=2)
    q = kinds[0](mu, logvar, **form)
    if not prior:
        return q, StandardNormal(), [mu, logvar]
    m, s = wide(D, seed=3), raw(B, D, seed=4)
    of_prior = {name: value for name, value in form.items() if name != "logvar_range"}
    return q, kinds[1](m, s, **of_prior), [mu, logvar, m, s]


# Composed equals fused


@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg"])
@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_composed_log_ratios_equal_the_fused_ones(estimator, prior, form):
    """Composed and fused log-ratios have equal values and gradients of q and p under a log-mean-exp.

    The gradients come through the decoder and directly.
    """
    weight = randn(K, B, D, seed=5).double()
    found = []
    for kinds in ((DiagonalNormal,) * 2, (Own, DiagonalNormal), (Own, Own)):
        q, p, leaves = pairs(kinds, prior, **form)
        z, ratio = draw_ratio(q, p, K, SEED, 2, estimator)
        z = z.reshape(K, B, D)
        bound = fastvae.ops.log_mean_exp(ratio + (z * weight).sin().sum(2))
        upstream = torch.arange(B, dtype=torch.float64, device=DEVICE)  # 0 for one row
        found.append([z, ratio, bound, *torch.autograd.grad(bound, leaves, upstream)])
    for other in found[1:]:
        for a, b in zip(other, found[0], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("route", ["iwae", "stl", "paths", "tied", "score"])
def test_composed_chunks_equal_the_whole(route):
    weight = randn(K, B, D, seed=5).double()
    encoder = {"tied": IWAE(groups=K), "score": WakePhi(), "paths": IWAE(estimator="dreg")}.get(route)

    def bound(kind, cuts):
        q, p, leaves = pairs((kind, DiagonalNormal))
        parts = [draw_chunk(q, p, e - s, SEED, s, 0, route) for s, e in cuts]
        z, ratio = (torch.cat([part[i] for part in parts]) for i in (0, 1))
        assert all((part[2] is None) == (encoder is None) for part in parts)
        q_grad = None if encoder is None else torch.cat([part[2] for part in parts])
        value = bound_from_weights((z * weight).sin().sum(2), ratio, q_grad, IWAE(), encoder)
        return [value, *torch.autograd.grad(value.sum(), leaves)]

    expected = bound(DiagonalNormal, [(0, K)])
    for kind, cuts in ((Own, [(0, K)]), (Own, [(0, 1), (1, K)]), (DiagonalNormal, [(0, 3), (3, K)])):
        for a, b in zip(bound(kind, cuts), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


# Transforms with a cache, without which the inverse loses accuracy: in float32 tanh is 1 from 9 on.


def _transforms(kind, cache_size=1):
    tanh, affine = td.TanhTransform(cache_size), td.AffineTransform(0.5, -2.0, cache_size=cache_size)
    return {
        "tanh": [tanh],
        "inverse": [td.TanhTransform(cache_size).inv.inv],
        "chain": [tanh, affine, td.ExpTransform(cache_size)],
        "composed": [td.ComposeTransform([tanh, affine], cache_size=cache_size)],
        "spatial": [tanh],
    }[kind]


@pytest.mark.parametrize("route", ["iwae", "stl", "dreg", "chunks", WakePhi(), IWAE(groups=2)], ids=str)
@pytest.mark.parametrize("kind", ["tanh", "inverse", "chain", "composed", "spatial"])
def test_transforms_shared_by_q_and_p_change_no_estimator(kind, route):
    """Value and gradients equal those of the model without the transforms, whose Jacobians cancel."""
    shape = (B, D, 1, 2) if kind == "spatial" else (B, D)
    options = {"k": K, **BERNOULLI}
    if isinstance(route, str):
        options |= {"k_chunk": 4, "estimator": "dreg"} if route == "chunks" else {"estimator": route}
        objective = fastvae.iwae
    else:
        options["q_objective"] = route
        objective = lambda *args, **kwargs: fastvae.bound(*args, IWAE(), **kwargs)  # noqa: E731
    x, weight = (randn(B, X, seed=4) > 0).float(), randn(math.prod(shape[1:]), X, seed=5)
    results = []
    for transforms in ([], _transforms(kind)):
        leaves = [t.requires_grad_() for t in (6 * randn(*shape, seed=1), randn(*shape, seed=2),
                                               4 * randn(*shape[1:], seed=3))]  # fmt: skip
        loc, log_scale, prior_loc = leaves
        q, p = td.Normal(loc, log_scale.exp()), td.Normal(prior_loc, torch.full_like(prior_loc, 3.0))

        def decoder(z, transforms=transforms):
            for transform in () if transforms else _transforms(kind, 0):
                z = transform(z)
            return z.flatten(1) @ weight

        if transforms:
            q, p = (td.TransformedDistribution(d, transforms) for d in (q, p))
        value = objective(x, q, decoder, prior=p, generator=generator(5), **options)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg"])
def test_transforms_with_parameters_and_a_cache(estimator):
    """The gradient by a transform's parameters is the same with and without a cache."""
    x, decoder, found = (randn(B, X, seed=4) > 0).double(), randn(D, X, seed=5).double(), []
    for cache_size in (0, 1):
        leaves = [
            t.double().requires_grad_() for t in (randn(B, D, seed=1), randn(D, seed=2), randn(D, seed=3))
        ]
        loc, shift, scale = leaves
        transforms = [td.AffineTransform(shift, scale, cache_size=cache_size), td.TanhTransform(cache_size)]
        q, p = (td.TransformedDistribution(td.Normal(a, 1.0), transforms) for a in (loc, 0 * shift))
        value = fastvae.iwae(
            x,
            q,
            lambda z: z @ decoder,
            prior=p,
            k=K,
            estimator=estimator,
            generator=generator(5),
            **BERNOULLI,
        )
        found.append([value, *torch.autograd.grad(value, leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("per_dimension", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_composed_kls_equal_the_fused_ones(prior, per_dimension, form):
    found = []
    for kind in (DiagonalNormal, Own):
        q, p, leaves = pairs((kind, DiagonalNormal), prior, **form)
        z, kl = draw_kl(q, p, K, SEED, 2, per_dimension)
        found.append([z, kl, *torch.autograd.grad(z.square().sum() + kl.sin().sum(), leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_densities_equal_torch():
    q, p, _ = pairs()
    z, log_q = rsample_log_prob(q, K, SEED)
    expected = td.Normal(q.mu, torch.exp(0.5 * q.logvar)).log_prob(z).sum(-1)
    torch.testing.assert_close(log_q, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.log_prob(z), expected, rtol=1e-9, atol=1e-9)
    expected = td.Normal(0.0, 1.0).log_prob(z).sum(-1)
    torch.testing.assert_close(StandardNormal().log_prob(z), expected, rtol=1e-9, atol=1e-9)


# torch.distributions


def _parameters():
    return wide(B, D, seed=1), wide(B, D, seed=2).detach().exp().requires_grad_()


def _full(a, b):
    scale_tril = torch.diag_embed(b) + 0.3 * torch.ones(D, D, dtype=a.dtype, device=DEVICE).tril(-1)
    return td.MultivariateNormal(a, scale_tril=scale_tril)


FAMILIES = {
    "Laplace": td.Laplace,
    "Independent Laplace": lambda a, b: td.Independent(td.Laplace(a, b), 1),
    "MultivariateNormal": _full,
    "LogNormal": td.LogNormal,
    "Gumbel": td.Gumbel,
    "StudentT": lambda a, b: td.StudentT(3 + b, a, b),
    "a flow": lambda a, b: td.TransformedDistribution(
        td.Independent(td.Normal(a, b), 1), [td.TanhTransform(), td.AffineTransform(0.5, 1 + b)]
    ),
}
# Drawn by torch.
DRAWN = {
    "Gamma": lambda a, b: td.Gamma(a.exp() + 1, b),
    "FisherSnedecor": lambda a, b: td.FisherSnedecor(a.exp() + 4, 5 + b),
}


# Half precision: parameters a, unrestricted, and b, positive, [B, D] or [D] each.
IN_HALF = {
    "Normal": td.Normal,
    "Independent": lambda a, b: td.Independent(td.Normal(a, b), 1),
    "MultivariateNormal": lambda a, b: td.MultivariateNormal(a, scale_tril=torch.diag_embed(b)),
    "Laplace": td.Laplace,
    "LogNormal": td.LogNormal,
    "Gumbel": td.Gumbel,
    "Independent Gumbel": lambda a, b: td.Independent(td.Gumbel(a, b), 1),
    "Cauchy": td.Cauchy,
    "Exponential": lambda a, b: td.Exponential(b),
    "StudentT": lambda a, b: td.StudentT(5.0, a, b),
    "HalfNormal": lambda a, b: td.HalfNormal(b),
    "tanh": lambda a, b: td.TransformedDistribution(td.Normal(a, b), [td.TanhTransform(cache_size=1)]),
    "Gamma": lambda a, b: td.Gamma(b, b),
    "Beta": lambda a, b: td.Beta(b, b),
    "Dirichlet": lambda a, b: td.Dirichlet(b),
}
NOT_ADDRESSED = ("HalfNormal", "Gamma", "Beta", "Dirichlet")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", IN_HALF)
def test_half_precision_is_computed_in_float32(name, dtype):
    """In half precision, q and priors give the float64 values of the rounded parameters in every objective.

    The decoder receives z in q's dtype.
    """
    make, seen = IN_HALF[name], []
    parameters = [(0.5 * randn(*shape, seed=i)) for i, shape in enumerate([(B, D), (B, D), (D,), (D,)])]
    parameters = [(t if i % 2 == 0 else t.exp()).to(dtype) for i, t in enumerate(parameters)]
    wide = [t.double() for t in parameters]

    def decoder(z):
        seen.append(z.dtype)
        return z.new_zeros(len(z), X)

    x = torch.ones(B, X, device=DEVICE)
    half, exact = ((make(*p[:2]), make(*p[2:])) for p in (parameters, wide))
    z, log_q = rsample_log_prob(fastvae.distributions.as_posterior(half[0]), K, SEED)
    fix = {"rtol": 1e-4, "atol": 1e-4}
    if name not in ("Normal", "Independent", "tanh"):  # their densities use the noise, or lose accuracy
        torch.testing.assert_close(log_q, total(exact[0], z.double()).float(), **fix)
        wrapped = fastvae.distributions.as_posterior(TorchDistribution(half[0]))
        z, log_q = rsample_log_prob(wrapped, K, SEED)
        torch.testing.assert_close(log_q, total(exact[0], z.double()).float(), **fix)
        log_p = fastvae.distributions.as_prior(half[1]).prepared().log_prob(z)
        torch.testing.assert_close(log_p, total(exact[1], z.double()).float(), **fix)
    found = []
    for q, p in (half, exact):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # for want of a closed form
            elbo = fastvae.elbo(x, q, decoder, prior=p, terms=True, generator=generator(5), **BERNOULLI)
        options = {"prior": p, "k": K, **BERNOULLI}
        iwae = [
            fastvae.iwae(x, q, decoder, estimator=e, generator=generator(5), **options)
            for e in ("iwae", "dreg")
        ]
        marginal = fastvae.log_marginal(x, q, decoder, generator=generator(5), **options)
        found.append([elbo.kl, *iwae, marginal.log_px])
        if p is half[1]:
            assert set(seen) == {dtype}
            assert all(t.dtype == torch.float32 for t in found[0])
    closed = closed_kl(*(fastvae.distributions.as_prior(d) for d in exact)) is not None
    for i, (one, other) in enumerate(zip(*found, strict=True)):
        if i and name in ("Normal", "Independent"):  # fastvae's own draws, rounded before p(z)
            fix = dict.fromkeys(("rtol", "atol"), 8 * torch.finfo(dtype).eps)
        if name not in NOT_ADDRESSED or (i == 0 and closed):
            torch.testing.assert_close(one.double(), other.double(), **fix)


def test_half_precision_validates_as_the_distribution_does():
    outside = -torch.ones(1, B, D, device=DEVICE)
    for validates in (True, False):
        half = td.HalfNormal(torch.ones(D, dtype=torch.bfloat16, device=DEVICE), validate_args=validates)
        prior = fastvae.distributions.as_prior(half).prepared()
        with pytest.raises(ValueError, match="support") if validates else contextlib.nullcontext():
            assert bool((prior.log_prob(outside) == -math.inf).all())


def total(d, z):
    value = d.log_prob(z)
    return value if d.event_shape else value.sum(-1)


@pytest.mark.parametrize("name", [*FAMILIES, *DRAWN])
@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg"])
def test_torch_distributions_as_posteriors(name, estimator):
    """The ratio is log p − log q at z, and the gradient is that of the definition."""
    family = (FAMILIES | DRAWN)[name]
    seen = []

    def decoder(z):
        seen.append(z)
        return z @ weight

    weight, x = randn(D, X, seed=6).double(), (randn(B, X, seed=7) > 0).double()
    a, b = _parameters()
    q = family(a, b)
    options = {"estimator": estimator, "generator": generator(3), **BERNOULLI}
    if name in ("LogNormal", "Gamma", "FisherSnedecor"):  # N(0, I) must be requested
        options["prior"] = td.Normal(a.new_zeros(()), 1.0)
    parts = fastvae.log_weights(x, q, decoder, k=K, **options)
    z = seen[0].reshape(K, B, D)
    expected = td.Normal(0.0, 1.0).log_prob(z).sum(-1) - total(q, z)
    torch.testing.assert_close(parts.log_ratio, expected, rtol=1e-9, atol=1e-9)
    bound = fastvae.ops.log_mean_exp(parts.log_likelihood + parts.log_ratio).sum()
    found = torch.autograd.grad(bound, [a, b], retain_graph=True)
    if estimator == "iwae":
        log_px = td.Bernoulli(logits=z @ weight).log_prob(x).sum(-1)
        value = (torch.logsumexp(log_px + expected, 0) - math.log(K)).sum()
        torch.testing.assert_close(found, torch.autograd.grad(value, [a, b]), rtol=1e-8, atol=1e-9)
        return
    # The gradient of q's parameters, weighted by w or w squared, goes through z alone.
    fixed = family(a.detach(), b.detach())
    free = z.detach().requires_grad_()
    log_px = td.Bernoulli(logits=free @ weight).log_prob(x).sum(-1)
    log_w = log_px + td.Normal(0.0, 1.0).log_prob(free).sum(-1) - total(fixed, free)
    w = torch.softmax(log_w.detach(), 0) ** (2 if estimator == "dreg" else 1)
    (to_z,) = torch.autograd.grad((w * log_w).sum(), free)
    drawn, _ = fastvae.distributions.as_posterior(q).rsample_log_prob(K, seed_of(3))
    assert torch.equal(drawn, z)
    torch.testing.assert_close(found, torch.autograd.grad(drawn, [a, b], to_z), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", FAMILIES)
def test_noise_of_torch_distributions_is_addressed(name):
    """Chunks and shards of a draw are parts of the whole draw."""
    a, b = _parameters()
    whole, _ = TorchDistribution(FAMILIES[name](a, b)).rsample_log_prob(6, SEED)
    part, _ = TorchDistribution(FAMILIES[name](a[2:], b[2:])).rsample_log_prob(
        3, SEED, sample_offset=2, row_offset=2
    )
    assert torch.equal(whole[2:5, 2:], part)


@pytest.mark.parametrize("name", DRAWN)
def test_draws_by_torch_are_repeatable_and_leave_the_random_state(name):
    q = TorchDistribution(DRAWN[name](*_parameters()))
    before = torch.get_rng_state()
    draw = lambda **place: q.rsample_log_prob(K, SEED, **place)[0]  # noqa: E731
    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), draw(sample_offset=1))
    assert not torch.equal(draw(), draw(row_offset=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["Laplace", "LogNormal", "Gumbel", "StudentT", *DRAWN])
def test_draws_follow_their_distribution_function(name):
    """Draws mapped by their distribution function are uniform: mean and variance within six sigma."""
    n = 20_000
    d = (FAMILIES | DRAWN)[name](*(p.detach() for p in _parameters()))
    z, _ = TorchDistribution(d).rsample_log_prob(n, SEED)
    if name in ("StudentT", "FisherSnedecor"):  # without a distribution function
        mean, sigma = z.mean(0), d.variance.sqrt()
        assert bool((sigma < 20).all())
        assert bool(((mean - d.mean).abs() < 6 * sigma / math.sqrt(n)).all())
        return
    u = d.cdf(z)
    assert bool(((u.mean(0) - 0.5).abs() < 6 * math.sqrt(1 / 12 / n)).all())
    assert bool((((u - 0.5).square().mean(0) - 1 / 12).abs() < 6 * math.sqrt(1 / 180 / n)).all())


def test_draws_have_the_full_covariance():
    """Each entry of the draws' covariance is within six sigma."""
    n = 20_000
    d = _full(*(p.detach() for p in _parameters()))
    z, _ = TorchDistribution(d).rsample_log_prob(n, SEED)
    expected, centred = d.covariance_matrix, z - d.mean
    found = torch.einsum("kbi,kbj->bij", centred, centred) / n
    variances = expected.diagonal(dim1=-2, dim2=-1)
    error = (variances.unsqueeze(-1) * variances.unsqueeze(-2) + expected.square()).sqrt() / math.sqrt(n)
    assert bool(((found - expected).abs() < 6 * error).all())


@pytest.mark.parametrize("family", [td.Laplace, td.Cauchy])
def test_the_tail_of_a_quantile_function_is_accurate(family, monkeypatch):
    """A normal's upper tail is not 1 − u, which in float32 is 0 from 5.3 sigma on."""
    eps = torch.tensor([-6.5, 6.5], dtype=torch.float64, device=DEVICE)
    monkeypatch.setattr(fastvae.random, "normal", lambda *_, dtype, **__: eps.to(dtype).reshape(1, 1, 2))
    z, _ = TorchDistribution(family(torch.zeros(1, 2, device=DEVICE), 1.0)).rsample_log_prob(1, SEED)
    # Both are the quantiles of tail probability 4.016e-11.
    tail = 0.5 * math.erfc(6.5 / math.sqrt(2))
    expected = -math.log(2 * tail) if family is td.Laplace else 1 / math.tan(math.pi * tail)
    torch.testing.assert_close(
        z.flatten().double(), torch.tensor([-expected, expected], device=DEVICE).double(), rtol=1e-4, atol=0
    )


def test_an_exact_posterior_gives_equal_weights():
    """An exact full-covariance posterior weighs all draws equally: any K gives log p(x), STL's gradient is 0.

    The model is linear-Gaussian with rotated latents.
    """
    model = LinearGaussian(D, X)
    x = model.sample(B)
    rotation, _ = torch.linalg.qr(randn(D, D, seed=9, dtype=torch.float64))
    mu, logvar = model.posterior(x)
    mean = (mu @ rotation.T).requires_grad_()
    covariance = rotation @ torch.diag_embed(logvar.exp()) @ rotation.T
    scale_tril = torch.linalg.cholesky(covariance).requires_grad_()
    value = fastvae.iwae(
        x, td.MultivariateNormal(mean, scale_tril=scale_tril), lambda z: model.decoder(z @ rotation), k=K,
        likelihood=model.likelihood, estimator="stl", reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(value, model.log_px(x), rtol=1e-9, atol=1e-9)
    grads = torch.autograd.grad(value.sum(), [mean, scale_tril])
    assert all(float(g.abs().max()) < 1e-8 for g in grads)


PRIORS = {
    "Laplace": lambda a: td.Laplace(a, 1.0),
    "per row": lambda a: td.Laplace(a.expand(B, D), 1.0),
    "MultivariateNormal": lambda a: td.MultivariateNormal(a, torch.eye(D, dtype=a.dtype, device=DEVICE)),
    "a mixture": lambda a: td.MixtureSameFamily(
        td.Categorical(logits=torch.zeros(2, dtype=a.dtype, device=DEVICE)),
        td.Independent(td.Normal(torch.stack([a, -a]), torch.ones_like(a)), 1),
    ),
}


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg"])
def test_torch_distributions_as_priors(name, estimator):
    """Value and the gradient of the prior's parameters are the bound's, under every estimator."""
    q, _, leaves = pairs(prior=False)
    a = wide(D, seed=8)
    p = PRIORS[name](a)
    z, ratio = draw_ratio(q, fastvae.distributions.as_prior(p), K, SEED, 0, estimator)
    z = z.reshape(K, B, D)
    log_p = total(p, z)
    torch.testing.assert_close(ratio, log_p - q.log_prob(z), rtol=1e-9, atol=1e-9)
    bound = fastvae.ops.log_mean_exp(ratio).sum()
    (found,) = torch.autograd.grad(bound, a, retain_graph=True)
    w = torch.softmax(ratio.detach(), 0)
    (expected,) = torch.autograd.grad((w * total(p, z.detach())).sum(), a)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert all(g is not None for g in torch.autograd.grad(bound, leaves))


def test_every_entry_accepts_torch_distributions(backend):
    x = torch.rand(B, X, device=DEVICE)
    decoder = nn.Linear(D, X).to(DEVICE)
    q = td.Laplace(randn(B, D, seed=1), torch.ones(B, D, device=DEVICE))
    p = td.Laplace(torch.zeros(D, device=DEVICE), 2.0)
    options = {"prior": p, **BERNOULLI}
    assert fastvae.elbo(x, q, decoder, k=2, **options).isfinite()
    assert fastvae.iwae(x, q, decoder, k=K, k_chunk=3, estimator="dreg", **options).isfinite()
    assert fastvae.log_marginal(x, q, decoder, k=9, k_chunk=4, **options).log_px.isfinite().all()
    assert fastvae.reconstruction_log_prob(x, q, decoder, k=9, **BERNOULLI).isfinite().all()
    result = evaluate_parts(lambda x: q, decoder, x, k=9, progress=False, **options)
    assert result.log_px.isfinite().all() and result.kl_per_dim.shape == (D,)
    vae = fastvae.VAE(lambda x: q, decoder, prior=p, modules=[], **BERNOULLI)
    assert vae(x).isfinite() and vae.reconstruct(x).shape == (B, X) and vae.latent_dim == D
    assert vae.sample(6).shape == (6, X)
    assert torch.equal(vae.sample(6, generator=generator(1)), vae.sample(6, generator=generator(1)))


@pytest.mark.parametrize("objective", [fastvae.elbo, fastvae.iwae])
def test_compiled(objective):
    x, mu, logvar = (
        t.detach() for t in (torch.rand(B, X), randn(B, D, seed=1).cpu(), randn(B, D, seed=2).cpu())
    )
    weight = randn(D, X, seed=3).cpu()

    def loss(mu, logvar, location):
        prior = td.Laplace(location, torch.ones(D), validate_args=False)
        options = {"kl": "mc"} if objective is fastvae.elbo else {"k": K, "estimator": "dreg"}
        return objective(x, (mu, logvar), lambda z: z @ weight, prior=prior, **options, **BERNOULLI)

    # torch 2.11 cannot trace the inspection of an object's attributes, and breaks the graph there.
    whole = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)
    compiled = torch.compile(loss, fullgraph=whole, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        leaves = [t.clone().requires_grad_() for t in (mu, logvar, torch.zeros(D))]
        torch.manual_seed(3)
        value = function(*leaves)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# Gamma and Dirichlet draws: torch's, wrapped in fastvae's ops


@pytest.mark.parametrize(
    "make",
    [
        td.Gamma,
        td.Beta,
        lambda a, b: td.Dirichlet(a + b),
        lambda a, b: td.Chi2(a),
        lambda a, b: td.InverseGamma(a, b),
        lambda a, b: td.Independent(td.Gamma(a, b), 1),
    ],
)
def test_draws_by_ops_equal_torch(make):
    """Draws by ops equal torch's in value and gradient, and leave torch's random state unchanged."""
    leaves = [wide(B, D, seed=s).detach().exp().requires_grad_() for s in (1, 2)]
    results, state = [], torch.get_rng_state()
    z, _ = TorchDistribution(make(*leaves)).rsample_log_prob(K, SEED, sample_offset=2, row_offset=1)
    assert torch.equal(torch.get_rng_state(), state)
    with seeded(SEED, DEVICE, 2, 1):
        own = make(*leaves).rsample((K,))
    for draws_ in (z, own):
        results.append([draws_, *torch.autograd.grad(draws_.sin().sum(), leaves, allow_unused=True)])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


# The support of q


ON_LESS = {  # with a prior of the same support
    "RelaxedOneHotCategorical": lambda t, rows: td.RelaxedOneHotCategorical(torch.tensor(0.7), logits=t),
    "Dirichlet": lambda t, rows: td.Dirichlet(t.exp()),
    "Gamma": lambda t, rows: td.Independent(td.Gamma(t.exp(), 1.0), 1),
    "Beta": lambda t, rows: td.Beta(t.exp(), t.exp()),
    "Uniform": lambda t, rows: td.Uniform(0 * t, 0 * t + (0.5 if rows else 1.0)),
    "tanh": lambda t, rows: td.TransformedDistribution(td.Normal(t, 1.0), [td.TanhTransform(cache_size=1)]),
    "LogNormal": lambda t, rows: LogNormal(t, 0 * t),
    "Exponential": lambda t, rows: Exponential(t),
    "Mixture": lambda t, rows: Mixture([Exponential(t), td.LogNormal(t, 1.0)]),
    "several axes": lambda t, rows: td.Dirichlet(t.exp()[..., None, :].expand(*t.shape[:-1], 2, D)),
}


@pytest.mark.parametrize("name", ON_LESS)
def test_a_posterior_of_restricted_support_needs_a_prior(name):
    make, x = ON_LESS[name], torch.ones(B, X, device=DEVICE)
    size = 2 * D if name == "several axes" else D
    decoder = lambda z: z.flatten(1) @ torch.ones(size, X, device=DEVICE)  # noqa: E731
    q, p = make(0.3 * randn(B, D, seed=1), True), make(randn(D, seed=2), False)
    for objective in (fastvae.elbo, fastvae.iwae, fastvae.log_marginal):
        with pytest.raises(ValueError, match=r"support is .* not all of R\^D.*N\(0, I\).*pass prior="):
            objective(x, q, decoder, **BERNOULLI)
    vae = fastvae.VAE(lambda x: q, decoder, modules=[], **BERNOULLI)
    with pytest.raises(ValueError, match="pass prior="):
        vae(x, objective="iwae", k=K)
    assert fastvae.iwae(x, q, decoder, k=K, prior=p, **BERNOULLI).isfinite()
    assert fastvae.elbo(x, q, decoder, kl="mc", prior=p, **BERNOULLI).isfinite()
    assert fastvae.reconstruction_log_prob(x, q, decoder, k=K, **BERNOULLI).isfinite().all()
    if name in ("RelaxedOneHotCategorical", "Dirichlet"):
        with pytest.raises(ValueError, match="Dirichlet|Relaxed.*the simplex.*DiagonalNormal.*pass prior="):
            fastvae.iwae(x, q, decoder, k=K, prior=td.Normal(torch.zeros(D, device=DEVICE), 1.0), **BERNOULLI)


# Events of a group of latents, [B, 3, 5]


def _mvn(mean, scale):
    return td.MultivariateNormal(mean, scale_tril=torch.diag_embed(scale.exp()))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: td.Independent(d, 1)], ids=["plain", "Independent"])
@pytest.mark.parametrize("name", ["mvn", "mvn, one", "mvn, rows", "dirichlet"])
def test_grouped_latents_have_a_closed_kl(name, wrap, no_earlier_warning):
    x, decoder = torch.ones(B, X, device=DEVICE), lambda z: z.new_zeros(len(z), X)
    a, b, c, d = (
        0.4 * randn(*shape, seed=i) for i, shape in enumerate(((B, 3, 5), (B, 3, 5), (3, 5), (3, 5)))
    )
    q = td.Dirichlet(a.exp()) if name == "dirichlet" else _mvn(a, b)
    p = {
        "mvn": lambda: wrap(_mvn(c, d)),
        "mvn, one": lambda: _mvn(c[0], d[0]),
        "mvn, rows": lambda: wrap(_mvn(c.expand(B, 3, 5), d.expand(B, 3, 5))),
        "dirichlet": lambda: wrap(td.Dirichlet(c.exp())),
    }[name]()
    plain = p.base_dist if isinstance(p, td.Independent) else p
    found = fastvae.elbo(x, wrap(q), decoder, prior=p, terms=True, **BERNOULLI)
    torch.testing.assert_close(found.kl, td.kl_divergence(q, plain).sum(1), rtol=1e-5, atol=1e-5)
    seen = []
    parts = fastvae.log_weights(
        x, wrap(q), lambda z: seen.append(z) or decoder(z), k=K, prior=p, generator=generator(5), **BERNOULLI
    )
    z = seen[0].unflatten(0, (K, B))
    expected = (plain.log_prob(z) - q.log_prob(z)).sum(-1)
    torch.testing.assert_close(parts.log_ratio, expected, rtol=1e-4, atol=1e-4)


# The KL


@pytest.fixture
def no_earlier_warning(monkeypatch):
    monkeypatch.setattr(draws, "_said", set())


@pytest.mark.filterwarnings("error")
def test_closed_forms_of_torch_are_used(no_earlier_warning):
    x, decoder = torch.rand(B, X, device=DEVICE), nn.Linear(D, X).to(DEVICE)
    location = randn(B, D, seed=1)
    laplace, normal = td.Laplace(location, 0.7), td.Normal(location, 0.7)
    one = torch.ones(D, device=DEVICE)
    for q, p in ((laplace, td.Laplace(0.5 * one, 2 * one)), (normal, td.Laplace(0.5 * one, 2 * one))):
        terms = fastvae.elbo(x, q, decoder, prior=p, terms=True, **BERNOULLI)
        torch.testing.assert_close(terms.kl, td.kl_divergence(q, p).sum(1))
        assert fastvae.elbo(x, q, decoder, prior=p, free_bits=0.1, **BERNOULLI).isfinite()
    together = td.Independent(laplace, 1), td.Independent(td.Laplace(0.5 * one, 2 * one), 1)
    terms = fastvae.elbo(x, together[0], decoder, prior=together[1], terms=True, **BERNOULLI)
    torch.testing.assert_close(terms.kl, td.kl_divergence(*together))


@pytest.mark.parametrize("family", [td.Laplace, td.Gumbel])
def test_independent_dimensions_have_the_kl_of_the_family(family):
    """Independent(q, 1) with the standard prior has the closed form that q has."""
    x, decoder = torch.rand(B, X, device=DEVICE), nn.Linear(D, X).to(DEVICE)
    q = family(randn(B, D, seed=1), randn(B, D, seed=2).exp())
    kls = [
        fastvae.elbo(x, d, decoder, kl="analytic", terms=True, **BERNOULLI).kl
        for d in (q, td.Independent(q, 1), td.Independent(td.Independent(q, 0), 1))
    ]
    expected = td.kl_divergence(q, td.Normal(torch.zeros_like(q.loc), 1.0)).sum(1)
    for kl in kls:
        torch.testing.assert_close(kl, expected)


def test_a_kl_without_closed_form_is_estimated_with_one_warning(no_earlier_warning):
    x, decoder = torch.rand(B, X, device=DEVICE), nn.Linear(D, X).to(DEVICE)
    q, p = (randn(B, D, seed=1), randn(B, D, seed=2)), td.StudentT(5.0)
    call = lambda **options: fastvae.elbo(  # noqa: E731
        x, q, decoder, prior=p, k=K, terms=True, generator=generator(2), **options, **BERNOULLI
    )
    with pytest.warns(UserWarning, match=r"q = DiagonalNormal and p = StudentT; it is estimated.*kl=\"mc\""):
        found = call()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again, expected = call(), call(kl="mc")
    terms = (vars(t).values() for t in (found, again, expected))
    for a, b, c in zip(*terms, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    with pytest.raises(
        ValueError, match=r"free_bits needs the KL of each dimension in closed form.*StudentT"
    ):
        call(free_bits=0.1)


def test_a_registered_kl_is_used():
    class Family(Own):
        def log_prob(self, z):
            return super().log_prob(z)

    class Further(Family):
        pass

    class Other(Family):
        def rsample_log_prob(self, samples, seed, **place):
            return super().rsample_log_prob(samples, seed, **place)

    made = lambda kind: kind(randn(B, D, seed=1), randn(B, D, seed=2))  # noqa: E731
    standard = StandardNormal()
    # A subclass may override the density, so it has no closed form unless registered.
    assert torch.equal(closed_kl(made(Own), standard), closed_kl(made(DiagonalNormal), standard))
    assert closed_kl(made(Family), standard) is None

    @register_kl(Family, StandardNormal)
    def _(q, p):
        return torch.full((B,), 7.0, device=DEVICE)

    for kind in (Family, Further):
        x, decoder = torch.rand(B, X, device=DEVICE), nn.Linear(D, X).to(DEVICE)
        assert fastvae.elbo(x, made(kind), decoder, terms=True, **BERNOULLI).kl.tolist() == [7.0] * B
    assert closed_kl(made(Other), standard) is None


# Detached parameters


def test_frozen_returns_a_copy_without_gradients():
    inner = nn.Sequential(nn.Linear(D, D), nn.BatchNorm1d(D))

    class Deep(Distribution, nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.own = inner, nn.Parameter(torch.ones(D))
            self.listed = [inner[0].weight * 2, {"a": inner[0].weight * 3}]
            self.itself = [self]

    deep = Deep()
    copied = frozen(deep)
    assert copied is not deep and copied.itself[0] is copied and type(copied) is Deep
    assert not copied.own.requires_grad and not copied.net[0].weight.requires_grad
    assert not copied.listed[0].requires_grad and not copied.listed[1]["a"].requires_grad
    assert deep.own.requires_grad and deep.net[0].weight.requires_grad and deep.listed[1]["a"].requires_grad
    assert torch.equal(copied.net(torch.ones(2, D)), deep.net(torch.ones(2, D)))
    assert dict(deep.named_parameters()).keys() == {
        "own",
        "net.0.weight",
        "net.0.bias",
        "net.1.weight",
        "net.1.bias",
    }
    flow = FAMILIES["a flow"](*_parameters())
    assert not frozen(flow).rsample().requires_grad and flow.rsample().requires_grad


# Errors


@pytest.mark.parametrize(
    "q, exception, words",
    [
        (lambda: td.Bernoulli(torch.zeros(B, D)), TypeError, "has no rsample"),
        (
            lambda: td.Laplace(torch.zeros(D), 1.0),
            ValueError,
            r"batch shape \[3\] and event shape \[\]; expected",
        ),
        (
            lambda: td.Independent(td.Laplace(torch.zeros(B, D, 1), 1.0), 3),
            ValueError,
            r"expected \[B, D\] in all",
        ),
        (lambda: StandardNormal(), TypeError, "q is StandardNormal, which has no rows"),
        (
            lambda: DiagonalNormal(torch.zeros(D), torch.zeros(D)),
            ValueError,
            r"mu has shape \[3\]; expected",
        ),
        (
            lambda: DiagonalNormal(torch.zeros(B, D), torch.zeros(D)),
            ValueError,
            r"logvar has shape \[3\]; expected \[B, D\]",
        ),
    ],
)
def test_invalid_posteriors_are_refused(q, exception, words):
    with pytest.raises(exception, match=words):
        fastvae.elbo(torch.rand(B, X), q(), nn.Linear(D, X), **BERNOULLI)


def test_missing_methods_of_a_family_are_named():
    class Nothing(Distribution):
        batch, device = B, DEVICE

    x, decoder, q = torch.rand(B, X, device=DEVICE), nn.Linear(D, X).to(DEVICE), Nothing()
    with pytest.raises(NotImplementedError, match="Nothing has no rsample_log_prob, which a posterior needs"):
        fastvae.iwae(x, q, decoder, **BERNOULLI)
    pair = torch.zeros(B, D, device=DEVICE), torch.zeros(B, D, device=DEVICE)
    with pytest.raises(NotImplementedError, match="Nothing has no log_prob"):
        fastvae.iwae(x, pair, decoder, prior=q, **BERNOULLI)
    vae = fastvae.VAE(lambda x: pair, decoder, prior=Distribution(), latent_dim=D, modules=[], **BERNOULLI)
    with pytest.raises(NotImplementedError, match="Distribution has no sample"):
        vae.sample(2)
    vae = fastvae.VAE(lambda x: pair, decoder, prior=q, latent_dim=D, modules=[], **BERNOULLI)
    with pytest.raises(ValueError, match=f"Nothing, has {B} rows, but 2 draws were requested"):
        vae.sample(2)
    message = r"the prior, Laplace, has parameters \[4\]; to draw z \[k, 3\] from it, they must broadcast to"
    with pytest.raises(ValueError, match=message):
        TorchDistribution(td.Laplace(torch.zeros(4), 1.0)).sample(2, dim=3)
    bare = fastvae.VAE(lambda x: q, decoder, modules=[], **BERNOULLI)
    with pytest.raises(ValueError, match="mean of q.* is not known"):
        bare.reconstruct(x)


# Subclasses and seams


def test_a_subclass_does_not_inherit_the_closed_kl():
    class Wider(StandardNormal):
        def log_prob(self, z):
            return super().log_prob(z / 2) - z.shape[-1] * math.log(2)

    assert closed_kl(DiagonalNormal(randn(B, D, seed=1), randn(B, D, seed=2)), Wider()) is None


@pytest.mark.parametrize("family", [td.Normal, td.Laplace, td.LogNormal])
def test_subclasses_of_torch_families_use_their_own_methods(family):
    class Clipped(family):
        def rsample(self, shape=()):
            return super().rsample(shape).clamp(0.5, 1)

        def log_prob(self, value):
            return 2 * super().log_prob(value)

    q = Clipped(torch.zeros(B, D, device=DEVICE), torch.ones(B, D, device=DEVICE))
    seen = []
    parts = fastvae.log_weights(
        torch.rand(B, D, device=DEVICE),
        q,
        lambda z: seen.append(z) or z,
        k=K,
        prior=Clipped(0.0, 1.0),
        **BERNOULLI,
    )
    assert bool(((seen[0] >= 0.5) & (seen[0] <= 1)).all())
    # q and p have the same density: the ratio is rounding error.
    torch.testing.assert_close(parts.log_ratio, torch.zeros(K, B, device=DEVICE), rtol=0, atol=1e-4)


@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg"])
def test_parameters_that_cannot_be_frozen_are_an_error(estimator):
    """Parameters in a closure raise: counted twice, they would silently give the prior a wrong gradient."""
    weight = torch.ones(D, device=DEVICE, requires_grad=True)

    class Reaching(Distribution):
        def __init__(self):
            super().__init__()
            self.density = lambda z: -(z * weight).square().sum(-1)

        def log_prob(self, z):
            return self.density(z)

    q = randn(B, D, seed=1).requires_grad_(), randn(B, D, seed=2).requires_grad_()
    x, decoder = torch.rand(B, X, device=DEVICE), nn.Linear(D, X).to(DEVICE)
    options = {"k": K, "prior": Reaching(), "estimator": estimator}
    call = lambda: fastvae.iwae(x, q, decoder, **options, **BERNOULLI)  # noqa: E731
    if estimator == "dreg":
        with pytest.raises(RuntimeError, match="Reaching.log_prob with its parameters frozen.*closure"):
            call()
    else:
        assert torch.autograd.grad(call(), weight)[0].isfinite().all()


def test_a_learned_torch_prior_is_refused_by_a_module():
    learned = td.Laplace(nn.Parameter(torch.zeros(D)), torch.ones(D))
    with pytest.raises(TypeError, match=r"Laplace with learned parameters.*not be trained.*Diagonal"):
        fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), prior=learned)


def test_drawing_leaves_other_devices_alone(monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("reseeded"))
    q = td.Gamma(torch.ones(B, D), torch.ones(B, D))
    TorchDistribution(q).rsample_log_prob(2, torch.tensor(3))


def test_registered_kls_are_validated():
    for wrong in (td.Gamma, StandardNormal(), 3):
        with pytest.raises(
            TypeError, match="register_kl takes subclasses of fastvae.distributions.Distribution"
        ):
            register_kl(wrong, StandardNormal)

    class Forgetful(Own):
        def log_prob(self, z):
            return super().log_prob(z)

    register_kl(Forgetful, StandardNormal)(lambda q, p: None)
    with pytest.raises(TypeError, match="registered KL of Forgetful and StandardNormal returned None"):
        closed_kl(Forgetful(randn(B, D, seed=1), randn(B, D, seed=2)), StandardNormal())


def test_lazily_negative_tensors():
    """Lazily negated views, which the dispatcher resolves, must not be read raw by the fast path."""
    mu, logvar, seed = randn(B, D, seed=1), randn(B, D, seed=2), torch.tensor(3, device=DEVICE)
    expected = fastvae.ops.rsample_kl(mu, logvar, seed=seed)
    for a, b in zip(fastvae.ops.rsample_kl(torch._neg_view(-mu), logvar, seed=seed), expected, strict=True):
        torch.testing.assert_close(a, b)


# A prior's clamp


@pytest.mark.parametrize("kl", ["analytic", "mc"])
def test_the_clamp_of_a_prior_is_applied(kl):
    """A prior with a clamp equals one of the clamped log variance, with zero gradient where clamped."""
    mu, logvar = wide(B, D, seed=1), wide(B, D, seed=2)
    m, s = wide(D, seed=3), wide(D, seed=4)
    x, weight = (randn(B, X, seed=5) > 0).double(), randn(D, X, seed=6).double()
    low, high = (
        float(v) for v in s.detach().quantile(torch.tensor([0.3, 0.7], dtype=s.dtype, device=s.device))
    )

    def run(prior):
        value = fastvae.elbo(
            x, (mu, logvar), lambda z: z @ weight, prior=prior, kl=kl, generator=generator(7), **BERNOULLI
        )
        return value, *torch.autograd.grad(value, (m, s))

    found = run(DiagonalNormal(m, s, logvar_range=(low, high)))
    expected = run(DiagonalNormal(m, s.clamp(low, high)))
    for a, e in zip(found, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12)
    inside = (s > low) & (s < high)
    assert bool(inside.any()) and not bool(inside.all())
    assert torch.equal(found[2] != 0, inside)


class Shifted(DiagonalNormal):
    def log_prob(self, z):
        return super().log_prob(z) - 1


def test_a_subclass_of_a_prior_uses_its_own_density():
    q = randn(B, D, seed=1), randn(B, D, seed=2)
    m, s = randn(D, seed=3), randn(D, seed=4)
    x, weight = (randn(B, X, seed=5) > 0).float(), randn(D, X, seed=6)
    found = [
        fastvae.iwae(x, q, lambda z: z @ weight, k=K, prior=kind(m, s), generator=generator(7), **BERNOULLI)
        for kind in (DiagonalNormal, Shifted)
    ]
    torch.testing.assert_close(found[1], found[0] - 1, rtol=1e-5, atol=1e-5)


# A pair (mu, logvar) as the prior


def _entries():
    """Yield each entry that takes ``prior=``, as a function of the prior."""
    x, q = (randn(B, X, seed=1) > 0).float(), (randn(B, D, seed=2), randn(B, D, seed=3))
    encoder, decoder = nn.Linear(X, 2 * D).to(DEVICE), nn.Linear(D, X).to(DEVICE)

    def call(function, *arguments, **options):
        return lambda prior: function(*arguments, prior=prior, generator=generator(4), **BERNOULLI, **options)

    yield "elbo", call(fastvae.elbo, x, q, decoder)
    yield "elbo mc", call(fastvae.elbo, x, q, decoder, kl="mc", k=3)
    yield "iwae", call(fastvae.iwae, x, q, decoder, k=K)
    yield "iwae in chunks", call(fastvae.iwae, x, q, decoder, k=K, k_chunk=2, estimator="dreg")
    yield "bound", call(fastvae.bound, x, q, decoder, fastvae.bounds.IWAE(2), k=K)
    yield "beta_tc", call(fastvae.beta_tc, x, q, decoder, dataset_size=99)
    yield "sleep", call(fastvae.sleep, encoder, decoder, B, latent_dim=D)
    yield "log_weights", lambda p: call(fastvae.log_weights, x, q, decoder, k=K)(p).log_ratio
    for proposal in ("posterior", "defensive", "adapted"):
        marginal = call(fastvae.log_marginal, x, q, decoder, k=100, proposal=proposal)
        yield f"log_marginal {proposal}", lambda p, marginal=marginal: marginal(p).log_px
    evaluate = call(evaluate_parts, encoder, decoder, x, k=20, progress=False)
    yield "evaluate", lambda p: torch.as_tensor(evaluate(p).log_px)
    ais = call(fastvae.audit.ais, x, q, decoder, steps=3, k=2)
    yield "ais", lambda p: ais(p).log_px
    bdmc = call(fastvae.audit.bdmc, encoder, decoder, latent_dim=D, n=4, steps=3, k=2)
    yield "bdmc", lambda p: bdmc(p).lower
    lattice = fastvae.audit.lattice
    yield "lattice", lambda p: lattice(x, decoder, latent_dim=D, points=9, prior=p, **BERNOULLI).log_px

    def vae(method, *arguments, **options):
        def run(prior):
            model = fastvae.VAE(encoder, decoder, prior=prior, latent_dim=D, **BERNOULLI)
            return getattr(model, method)(*arguments, generator=generator(4), **options)

        return run

    yield "VAE.elbo", vae("elbo", x)
    yield "VAE.iwae", vae("iwae", x, k=K)
    yield "VAE.sample", vae("sample", 5, mean=True)
    yield "VAE.log_marginal", lambda p: vae("log_marginal", x, k=50)(p).log_px
    yield "latents", lambda p: torch.tensor(
        fastvae.diagnostics.latents(fastvae.VAE(encoder, decoder, prior=p, **BERNOULLI), x,
                                    generator=generator(4)).kl
    )  # fmt: skip


@pytest.mark.parametrize("name", [name for name, _ in _entries()])
def test_a_pair_is_accepted_as_a_prior_everywhere(name):
    """``prior=(mu, logvar)``, a tuple or a list, is DiagonalNormal(mu, logvar), for [D] and for [B, D]."""
    torch.manual_seed(0)
    entry = dict(_entries())[name]
    shared = name in ("lattice", "latents", "bdmc", "beta_tc") or name.startswith("VAE")
    for rows in ((), (B,)):
        if rows and shared:
            continue
        if rows and name == "evaluate":  # whose batches have other rows
            continue
        pair = randn(*rows, D, seed=5), randn(*rows, D, seed=6)
        torch.manual_seed(1)
        expected = entry(DiagonalNormal(*pair))
        for given in (pair, list(pair)):
            torch.manual_seed(1)
            assert torch.equal(entry(given), expected)
        standard = entry(None)
        assert not torch.equal(standard, expected)


def test_a_learned_pair_is_registered():
    pair = nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))
    vae = fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), prior=pair, **BERNOULLI)
    names = [name for name, _ in vae.named_parameters() if name.startswith("prior")]
    assert names == ["prior.mu", "prior.logvar"]
    (-vae.iwae(torch.ones(B, X), k=3)).backward()
    assert pair[0].grad is not None and bool(pair[1].grad.any())
    fixed = fastvae.VAE(
        nn.Linear(X, 2 * D), nn.Linear(D, X), prior=(torch.zeros(D), torch.ones(D)), **BERNOULLI
    )
    assert {"prior.mu", "prior.logvar"} <= set(fixed.state_dict())


@pytest.mark.parametrize("op", ["rsample_kl", "rsample_log_ratio"])
@pytest.mark.parametrize("form", [f for f in FORMS if "logvar_range" not in f])
def test_ops_accept_a_diagonal_normal(op, form):
    """``prior=DiagonalNormal(...)`` is its mean and log variance."""
    function = getattr(fastvae.ops, op)
    mu, logvar = randn(B, D, seed=1), randn(B, D, seed=2)
    p = DiagonalNormal(randn(D, seed=3), randn(D, seed=4).abs(), **form)
    found, expected = (
        function(mu, logvar, k=K, prior=prior, seed=SEED) for prior in (p, (p.mu, p.log_variance()))
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_ops_refuse_other_priors():
    mu, logvar = randn(B, D, seed=1), randn(B, D, seed=2)
    for wrong in (Own(mu, logvar), fastvae.distributions.Laplace(mu, logvar)):
        with pytest.raises(TypeError, match=r"prior must be a pair of tensors \(mean, logvar\), a fastvae"):
            fastvae.ops.rsample_kl(mu, logvar, prior=wrong)
    half = DiagonalNormal(mu.bfloat16(), logvar.abs().bfloat16(), scale_form="scale")
    with pytest.raises(ValueError, match="not log variances, which half precision would round"):
        fastvae.ops.rsample_kl(mu, logvar, prior=half)


@pytest.mark.parametrize("route", ["stl", "dreg", "chunks", WakePhi(), IWAE(groups=2)], ids=str)
def test_estimators_agree_where_a_sample_has_prior_density_0(route):
    """A Gumbel's density is 0 in float32 from z = −90 on; such a sample has weight 0 for every estimator."""
    x, decoder = (randn(B, X, seed=4) > 0).float(), nn.Linear(1, X).to(DEVICE)
    loc = torch.full((B, 1), -88.0, device=DEVICE, requires_grad=True)
    q = td.Normal(loc, torch.ones_like(loc))
    p = td.Gumbel(torch.zeros(1, device=DEVICE), torch.ones(1, device=DEVICE), validate_args=False)
    options = {"k": K, "prior": p, "reduction": "none", **BERNOULLI}
    expected = fastvae.iwae(x, q, decoder, generator=generator(5), **options)
    z = fastvae.log_weights(x, q, decoder, k=K, prior=p, generator=generator(5), **BERNOULLI)
    dead = z.log_ratio == -math.inf
    assert bool(dead.any()) and not bool(dead.all(0).any())
    if route == "chunks":
        found = fastvae.iwae(x, q, decoder, estimator="dreg", k_chunk=4, generator=generator(5), **options)
    elif isinstance(route, str):
        found = fastvae.iwae(x, q, decoder, estimator=route, generator=generator(5), **options)
    else:
        found = fastvae.bound(x, q, decoder, IWAE(), q_objective=route, generator=generator(5), **options)
    torch.testing.assert_close(found, expected)
