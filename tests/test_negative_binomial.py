"""Tests specific to negative binomial counts, zero-inflated or not."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

import fastvae
from fastvae import ops
from fastvae.likelihoods import NegativeBinomial, ZeroInflatedNegativeBinomial

from .conftest import DEVICE

DISPERSIONS = (1e-4, 0.03, 1.0, 7.3, 1e3, 1e5, 1e8, 1e12)
COUNTS = (0, 1, 2, 5, 50, 1000, 10**6, 0.3, 2.5)
# Log mean minus log count.
DISTANCES = (0.0, 1e-3, -1e-3, 0.1, -0.1, 0.99, -1.01, 4.0, -6.0)


def exact(x: float, m: float, t: float) -> tuple[mpmath.mpf, mpmath.mpf, mpmath.mpf]:
    """Return log p and its derivatives by log mean and log inverse dispersion, by the textbook formula."""
    x, m, t = mpmath.mpf(x), mpmath.mpf(m), mpmath.mpf(t)
    theta, mean = mpmath.e**t, mpmath.e**m
    value = mpmath.loggamma(x + theta) - mpmath.loggamma(theta) - mpmath.loggamma(x + 1)
    value += theta * mpmath.log(theta / (theta + mean)) + x * mpmath.log(mean / (theta + mean))
    by_m = (x - mean) * theta / (theta + mean)
    by_t = mpmath.digamma(x + theta) - mpmath.digamma(theta) + mpmath.log(theta / (theta + mean))
    return value, by_m, theta * (by_t + (mean - x) / (theta + mean))


@pytest.fixture(scope="module")
def hard():
    """Return float32 counts, log means, log inverse dispersions, and the exact results in float64."""
    rows = [
        (x, math.log(max(x, 0.5)) + d, math.log(theta))
        for theta in DISPERSIONS
        for x in COUNTS
        for d in DISTANCES
    ]
    inputs = torch.tensor(rows, dtype=torch.float32).T
    with mpmath.workdps(60):
        wanted = [[float(v) for v in exact(*row)] for row in inputs.T.tolist()]
    return inputs.to(DEVICE), torch.tensor(wanted, dtype=torch.float64, device=DEVICE).T


@pytest.mark.parametrize("columns", [1, 700])
def test_any_dispersion_and_count(backend, hard, columns):
    """Accurate to 1e-5, alone and among zeros, where differences of lgamma are wrong by whole nats."""
    every = 1 if columns == 1 else 5
    (x, m, t), (value, by_m, by_t) = (rows[:, ::every] for rows in hard)
    wide = [torch.zeros(len(x), columns, device=DEVICE) for _ in range(3)]
    wide[1].fill_(-math.inf)  # certain zeros
    for to, given in zip(wide, (x, m, t), strict=True):
        to[:, columns // 3] = given
    counts, mean, dispersion = wide[0], wide[1].requires_grad_(), wide[2].requires_grad_()
    out = ops.negative_binomial_log_prob(counts, mean, dispersion)
    grads = torch.autograd.grad(out.sum(), (mean, dispersion))
    got_m, got_t = (g[:, columns // 3].double() for g in grads)
    if backend == "reference":  # which has a count's logarithm in float32 only
        torch.testing.assert_close(out.double(), value, rtol=1e-4, atol=1e-6)
        return
    assert bool(((out.double() - value).abs() <= 1e-5 * value.abs()).all())
    # Near zeros of the slopes, errors are relative to the cancelling terms, which have these sizes.
    theta = t.double().exp()
    share = x * theta / (x + theta)
    assert bool(((got_m - by_m).abs() <= 1e-5 * by_m.abs() + 1e-8 * share).all())
    assert bool(((got_t - by_t).abs() <= 1e-5 * by_t.abs() + 1e-6 * x / (x + theta)).all())


@pytest.mark.parametrize("columns", [3, 700])
def test_zeros_of_any_mean(backend, columns):
    """−θ log(1 + μ/θ) is right also where the ratio overflows an exponential, alone and in long rows."""
    t, theta = math.log(0.7), 0.7
    for ratio in (-60.0, 0.0, 60.0, 100.0, 300.0):
        mean = torch.full((1, columns), ratio + t, device=DEVICE)
        got = ops.negative_binomial_log_prob(torch.zeros(1, columns, device=DEVICE), mean, t)
        each = theta * (ratio + math.log1p(math.exp(-ratio)) if ratio > 0 else math.log1p(math.exp(ratio)))
        assert float(got) == pytest.approx(-columns * each, rel=2e-5)


@pytest.mark.parametrize("t", [90.0, 200.0, 1e4])
def test_without_overdispersion_it_is_poisson(backend, t):
    """Also where θ itself overflows: value and slopes are a Poisson's, and θ has no slope."""
    x = torch.tensor([[0.0, 1.0, 3.0, 20.0]], device=DEVICE)
    mean = torch.tensor([[-2.0, 0.5, 0.0, 3.0]], device=DEVICE).requires_grad_()
    dispersion = torch.full_like(x, t).requires_grad_()
    out = ops.negative_binomial_log_prob(x, mean, dispersion)
    expected = ops.poisson_log_prob(x, mean)
    torch.testing.assert_close(out, expected)
    by_mean, by_dispersion = torch.autograd.grad(out.sum(), (mean, dispersion))
    torch.testing.assert_close(by_mean, torch.autograd.grad(expected.sum(), mean)[0])
    torch.testing.assert_close(by_dispersion, torch.zeros_like(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("t", [70.0, 80.0, 85.0, 100.0])
@pytest.mark.parametrize("inflated", [False, True])
def test_rare_counts_without_overdispersion(backend, t, inflated):
    """The slope by log mean is a Poisson's, x - μ, where μ/θ is too small for a number."""
    x = torch.tensor([[0.0, 0.0, 0.0, 0.0, 1.0, 2.0]], device=DEVICE)
    mean = torch.tensor([[-3.0, -10.0, -20.0, -40.0, -20.0, -9.0]], device=DEVICE).requires_grad_()
    dispersion = torch.full_like(x, t)
    if inflated:
        out = ops.zero_inflated_negative_binomial_log_prob(x, mean, dispersion, torch.full_like(x, -80.0))
    else:
        out = ops.negative_binomial_log_prob(x, mean, dispersion)
    (found,) = torch.autograd.grad(out.sum(), mean)
    torch.testing.assert_close(found, x - mean.exp(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("x, t", [(1e6, -76.0), (100.0, -85.0), (3.0, -87.3), (1.0, -88.5), (2.0, -100.0)])
def test_counts_of_a_vanishing_dispersion(backend, x, t):
    """Log p is about t - log x, however small θ is, and its slope by t is 1."""
    x, mean, t = (torch.tensor([[v]], device=DEVICE) for v in (x, 0.0, t))
    t.requires_grad_()
    for op, more in (
        (ops.negative_binomial_log_prob, ()),
        (ops.zero_inflated_negative_binomial_log_prob, (0.0,)),
    ):
        value = op(x, mean, t, *more)
        expected = t.detach()[0] - x[0].log() - (math.log(2) if more else 0.0)
        torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=0)
        (slope,) = torch.autograd.grad(value, t)
        torch.testing.assert_close(slope, torch.ones_like(slope))


def test_certain_zeros_and_impossible_counts(backend):
    x = torch.tensor([[0.0], [3.0], [0.0], [3.0]], device=DEVICE)
    mean = torch.tensor([[-math.inf], [-math.inf], [math.inf], [math.inf]], device=DEVICE)
    certain, *impossible = ops.negative_binomial_log_prob(x, mean, 0.7).tolist()
    assert abs(certain) <= torch.finfo(torch.float32).tiny * 2 and impossible == [-math.inf] * 3
    assert math.isnan(float(ops.negative_binomial_log_prob(x[:1], mean[:1] * math.nan, 0.7)))


@pytest.mark.parametrize("logit", [-80.0, -5.0, 0.0, 0.3, 12.0, 80.0])
def test_dropout_is_accurate(backend, logit):
    """Dropout agrees with 50 digits, for nearly certain zeros and nearly impossible counts too."""
    x = torch.tensor([[0.0], [0.0], [0.0], [4.0]], device=DEVICE)
    m = torch.tensor([[-9.0], [0.4], [6.0], [1.1]], device=DEVICE, requires_grad=True)
    t = torch.tensor([[0.5], [0.5], [9.0], [-2.0]], device=DEVICE, requires_grad=True)
    drop = torch.full((4, 1), logit, device=DEVICE, requires_grad=True)
    out = ops.zero_inflated_negative_binomial_log_prob(x, m, t, drop)
    grads = torch.autograd.grad(out.sum(), (m, t, drop))
    with mpmath.workdps(60):

        def log_p(x, m, t, drop):
            dead = 1 / (1 + mpmath.e**-drop)
            p = (1 - dead) * mpmath.e ** exact(x, m, t)[0]
            return mpmath.log(p + dead if x == 0 else p)

        for i in range(4):
            at = [float(x[i]), *(mpmath.mpf(float(p[i].detach())) for p in (m, t, drop))]
            wanted = [log_p(*at)]
            for j in range(3):
                step = lambda v, j=j: log_p(*at[: j + 1], v, *at[j + 2 :])  # noqa: B023, E731
                wanted.append(mpmath.diff(step, at[j + 1]))
            for got, want in zip((out[i], *(g[i] for g in grads)), wanted, strict=True):
                assert abs(float(got) - float(want)) <= 1e-5 * abs(float(want)) + 1e-37


def test_a_dispersion_per_gene(backend):
    """The gradient of a dispersion per gene is the sum over cells, in zero rows and others."""
    g = torch.Generator().manual_seed(0)
    x = torch.poisson(torch.rand(6, 800, generator=g) * 9, generator=g)
    x[:3] *= torch.rand(3, 800, generator=g) < 0.1
    m, t = torch.randn(2, 6, 800, generator=g), torch.randn(800, generator=g)
    x, m, t = x.to(DEVICE), m.to(DEVICE).requires_grad_(), t.to(DEVICE).requires_grad_()
    wide = t.detach().expand(2, 6, 800).clone().requires_grad_()
    row, full = (ops.negative_binomial_log_prob(x, m, p) for p in (t, wide))
    torch.testing.assert_close(row, full, rtol=1e-6, atol=0)
    found, whole = torch.autograd.grad(row.sum(), t)[0], torch.autograd.grad(full.sum(), wide)[0]
    torch.testing.assert_close(found, whole.sum((0, 1)), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("inflated", [False, True])
@pytest.mark.parametrize("form", ["number", "row", "learned"])
def test_parameters_fixed_in_the_likelihood(backend, inflated, form):
    """A decoder returns the parameters not fixed in the likelihood, in order, with equal results."""
    k, b, genes = 3, 4, 7
    g = torch.Generator().manual_seed(1)
    x = torch.poisson(torch.rand(b, genes, generator=g) * 3, generator=g).to(DEVICE)
    mean, logit = (torch.randn(k * b, genes, generator=g).to(DEVICE) for _ in range(2))
    fixed = 3.0 if form == "number" else torch.rand(genes, generator=g).to(DEVICE) + 0.5
    kind = ZeroInflatedNegativeBinomial if inflated else NegativeBinomial
    likelihood = kind(fixed, learned=form == "learned").to(DEVICE)
    spread = torch.as_tensor(fixed, device=DEVICE).log().expand(k * b, genes)
    some, every = (mean, logit) if inflated else mean, (mean, spread, *([logit] if inflated else []))
    q = torch.zeros(b, 2 * 5, device=DEVICE)
    bounds = [
        fastvae.iwae(
            x, q, lambda z, o=o: o, k=k, likelihood=how, generator=torch.Generator(DEVICE).manual_seed(2)
        )
        for how, o in ((likelihood, some), (kind.name, every))
    ]
    torch.testing.assert_close(*bounds, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(likelihood.mean(some), kind().mean(every))
    if form == "learned":
        (grad,) = torch.autograd.grad(bounds[0], likelihood.log_inverse_dispersion)
        assert grad.shape == (genes,) and bool(grad.isfinite().all())
    with pytest.raises(
        TypeError, match=r"decoder of \w*NegativeBinomial\(inverse_dispersion=...\) must return"
    ):
        fastvae.iwae(x, q, lambda z: every, k=k, likelihood=likelihood)


def test_large_counts_near_their_mean(backend):
    """Where a large count is near its mean, terms of thousands cancel to a few units."""
    x, t = torch.full((5, 1), 1e7, device=DEVICE), torch.full((5, 1), 20.0, device=DEVICE)
    log_mean = torch.log(x) + torch.tensor([-6e-4, -3e-4, 1e-5, 3e-4, 6e-4], device=DEVICE)[:, None]
    got = ops.negative_binomial_log_prob(x, log_mean, t)
    expected = [float(exact(1e7, float(m), 20.0)[0]) for m in log_mean]
    # A few roundings of values near 10; in the reference, which has a count's logarithm in float32 only, that
    # rounding of 1e-6 times x times the distance.
    atol = 1e7 * 1e-6 * 6e-4 if backend == "reference" else 3e-5
    torch.testing.assert_close(got.tolist(), expected, rtol=0, atol=atol)
