"""Hierarchical latents against an exact model, the objectives written out, and a single level."""

from __future__ import annotations

import copy
import functools
import math

import pytest
import torch
from torch import nn

import fastvae
from fastvae.distributions import DiagonalNormal, Hierarchy, Level, StandardNormal, TorchDistribution
from fastvae.likelihoods import Gaussian

from .conftest import DEVICE
from .models import evaluate_parts, generator, randn, seed_of

pytestmark = pytest.mark.usefixtures("one_thread")

B, K, X = 5, 4, 7
D = D1, D2 = 2, 3
MERGES = [None, "residual", "precision"]
F64 = torch.float64


class Module(nn.Module):
    """Module of a function, with its tensors as parameters."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, *args):
        return self.function(self, *args)


class TwoLevels:
    """Two-level linear Gaussian model whose posterior is diagonal in both levels.

    z_1 ~ N(0, I), z_2 ~ N(A z_1 + a, V), x ~ N(W z_2 + c, s^2 I).

    W's columns are orthogonal with lengths g, so p(z_2|z_1, x) has the precision 1/v + g^2/s^2; and A =
    G^-1/2 Q, G = g^2 / (v g^2 + s^2), with Q's columns orthogonal with lengths b, so p(z_1|x) has 1 + b^2.
    """

    def __init__(self, scale=0.6):
        self.gain, self.scale = torch.linspace(0.5, 1.5, D2, dtype=F64, device=DEVICE), scale
        self.weight = torch.linalg.qr(randn(X, D2, seed=1, dtype=F64))[0] * self.gain
        self.variance = torch.tensor([0.3, 1.1, 0.7], dtype=F64, device=DEVICE)
        self.strength = torch.tensor([0.8, 1.7], dtype=F64, device=DEVICE)
        self.inner = self.gain**2 / (self.variance * self.gain**2 + scale**2)
        columns = torch.linalg.qr(randn(D2, D1, seed=4, dtype=F64))[0] * self.strength
        self.down = self.inner.rsqrt()[:, None] * columns
        self.shift, self.offset = randn(D2, seed=5, dtype=F64), randn(X, seed=2, dtype=F64)
        self.likelihood = Gaussian(scale=scale)

    def decoder(self, z):
        return z[:, D1:] @ self.weight.T + self.offset

    def sample(self, batch=B):
        z = randn(batch, D1, seed=6, dtype=F64) @ self.down.T + self.shift
        z = z + self.variance.sqrt() * randn(batch, D2, seed=7, dtype=F64)
        return z @ self.weight.T + self.offset + self.scale * randn(batch, X, seed=8, dtype=F64)

    def log_px(self, x):
        weight = self.weight @ self.down
        covariance = weight @ weight.T + self.weight * self.variance @ self.weight.T
        covariance = covariance + self.scale**2 * torch.eye(X, dtype=F64, device=DEVICE)
        mean = self.weight @ self.shift + self.offset
        return torch.distributions.MultivariateNormal(mean, covariance).log_prob(x)

    def hierarchy(self, merge, learned=False):
        """Return the exact posterior, its parameters in the modules."""
        logvar = self.variance.log()
        # Evidence of x: W^T (x - c), whose precision alone is g^2 / s^2.
        evidence = self.gain**2 / self.scale**2
        posterior = -torch.log(1 / self.variance + evidence)

        def prior(m, z):
            mean = z @ m.down.T + m.shift
            return mean, m.logvar.expand(mean.shape)

        def first(m, h):
            centred = h - self.gain**2 * self.shift
            # h = W^T (x - c) has covariance g^2 (v g^2 + s^2) given z_1.
            mean = (centred / (self.variance * self.gain**2 + self.scale**2)) @ self.down * m.gain
            return mean, m.logvar.expand(mean.shape)

        def second(m, h, *z):
            if merge == "precision":
                return h / self.gain**2 + m.bias, (m.logvar - evidence.log()).expand(h.shape)
            mean = z[0] @ self.down.T + self.shift
            if merge is None:
                mu = posterior.exp() * (mean / self.variance + h / self.scale**2)
                return mu + m.bias, (posterior + m.logvar).expand(mu.shape)
            shift = posterior.exp() * (h - self.gain**2 * mean) / self.scale**2
            return shift + m.bias, (posterior - logvar + m.logvar).expand(shift.shape)

        p2 = Module(prior, down=self.down, shift=self.shift, logvar=logvar)
        q1 = Module(first, gain=1 / (1 + self.strength**2), logvar=-torch.log1p(self.strength**2))
        zeros = torch.zeros(D2, dtype=F64, device=DEVICE)
        q2 = Module(second, bias=zeros, logvar=zeros.clone())
        return Hierarchy([Level(D1, q1), Level(D2, q2, prior=p2, merge=merge)])

    def features(self, x):
        return (x - self.offset) @ self.weight


@pytest.mark.parametrize("merge", MERGES)
def test_an_exact_posterior_gives_equal_weights(backend, merge):
    model = TwoLevels()
    x = model.sample()
    hierarchy = model.hierarchy(merge)
    q = hierarchy(model.features(x))
    options = {"likelihood": model.likelihood}
    exact = model.log_px(x)
    close = functools.partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11)
    parts = fastvae.log_weights(x, q, model.decoder, k=K, prior=hierarchy, **options)
    close(parts.log_likelihood + parts.log_ratio, exact.expand(K, B))
    close(fastvae.iwae(x, q, model.decoder, k=K, reduction="none", **options), exact)
    # One draw's log-ratio; the closed-form KL has the noise of one level's mean.
    close(fastvae.elbo(x, q, model.decoder, kl="mc", k=K, reduction="none", **options), exact)
    result = fastvae.log_marginal(x, q, model.decoder, k=50, k_chunk=7, **options)
    close(result.log_px, exact)
    assert float(result.log_px_stderr.max()) < 1e-6


@pytest.mark.parametrize("merge", MERGES)
def test_the_analytic_kl_is_the_mean_of_the_log_ratio(merge):
    """The analytic KL has the log-ratio's mean and less variance: given z_1, that of z_2 is exact."""
    model = TwoLevels()
    x = model.sample()
    hierarchy = model.hierarchy(merge)
    q = hierarchy(model.features(x))
    n = 20000
    terms = fastvae.elbo(
        x, q, model.decoder, k=n, terms=True, likelihood=model.likelihood, generator=generator(1)
    )
    _, ratio = q.rsample_log_ratio(hierarchy, n, seed_of(1))
    error = ratio.std(0) / math.sqrt(n)
    assert bool(((terms.kl + ratio.mean(0)).abs() < 5 * error).all())
    _, kl = q.rsample_kl(hierarchy, n, seed_of(1))
    assert kl.shape == (n, B) and bool((kl.std(0) < 0.8 * ratio.std(0)).all())
    torch.testing.assert_close(terms.kl, kl.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(terms.bound, terms.log_likelihood - terms.kl, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("merge", MERGES)
def test_stl_gradients_vanish_at_the_exact_posterior(merge):
    """At the exact posterior, STL's gradient of q's parameters is 0 per sample; the plain one's is not."""
    model = TwoLevels()
    x = model.sample()
    hierarchy = model.hierarchy(merge)
    q = hierarchy(model.features(x))
    own = [p for level in hierarchy.levels for p in level.posterior.parameters()]

    def gradients(estimator):
        value = fastvae.iwae(x, q, model.decoder, k=1, likelihood=model.likelihood, estimator=estimator)
        return torch.autograd.grad(value, own)

    assert all(float(g.abs().max()) < 1e-10 for g in gradients("stl"))
    assert all(float(g.abs().max()) > 1e-3 for g in gradients("iwae"))


class Networks(nn.Module):
    """Three levels of random networks in float64, the last with a deterministic path."""

    def __init__(self, merge, features=6, dims=(2, 3, 4), deterministic=True):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            a, b, c = dims
            wide = 5 if deterministic else a + b

            def net(i, o):
                return nn.Sequential(nn.Linear(i, 8), nn.Tanh(), nn.Linear(8, o))

            class Conditioning(nn.Module):
                def __init__(self, i, o):
                    super().__init__()
                    self.net = net(i, o)

                def forward(self, *args):
                    return self.net(torch.cat(args, 1))

            def posterior(i, state, o):
                return Conditioning(i + (0 if merge == "precision" else state), 2 * o)

            mu, logvar = (nn.Parameter(0.3 * torch.randn(a)) for _ in range(2))
            self.bottom = nn.Linear(X, features)
            self.hierarchy = Hierarchy([
                Level(a, Conditioning(features, 2 * a), prior=DiagonalNormal(mu, logvar), merge=merge),
                Level(b, posterior(features, a, b), prior=net(a, 2 * b), merge=merge),
                Level(c, posterior(features, wide, c), prior=net(wide, 2 * c), merge=merge,
                      top_down=Conditioning(b + a, wide) if deterministic else None),
            ])  # fmt: skip
            self.decoder = nn.Linear(sum(dims), X)
        self.to(DEVICE, F64)

    def features(self, x):
        return torch.tanh(self.bottom(x))

    def forward(self, x):
        return self.hierarchy(self.features(x))

    def written_out(self, x, k, seed, merge, fixed=False, cut=False):
        """Return log p(x|z), each level's KL given those above, log p(z) and log q(z|x), by torch."""
        Normal = torch.distributions.Normal
        h = self.features(x).repeat(k, 1)
        zs, state, kl, log_p, log_q = [], None, 0, 0, 0
        for i, level in enumerate(self.hierarchy.levels):
            if i == 0:
                p = level.prior
                m, v = (t.expand(k * len(x), -1) for t in (p.mu, p.logvar))
            else:
                state = zs[0] if i == 1 else torch.cat(zs, 1)
                if level.top_down is not None:
                    state = level.top_down(zs[1], zs[0])
                m, v = level.prior(state).chunk(2, 1)
            beside = () if i == 0 or merge == "precision" else (state,)
            mu, logvar = level.posterior(h, *beside).chunk(2, 1)
            if merge == "residual":
                mu, logvar = m + mu, v + logvar
            if merge == "precision":
                precision = torch.exp(-logvar) + torch.exp(-v)
                mu = (mu * torch.exp(-logvar) + m * torch.exp(-v)) / precision
                logvar = -precision.log()
            q, p = Normal(mu, torch.exp(0.5 * logvar)), Normal(m, torch.exp(0.5 * v))
            eps = fastvae.random.normal(seed, k, len(x), level.dim, level=i, dtype=F64, device=DEVICE)
            z = q.loc + q.scale * eps.flatten(0, 1)
            zs.append(z)
            kl = kl + torch.distributions.kl_divergence(q, p).sum(1)
            log_p, log_q = log_p + p.log_prob(z).sum(1), log_q + q.log_prob(z).sum(1)
        mean = self.decoder(torch.cat(zs, 1))
        log_likelihood = Normal(mean, 0.7).log_prob(x.repeat(k, 1)).sum(1)
        return [t.unflatten(0, (k, len(x))) for t in (log_likelihood, kl, log_p, log_q)]


LIKELIHOOD = Gaussian(scale=0.7)


def data(batch=B):
    return randn(batch, X, seed=11, dtype=F64)


@pytest.mark.parametrize("deterministic", [False, True], ids=["side by side", "top_down"])
@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("objective", ["elbo", "elbo mc", "iwae"])
def test_values_and_gradients_equal_the_formulas(backend, objective, merge, deterministic):
    model = Networks(merge, deterministic=deterministic)
    x = data()
    options = {"likelihood": LIKELIHOOD, "generator": generator(2), "reduction": "none"}
    q = model(x)
    if objective == "iwae":
        found = fastvae.iwae(x, q, model.decoder, k=K, **options)
    else:
        kl = "mc" if objective == "elbo mc" else "analytic"
        found = fastvae.elbo(x, q, model.decoder, k=K, beta=0.7, kl=kl, **options)
    log_likelihood, kl, log_p, log_q = model.written_out(x, K, seed_of(2), merge)
    expected = {
        "elbo": lambda: (log_likelihood - 0.7 * kl).mean(0),
        "elbo mc": lambda: (log_likelihood + 0.7 * (log_p - log_q)).mean(0),
        "iwae": lambda: torch.logsumexp(log_likelihood + log_p - log_q, 0) - math.log(K),
    }[objective]()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    weight = randn(B, seed=12, dtype=F64)
    parameters = list(model.parameters())
    grads, truths = (torch.autograd.grad((v * weight).sum(), parameters) for v in (found, expected))
    for g, truth in zip(grads, truths, strict=True):
        torch.testing.assert_close(g, truth, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("merge", MERGES)
def test_log_prob_equals_the_density_of_the_draws(merge):
    model = Networks(merge)
    q, p = model(data()), model.hierarchy
    z, log_q = q.rsample_log_prob(K, seed_of(3), sample_offset=2, row_offset=1)
    _, log_ratio = q.rsample_log_ratio(p, K, seed_of(3), sample_offset=2, row_offset=1)
    torch.testing.assert_close(q.log_prob(z), log_q, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(p.log_prob(z), log_q + log_ratio, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(p.log_prob(z[0, 0]), p.log_prob(z)[0, 0], rtol=1e-12, atol=1e-12)
    # For a foreign prior, by the densities.
    other = copy.deepcopy(p)
    assert q.rsample_log_ratio(other, K, seed_of(3)) is None and q.rsample_kl(other, K, seed_of(3)) is None
    bounds = [
        fastvae.iwae(
            data(), q, model.decoder, k=K, prior=prior, likelihood=LIKELIHOOD, generator=generator(4)
        )
        for prior in (None, p, other)
    ]
    assert torch.equal(bounds[0], bounds[1])
    torch.testing.assert_close(bounds[2], bounds[1], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("estimator", ["stl", "dreg"])
@pytest.mark.parametrize("merge", MERGES)
def test_estimators_keep_the_value_and_are_unbiased(merge, estimator):
    """Each parameter's mean gradient over many draws is IWAE's, also if shared by p and q."""
    model = Networks(merge)
    k, rows, parts = 1 if estimator == "stl" else 3, 100, 20
    x = data(2).repeat(rows, 1)
    parameters = [p for p in model.parameters() if p.dim() == 1]

    def run(estimator, seed):
        """Return means over parts of the draws, whose spread gives the error."""
        values, grads = [], []
        for part in range(parts):
            value = fastvae.iwae(
                x, model(x), model.decoder, k=k, likelihood=LIKELIHOOD, estimator=estimator,
                row_offset=part * len(x), generator=generator(seed),
            )  # fmt: skip
            values.append(value.detach())
            grads.append(torch.autograd.grad(value, parameters))
        return torch.stack(values), [torch.stack(g) for g in zip(*grads, strict=True)]

    values, found = run(estimator, 5)
    same, _ = run("iwae", 5)
    torch.testing.assert_close(values, same, rtol=1e-10, atol=1e-10)
    _, truths = run("iwae", 6)
    for f, truth in zip(found, truths, strict=True):
        error = ((f.var(0) + truth.var(0)) / parts).sqrt()
        # Student's t with at least 19 degrees of freedom: beyond 7 with probability 1e-6.
        assert bool(((f.mean(0) - truth.mean(0)).abs() < 7 * error + 1e-12).all())


@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg"])
def test_chunks_equal_the_whole(estimator):
    model = Networks("residual")
    x = data()
    results = []
    for k_chunk in (None, 2, 1):
        value = fastvae.iwae(
            x, model(x), model.decoder, k=K + 1, k_chunk=k_chunk, estimator=estimator, likelihood=LIKELIHOOD,
            generator=generator(7),
        )  # fmt: skip
        results.append((value, *torch.autograd.grad(value, list(model.parameters()))))
    for result in results[1:]:
        for part, whole in zip(result, results[0], strict=True):
            torch.testing.assert_close(part, whole, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("objective", ["elbo", "elbo mc", "iwae", "log_marginal"])
def test_shards_equal_the_whole(objective):
    model = Networks("precision")
    x = data(9)

    def run(rows, **options):
        options = {"likelihood": LIKELIHOOD, "generator": generator(8), **options}
        q = model(x[rows])
        return {
            "elbo": lambda: fastvae.elbo(x[rows], q, model.decoder, k=3, reduction="none", **options),
            "elbo mc": lambda: fastvae.elbo(
                x[rows], q, model.decoder, k=3, kl="mc", reduction="none", **options
            ),
            "iwae": lambda: fastvae.iwae(x[rows], q, model.decoder, k=3, reduction="none", **options),
            "log_marginal": lambda: fastvae.log_marginal(x[rows], q, model.decoder, k=30, **options).log_px,
        }[objective]()

    whole = run(slice(0, 9))
    torch.testing.assert_close(run(slice(4, 9), row_offset=4), whole[4:], rtol=1e-10, atol=1e-10)
    assert float((run(slice(4, 9)) - whole[4:]).detach().abs().max()) > 1e-3


def test_rows_of_a_posterior():
    q = Networks(None)(data())
    part = q.rows(1, 4)
    assert part.batch == 3
    z, log_q = q.rsample_log_prob(K, seed_of(9))
    z_part, log_q_part = part.rsample_log_prob(K, seed_of(9), row_offset=1)
    torch.testing.assert_close(z_part, z[:, 1:4], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(log_q_part, log_q[:, 1:4], rtol=1e-12, atol=1e-12)


def test_evaluated(tmp_path):
    """Evaluates to a tolerance, from a checkpoint, and in any batches; where q is inexact, it draws more."""
    model = TwoLevels()
    hierarchy = model.hierarchy("residual")
    x = model.sample(11)

    def encoder(x):
        return hierarchy(model.features(x) + 0.5 * x[:, :1].relu())

    options = {"k": 1600, "tol": 0.03, "likelihood": model.likelihood, "progress": False}
    path = tmp_path / "state.npz"
    first, again, whole = (
        evaluate_parts(encoder, model.decoder, x, generator=generator(10), **place, **options)
        for place in (
            {"batch_size": 4, "checkpoint": path},
            {"batch_size": 4, "checkpoint": path},
            {"batch_size": 11, "k_chunk": 60},
        )
    )
    assert torch.equal(first.log_px, again.log_px)
    assert torch.equal(first.k, whole.k) and int(whole.k.min()) == 100 < int(whole.k.max())
    torch.testing.assert_close(first.log_px, whole.log_px, rtol=1e-9, atol=1e-9)
    off = (whole.log_px - model.log_px(x).cpu()).abs()
    assert bool((off < 6 * whole.log_px_stderr + 1e-9).all())


def test_an_exact_model_is_evaluated_exactly():
    model = TwoLevels()
    x = model.sample(11)
    hierarchy = model.hierarchy("precision")
    result = evaluate_parts(
        lambda x: hierarchy(model.features(x)), model.decoder, x, k=200, batch_size=4,
        likelihood=model.likelihood, progress=False,
    )  # fmt: skip
    torch.testing.assert_close(result.log_px.double(), model.log_px(x).cpu(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("learned", [False, True], ids=["N(0, I)", "learned"])
def test_a_single_level_equals_an_ordinary_posterior(backend, dtype, learned):
    """A single level equals an ordinary posterior bit for bit."""
    mu, logvar = (randn(B, D1, seed=s, dtype=dtype).requires_grad_() for s in (1, 2))
    prior = None
    if learned:
        prior = DiagonalNormal(*(nn.Parameter(randn(D1, seed=s, dtype=dtype)) for s in (3, 4)))
    x, decoder = randn(B, X, seed=5, dtype=dtype), nn.Linear(D1, X).to(DEVICE, dtype)
    hierarchy = Hierarchy([Level(D1, lambda h: h.chunk(2, 1), prior=prior)])
    leaves = [mu, logvar, *decoder.parameters(), *hierarchy.parameters()]

    def run(q, prior):
        o = {"likelihood": LIKELIHOOD, "prior": prior, "reduction": "none"}
        values = [
            fastvae.elbo(x, q, decoder, k=K, generator=generator(1), **o),
            fastvae.elbo(x, q, decoder, k=K, free_bits=0.3, generator=generator(1), **o),
            fastvae.elbo(x, q, decoder, k=K, kl="mc", generator=generator(1), **o),
            fastvae.iwae(x, q, decoder, k=K, generator=generator(1), **o),
            fastvae.iwae(x, q, decoder, k=K, k_chunk=3, generator=generator(1), **o),
        ]
        total = torch.stack(values).sum()
        return *values, *torch.autograd.grad(total, leaves)

    for a, b in zip(run((mu, logvar), prior), run(hierarchy(torch.cat([mu, logvar], 1)), None), strict=True):
        assert torch.equal(a, b)


def test_free_bits_apply_to_each_dimension():
    model = Networks("residual")
    x = data()
    options = {"likelihood": LIKELIHOOD, "k": K}
    q = model(x)
    _, kl = q.rsample_kl(model.hierarchy, K, seed_of(1), per_dimension=True)
    assert kl.shape == (B, 9)
    _, summed = q.rsample_kl(model.hierarchy, K, seed_of(1))
    torch.testing.assert_close(kl.sum(1), summed.mean(0), rtol=1e-10, atol=1e-10)
    floor = float(kl.mean(0).median().detach())
    terms = fastvae.elbo(x, q, model.decoder, free_bits=floor, terms=True, generator=generator(1), **options)
    expected = kl.mean(0).clamp(min=floor).sum().expand(B)
    torch.testing.assert_close(terms.kl, expected, rtol=1e-10, atol=1e-10)
    assert bool(expected[0] > kl.mean(0).sum())


@pytest.mark.parametrize("merge", ["residual", "precision"])
def test_kl_is_accurate_near_the_prior(merge):
    """The KL is accurate in float32 for means of 1e3 that differ by 1e-4 deviations, variances by 1e-4."""
    mean, logvar = torch.full((1, D2), 1e3, device=DEVICE), torch.full((1, D2), -3.0, device=DEVICE)
    small = 1e-4

    def posterior(h, *state):
        ones = torch.ones(len(h), D2, device=DEVICE)
        if merge == "residual":
            return small * ones, small * ones
        return (1e3 + 2**-10) * ones, (9.0 - 3) * ones

    hierarchy = Hierarchy([
        Level(D1, lambda h: (h[:, :D1], h[:, :D1])),
        Level(D2, posterior, prior=lambda z: (mean.repeat(len(z), 1), logvar.repeat(len(z), 1)), merge=merge),
    ])  # fmt: skip
    q = hierarchy(torch.zeros(B, X, device=DEVICE))
    _, kl = q.rsample_kl(hierarchy, K, seed_of(1))
    precision = math.exp(3.0)
    if merge == "residual":
        shift, stretch = small, small
    else:
        share = 1 / (1 + math.exp(9.0))
        shift, stretch = share * 2**-10, math.log1p(-share)
    expected = 0.5 * D2 * (shift**2 * precision + math.expm1(stretch) - stretch)
    # Some ten roundings of float32.
    torch.testing.assert_close(
        kl.double(), torch.full((K, B), expected, dtype=F64, device=DEVICE), rtol=2e-6, atol=0
    )


def test_shapes_of_latents():
    """Levels with channels and positions keep their shapes in modules; the decoder gets them concatenated."""
    seen = []

    def note(name, *tensors):
        seen.append((name, *(tuple(t.shape) for t in tensors)))

    class Conv(nn.Module):
        def __init__(self, name, channels, out):
            super().__init__()
            self.name, self.conv = name, nn.Conv2d(channels, out, 1)

        def forward(self, *parts):
            note(self.name, *parts)
            return self.conv(torch.cat(parts, 1))

    up = nn.Upsample(scale_factor=2)
    hierarchy = Hierarchy([
        Level((3, 2, 2), Conv("q1", 5, 6)),
        Level((1, 2, 2), Conv("q2", 8, 2), prior=Conv("p2", 3, 2), merge="residual"),
        Level((2, 4, 4), Conv("q3", 9, 4), prior=Conv("p3", 4, 4), merge="residual",
              top_down=lambda z, state: up(torch.cat([z, state], 1))),
    ]).to(DEVICE)  # fmt: skip
    small, large = randn(B, 5, 2, 2, seed=1), randn(B, 5, 4, 4, seed=2)
    decoder = nn.Linear(12 + 4 + 32, X).to(DEVICE)
    q = hierarchy([small, small, large])
    assert fastvae.iwae(randn(B, X, seed=3), q, decoder, k=K, likelihood=LIKELIHOOD).isfinite()
    n = K * B
    assert seen == [
        ("q1", (B, 5, 2, 2)),
        ("q2", (n, 5, 2, 2), (n, 3, 2, 2)), ("p2", (n, 3, 2, 2)),
        ("q3", (n, 5, 4, 4), (n, 4, 4, 4)), ("p3", (n, 4, 4, 4)),
    ]  # fmt: skip
    parts = hierarchy.split(hierarchy.sample(6, dim=48, device=DEVICE))
    assert [tuple(p.shape) for p in parts] == [(6, 3, 2, 2), (6, 1, 2, 2), (6, 2, 4, 4)]
    with pytest.raises(ValueError, match=r"above level 3 have the shapes \(3, 2, 2\), \(1, 4, 4\).*top_down"):
        Hierarchy([Level((3, 2, 2), up), Level((1, 4, 4), up, prior=up), Level(2, up)])


def test_networks_run_once_per_draw():
    """Networks run once per draw, and a posterior of features alone once for all samples."""
    calls = []

    class Counted(nn.Linear):
        def forward(self, *args):
            calls.append((self.name, len(args[0])))
            return super().forward(args[0])

    def counted(name, i, o):
        module = Counted(i, o).to(DEVICE)
        module.name = name
        return module

    hierarchy = Hierarchy([
        Level(D1, counted("q1", X, 2 * D1)),
        Level(D2, counted("q2", X, 2 * D2), prior=counted("p2", D1, 2 * D2), merge="precision"),
    ])  # fmt: skip
    x, decoder = randn(B, X, seed=1), nn.Linear(sum(D), X).to(DEVICE)
    q = hierarchy(x)
    for run in (fastvae.elbo, fastvae.iwae):
        calls.clear()
        run(x, q, decoder, likelihood=LIKELIHOOD, k=K)
        assert sorted(calls) == [("p2", K * B), ("q1", B), ("q2", B)]


class Dropped(nn.Module):
    """Dropout by torch's generator that keeps its first mask in ``last``, or applies ``mask``."""

    def __init__(self):
        super().__init__()
        self.mask = self.last = None

    def forward(self, h):
        fixed = None if self.mask is None else self.mask[: len(h)]
        mask = torch.rand(h.shape, dtype=h.dtype, device=h.device) if fixed is None else fixed
        self.last = mask if self.last is None else self.last
        return h * (mask > 0.3)


class Noisy(nn.Module):
    """Encoder and hierarchy whose networks have dropout, or another module that ``last`` makes."""

    def __init__(self, merge, last=Dropped):
        super().__init__()

        def network(i, o):
            layers = nn.Sequential(nn.Linear(i, 11), nn.Tanh(), last(), nn.Linear(11, o))
            function = Module(lambda own, *given: own.layers(torch.cat(given, 1)))
            function.layers = layers
            return function

        below = X if merge == "precision" else X + 4
        self.decoder = nn.Linear(D1 + D2, X)
        self.hierarchy = Hierarchy([
            Level(D1, network(X, 2 * D1)),
            Level(D2, network(below, 2 * D2), prior=network(4, 2 * D2), merge=merge,
                  top_down=network(D1, 4)),
        ])  # fmt: skip
        self.to(DEVICE, F64)

    def run(self, estimator, **options):
        """Return the bound of an estimator, its gradients, and the random state after it."""
        torch.manual_seed(3)
        options |= {"likelihood": LIKELIHOOD, "k": K, "generator": generator(1)}
        x, q = data(), self.hierarchy(data())
        if estimator == "groups":
            encoders, whole = fastvae.bounds.IWAE(groups=2), fastvae.bounds.IWAE()
            value = fastvae.bound(x, q, self.decoder, whole, q_objective=encoders, **options)
        elif estimator == "tvo":
            value = fastvae.bound(x, q, self.decoder, fastvae.bounds.TVO(), **options)
        else:
            value = fastvae.iwae(x, q, self.decoder, estimator=estimator, **options)
        return value, torch.autograd.grad(value, list(self.parameters())), torch.get_rng_state()


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize("estimator", ["stl", "dreg", "groups", "tvo"])
def test_dropout_masks_are_those_of_the_draw(merge, estimator):
    """Each density has the masks of the draw, so that value and gradients are those of fixed masks."""
    model = Noisy(merge)
    value, grads, state = model.run(estimator)
    plain, _, state_of_iwae = model.run("iwae")
    if estimator != "tvo":
        torch.testing.assert_close(value, plain, rtol=1e-10, atol=1e-10)
    assert DEVICE.type != "cpu" or torch.equal(state, state_of_iwae)
    chunked = model.run(estimator, k_chunk=K)[1] if estimator in ("stl", "dreg") else grads
    for module in model.modules():
        if isinstance(module, Dropped):
            module.mask = module.last
    fixed, fixed_grads, _ = model.run(estimator)
    torch.testing.assert_close(value, fixed, rtol=1e-10, atol=1e-10)
    for one, other, in_chunks in zip(grads, fixed_grads, chunked, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(in_chunks, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("estimator", ["stl", "dreg", "groups", "tvo"])
def test_buffers_are_updated_once_per_draw(estimator):
    """BatchNorm's statistics after a step do not depend on the estimator."""
    states = []
    for each in ("iwae", estimator):
        torch.manual_seed(0)
        model = Noisy("residual", last=lambda: nn.BatchNorm1d(11))
        model.run(each)
        states.append(dict(model.named_buffers()))
    counts = [int(t) for name, t in states[0].items() if name.endswith("tracked")]
    assert counts == [1] * 4
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-10, atol=1e-12)


def test_a_weight_that_buffers_determine_is_that_of_the_draw():
    """Spectral norm, whose power iteration changes a weight in each run, changes no estimator's value."""
    values = []
    for estimator in ("iwae", "stl", "dreg"):
        torch.manual_seed(0)
        model = Noisy("residual", last=lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(11, 11)))
        values.append(model.run(estimator)[0])
    torch.testing.assert_close(values[1:], [values[0]] * 2, rtol=1e-10, atol=1e-10)


def test_dropout_in_a_compiled_graph_is_refused_or_repeated():
    """A compiled graph cannot repeat masks: with fullgraph=True it is refused, without it runs as eager."""
    model = Noisy("residual", last=lambda: nn.Dropout(0.3))

    def step(x):
        return fastvae.iwae(x, model.hierarchy(x), model.decoder, k=K, estimator="stl", likelihood=LIKELIHOOD)

    torch._dynamo.reset()
    with pytest.raises(Exception, match="dropout"):
        torch.compile(step, backend="aot_eager", fullgraph=True)(data())
    model.eval()
    torch._dynamo.reset()
    compiled, values = torch.compile(step, backend="aot_eager", fullgraph=True), []
    for function in (step, compiled):
        torch.manual_seed(2)
        values.append(function(data()))
    torch.testing.assert_close(*values, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("wrap", [lambda q: q, lambda q: fastvae.distributions.Mixture([q])])
def test_the_number_of_latents_is_known_without_a_run(wrap):
    """A posterior names D without running its networks, and so do a VAE and the sleep phase."""
    calls = []

    class Counted(nn.Linear):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    hierarchy = Hierarchy([Level(D1, Counted(X, 2 * D1))]).to(DEVICE)
    assert wrap(hierarchy(data().float())).known_dim == D1 and not calls
    decoder = nn.Linear(D1, X).to(DEVICE)
    encoder = Module(lambda own, x: wrap(own.hierarchy(x)))
    encoder.hierarchy = hierarchy
    vae = fastvae.VAE(encoder, decoder, likelihood=LIKELIHOOD, latent_dim=D1)
    vae.posterior(data().float())
    assert not calls
    fastvae.sleep(encoder, decoder, B, latent_dim=D1, likelihood=Gaussian(scale=0.7))
    assert len(calls) == 1
    vae.latent_dim = D1 + 1
    with pytest.raises(ValueError, match="latent_dim"):
        vae.posterior(data().float())


def test_samples_follow_the_prior():
    """Samples have the exact model's mean and covariance."""
    model = TwoLevels()
    hierarchy = model.hierarchy(None)
    n = 40000
    with torch.no_grad():
        z = hierarchy.sample(n, device=DEVICE, generator=generator(3))
    assert z.dtype == F64
    eye = torch.eye(D1, dtype=F64, device=DEVICE)
    lower = model.down @ model.down.T + torch.diag(model.variance)
    covariance = torch.cat([torch.cat([eye, model.down.T], 1), torch.cat([model.down, lower], 1)])
    mean = torch.cat([torch.zeros(D1, dtype=F64, device=DEVICE), model.shift])
    deviation = covariance.diagonal().sqrt()
    assert bool(((z.mean(0) - mean).abs() < 5 * deviation / math.sqrt(n)).all())
    centred = z - mean
    variances = covariance.diagonal()
    error = (variances * variances[:, None] + covariance**2).sqrt() / math.sqrt(n)
    assert bool(((centred.T @ centred / n - covariance).abs() < 5 * error).all())
    exact = torch.distributions.MultivariateNormal(mean, covariance).log_prob(z[:9])
    torch.testing.assert_close(hierarchy.log_prob(z[:9]), exact, rtol=1e-10, atol=1e-10)


def test_the_mean_is_the_chain_of_means():
    """The chain of means is the posterior mean of a linear model."""
    model = TwoLevels()
    x = model.sample()
    q = model.hierarchy("residual")(model.features(x))
    z, _ = q.rsample_log_prob(40000, seed_of(4))
    error = z.std(0) / math.sqrt(len(z))
    assert bool(((z.mean(0) - q.mean).abs() < 5 * error).all())


def test_in_a_vae():
    model = Networks("residual")
    vae = fastvae.VAE(model, model.decoder, likelihood=LIKELIHOOD).to(DEVICE)
    x = data()
    assert vae.prior is model.hierarchy and vae.latent_dim == 9
    found = vae.elbo(x, k=K, generator=generator(1))
    expected = fastvae.elbo(x, model(x), model.decoder, k=K, likelihood=LIKELIHOOD, generator=generator(1))
    assert torch.equal(found, expected)
    assert vae.sample(6).shape == (6, X) and vae.reconstruct(x).shape == (B, X)
    assert vae.log_marginal(x, k=9).log_px.shape == (B,)
    assert vae.evaluate(x, k=9, progress=False).log_px.shape == (B,)
    assert vae.reconstruction_log_prob(x, k=9).shape == (B,)
    copied = copy.deepcopy(vae)
    assert torch.equal(copied.elbo(x, k=K, generator=generator(1)), expected)
    with pytest.raises(ValueError, match="2 hierarchies"):
        fastvae.VAE(nn.ModuleList([model.hierarchy, copied.prior]), model.decoder)


def test_ordinary_priors_and_posteriors_combine_with_hierarchies():
    model = Networks(None)
    x = data()
    options = {"likelihood": LIKELIHOOD, "generator": generator(1), "k": K}
    z, log_q = model(x).rsample_log_prob(K, seed_of(1))
    standard = StandardNormal()
    ratio = fastvae.log_weights(x, model(x), model.decoder, prior=standard, **options).log_ratio
    torch.testing.assert_close(ratio, standard.log_prob(z) - log_q, rtol=1e-10, atol=1e-10)
    q = randn(B, 9, seed=1, dtype=F64), randn(B, 9, seed=2, dtype=F64)
    options["generator"] = generator(1)
    ratio = fastvae.log_weights(x, q, model.decoder, prior=model.hierarchy, **options).log_ratio
    z, log_q = DiagonalNormal(*q).rsample_log_prob(K, seed_of(1))
    torch.testing.assert_close(ratio, model.hierarchy.log_prob(z) - log_q, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
@pytest.mark.parametrize("merge", MERGES)
def test_compiled(objective, merge):
    model = Networks(merge).float()
    x = data().float()
    run = functools.partial(getattr(fastvae, objective), likelihood=LIKELIHOOD)

    def step(x):
        return run(x, model(x), model.decoder)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    results = []
    for function in (step, compiled):
        torch.manual_seed(1)
        value = function(x)
        results.append((value, *torch.autograd.grad(value, list(model.parameters()))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_half_precision():
    """In half precision, densities are summed in float32, and z has the modules' dtype."""
    model = Networks("residual").to(torch.bfloat16)
    q = model(data().bfloat16())
    z, log_q = q.rsample_log_prob(K, seed_of(1))
    assert z.dtype == torch.bfloat16 and log_q.dtype == torch.float32
    assert fastvae.elbo(data().bfloat16(), q, model.decoder, likelihood=LIKELIHOOD).isfinite()
    vae = fastvae.VAE(model, model.decoder, likelihood=LIKELIHOOD)
    assert vae.reconstruct(data().bfloat16()).dtype == torch.bfloat16


def test_parameters_in_a_closure_cannot_be_frozen():
    net = nn.Linear(D1, 2 * D2).to(DEVICE)
    hierarchy = Hierarchy([
        Level(D1, lambda h: h[:, : 2 * D1]), Level(D2, lambda h, z: net(z), prior=lambda z: net(z)),
    ])  # fmt: skip
    x, decoder = randn(B, X, seed=1), nn.Linear(sum(D), X).to(DEVICE)
    assert fastvae.iwae(x, hierarchy(x), decoder, k=K, likelihood=LIKELIHOOD).isfinite()
    with pytest.raises(RuntimeError, match="HierarchicalPosterior.log_prob with its parameters frozen"):
        fastvae.iwae(x, hierarchy(x), decoder, k=K, likelihood=LIKELIHOOD, estimator="stl")


def _narrow(h, *state):
    return h[:, :3], h[:, :3]


def _right(h, *state):
    return h[:, :D2], h[:, :D2]


MISTAKES = {
    "no level": (lambda: Hierarchy([]), ValueError, "levels is empty"),
    "no list": (lambda: Hierarchy(Level(2, _right)), TypeError, "levels must be a list"),
    "no module": (lambda: Level(2, "q"), TypeError, "posterior must be a module"),
    "a dim of 0": (lambda: Level((2, 0), _right), ValueError, "dim must be at least 1"),
    "a dim that is none": (lambda: Level(2.5, _right), TypeError, "dim must be an int"),
    "a merge": (lambda: Level(2, _right, merge="sum"), ValueError, "merge='sum' is unknown"),
    "a prior of the first": (
        lambda: Hierarchy([Level(2, _right, prior=_right)]), ValueError,
        "level 1 has a prior that is a function",
    ),
    "a path to the first": (
        lambda: Hierarchy([Level(2, _right, top_down=_right)]), ValueError, "level 1 has a top_down",
    ),
    "a family": (
        lambda: Level(2, _right, prior=TorchDistribution(torch.distributions.Laplace(0.0, 1.0))),
        TypeError, "the levels of a hierarchy are normal",
    ),
    "a prior's width": (
        lambda: Level(2, _right, prior=DiagonalNormal(torch.zeros(3), torch.zeros(()))),
        ValueError, r"prior.mu has shape \[3\]; expected \[D\] = \[2\]",
    ),
    "too few features": (
        lambda: two()([torch.ones(B, X)]), ValueError,
        "features is a list of 1, but the hierarchy has 2 levels",
    ),
    "a feature that is none": (
        lambda: two()([torch.ones(B, X), 3]), TypeError, r"features\[1\] must be a tensor",
    ),
    "rows of features": (
        lambda: two()([torch.ones(B, X), torch.ones(4, X)]), ValueError, r"features\[1\] has shape \[4, 7\]",
    ),
    "a posterior's width": (
        lambda: run(two(_narrow)), ValueError,
        r"posterior of level 1 returned a mean \[5, 3\]; expected .* \[5, 2\]",
    ),
    "a posterior's one tensor": (
        lambda: run(two(lambda h: h)), ValueError,
        r"posterior of level 1 returned a tensor \[5, 7\]; expected one tensor \[5, 4\]",
    ),
    "a posterior's family": (
        lambda: run(two(lambda h: torch.distributions.Laplace(h[:, :2], 1.0))), TypeError,
        "posterior of level 1 returned Laplace; expected a normal",
    ),
    "a prior's rows": (
        lambda: run(two(prior=lambda z: (torch.zeros(5, D2), torch.zeros(5, D2)))), ValueError,
        r"prior of level 2 returned a mean \[5, 3\]; expected .* \[20, 3\]",
    ),
    "latents": (
        lambda: two().log_prob(torch.ones(K, B, 4)), ValueError,
        "must be the 5 latents of all levels, 2 \\+ 3",
    ),
    "a dim to sample": (
        lambda: two().sample(6, dim=4), ValueError, "dim is 4, but the hierarchy has 5 latents"
    ),
    "q itself": (
        lambda: fastvae.elbo(torch.ones(B, X), two(), nn.Linear(5, X)), TypeError,
        "q is Hierarchy, which has no rows",
    ),
}  # fmt: skip


def two(posterior=lambda h: (h[:, :D1], h[:, :D1]), prior=lambda z: (z[:, [0, 1, 0]], z[:, [1, 1, 0]])):
    return Hierarchy([Level(D1, posterior), Level(D2, _right, prior=prior)])


def run(hierarchy):
    return fastvae.iwae(
        torch.ones(B, X), hierarchy(torch.ones(B, X)), nn.Linear(5, X), k=K, likelihood=LIKELIHOOD
    )


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name):
    function, kind, message = MISTAKES[name]
    with pytest.raises(kind, match=message):
        function()
