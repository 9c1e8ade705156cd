"""Quasi-Monte-Carlo noise: its words, its address, and the gain of estimates."""

from __future__ import annotations

import functools
import math
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.stats import qmc

import fastvae
from fastvae import random
from fastvae.core import backend as _backend
from fastvae.distributions import (
    DiagonalNormal,
    Distribution,
    FullNormal,
    Hierarchy,
    Laplace,
    Level,
    LowRankNormal,
    Mixture,
    StudentT,
)
from fastvae.estimation.weights import Weights, _student, between
from fastvae.likelihoods import Gaussian
from fastvae.reference import random as reference

from . import strategies
from .conftest import DEVICE
from .models import evaluate_parts

MASK = 2**32 - 1


def seeds(count, seed=7):
    return random.seed_of("qmc", torch.tensor(seed, device=DEVICE), count)


def word(seeds, sample, row, column, level):
    """Compute one word by the definition, in Python's integers."""
    key, point = int(seeds[sample % len(seeds)]) % 2**64, sample // len(seeds)
    in_net = level == 0 and column < 128
    shift = _backend.extension().philox(column // 4, row, 0 if in_net else sample, level, key)[column % 4]
    return shift ^ joe_kuo(point % 2**30, column) if in_net else shift


def joe_kuo(number, column):
    """Return a word of Sobol's sequence; SciPy's is in Gray-code order: its i-th is our i ^ (i >> 1)."""
    index, rest = 0, number
    while rest:
        index, rest = index ^ rest, rest >> 1
    if index >= 2**13:
        return sum_of_bits(number, column)
    return int(SCIPY[index, column] * 2**32)


SCIPY = qmc.Sobol(128, scramble=False, bits=32).random(2**13)


def sum_of_bits(number, column):
    """Return the word of a point beyond SciPy's first ones, from its bits and torch's table."""
    bits = (column_of(column)[j] for j in range(30) if number >> j & 1)
    return functools.reduce(operator.xor, bits, 0)


@functools.cache
def column_of(column):
    return (torch.quasirandom.SobolEngine(128).sobolstate[column] * 4).tolist()


# Words


@settings(max_examples=8)
@given(
    sizes=strategies.distinct_sizes(3, 17),
    count=st.sampled_from([1, 3, 8]),
    seed=st.integers(-(2**63), 2**63 - 1),
    data=st.data(),
)
def test_words_equal_the_definition(sizes, count, seed, data):
    k0, b0 = data.draw(st.sampled_from([0, 5, 2**32 - 17])), data.draw(st.sampled_from([0, 2**31 - 3]))
    level = data.draw(st.sampled_from([0, 0, 1, 2**32 - 1]))
    seed = seeds(count, seed)
    words = reference.words(seed, *sizes, k0, b0, level)
    for _ in range(20):
        k, b, d = (data.draw(st.integers(0, n - 1)) for n in sizes)
        assert int(words[k, b, d]) == word(seed, k0 + k, b0 + b, d, level)
    triton_words = _backend.layer("triton", "random").words(seed, *sizes, k0, b0, level)
    assert torch.equal(triton_words.long() & MASK, words)


def test_words_beyond_the_net_depend_on_their_whole_index():
    """Words beyond the net's columns, and of late points, depend on all bits of their index."""
    seed = seeds(3)
    for start in (0, 5, 2**20, 2**32 - 17):
        words = reference.words(seed, 4, 2, 139, start)
        for k, b, d in ((0, 0, 127), (3, 1, 127), (0, 0, 128), (3, 1, 131), (2, 1, 138)):
            assert int(words[k, b, d]) == word(seed, start + k, b, d, 0)
        triton_words = _backend.layer("triton", "random").words(seed, 4, 2, 139, start)
        assert torch.equal(triton_words.long() & MASK, words)


@pytest.mark.parametrize("columns", [3, 50, 127, 128, 135, 600])
def test_normals_agree_to_ulps(backend, columns):
    """Normals agree to ulps, also in C++ tiles that extend beyond the net's last column."""
    for count, level in ((1, 0), (8, 0), (3, 2)):
        address = {"sample_offset": 5, "row_offset": 2**31 - 3, "level": level}
        eps = random.normal(seeds(count), 4, 3, columns, **address)
        with fastvae.use_backend("reference"):
            exact = random.normal(seeds(count), 4, 3, columns, **address, dtype=torch.float64)
        assert bool(((eps.double() - exact).abs() <= 4 * torch.finfo(torch.float32).eps * exact.abs()).all())
        wide = random.normal(seeds(count), 4, 3, columns, **address, dtype=torch.float64)
        torch.testing.assert_close(wide, exact, rtol=1e-14, atol=1e-15)


@given(sizes=strategies.distinct_sizes(3, 33), data=st.data())
@settings(max_examples=8)
def test_offsets_give_that_part_of_the_whole(backend, sizes, data):
    k0, b0 = (data.draw(st.integers(0, n - 1)) for n in sizes[:2])
    whole = random.normal(seeds(3), *sizes)
    part = random.normal(seeds(3), sizes[0] - k0, sizes[1] - b0, sizes[2], sample_offset=k0, row_offset=b0)
    assert torch.equal(whole[k0:, b0:], part)


def test_points_fill_every_column_evenly():
    """Each of 64 intervals of a column has one of the first 64 points and one of the next, for any shift."""
    words = reference.words(seeds(1), 128, 3, 128)
    for part in words.split(64):
        assert bool((part.sort(0).values >> 26 == torch.arange(64)[:, None, None]).all())


def test_rows_and_randomisations_are_independent():
    """First points of 4000 rows, of each of two randomisations, are uniform and uncorrelated."""
    words = reference.words(seeds(2, 4), 2, 4000, 2).double() / 2**32
    columns = torch.cat([words[0, :, :2], words[1, :, :2]], 1) - 0.5  # [4000, 4]
    moments = (columns.mT @ columns) / 4000
    # A product of two has variance 1/144, a square 1/180; five standard errors.
    expected = torch.eye(4, dtype=torch.float64) / 12
    assert float((moments - expected).abs().max()) < 5 / 12 / math.sqrt(4000)


def test_neighbouring_seeds_share_no_randomisation():
    """Neighbouring seeds share no randomisation; otherwise two runs would have seven of eight in common."""
    each = [set(seeds(8, seed).tolist()) for seed in range(-20, 20)]
    assert len(set().union(*each)) == 8 * 40


# Exact models


def linear(d, batch=3, x_dim=5, seed=1, dtype=torch.float32):
    """Return x, q, decoder and log p(x) of a linear-Gaussian model with an inexact q."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(x_dim, d, generator=g, dtype=torch.float64) / math.sqrt(d)
    x = torch.randn(batch, x_dim, generator=g, dtype=torch.float64) @ (
        torch.linalg.cholesky(w @ w.mT + torch.eye(x_dim, dtype=torch.float64)).mT
    )
    precision = torch.eye(d, dtype=torch.float64) + w.mT @ w
    mu = torch.linalg.solve(precision, w.mT @ x.mT).mT
    logvar = (-precision.diagonal().log()).expand(batch, d) + 0.2
    log_px = torch.distributions.MultivariateNormal(
        torch.zeros(x_dim, dtype=torch.float64), w @ w.mT + torch.eye(x_dim, dtype=torch.float64)
    ).log_prob(x)
    w = w.to(DEVICE, dtype)
    q = (mu + 0.2 / math.sqrt(d)).to(DEVICE, dtype), logvar.to(DEVICE, dtype)
    return x.to(DEVICE, dtype), q, lambda z: z @ w.mT, log_px.to(DEVICE)


LIKELIHOOD = Gaussian(scale=1.0)


def repeated(d, times, dtype=torch.float32):
    """Repeat one example ``times`` times; every row has its own noise."""
    x, (mu, logvar), decoder, log_px = linear(d, batch=1, dtype=dtype)
    return x.expand(times, -1), (mu.expand(times, -1), logvar.expand(times, -1)), decoder, log_px


def estimates(d, times, k, noise, **options):
    x, q, decoder, log_px = repeated(d, times)
    generator = torch.Generator(DEVICE).manual_seed(5)
    result = fastvae.log_marginal(
        x, q, decoder, k=k, likelihood=LIKELIHOOD, noise=noise, generator=generator, **options
    )
    return result, result.log_px.double() - log_px


@pytest.mark.parametrize("d, k", [(2, 64), (2, 100), (8, 64)])
def test_estimates_of_p_are_unbiased(d, k):
    """The mean of p̂ / p over 4000 rows is 1 within five standard errors."""
    _, error = estimates(d, 4000, k, "qmc")
    ratio = error.exp()
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / math.sqrt(4000) + 1e-6


@pytest.mark.parametrize("d, least", [(2, 30.0), (8, 1.3)])
def test_qmc_has_less_variance(d, least):
    """The mean squared error over 200 rows is smaller, for a fixed seed; docs/log.md has the ratios."""
    plain = float(estimates(d, 200, 4096, "philox")[1].square().mean())
    even = float(estimates(d, 200, 4096, "qmc")[1].square().mean())
    assert plain > least * even, f"{plain / even:.1f}"


@pytest.mark.parametrize("k", [1000, 1024])
def test_confidence_intervals_cover(k):
    """95 % intervals of Student's t with seven degrees of freedom hold log p(x) in 95 % of 2000 rows."""
    result, error = estimates(3, 2000, k, "qmc")
    covered = float((error.abs() <= 2.3646 * result.log_px_stderr).double().mean())
    # Five standard errors of the share, plus the estimate's skewness.
    assert abs(covered - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 2000) + 0.01, covered


# The same numbers in any chunks and shards


def test_results_do_not_depend_on_chunks_and_rows(backend):
    x, q, decoder, _ = linear(3, batch=5, dtype=torch.float64)

    def run(rows, k_chunk, offset):
        return fastvae.log_marginal(
            x[rows], tuple(t[rows] for t in q), decoder, k=37, likelihood=LIKELIHOOD, noise="qmc",
            k_chunk=k_chunk, row_offset=offset, generator=torch.Generator(DEVICE).manual_seed(5),
        )  # fmt: skip

    whole = run(slice(None), None, 0)
    for part in (run(slice(None), 5, 0), run(slice(None), 11, 0)):
        for name in ("log_px", "log_px_stderr", "ess"):
            torch.testing.assert_close(getattr(part, name), getattr(whole, name), rtol=1e-10, atol=1e-12)
    part = run(slice(2, 5), 8, 2)
    for name in ("log_px", "log_px_stderr", "ess"):
        torch.testing.assert_close(getattr(part, name), getattr(whole, name)[2:5], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("tol", [None, 1e-3])
def test_evaluate_does_not_depend_on_the_split(tmp_path, tol):
    x, (mu, logvar), decoder, _ = linear(2, batch=7, dtype=torch.float64)

    class Encoder(torch.nn.Module):
        def forward(self, rows):
            place = (rows[:, None] == x[None]).all(-1).double().argmax(1)
            return mu[place], logvar[place]

    def run(**options):
        options = {"k": 400, "batch_size": 3} | options
        return evaluate_parts(
            Encoder(), decoder, x, likelihood=LIKELIHOOD, noise="qmc", tol=tol, progress=False,
            generator=torch.Generator().manual_seed(1), **options,
        )  # fmt: skip

    first = run()
    for other in (run(batch_size=7), run(k_chunk=7), run(checkpoint=tmp_path / "a.npz")):
        torch.testing.assert_close(first.log_px, other.log_px, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(first.log_px_stderr, other.log_px_stderr, rtol=1e-6, atol=1e-12)
        assert torch.equal(first.k, other.k)
    again = run(checkpoint=tmp_path / "a.npz")
    assert torch.equal(again.log_px, other.log_px)
    with pytest.raises(ValueError, match="made with other noise: 'qmc' then, 'philox' now"):
        evaluate_parts(
            Encoder(), decoder, x, likelihood=LIKELIHOOD, k=400, tol=tol, batch_size=3, progress=False,
            generator=torch.Generator().manual_seed(1), checkpoint=tmp_path / "a.npz",
        )  # fmt: skip


def test_shares_of_the_draws_merge():
    """Shares of an example's draws, as on several ranks, merge for any cuts, in the order of draws."""
    log_w = torch.randn(45, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    whole = Weights.of(log_w, 5, 0, 8)
    parts = [Weights.of(log_w[a:b], 5, a, 8) for a, b in ((0, 3), (3, 30), (30, 45))]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    torch.testing.assert_close(merged.turns, whole.turns)
    torch.testing.assert_close(merged.log_px_stderr, whole.log_px_stderr)
    w = log_w.exp()
    means = torch.stack([w[r::8].mean(0) for r in range(8)])
    torch.testing.assert_close(whole.log_px_stderr, means.std(0) / math.sqrt(8) / means.mean(0))
    few = Weights.of(log_w[:3], 5, 0, 8).log_px_stderr
    torch.testing.assert_close(few, w[:3].std(0) / math.sqrt(3) / w[:3].mean(0))
    assert bool(Weights.of(log_w[:1], 5, 0, 8).log_px_stderr.isnan().all())
    # As for independent draws, and NaN for one draw.
    nothing = torch.full_like(log_w, -math.inf)
    assert Weights.of(nothing, 5, 0, 8).jackknife.tolist() == 4 * [-math.inf]
    assert bool(Weights.of(nothing[:1], 5, 0, 8).jackknife.isnan().all())
    assert between(torch.ones(8, 2), torch.tensor([8, 80])).stderr.tolist() == [0.0, 0.0]


# Families and gradients


def families(b=4, d=3):
    g = torch.Generator().manual_seed(3)

    def some(*shape):
        return (0.3 * torch.randn(*shape, generator=g, dtype=torch.float64)).to(DEVICE).requires_grad_()

    mixture = Mixture([DiagonalNormal(some(b, d), some(b, d)), FullNormal(some(b, d), some(b, 6))], some(2))
    return {
        "diagonal": DiagonalNormal(some(b, d), some(b, d)),
        "softplus": DiagonalNormal(some(b, d), some(b, d), scale_form="softplus", floor=1e-3),
        "full": FullNormal(some(b, d), some(b, 6)),
        "low_rank": LowRankNormal(some(b, d), some(b, d), some(b, d, 2)),
        "laplace": Laplace(some(b, d), some(b, d)),
        "student": StudentT(some(b, d), some(b, d), 5.0),
        "torch": torch.distributions.Normal(some(b, d), some(b, d).exp()),
        "mixture": mixture,
    }


@pytest.mark.parametrize("name", families())
def test_families(name):
    """Draws follow any family's q, E_q[p/q] = 1, and are the same in chunks."""
    q = fastvae.distributions.as_posterior(families()[name])
    seed = seeds(8)
    from fastvae.distributions.draws import STANDARD, draw_chunk

    with torch.no_grad():
        z, ratio, _ = draw_chunk(q, STANDARD, 4096, seed, 0, 0)
        chunks = [draw_chunk(q, STANDARD, n, seed, start, 0)[:2] for start, n in ((0, 13), (13, 100))]
    torch.testing.assert_close(torch.cat([c[0] for c in chunks]), z[:113], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(torch.cat([c[1] for c in chunks]), ratio[:113], rtol=1e-10, atol=1e-10)
    groups = ratio.exp().unflatten(0, (-1, 8)).mean(0)  # [8, B]
    error = groups.std(0) / math.sqrt(8)
    # Student's t with seven degrees of freedom exceeds 8 standard errors once in 10^4.
    assert bool(((groups.mean(0) - 1).abs() < 8 * error + 1e-6).all())


@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg"])
@pytest.mark.parametrize("name", ["diagonal", "softplus", "full", "low_rank", "laplace", "student"])
def test_gradients_by_chunks(name, estimator):
    def run(k_chunk):
        q = families()[name]
        decoder = torch.nn.Linear(3, 5, dtype=torch.float64, device=DEVICE)
        torch.nn.init.constant_(decoder.weight, 0.3)
        torch.nn.init.constant_(decoder.bias, 0.1)
        x = torch.linspace(0, 1, 20, dtype=torch.float64, device=DEVICE).view(4, 5)
        bound = fastvae.iwae(
            x, q, decoder, k=11, likelihood="bernoulli", noise="qmc", estimator=estimator, k_chunk=k_chunk,
            generator=torch.Generator(DEVICE).manual_seed(2),
        )  # fmt: skip
        bound.backward()
        tensors = [t for t in vars(q).values() if isinstance(t, torch.Tensor) and t.requires_grad]
        return [bound, *(t.grad for t in tensors), *(p.grad for p in decoder.parameters())]

    for a, b in zip(run(None), run(4), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("estimator", ["iwae", "stl", "dreg"])
def test_composed_draws_have_the_gradients_of_the_fused_ops(estimator, monkeypatch):
    """The composed draw gives the fused ops' numbers if Philox words replace the net's."""
    x, (mu, logvar), decoder, _ = linear(3, batch=4, dtype=torch.float64)

    def run(noise):
        q = mu.clone().requires_grad_(), logvar.clone().requires_grad_()
        bound = fastvae.iwae(
            x, q, decoder, k=6, likelihood=LIKELIHOOD, noise=noise, estimator=estimator,
            generator=torch.Generator(DEVICE).manual_seed(2),
        )  # fmt: skip
        return bound, *torch.autograd.grad(bound, q)

    fused = run("philox")
    monkeypatch.setattr(random, "normal", _by_philox(random.normal))
    for a, b in zip(run("qmc"), fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_log_weights_equal_those_of_iwae():
    x, q, decoder, _ = linear(3, batch=4, dtype=torch.float64)
    options = {"k": 16, "likelihood": LIKELIHOOD, "noise": "qmc"}
    parts = fastvae.log_weights(x, q, decoder, generator=torch.Generator(DEVICE).manual_seed(2), **options)
    bound = fastvae.iwae(
        x, q, decoder, generator=torch.Generator(DEVICE).manual_seed(2), reduction="none", **options
    )
    torch.testing.assert_close(fastvae.ops.log_mean_exp(parts.log_likelihood + parts.log_ratio), bound)


def test_a_custom_family():
    class Shifted(Distribution):
        def __init__(self, mu):
            super().__init__()
            self.mu, self.batch, self.device = mu, mu.shape[0], mu.device

        def rsample_log_prob(self, samples, seed, **place):
            eps = fastvae.random.normal(seed, samples, *self.mu.shape, dtype=self.mu.dtype, **place)
            return self.mu + eps, -0.5 * (eps.square() + math.log(2 * math.pi)).sum(-1)

        def log_prob(self, z):
            return -0.5 * ((z - self.mu).square() + math.log(2 * math.pi)).sum(-1)

    x, (mu, _), decoder, _ = linear(2, batch=4, dtype=torch.float64)
    generators = [torch.Generator(DEVICE).manual_seed(2) for _ in range(2)]
    options = {"k": 16, "likelihood": LIKELIHOOD, "noise": "qmc"}
    own = fastvae.iwae(x, Shifted(mu), decoder, generator=generators[0], **options)
    known = fastvae.iwae(x, (mu, torch.zeros_like(mu)), decoder, generator=generators[1], **options)
    torch.testing.assert_close(own, known)


@pytest.mark.parametrize("merge", [None, "precision"])
def test_the_levels_of_a_hierarchy(merge, monkeypatch):
    """A hierarchy gives the usual numbers if Philox words replace the net's, which the top level uses."""
    torch.manual_seed(0)
    sizes = (5, 4), (5 if merge else 7, 6), (2, 6)
    networks = [torch.nn.Linear(n, m, dtype=torch.float64) for n, m in sizes]
    if merge is None:
        networks[1] = _WithFeatures(networks[1])
    hierarchy = Hierarchy([
        Level(2, networks[0]), Level(3, networks[1], prior=networks[2], merge=merge)
    ])  # fmt: skip
    hierarchy.to(DEVICE)
    h = torch.randn(4, 5, dtype=torch.float64, device=DEVICE)
    decoder = torch.nn.Linear(5, 6, dtype=torch.float64, device=DEVICE)
    x = torch.ones(4, 6, dtype=torch.float64, device=DEVICE)

    def run(noise):
        return fastvae.iwae(
            x, hierarchy([h, h]), decoder, k=6, likelihood="bernoulli", noise=noise, reduction="none",
            generator=torch.Generator(DEVICE).manual_seed(2),
        )  # fmt: skip

    plain, even = run("philox"), run("qmc")
    assert not torch.allclose(plain, even)
    monkeypatch.setattr(random, "normal", _by_philox(random.normal))
    torch.testing.assert_close(run("qmc"), plain, rtol=1e-10, atol=1e-12)


class _WithFeatures(torch.nn.Module):
    """Posterior of the features and the state above."""

    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, h, state):
        return self.linear(torch.cat([h, state], 1))


def _by_philox(normal):
    return lambda seed, *args, **options: normal(seed.reshape(()), *args, **options)


def test_compiled():
    x, q, decoder, _ = linear(3, batch=4)

    def bound(x, mu, logvar, seed):
        return fastvae.random.normal(seed, 5, *mu.shape) * torch.exp(0.5 * logvar) + mu

    seed = seeds(2)
    compiled = torch.compile(bound, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, *q, seed), bound(x, *q, seed))


# Mistakes


def test_errors():
    x, q, decoder, _ = linear(2)
    for function in (fastvae.iwae, fastvae.log_weights, fastvae.log_marginal):
        with pytest.raises(ValueError, match="noise.*'philox'.*'qmc'"):
            function(x, q, decoder, k=4, likelihood=LIKELIHOOD, noise="sobol")
    with pytest.raises(ValueError, match="noise.*'philox'.*'qmc'"):
        evaluate_parts(lambda x: q, decoder, x, likelihood=LIKELIHOOD, noise="sobol", progress=False)
    gamma = torch.distributions.Gamma(torch.ones_like(q[0]), torch.ones_like(q[0]))
    with pytest.raises(ValueError, match="noise='qmc' needs a q"):
        fastvae.iwae(x, gamma, decoder, k=4, likelihood=LIKELIHOOD, noise="qmc", prior=gamma)
    with pytest.raises(TypeError, match="noise='qmc'"):
        fastvae.ops.rsample_kl(*q, seed=seeds(2))
    with pytest.raises(TypeError, match="seed"):
        random.normal(torch.zeros(0, dtype=torch.int64), 1, 1, 1)


def test_estimates_treat_randomisations_as_samples():
    """Estimates treat randomisations as the samples.

    The jackknife leaves one randomisation out; the interval is Student's for light-tailed weights, and no
    narrower than that of independent draws for others.
    """
    g = torch.Generator().manual_seed(5)
    light = torch.rand(800, 3, dtype=torch.float64, generator=g).log1p()
    heavy = torch.randn(800, 40, dtype=torch.float64, generator=g)
    log_w = torch.cat([light, heavy], 1)
    found = Weights.of(log_w, 100, 0, 8)
    independent = Weights.of(log_w, 100)
    groups = torch.stack([log_w[r::8].exp().mean(0) for r in range(8)])
    left_out = torch.stack([groups[torch.arange(8) != r].mean(0).log() for r in range(8)])
    estimate, error = found.jackknife, found.jackknife_stderr
    torch.testing.assert_close(estimate, 8 * groups.mean(0).log() - 7 * left_out.mean(0))
    torch.testing.assert_close(error, (7 / 8 * (left_out - left_out.mean(0)).square().sum(0)).sqrt())
    (low, high), (wide_low, wide_high) = found.interval(), independent.interval()
    relative = 2.3646242515928 * groups.std(0) / math.sqrt(8) / groups.mean(0)
    assert bool((found.khat[:3] < 0).all()) and bool((found.khat[3:] > 0).all())
    torch.testing.assert_close(low[:3], found.log_px[:3] + torch.log(1 - relative[:3]))
    torch.testing.assert_close(high[:3], found.log_px[:3] + torch.log(1 + relative[:3]))
    # Here either interval may be the wider one.
    relative = relative[3:]
    narrow_low = found.log_px[3:] + torch.log((1 - relative).clamp(min=0.025))
    narrow_high = found.log_px[3:] + torch.log1p(relative)
    torch.testing.assert_close(low[3:], torch.minimum(wide_low[3:], narrow_low))
    torch.testing.assert_close(high[3:], torch.maximum(wide_high[3:], narrow_high))
    assert bool((narrow_low < wide_low[3:]).any()) and bool((narrow_low > wide_low[3:]).any())
    assert bool((narrow_high < wide_high[3:]).any()) and bool((narrow_high > wide_high[3:]).any())


def test_quantiles_of_student_t():
    """Student's quantiles equal SciPy's, for even and odd degrees of freedom."""
    for level in (0.5, 0.95, 0.999):
        for degrees in range(1, 12):
            expected = stats.t.ppf(0.5 + level / 2, degrees)
            assert _student(level, degrees) == pytest.approx(expected, rel=1e-9)
