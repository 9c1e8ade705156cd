"""Families over z as q and as p, in all pairs and entry points: densities, draws, closed forms."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
import zuko
from torch import distributed, nn
from torch import distributions as td

import fastvae
from fastvae import random
from fastvae.core import special
from fastvae.distributions import (
    AggregatePosterior,
    DiagonalNormal,
    Exponential,
    Flow,
    FullNormal,
    Gumbel,
    Laplace,
    Logistic,
    LogNormal,
    LowRankNormal,
    Mixture,
    NormalMixture,
    StandardNormal,
    StudentT,
    TorchDistribution,
    VampPrior,
    as_posterior,
    as_prior,
    rsample_log_prob,
)
from fastvae.distributions.closed_form import closed_kl
from fastvae.distributions.draws import draw_chunk, draw_prior
from fastvae.distributions.stratified import StratifiedMixture
from fastvae.distributions.tensors import frozen, mapped
from fastvae.likelihoods import Gaussian

from .conftest import DEVICE
from .models import LinearGaussian, evaluate_parts, generator, randn, seed_of

pytestmark = pytest.mark.usefixtures("one_thread")

K, B, D, X, U = 6, 5, 3, 7, 4
SEED = torch.tensor(11, device=DEVICE)
BERNOULLI = {"likelihood": "bernoulli"}
ESTIMATORS = ("iwae", "stl", "dreg")


def zeros(*shape):
    return torch.zeros(shape, device=DEVICE)


class Parameters:
    """Leaf tensors of a family, in the order of their creation."""

    def __init__(self, dtype=torch.float64, rows=B):
        self.dtype, self.rows, self.leaves = dtype, rows, []

    def __call__(self, *shape, shift=0.0):
        t = (0.4 * randn(*shape, seed=30 + len(self.leaves)) + shift).to(self.dtype).requires_grad_()
        self.leaves.append(t)
        return t


def _flow(make):
    """Build a zuko flow with fixed weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return make()


def _mixture(p, rows):
    pairs = [(p(*rows, D), p(*rows, D)), Laplace(p(*rows, D), p(*rows, D))]
    return Mixture(pairs if rows else [DiagonalNormal(*pairs[0]), pairs[1]], p(*rows, 2))


def _posterior_flow(p):
    flow = _flow(lambda: zuko.flows.NSF(D, 2, transforms=1, hidden_features=[8], passes=2)).to(
        DEVICE, p.dtype
    )
    return Flow(flow, p(p.rows, 2))


