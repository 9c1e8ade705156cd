"""Errors in single numbers: conversions, clamps and their edges, checks of every target, long sums."""

from __future__ import annotations

import math
import sys

import pytest
import torch

import fastvae
from fastvae import ops

from . import models
from .conftest import CUDA, DEVICE
from .models import rand, randn

HALVES = [torch.float16, torch.bfloat16]
SEED = torch.tensor(5, device=DEVICE)


@pytest.fixture(params=["native", "reference"])
def on_cpu(request, monkeypatch):
    """Run on CPU tensors by C++ and the reference on any device, where Triton's kernels work differently."""
    here = sys.modules[__name__]
    for module in (here, models):
        monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    monkeypatch.setattr(here, "SEED", SEED.cpu())
    with fastvae.use_backend(request.param):
        yield


def _all_numbers(dtype):
    """Return every number of a half precision except NaN: subnormals, both zeros, infinities."""
    patterns = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).to(DEVICE)
    return patterns[~patterns.isnan()]


def _bits(t):
    return t.cpu().view({2: torch.int16, 4: torch.int32}[t.element_size()])


# Conversions.


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_precision_number_is_read(backend, dtype):
    """Every number is read exactly: a Gaussian's gradient by x with mean m, variance 1, x = 0 is m."""
    mean = _all_numbers(dtype).view(-1, 1)
    x = torch.zeros(len(mean), 1, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.gaussian_log_prob(x, mean, 0.0).sum(), x)
    assert torch.equal(grad, mean.float())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_result_is_rounded_to_the_nearest(backend, dtype):
    """Every result is rounded to nearest even, or to infinity: such a Gaussian's gradient by m = 0 is x."""
    exact = _all_numbers(dtype).float()
    exact = exact[exact.isfinite()].sort().values.unique()
    half = (exact[1:] - exact[:-1]) / 2
    ties = exact[:-1] + half
    near = [torch.nextafter(ties, torch.full_like(ties, s)) for s in (-math.inf, math.inf)]
    limit = torch.finfo(dtype).max
    # From half a step beyond the largest number on, the result is infinite.
    edge = torch.tensor(limit, device=DEVICE) + half[-1]
    beyond = torch.stack([edge, torch.nextafter(edge, torch.zeros_like(edge)), edge * 1.01])
    beyond = torch.cat([beyond, -beyond, torch.tensor([math.inf, -math.inf, 3e38, -3e38], device=DEVICE)])
    x = torch.cat([exact, ties, *near, beyond])
    # Subnormals of float32 are excluded: a GPU may flush them.
    x = x[(x.abs() >= torch.finfo(torch.float32).tiny) | (x == 0)].view(-1, 1)
    if backend == "triton" and not CUDA:  # a few seconds' worth of them, the largest among them
        x = torch.cat([x[::11], x[-2000:]])
    mean = torch.zeros(len(x), 1, dtype=dtype, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.gaussian_log_prob(x, mean, 0.0).sum(), mean)
    assert grad.dtype == dtype
    wrong = (grad != x.to(dtype)).flatten()
    assert not wrong.any(), (x[wrong][:5], grad[wrong][:5], x.to(dtype)[wrong][:5])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -(2**31) + 0x7F80FFFF])
