"""Options of the front end: terms, β, clamps, priors, scales, and a VAE's own methods."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae import ops
from fastvae.distributions import DiagonalNormal, StandardNormal
from fastvae.distributions.draws import draw_kl, draw_ratio
from fastvae.likelihoods import Gaussian

from . import models
from .conftest import DEVICE
from .models import LinearGaussian, evaluate_parts, generator, rand, randn, seed_of

B, D, X, K = 5, 3, 7, 4


def _inputs(dtype=torch.float64):
    """Return x, mu, logvar and the weight of a linear decoder."""
    return (
        randn(B, X, seed=1, dtype=dtype),
        randn(B, D, seed=2, dtype=dtype),
        randn(B, D, seed=3, dtype=dtype),
        randn(D, X, seed=4, dtype=dtype),
    )


def _samples(mu, logvar, k, seed):
    """Return z [K, B, D] at the address that the objectives draw from."""
    eps = fastvae.random.normal(seed_of(seed), k, *mu.shape, dtype=mu.dtype)
    return mu + torch.exp(0.5 * logvar) * eps


def _close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


# Terms.


@pytest.mark.parametrize("k_chunk", [None, 3])
def test_terms_of_iwae_are_means_over_the_draws(k_chunk):
    """iwae's terms are means of log p(x|z) and of log q(z|x) − log p(z), which estimates the KL."""
    x, mu, logvar, weight = _inputs()
    terms = fastvae.iwae(
        x, (mu, logvar), lambda z: z @ weight, k=K, k_chunk=k_chunk, likelihood=Gaussian(0.8),
        terms=True, generator=generator(5),
    )  # fmt: skip
    z = _samples(mu, logvar, K, 5)
    log_likelihood = td.Normal(z @ weight, 0.8).log_prob(x).sum(2)
    log_q = td.Normal(mu, torch.exp(0.5 * logvar)).log_prob(z).sum(2)
    log_p = td.Normal(torch.zeros_like(mu), 1.0).log_prob(z).sum(2)
    _close(terms.log_likelihood, log_likelihood.mean(0))
    _close(terms.kl, (log_q - log_p).mean(0))
    _close(terms.bound, torch.logsumexp(log_likelihood + log_p - log_q, 0) - math.log(K))


def test_terms_of_the_monte_carlo_elbo_are_means_over_the_draws():
    x, mu, logvar, weight = _inputs()
    terms = fastvae.elbo(
        x, (mu, logvar), lambda z: z @ weight, k=K, kl="mc", likelihood=Gaussian(0.8),
        terms=True, generator=generator(6),
    )  # fmt: skip
    z = _samples(mu, logvar, K, 6)
    log_q = td.Normal(mu, torch.exp(0.5 * logvar)).log_prob(z).sum(2)
    log_p = td.Normal(torch.zeros_like(mu), 1.0).log_prob(z).sum(2)
    _close(terms.log_likelihood, td.Normal(z @ weight, 0.8).log_prob(x).sum(2).mean(0))
    _close(terms.kl, (log_q - log_p).mean(0))


@pytest.mark.parametrize(
    "options", [{}, {"kl": "mc"}, {"kl": "mc", "k": K}, {"free_bits": 0.3}, {"k": K}], ids=str
)
def test_beta_scales_every_kind_of_kl(options):
    """β scales every kind of KL in value and gradient."""
    x, mu, logvar, weight = _inputs()
    mu.requires_grad_()

    def run(**more):
        return fastvae.elbo(
            x, (mu, logvar), lambda z: z @ weight, likelihood=Gaussian(0.8), generator=generator(7),
            **options, **more,
        )  # fmt: skip

    plain, heavy = run(terms=True), run(beta=3.0, terms=True)
    assert float(plain.kl.detach().abs().min()) > 1e-3
    _close(heavy.kl, plain.kl)
    _close(heavy.bound, plain.bound - 2 * plain.kl)
    _close(run(beta=3.0), heavy.bound.mean())
    _close(run(beta=0.0), plain.log_likelihood.mean())
    slope = [torch.autograd.grad(run(beta=beta), mu)[0] for beta in (0.0, 1.0, 3.0)]
    _close(slope[2] - slope[0], 3 * (slope[1] - slope[0]))
    assert bool((slope[1] != slope[0]).any())


