"""Every bound of the literature: values, gradients of decoder and encoder, and theory.

The expected values come from plain PyTorch in float64, written from the papers.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import fastvae
from fastvae.distributions import DiagonalNormal, Distribution, FullNormal, Laplace, Mixture, StandardNormal
from fastvae.likelihoods import Gaussian, Likelihood
from fastvae.objectives import bounds
from fastvae.objectives.bounds import CIWAE, IWAE, TVO, Jackknife, UStatistic, WakePhi
from fastvae.ops.reduce import BoundReduction, reduce
from fastvae.random import draw_seed, normal

from . import models
from .conftest import DEVICE
from .models import generator, rand, randn

B, D, X, K = 3, 2, 5, 12
HALF_LOG_2_PI = 0.5 * math.log(2 * math.pi)


def tensor_alpha(value):
    return torch.tensor(value, dtype=torch.float64, device=DEVICE)


# Values as in the papers, from the log weights [K] of one example.


def lme(w):
    return torch.logsumexp(w, 0) - math.log(len(w))


def power(w, alpha):
    return lme((1 - alpha) * w) / (1 - alpha) if alpha != 1 else w.mean()


def of_groups(w, m, alpha=0.0):
    return torch.stack([power(group, alpha) for group in w.chunk(m)]).mean()


def u_statistic(w, m, ways):
    table = [list(range(j * (len(w) // m), (j + 1) * (len(w) // m))) for j in range(m)]
    n = len(table[0])
    found = [lme(w[[table[j][(i + way * j) % n] for j in range(m)]]) for way in range(ways) for i in range(n)]
    return torch.stack(found).mean()


def jackknife(w):
    k = len(w)
    left_out = [lme(torch.cat([w[:i], w[i + 1 :]])) for i in range(k)]
    return k * lme(w) - (k - 1) * torch.stack(left_out).mean()


def tvo(w, betas):
    ends = [*betas[1:], 1.0]
    means = [(torch.softmax(b * w, 0) * w).sum() for b in betas]
    return sum((e - b) * m for b, e, m in zip(betas, ends, means, strict=True))


BETAS = (0.0, 0.1, 0.5)
CASES = {
    "iwae": (IWAE, {}, lme),
    "miwae": (IWAE, {"groups": 4}, lambda w: of_groups(w, 4)),
    "vr": (IWAE, {"alpha": 0.3}, lambda w: power(w, 0.3)),
    "vr of a tensor": (IWAE, {"alpha": tensor_alpha(0.3)}, lambda w: power(w, 0.3)),
    "vr beyond 1": (IWAE, {"alpha": 1.5}, lambda w: power(w, 1.5)),
    "vr below 0": (IWAE, {"alpha": -1.0}, lambda w: power(w, -1.0)),
    "vr close to 1": (IWAE, {"alpha": 1 - 1e-6}, lambda w: w.mean() + 0.5e-6 * w.var(correction=0)),
    "vr of groups": (IWAE, {"groups": 3, "alpha": 0.6}, lambda w: of_groups(w, 3, 0.6)),
    "elbo": (IWAE, {"alpha": 1.0}, lambda w: w.mean()),
    "elbo of a tensor": (IWAE, {"alpha": tensor_alpha(1.0)}, lambda w: w.mean()),
    "ciwae": (CIWAE, {"beta": 0.3}, lambda w: 0.3 * w.mean() + 0.7 * lme(w)),
    "u": (UStatistic, {"m": 3, "permutations": 3}, lambda w: u_statistic(w, 3, 3)),
    "jackknife": (Jackknife, {}, jackknife),
    "tvo": (TVO, {"betas": BETAS}, lambda w: tvo(w, BETAS)),
}


def estimators_of(kind):
    return [e for e in kind.estimators if e != "dreg" or kind.paths is not bounds.Bound.paths]


NAMED = [(name, e) for name, (kind, _, _) in CASES.items() for e in estimators_of(kind)]


class Model:
    """Explicit Gaussian model, every tensor of which can be learned."""

    def __init__(self, dtype=torch.float64, prior=True, shift=0.0):
        self.x = rand(B, X, seed=1, dtype=dtype)
        self.mu, self.logvar = (0.5 * randn(B, D, seed=s, dtype=dtype) for s in (2, 3))
        self.weight = randn(X, D, seed=4, dtype=dtype)
        self.prior = [0.3 * randn(D, seed=s, dtype=dtype) for s in (5, 6)]
        self.learned = [
            t.requires_grad_() for t in (self.mu, self.logvar, self.weight, *(self.prior if prior else ()))
        ]
        self.shift = shift

    def bound(self, objective, k=K, seed=7, **options):
        prior = DiagonalNormal(*self.prior) if self.prior[0].requires_grad else None
        q = options.pop("q", (self.mu, self.logvar))
        return fastvae.bound(
            self.x, q, lambda z: z @ self.weight.T, objective, k=k, likelihood=Gaussian(0.8),
            prior=prior, generator=generator(seed), **options,
        )  # fmt: skip

    def noise(self, k=K, seed=7):
        return normal(draw_seed(DEVICE, generator(seed)), k, B, D, dtype=torch.float64)

    def log_w(self, k=K, seed=7, *, z=None, fixed=False):
        """Return log weights [K, B] and log q(z|x), at a given z, or with detached q (``fixed``)."""
        z = self.mu + (0.5 * self.logvar).exp() * self.noise(k, seed) if z is None else z
        mu, logvar = (t.detach() if fixed else t for t in (self.mu, self.logvar))

        def log_normal(v, mean, logvar):
            return (-0.5 * (v - mean).square() / logvar.exp() - 0.5 * logvar - HALF_LOG_2_PI).sum(-1)

        m, s = self.prior if self.prior[0].requires_grad else (torch.zeros(D).to(z), torch.zeros(D).to(z))
        noise = torch.full_like(self.x[0], 2 * math.log(0.8))
        log_p = log_normal(self.x, z @ self.weight.T, noise) + log_normal(z, m, s)
        return log_p - log_normal(z, mu, logvar), log_normal(z.detach(), self.mu, self.logvar)


def derivatives(value, log_w):
    """Return the first and second derivatives [K, B] of each column's bound."""
    first, second = [], []
    for w in log_w.detach().T:
        first.append(torch.func.grad(value)(w))
        second.append(torch.func.hessian(value)(w).diagonal())
    return torch.stack(first, 1), torch.stack(second, 1)


