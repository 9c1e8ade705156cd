"""Proposals: unbiased on exact models, invariant to chunks, batches and ranks, better where q is bad."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch import distributed
from torch import distributions as td

import fastvae
from fastvae import distributions, random
from fastvae.distributions import (
    DiagonalNormal,
    Distribution,
    FullNormal,
    Hierarchy,
    Laplace,
    Level,
    LowRankNormal,
    Mixture,
    NormalMixture,
    StandardNormal,
    as_posterior,
)
from fastvae.distributions.multivariate_t import MultivariateStudentT
from fastvae.distributions.stratified import StratifiedMixture, derived_seed
from fastvae.estimation import proposals
from fastvae.estimation.adaptive import AdaptedDraws, shrunk, tempered
from fastvae.estimation.proposals import Adapted, Defensive, Posterior
from fastvae.estimation.weights import Weights
from fastvae.likelihoods import Gaussian, Likelihood

from . import test_evaluate
from .conftest import DEVICE
from .models import LinearGaussian, evaluate_parts, generator, randn, seed_of

D, X = 3, 7
ALL = [Posterior(), Defensive(0.2), Adapted()]
NAMES = ["posterior", "defensive", "adapted"]
QUIET = {"progress": False}


def _marginal(model, x, q, k, proposal, seed=1, **options):
    options = {"likelihood": model.likelihood, "generator": generator(seed), **options}
    return fastvae.log_marginal(x, q, model.decoder, k=k, proposal=proposal, **options)


def _ratio(model, x, q, k, proposal, **options):
    """Return p̂(x) / p(x) of each example."""
    found = _marginal(model, x, q, k, proposal, **options)
    return torch.exp(found.log_px - model.log_px(x)), found


# Truth


@pytest.mark.parametrize("proposal", ALL, ids=NAMES)
@pytest.mark.parametrize(
    "latent, shift, stretch, k", [(2, 0.7, -0.4, 70), (3, 0.5, 0.5, 203), (8, 0.3, 0.3, 500)]
)
def test_unbiased(proposal, latent, shift, stretch, k):
    """The mean of p̂(x) over examples with identically distributed weights is p(x), for any fit.

    Weighting all draws by densities fitted to them is low by more than ten of these standard errors in the
    last case (measured).
    """
    model = LinearGaussian(latent, latent + 4)
    n = 1000
    x = model.sample(n)
    ratio, found = _ratio(model, x, model.posterior(x, shift, stretch), k, proposal)
    error = ratio.std() / math.sqrt(n)
    assert float(error) < 0.03
    assert abs(float(ratio.mean()) - 1) < 5 * float(error)
    # The reported error is the actual one, a mean of squares, where the weights have a finite one.
    assert stretch < 0 or float(found.log_px_stderr.square().mean().sqrt() / ratio.std()) == pytest.approx(
        1, abs=0.15
    )


@pytest.mark.parametrize("proposal", ["posterior", "adapted"])
@pytest.mark.parametrize("excess", [0.1, 0.003, 1e-3, 1e-7])
def test_errors_of_nearly_equal_weights(proposal, excess):
    """Errors and intervals hold where q has ``1 + excess`` times the posterior's variance.

    The draws of later rounds have larger coefficients, which add nothing to the error of equal weights.
    """
    n, k = 400, 1000
    model = LinearGaussian(2, 5, scale=0.7)
    x = model.sample(n)
    exact = model.log_px(x)
    found = _marginal(model, x, model.posterior(x, stretch=math.log1p(excess)), k, proposal)
    error = float((found.log_px - exact).square().mean().sqrt())
    for stderr in (found.log_px_stderr, found.jackknife_stderr):
        assert bool((stderr > 0).all())
        # Adapted proposals have various errors at 0.1, others the same for all examples.
        assert float(stderr.square().mean().sqrt()) == pytest.approx(error, rel=0.15)
    assert bool((found.ess <= k).all())
    holds = float(((found.low <= exact) & (exact <= found.high)).double().mean())
    # Four standard errors of a share of 400.
    assert abs(holds - 0.95) < 4 * math.sqrt(0.05 * 0.95 / n)
    widths = (found.high - found.low) / found.log_px_stderr
    assert float(widths.median()) == pytest.approx(2 * 1.96, abs=0.2)


@pytest.mark.parametrize("latent, k, times", [(2, 500, 20), (2, 3000, 30), (10, 500, 5), (10, 3000, 30)])
def test_adapted_has_smaller_errors(latent, k, times):
    """For a shifted, too narrow q, as from the ELBO, squared errors are ``times`` smaller at equal draws."""
    model = LinearGaussian(latent, latent + 4, dtype=torch.float32)
    x = model.sample(60)
    q = model.posterior(x, 0.5, -1.0)
    errors = {}
    for proposal in ("posterior", "adapted"):
        found = _marginal(model, x, q, k, proposal)
        errors[proposal] = float((found.log_px.double() - model.log_px(x)).square().mean())
        bad = float((found.khat > 0.7).double().mean())
        assert bad > 0.2 if proposal == "posterior" else bad <= 0.05
    assert errors["posterior"] > times * errors["adapted"]


def test_many_latents_and_few_draws():
    """Adaptation does no harm for D = 50 and 400 draws, too few to learn from."""
    model = LinearGaussian(50, 60, dtype=torch.float32)
    x = model.sample(40)
    for shift, stretch in ((0.0, 0.5), (0.2, -0.5)):
        q = model.posterior(x, shift, stretch)
        errors = [
            float((_marginal(model, x, q, 400, p).log_px.double() - model.log_px(x)).square().mean())
            for p in ("posterior", "adapted")
        ]
        assert errors[1] < 1.5 * errors[0]


def test_a_mode_that_q_has_missed():
    """For x = z² + noise and a q of one mode, log 2 is missing unless the prior's draws find the other."""
    scale, x = 0.3, torch.full((20, 1), 2.0, dtype=torch.float64, device=DEVICE)
    z = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    density = td.Normal(z.square(), scale).log_prob(torch.tensor(2.0)) + td.Normal(0.0, 1.0).log_prob(z)
    exact = float(torch.logsumexp(density, 0) + math.log(16 / 100_000))
    q = torch.full_like(x, math.sqrt(2)), torch.full_like(x, 2 * math.log(0.1))
    error = {}
    for name in ("posterior", "defensive", "adapted"):
        found = fastvae.log_marginal(
            x,
            q,
            torch.square,
            k=1000,
            likelihood=Gaussian(scale),
            proposal=name,
            generator=generator(3),
        )
        assert name == "posterior" or bool(((found.log_px - exact).abs() < 4 * found.log_px_stderr).all())
        error[name] = float((found.log_px - exact).square().mean().sqrt())
    assert error["posterior"] == pytest.approx(math.log(2), abs=0.05)
    assert error["defensive"] < 0.2
    assert error["adapted"] < 0.12