# Posteriors and priors.


@pytest.mark.parametrize("wrapped", [False, True], ids=["Normal", "Independent"])
@pytest.mark.parametrize("objective", ["elbo", "elbo mc", "iwae"])
def test_a_torch_normal_is_read_by_its_standard_deviation(objective, wrapped):
    """A torch Normal, as q or p, has standard deviations, not variances; compared by torch's densities."""
    x, mu, logvar, weight = _inputs()
    q = td.Normal(mu, torch.exp(0.5 * logvar))
    p = td.Normal(randn(D, seed=8, dtype=torch.float64), 0.5 + rand(D, seed=9, dtype=torch.float64))
    given = (td.Independent(q, 1), td.Independent(p, 1)) if wrapped else (q, p)
    options = {"likelihood": Gaussian(0.8), "prior": given[1], "reduction": "none"}
    if objective == "iwae":
        got = fastvae.iwae(x, given[0], lambda z: z @ weight, k=K, generator=generator(10), **options)
    else:
        kl = "mc" if objective == "elbo mc" else "analytic"
        got = fastvae.elbo(x, given[0], lambda z: z @ weight, k=K, kl=kl, generator=generator(10), **options)
    z = _samples(mu, logvar, K, 10)
    log_likelihood = td.Normal(z @ weight, 0.8).log_prob(x).sum(2)
    log_ratio = (p.log_prob(z) - q.log_prob(z)).sum(2)
    expected = {
        "elbo": log_likelihood.mean(0) - td.kl_divergence(q, p).sum(1),
        "elbo mc": (log_likelihood + log_ratio).mean(0),
        "iwae": torch.logsumexp(log_likelihood + log_ratio, 0) - math.log(K),
    }[objective]
    _close(got, expected)


CLAMP = (-0.5, 0.75)


@pytest.mark.parametrize("objective", ["elbo", "elbo mc", "iwae", "log_marginal"])
def test_logvar_range_clamps_draws_kl_and_log_ratio(objective):
    """logvar_range acts on z, the KL and the log-ratio like clamped log variances."""
    x, mu, logvar, weight = _inputs()
    assert bool((logvar < CLAMP[0]).any()) and bool((logvar > CLAMP[1]).any())

    def run(q):
        options = {"likelihood": Gaussian(0.8), "generator": generator(11)}
        decoder = lambda z: z @ weight  # noqa: E731
        if objective == "iwae":
            return fastvae.iwae(x, q, decoder, k=K, reduction="none", **options)
        if objective == "log_marginal":
            return fastvae.log_marginal(x, q, decoder, k=K, **options).log_px
        kl = "mc" if objective == "elbo mc" else "analytic"
        return fastvae.elbo(x, q, decoder, kl=kl, reduction="none", **options)

    got = run(DiagonalNormal(mu, logvar, logvar_range=CLAMP))
    _close(got, run((mu, logvar.clamp(*CLAMP))))
    assert float((got - run((mu, logvar))).abs().min()) > 1e-6