def gradients(model, value, estimator, k=K, seed=7, path=None):
    """Compute the gradients of the bounds' sum by the estimator's definition, sample by sample."""
    log_w, log_q = model.log_w(k, seed, fixed=True)
    g, h = derivatives(value, log_w)
    a, s = {
        "iwae": (g, -g),
        "stl": (g, torch.zeros_like(g)),
        "dreg": (g - h, torch.zeros_like(g)),
        "wake": (torch.zeros_like(g), g),
    }[estimator]
    own = [model.weight, *(p for p in model.prior if p.requires_grad)]
    fixed_z = (model.mu + (0.5 * model.logvar).exp() * model.noise(k, seed)).detach()
    to_model = torch.autograd.grad((g * model.log_w(k, seed, z=fixed_z)[0]).sum(), own)
    to_q = torch.autograd.grad((a * log_w).sum() + (s * log_q).sum(), [model.mu, model.logvar])
    return [*to_q, *to_model]


@pytest.mark.parametrize("route", ["whole", "chunks"])
@pytest.mark.parametrize(("name", "estimator"), NAMED)
def test_value_and_gradients(backend, route, name, estimator):
    """Encoder, decoder and prior agree with the definitions, whole and in chunks that do not divide K."""
    dtype, tolerance = (torch.float32, 2e-5) if backend == "triton" else (torch.float64, 1e-11)
    kind, options, value = CASES[name]
    model, exact = Model(dtype), Model()
    found = model.bound(
        kind(**options, estimator=estimator), reduction="none", k_chunk=None if route == "whole" else 5
    )
    expected = torch.stack([value(w) for w in exact.log_w()[0].T])
    # The case close to 1 is expanded to first order.
    loose = max(tolerance, 1e-9) if "close" in name else tolerance
    torch.testing.assert_close(found.double(), expected, rtol=loose, atol=loose)
    grads = torch.autograd.grad(found.sum(), model.learned)
    by = covariance_gradients if estimator == "covariance" else gradients
    wanted = by(exact, value, estimator)
    for got, want in zip(grads, wanted, strict=True):
        assert bool(want.any())
        torch.testing.assert_close(got.double(), want, rtol=100 * loose, atol=100 * loose)


def covariance_gradients(model, *_):
    """Compute TVO's gradients, eq. 13: expected derivatives plus covariances, for each expectation."""
    fixed_z = (model.mu + (0.5 * model.logvar).exp() * model.noise()).detach()
    log_w, log_q = model.log_w(z=fixed_z)
    log_p = log_w + log_q
    total = 0.0
    for beta, end in zip(BETAS, (*BETAS[1:], 1.0), strict=True):
        weights = torch.softmax(beta * log_w, 0).detach()
        tilted = (1 - beta) * log_q + beta * log_p
        centred = log_w.detach() - (weights * log_w.detach()).sum(0)
        total = total + (end - beta) * (weights * (log_w + centred * tilted)).sum()
    return torch.autograd.grad(total, model.learned)


PAIRS = {
    "piwae": (IWAE(), IWAE(groups=4)),
    "piwae, dreg": (IWAE(), IWAE(groups=4, estimator="dreg")),
    "stl of another": (CIWAE(0.2), IWAE(groups=2, estimator="stl")),
    "wake": (IWAE(), WakePhi()),
    "elbo for the encoder": (IWAE(), IWAE(alpha=1.0)),
}