@pytest.mark.parametrize("proposal", ["posterior", "adapted"])
@pytest.mark.parametrize("k", [50, 72, 90, 100, 112, 1000])
def test_an_exact_posterior_stays_exact(proposal, k):
    model = LinearGaussian(D, X)
    x = model.sample(9)
    found = _marginal(model, x, model.posterior(x), k, proposal)
    torch.testing.assert_close(found.log_px, model.log_px(x), rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(found.ess, torch.full_like(found.ess, k), rtol=1e-9, atol=0)
    assert float(found.log_px_stderr.max()) < 1e-6
    assert bool((found.khat < 0).all())
    # Draws of later rounds have larger coefficients, which the jackknife leaves out, too.
    torch.testing.assert_close(found.jackknife, found.log_px, rtol=0, atol=1 / k**3)
    assert float(found.jackknife_stderr.max()) < 1e-6


def _fitted_draws(k=164, **options):
    """Return z [100, B, D] drawn from the first fit alone, as the decoder receives them."""
    model, seen = LinearGaussian(D, X), []
    x = model.sample(5)

    def decoder(z):
        seen.append(z.unflatten(0, (-1, 5)))
        return model.decoder(z)

    q = model.posterior(x, 0.7, 0.6)
    how = Adapted(posterior=0.0, prior=0.0, most=64, **options)
    fastvae.log_marginal(
        x, q, decoder, k=k, likelihood=model.likelihood, proposal=how, generator=generator(1)
    )
    return torch.cat(seen)[-100:]


def test_scale_and_df_of_the_fit():
    """``scale`` multiplies deviations from the fitted mean, and ``df`` is that of the t distribution."""
    one, three = (_fitted_draws(scale=s) for s in (1.0, 3.0))
    mean = (3 * one - three) / 2
    torch.testing.assert_close(mean, mean[:1].expand_as(mean), rtol=1e-9, atol=1e-9)
    usual = 1 + 0.3 / math.sqrt(D)
    torch.testing.assert_close(_fitted_draws(), mean + usual * (one - mean), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(_fitted_draws(df=8), _fitted_draws(), rtol=0, atol=0)
    # One of 500 Cauchy draws is far out; of a nearly normal t none is.
    far = [float(((_fitted_draws(df=df) - mean) / (one - mean).std(0)).abs().max()) for df in (1, 500)]
    assert far[0] > 20 and far[1] < 8


def test_memory_is_bounded_by_most(monkeypatch):
    """Numbers are kept for no more than ``most`` draws."""
    kept, keep = [], AdaptedDraws._keep
    monkeypatch.setattr(
        AdaptedDraws,
        "_keep",
        lambda self, chunks, *rest: (kept.append(sum(map(len, chunks))), keep(self, chunks, *rest)),
    )
    model = LinearGaussian(D, X)
    x = model.sample(4)
    _marginal(model, x, model.posterior(x, 0.3, 0.3), 1000, Adapted(most=100))
    assert sum(kept) == 100


def test_the_elbo_comes_from_draws_of_q():
    """The ELBO comes from the first 64 draws if these are q's; otherwise the report says it is unknown."""
    model = LinearGaussian(D, X)
    x = model.sample(9)

    def run(proposal, k=300):
        return evaluate_parts(
            lambda x: model.posterior(x, 0.3, 0.2), model.decoder, x, k=k, proposal=proposal,
            likelihood=model.likelihood, generator=torch.Generator().manual_seed(1), **QUIET,
        )  # fmt: skip

    adapted, first = run("adapted"), run("posterior", 64)
    torch.testing.assert_close(adapted.elbo, first.elbo, rtol=1e-12, atol=1e-12)
    # Before the first fit the draws are q's.
    assert adapted.curve[:2] == first.curve[:2]
    torch.testing.assert_close(run("adapted", 64).log_px, first.log_px, rtol=0, atol=0)
    result = run("defensive")
    assert bool(result.elbo.isnan().all())
    assert "ELBO           unknown" in str(result)
    assert result.active_units == first.active_units
    torch.testing.assert_close(result.kl_per_dim, first.kl_per_dim)


# The same in any chunks, batches and ranks


def _evaluation(proposal, **options):
    model = LinearGaussian(D, X)
    x = model.sample(23)

    def q(x):  # from nearly exact to bad; the first few are exact
        mu, logvar = model.posterior(x)
        place = (x[:, :1] - x[:, :1].floor()).clamp(min=0.3) - 0.3
        return mu + 2 * place * (0.5 * logvar).exp(), logvar - place

    options = {"k": 700, "likelihood": model.likelihood, **QUIET, **options}
    return evaluate_parts(
        q, model.decoder, x, proposal=proposal, generator=torch.Generator().manual_seed(4), **options
    )


# A point set cannot be drawn in rounds: an error, tested separately.
_POINTS = [(Defensive(0.07), "qmc")]
_DRAWS = [(p, "philox") for p in (Defensive(0.07), "adapted", Adapted(prior=0.0, most=200))]


@pytest.mark.parametrize(("proposal", "noise"), _DRAWS + _POINTS, ids=str)
@pytest.mark.parametrize("tol", [None, 0.06])
def test_independent_of_batches_and_chunks(proposal, tol, noise):
    expected = _evaluation(proposal, tol=tol, noise=noise)
    if tol is not None:
        assert len(expected.k.unique()) > 1
    for options in ({"batch_size": 23, "k_chunk": 700}, {"batch_size": 5, "k_chunk": 17}, {"batch_size": 1}):
        found = _evaluation(proposal, tol=tol, noise=noise, **options)
        test_evaluate._assert_same(found, expected, 1e-8)


def test_row_offset_and_log_marginal():
    model = LinearGaussian(D, X)
    x = model.sample(8)
    q = model.posterior(x, 0.5, 0.2)
    whole = _marginal(model, x, q, 400, "adapted")
    part = _marginal(model, x[3:], tuple(t[3:] for t in q), 400, "adapted", row_offset=3, k_chunk=33)
    for name, value in vars(part).items():
        torch.testing.assert_close(value, getattr(whole, name)[3:], rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("shard", ["data", "samples"])
@pytest.mark.parametrize(
    "options",
    [{"proposal": "adapted"}, {"proposal": "adapted", "tol": 0.03}, {"proposal": "refined"}],
    ids=str,
)
def test_ranks(tmp_path, shard, options):
    """Three processes give one process's result on each rank."""
    model, x, q = test_evaluate._model_and_data()
    noise = torch.Generator().manual_seed(6)
    expected = test_evaluate._evaluate(model, q, x, k=333, batch_size=4, generator=noise, **options)
    for result in test_evaluate._ranks(3, tmp_path, shard, seed=6, **options):
        if options["proposal"] == "adapted":
            test_evaluate._assert_same(result, expected, 1e-9)
            continue
        # Weights of a linear model are equal: their spread, and k̂, are rounding.
        for name in ("log_px", "elbo", "low", "high"):
            torch.testing.assert_close(getattr(result, name), getattr(expected, name), rtol=0, atol=1e-7)


def test_checkpoints_know_the_proposal(tmp_path):
    file = tmp_path / "run.npz"
    expected = _evaluation("adapted", checkpoint=file, batch_size=4)
    with np.load(file) as saved:
        parts = dict(saved)
    # The run resumes from a partial checkpoint.
    whole = ("index", "digest", "latent", "dims", "sizes")
    n = int(parts["sizes"][:2].sum())
    some = {name: v[:2] if name in whole else v[..., :n] for name, v in parts.items() if name != "settings"}
    np.savez(file, settings=parts["settings"], **some)
    test_evaluate._assert_same(_evaluation("adapted", checkpoint=file, batch_size=4), expected)
    for other in ("posterior", Adapted(df=5), "defensive"):
        with pytest.raises(ValueError, match="other proposal"):
            _evaluation(other, checkpoint=file, batch_size=4)
    _evaluation("posterior", checkpoint=tmp_path / "plain.npz", batch_size=4)
    with pytest.raises(ValueError, match=r"other proposal: 'Posterior\(\)' then, 'Adapted"):
        _evaluation("adapted", checkpoint=tmp_path / "plain.npz", batch_size=4)


# Families


def _families(model, x):
    mu, logvar = model.posterior(x, 0.4, 0.3)
    sd = (0.5 * logvar).exp()
    below = torch.ones(D, D, dtype=sd.dtype, device=DEVICE).tril(-1)
    full = FullNormal.of(mu, torch.diag_embed(sd) + 0.1 * sd[:, :, None] * below)
    return {
        "pair": (mu, logvar),
        "softplus": DiagonalNormal(mu, (logvar.exp().expm1()).log(), scale_form="softplus"),
        "full": full,
        "low rank": LowRankNormal(mu, logvar, 0.3 * sd[..., None]),
        "laplace": Laplace(mu, sd.log()),
        "mixture": Mixture(
            [(mu, logvar), (mu + sd, logvar)], torch.stack([x[:, 0].abs(), -x[:, 1].abs()], 1)
        ),
        "torch's": td.Laplace(mu, sd),
        "torch's that draws by itself": td.StudentT(4.0, mu, sd),
    }


@pytest.mark.parametrize("family", _families(LinearGaussian(D, X), LinearGaussian(D, X).sample(2)))
@pytest.mark.parametrize("name", ["defensive", "adapted"])
def test_families(family, name):
    model = LinearGaussian(D, X)
    x = model.sample(400)
    ratio, found = _ratio(model, x, _families(model, x)[family], 300, name)
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / 20
    assert float(ratio.std()) < 0.2
    assert bool(((found.log_px - model.log_px(x)).abs() < 6 * found.log_px_stderr + 0.02).all())


def test_the_defensive_density():
    """The defensive density equals that of torch's mixture at any z."""
    mu, logvar = (randn(4, D, seed=s, dtype=torch.float64) for s in (1, 2))
    z = 3 * randn(6, 4, D, seed=3, dtype=torch.float64)
    q, prior = as_posterior((mu, logvar)), StandardNormal()
    sd = (0.5 * logvar).exp()
    shares = (
        td.Normal(mu, sd).log_prob(z).sum(-1).exp() * 0.8 + td.Normal(0.0, 1.0).log_prob(z).sum(-1).exp() / 5
    )
    torch.testing.assert_close(Defensive(0.2).of(q, prior).log_prob(z), shares.log())


def test_a_hierarchy_and_a_prior_that_cannot_be_drawn_from():
    """A prior that cannot be drawn from leaves its share to q; a defensive proposal raises."""
    torch.manual_seed(5)
    linear = torch.nn.Linear(X, 4).to(DEVICE)
    hierarchy = Hierarchy(
        [
            Level(2, torch.nn.Linear(4, 4)),
            Level(1, lambda h, z: (h[:, :1] + z[:, :1], h[:, 1:2]), prior=torch.nn.Linear(2, 2)),
        ]
    ).to(DEVICE)
    decoder, x = torch.nn.Linear(3, X).to(DEVICE), torch.rand(6, X, device=DEVICE).round()
    mixture = NormalMixture(*(randn(5, 3, seed=s) for s in (1, 2)))
    pair = torch.zeros(6, 3, device=DEVICE), torch.zeros(6, 3, device=DEVICE)
    for q, prior in ((hierarchy(linear(x)), None), (pair, mixture)):
        options = {"likelihood": "bernoulli", "prior": prior, "k": 1500, "generator": generator(1)}
        plain = fastvae.log_marginal(x, q, decoder, **options)
        adapted = fastvae.log_marginal(x, q, decoder, **options, proposal="adapted")
        errors = plain.log_px_stderr + adapted.log_px_stderr
        assert bool(((plain.log_px - adapted.log_px).abs() < 5 * errors).all())
        assert float(adapted.log_px_stderr.mean()) < float(plain.log_px_stderr.mean())
        with pytest.raises(ValueError, match="needs a prior that can be drawn from at an address, which"):
            fastvae.log_marginal(x, q, decoder, **options, proposal="defensive")


def _positive(name, rows):
    """Return a distribution of z > 0 with these leading axes."""
    zeros, ones = torch.zeros(*rows, D, device=DEVICE), torch.ones(*rows, D, device=DEVICE)
    if name == "Exponential":
        return distributions.Exponential(zeros)
    if name == "LogNormal":
        return distributions.LogNormal(zeros, zeros)
    if name == "Mixture":
        return distributions.Mixture([distributions.LogNormal(zeros + i, zeros) for i in range(2)])
    if name == "Flow":
        to_positive = td.TransformedDistribution(td.Normal(zeros, ones), td.transforms.ExpTransform())
        context = torch.zeros(*rows, 1, device=DEVICE) if rows else None
        return distributions.Flow(lambda *_: td.Independent(to_positive, 1), context)
    return getattr(td, name.removeprefix("torch's "))(ones, ones)


@pytest.mark.parametrize("name", ["Exponential", "LogNormal", "Mixture", "Flow", "torch's Gamma"])
@pytest.mark.parametrize("proposal", ["adapted", "refined"])
def test_restricted_supports(name, proposal):
    """Proposals over all of R^D refuse a q or a prior on a part of it, outside which decoders give NaN."""
    x = randn(5, X, seed=2)
    weight = torch.ones(D, X, device=DEVICE) / 3
    normal = randn(5, D, seed=3), torch.zeros(5, D, device=DEVICE)

    def run(q, prior, proposal):
        options = {"likelihood": Gaussian(1.0), "k": 300, "prior": prior, "generator": generator(1)}
        return fastvae.log_marginal(x, q, lambda z: z.log() @ weight, proposal=proposal, **options)

    q, prior = _positive(name, [5]), _positive(name, [])
    assert run(q, prior, "posterior").log_px.isfinite().all()
    for of_q in (q, normal):
        with pytest.raises(ValueError, match=rf"{proposal}.* draws z from all of R\^D, but .* on a part"):
            run(of_q, prior, proposal)
    vae = fastvae.VAE(
        lambda _: q, lambda z: z.log() @ weight, likelihood="bernoulli", prior=prior, modules=[]
    )
    with pytest.raises(ValueError, match=r"vae.refine draws z from all of R\^D, but .* use a q and a prior"):
        vae.refine(x)


def test_a_mixture_that_reaches_everywhere():
    """A component over all of R^D makes a mixture one, fastvae's or torch's."""
    x = randn(5, X, seed=2)
    weight = torch.ones(D, X, device=DEVICE) / 3
    zeros = torch.zeros(5, D, device=DEVICE)
    parts = [distributions.DiagonalNormal(zeros, zeros), distributions.LogNormal(zeros, zeros)]
    of_t = td.Independent(td.StudentT(9.0, torch.zeros(4, D, device=DEVICE)), 1)
    prior = td.MixtureSameFamily(td.Categorical(torch.ones(4, device=DEVICE)), of_t)
    options = {"likelihood": Gaussian(1.0), "k": 3000, "prior": prior}
    plain, adapted = (
        fastvae.log_marginal(
            x, distributions.Mixture(parts), lambda z: z @ weight,
            proposal=proposal, generator=generator(1), **options,
        )
        for proposal in ("posterior", "adapted")
    )  # fmt: skip
    errors = plain.log_px_stderr + adapted.log_px_stderr
    assert bool(((plain.log_px - adapted.log_px).abs() < 5 * errors).all())


def test_latents_of_several_axes():
    x = randn(4, 12, seed=1)
    mu, logvar = randn(4, 2, 3, 1, seed=2), randn(4, 2, 3, 1, seed=3)

    def decoder(z):
        assert z.shape[1:] == (2, 3, 1)
        return z.flatten(1).repeat(1, 2)

    def flat(z):
        return z.repeat(1, 2)

    options = {"likelihood": Gaussian(1.0), "k": 200}
    for name in NAMES:
        shaped = fastvae.log_marginal(
            x, (mu, logvar), decoder, proposal=name, generator=generator(1), **options
        )
        plain = fastvae.log_marginal(
            x, (mu.flatten(1), logvar.flatten(1)), flat, proposal=name, generator=generator(1), **options
        )
        torch.testing.assert_close(shaped.log_px, plain.log_px)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    model = LinearGaussian(D, X, dtype=dtype)
    x = model.sample(6)
    for name in NAMES:
        q = tuple(t.to(dtype) for t in LinearGaussian(D, X).posterior(x.double(), 0.3, 0.3))
        found = _marginal(model, x, q, 400, name)
        assert found.log_px.dtype == torch.float32
        exact = model.log_px(x)
        # Rounding of z and of the decoder's output to 8 bits, or the draws' error.
        allowed = 0.5 if dtype == torch.bfloat16 else 0.01 + 6 * found.log_px_stderr
        assert bool(((found.log_px - exact).abs() < allowed).all())


# Extremes


def test_nan_and_impossible_examples_do_not_affect_others():
    model = LinearGaussian(D, X)
    x = model.sample(6)
    q = model.posterior(x, 0.5, 0.2)
    bad = tuple(t.clone() for t in q)
    bad[0][2], bad[1][4] = math.nan, math.inf
    bad[1][5] = -200.0  # all draws are equal
    for name in ("adapted", "defensive"):
        expected, found = (_marginal(model, x, this, 300, name) for this in (q, bad))
        good = [0, 1, 3]
        torch.testing.assert_close(found.log_px[good], expected.log_px[good])
        assert bool(found.log_px[2].isnan())


def test_first_weights_that_are_all_zero_or_nearly():
    """The fit is tempered, or that of q's own draws, if all or nearly all first weights are zero."""

    class Rare(Likelihood):
        def log_likelihood(self, x, parameters, samples, conditioning=None):
            return torch.where(parameters.reshape(samples, x.shape[0], D)[..., 0] > x[:, 0], 0.0, -math.inf)

    x = torch.tensor([[1.5], [2.5], [50.0], [-9.0]], device=DEVICE).expand(4, X)
    q = torch.zeros(4, D, device=DEVICE), torch.zeros(4, D, device=DEVICE)
    found = fastvae.log_marginal(
        x, q, lambda z: z, k=20_000, likelihood=Rare(), proposal="adapted", generator=generator(1)
    )
    exact = torch.special.log_ndtr(-x[:, 0].double())
    assert found.log_px[2] == -math.inf
    others = [0, 1, 3]
    assert bool(((found.log_px - exact).abs() < 5 * found.log_px_stderr + 1e-6)[others].all())
    assert bool((found.log_px_stderr[:2] < 0.1).all())


def test_a_tempered_sample():
    falling = torch.linspace(0, -900, 100, dtype=torch.float64)
    few = torch.where(falling > -20, 0.0, -math.inf)  # 3 of them
    log_w = torch.stack([falling, torch.zeros_like(falling), torch.full_like(falling, -math.inf), few], 1)
    log_w[3, 1] = math.nan
    w, ess, stays = tempered(log_w, torch.ones(100, 1, dtype=torch.float64), 20)
    torch.testing.assert_close(w.sum(0), torch.ones(4, dtype=torch.float64))
    assert ess.tolist() == pytest.approx([20, 99, 100, 20], rel=1e-2)
    assert stays.tolist() == [False, False, True, False]
    assert float(w[:3, 3].min()) > float(w[3:, 3].max()) > 0
    # With enough effective draws, they are the weights themselves.
    log_w = randn(400, 2, seed=1, dtype=torch.float64)
    w, _, stays = tempered(log_w, torch.ones(400, 1, dtype=torch.float64, device=DEVICE), 20)
    torch.testing.assert_close(w, torch.softmax(log_w, 0))
    assert not bool(stays.any())
    # Multiplicities of draws do not make weights unequal.
    counts = 1.0 + torch.arange(400, dtype=torch.float64, device=DEVICE)[:, None] // 100
    w, ess, stays = tempered(torch.zeros_like(log_w), counts, 20)
    torch.testing.assert_close(w, (counts / counts.sum()).expand(-1, 2))
    torch.testing.assert_close(ess, torch.full_like(ess, 1000**2 / 3000))
    assert bool(stays.all())


def test_a_shrunk_covariance():
    """Variances are unbiased for normalised weights; correlations are shrunk as documented."""
    root = randn(2, D, D, seed=2, dtype=torch.float64)
    covariance, ess = root @ root.mT, torch.tensor([30.0, 400.0], dtype=torch.float64, device=DEVICE)
    found = shrunk(covariance, ess)
    for b, n in enumerate(ess.tolist()):
        expected = covariance[b] * n / (n - 1) * n / (4 * (D - 1) + n)
        variances = covariance[b].diagonal() * n / (n - 1)
        expected = expected.diagonal_scatter(variances)
        torch.testing.assert_close(found[b], expected, rtol=1e-12, atol=1e-12)


# The proposal distributions


def test_multivariate_student_t():
    """The full t has SciPy's density, and draws of its covariance."""
    mu = randn(2, D, seed=1, dtype=torch.float64)
    root = randn(2, D, D, seed=2, dtype=torch.float64).tril() + 2 * torch.eye(D, device=DEVICE)
    covariance = root @ root.mT
    t = MultivariateStudentT.of(mu, covariance, 9, mu)
    z, log_q = t.rsample_log_prob(40_000, seed_of(1))
    for b in range(2):
        expected = stats.multivariate_t(mu[b].cpu(), covariance[b].cpu(), df=9).logpdf(z[:50, b].cpu())
        np.testing.assert_allclose(log_q[:50, b].cpu(), expected, rtol=1e-10)
        scale = float(covariance[b].abs().max())
        # The variance of a t is 9/7 of its scale; the fourth moment is 3 · 7/5 of its square.
        error = 5 * 4.2 * scale / math.sqrt(40_000)
        assert float((torch.cov(z[:, b].T) - covariance[b] * 9 / 7).abs().max()) < error
    torch.testing.assert_close(t.variance, covariance.diagonal(dim1=1, dim2=2) * 9 / 7)
    assert torch.equal(t.mean, mu) and t.sample(5).shape == t.rsample(5).shape == (5, 2, D)
    # An invalid covariance is replaced.
    for broken in (torch.full_like(covariance, math.nan), torch.zeros_like(covariance), -covariance):
        other = MultivariateStudentT.of(mu, broken, 9, mu)
        assert bool(other.rsample_log_prob(5, seed_of(1))[0].isfinite().all())


def test_stratified_mixture():
    """In any cycle of draws shares are exact; noise belongs to the draw; the density is the mixture's."""
    near, far = (
        DiagonalNormal(torch.full((4, 2), m, device=DEVICE), torch.zeros(4, 2, device=DEVICE))
        for m in (0.0, 100.0)
    )
    seed = seed_of(2)
    mixture = StratifiedMixture([near, far], [0.93, 0.07])
    z, log_q = mixture.rsample_log_prob(250, seed)
    is_far = z[:, 0, 0] > 50
    for start in range(150):
        assert int(is_far[start : start + 100].sum()) == 7
    part = mixture.rsample_log_prob(31, seed, sample_offset=77, row_offset=1)[0][:, :3]
    torch.testing.assert_close(part, z[77:108, 1:])
    torch.testing.assert_close(mixture.rows(1, 3).rsample_log_prob(250, seed, row_offset=1)[0], z[:, 1:3])
    parts = torch.stack([near.log_prob(z) + math.log(0.93), far.log_prob(z) + math.log(0.07)])
    torch.testing.assert_close(log_q, torch.logsumexp(parts, 0))
    assert len(z[:, 0, 0].unique()) == 250
    # No two draws of different parts share noise.
    many = mixture.draw(2000, seed, 0, 0).flatten(1)
    is_far = many[:, 0] > 50
    assert float(torch.cdist(many[is_far] - 100, many[~is_far]).min()) > 0.01
    # Over the positions that a seed may choose, every draw follows the mixture.
    first = [mixture.draw(2, torch.tensor(s, device=DEVICE), 5, 0)[:, 0, 0] > 50 for s in range(100)]
    assert torch.stack(first).sum(0).tolist() == [7, 7]
    # Examples that stay with the first part have its noise alone.
    stays = torch.tensor([False, True, False, True], device=DEVICE)
    some, log_some = StratifiedMixture([near, far], [0.93, 0.07], stays=stays).rsample_log_prob(250, seed)
    own, log_own = near.rsample_log_prob(250, seed)
    torch.testing.assert_close(some, torch.where(stays[:, None], own, z))
    torch.testing.assert_close(log_some, torch.where(stays, log_own, log_q))


def test_stratified_mixture_by_randomisations():
    """Each randomisation of quasi-Monte-Carlo noise cycles separately, in any chunks."""
    near, far = (
        DiagonalNormal(torch.full((4, 2), m, device=DEVICE), torch.zeros(4, 2, device=DEVICE))
        for m in (0.0, 100.0)
    )
    both = Mixture([near, far], torch.tensor([0.4, -0.4], device=DEVICE))
    seeds = random.seed_of("qmc", seed_of(2), 3)
    for mixture in (StratifiedMixture([near, far], [0.93, 0.07]), StratifiedMixture([both, far], [0.9, 0.1])):
        z, log_q = mixture.rsample_log_prob(210, seeds)
        shares = mixture.log_stratum_weights(210, seeds)
        for r in range(3):
            own = seeds[r : r + 1]
            torch.testing.assert_close(z[r::3], mixture.draw(70, own, 0, 0))
            torch.testing.assert_close(shares[r::3], mixture.log_stratum_weights(70, own))
        for start, stop in ((0, 1), (1, 3), (77, 108)):
            place = {"sample_offset": start}
            torch.testing.assert_close(
                mixture.rsample_log_prob(stop - start, seeds, **place)[0], z[start:stop]
            )
            torch.testing.assert_close(
                mixture.log_stratum_weights(stop - start, seeds, **place), shares[start:stop]
            )
        torch.testing.assert_close(log_q, mixture.log_prob(z))
    # Draws of examples that stay are weighted as those of the first part alone.
    stays = torch.tensor([False, True, False, True], device=DEVICE)
    shares, own = (
        m.log_stratum_weights(30, seed_of(2)) for m in (StratifiedMixture([both, far], [0.9, 0.1]), both)
    )
    found = StratifiedMixture([both, far], [0.9, 0.1], stays=stays).log_stratum_weights(30, seed_of(2))
    assert bool(own.any()) and not torch.equal(own.expand_as(shares), shares)
    torch.testing.assert_close(found, torch.where(stays, own, shares))


def test_unbiased_with_a_point_set():
    model = LinearGaussian(2, X)
    x = model.sample(1000)
    ratio, _ = _ratio(model, x, model.posterior(x, 0.5, 0.3), 100, Defensive(0.2), noise="qmc")
    error = float(ratio.std()) / math.sqrt(1000)
    assert error < 0.01
    assert abs(float(ratio.mean()) - 1) < 5 * error


def test_stratified_mixture_of_randomisations():
    """Each randomisation has its own share of each part's points, for any subset of the draws."""
    near, far = (
        DiagonalNormal(torch.full((4, 2), m, device=DEVICE), torch.zeros(4, 2, device=DEVICE))
        for m in (0.0, 100.0)
    )
    seed = fastvae.random.seed_of("qmc", seed_of(2), 8)
    mixture = StratifiedMixture([near, far], [0.9, 0.1])
    z, log_q = mixture.rsample_log_prob(803, seed)
    is_far = (z[:, 0, 0] > 50)[:800].unflatten(0, (100, 8))
    assert is_far.sum(0).tolist() == 8 * [10]
    for start, stop in ((0, 1), (5, 6), (77, 108), (640, 803)):
        part = mixture.rsample_log_prob(stop - start, seed, sample_offset=start, row_offset=1)
        torch.testing.assert_close(part[0][:, :3], z[start:stop, 1:])
        torch.testing.assert_close(part[1][:, :3], mixture.log_prob(z[start:stop])[:, 1:])
    parts = torch.stack([near.log_prob(z) + math.log(0.9), far.log_prob(z) + math.log(0.1)])
    torch.testing.assert_close(log_q, torch.logsumexp(parts, 0))
    # No draw repeats: each is one point of one randomisation.
    assert len(z[:, 0, 0].unique()) == 803


def test_defensive_quasi_monte_carlo():
    """The estimate is unbiased, and its error, the spread of the randomisations, is smaller."""
    model = LinearGaussian(2, 6)
    x = model.sample(100)
    q, error = model.posterior(x, 0.5, 0.3), {}
    for noise in ("philox", "qmc"):
        found = [_ratio(model, x, q, 203, Defensive(0.1), seed=s, noise=noise) for s in range(60)]
        ratios = torch.stack([ratio for ratio, _ in found])
        error[noise] = ratios.std(0).square().mean().sqrt()
        estimated = torch.stack([f.log_px_stderr for _, f in found]).square().mean().sqrt()
        # The examples share the start of the cycle: only the seeds are independent.
        means = ratios.mean(1)
        assert abs(float(means.mean()) - 1) < 5 * float(means.std()) / math.sqrt(60)
        assert float(estimated / error[noise]) == pytest.approx(1, abs=0.1)
    assert error["qmc"] < 0.6 * error["philox"]


def test_rounds():
    assert Adapted().rounds(63) == Adapted().rounds(79) == Adapted(most=50).rounds(1000) == []
    assert Adapted().rounds(80) == [64]
    assert Adapted().rounds(500) == [64, 80, 100, 125, 156, 195, 243, 303, 378]
    assert Adapted().rounds(100_000)[-1] <= 4000
    assert Adapted(most=100).rounds(100_000) == [64, 80, 100]


# Errors


class _Bare(Distribution):
    """Posterior whose density is known at its draws only."""

    def __init__(self, mu):
        super().__init__()
        self.mu, self.batch, self.device = mu, len(mu), mu.device

    def rsample_log_prob(self, samples, seed, *, sample_offset=0, row_offset=0):
        place = {"sample_offset": sample_offset, "row_offset": row_offset}
        eps = fastvae.random.normal(seed, samples, *self.mu.shape, **place)
        return self.mu + eps, td.Normal(0.0, 1.0).log_prob(eps).sum(-1)


ZEROS = torch.zeros(4, D)


@pytest.mark.parametrize(
    "q, proposal, error, words",
    [
        (None, "adaptive", ValueError, r"proposal='adaptive' is unknown; known: 'posterior', .*'adapted'"),
        (None, 3, TypeError, r"proposal must be a name .* or an object such as fastvae.proposals.Defensive"),
        (None, Defensive, TypeError, "proposal must be a name"),
        (None, proposals.Proposal(), NotImplementedError, "use one of fastvae.proposals, such as Defensive"),
        (_Bare(ZEROS), "adapted", TypeError, "needs the density of q at any z, but _Bare has no log_prob"),
        (_Bare(ZEROS), "defensive", TypeError, "needs the density of q at any z, but _Bare has no log_prob"),
    ],
)
def test_unsupported_combinations_are_refused(q, proposal, error, words):
    q = (ZEROS, ZEROS) if q is None else q
    x, decoder = torch.ones(4, X), torch.nn.Linear(D, X)
    with pytest.raises(error, match=words):
        fastvae.log_marginal(x, q, decoder, k=100, likelihood="bernoulli", proposal=proposal)
    with pytest.raises(error, match=words):
        evaluate_parts(lambda x: q, decoder, x, k=100, likelihood="bernoulli", proposal=proposal, **QUIET)


def test_adapted_refuses_a_point_set():
    x, decoder, q = torch.ones(4, X), torch.nn.Linear(D, X), (ZEROS, ZEROS)
    for name in ("adapted", Adapted()):
        with pytest.raises(ValueError, match="together are not a point set; use noise='philox'"):
            fastvae.log_marginal(x, q, decoder, k=100, likelihood="bernoulli", proposal=name, noise="qmc")


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Defensive(1.0), r"share must lie in 0.01 … 0.99"),
        (lambda: Adapted(posterior=0.9, prior=0.1), r"posterior \+ prior must leave a share"),
        (lambda: Adapted(df=0), "df must be at least 1"),
        (lambda: Adapted(scale=0), "scale must be greater than 0"),
        (lambda: Adapted(most=0), "most must be at least 1"),
    ],
)
def test_invalid_options_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()
    with pytest.raises(TypeError, match="df must be an int"):
        Adapted(df=2.5)