# Other forms of these log variances.
RAW = {
    "log_scale": (0.0, lambda v: v / 2),
    "scale": (0.0, lambda v: torch.exp(v / 2)),
    "softplus": (0.0, lambda v: torch.log(torch.expm1(v.exp()))),
    "softplus with a floor": (0.05, lambda v: torch.log(torch.expm1(v.exp() - 0.05))),
}


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("learned", [False, True])
def test_every_form_of_scale_equals_its_log_variance(name, learned):
    """Every form of scale, in q and prior, gives the bounds and gradients of its log variance."""
    x, mu, logvar, weight = _inputs()
    assert float(logvar.exp().min()) > 0.06
    floor, raw_of = RAW[name]
    form = {"scale_form": name.split()[0], "floor": floor}
    options = {"likelihood": Gaussian(0.8)}
    decoder = lambda z: z @ weight  # noqa: E731
    objectives = {
        "elbo": lambda q, **o: fastvae.elbo(x, q, decoder, k=K, beta=0.7, **o),
        "free bits": lambda q, **o: fastvae.elbo(x, q, decoder, free_bits=0.1, **o),
        "free bits of each": lambda q, **o: fastvae.elbo(
            x, q, decoder, free_bits=0.1, free_bits_per="example", **o
        ),
        "elbo mc": lambda q, **o: fastvae.elbo(x, q, decoder, kl="mc", k=2, **o),
        "beta_tc": lambda q, **o: fastvae.beta_tc(x, q, decoder, k=2, **o),
        **{
            f"{estimator} {k_chunk}": lambda q, e=estimator, c=k_chunk, **o: fastvae.iwae(
                x, q, decoder, k=K, estimator=e, k_chunk=c, **o
            )
            for estimator in ("iwae", "stl", "dreg")
            for k_chunk in (None, 2)
        },
    }

    def run(objective, raw):
        m, v = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
        pm, pv = (torch.linspace(-0.3, 0.4, D, dtype=mu.dtype, device=DEVICE).requires_grad_() for _ in "ab")
        if raw:
            q, p = (DiagonalNormal(a, raw_of(b), **form) for a, b in ((m, v), (pm, pv)))
        else:
            q, p = (m, v), DiagonalNormal(pm, pv)
        leaves = [m, v, pm, pv] if learned else [m, v]
        bound = objective(q, generator=generator(11), **options, **({"prior": p} if learned else {}))
        return [bound, *torch.autograd.grad(bound, leaves)]

    for objective in objectives.values():
        for a, b in zip(run(objective, True), run(objective, False), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", RAW)
def test_unfinished_examples_keep_their_scale(name):
    n = 23
    model, x, mu, logvar = _two_unfinished(n)
    logvar = logvar.clamp(min=-2.5)
    floor, raw_of = RAW[name]
    form = {"scale_form": name.split()[0], "floor": floor}
    options = {"likelihood": model.likelihood, "k": 800}

    def run(q):
        evaluation = evaluate_parts(
            lambda _: q,
            model.decoder,
            x,
            tol=0.2,
            batch_size=n,
            progress=False,
            generator=generator(13),
            **options,
        )
        return evaluation, fastvae.log_marginal(x, q, model.decoder, generator=generator(14), **options)

    (got, marginal), (expected, expected_marginal) = (
        run(DiagonalNormal(mu, raw_of(logvar), **form)), run((mu, logvar))
    )  # fmt: skip
    assert torch.equal(got.k, expected.k)
    for a, b in (
        (got.log_px, expected.log_px),
        (got.kl_per_dim, expected.kl_per_dim),
        (marginal.log_px, expected_marginal.log_px),
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_half_precision_scale_of_a_prior_is_not_rounded():
    """A half-precision scale is not rounded to a half-precision log variance."""
    mu, logvar = (randn(B, D, seed=s).bfloat16() for s in (60, 61))
    p = DiagonalNormal(torch.zeros(D), torch.full((D,), 0.9).bfloat16(), scale_form="scale").to(DEVICE)
    x, decoder = randn(B, D, seed=62).bfloat16(), lambda z: z  # noqa: E731
    options = {"likelihood": Gaussian(0.8), "prior": p, "reduction": "none"}
    kl = fastvae.elbo(x, (mu, logvar), decoder, terms=True, **options).kl
    m, v, s = mu.double(), logvar.double(), p.logvar.double()
    exact = 0.5 * ((m / s) ** 2 + v.exp() / s**2 - 1 - v + 2 * s.log()).sum(1)
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=1e-5)


def _two_unfinished(n):
    """Return a model of known posterior, and a q two deviations off for two of n examples."""
    model = LinearGaussian(D, X)
    x = model.sample(n)
    mu, logvar = model.posterior(x)
    mu[[4, 17]] += 2 * torch.exp(0.5 * logvar[[4, 17]])
    return model, x, mu, logvar


def test_unfinished_examples_keep_their_row_of_the_prior_scale():
    """Examples that continue drawing keep their own row of the prior's scale, though its mean is shared."""
    n = 23
    model, x, mu, logvar = _two_unfinished(n)
    scales = torch.linspace(-0.4, 0.4, n, dtype=torch.float64, device=DEVICE)[:, None].expand(n, D)
    prior = DiagonalNormal(torch.zeros(D, dtype=torch.float64, device=DEVICE), scales.contiguous())
    options = {"likelihood": model.likelihood, "prior": prior}
    result = evaluate_parts(
        lambda _: (mu, logvar), model.decoder, x, k=800, tol=0.15, batch_size=n, progress=False,
        generator=generator(12), **options,
    )  # fmt: skip
    assert len(result.k.unique()) > 1 and int((result.k > 100).sum()) <= 8
    for k in result.k.unique().tolist():
        expected = fastvae.log_marginal(
            x, (mu, logvar), model.decoder, k=k, generator=generator(12), **options
        )
        rows = result.k == k
        torch.testing.assert_close(result.log_px[rows], expected.log_px.cpu()[rows], rtol=1e-10, atol=1e-10)


def test_unfinished_examples_keep_their_clamp():
    n = 23
    model, x, mu, logvar = _two_unfinished(n)
    lo, hi = float(logvar.min()) + 0.2, float(logvar.max()) - 0.2

    def run(q):
        return evaluate_parts(
            lambda _: q, model.decoder, x, k=800, tol=0.2, batch_size=n, progress=False,
            likelihood=model.likelihood, generator=generator(13),
        )  # fmt: skip

    got = run(DiagonalNormal(mu, logvar, logvar_range=(lo, hi)))
    expected = run((mu, logvar.clamp(lo, hi)))
    # Few enough to be drawn separately.
    assert 1 <= int((got.k > 100).sum()) <= 8
    assert torch.equal(got.k, expected.k)
    torch.testing.assert_close(got.log_px, expected.log_px, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got.kl_per_dim, expected.kl_per_dim, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("value", [(1.0, 1.0), (math.nan, 1.0), (0.0, math.nan)])
def test_an_empty_range_is_refused(value):
    with pytest.raises(ValueError, match="logvar_range"):
        DiagonalNormal(torch.zeros(B, D), torch.zeros(B, D), logvar_range=value)


# Likelihoods.


def test_a_scale_must_have_the_shape_of_the_event():
    """A scale per sample, or of any other shape, is refused."""
    x, mu, logvar, weight = _inputs()
    for shape in ((K, 1, X), (X - 1,), (B + 1, X), (1, 1, 1)):
        scale = torch.ones(shape, dtype=torch.float64, device=DEVICE)
        with pytest.raises(ValueError, match="scale has shape"):
            fastvae.iwae(x, (mu, logvar), lambda z: z @ weight, k=K, likelihood=Gaussian(scale))
    # A row, a number and one per example are accepted.
    for shape in ((X,), (1,), (), (B, X), (B, 1)):
        scale = 0.5 + torch.rand(shape, dtype=torch.float64, device=DEVICE)
        got = fastvae.iwae(
            x, (mu, logvar), lambda z: z @ weight, k=K, likelihood=Gaussian(scale), terms=True,
            generator=generator(14),
        )  # fmt: skip
        z = _samples(mu, logvar, K, 14)
        _close(got.log_likelihood, td.Normal(z @ weight, scale).log_prob(x).sum(2).mean(0))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="costs a synchronisation on a GPU")
@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_must_be_positive(value):
    scale = torch.ones(X)
    scale[2] = value
    with pytest.raises(ValueError, match="must be positive"):
        Gaussian(scale)


def test_a_fixed_log_variance_stays_float32(backend):
    """A fixed log variance stays float32 for a bfloat16 mean: log 0.01 would err by 0.004."""
    x, mean = (randn(B, X, seed=s).bfloat16() for s in (15, 16))
    got = ops.gaussian_log_prob(x, mean, math.log(0.01))
    exact = td.Normal(mean.double(), 0.1).log_prob(x.double()).sum(1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-5)


# VAE.


def _vae(likelihood="bernoulli", **options):
    encoder, decoder = models.networks(X, D, likelihood)
    return fastvae.VAE(encoder, decoder, likelihood=likelihood, **options)


def test_means_are_in_the_space_of_the_data():
    """Reconstructions are Bernoulli probabilities or a Gaussian's mean, at the mean of q for any σ."""
    x = rand(B, X, seed=17)
    vae = _vae()
    mu, _ = vae.encoder(x)
    expected = torch.sigmoid(vae.decoder(mu))
    torch.testing.assert_close(vae.reconstruct(x), expected, rtol=1e-6, atol=1e-7)
    drawn = vae.sample(200, mean=True, generator=generator(18))
    assert drawn.shape == (200, X)
    assert bool(((drawn > 0) & (drawn < 1)).all())
    vae = _vae("gaussian")
    mu, _ = vae.encoder(x)
    torch.testing.assert_close(vae.reconstruct(x), vae.decoder(mu)[0], rtol=1e-6, atol=1e-7)
    scaled = fastvae.VAE(
        vae.encoder, lambda z: vae.decoder(z)[0], likelihood=Gaussian(0.1), modules=[vae.decoder]
    )
    torch.testing.assert_close(scaled.reconstruct(x), vae.decoder(mu)[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_samples_have_the_dtype_of_the_model(dtype):
    vae = _vae(latent_dim=D).to(dtype)
    assert vae.sample(6).dtype == dtype


@pytest.mark.parametrize("prior", ["standard", "learned"])
def test_samples_are_draws_from_the_prior(prior):
    """Samples' latents have the prior's mean and deviation, and repeat with the generator."""
    n = 40_000
    mu, logvar = torch.tensor([0.0, 3.0, -2.0]), torch.tensor([0.0, math.log(4.0), math.log(0.09)])
    if prior == "standard":
        mu, logvar = torch.zeros(D), torch.zeros(D)
    options = {"prior": DiagonalNormal(nn.Parameter(mu), nn.Parameter(logvar))}
    vae = fastvae.VAE(
        nn.Linear(X, 2 * D), nn.Identity(), likelihood=Gaussian(1.0), latent_dim=D,
        **(options if prior == "learned" else {}),
    ).to(DEVICE)  # fmt: skip
    z = vae.sample(n, mean=True, generator=generator(19)).cpu()
    sigma = torch.exp(0.5 * logvar)
    # Six standard errors, with a fixed seed.
    assert bool(((z.mean(0) - mu).abs() < 6 * sigma / math.sqrt(n)).all())
    assert bool(((z.std(0) / sigma - 1).abs() < 6 / math.sqrt(2 * n)).all())
    assert torch.equal(vae.sample(n, mean=True, generator=generator(19)).cpu(), z)
    assert not torch.equal(vae.sample(n, mean=True, generator=generator(20)).cpu(), z)


def test_the_reconstruction_probability_of_an_and_cho():
    """The score equals its definition, and samples, k_chunk and generator are passed on."""
    x = rand(B, X, seed=21).round()
    vae = _vae()
    mu, logvar = vae.encoder(x)
    for samples in (6, 100):
        logits = vae.decoder(_samples(mu, logvar, samples, 22))
        each = td.Bernoulli(logits=logits).log_prob(x).sum(2).detach()
        expected = torch.logsumexp(each, 0) - math.log(samples)
        options = {} if samples == 100 else {"k": samples, "k_chunk": 4}
        got = vae.reconstruction_log_prob(x, generator=generator(22), **options)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="k_chunk must be at least 1"):
        vae.reconstruction_log_prob(x, k_chunk=0)


def test_a_vae_passes_on_its_prior_likelihood_and_options():
    x = rand(B, X, seed=23)
    prior = DiagonalNormal(nn.Parameter(randn(D, seed=24)), nn.Parameter(randn(D, seed=25)))
    vae = _vae(prior=prior)
    q, meaning = vae.encoder(x), {"likelihood": "bernoulli", "prior": prior}

    def same(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6, equal_nan=True)

    same(
        vae.elbo(x, k=3, beta=0.5, generator=generator(26)),
        fastvae.elbo(x, q, vae.decoder, k=3, beta=0.5, generator=generator(26), **meaning),
    )
    same(
        vae.iwae(x, 6, reduction="none", generator=generator(26)),
        fastvae.iwae(x, q, vae.decoder, k=6, reduction="none", generator=generator(26), **meaning),
    )
    same(
        vars(vae.log_marginal(x, 30, k_chunk=7, generator=generator(26))),
        vars(fastvae.log_marginal(x, q, vae.decoder, k=30, generator=generator(26), **meaning)),
    )
    options = {"k": 30, "progress": False}
    same(
        vae.evaluate(x, generator=generator(26), **options).log_px,
        evaluate_parts(
            vae.encoder, vae.decoder, x, generator=generator(26), **options, **meaning
        ).log_px,
    )  # fmt: skip
    # Another prior gives a different score.
    vae.prior = StandardNormal()
    with pytest.raises(AssertionError):
        same(
            vae.elbo(x, generator=generator(26)),
            fastvae.elbo(x, q, vae.decoder, generator=generator(26), **meaning),
        )


def test_the_latent_dimension_is_learned_from_the_first_batch():
    vae = _vae()
    vae.elbo(rand(B, X, seed=27))
    assert vae.sample(2).shape == (2, X)


def test_infinite_numbers_are_refused():
    x, mu, logvar, weight = _inputs()
    for name in ("beta", "free_bits"):
        with pytest.raises(ValueError, match=f"{name} must be finite"):
            fastvae.elbo(x, (mu, logvar), lambda z: z @ weight, likelihood=Gaussian(1.0), **{name: math.inf})
    with pytest.raises(ValueError, match="tol must be finite"):
        evaluate_parts(lambda x: (mu, logvar), lambda z: z @ weight, x, tol=math.inf)


@pytest.mark.parametrize("logvar_range", [None, (-0.5, 0.5)])
@pytest.mark.parametrize("normal", [False, True])
@pytest.mark.parametrize("row_offset", [0, 7])
def test_a_posterior_draws_the_z_of_its_objectives(backend, logvar_range, normal, row_offset):
    """A posterior's draws equal the ops' and the decoder's z, and its KL the definition's."""

    q = DiagonalNormal(randn(B, 4, seed=50), randn(B, 4, seed=51), logvar_range=logvar_range)
    prior = StandardNormal()
    if normal:
        prior = DiagonalNormal(randn(4, seed=52), randn(4, seed=53))
    seed = torch.tensor(9, device=DEVICE)
    options = {"logvar_range": logvar_range, "k": 3, "seed": seed, "row_offset": row_offset}
    options["prior"] = (prior.mu, prior.logvar) if normal else None
    z, kl = fastvae.ops.rsample_kl(q.mu, q.logvar, **options)
    y, ratio = fastvae.ops.rsample_log_ratio(q.mu, q.logvar, **options)
    flat, found = draw_kl(q, prior, 3, seed, row_offset, False)
    assert torch.equal(flat, z.flatten(0, 1)) and torch.equal(found, kl)
    flat, other = draw_ratio(q, prior, 3, seed, row_offset)
    assert torch.equal(flat, y.flatten(0, 1)) and torch.equal(other, ratio)
    clamped = q.logvar if logvar_range is None else q.logvar.clamp(*logvar_range)
    p = torch.distributions.Normal(0.0, 1.0)
    if normal:
        p = torch.distributions.Normal(prior.mu, torch.exp(0.5 * prior.logvar))
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(q.mu, torch.exp(0.5 * clamped)), p)
    torch.testing.assert_close(found, kl.sum(1), rtol=1e-5, atol=1e-5)
    whole = fastvae.random.normal(9, 3, B + row_offset, 4, device=DEVICE)[:, row_offset:]
    expected = q.mu + torch.exp(0.5 * clamped) * whole
    torch.testing.assert_close(z, expected)