@pytest.mark.parametrize("prior", [True, False])
@pytest.mark.parametrize("route", ["whole", "chunks"])
@pytest.mark.parametrize("name", PAIRS)
def test_another_bound_for_the_encoder(backend, name, route, prior):
    """Value, decoder and prior gradients come from the first bound, encoder gradients from the second."""
    dtype, tolerance = (torch.float32, 1e-4) if backend == "triton" else (torch.float64, 1e-11)
    objective, encoder = PAIRS[name]
    model, exact = Model(dtype, prior), Model(prior=prior)
    chunk = None if route == "whole" else 5
    found = model.bound(objective, q_objective=encoder, reduction="none", k_chunk=chunk)
    mine = {"m": getattr(objective, "groups", 1), "share": getattr(objective, "beta", 0.0)}
    first = lambda w: mine["share"] * w.mean() + (1 - mine["share"]) * of_groups(w, mine["m"])  # noqa: E731
    if isinstance(encoder, WakePhi):
        second, estimator = lme, "wake"
    else:
        second, estimator = lambda w: of_groups(w, encoder.groups, encoder.alpha), encoder.estimator
    torch.testing.assert_close(
        found.double(), torch.stack([first(w) for w in exact.log_w()[0].T]), rtol=tolerance, atol=tolerance
    )
    grads = torch.autograd.grad(found.sum(), model.learned)
    wanted = [*gradients(exact, second, estimator)[:2], *gradients(exact, first, "iwae")[2:]]
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