def test_names_stand_for_objects_with_default_options():
    for name, kind in zip(NAMES, (Posterior, Defensive, Adapted), strict=True):
        assert proposals.as_proposal(name, "philox") == kind()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repr(Adapted(df=4)) == "Adapted(posterior=None, prior=0.05, df=4, scale=None, most=4000)"


def test_scaled_weights():
    """Scaling weights by e^c equals adding c to all log weights."""
    log_w = randn(50, 4, seed=3, dtype=torch.float64)
    log_w[:, 2] = -math.inf
    by = torch.tensor([0.5, -3.0, 2.0, 0.0], dtype=torch.float64, device=DEVICE)
    found, expected = Weights.of(log_w, 9).scaled(by), Weights.of(log_w + by, 9)
    torch.testing.assert_close(found.tensors, expected.tensors, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Weights.of(log_w, 9).scaled(2.0).log_px, Weights.of(log_w + 2, 9).log_px)


def test_seeds_of_components_are_the_same_when_compiled():
    """Also for a number that the compiler knows only as a symbol."""
    compiled = torch.compile(derived_seed, dynamic=True)
    seed = torch.tensor(-(2**62) + 12345, device=DEVICE)
    for number in (0, 1, 7, 10**6):
        assert torch.equal(compiled(seed, number), derived_seed(seed, number))