def test_nan_of_any_payload_stays_nan(backend, dtype, bits):
    """NaN of any payload stays NaN: rounding must not carry it into a number."""
    x = torch.tensor([bits], dtype=torch.int32).view(torch.float32).expand(3, 5).clone().to(DEVICE)
    mean = torch.zeros(3, 5, dtype=dtype, device=DEVICE, requires_grad=True)
    (grad,) = torch.autograd.grad(ops.gaussian_log_prob(x, mean, 0.0).sum(), mean)
    assert grad.isnan().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_precision_latents_of_any_size(backend, dtype):
    """z is the rounded float32 z, for subnormal means and samples beyond the largest float16."""
    numbers = _all_numbers(dtype)
    mu = numbers[numbers.isfinite()][:: 7 if backend == "triton" else 1]
    mu = mu[: len(mu) // 9 * 9].view(-1, 9)
    for level in (-200.0, 20.0):
        logvar = torch.full_like(mu, level)
        z, _ = ops.rsample_log_ratio(mu, logvar, k=1, seed=SEED)
        wide, _ = ops.rsample_log_ratio(mu.float(), logvar.float(), k=1, seed=SEED)
        assert torch.equal(z, wide.to(dtype))
    assert bool(z.isinf().any()) == (dtype == torch.float16)


# Clamps.


@pytest.mark.parametrize("limits", [(-math.inf, 0.5), (-0.5, math.inf), (-0.5, 0.5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_one_sided_clamp(backend, limits, dtype):
    """z, KL, ratio and gradients are those of clamped log variances; the gradient is kept on the edge."""
    b, d, k = 6, 5, 3
    mu = randn(b, d, seed=1, dtype=dtype)
    logvar = 2 * randn(b, d, seed=2, dtype=dtype)
    # Equal to the limits in some elements.
    logvar[0], logvar[1] = -0.5, 0.5
    grad_z, grad_kl, grad_ratio = (randn(*s, seed=3, dtype=dtype) for s in ((k, b, d), (b,), (k, b)))
    for op, options, second in (
        (ops.rsample_kl, {}, grad_kl),
        (ops.rsample_log_ratio, {}, grad_ratio),
        (ops.rsample_log_ratio, {"estimator": "stl"}, grad_ratio),
    ):
        results = []
        for clamped in (True, False):
            leaves = [t.clone().requires_grad_() for t in (mu, logvar)]
            given = leaves[1] if clamped else leaves[1].clamp(*limits)
            out = op(leaves[0], given, k=k, seed=SEED, logvar_range=limits if clamped else None, **options)
            results.append((*(o.detach() for o in out), *torch.autograd.grad(out, leaves, (grad_z, second))))
        tolerance = 1e-5 if dtype == torch.float32 else 1e-12
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
        edges = results[0][3][:2]
        assert edges.all() and not results[0][3][2:][logvar[2:] > limits[1]].any()


@pytest.mark.parametrize("forward, backward", [("reference", "native"), ("native", "reference")])
def test_a_clamp_persists_when_the_backend_changes_between_the_passes(forward, backward):
    def run(first, then):
        mu, logvar = (2 * randn(6, 5, seed=s) for s in (4, 5))
        leaves = [t.clone().requires_grad_() for t in (mu, logvar)]
        with fastvae.use_backend(first):
            z, kl = ops.rsample_kl(*leaves, k=3, seed=SEED, logvar_range=(-0.5, 0.5))
        with fastvae.use_backend(then):
            return torch.autograd.grad((z.square().sum(), kl.sum()), leaves)

    for got, expected in zip(run(forward, backward), run("reference", "reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["rsample_kl", "rsample_log_ratio"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    "form", [(-0.5, 0.5, "logvar", 0.0), (-math.inf, math.inf, "log_scale", 0.0),
             (-math.inf, math.inf, "softplus", 0.0), (-math.inf, math.inf, "softplus", 0.1)],
)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_buffers_not_saved_by_a_dispatcher_op_are_recomputed(on_cpu, op, flat, form, dtype):
    """Buffers a dispatcher op did not save, not knowing that it will be differentiated, are recomputed.

    The clamp still applies, and half precision is computed in float32.
    """
    mu, logvar = ((2 * randn(6, 5, seed=s)).to(dtype) for s in (4, 5))
    options = [False] if op == "rsample_kl" else ["iwae", 0.0, 1, False]
    results = []
    for keep in (True, False):
        leaves = [t.clone().requires_grad_() for t in (mu, logvar)]
        address = SEED, 3, 0, 0, *form[:2], flat, *form[2:]
        z, second, *_ = getattr(torch.ops.fastvae, op)(*leaves, None, None, *address, *options, keep)
        assert z.shape == ((18, 5) if flat else (3, 6, 5))
        results.append(torch.autograd.grad((z.square().sum(), second.square().sum()), leaves))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# Every target is checked.


@pytest.mark.parametrize("bad", [-1e-3, 1.001, math.inf])
@pytest.mark.parametrize(
    ("rows", "columns", "place"),
    [
        (70, 7, (69, 6)), (70, 7, (0, 0)), (200, 3, (130, 1)),  # many rows in a tile
        (3, 3000, (0, 2999)), (3, 3000, (2, 1024)), (1, 1025, (0, 1024)), (1, 2048, (0, 1023)),  # long
        (40, 700, (39, 699)), (40, 700, (17, 300)),  # rows of one tile
    ],
)  # fmt: skip
def test_a_single_target_out_of_range_is_refused(backend, monkeypatch, rows, columns, place, bad):
    monkeypatch.setenv("FASTVAE_CHECK", "1")
    x, logits = rand(rows, columns, seed=6), randn(2, rows, columns, seed=7)
    ops.bernoulli_log_prob(x, logits)
    x[place] = bad
    with pytest.raises(ValueError, match="must lie in \\[0, 1\\]"):
        ops.bernoulli_log_prob(x, logits)


# Log variances in every layout.


def _layouts(k, b, size):
    return {
        "full": (k, b, size), "row per pixel": (size,), "number": (), "number per row": (b, 1),
        "row per sample": (k, 1, size), "number per sample": (k, 1, 1), "row per example": (b, size),
    }  # fmt: skip


@pytest.mark.parametrize("layout", _layouts(1, 1, 1))
@pytest.mark.parametrize(
    "sizes", [(3, 4, 5), (3, 1, 6), (1, 4, 5), (2, 3, 1), (2, 1, 1), (40, 1, 3), (2, 3, 1100)]
)
def test_log_variances_of_every_layout(backend, layout, sizes):
    """Value and all gradients equal torch's density for any broadcasting and memory layout."""
    k, b, size = sizes
    shape = _layouts(k, b, size)[layout]
    x, mean = randn(b, size, seed=8), randn(k, b, size, seed=9)
    upstream = randn(k, b, seed=11)
    for spread in (False, True):
        logvar = randn(*shape, 2, seed=10)[..., 0] if spread else randn(*shape, seed=10)
        leaves = [t.detach().requires_grad_() for t in (x, mean, logvar)]
        value = ops.gaussian_log_prob(*leaves)
        got = (value, *torch.autograd.grad(value, leaves, upstream))
        wide = [t.detach().double().requires_grad_() for t in leaves]
        exact = torch.distributions.Normal(wide[1], torch.exp(0.5 * wide[2])).log_prob(wide[0]).sum(2)
        wanted = (exact, *torch.autograd.grad(exact, wide, upstream.double()))
        for actual, expected in zip(got, wanted, strict=True):
            assert actual.shape == expected.shape
            # Sums of at most k b x terms of order 1 to 30.
            assert float((actual.double() - expected).detach().abs().max()) <= 2e-6 * float(
                expected.detach().abs().max() + 30
            )


# Sums of many terms.

EPS = torch.finfo(torch.float32).eps


def _off(actual, exact):
    """Return the largest relative error in eps."""
    return float(((actual.detach().double() - exact) / exact).abs().max()) / EPS


@pytest.mark.parametrize("values", ["constant", "random"])
def test_very_long_rows(on_cpu, values):
    """Tiles of a row are summed in double, as a blank image's terms all round in the same direction.

    Not for Triton: under its interpreter it has few programs, and sums some thousand terms per lane.
    """
    b, size = 2, 1_000_003
    level = randn(b, 1, seed=15).expand(b, size)
    x = (level if values == "constant" else randn(b, size, seed=16)).contiguous()
    mean, logvar = torch.zeros(1, b, size, device=DEVICE), torch.full((size,), 0.3, device=DEVICE)
    wide = x.double()
    exact = torch.distributions.Normal(0.0, math.exp(0.15)).log_prob(wide).sum(1)
    full = logvar.expand(1, b, size).contiguous()
    number = torch.tensor(0.3, device=DEVICE)
    # 0.3 is not exact in float32.
    exact = -0.5 * (math.log(2 * math.pi) + float(number) + wide**2 * math.exp(-float(number))).sum(1)
    for v in (full, logvar, number, number.expand(1, b, 1)):
        assert _off(ops.gaussian_log_prob(x, mean, v), exact) < 8
    coin = ops.bernoulli_log_prob(x.sigmoid(), mean + 1.7)
    logit = float(torch.tensor(1.7))
    exact = (x.sigmoid().double() * logit - math.log1p(math.exp(logit))).sum(1)
    assert _off(coin, exact) < 8
    q = x, full[0]
    _, kl = ops.rsample_kl(*q, k=1, seed=SEED)
    assert _off(kl, 0.5 * (wide**2 + math.expm1(float(number)) - float(number)).sum(1)) < 8
    _, ratio = ops.rsample_log_ratio(*q, k=1, seed=SEED)
    with fastvae.use_backend("reference"):
        _, exact = ops.rsample_log_ratio(*(t.double() for t in q), k=1, seed=SEED)
    # The terms have both signs: relative to the sum of magnitudes, two or more per column.
    assert float((ratio.double() - exact).abs().max()) < 8 * EPS * 2 * size


def test_gradients_over_many_samples(on_cpu):
    """Sums over 60 000 samples stay accurate: gradients of x, of a shared log variance, and of q."""
    k, size = 60_000, 3
    x, probability = randn(1, size, seed=17), rand(1, size, seed=18)
    mean = torch.full((k, 1, size), 0.3, device=DEVICE)
    upstream = torch.full((k, 1), 0.731, device=DEVICE)
    logvar = torch.zeros(size, device=DEVICE, requires_grad=True)
    x.requires_grad_()
    got = torch.autograd.grad(ops.gaussian_log_prob(x, mean, logvar), (x, logvar), upstream)
    g, delta = k * float(upstream[0, 0]), (x - mean[0]).detach().double()
    assert _off(got[0], -g * delta) < 16
    assert _off(got[1], 0.5 * g * (delta[0] ** 2 - 1)) < 16
    probability.requires_grad_()
    (got,) = torch.autograd.grad(ops.bernoulli_log_prob(probability, mean + 3.0), probability, upstream)
    assert _off(got, (mean[0] + 3.0).double() * g) < 16
    # q = p, so the mean gradient of the log variance is the entropy's.
    q = [torch.zeros(2, size, device=DEVICE, requires_grad=True) for _ in range(2)]
    _, ratio = ops.rsample_log_ratio(*q, k=k, seed=SEED)
    got = torch.autograd.grad(ratio, q, upstream.expand(k, 2))
    with fastvae.use_backend("reference"):
        wide = [t.detach().double().requires_grad_() for t in q]
        _, ratio = ops.rsample_log_ratio(*wide, k=k, seed=SEED)
        exact = torch.autograd.grad(ratio, wide, upstream.double().expand(k, 2))
    for actual, expected in zip(got, exact, strict=True):
        # Terms of size g: relative to the sum of magnitudes.
        assert float((actual.double() - expected).abs().max()) < 16 * EPS * g


def test_weights_of_many_samples_sum_to_one(on_cpu):
    k = 60_000
    for spread in (0.0, 1.0):
        log_w = (spread * randn(k, 8, seed=19) - 300).requires_grad_()
        bound = ops.log_mean_exp(log_w)
        weights = torch.autograd.grad(bound.sum(), log_w)[0].double()
        assert float((weights.sum(0) - 1).abs().max()) < 4 * EPS
        exact = torch.logsumexp(log_w.detach().double(), 0) - math.log(k)
        assert float((bound.double() - exact).detach().abs().max()) < 2 * EPS * 300


# Cases whose sums Triton splits: sizes, the log variance's layouts, and ops of latents.
SPLIT = {
    "many samples": ((700, 1, 5), [(5,), ()], ["kl", "iwae", "stl"]),
    "many rows": ((1, 900, 5), [(5,)], []),
    "long rows": ((3, 2, 2500), [(3, 2, 2500), (2, 1)], ["kl", "iwae"]),
}


@pytest.mark.parametrize("case", SPLIT)
def test_sums_that_are_split_over_programs(backend, case):
    """Every part of a split sum is added once in every gradient, for few rows or few samples."""
    (k, b, size), layouts, latents = SPLIT[case]
    x, mean, upstream = rand(b, size, seed=20), randn(k, b, size, seed=21), randn(k, b, seed=22)
    q = [s * randn(b, size, seed=i) for i, s in ((23, 1), (24, 1), (28, 0.5), (29, 0.5))]
    grad_z, grad_kl = randn(k, b, size, seed=25), randn(b, seed=26)

    def run(dtype):
        results = []
        for shape in layouts:
            leaves = [t.detach().to(dtype).requires_grad_() for t in (x, mean, randn(*shape, seed=27))]
            value = ops.gaussian_log_prob(*leaves)
            results += [value, *torch.autograd.grad(value, leaves, upstream.to(dtype))]
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, mean)]
        value = ops.bernoulli_log_prob(*leaves)
        results += [value, *torch.autograd.grad(value, leaves, upstream.to(dtype))]
        for name in latents:
            leaves = [t.detach().to(dtype).requires_grad_() for t in q]
            options = {"k": k, "seed": SEED, "prior": leaves[2:]}
            if name == "kl":
                out, second = ops.rsample_kl(*leaves[:2], **options), grad_kl
            else:
                out, second = ops.rsample_log_ratio(*leaves[:2], **options, estimator=name), upstream
            results += [out[1], *torch.autograd.grad(out, leaves, (grad_z.to(dtype), second.to(dtype)))]
        return results

    got = run(torch.float32)
    with fastvae.use_backend("reference"):
        expected = run(torch.float64)
    for i, (actual, exact) in enumerate(zip(got, expected, strict=True)):
        assert actual.shape == exact.shape
        # Sums of some thousand terms of both signs: an omitted or doubled part exceeds this by far.
        bound = 1e-5 * float(exact.detach().abs().max() + 30)
        assert float((actual.double() - exact).detach().abs().max()) <= bound, i