# Each a function of parameters p; ``rows`` is [B] for a posterior and empty for a prior.
BOTH = {
    "diagonal": lambda p, rows: DiagonalNormal(p(*rows, D), p(*rows, D)),
    "full": lambda p, rows: FullNormal(p(*rows, D), p(*rows, D * (D + 1) // 2)),
    "low rank": lambda p, rows: LowRankNormal(p(*rows, D), p(*rows, D), p(*rows, D, 2)),
    "laplace": lambda p, rows: Laplace(p(*rows, D), p(*rows, D)),
    "logistic": lambda p, rows: Logistic(p(*rows, D), p(*rows, D)),
    "student": lambda p, rows: StudentT(p(*rows, D), p(*rows, D), p(*rows, D, shift=5.0)),
    "gumbel": lambda p, rows: Gumbel(p(*rows, D), p(*rows, D)),
    "log-normal": lambda p, rows: LogNormal(p(*rows, D), p(*rows, D)),
    "exponential": lambda p, rows: Exponential(p(*rows, D)),
    "mixture": _mixture,
    "torch": lambda p, rows: td.Laplace(p(*rows, D), p(*rows, D).exp()),
}
POSTERIORS = {
    **{name: (lambda p, make=make: make(p, (p.rows,))) for name, make in BOTH.items()},
    "flow": _posterior_flow,
    "torch's full": lambda p: td.MultivariateNormal(
        p(p.rows, D), scale_tril=torch.diag_embed(p(p.rows, D).exp()) + p(p.rows, D, D).tril(-1)
    ),
    "torch's low rank": lambda p: td.LowRankMultivariateNormal(
        p(p.rows, D), p(p.rows, D, 2), p(p.rows, D).exp()
    ),
}


def _vamp_of_full(p):
    mu = p(D, X)
    return VampPrior(lambda u: FullNormal(u @ mu.T, (u @ mu.T).repeat(1, 2)), p(U, X))


def _aggregate(p):
    weight = p(2 * D, X)
    return AggregatePosterior(lambda u: u @ weight.T, randn(9, X, seed=8).to(p.dtype), batch_size=4)


def _vamp(p):
    encoder = nn.Linear(X, 2 * D).to(DEVICE, p.dtype)
    with torch.no_grad():
        encoder.weight.copy_(0.3 * randn(2 * D, X, seed=9))
        encoder.bias.zero_()
    p.leaves += list(encoder.parameters())
    return VampPrior(encoder, p(U, X), p(U))


PRIORS = {
    "standard": lambda p: None,
    **{name: (lambda p, make=make: make(p, ())) for name, make in BOTH.items()},
    "rows": lambda p: DiagonalNormal(p(p.rows, D), p(p.rows, D)),
    "normal mixture": lambda p: NormalMixture(p(U, D), p(U, D), p(U)),
    "torch's mixture": lambda p: td.MixtureSameFamily(
        td.Categorical(logits=p(U)), td.Independent(td.Normal(p(U, D), p(U, D).exp()), 1)
    ),
    "vamp": _vamp,
    "vamp of full": _vamp_of_full,
    "aggregate": _aggregate,
    "flow": lambda p: Flow(
        _flow(lambda: zuko.flows.MAF(D, transforms=1, hidden_features=[8])).to(DEVICE, p.dtype)
    ),
}
# Where q covers the whole line and p half of it, log p is −∞.
POSITIVE = {"log-normal", "exponential"}
PAIRS = [
    (q, p)
    for q in POSTERIORS
    for p in PRIORS
    if (p != "standard" if q in POSITIVE else p not in POSITIVE)  # N(0, I) has a different support
]


def _prior_of(q):
    """Return a prior with q's support, or None for the default."""
    return LogNormal(zeros(D), zeros(D)) if q in POSITIVE else None


def _decoder(dtype):
    weight = randn(D, X, seed=6).to(dtype)
    return lambda z: torch.tanh(z) @ weight


def _data(dtype):
    return (randn(B, X, seed=7) > 0).to(dtype)


@pytest.mark.parametrize(("q", "p"), PAIRS, ids=lambda n: n)
def test_any_posterior_with_any_prior(q, p):
    """Any pair works in every entry point.

    Weights are log p − log q at the draws, bounds follow from these, chunks give the whole, and gradients
    reach all parameters.
    """
    made_q, made_p = Parameters(), Parameters()
    posterior, prior = POSTERIORS[q](made_q), PRIORS[p](made_p)
    made_p.leaves = [t for t in made_p.leaves if t.requires_grad]
    x, decoder = _data(torch.float64), _decoder(torch.float64)
    options = {"prior": prior, **BERNOULLI}
    read_q, read_p = as_posterior(posterior), as_prior(prior)
    seed = seed_of(5)
    z, _ = rsample_log_prob(read_q, K, seed)
    log_q, log_p = read_q.log_prob(z), read_p.log_prob(z)
    parts = fastvae.log_weights(x, posterior, decoder, k=K, generator=generator(5), **options)
    shares = read_q.log_stratum_weights(K, seed) if read_q.strata > 1 else torch.zeros(1, 1, dtype=z.dtype)
    torch.testing.assert_close(parts.log_ratio, log_p - log_q + shares, rtol=1e-8, atol=1e-8)
    log_likelihood = td.Bernoulli(logits=decoder(z)).log_prob(x).sum(-1)
    torch.testing.assert_close(parts.log_likelihood, log_likelihood, rtol=1e-8, atol=1e-8)
    log_w = parts.log_likelihood + parts.log_ratio

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # kl="mc" is explicit, so a missing closed form must not warn
        mc = fastvae.elbo(x, posterior, decoder, k=K, kl="mc", generator=generator(5), terms=True, **options)
    expected = (shares.exp() * (log_likelihood + log_p - log_q)).mean(0)
    torch.testing.assert_close(mc.bound, expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(mc.bound, mc.log_likelihood - mc.kl, rtol=1e-8, atol=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # for want of a closed form
        analytic = fastvae.elbo(x, posterior, decoder, k=K, generator=generator(5), **options)
    assert bool(analytic.isfinite())

    leaves = [*made_q.leaves, *made_p.leaves]
    for estimator in ESTIMATORS:
        if estimator == "dreg" and read_q.strata > 1:
            with pytest.raises(ValueError, match="dreg.*Mixture.*'iwae' or 'stl'"):
                fastvae.iwae(x, posterior, decoder, k=K, estimator=estimator, **options)
            continue
        bounds = [
            fastvae.iwae(x, posterior, decoder, k=K, k_chunk=chunk, estimator=estimator, reduction="none",
                         generator=generator(5), **options)
            for chunk in (None, 4)
        ]  # fmt: skip
        torch.testing.assert_close(bounds[0], torch.logsumexp(log_w, 0) - math.log(K), rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(bounds[1], bounds[0], rtol=1e-9, atol=1e-9)
        grads = [
            torch.autograd.grad(b.sin().sum(), leaves, allow_unused=True, retain_graph=True) for b in bounds
        ]
        for one, other in zip(*grads, strict=True):
            assert one is not None and bool(one.isfinite().all()) and bool(one.any())
            torch.testing.assert_close(other, one, rtol=1e-7, atol=1e-9)
    marginal = fastvae.log_marginal(x, posterior, decoder, k=K, k_chunk=4, generator=generator(5), **options)
    torch.testing.assert_close(marginal.log_px, torch.logsumexp(log_w, 0) - math.log(K), rtol=1e-8, atol=1e-8)


HALVES = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_estimators_agree_in_half_precision(dtype):
    for name in POSTERIORS:
        # No DReG; networks in half precision; torch's has no Cholesky factor of it.
        if name in ("mixture", "flow", "torch's low rank"):
            continue
        found = []
        for estimator in ESTIMATORS:
            x, q = _data(torch.float32), POSTERIORS[name](Parameters(dtype))
            prior = _prior_of(name)
            options = {"k": K, "estimator": estimator, "generator": generator(5), **BERNOULLI}
            found.append(fastvae.iwae(x, q, lambda z: zeros(len(z), X), prior=prior, **options))
        for other in found[1:]:
            torch.testing.assert_close(
                other, found[0], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
            )


class Encoder(nn.Module):
    """Encoder of x to a family's posterior with parameters linear in x."""

    def __init__(self, name):
        super().__init__()
        self.name, self.linear = name, nn.Linear(X, 40)
        self.flow = _flow(lambda: zuko.flows.NSF(D, 2, transforms=1, hidden_features=[8], passes=2))

    def forward(self, x):
        numbers = 0.3 * self.linear(x)
        taken = 0

        def take(*shape, shift=0.0):
            nonlocal taken
            size = math.prod(shape[1:])
            taken += size
            return numbers[:, taken - size : taken].reshape(shape) + shift

        take.rows, take.dtype = len(x), x.dtype
        return Flow(self.flow, take(len(x), 2)) if self.name == "flow" else POSTERIORS[self.name](take)


@pytest.mark.parametrize("name", POSTERIORS)
@pytest.mark.parametrize("prior", ["standard", "vamp", "mixture"])
def test_evaluated(name, prior, tmp_path):
    """Any batch size and a checkpoint give the same results; with a tolerance examples stop early."""
    encoder, decoder = Encoder(name).double(), nn.Linear(D, X).double()
    p = _prior_of(name) if prior == "standard" else PRIORS[prior](Parameters())
    x = (randn(23, X, seed=7) > 0).double()
    options = {"likelihood": "bernoulli", "prior": p, "progress": False}
    whole = evaluate_parts(encoder, decoder, x, k=12, generator=generator(2), **options)
    path = tmp_path / "run.npz"
    parts = [
        evaluate_parts(encoder, decoder, x, k=12, batch_size=5, k_chunk=5, checkpoint=path,
                         generator=generator(2), **options)
        for _ in range(2)
    ]  # fmt: skip
    for part in parts:
        np.testing.assert_allclose(part.log_px, whole.log_px, rtol=1e-9)
    early = evaluate_parts(encoder, decoder, x, k=400, tol=0.3, generator=generator(2), **options)
    assert np.isfinite(early.log_px).all()


RANKED = [("full", "vamp"), ("low rank", "mixture"), ("student", "normal mixture"), ("mixture", "flow"),
          ("flow", "standard"), ("laplace", "aggregate")]  # fmt: skip


def _evaluated(q: str, p: str, **options):
    torch.manual_seed(4)
    encoder, decoder = Encoder(q).double(), nn.Linear(D, X).double()
    x = (randn(23, X, seed=7).cpu() > 0).double()
    prior = PRIORS[p](Parameters())
    options = {
        "k": 12,
        "batch_size": 5,
        "prior": prior,
        "likelihood": "bernoulli",
        "progress": False,
        **options,
    }
    return evaluate_parts(encoder, decoder, x, generator=torch.Generator().manual_seed(2), **options)


def _evaluate_on_a_rank(rank: int, world: int, folder: str) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        for i, pair in enumerate(RANKED):
            for shard in ("data", "samples"):
                _evaluated(*pair, shard=shard).save(f"{folder}/{i}-{shard}-{rank}.npz")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


@pytest.mark.skipif(DEVICE.type != "cpu", reason="the ranks have one device")
def test_ranks_share_an_evaluation_of_any_family(tmp_path):
    """Sharded by examples or by draws, each rank has one process's result."""
    torch.multiprocessing.spawn(_evaluate_on_a_rank, args=(2, str(tmp_path)), nprocs=2)
    for i, pair in enumerate(RANKED):
        expected = _evaluated(*pair).log_px
        for shard in ("data", "samples"):
            for rank in range(2):
                found = fastvae.Evaluation.load(tmp_path / f"{i}-{shard}-{rank}.npz").log_px
                np.testing.assert_allclose(found, expected, rtol=1e-9, err_msg=f"{pair}, {shard}, {rank}")


def test_a_vae_of_each(backend):
    for name in POSTERIORS:
        options = {"prior": _prior_of(name), "latent_dim": D, **BERNOULLI}
        vae = fastvae.VAE(Encoder(name), nn.Linear(D, X), **options).to(DEVICE)
        x = _data(torch.float32)
        (-vae.iwae(x, k=4)).backward()
        assert all(g is None or bool(g.isfinite().all()) for g in (p.grad for p in vae.parameters()))
        assert vae.reconstruction_log_prob(x, k=7).shape == (B,)


@pytest.mark.parametrize("kind", ["posterior", "prior"])
def test_every_backend(backend, kind):
    """In float32, each family's bound and gradients, as q and as p, equal the reference's."""
    x, decoder = _data(torch.float32), _decoder(torch.float32)
    for name in POSTERIORS if kind == "posterior" else PRIORS:
        found = []
        for implementation in (backend, "reference"):
            made = Parameters(torch.float32)
            with fastvae.use_backend(implementation):
                of_prior = "diagonal" if name == "standard" else "log-normal"
                q = POSTERIORS[name if kind == "posterior" else of_prior](made)
                p = _prior_of(name) if kind == "posterior" else PRIORS[name](made)
                bound = fastvae.iwae(
                    x, q, decoder, k=K, k_chunk=4, prior=p, generator=generator(5), **BERNOULLI
                )
                leaves = [t for t in made.leaves if t.requires_grad]
                found.append([bound, *torch.autograd.grad(bound, leaves, allow_unused=True)])
        for one, other in zip(*found, strict=True):
            # Sums of some hundred numbers of at most 10, each with a few roundings.
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", [n for n in PRIORS if n not in ("rows", "standard")])
def test_draws_of_priors(name):
    """A prior's draws have its shape, repeat, and follow its density: E[p(z)^-1 f(z)] = ∫f, f normal."""
    p = as_prior(PRIORS[name](Parameters(torch.float32)))
    with torch.no_grad():
        z = p.sample(5000, dim=D, device=DEVICE, generator=generator(4))
        assert z.shape == (5000, D)
        assert torch.equal(z, p.sample(5000, dim=D, device=DEVICE, generator=generator(4)))
        z = z.double()
        if name in POSITIVE:
            f = td.Gamma(torch.full((D,), 3.0, dtype=z.dtype), torch.full((D,), 2.5, dtype=z.dtype))
        else:
            f = td.Normal(z.median(0).values, 0.4 * (z.quantile(0.84, 0) - z.quantile(0.16, 0)))
        ratio = torch.exp(f.log_prob(z).sum(-1) - p.log_prob(z.to(torch.float32)[:, None])[:, 0].double())
    error = ratio.std() / math.sqrt(len(z))
    assert abs(float(ratio.mean()) - 1) < 6 * float(error) and float(error) < 0.2


# Densities and draws

SCIPY = {
    "laplace": lambda a, b: scipy.stats.laplace(a, np.exp(b)),
    "logistic": lambda a, b: scipy.stats.logistic(a, np.exp(b)),
    "gumbel": lambda a, b: scipy.stats.gumbel_r(a, np.exp(b)),
    "log-normal": lambda a, b: scipy.stats.lognorm(np.exp(b), scale=np.exp(a)),
    "student": lambda a, b: scipy.stats.t(4.5, a, np.exp(b)),
    "exponential": lambda a, b: scipy.stats.expon(scale=np.exp(b)),
}
OURS = {
    "laplace": Laplace,
    "logistic": Logistic,
    "gumbel": Gumbel,
    "log-normal": LogNormal,
    "student": lambda a, b: StudentT(a, b, 4.5),
    "exponential": lambda a, b: Exponential(b),
}


@pytest.mark.parametrize("name", SCIPY)
def test_densities_equal_scipy(name):
    """Densities equal scipy's, also far out in the tails."""
    a, b = randn(B, D, seed=1).double(), 0.5 * randn(B, D, seed=2).double()
    z = 30 * randn(K, B, D, seed=3).double()
    z = z.abs() if name in POSITIVE else z
    expected = SCIPY[name](a.cpu().numpy(), b.cpu().numpy()).logpdf(z.cpu().numpy()).sum(-1)
    found = OURS[name](a, b).log_prob(z)
    np.testing.assert_allclose(found.cpu(), expected, rtol=1e-12)
    # In float32 to its roundings, where a Gumbel's exp(-w) does not overflow.
    near = (z / 15).float()
    single, double = (OURS[name](*(t.to(dtype) for t in (a.float(), b.float()))).log_prob(near.to(dtype))
                      for dtype in (torch.float32, torch.float64))  # fmt: skip
    np.testing.assert_allclose(single.cpu(), double.cpu(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCIPY)
def test_draws_follow_their_distribution_function(name):
    """The Kolmogorov-Smirnov distance in each dimension is below a bound exceeded once in 10^9."""
    a, b = randn(1, D, seed=1), 0.5 * randn(1, D, seed=2)
    z, log_q = OURS[name](a, b).rsample_log_prob(20_000, SEED)
    for d in range(D):
        scipys = SCIPY[name](float(a[0, d]), float(b[0, d]))
        statistic = scipy.stats.kstest(z[:, 0, d].cpu().numpy(), scipys.cdf).statistic
        assert statistic < math.sqrt(-0.5 * math.log(1e-9 / 2) / 20_000)
    torch.testing.assert_close(log_q, OURS[name](a, b).log_prob(z), rtol=1e-4, atol=1e-4)


QUANTILES = {
    "log_normal_cdf": scipy.stats.norm.logcdf,
    "laplace_noise": lambda n: np.where(n < 0, 1, -1) * (scipy.stats.norm.logcdf(-np.abs(n)) + math.log(2)),
    "logistic_noise": lambda n: scipy.stats.norm.logcdf(n) - scipy.stats.norm.logcdf(-n),
    "gumbel_noise": lambda n: -np.log(-scipy.stats.norm.logcdf(n)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", QUANTILES)
def test_noise_of_a_normal(name, dtype):
    """A tail has a relative error of n² eps, by its rounded argument, and a few eps of its formula."""
    n = torch.linspace(-6.7, 6.7, 2001, dtype=dtype, device=DEVICE)
    expected = torch.from_numpy(QUANTILES[name](n.cpu().double().numpy())).to(DEVICE)
    error = (getattr(special, name)(n).double() - expected).abs()
    assert (error <= torch.finfo(dtype).eps * (n.double().square() + 5 + expected.abs())).all()


@pytest.mark.parametrize("name", ["laplace", "logistic", "gumbel", "exponential", "student"])
def test_tails_equal_the_quantile_function(name, monkeypatch):
    """Noise at 6.5 standard deviations gives the family's quantile there, though 1 − u is 0 in float32."""
    eps = torch.tensor([-6.5, 6.5, 0.3], dtype=torch.float64, device=DEVICE)
    if name == "student":
        eps = torch.cat([eps, torch.zeros(3, dtype=torch.float64, device=DEVICE)])
    monkeypatch.setattr(fastvae.random, "normal", lambda *_, dtype, **__: eps.to(dtype).reshape(1, 1, -1))
    zeros = torch.zeros(1, 3, device=DEVICE)
    z, _ = OURS[name](zeros, zeros).rsample_log_prob(1, SEED)
    scipys = SCIPY[name](0.0, 0.0)
    if name == "student":  # Bailey's radius of a bivariate t
        expected = [e * math.sqrt(4.5 * math.expm1(e * e / 4.5)) / abs(e) for e in (-6.5, 6.5, 0.3)]
    else:
        tail = scipy.stats.norm.sf(6.5)
        expected = [scipys.ppf(tail), scipys.isf(tail), scipys.ppf(scipy.stats.norm.cdf(0.3))]
    # The relative error of a tail of single precision, as above.
    rtol = 1e-6 if name == "student" else (6.5**2 + 5) * float(np.finfo(np.float32).eps)
    np.testing.assert_allclose(z.flatten().cpu(), expected, rtol=rtol)


def test_student_draws_differentiate_by_degrees_of_freedom():
    """The pathwise derivative of E[|z|] by ν equals that of the formula for the mean."""
    df = torch.tensor(7.0, dtype=torch.float64, device=DEVICE, requires_grad=True)
    zeros = torch.zeros(1, 1, dtype=torch.float64, device=DEVICE)
    z, _ = StudentT(zeros, zeros, df).rsample_log_prob(200_000, SEED)
    slopes = torch.autograd.grad(z.abs().mean(), df, retain_graph=True)[0]

    def mean(v):
        half = torch.lgamma((v + 1) / 2) - torch.lgamma(v / 2)
        return 2 * v.sqrt() * torch.exp(half) / (math.sqrt(math.pi) * (v - 1))

    v = df.detach().clone().requires_grad_()
    expected = torch.autograd.grad(mean(v), v)[0]
    assert abs(float(z.abs().mean() - mean(df))) < 0.01
    torch.testing.assert_close(slopes, expected, rtol=0.1, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("df", [1e8, 1e12, 1e15, 1e34, 1e300, math.inf])
def test_a_student_of_many_degrees_of_freedom(dtype, df):
    """Density and entropy equal the normal's and the terms of order 1/ν, to a few roundings."""
    w = torch.linspace(-4, 4, 33, dtype=dtype, device=DEVICE)
    q = StudentT(zeros(1).to(dtype), zeros(1).to(dtype), torch.tensor(df, dtype=torch.float64, device=DEVICE))
    found, w = q.log_prob(w[:, None, None])[:, 0].double(), w.double()
    rest = (w**4 - 2 * w**2 - 1) / (4 * df)
    exact = -0.5 * (w**2 + math.log(2 * math.pi)) + rest
    # A constant and a product: of ν + 1, twice w/√ν and a logarithm.
    bound = 12 * torch.finfo(dtype).eps / 2 * (1 + w**2) + (1 + w**6) / df / df
    assert bool(((found - exact).abs() <= bound).all())
    entropy = 0.5 * (1 + math.log(2 * math.pi)) + 1 / df
    assert abs(float(q.entropy()) - entropy) <= 4 * torch.finfo(dtype).eps + 1 / df / df


@pytest.mark.parametrize("df", [1e-3, 0.1, 1.0, 30.0])
def test_a_student_density_far_out_does_not_overflow(df):
    """The log density of any float32 number is finite, and accurate with its derivatives."""
    w = 10.0 ** torch.arange(-38.0, 39.0, 2.0, device=DEVICE)
    at = torch.cat([-w, zeros(1), w, torch.tensor([3.4e38], device=DEVICE)])

    def computed(dtype):
        z = at.detach().to(dtype, copy=True).requires_grad_()
        leaf = torch.tensor(df, dtype=torch.float64, device=DEVICE, requires_grad=True)
        value = StudentT(zeros(1).to(dtype), zeros(1).to(dtype), leaf).log_prob(z[:, None, None])
        return value[:, 0], *torch.autograd.grad(value.sum(), (z, leaf))

    info = torch.finfo(torch.float32)
    found, exact = computed(torch.float32), computed(torch.float64)
    size = 1 + exact[0].detach().abs()
    assert bool(((found[0].double() - exact[0]).abs() <= 12 * info.eps / 2 * size).all())
    slope_bound = 16 * info.eps / 2 * exact[1].abs() + info.tiny
    assert bool(((found[1].double() - exact[1]).abs() <= slope_bound).all())
    of_df = 16 * info.eps / 2 * (size.sum() / df)
    assert abs(float(found[2] - exact[2])) <= float(of_df)


@pytest.mark.parametrize("name", POSTERIORS)
def test_draws_are_addressed(name):
    """Chunks and rows of any family's draw are parts of the whole, as are draws of a row-sliced posterior."""
    q = as_posterior(POSTERIORS[name](Parameters()))
    z, log_q = q.rsample_log_prob(K, SEED)
    part, part_q = q.rsample_log_prob(3, SEED, sample_offset=2)
    torch.testing.assert_close(part, z[2:5], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part_q, log_q[2:5], rtol=1e-10, atol=1e-10)
    some = q.rows(1, 4)
    if name == "torch":
        assert some is None
        return
    part, part_q = some.rsample_log_prob(K, SEED, row_offset=1)
    torch.testing.assert_close(part, z[:, 1:4], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(part_q, log_q[:, 1:4], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(log_q, q.log_prob(z), rtol=1e-7, atol=1e-7)


# torch and zuko compute in the dtype of their inputs.
@pytest.mark.parametrize("name", [n for n in BOTH if n != "torch"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype):
    """In half precision z has the parameters' dtype and densities are float32."""
    q = POSTERIORS[name](Parameters(dtype))
    z, log_q = rsample_log_prob(as_posterior(q), K, SEED)
    assert z.dtype == dtype and log_q.dtype == torch.float32 and bool(log_q.isfinite().all())


# Covariances


def test_full_normal_reads_its_triangle_by_rows():
    mu, tril = randn(B, D, seed=1).double(), randn(B, D * (D + 1) // 2, seed=2).double()
    scale = torch.zeros(B, D, D, dtype=torch.float64, device=DEVICE)
    at = 0
    for i in range(D):
        for j in range(i + 1):
            scale[:, i, j] = tril[:, at].exp() if i == j else tril[:, at]
            at += 1
    q = FullNormal(mu, tril)
    z, log_q = q.rsample_log_prob(K, SEED)
    eps = fastvae.random.normal(SEED, K, B, D, dtype=torch.float64)
    torch.testing.assert_close(z, mu + torch.einsum("bij,kbj->kbi", scale, eps), rtol=1e-12, atol=1e-12)
    expected = td.MultivariateNormal(mu, scale_tril=scale)
    torch.testing.assert_close(log_q, expected.log_prob(z), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(q.log_prob(z), expected.log_prob(z), rtol=1e-9, atol=1e-9)
    again = FullNormal.of(mu, scale)
    torch.testing.assert_close(again.tril, tril, rtol=1e-12, atol=1e-12)


def test_low_rank_equals_torch():
    mu, logvar, factor = (randn(*s, seed=i).double() for i, s in enumerate([(B, D), (B, D), (B, D, 2)]))
    q = LowRankNormal(mu, logvar, factor)
    z = randn(K, B, D, seed=5).double()
    expected = td.LowRankMultivariateNormal(mu, factor, logvar.exp())
    torch.testing.assert_close(q.log_prob(z), expected.log_prob(z), rtol=1e-9, atol=1e-9)
    draws, _ = q.rsample_log_prob(20_000, SEED)
    centred, covariance = draws - mu, expected.covariance_matrix
    found = torch.einsum("kbi,kbj->bij", centred, centred) / len(draws)
    spread = covariance.diagonal(dim1=-2, dim2=-1)
    error = (spread[:, :, None] * spread[:, None] + covariance.square()).sqrt() / math.sqrt(len(draws))
    assert bool(((found - covariance).abs() < 6 * error).all())


def _low_rank(logvar, d=20, r=3):
    """Return float32 parameters of low-rank normals, with a diagonal part of about exp(logvar)."""
    return randn(B, d, seed=1), logvar + 0.3 * randn(B, d, seed=2), randn(B, d, r, seed=3)


class _Parts:
    """Density of low-rank normals in float64, taken apart: w = own + W common = rest + W s."""

    def __init__(self, parameters, z=None):
        mu, self.logvar, factor = (t.double() for t in parameters)
        d, r = factor.shape[1:]
        inverse = torch.exp(-0.5 * self.logvar)
        self.white = white = factor * inverse[..., None]
        self.capacitance = torch.eye(r, dtype=torch.float64, device=DEVICE) + white.mT @ white
        if z is None:
            eps = random.normal(SEED, K, B, d + r, dtype=torch.float64)
            self.own, self.common = eps.split([d, r], -1)
        else:
            self.own, self.common = (z.double() - mu) * inverse, z.new_zeros(K, B, r).double()
        right = torch.einsum("bdr,kbd->kbr", white, self.own) - self.common
        self.shift = torch.linalg.solve(self.capacitance, right.movedim(0, -1)).movedim(-1, 0)
        self.moved = torch.einsum("bdr,kbr->kbd", white, self.shift)
        self.rest, self.s = self.own - self.moved, self.common + self.shift
        self.of_moved = torch.einsum("bdr,kbr->kbd", white.abs(), self.shift.abs())
        self.solved = (white @ torch.linalg.inv(self.capacitance)).abs()
        # Of a term: the noise 8, or a difference 1; an exponential 4; two products; sums over D and over R.
        self.roundings = 8 + 4 + 2 + d + r

    def magnitude(self):
        """Return the sum of the magnitudes of all terms, and of what the errors of w, W and s change."""
        terms = self.rest.square() + self.logvar.abs() + math.log(2 * math.pi)
        terms = 0.5 * terms + self.rest.abs() * (self.own.abs() + self.of_moved)
        common = 0.5 * self.s.square() + self.s.abs() * (self.common.abs() + self.shift.abs())
        logs = torch.logdet(self.capacitance) + (self.solved * self.white.abs()).sum((-1, -2))
        return terms.sum(-1) + common.sum(-1) + logs


@pytest.mark.parametrize("of", ["a draw", "a given z"])
@pytest.mark.parametrize("logvar", [0.0, -8.0, -16.0])
def test_a_low_rank_density_of_a_narrow_diagonal_keeps_its_digits(of, logvar):
    """log q is accurate in float32 to the roundings of the noise or of z, for any diagonal part."""
    parameters = _low_rank(logvar)
    q, exact_q = LowRankNormal(*parameters), LowRankNormal(*(t.double() for t in parameters))
    z, log_q = q.rsample_log_prob(K, SEED)
    if of == "a draw":
        _, exact = exact_q.rsample_log_prob(K, SEED)
        parts = _Parts(parameters)
    else:
        log_q, exact, parts = q.log_prob(z), exact_q.log_prob(z.double()), _Parts(parameters, z)
    bound = parts.roundings * torch.finfo(torch.float32).eps / 2 * parts.magnitude()
    assert bool(((log_q.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("logvar", [0.0, -8.0, -12.0])
def test_gradients_of_a_low_rank_draw_are_total_derivatives(logvar):
    """log q from the noise differentiates as log q at z, which moves with the parameters; float32 too."""
    parameters, weights = _low_rank(logvar), randn(K, B, seed=4).double()

    def gradients(dtype, at_z):
        leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in parameters]
        q = LowRankNormal(*leaves)
        z, log_q = q.rsample_log_prob(K, SEED)
        value = q.log_prob(z) if at_z else log_q
        return torch.autograd.grad(value, leaves, weights.to(dtype), materialize_grads=True)

    exact, at_z = gradients(torch.float64, False), gradients(torch.float64, True)
    for one, other in zip(exact, at_z, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * (1 + float(other.abs().max())))
    parts, g = _Parts(parameters), weights.abs()
    # Terms of the derivatives by log variances and by F. The paths through s add 0, a difference of such
    # terms multiplied by the condition number.
    per_dim = 1 + 2 * parts.rest.abs() * parts.of_moved + (parts.solved * parts.white.abs()).sum(-1)
    of_logvar = 0.5 * torch.einsum("kb,kbd->bd", g, per_dim)
    per_entry = parts.rest.abs()[..., None] * parts.shift.abs()[..., None, :] + parts.solved
    of_factor = torch.einsum("kb,kbdr->bdr", g, per_entry) * torch.exp(-0.5 * parts.logvar)[..., None]
    condition = torch.linalg.cond(parts.capacitance)
    u = torch.finfo(torch.float32).eps / 2
    found = gradients(torch.float32, False)[1:]
    for one, other, terms in zip(found, exact[1:], (of_logvar, of_factor), strict=True):
        scale = terms.flatten(1).amax(1) * (1 + condition)
        error = (one.double() - other).abs().flatten(1).amax(1)
        assert bool((error <= parts.roundings * u * scale).all())


@pytest.mark.parametrize("logvar", [0.0, -8.0, -16.0])
@pytest.mark.parametrize("other", ["full", "low rank", "to full"])
def test_closed_forms_of_a_narrow_low_rank_normal(other, logvar):
    """KL and gradients are accurate in float32 where the narrow diagonal part is lost in a covariance."""
    near = [t + 0.01 * randn(*t.shape, seed=7 + i) for i, t in enumerate(_low_rank(logvar))]
    full = [randn(B, 20, seed=5), 0.1 * randn(B, 210, seed=6)]

    def parts(dtype):
        leaves = [[t.detach().to(dtype, copy=True).requires_grad_() for t in group]
                  for group in (_low_rank(logvar), near, full)]  # fmt: skip
        low, p, dense = LowRankNormal(*leaves[0]), LowRankNormal(*leaves[1]), FullNormal(*leaves[2])
        if other == "to full":
            return (low, dense), leaves[0] + leaves[2]
        return ((dense, low), leaves[2] + leaves[0]) if other == "full" else ((low, p), leaves[0] + leaves[1])

    pair, leaves = parts(torch.float32)
    kl = closed_kl(*pair)
    assert kl.dtype == torch.float32
    found = kl, *torch.autograd.grad(kl.sum(), leaves)
    pair, leaves = parts(torch.float64)
    covariances = [
        d.scale_tril @ d.scale_tril.mT
        if isinstance(d, FullNormal)
        else d.factor @ d.factor.mT + torch.diag_embed(d.logvar.exp())
        for d in pair
    ]
    kl = td.kl_divergence(*(td.MultivariateNormal(d.mu, c) for d, c in zip(pair, covariances, strict=True)))
    exact = kl, *torch.autograd.grad(kl.sum(), leaves)
    # One rounding of the result; torch's formula in float64 loses the digits of the condition number twice.
    condition = max(float(torch.linalg.cond(c.detach()).max()) for c in covariances)
    for one, value in zip(found, exact, strict=True):
        lost = 2**-53 * 20 * condition * value.abs().max()
        error = (one.double() - value).abs()
        assert bool((error <= torch.finfo(torch.float32).eps * value.abs() + lost).all())


NORMALS = ("diagonal", "full", "low rank")


@pytest.mark.parametrize("q", NORMALS)
@pytest.mark.parametrize("p", ["standard", *NORMALS])
def test_closed_forms_of_normals_equal_torch(q, p):
    """KL(q ‖ p) and its gradients equal torch's formula for full covariances in float64."""
    made_q, made_p = Parameters(), Parameters()
    posterior = POSTERIORS[q](made_q)
    prior = as_prior(PRIORS[p](made_p))
    kl = closed_kl(posterior, prior)
    kl = kl.sum(-1) if kl.dim() == 2 else kl

    def full(d):
        if type(d) is StandardNormal:
            return td.MultivariateNormal(
                torch.zeros(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64)
            )
        t = d.as_torch()
        covariance = torch.diag_embed(t.variance) if isinstance(t, td.Normal) else t.covariance_matrix
        return td.MultivariateNormal(t.mean, covariance)

    expected = td.kl_divergence(full(posterior), full(prior))
    torch.testing.assert_close(kl, expected, rtol=1e-9, atol=1e-10)
    leaves = made_q.leaves + made_p.leaves
    grads, wanted = (torch.autograd.grad(v.sin().sum(), leaves, retain_graph=True) for v in (kl, expected))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_a_kl_near_zero_is_accurate():
    """The KL of a full covariance 1e-4 off the prior is accurate in float32; naively it is rounding noise."""
    tril = 1e-4 * randn(B, D * (D + 1) // 2, seed=1)
    mu = 1e-4 * randn(B, D, seed=2)
    kl = closed_kl(FullNormal(mu, tril), StandardNormal()).sum(1)
    exact = closed_kl(FullNormal(mu.double(), tril.double()), StandardNormal()).sum(1)
    torch.testing.assert_close(kl.double(), exact, rtol=1e-5, atol=0)


# Families near their prior, of a location, a log scale and a factor [..., D, 2], and the roundings of
# their KL: one of a KL that is computed in float64.
CLOSE = {
    "diagonal": (lambda a, b, c: DiagonalNormal(a, b), 16),
    "low rank": (lambda a, b, c: LowRankNormal(a, b, c), 1),
    "laplace": (lambda a, b, c: Laplace(a, b), 1),
    "gumbel": (lambda a, b, c: Gumbel(a, b), 1),
    "log-normal": (lambda a, b, c: LogNormal(a, b), 1),
    "exponential": (lambda a, b, c: Exponential(b), 1),
}


@pytest.mark.parametrize("off", [1e-2, 1e-3])
@pytest.mark.parametrize("name", CLOSE)
def test_a_kl_of_close_distributions_is_accurate(name, off):
    """KL and gradients of a q close to p are accurate in float32, where naive formulas cancel."""
    family, roundings = CLOSE[name]
    at = [randn(D, seed=1), randn(D, seed=2), zeros(D, 2)]

    def computed(dtype, kl):
        leaves = [(t + off * randn(B, *t.shape, seed=5 + i)).to(dtype) for i, t in enumerate(at)]
        leaves = [t.requires_grad_() for t in leaves]
        p = DiagonalNormal(*at[:2]) if name == "low rank" else family(*at)
        value = kl(family(*leaves), p.to(dtype))
        grads = torch.autograd.grad(value.sum(), leaves, materialize_grads=True)
        return [value.reshape(B, -1), *grads]

    def naive(q, p):
        one, other = q.as_torch(), p.as_torch()
        if name == "low rank":
            other = td.MultivariateNormal(other.mean, torch.diag_embed(other.variance))
        return td.kl_divergence(one, other)

    for found, exact in zip(computed(torch.float32, closed_kl), computed(torch.float64, naive), strict=True):
        # torch's formula in float64 has an absolute error of some roundings of 1.
        bound = (roundings + 1) * torch.finfo(torch.float32).eps / 2 * exact.abs() + 1e-13
        assert found.dtype == torch.float32 and bool(((found.double() - exact).abs() <= bound).all())


LOCATED = {
    "normal": lambda loc, scale: DiagonalNormal(loc, 2 * scale.log()),
    "laplace": lambda loc, scale: Laplace(loc, scale.log()),
    "gumbel": lambda loc, scale: Gumbel(loc, scale.log()),
    "full": lambda loc, scale: FullNormal.of(loc, torch.diag_embed(scale)),
    "torch laplace": td.Laplace,
    "torch gumbel": td.Gumbel,
    "uniform": lambda loc, scale: td.Uniform(loc, loc + scale),
    "gamma": lambda loc, scale: td.Gamma((loc / scale).square(), loc / scale.square()),
}


# Priors to which a family has a KL in closed form, which may be infinite. Torch's of a gamma and a Gumbel
# is NaN for the narrow ones, in float64, too: exp(loc / scale) overflows.
CLOSED = {
    "normal": ["normal", "laplace", "gumbel", "torch gumbel", "gamma"],
    "laplace": ["normal", "laplace", "gamma"],
    "gumbel": ["normal", "gumbel", "torch gumbel", "gamma"],
    "full": ["normal"],
    "torch laplace": ["normal", "laplace", "gamma"],
    "torch gumbel": ["normal", "gumbel", "torch gumbel", "gamma"],
    "uniform": ["normal", "gumbel", "torch gumbel", "gamma"],
    "gamma": ["normal", "gamma"],
}


@pytest.mark.parametrize("loc, scale", [(0.3, 1.1), (20.0, 0.01), (1.0, 0.001)])
@pytest.mark.parametrize("q, p", [(q, p) for q, priors in CLOSED.items() for p in priors])
def test_a_kl_to_a_narrow_prior_far_from_zero_is_accurate(q, p, loc, scale):
    """In float32 nothing cancels: the KL is that of the same parameters in float64."""
    of_q = LOCATED[q]((loc + scale * randn(B, D, seed=1)).abs(), scale * randn(B, D, seed=2).exp())
    of_p = LOCATED[p](zeros(D) + loc, zeros(D) + scale)
    pair = as_posterior(of_q), as_prior(of_p)
    single = closed_kl(*pair)
    exact = closed_kl(*(mapped(d, torch.Tensor.double) for d in pair))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=3e-5, atol=1e-5)


@pytest.mark.parametrize("prior", [None, 3.0])
@pytest.mark.parametrize("q, p", [("laplace", "normal"), ("gumbel", "normal"), ("normal", "gumbel")])
def test_closed_forms_of_location_scale_families_equal_torch(q, p, prior):
    """Values and gradients equal torch's formulas, whose cancellation float64 leaves no trace of."""
    leaves = [randn(B, D, seed=1), randn(B, D, seed=2), randn(D, seed=3), randn(D, seed=4)]
    leaves = [t.double().requires_grad_() for t in leaves]
    one, other = LOCATED[q](leaves[0], leaves[1].exp()), LOCATED[p](leaves[2], leaves[3].exp())
    if prior is None and p == "normal":
        other, leaves = StandardNormal(), leaves[:2]
    found, expected = closed_kl(one, other), td.kl_divergence(one.as_torch(), other.as_torch())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for a, b in zip(
        *(torch.autograd.grad(kl.sum(), leaves, retain_graph=True) for kl in (found, expected)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_free_bits_of_a_full_covariance():
    """A dimension's KL is conditional on the dimensions before it, so that they sum to the whole."""
    made = Parameters()
    q, x, decoder = POSTERIORS["full"](made), _data(torch.float64), _decoder(torch.float64)
    kl = closed_kl(q, StandardNormal())
    terms = fastvae.elbo(x, q, decoder, terms=True, free_bits=0.7, **BERNOULLI)
    expected = kl.mean(0).clamp(min=0.7).sum()
    torch.testing.assert_close(terms.kl, expected.expand(B))
    # For the last dimension: the expectation over the others of a normal's KL to N(0, 1).
    _, scale, _ = q._parts()
    z, _ = q.rsample_log_prob(200_000, SEED)
    before = torch.linalg.solve_triangular(scale, (z - q.mu).movedim(0, -1), upper=False)[:, :-1]
    mean = q.mu[:, -1:] + torch.einsum("bj,bjk->bk", scale[:, -1, :-1], before)
    own = scale[:, -1, -1:]
    given = 0.5 * (mean.square() + own.square() - 1) - own.log()
    torch.testing.assert_close(kl[:, -1], given.mean(1), rtol=0.02, atol=0.01)


@pytest.mark.parametrize("family", ["full", "low rank"])
def test_the_exact_posterior_gives_equal_weights(family, backend):
    """The exact posterior of a linear-Gaussian model with rotated latents weighs all draws equally.

    Any K gives log p(x), the ELBO too, and STL's gradient is 0.
    """
    model = LinearGaussian(D, X)
    x = model.sample(B)
    rotation, _ = torch.linalg.qr(randn(D, D, seed=9, dtype=torch.float64))
    mu, logvar = model.posterior(x)
    mean = (mu @ rotation.T).requires_grad_()
    covariance = rotation @ torch.diag_embed(logvar.exp()) @ rotation.T
    if family == "full":
        scale = torch.linalg.cholesky(covariance)
        index = torch.tril_indices(D, D)
        entries = torch.where(
            index[0] == index[1], scale[:, index[0], index[1]].log(), scale[:, index[0], index[1]]
        )
        leaves = [mean, entries.detach().requires_grad_()]
        q = FullNormal(*leaves)
    else:
        # The smallest eigenvalue everywhere, plus the excess of the others.
        least = logvar.exp().amin(1)
        more = rotation * (logvar.exp() - least[:, None])[:, None].sqrt()
        leaves = [mean, least.log()[:, None].expand(B, D).clone().requires_grad_(), more.requires_grad_()]
        q = LowRankNormal(*leaves)
    options = {"likelihood": model.likelihood, "reduction": "none"}
    value = fastvae.iwae(x, q, lambda z: model.decoder(z @ rotation), k=K, estimator="stl", **options)
    torch.testing.assert_close(value, model.log_px(x), rtol=1e-9, atol=1e-9)
    assert all(float(g.abs().max()) < 1e-8 for g in torch.autograd.grad(value.sum(), leaves))
    parts = fastvae.log_weights(x, q, lambda z: model.decoder(z @ rotation), k=K, likelihood=model.likelihood)
    log_w = parts.log_likelihood + parts.log_ratio
    torch.testing.assert_close(log_w, log_w.mean(0).expand(K, B), rtol=1e-9, atol=1e-9)
    mc = fastvae.elbo(x, q, lambda z: model.decoder(z @ rotation), kl="mc", **options)
    torch.testing.assert_close(mc, model.log_px(x), rtol=1e-9, atol=1e-9)


# Mixtures


def test_a_mixture_is_stratified_and_unbiased():
    """For any number of draws, the mean of w over seeds is p(x), and the ELBO's that of its terms."""
    model = LinearGaussian(2, X)
    x = model.sample(3)
    mu, logvar = model.posterior(x)
    logits = torch.tensor([[1.0, -0.5, 0.0]], dtype=torch.float64, device=DEVICE).expand(3, 3)
    components = [(mu + 0.3, logvar + 0.2), (mu - 0.4, logvar + 0.4), Laplace(mu, 0.5 * logvar)]
    q = Mixture(components, logits)
    for k in (1, 2, 3, 5):
        ratios = []
        for s in range(400):
            parts = fastvae.log_weights(
                x, q, model.decoder, k=k, likelihood=model.likelihood, generator=generator(s)
            )
            log_w = parts.log_likelihood + parts.log_ratio
            ratios.append(torch.exp(log_w - model.log_px(x)).mean(0))
        ratios = torch.stack(ratios)
        error = ratios.std(0) / math.sqrt(len(ratios))
        assert bool(((ratios.mean(0) - 1).abs() < 6 * error).all()), k


def test_each_stratum_gets_its_share_of_draws():
    far = [(torch.full((2, 1), 100.0 * c, device=DEVICE), torch.zeros(2, 1, device=DEVICE)) for c in range(3)]
    q = Mixture(far)
    for seed in (torch.tensor(0), torch.tensor(-7), torch.tensor(4)):
        z, _ = q.rsample_log_prob(12, seed.to(DEVICE))
        counts = torch.bincount((z[:, 0, 0] / 100).round().long(), minlength=3)
        assert counts.tolist() == [4, 4, 4]


def _far(c, rows=2):
    """Return a component that 100 c identifies."""
    return torch.full((rows, 1), 100.0 * c, device=DEVICE), torch.zeros(rows, 1, device=DEVICE)


def _nested(inner, outer):
    """Return a mixture of the components 0 and 1 in one mixture, and 2; and the shares of the three."""
    q = Mixture([Mixture([_far(0), _far(1)], inner), _far(2)], outer)
    within, shares = (torch.softmax(t, -1).expand(2, 2) for t in (inner, outer))
    return q, torch.cat([shares[:, :1] * within, shares[:, 1:]], 1)


@pytest.mark.parametrize("how", ["mixture", "per row", "proposal"])
@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_strata_within_strata_are_unbiased(how, k):
    """For any number of draws the weighted share of each component is its probability, over seeds."""
    inner, outer = torch.tensor([2.0, -1.0], device=DEVICE), torch.tensor([1.0, 0.0], device=DEVICE)
    if how == "per row":
        inner = torch.stack([inner, -inner])
    q, expected = _nested(inner, outer)
    if how == "proposal":
        q = StratifiedMixture(q.components, [0.5, 0.5])
        within = torch.softmax(inner, 0)
        expected = torch.stack([0.5 * within[0], 0.5 * within[1], within.new_tensor(0.5)]).expand(2, 3)
    seeds = torch.randint(-(2**63), 2**63 - 1, (1500,), generator=torch.Generator().manual_seed(5))
    found = []
    for seed in seeds.to(DEVICE):
        z, _ = q.rsample_log_prob(k, seed)
        weights = q.log_stratum_weights(k, seed).exp().expand(k, 2)
        of = (z[..., 0] / 100).round()
        found.append(torch.stack([(weights * (of == c)).mean(0) for c in range(3)], -1))
    found = torch.stack(found)
    error = found.std(0) / math.sqrt(len(found))
    assert bool(((found.mean(0) - expected).abs() < 5 * error + 1e-6).all())


@pytest.mark.parametrize("noise", ["philox", "qmc"])
def test_a_nested_mixture_estimates_what_a_flat_one_does(noise):
    """Densities, means and variances are equal; log p(x), which every weight enters, is the model's."""
    model = LinearGaussian(2, X)
    x = model.sample(3)
    mu, logvar = model.posterior(x)
    parts = [(mu + 0.5, logvar + 0.3), (mu - 0.7, logvar + 0.5), StandardNormal()]
    inner, outer = (torch.tensor(t, dtype=torch.float64, device=DEVICE) for t in ([2.0, -1.0], [1.0, 0.0]))
    nested = Mixture([Mixture(parts[:2], inner), parts[2]], outer)
    a, b = outer.log_softmax(0), inner.log_softmax(0)
    flat = Mixture(parts, torch.stack([a[0] + b[0], a[0] + b[1], a[1]]))
    z = randn(K, 3, 2, seed=1).double()
    for value in (lambda q: q.log_prob(z), lambda q: q.mean, lambda q: q.variance):
        torch.testing.assert_close(value(nested), value(flat), rtol=1e-10, atol=1e-10)
    for start in (0, 5):  # draws in chunks are those of one call
        places = {"sample_offset": start}
        torch.testing.assert_close(
            nested.log_stratum_weights(3, SEED, **places),
            nested.log_stratum_weights(8, SEED)[start : start + 3],
        )
    for proposal in ("posterior", "defensive", "refined"):
        options = {"k": 4000, "noise": noise, "proposal": proposal, "likelihood": model.likelihood}
        found = fastvae.log_marginal(x, nested, model.decoder, **options)
        off = (found.log_px - model.log_px(x)).abs()
        assert bool((off < 6 * found.log_px_stderr + 1e-6).all()), proposal


def test_a_mixture_without_rows_is_shared_by_all_examples():
    """A mixture of priors, as a component, is drawn for each example like one of equal rows."""
    p = Parameters()
    rows, shared = (p(B, D), p(B, D)), [(p(D), p(D)), StandardNormal()]
    logits, inner = p(2), p(2)
    q = Mixture([rows, Mixture([DiagonalNormal(*shared[0]), shared[1]], inner)], logits)
    expanded = [tuple(t.expand(B, D) for t in shared[0]), shared[1]]
    other = Mixture([rows, Mixture(expanded, inner)], logits)
    for one, two in zip(q.rsample_log_prob(K, SEED), other.rsample_log_prob(K, SEED), strict=True):
        torch.testing.assert_close(one, two)
    torch.testing.assert_close(q.mean, other.mean)
    torch.testing.assert_close(q.variance, other.variance)


def test_moments_of_a_mixture_with_the_prior():
    """N(0, I), whose moments have no axes, counts for every row and dimension, wherever it stands."""
    mu, logvar, logits = randn(B, D, seed=1), randn(B, D, seed=2), randn(2, seed=3)
    rows = zeros(B, D), zeros(B, D)
    for one, two in (((mu, logvar), StandardNormal()), (StandardNormal(), (mu, logvar))):
        q = Mixture([one, two], logits)
        written = Mixture([rows if isinstance(c, StandardNormal) else c for c in (one, two)], logits)
        assert q.mean.shape == q.variance.shape == (B, D)
        torch.testing.assert_close(q.mean, written.mean)
        torch.testing.assert_close(q.variance, written.variance)
        equal = Mixture([one, two])
        torch.testing.assert_close(equal.mean, 0.5 * mu)
    decoder = _decoder(torch.float32)
    vae = fastvae.VAE(lambda x: q, decoder, modules=[], **BERNOULLI)
    x = _data(torch.float32)
    torch.testing.assert_close(vae.reconstruct(x), torch.sigmoid(decoder(q.mean)))
    for proposal in ("adapted", "refined"):
        found = fastvae.log_marginal(x, q, decoder, k=300, proposal=proposal, **BERNOULLI)
        assert bool(found.log_px.isfinite().all())


def test_components_have_different_noise():
    q = Mixture([(zeros(2, 3), zeros(2, 3))] * 3)
    z, _ = q.rsample_log_prob(6, SEED)
    assert len(z.flatten().unique()) == z.numel()


def test_gradients_of_a_mixture_equal_the_definition():
    """A mixture's ELBO and IWAE gradients equal those by torch.distributions at the same draws.

    Gradients of logits, means and variances.
    """
    made = Parameters()
    mu, logvar = [made(B, D) for _ in range(2)], [made(B, D) for _ in range(2)]
    logits = made(B, 2)
    q = Mixture(list(zip(mu, logvar, strict=True)), logits)
    x, decoder = _data(torch.float64), _decoder(torch.float64)
    seed = seed_of(5)
    z, _ = q.rsample_log_prob(K, seed)
    normal = [td.Normal(m, (0.5 * v).exp()) for m, v in zip(mu, logvar, strict=True)]
    log_weight = torch.log_softmax(logits, 1)
    log_q = torch.logsumexp(torch.stack([n.log_prob(z).sum(-1) for n in normal], -1) + log_weight, -1)
    log_w = (
        td.Bernoulli(logits=decoder(z)).log_prob(x).sum(-1) + td.Normal(0.0, 1.0).log_prob(z).sum(-1) - log_q
    )
    turns = torch.remainder(torch.arange(K) + torch.remainder(seed.cpu(), 2), 2)
    share = 2 * torch.exp(log_weight)[:, turns].T
    found = {
        "elbo": fastvae.elbo(
            x, q, decoder, k=K, kl="mc", generator=generator(5), reduction="sum", **BERNOULLI
        ),
        "iwae": fastvae.iwae(x, q, decoder, k=K, generator=generator(5), reduction="sum", **BERNOULLI),
    }
    expected = {
        "elbo": (share * log_w).mean(0).sum(),
        "iwae": (torch.logsumexp(log_w + share.log(), 0) - math.log(K)).sum(),
    }
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-9)
        grads = torch.autograd.grad(value, made.leaves, retain_graph=True)
        for one, other in zip(
            grads, torch.autograd.grad(expected[name], made.leaves, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


def test_a_defensive_mixture_bounds_the_weights():
    """For a far too narrow q, a prior component of weight π bounds the weights by p(x|z) / π."""
    model = LinearGaussian(2, X)
    x = model.sample(4)
    mu, logvar = model.posterior(x, stretch=-3.0)
    q = Mixture([(mu, logvar), StandardNormal()], torch.tensor([3.0, 0.0], device=DEVICE))
    parts = fastvae.log_weights(x, q, model.decoder, k=5000, likelihood=model.likelihood)
    shares = torch.log_softmax(torch.tensor([3.0, 0.0], dtype=torch.float64), 0)
    # log p(z) − log q(z|x) ≤ −log π of the prior, and a component's draw is weighted by C π.
    assert float(parts.log_ratio.max()) <= float(math.log(2) + shares.max() - shares[1]) + 1e-6
    plain = fastvae.log_marginal(x, (mu, logvar), model.decoder, k=5000, likelihood=model.likelihood)
    defended = fastvae.log_marginal(x, q, model.decoder, k=5000, likelihood=model.likelihood)
    assert float(defended.khat.max()) < 0.7 < float(plain.khat.max())
    assert bool(((defended.log_px - model.log_px(x)).abs() < 6 * defended.log_px_stderr).all())


@pytest.mark.parametrize("per_row", [False, True])
def test_reconstruct_decodes_the_mean_of_a_mixture(per_row):
    p = Parameters()
    q = Mixture([(p(B, D), p(B, D)), Gumbel(p(B, D), p(B, D))], p(*([B] if per_row else []), 2))
    z, _ = q.rsample_log_prob(20_000, SEED)
    weighted = q.log_stratum_weights(20_000, SEED).exp()[..., None] * z
    error = weighted.std(0) / math.sqrt(len(z))
    assert bool(((weighted.mean(0) - q.mean).abs() < 6 * error).all())
    vae = fastvae.VAE(nn.Linear(X, 6).double(), nn.Linear(D, X).double(), latent_dim=D, **BERNOULLI).to(
        DEVICE
    )
    vae.posterior = lambda x, context=None: q
    expected = torch.sigmoid(vae.decoder(q.mean))
    torch.testing.assert_close(vae.reconstruct(_data(torch.float64)), expected)


WITHOUT_ROWS = {
    **{name: make for name, make in BOTH.items() if name != "mixture"},
    "student of fixed df": lambda p, rows: StudentT(p(*rows, D), p(*rows, D), 4.0),
}


@pytest.mark.parametrize("name", WITHOUT_ROWS)
def test_a_component_shared_by_all_examples(name):
    """A shared component is drawn per example, like one with equal rows; the weights are as written out."""
    p, own = Parameters(), Parameters()
    mu, logvar, logits = p(B, D), p(B, D), p(2)
    shared = WITHOUT_ROWS[name](own, ())
    q = Mixture([(mu, logvar), shared], logits)
    seed = seed_of(5)
    z, log_q = q.rsample_log_prob(K, seed)
    leaves = iter(own.leaves)
    rows = WITHOUT_ROWS[name](lambda *shape, **_: next(leaves).expand(shape), (B,))
    torch.testing.assert_close(z, Mixture([(mu, logvar), rows], logits).rsample_log_prob(K, seed)[0])
    each = [DiagonalNormal(mu, logvar).log_prob(z), as_prior(shared).log_prob(z)]
    expected = torch.logsumexp(torch.stack(each, -1) + torch.log_softmax(logits, 0), -1)
    torch.testing.assert_close(log_q, expected, rtol=1e-9, atol=1e-9)
    turns = torch.remainder(torch.arange(K) + torch.remainder(seed.cpu(), 2), 2)
    assert bool(as_prior(shared).log_prob(z[turns == 1]).isfinite().all())
    parts = fastvae.log_weights(
        _data(torch.float64), q, _decoder(torch.float64), k=K, generator=generator(5), **BERNOULLI
    )
    log_p = td.Normal(0.0, 1.0).log_prob(z).sum(-1)
    shares = math.log(2) + torch.log_softmax(logits, 0)[turns][:, None]
    torch.testing.assert_close(parts.log_ratio, log_p - expected + shares, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["full", "low rank", "laplace", "diagonal"])
def test_a_shared_component_of_a_subclass_needs_expand(family):
    """A user's subclass, whose density may differ, must define expand to be a shared component."""
    made = BOTH[family](Parameters(), ())
    made.__class__ = type("Own", (type(made),), {})
    q = Mixture([(zeros(B, D).double(), zeros(B, D).double()), made])
    with pytest.raises(NotImplementedError, match="Own has no expand"):
        q.rsample_log_prob(K, SEED)


def test_rows_of_a_mixture():
    """Components may have a row per example, one row or none; logits may be shared or per example."""
    p = Parameters()
    for logits in (None, p(3), p(B, 3)):
        student = StudentT(p(B, D), p(B, D), 4.0)
        q = Mixture([student, (p(1, D), p(1, D)), StandardNormal()], logits)
        some, z = q.rows(1, 4), q.rsample_log_prob(K, SEED)[0]
        torch.testing.assert_close(some.log_prob(z[:, 1:4]), q.log_prob(z)[:, 1:4])
        torch.testing.assert_close(some.rsample_log_prob(K, SEED, row_offset=1)[0], z[:, 1:4])


# VampPrior and aggregate posteriors


def test_priors_of_mixture_posteriors_are_drawn_by_their_weights():
    """Priors built of an encoder that returns mixtures draw each component by its probability."""
    logits = torch.tensor([3.0, -3.0], device=DEVICE)

    def encoder(x):
        mu = x[:, :D]
        return Mixture([(mu, zeros(len(x), D) - 4), (mu + 6, zeros(len(x), D) - 4)], logits)

    inputs, n = 0.1 * randn(U, X, seed=1), 20_000
    for prior in (VampPrior(encoder, inputs), AggregatePosterior(encoder, inputs)):
        z = prior.sample(n, generator=generator(2))
        share = (z[:, 0] > 3).double().mean()
        expected = torch.softmax(logits.double(), 0)[1]
        assert float((share - expected).abs()) < 5 * math.sqrt(float(expected) / n)
        torch.testing.assert_close(z.mean(0), prior.mean, rtol=0, atol=0.05)


def test_a_vamp_prior_equals_the_mixture_of_its_posteriors(backend):
    encoder = nn.Linear(X, 2 * D).to(DEVICE)
    inputs = nn.Parameter(randn(U, X, seed=2))
    z = randn(K, B, D, seed=3)
    mu, logvar = encoder(inputs).chunk(2, 1)
    expected = td.MixtureSameFamily(
        td.Categorical(logits=torch.zeros(U, device=DEVICE)),
        td.Independent(td.Normal(mu, (0.5 * logvar).exp()), 1),
    ).log_prob(z)
    prior = VampPrior(encoder, inputs)
    torch.testing.assert_close(prior.log_prob(z), expected, rtol=1e-5, atol=1e-5)
    aggregate = AggregatePosterior(encoder, inputs.detach(), batch_size=3)
    torch.testing.assert_close(aggregate.log_prob(z), expected, rtol=1e-5, atol=1e-5)


def test_pseudo_inputs_may_come_from_a_module():
    """A module may return the pseudo-inputs, and the prior trains its parameters."""
    torch.manual_seed(0)
    encoder, z = nn.Linear(X, 2 * D).to(DEVICE), randn(K, B, D, seed=3)

    class Inputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.raw = nn.Parameter(randn(U, X, seed=2))

        def forward(self):
            return torch.sigmoid(self.raw)

    inputs = Inputs()
    prior = VampPrior(encoder, inputs)
    expected = VampPrior(encoder, torch.sigmoid(inputs.raw)).log_prob(z)
    torch.testing.assert_close(prior.log_prob(z), expected)
    (grad,) = torch.autograd.grad(prior.log_prob(z).sum(), inputs.raw)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), inputs.raw)[0])
    assert any(parameter is inputs.raw for parameter in prior.parameters())


@pytest.mark.parametrize(
    "logits", [None, torch.tensor([0.5, -1.0], dtype=torch.float64)], ids=["even", "uneven"]
)
def test_a_mixture_that_contains_a_vamp_prior(logits):
    """A mixture of a VampPrior and a broad component has both densities, also in a chunked bound."""
    made = Parameters()
    vamp, x, decoder = _vamp(made), _data(torch.float64), _decoder(torch.float64)
    q, shares = (made(B, D), made(B, D)), torch.zeros(2).double() if logits is None else logits
    prior = Mixture([vamp, StandardNormal()], logits)
    z = DiagonalNormal(*q).rsample_log_prob(K, seed_of(5))[0]
    parts = torch.stack([vamp.log_prob(z), td.Normal(0.0, 1.0).log_prob(z).sum(-1)], -1)
    log_p = torch.logsumexp(parts + torch.log_softmax(shares, 0), -1)
    found = fastvae.iwae(
        x, q, decoder, k=K, k_chunk=4, prior=prior, reduction="none", generator=generator(5), **BERNOULLI
    )
    log_w = td.Bernoulli(logits=decoder(z)).log_prob(x).sum(-1) + log_p - DiagonalNormal(*q).log_prob(z)
    torch.testing.assert_close(found, torch.logsumexp(log_w, 0) - math.log(K), rtol=1e-9, atol=1e-9)


class Counted(nn.Linear):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def test_pseudo_inputs_are_encoded_once_a_call():
    """Pseudo-inputs are encoded once per call, for any number of chunks, and once per data set."""
    encoder, decoder = Counted(X, 2 * D).to(DEVICE), nn.Linear(D, X).to(DEVICE)
    prior = VampPrior(encoder, nn.Parameter(randn(U, X, seed=2)))
    x = _data(torch.float32)
    q = encoder(x).detach().chunk(2, 1)
    for estimator in ESTIMATORS:
        encoder.calls = 0
        bound = fastvae.iwae(x, q, decoder, k=9, k_chunk=2, estimator=estimator, prior=prior, **BERNOULLI)
        bound.backward()
        assert encoder.calls == 1
    encoder.calls = 0
    evaluate_parts(
        lambda x: x[:, : 2 * D],
        decoder,
        x,
        k=30,
        k_chunk=7,
        batch_size=2,
        prior=prior,
        progress=False,
        **BERNOULLI,
    )
    assert encoder.calls == 1


def test_messages_name_the_vamp_prior():
    encoder, q = nn.Linear(X, 2 * D).to(DEVICE), (zeros(B, D), zeros(B, D))
    prior = VampPrior(encoder, zeros(U, X))
    fastvae.distributions.draws._said.discard(("DiagonalNormal", "VampPrior"))
    with pytest.warns(UserWarning, match="q = DiagonalNormal and p = VampPrior"):
        fastvae.elbo(_data(torch.float32), q, _decoder(torch.float32), prior=prior, **BERNOULLI)
    with pytest.raises(RuntimeError) as raised:
        VampPrior(encoder, zeros(U, 6)).log_prob(zeros(K, B, D))
    if hasattr(raised.value, "__notes__"):
        assert raised.value.__notes__ == [
            "fastvae.distributions.VampPrior gave the encoder its own inputs, [4, 6]"
        ]


def test_a_vamp_prior_in_a_vae_is_trained_saved_and_drawn_from():
    encoder, decoder = nn.Linear(X, 2 * D), nn.Linear(D, X)
    prior = VampPrior(encoder, nn.Parameter(randn(U, X, seed=2).cpu()), nn.Parameter(torch.zeros(U)))
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli", prior=prior, latent_dim=D).to(DEVICE)
    assert len(list(vae.parameters())) == 2 + 2 + 2
    before = [p.detach().clone() for p in vae.parameters()]
    optimizer = torch.optim.Adam(vae.parameters(), 0.01)
    (-vae.elbo(_data(torch.float32), kl="mc")).backward()
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, vae.parameters(), strict=True))
    other = fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), likelihood="bernoulli", latent_dim=D)
    other.prior = VampPrior(other.encoder, nn.Parameter(torch.zeros(U, X)), nn.Parameter(torch.zeros(U)))
    other.to(DEVICE).load_state_dict(vae.state_dict())
    assert torch.equal(other.prior.pseudo_inputs, vae.prior.pseudo_inputs)
    assert vae.sample(4).shape == (4, X)


@pytest.mark.parametrize("objective", [fastvae.elbo, fastvae.iwae])
@pytest.mark.parametrize("name", ["full", "low rank", "laplace", "student", "log-normal", "mixture"])
def test_compiled(objective, name):
    """Compiles with fullgraph=True to equal values and gradients."""
    encoder = Encoder(name).to(DEVICE)
    prior = NormalMixture(*(nn.Parameter(randn(U, D, seed=s)) for s in (1, 2)))
    decoder = nn.Linear(D, X).to(DEVICE)
    options = {"kl": "mc", "k": 4} if objective is fastvae.elbo else {"k": 4}

    def step(x):
        return objective(x, encoder(x), decoder, prior=prior, **options, **BERNOULLI)

    x = _data(torch.float32)
    torch._dynamo.reset()
    with torch._inductor.config.patch(fallback_random=True):
        compiled = torch.compile(step, fullgraph=True)
        values = []
        for run in (step, compiled):
            torch.manual_seed(3)
            value = run(x)
            values.append([value, *torch.autograd.grad(value, list(prior.parameters()))])
    for one, other in zip(*values, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


# Flows


def test_draws_of_a_flow_are_addressed():
    flow = _flow(lambda: zuko.flows.NSF(D, 2, transforms=2, hidden_features=[8], passes=2)).to(DEVICE)
    context = randn(B, 2, seed=4)
    z, log_q = Flow(flow, context).rsample_log_prob(K, SEED)
    eps = fastvae.random.normal(SEED, K, B, D)
    made = flow(context)
    torch.testing.assert_close(z, made.transform.inv(eps), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log_q, made.log_prob(z), rtol=1e-3, atol=1e-3)


def test_a_flow_is_trained():
    """All parameters of a flow posterior and a flow prior receive gradients."""
    flow = _flow(lambda: zuko.flows.MAF(D, 2, transforms=2, hidden_features=[8], passes=2)).to(DEVICE)
    prior = Flow(_flow(lambda: zuko.flows.NSF(D, transforms=2, hidden_features=[8]))).to(DEVICE)
    encoder, decoder = nn.Linear(X, 2).to(DEVICE), nn.Linear(D, X).to(DEVICE)
    x = _data(torch.float32)
    for estimator in ESTIMATORS:
        for module in (flow, prior, encoder):
            module.zero_grad()
        q = Flow(flow, encoder(x))
        (-fastvae.iwae(x, q, decoder, k=K, prior=prior, estimator=estimator, **BERNOULLI)).backward()
        for module in (flow, prior, encoder):
            assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())


def test_stl_freezes_the_parameters_of_a_flow():
    """An identity flow is the exact posterior of a model without data, so STL's gradient is 0."""
    flow = _flow(lambda: zuko.flows.MAF(D, 2, transforms=1, hidden_features=[8], passes=2)).to(
        DEVICE, torch.float64
    )
    with torch.no_grad():
        for p in flow.parameters():
            p.zero_()
    q = Flow(flow, torch.zeros(B, 2, dtype=torch.float64, device=DEVICE))
    decoder = lambda z: 0 * z.sum(1, keepdim=True).expand(-1, X)  # noqa: E731
    bound = fastvae.iwae(_data(torch.float64), q, decoder, k=K, estimator="stl", **BERNOULLI)
    grads = torch.autograd.grad(bound, list(flow.parameters()), allow_unused=True)
    assert all(g is None or float(g.abs().max()) < 1e-12 for g in grads)


class _Affine(nn.Module):
    """Flow of one affine map with dropout.

    The network runs at once, or, ``lazy``, in each density, once, and in each draw, twice. Then a draw is
    ``addressed``, with its density, or it is by torch.
    """

    def __init__(self, how="eager"):
        super().__init__()
        self.how = how
        self.net = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Dropout(0.4), nn.Linear(16, 2 * D))
        self.to(DEVICE)

    def normal(self, context):
        mu, logvar = self.net(context).chunk(2, 1)
        return td.Independent(td.Normal(mu, (0.5 * logvar - 1).exp()), 1)

    def forward(self, context):
        made = self.normal(context)
        return _Made(lambda: made if self.how == "eager" else self.normal(context), self.how, len(context))


class _Made:
    """Object of a flow library with a density and draws."""

    def __init__(self, normal, how, batch):
        self.normal, self.batch_shape = normal, torch.Size([batch])
        if how == "addressed":
            self.base = td.Independent(td.Normal(zeros(batch, D), zeros(batch, D) + 1), 1)
            self.transform = self.inv = self

    def log_prob(self, z):
        return self.normal().log_prob(z)

    def rsample(self, shape):
        self.normal()
        return self.normal().rsample(shape)

    def call_and_ladj(self, eps):
        self.normal()
        normal = self.normal()
        ladj = normal.stddev.log().sum(-1).expand(eps.shape[:-1])
        return normal.mean + normal.stddev * eps, ladj


def _of_flow(q, estimator):
    torch.manual_seed(5)
    decoder, options = nn.Linear(D, X).to(DEVICE), {"generator": generator(1), **BERNOULLI}
    return fastvae.iwae(_data(torch.float32), q, decoder, k=K, estimator=estimator, **options)


@pytest.mark.parametrize("estimator", ["stl", "dreg"])
def test_dropout_in_a_flow_has_the_masks_of_the_draw(estimator):
    """The density of a flow with dropout is that of its draw, or is refused if its masks come apart."""
    context = randn(B, 2, seed=4)
    q, addressed, lazy = (Flow(_Affine(how), context) for how in ("eager", "addressed", "lazy"))
    with pytest.raises(RuntimeError, match=r"log q\(z\|x\) of Flow .* eval\(\)"):
        _of_flow(addressed, estimator)
    for each in (estimator, "iwae"):
        with pytest.raises(RuntimeError, match="density of a Flow draws noise"):
            _of_flow(lazy, each)
    for made in (addressed, lazy):
        made.flow.eval()
    for made in (q, addressed, lazy):
        torch.testing.assert_close(_of_flow(made, estimator), _of_flow(made, "iwae"), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ["iwae", "stl"])
def test_dropout_in_a_component_of_a_mixture_is_refused(estimator):
    """The density of a mixture runs its components' networks again, for the draws of the others, too."""
    flow, context = _Affine(), randn(B, 2, seed=4)
    q = Mixture([Flow(flow, context), (zeros(B, D), zeros(B, D))])
    with pytest.raises(RuntimeError, match="density of a Mixture draws noise"):
        _of_flow(q, estimator)
    with pytest.raises(RuntimeError, match="StratifiedMixture draws noise"):
        StratifiedMixture(
            [Flow(flow, context), DiagonalNormal(zeros(B, D), zeros(B, D))], [0.5, 0.5]
        ).rsample_log_prob(K, SEED)
    flow.eval()
    assert bool(_of_flow(q, estimator).isfinite())


def test_frozen_families_have_no_gradient():
    for name, make in POSTERIORS.items():
        q = as_posterior(make(Parameters()))
        z = q.rsample_log_prob(K, SEED)[0].detach()
        assert not frozen(q).log_prob(z).requires_grad, name
    for name, make in PRIORS.items():
        p = as_prior(make(Parameters())).prepared()
        z = randn(K, B, D, seed=1).double().abs()
        assert not frozen(p).log_prob(z).requires_grad, name


def test_path_gradients_work_with_every_prior():
    """The "paths" route of q's gradient works with every prior."""
    q = as_posterior(POSTERIORS["full"](Parameters()))
    for make in PRIORS.values():
        _, _, q_grad = draw_chunk(q, as_prior(make(Parameters())).prepared(), K, SEED, 0, 0, "paths")
        assert q_grad.shape == (K, B) and not q_grad.any()


# Mismatches

# Moments, entropy and sampling, named as in torch.distributions


def _torch_of(name, rows):
    """Return our family and torch's equivalent, in float64."""
    p = Parameters()
    ours = as_prior(BOTH[name](p, rows))
    a = [t.detach() for t in p.leaves]
    if name == "logistic":
        base = td.Uniform(torch.zeros_like(a[0]), 1.0)
        transforms = [td.SigmoidTransform().inv, td.AffineTransform(a[0], a[1].exp())]
        return ours, td.TransformedDistribution(base, transforms)
    of_torch = {
        "diagonal": lambda: td.Normal(a[0], (0.5 * a[1]).exp()),
        "full": ours.as_torch,
        "low rank": lambda: td.LowRankMultivariateNormal(a[0], a[2], a[1].exp()),
        "laplace": lambda: td.Laplace(a[0], a[1].exp()),
        "student": lambda: td.StudentT(a[2], a[0], a[1].exp()),
        "gumbel": lambda: td.Gumbel(a[0], a[1].exp()),
        "log-normal": lambda: td.LogNormal(a[0], a[1].exp()),
        "exponential": lambda: td.Exponential(1 / a[0].exp()),
        "torch": lambda: td.Laplace(a[0], a[1].exp()),
    }
    return ours, of_torch[name]()


MOMENTS = ("mean", "variance", "stddev")
CLOSED = [name for name in BOTH if name not in ("mixture", "logistic")]


@pytest.mark.parametrize("rows", [(B,), ()], ids=["posterior", "prior"])
@pytest.mark.parametrize("name", CLOSED)
def test_moments_and_entropy_equal_torch(name, rows):
    """Moments [B, D] and the entropy [B] equal those of torch's family; for a prior they are [D] and []."""
    ours, other = _torch_of(name, rows)
    for word in MOMENTS:
        value = getattr(ours, word)
        assert value.shape == (*rows, D), word
        torch.testing.assert_close(value, getattr(other, word), rtol=1e-12, atol=1e-12, msg=word)
    entropy = other.entropy()
    entropy = entropy if other.event_shape else entropy.sum(-1)
    assert ours.entropy().shape == rows
    torch.testing.assert_close(ours.entropy(), entropy, rtol=1e-12, atol=1e-12)
    for word in ("loc", "scale"):
        if name in ("full", "low rank") and word == "scale":
            assert not hasattr(ours, "scale")
        elif hasattr(other, word):
            torch.testing.assert_close(getattr(ours, word), getattr(other, word), rtol=1e-12, atol=1e-12)
    # Autograd reaches the parameters.
    (ours.entropy().sum() + ours.variance.sum()).backward()


@pytest.mark.parametrize("name", ["log_scale", "scale", "softplus", "logvar"])
def test_the_scale_of_every_form(name):
    mu, raw = randn(B, D, seed=1).double(), randn(B, D, seed=2).double().abs()
    sd = {
        "logvar": (0.5 * raw).exp(),
        "log_scale": raw.exp(),
        "scale": raw,
        "softplus": nn.functional.softplus(raw).sqrt(),
    }[name]
    q = DiagonalNormal(mu, raw, scale_form=name)
    normal = td.Normal(mu, sd)
    for word in ("loc", "scale", *MOMENTS):
        torch.testing.assert_close(getattr(q, word), getattr(normal, word), rtol=1e-12, atol=1e-12, msg=word)
    torch.testing.assert_close(q.entropy(), normal.entropy().sum(-1), rtol=1e-12, atol=1e-12)


def test_moments_and_entropy_in_half_precision():
    """Moments have the dtype of z, the entropy float32."""
    for name in CLOSED:
        if name == "torch":  # its own dtypes
            continue
        q = BOTH[name](Parameters(torch.bfloat16), (B,))
        exact = BOTH[name](Parameters(torch.float64), (B,))
        assert all(getattr(q, word).dtype == torch.bfloat16 for word in MOMENTS), name
        torch.testing.assert_close(q.variance.double(), exact.variance, rtol=0.1, atol=0.1)
        assert q.entropy().dtype == torch.float32
        torch.testing.assert_close(q.entropy().double(), exact.entropy(), rtol=0.05, atol=0.05)


def test_moments_of_student_t_for_few_degrees_of_freedom():
    df = torch.tensor([0.5, 1.5, 3.0], dtype=torch.float64)
    ours = StudentT(torch.zeros(3).double(), torch.ones(3).double(), df)
    expected = td.StudentT(df, torch.zeros(3).double(), torch.ones(3).double().exp())
    torch.testing.assert_close(ours.variance, expected.variance, equal_nan=True)
    torch.testing.assert_close(ours.entropy(), expected.entropy().sum())


def test_parameters_that_broadcast():
    p = DiagonalNormal(torch.zeros(D), torch.zeros(()))
    assert p.variance.shape == p.stddev.shape == (D,) and p.entropy().shape == ()
    assert p.sample(5).shape == p.sample(5, dim=D).shape == (5, D)
    assert StandardNormal().sample(5, dim=2).shape == (5, 2)
    assert Laplace(torch.zeros(()), torch.zeros(())).sample(2, dim=7).shape == (2, 7)
    assert Laplace(torch.zeros(1), torch.zeros(1)).sample(2, dim=7).shape == (2, 7)
    assert [float(getattr(StandardNormal(), w)) for w in ("loc", "mean", "scale", "variance", "stddev")] == [
        0.0, 0.0, 1.0, 1.0, 1.0,
    ]  # fmt: skip


@pytest.mark.parametrize("name", [n for n in POSTERIORS if n not in ("student", "log-normal")])
def test_moments_equal_those_of_the_draws(name):
    """Mean and variance of draws of a posterior [k, B, D] are ``mean`` and ``variance``."""
    q = as_posterior(POSTERIORS[name](Parameters()))
    z = q.sample(40_000, generator=generator(3))
    assert z.shape == (40_000, B, D) and not z.requires_grad
    if name == "flow":
        for word in MOMENTS:
            with pytest.raises(NotImplementedError, match=f"Flow has no {word} in closed form"):
                getattr(q, word)
        return
    mean, variance = q.mean.detach(), q.variance.detach()
    assert mean.shape == variance.shape == (B, D)
    assert bool(((z.mean(0) - mean).abs() < 6 * (variance / 40_000).sqrt()).all())
    fourth = (z - mean).square().var(0)
    assert bool(((z - mean).square().mean(0) - variance).abs().lt(7 * (fourth / 40_000).sqrt()).all())


@pytest.mark.parametrize("name", [n for n in PRIORS if n not in ("standard", "rows", "log-normal")])
def test_moments_of_priors(name):
    """A prior's draws are [k, D], and its mean and variance theirs."""
    p = as_prior(PRIORS[name](Parameters()))
    z = p.sample(40_000, generator=generator(3)).double()
    assert z.shape == (40_000, D) and not z.requires_grad
    torch.testing.assert_close(p.sample(7, dim=D, generator=generator(3)).double(),
                               p.sample(7, generator=generator(3)).double())  # fmt: skip
    assert p.log_prob(z[:9]).shape == (9,)
    with pytest.raises(ValueError, match=f"{D + 1}"):
        p.sample(7, dim=D + 1)
    if name == "flow":
        with pytest.raises(NotImplementedError, match="Flow has no mean in closed form"):
            _ = p.mean
        return
    mean, variance = p.mean.detach().double(), p.variance.detach().double()
    assert mean.shape == variance.shape == (D,)
    assert bool(((z.mean(0) - mean).abs() < 6 * (variance / 40_000).sqrt()).all())
    fourth = (z - mean).square().var(0)
    assert bool(((z - mean).square().mean(0) - variance).abs().lt(7 * (fourth / 40_000).sqrt()).all())


@pytest.mark.parametrize("name", [n for n in POSTERIORS if n != "mixture"])
def test_rsample_equals_the_addressed_draw(name):
    """``rsample`` gives z of ``rsample_log_prob`` from the generator's seed, with gradients."""
    made = Parameters()
    q = as_posterior(POSTERIORS[name](made))
    z = q.rsample(K, generator=generator(3))
    expected, _ = q.rsample_log_prob(K, random.draw_seed(DEVICE, generator(3)))
    assert z.shape == (K, B, D) and torch.equal(z, expected)
    assert torch.equal(q.sample(K, generator=generator(3)), z)
    assert q.sample().shape == (1, B, D) and q.log_prob(q.sample()).shape == (1, B)
    assert any(g is not None for g in torch.autograd.grad(z.sum(), made.leaves, allow_unused=True))


@pytest.mark.parametrize("name", ["diagonal", "full", "low rank", "laplace", "log-normal", "flow", "torch"])
def test_rsample_of_a_prior(name):
    made = Parameters()
    p = as_prior(PRIORS[name](made))
    z = p.rsample(K, generator=generator(3))
    assert z.shape == (K, D) and z.requires_grad
    if name != "torch":  # whose sample is another function
        assert torch.equal(p.sample(K, generator=generator(3)), z)


@pytest.mark.parametrize("name", BOTH)
def test_a_conditional_prior_is_drawn_from(name):
    """Each example's z is drawn from its own row; an unconditional row [1, D] is expanded."""
    p = frozen(as_prior(BOTH[name](Parameters(torch.float32), (B,))))
    z = draw_prior(p, B, D, DEVICE, generator(2))
    assert torch.equal(z, p.sample(generator=generator(2))[0])
    encoder = nn.Linear(X + 1, 2 * D)
    options = {"prior": lambda context: p, "latent_dim": D, "likelihood": Gaussian(1.0), "modules": []}
    vae = fastvae.VAE(encoder, lambda z, context: z, **options).to(DEVICE)
    drawn = vae.sample(B, mean=True, context=zeros(B, 1), generator=generator(2))
    torch.testing.assert_close(drawn, z)
    if name == "diagonal":  # a mean for each row, and one variance
        shared = DiagonalNormal(p.mu, p.logvar[0])
        expected = DiagonalNormal(p.mu, p.logvar[0].expand(B, D)).sample(2, generator=generator(2))
        assert torch.equal(shared.sample(2, generator=generator(2)), expected)
        assert DiagonalNormal(p.mu[0], p.logvar).sample(2).shape == (2, B, D)
    with pytest.raises(ValueError, match=f"has {B} rows, but {B + 1} draws"):
        draw_prior(p, B + 1, D)
    with pytest.raises(ValueError, match=f"has D = {D} latents; expected {D + 1}"):
        draw_prior(p, B, D + 1)
    one = as_prior(BOTH[name](Parameters(torch.float32, rows=1), (1,)))
    if name != "mixture":  # which has no expand
        assert draw_prior(one, B, D).shape == (B, D)


LACKING = {
    "entropy of a mixture": (
        lambda: Mixture([(zeros(B, D), zeros(B, D))]).entropy(), "Mixture has no entropy"
    ),
    "rsample of a mixture": (
        lambda: Mixture([(zeros(B, D), zeros(B, D))]).rsample(), "Mixture has no rsample"
    ),
    "entropy of components": (
        lambda: NormalMixture(zeros(U, D), zeros(U, D)).entropy(), "NormalMixture has no entropy"
    ),
    "sample of strata with weights": (
        lambda: StratifiedMixture([Mixture([(zeros(B, D), zeros(B, D))] * 2)], [1.0]).sample(),
        "StratifiedMixture has strata, whose draws follow q only with the weights",
    ),
    "rsample of components": (
        lambda: NormalMixture(zeros(U, D), zeros(U, D)).rsample(), "NormalMixture has no rsample"
    ),
    "entropy of a flow": (lambda: Flow(_flow(lambda: zuko.flows.NSF(D))).entropy(), "Flow has no entropy"),
    "mean of a mixture with a flow": (
        lambda: Mixture([Flow(_flow(lambda: zuko.flows.NSF(D, 2)), zeros(B, 2))]).mean, "Flow has no mean"
    ),
    "mean of torch's": (
        lambda: TorchDistribution(td.TransformedDistribution(td.Normal(zeros(D), 1.0), [])).mean,
        "TransformedDistribution has no mean",
    ),
    "entropy of torch's": (
        lambda: TorchDistribution(td.VonMises(zeros(D), 1.0)).entropy(), "VonMises has no entropy"
    ),
}  # fmt: skip


def test_rows_of_a_prior_without_rsample():
    prior = TorchDistribution(td.VonMises(zeros(B, D), 5.0))
    drawn = [prior.sample(K, generator=generator(1)) for _ in range(2)]
    assert drawn[0].shape == (K, B, D) and torch.equal(*drawn)


@pytest.mark.parametrize("what", LACKING)
def test_undefined_moments_and_samples_are_refused(what):
    make, message = LACKING[what]
    with pytest.raises(NotImplementedError, match=message):
        make()


def test_sample_and_entropy_need_the_number_of_latents():
    for p in (StandardNormal(), Laplace(zeros(), zeros()), TorchDistribution(td.Normal(0.0, 1.0))):
        with pytest.raises(ValueError, match="pass dim="):
            p.sample(3)
    for p in (
        Laplace(zeros(), zeros()),
        TorchDistribution(td.Normal(0.0, 1.0)),
        DiagonalNormal(zeros(), zeros()),
    ):
        with pytest.raises(ValueError, match=r"entropy needs|do not determine D"):
            p.entropy()
    with pytest.raises(ValueError, match="k must be at least 1"):
        StandardNormal().sample(0, dim=2)


class _Unnamed(fastvae.distributions.Distribution):
    """Posterior without any moment."""


def test_moments_of_a_custom_family():
    """A family may define moments in its constructor; missing or overridden moments raise."""
    with pytest.raises(NotImplementedError, match="_Unnamed has no variance in closed form"):
        _ = _Unnamed().variance
    assert not hasattr(_Unnamed(), "mean")
    with pytest.raises(NotImplementedError, match="_Unnamed has no stddev"):
        _ = _Unnamed().stddev
    one = _Unnamed()
    one.variance = torch.full((D,), 4.0)
    torch.testing.assert_close(one.stddev, torch.full((D,), 2.0))

    class Learned(fastvae.distributions.Distribution, nn.Module):
        def __init__(self):
            super().__init__()
            self.mean, self.variance = nn.Parameter(torch.ones(D)), nn.Parameter(torch.ones(D))

    assert Learned().mean.shape == (D,) and len(list(Learned().parameters())) == 2

    class Wider(DiagonalNormal):
        def log_prob(self, z):
            return super().log_prob(z / 2) - D * math.log(2)

    with pytest.raises(NotImplementedError, match="Wider has no variance"):
        _ = Wider(zeros(B, D), zeros(B, D)).variance
    with pytest.raises(NotImplementedError, match="Wider has no entropy"):
        Wider(zeros(B, D), zeros(B, D)).entropy()


MISTAKES = {
    "tril of another size": (
        lambda: FullNormal(zeros(B, D), zeros(B, D)),
        ValueError,
        ["tril", "[5, 3]", "D(D+1)/2", "[5, 6]", "FullNormal.of"],
    ),
    "a matrix for a vector": (
        lambda: FullNormal(zeros(B, D), zeros(B, D, D)),
        ValueError,
        ["[5, 3, 3]", "FullNormal.of"],
    ),
    "a matrix that does not fit": (
        lambda: FullNormal.of(zeros(B, D), zeros(B, D, 2)),
        ValueError,
        ["scale_tril", "[5, 3, 2]", "[5, 3, 3]"],
    ),
    "a factor without rows": (
        lambda: LowRankNormal(zeros(B, D), zeros(B, D), zeros(D, 2)),
        ValueError,
        ["factor [3, 2]", "[B, D, R]"],
    ),
    "scales of another shape": (
        lambda: Laplace(zeros(B, D), zeros(B, 2)),
        ValueError,
        ["log_scale", "[5, 2]", "[5, 3]"],
    ),
    "integers": (lambda: Gumbel(zeros(B, D).int(), zeros(B, D)), TypeError, ["loc", "int32"]),
    "no degrees of freedom": (
        lambda: StudentT(zeros(B, D), zeros(B, D), 0),
        ValueError,
        ["df", "above 0", "0"],
    ),
    "a tensor with no degrees of freedom": (
        lambda: StudentT(zeros(B, D), zeros(B, D), zeros(B, D)),
        ValueError,
        ["df", "above 0 everywhere", "0"],
    ),
    "no components": (lambda: Mixture([]), TypeError, ["components", "at least one"]),
    "components of other batches": (
        lambda: Mixture([(zeros(B, D), zeros(B, D)), (zeros(2, D), zeros(2, D))]),
        ValueError,
        ["[2, 5]", "same B"],
    ),
    "logits of another number": (
        lambda: Mixture([(zeros(B, D), zeros(B, D))] * 2, zeros(B, 3)),
        ValueError,
        ["[5, 3]", "2 components"],
    ),
    "a component that is none": (lambda: Mixture([3]), TypeError, ["q must be", "int"]),
    "an encoder that is none": (lambda: VampPrior(3, zeros(U, X)), TypeError, ["encoder", "int"]),
    "pseudo-inputs that are none": (
        lambda: VampPrior(nn.Identity(), [1]),
        TypeError,
        ["pseudo_inputs", "list"],
    ),
    "pseudo-inputs without rows": (
        lambda: VampPrior(nn.Identity(), zeros(X)),
        ValueError,
        ["pseudo_inputs", "[7]", "[U, *event]"],
    ),
    "weights of other components": (
        lambda: VampPrior(nn.Identity(), zeros(U, 2 * D), zeros(3)).log_prob(zeros(1, 1, D)),
        ValueError,
        ["logits", "[3]", "[4]"],
    ),
    "data without rows": (
        lambda: AggregatePosterior(nn.Identity(), zeros(0, X)),
        ValueError,
        ["data", "[0, 7]", "at least one"],
    ),
    "a prior as a posterior": (
        lambda: as_posterior(Laplace(zeros(D), zeros(D))),
        TypeError,
        ["Laplace", "[B, D]", "encoder"],
    ),
    "a learned mixture as a posterior": (
        lambda: as_posterior(NormalMixture(zeros(U, D), zeros(U, D))),
        TypeError,
        ["NormalMixture", "no rows"],
    ),
    "a prior of another D": (
        lambda: fastvae.iwae(
            zeros(B, X),
            FullNormal(zeros(B, D), zeros(B, 6)),
            nn.Identity(),
            prior=Laplace(zeros(2), zeros(2)),
        ),
        ValueError,
        ["prior, Laplace", "[2]", "[5, 3]", "D = 3"],
    ),
    "a prior of another D in closed form": (
        lambda: fastvae.elbo(
            zeros(B, X),
            FullNormal(zeros(B, D), zeros(B, 6)),
            nn.Identity(),
            prior=FullNormal(zeros(2), zeros(3)),
        ),
        ValueError,
        ["prior, FullNormal", "[2]", "[5, 3]", "D = 3"],
    ),
    "a flow that is none": (lambda: Flow(3), TypeError, ["flow", "int"]),
    "a flow that returns none": (
        lambda: Flow(nn.Identity(), zeros(B, 2)).log_prob(zeros(K, B, D)),
        TypeError,
        ["flow Identity returned Tensor", "log_prob and rsample"],
    ),
    "a flow without rsample for q": (
        lambda: fastvae.elbo(
            zeros(B, X), Flow(zuko.flows.GMM(D, 2, components=2), zeros(B, 2)), nn.Linear(D, X)
        ),
        TypeError,
        ["flow GMM", "has no rsample", "not q"],
    ),
    "a family with shaped parameters": (
        lambda: fastvae.elbo(zeros(B, X), Laplace(zeros(B, 2, 3, 4), zeros(B, 2, 3, 4)), nn.Identity()),
        ValueError,
        ["Laplace", "[5, 2, 3, 4]", "loc.flatten(1)"],
    ),
    "a defensive proposal by torch's mixture": (
        lambda: fastvae.log_marginal(
            zeros(B, X),
            (zeros(B, D), zeros(B, D)),
            nn.Linear(D, X),
            k=8,
            likelihood="bernoulli",
            proposal="defensive",
            prior=td.MixtureSameFamily(
                td.Categorical(zeros(2)), td.Independent(td.Laplace(zeros(2, D), 1.0), 1)
            ),
        ),
        ValueError,
        ["MixtureSameFamily cannot be", "NormalMixture", "'adapted'"],
    ),
    "a family for a likelihood": (
        lambda: fastvae.elbo(zeros(B, X), (zeros(B, D), zeros(B, D)), nn.Identity(), likelihood=Laplace),
        TypeError,
        ["fastvae.distributions.Laplace", "fastvae.likelihoods.Laplace"],
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    make, error, words = MISTAKES[name]
    with pytest.raises(error) as raised:
        make()
    assert all(word in str(raised.value) for word in words), raised.value


class Tempered(td.Independent):
    """A density of the user's own, by a subclass."""

    def log_prob(self, value):
        return 0.5 * super().log_prob(value)


class Clipped(td.Normal):
    """Draws of the user's own, by a subclass."""

    def rsample(self, sample_shape=()):
        return super().rsample(sample_shape).clamp(-0.5, 0.5)

    def log_prob(self, value):
        return super().log_prob(value) - 1


def _log_w(x, q, decoder, prior, z):
    log_p = -nn.functional.binary_cross_entropy_with_logits(
        decoder(z), x.expand(*z.shape[:2], X), reduction="none"
    )
    log_prior, log_q = (d.log_prob(z) if d.event_shape else d.log_prob(z).sum(-1) for d in (prior, q))
    return log_p.sum(-1) + log_prior - log_q


def _normal(*shape):
    return td.Normal(randn(*shape, seed=sum(shape)), torch.ones(shape, device=DEVICE))


_OWN = {
    "prior": lambda: (_normal(B, D), Tempered(_normal(D), 1)),
    "q": lambda: (Tempered(_normal(B, D), 1), _normal(D)),
    "q, its draws": lambda: (Clipped(randn(B, D, seed=101), torch.ones(B, D, device=DEVICE)), _normal(D)),
    "components": lambda: (
        _normal(B, D),
        td.MixtureSameFamily(td.Categorical(logits=randn(2, seed=102)), Tempered(_normal(2, D), 1)),
    ),
    "logits that dimensions share": lambda: (
        _normal(B, D),
        td.MixtureSameFamily(td.Categorical(logits=randn(D, seed=103)), _normal(D, D)),
    ),
}


@pytest.mark.parametrize("objective", ["iwae", "elbo"])
@pytest.mark.parametrize("name", _OWN)
def test_a_subclass_keeps_its_density_and_draws(name, objective):
    """A wrapper is stripped, and torch's KL taken, only where the class is torch's own."""
    q, prior = _OWN[name]()
    x, decoder = randn(B, X, seed=104).sigmoid().round(), nn.Linear(D, X).to(DEVICE)
    function = fastvae.iwae if objective == "iwae" else fastvae.elbo
    terms = function(x, q, decoder, k=K, likelihood="bernoulli", prior=prior, terms=True)
    log_w = _log_w(x, q, decoder, prior, terms.z)
    expected = log_w.logsumexp(0) - math.log(K) if objective == "iwae" else log_w.mean(0)
    torch.testing.assert_close(terms.bound, expected, rtol=1e-5, atol=1e-5)
    if name == "q, its draws":
        assert terms.z.abs().max() == 0.5


def test_a_registered_kl_of_a_subclass_is_taken():
    class Own(td.Normal):
        def log_prob(self, value):
            return super().log_prob(value) - 1

    @td.register_kl(Own, td.Normal)
    def _(q, p):
        return torch.full_like(q.loc, 7.0)

    q, x = (
        Own(randn(B, D, seed=105), torch.ones(B, D, device=DEVICE)),
        randn(B, X, seed=106).sigmoid().round(),
    )
    terms = fastvae.elbo(
        x, q, nn.Linear(D, X).to(DEVICE), likelihood="bernoulli", terms=True, prior=_normal(D)
    )
    torch.testing.assert_close(terms.kl, torch.full((B,), 7.0 * D, device=DEVICE))


@pytest.mark.parametrize("shape", [(D,), (B, D), (1,)])
def test_torchs_kl_with_a_prior_that_broadcasts(shape):
    """Torch's formula indexes with a mask of the prior's shape, which would select rows for B = D."""
    one = torch.ones(D, D, device=DEVICE)
    q, low = td.Beta(1 + one, 2 * one), zeros(D)
    low[1] = 0.25
    prior = td.Uniform(low if shape == (D,) else zeros(*shape) if shape == (1,) else zeros(D, D), 1.0)
    kl = closed_kl(TorchDistribution(q), TorchDistribution(prior))
    expected = td.kl_divergence(q, td.Uniform(prior.low.expand(D, D), one)).expand(D, D)
    torch.testing.assert_close(kl, expected)
    assert bool(kl.isinf().any()) == (shape == (D,))