def test_a_pair_of_equal_bounds_equals_the_single_bound():
    for estimator in ("iwae", "stl", "dreg"):
        model = Model()
        one = IWAE(groups=3, alpha=0.4, estimator=estimator)
        other = IWAE(groups=3, alpha=0.4, estimator=estimator)
        alone, pair = model.bound(one), model.bound(one, q_objective=other)
        torch.testing.assert_close(alone, pair, rtol=1e-14, atol=1e-14)  # two paths: a few roundings
        for a, b in zip(
            torch.autograd.grad(alone, model.learned), torch.autograd.grad(pair, model.learned), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_group_of_negligible_weight_trains_the_encoder():
    """PIWAE: a group's share of all samples underflows, but in its group its weights sum to one."""

    class Line(Likelihood):
        def log_prob(self, x, parameters):
            return parameters[:, 0]

    class Two(Distribution):
        def __init__(self, mu):
            super().__init__()
            self.mu, self.batch, self.device = mu, 1, mu.device

        def rsample_log_prob(self, samples, seed, *, sample_offset=0, row_offset=0):
            z = torch.arange(samples, dtype=self.mu.dtype, device=self.device)[:, None, None] + self.mu
            return z, 0 * z.sum(2)

        def log_prob(self, z):
            return 0 * (z + self.mu).sum(2)

    for dtype, gap in ((torch.float32, 200.0), (torch.float64, 2000.0)):
        mu = torch.zeros(1, 1, dtype=dtype, device=DEVICE, requires_grad=True)
        slope = torch.tensor(-gap, dtype=dtype, device=DEVICE, requires_grad=True)
        bound = fastvae.bound(
            torch.zeros(1, 1, dtype=dtype, device=DEVICE), Two(mu), lambda z, slope=slope: slope * z, IWAE(),
            k=2, q_objective=IWAE(groups=2), likelihood=Line(), prior=Flat(),
        )  # fmt: skip
        to_mu, to_slope = torch.autograd.grad(bound, (mu, slope))
        # Each sample's d log w / dz = slope has weight ½; the decoder learns from the first, where z = 0.
        torch.testing.assert_close(to_mu, slope.detach().expand(1, 1))
        assert abs(float(to_slope)) < 1e-25


class Flat(Distribution):
    def log_prob(self, z):
        return torch.zeros_like(z[..., 0])


@pytest.mark.parametrize("name", [n for n, (kind, _, _) in CASES.items() if kind is not TVO])
def test_dreg_is_unbiased(name):
    """Both estimators of the encoder's gradient have the same mean over many draws.

    For the exact posterior DReG's is zero in every draw.
    """
    kind, options, _ = CASES[name]
    batch, n = 4000, 12
    x = torch.full((batch, 1), 0.7, dtype=torch.float64)
    found = {}
    for estimator in ("iwae", "dreg"):
        mu = torch.full((batch, 1), 0.4, dtype=torch.float64, requires_grad=True)
        logvar = torch.full((batch, 1), -0.5, dtype=torch.float64, requires_grad=True)
        value = fastvae.bound(
            x, (mu, logvar), lambda z: z, kind(**options, estimator=estimator), k=n,
            likelihood=Gaussian(1.0), reduction="sum", generator=torch.Generator().manual_seed(3),
        )  # fmt: skip
        found[estimator] = torch.cat(torch.autograd.grad(value, (mu, logvar)), 1)
    difference = found["iwae"] - found["dreg"]
    error = difference.std(0) / math.sqrt(batch)
    assert (difference.mean(0).abs() < 4.5 * error).all()
    # For an inexact posterior the gradient is nonzero.
    assert (found["dreg"].mean(0).abs() > 5 * found["dreg"].std(0) / math.sqrt(batch)).any()


@pytest.mark.parametrize("name", CASES)
def test_the_exact_posterior(name):
    """Every weight is p(x), so each bound is log p(x), and without the score the encoder's gradient is 0."""
    kind, options, _ = CASES[name]
    x = rand(B, 1, seed=1, dtype=torch.float64)
    log_px = -0.25 * x[:, 0].square() - 0.5 * math.log(4 * math.pi)
    for estimator in [e for e in estimators_of(kind) if e in ("stl", "dreg")]:
        mu = (x / 2).requires_grad_()
        logvar = torch.full_like(x, math.log(0.5)).requires_grad_()
        value = fastvae.bound(
            x, (mu, logvar), lambda z: z, kind(**options, estimator=estimator), k=K,
            likelihood=Gaussian(1.0), reduction="none",
        )  # fmt: skip
        torch.testing.assert_close(value, log_px, rtol=1e-12, atol=1e-9)
        for grad in torch.autograd.grad(value.sum(), (mu, logvar)):
            assert grad.abs().max() < 1e-9


def test_bounds_are_ordered():
    """On the same draws, bounds are ordered: decreasing in α, and ELBO <= CIWAE, MIWAE <= IWAE.

    TVO rises from the ELBO to log p(x) as it is refined.
    """
    model = Model()
    with torch.no_grad():
        alphas = [-1.0, 0.0, 0.3, 1.0 - 1e-9, 1.0, 2.0]
        values = [model.bound(IWAE(alpha=a), reduction="none") for a in alphas]
        assert all(bool((a > b - 1e-8).all()) for a, b in itertools.pairwise(values))
        elbo, iwae = values[4], values[1]
        for chain in (
            [IWAE(groups=12), IWAE(groups=4), IWAE(groups=2), IWAE()],
            [CIWAE(1.0), CIWAE(0.6), CIWAE(0.2), CIWAE(0.0)],
        ):
            found = [model.bound(o, reduction="none") for o in chain]
            torch.testing.assert_close(found[0], elbo)
            torch.testing.assert_close(found[-1], iwae)
            assert all(bool((a < b).all()) for a, b in itertools.pairwise(found))
        grids = [(0.0,), (0.0, 0.5), (0.0, 0.25, 0.5, 0.75), tuple(i / 1000 for i in range(1000))]
        found = [model.bound(TVO(betas), reduction="none") for betas in grids]
        torch.testing.assert_close(found[0], elbo)
        assert all(bool((a < b).all()) for a, b in itertools.pairwise(found))
        # The integral over all temperatures is the log-mean-exp of the same weights.
        torch.testing.assert_close(found[-1], iwae, rtol=1e-3, atol=1e-2)
        assert bool((model.bound(Jackknife(), reduction="none") > iwae).all())


def test_a_u_statistic_has_the_mean_of_miwae_and_less_variance():
    batch, k = 3000, 35
    x = torch.full((batch, 1), 0.7, dtype=torch.float64)
    q = torch.full((batch, 1), 0.4, dtype=torch.float64), torch.full((batch, 1), 3.0, dtype=torch.float64)
    found = [
        fastvae.bound(
            x, q, lambda z: z, o, k=k, likelihood=Gaussian(1.0), reduction="none",
            generator=torch.Generator().manual_seed(5),
        )
        for o in (IWAE(groups=7), UStatistic(5, permutations=1), UStatistic(5, permutations=7))
    ]  # fmt: skip
    difference = found[2] - found[0]
    assert difference.mean().abs() < 4.5 * difference.std() / math.sqrt(batch)
    assert found[2].var() < 0.7 * found[0].var()
    # A single partition is MIWAE with other groups.
    assert abs(found[1].var() / found[0].var() - 1) < 0.3


def _posterior_gradient(logvar, mean, steps=4001, width=12.0):
    """Compute ∇ of −KL(p(z|x) ‖ q) in one dimension by quadrature, x = 0.7 with unit variances."""
    z = torch.linspace(-width, width, steps, dtype=torch.float64)
    posterior = torch.distributions.Normal(0.35, math.sqrt(0.5)).log_prob(z).exp()
    mean, logvar = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (mean, logvar))
    log_q = -0.5 * (z - mean).square() / logvar.exp() - 0.5 * logvar
    value = torch.trapezoid(posterior * log_q, z)
    return torch.stack(torch.autograd.grad(value, (mean, logvar)))


def test_wake_phi_follows_the_forward_kl():
    """For large K, wake-phi's gradient is that of the forward KL by quadrature."""
    k = 200_000
    x = torch.full((1, 1), 0.7, dtype=torch.float64)
    mu = torch.full((1, 1), 0.1, dtype=torch.float64, requires_grad=True)
    logvar = torch.full((1, 1), 0.2, dtype=torch.float64, requires_grad=True)
    value = fastvae.bound(
        x, (mu, logvar), lambda z: z, IWAE(), q_objective=WakePhi(), k=k, k_chunk=50_000,
        likelihood=Gaussian(1.0), generator=torch.Generator().manual_seed(6),
    )  # fmt: skip
    found = torch.cat(torch.autograd.grad(value, (mu, logvar)))[:, 0]
    # The standard error of a self-normalised mean of numbers of order one.
    torch.testing.assert_close(found, _posterior_gradient(0.2, 0.1), rtol=0, atol=5 * 2 / math.sqrt(k))


def test_tvo_gradient_equals_the_derivative_of_its_integral():
    """The covariance estimator at large K equals the derivative of E_πβ[log w] in one dimension.

    π_β is normal; the derivative comes from finite differences of quadrature.
    """
    betas, k = (0.0, 0.4), 200_000

    z = torch.linspace(-14, 14, 8001, dtype=torch.float64)

    def integral(mean, logvar):
        log_q = torch.distributions.Normal(mean, math.exp(0.5 * logvar)).log_prob(z)
        log_p = torch.distributions.Normal(0.0, 1.0).log_prob(z) + torch.distributions.Normal(
            z, 1.0
        ).log_prob(torch.tensor(0.7, dtype=torch.float64))
        total = 0.0
        for beta, end in zip(betas, (*betas[1:], 1.0), strict=True):
            tilted = torch.exp((1 - beta) * log_q + beta * log_p)
            total += (end - beta) * torch.trapezoid(tilted * (log_p - log_q), z) / torch.trapezoid(tilted, z)
        return float(total)

    step = 1e-5
    wanted = [
        (integral(0.1 + step, 0.2) - integral(0.1 - step, 0.2)) / (2 * step),
        (integral(0.1, 0.2 + step) - integral(0.1, 0.2 - step)) / (2 * step),
    ]
    mu = torch.full((1, 1), 0.1, dtype=torch.float64, requires_grad=True)
    logvar = torch.full((1, 1), 0.2, dtype=torch.float64, requires_grad=True)
    value = fastvae.bound(
        torch.full((1, 1), 0.7, dtype=torch.float64), (mu, logvar), lambda z: z, TVO(betas), k=k,
        k_chunk=50_000, likelihood=Gaussian(1.0), generator=torch.Generator().manual_seed(8),
    )  # fmt: skip
    assert abs(float(value) - integral(0.1, 0.2)) < 5 * 3 / math.sqrt(k)
    found = torch.cat(torch.autograd.grad(value, (mu, logvar)))[:, 0]
    torch.testing.assert_close(
        found, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=5 * 3 / math.sqrt(k)
    )


# The fused op.

HOWS = [(0.0, 4, 0.0), (0.5, 1, 0.0), (-1.0, 3, 0.0), (0.999, 1, 0.0), (0.0, 1, 0.3), (1.5, 2, 0.25)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("how", HOWS)
def test_the_fused_reduction(backend, how, reduction, dtype):
    """The fused reduction is exact to rounding, over more rows than are reduced at a time."""
    if backend == "triton" and dtype == torch.float64:
        dtype = torch.float32
    k, b, size = 12, 70, 3
    x, logits = rand(b, size, seed=1).to(dtype), randn(k * b, size, seed=2).to(dtype).requires_grad_()
    ratio = (5 * randn(k, b, seed=3)).to(dtype).requires_grad_()
    alpha, groups, share = how
    bound, mean = reduce(
        "bernoulli", x, (logits,), ratio, None, BoundReduction(0.7, "log_mean_exp", reduction, *how), True
    )
    upstream = randn(*bound.shape, seed=4).to(bound.dtype)
    grads = torch.autograd.grad(bound, (logits, ratio), upstream)
    wide = [t.detach().double().requires_grad_() for t in (logits, ratio)]
    each = wide[0].unflatten(0, (k, b))
    log_p = (x.double() * each - torch.nn.functional.softplus(each)).sum(-1)
    log_w = log_p + 0.7 * wide[1]
    exact = torch.stack([share * w.mean() + (1 - share) * of_groups(w, groups, alpha) for w in log_w.T])
    exact = exact if reduction == "none" else exact.mean()
    wanted = torch.autograd.grad(exact, wide, upstream.double())
    # A log weight of about 20 is rounded a few times, and weights are its exponentials; float64 roundings are
    # multiplied by 1 / (1 - α).
    tolerance = 20 * 20 * max(torch.finfo(dtype).eps, 2e-16 / abs(1 - alpha))
    torch.testing.assert_close(bound.double(), exact, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(mean.double(), log_p.mean(0), rtol=tolerance, atol=tolerance)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["miwae", "vr", "ciwae"])
def test_fused_head(backend, name):
    """The fused last layer, in one pass with the gradients, agrees with the separate layer."""
    kind, options, _ = CASES[name]
    torch.manual_seed(0)
    decoder = torch.nn.Sequential(torch.nn.Linear(D, 4), torch.nn.Tanh(), torch.nn.Linear(4, X)).to(DEVICE)
    x, mu, logvar = (
        rand(B, X, seed=1),
        randn(B, D, seed=2).requires_grad_(),
        randn(B, D, seed=3).requires_grad_(),
    )
    results = []
    for network in (decoder, fastvae.FusedHead(decoder[:2], decoder[2])):
        value = fastvae.bound(
            x, (mu, logvar), network, kind(**options), k=K, likelihood="bernoulli", generator=generator(4)
        )
        results.append([value, *torch.autograd.grad(value, [mu, logvar, *decoder.parameters()])])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-6)


class Own(Likelihood):
    """Gaussian(scale=0.8) as a user's likelihood, which is never fused."""

    def log_prob(self, x, mean):
        return torch.distributions.Normal(mean, 0.8).log_prob(x)


@pytest.mark.parametrize(
    "objective", [IWAE(), IWAE(groups=4), IWAE(alpha=0.3), IWAE(3, 0.6), CIWAE(0.3)], ids=repr
)
def test_a_custom_likelihood(objective):
    """A user's likelihood gives the bounds and gradients of the same built-in one."""
    results = []
    for likelihood in (Own(), Gaussian(0.8)):
        model = Model(prior=False)
        value = fastvae.bound(
            model.x, (model.mu, model.logvar), lambda z, w=model.weight: z @ w.T, objective, k=K,
            likelihood=likelihood, generator=generator(7),
        )  # fmt: skip
        results.append([value, *torch.autograd.grad(value, model.learned)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_custom_likelihood_keeps_the_dtype():
    """A float64 β for each example does not widen a float32 bound, fused or not."""
    model = Model(torch.float32, prior=False)
    beta = torch.linspace(0.5, 2, B, dtype=torch.float64, device=DEVICE)
    bounds_of = [
        fastvae.elbo(
            model.x, (model.mu, model.logvar), lambda z: z @ model.weight.T, beta=beta, reduction="none",
            likelihood=likelihood, generator=generator(7),
        )
        for likelihood in (Own(), Gaussian(0.8))
    ]  # fmt: skip
    assert [b.dtype for b in bounds_of] == [torch.float32] * 2
    torch.testing.assert_close(*bounds_of)


def test_samples_and_rows_of_zero_weight(backend):
    """Samples and rows of zero weight behave as in IWAE; for a mean they give -inf."""
    x, logits = torch.ones(3, 1, device=DEVICE), torch.zeros(4 * 3, 1, device=DEVICE)
    ratio = torch.zeros(4, 3, device=DEVICE)
    ratio[0, 0] = ratio[:, 1] = -math.inf
    ratio[1, 2] = math.nan
    ratio.requires_grad_()
    for alpha in (0.0, 0.5):
        how = BoundReduction(1.0, "log_mean_exp", "none", alpha, 2)
        bound, _ = reduce("bernoulli", x, (logits,), ratio, None, how)
        assert bound[0].isfinite() and bound[1] == -math.inf and bound[2].isnan()
        (grad,) = torch.autograd.grad(bound[:2].sum(), ratio)
        torch.testing.assert_close(grad[:, 0], torch.tensor([0.0, 0.5, 0.25, 0.25], device=DEVICE))
        assert not grad[:, 1].any()


@pytest.mark.parametrize("wide", ["x", "q", "x and q", "all"])
@pytest.mark.parametrize("prior", ["diagonal", "torch"])
@pytest.mark.parametrize("second", [IWAE(alpha=1.0), IWAE(groups=4), IWAE(estimator="dreg")], ids=repr)
def test_samples_of_negligible_weight_train_q_in_mixed_precision(wide, prior, second):
    """Weights that float64 has, and that underflow in a decoder, prior or z in float32."""
    gradients = []
    for exact in (False, True):
        dtype = lambda part, exact=exact: (  # noqa: E731
            torch.float64 if exact or wide == "all" or part in wide.split(" and ") else torch.float32
        )
        x = 40 * rand(B, X, seed=1).cpu().to(dtype("x"))
        mu, logvar = (randn(B, D, seed=s).cpu().to(dtype("q")).requires_grad_() for s in (2, 3))
        weight = randn(X, D, seed=4).cpu().to(dtype("decoder"))
        zeros = torch.zeros(D, dtype=dtype("prior"))
        normal = torch.distributions.MultivariateNormal(zeros, torch.eye(D, dtype=dtype("prior")))
        bound = fastvae.bound(
            x, (mu, logvar), lambda z, weight=weight: z.to(weight.dtype) @ weight.T, IWAE(), k=K,
            q_objective=second, likelihood=Gaussian(0.1), reduction="sum",
            prior=normal if prior == "torch" else DiagonalNormal(zeros, zeros),
            generator=torch.Generator().manual_seed(7),
        )  # fmt: skip
        gradients.append(torch.autograd.grad(bound, (mu, logvar)))
    for got, expected in zip(*gradients, strict=True):
        assert float((got - expected).norm() / expected.norm()) < 1e-3


def _in_float16(h, weight):
    return (h.half() @ weight.half().T).to(h.dtype)


def _in_autocast(h, weight):
    with torch.autocast(h.device.type, torch.float16):
        return (h @ weight.T).float()


@pytest.mark.parametrize("k_chunk", [None, 3])
@pytest.mark.parametrize("where", ["inside the decoder", "autocast inside the decoder", "q of torch"])
def test_samples_of_negligible_weight_train_q_through_float16(where, k_chunk):
    """Gradients by z in float16, whose range a least share of 2⁻¹⁰⁰ would leave, wherever the cast hides."""
    gradients = []
    for narrow in (True, False):
        x = 3 * rand(B, X, seed=1)
        mu, log_scale = (randn(B, D, seed=s).half() for s in (2, 3))
        if not (narrow and where == "q of torch"):
            mu, log_scale = mu.float(), log_scale.float()
        mu.requires_grad_(), log_scale.requires_grad_()
        q = torch.distributions.Laplace(mu, log_scale.exp()) if where == "q of torch" else (mu, log_scale)
        weight = randn(X, D, seed=4)
        product = _in_float16 if where == "inside the decoder" else _in_autocast
        if not narrow or where == "q of torch":
            product = lambda h, w: h.float() @ w.T  # noqa: E731
        bound = fastvae.bound(
            x, q, lambda z, product=product, weight=weight: product(z, weight), IWAE(), k=8, k_chunk=k_chunk,
            q_objective=IWAE(alpha=1.0), likelihood=Gaussian(0.3), reduction="sum",
            generator=generator(7),
        )  # fmt: skip
        gradients.append(torch.autograd.grad(bound, (mu, log_scale)))
    for got, expected in zip(*gradients, strict=True):
        assert float((got.float() - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("scale", [1, 30, 1000])
def test_log_weights_far_apart(name, scale):
    """Log weights may differ by hundreds of nats, as for images, so that all but one underflow."""
    kind, options, value = CASES[name]
    log_w = scale * randn(K, B, seed=scale, dtype=torch.float64)
    objective = kind(**options)
    bound, grads = objective.reduce(log_w)
    first, second = derivatives(value, log_w)
    close = dict(rtol=1e-9, atol=1e-12 * scale)
    if name == "vr close to 1":  # CASES has two terms of a series
        return
    torch.testing.assert_close(bound, torch.stack([value(w) for w in log_w.T]), **close)
    torch.testing.assert_close(grads, first, **close)
    if "dreg" in estimators_of(kind):
        torch.testing.assert_close(objective.paths(log_w), first - second, **close)


@pytest.mark.parametrize("family", ["full", "laplace", "torch", "own"])
@pytest.mark.parametrize("name", ["vr of groups", "jackknife"])
def test_any_family(backend, family, name):
    """DReG and a pair of bounds work for any q, whole and in chunks."""
    kind, options, _ = CASES[name]
    x, mu, raw = rand(B, X, seed=1), randn(B, D, seed=2).requires_grad_(), 0.3 * randn(B, 3, seed=3)
    raw.requires_grad_()
    weight = randn(X, D, seed=4)

    class Own(DiagonalNormal):
        pass

    def q():
        return {
            "full": lambda: FullNormal(mu, raw),
            "laplace": lambda: Laplace(mu, raw[:, :2]),
            "torch": lambda: torch.distributions.Normal(mu, raw[:, :2].exp()),
            "own": lambda: Own(mu, raw[:, :2]),
        }[family]()

    for pair in (None, IWAE(groups=2)):
        results = []
        for chunk in (None, 5):
            if family == "torch":  # torch's own noise differs between chunk sizes
                chunk = None
            torch.manual_seed(0)
            value = fastvae.bound(
                x, q(), lambda z: z @ weight.T, kind(**options, estimator="dreg"), q_objective=pair, k=K,
                k_chunk=chunk, likelihood=Gaussian(0.9), generator=generator(5),
            )  # fmt: skip
            results.append([value, *torch.autograd.grad(value, (mu, raw))])
        for got, want in zip(*results, strict=True):
            torch.testing.assert_close(got, want, rtol=2e-5, atol=2e-5)
        assert all(bool(g.any()) for g in results[0][1:])


@pytest.mark.parametrize(
    "objective",
    [IWAE(3, 0.5, "dreg"), IWAE(alpha=torch.tensor(0.5)), Jackknife("dreg"), TVO(), CIWAE(0.5)],
    ids=repr,
)
def test_compiled(objective):
    from torch._inductor import config

    encoder, decoder = models.networks(X, D, "bernoulli")
    x = rand(B, X, seed=10)
    learned = [*encoder.parameters(), *decoder.parameters()]

    def loss(x):
        return -fastvae.bound(x, encoder(x), decoder, objective, k=6, likelihood="bernoulli")

    torch._dynamo.reset()
    results = []
    with config.patch(fallback_random=True):
        for function in (loss, torch.compile(loss, fullgraph=True)):
            torch.manual_seed(11)
            value = function(x)
            results.append((value, *torch.autograd.grad(value, learned)))
    torch._dynamo.reset()
    for actual, wanted in zip(*results, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


def test_a_vae_accepts_a_bound():
    """A VAE takes a bound as a method and as the objective of a call, with terms."""
    torch.manual_seed(0)
    vae = fastvae.VAE(torch.nn.Linear(X, 2 * D), torch.nn.Linear(D, X), likelihood="bernoulli").to(DEVICE)
    x = rand(B, X, seed=1)
    wanted = vae.bound(x, IWAE(3, 0.5), 12, reduction="none", generator=generator(1))
    assert torch.equal(vae(x, IWAE(3, 0.5), k=12, reduction="none", generator=generator(1)), wanted)
    terms = vae(x, IWAE(3, 0.5), k=12, terms=True, generator=generator(1))
    torch.testing.assert_close(terms.bound, wanted)
    plain = vae.elbo(x, k=12, kl="mc", terms=True, generator=generator(1))
    torch.testing.assert_close(terms.log_likelihood, plain.log_likelihood)
    torch.testing.assert_close(terms.kl, plain.kl)


def test_a_custom_bound():
    class Second(bounds.Bound):
        def value(self, log_w):
            return log_w.topk(2, 0).values[1]

    model = Model()
    found = model.bound(Second(), reduction="none")
    torch.testing.assert_close(found, model.log_w()[0].topk(2, 0).values[1], rtol=1e-12, atol=1e-12)
    for estimator in ("iwae", "stl"):
        grads = torch.autograd.grad(model.bound(Second(estimator), reduction="sum"), model.learned)
        wanted = gradients(Model(), lambda w: w.topk(2).values[1], estimator)
        for got, want in zip(grads, wanted, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="estimator='dreg' is unknown; known: 'iwae', 'stl'"):
        Second("dreg")

    class Wrong(bounds.Bound):
        def value(self, log_w):
            return log_w.mean()

    with pytest.raises(
        ValueError, match=r"Wrong.value returned \[\] for log_w \[12, 3\]; expected the bound"
    ):
        model.bound(Wrong())


def test_errors():
    model = Model()
    for call, error, message in (
        (lambda: model.bound(IWAE(groups=5)), ValueError, r"groups=5 does not divide k=12 samples"),
        (lambda: model.bound(UStatistic(5)), ValueError, r"m=5 does not divide k=12"),
        (lambda: model.bound(UStatistic(4)), ValueError, r"permutations=10 is more than the k/m = 3 ways"),
        (lambda: model.bound(Jackknife(), k=1), ValueError, r"needs k of at least 2"),
        (lambda: model.bound(WakePhi()), ValueError, r"use q_objective=WakePhi\(\)"),
        (lambda: model.bound("iwae"), TypeError, r"objective must be a bound of fastvae.bounds"),
        (lambda: model.bound(IWAE(), q_objective="wake"), TypeError, r"q_objective must be a bound"),
        (lambda: model.bound(IWAE(), k=0), ValueError, r"k must be at least 1"),
        (lambda: IWAE(groups=0), ValueError, r"groups must be at least 1"),
        (lambda: IWAE(alpha=math.nan), ValueError, r"alpha must be finite, the order"),
        (lambda: IWAE(alpha=-math.inf), ValueError, r"alpha must be finite, the order"),
        (lambda: IWAE(alpha=torch.zeros(3)), ValueError, r"alpha is a tensor \[3\]"),
        (lambda: IWAE(estimator="dregs"), ValueError, r"estimator='dregs' is unknown"),
        (lambda: CIWAE(1.5), ValueError, r"beta must lie in \[0, 1\]"),
        (lambda: TVO((0.1, 0.5)), ValueError, r"betas must rise from 0"),
        (lambda: TVO(0.5), TypeError, "betas must be a list of numbers, .* got float"),
        (lambda: TVO((0.0, 1.0)), ValueError, r"betas must rise from 0 and end below 1"),
        (lambda: TVO(estimator="dreg"), ValueError, r"known: 'covariance', 'iwae', 'stl'"),
    ):
        with pytest.raises(error, match=message):
            call()
    q = Mixture([DiagonalNormal(model.mu, model.logvar), StandardNormal()])
    for objective in (IWAE(groups=2), Jackknife(), IWAE(alpha=1.0)):
        with pytest.raises(ValueError, match="drawn from in strata"):
            model.bound(objective, q=q)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented|differentiate twice"):
        grads = torch.autograd.grad(model.bound(Jackknife()), model.learned, create_graph=True)
        grads[0].sum().backward()
