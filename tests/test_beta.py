"""Tests specific to beta_log_prob; common ones are in test_likelihoods.py."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from fastvae import ops
from fastvae.likelihoods import Beta

from .conftest import DEVICE

CONCENTRATIONS = (1e-30, 1e-3, 0.3, 1.0, 1.7, 40.0, 1e4, 1e6, 1e9)


def exact(x: float, c1: float, c0: float, parts: int) -> tuple[list[float], list[float]]:
    """Return log p, its derivatives by x, log a and log b, and the sizes of each one's cancelling terms."""
    with mpmath.workdps(80):
        x, c1, c0 = mpmath.mpf(x), mpmath.mpf(c1), mpmath.mpf(c0)
        a, b = mpmath.exp(c1), mpmath.exp(c0)
        n, log_x, log_y = a + b, mpmath.log(x), mpmath.log1p(-x)
        beta = mpmath.loggamma(a) + mpmath.loggamma(b) - mpmath.loggamma(n)
        psi = mpmath.digamma(n)
        values = [
            (a - 1) * log_x + (b - 1) * log_y - beta,
            (a - 1) / x - (b - 1) / (1 - x),
            a * (psi - mpmath.digamma(a) + log_x),
            b * (psi - mpmath.digamma(b) + log_y),
        ]
        # An error of s is multiplied by n |x - mean| in log p, and by n x (1 - x) in the slopes. It is a
        # rounding of s, or of a logit that is one number instead of two parts.
        s = abs(log_x - log_y - (c1 - c0)) if parts == 2 else abs(log_x) + abs(log_y)
        move, steep = n * abs(x - a / n), n * x * (1 - x)
        sizes = [
            abs(values[0]) + abs(c1) + abs(c0) + abs(log_x) + abs(log_y) + 1 + move * s,
            (a + 1) / x + (b + 1) / (1 - x),
            abs(values[2]) + 1 + move + steep,
            abs(values[3]) + 1 + move + steep,
        ]
        return [float(v) for v in values], [float(v) for v in sizes]


def results(x, c1, c0):
    leaves = [t.clone().requires_grad_() for t in (x, c1, c0)]
    out = ops.beta_log_prob(*leaves)
    return [out, *torch.autograd.grad(out.sum(), leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("a", CONCENTRATIONS)
def test_any_concentration(backend, dtype, a):
    """Accurate close to the mean and far from it: large gamma functions cancel without loss."""
    points = [1e-40, 1e-6, 0.03, 0.49, 0.5, 0.51, 0.97, 1 - 1e-6]
    logs, data = [], []
    for b in CONCENTRATIONS:
        mean, spread = a / (a + b), math.sqrt(a * b / (a + b + 1)) / (a + b)
        near = [v for v in (mean, mean + 0.5 * spread, mean - spread, mean + 3 * spread) if 0 < v < 1]
        for x in (*points, *near):
            logs.append((math.log(a), math.log(b)))
            data.append(x)
    x = torch.tensor(data, dtype=dtype, device=DEVICE)[:, None]
    c1, c0 = torch.tensor(logs, dtype=dtype, device=DEVICE).T.contiguous()[:, :, None]
    inside = (x > 0) & (x < 1)
    found = results(*(t[inside][:, None] for t in (x, c1, c0)))
    u = torch.finfo(dtype).eps / 2
    parts = 1 if dtype == torch.float64 or backend == "reference" else 2
    for i, given in enumerate(zip(*(t[inside].tolist() for t in (x, c1, c0)), strict=True)):
        expected, sizes = exact(*given, parts)
        for name, got, e, size in zip(("log p", "x", "log a", "log b"), found, expected, sizes, strict=True):
            number = float(got.flatten()[i])
            beyond = abs(e) > torch.finfo(dtype).max and number == math.copysign(math.inf, e)
            assert beyond or abs(number - e) <= 32 * u * size, (name, given)


@pytest.mark.parametrize("columns", [1, 500])
@pytest.mark.parametrize("end", [0.0, 1.0])
def test_poles_and_zeros_at_the_ends(backend, columns, end):
    """At an end, a concentration below 1 gives a pole, above 1 a zero; at 1 only the other matters."""
    for a, value in ((0.5, math.inf), (1.0, math.log(3)), (2.0, -math.inf)):
        x = torch.full((1, columns), 0.5, device=DEVICE)
        c1, c0 = torch.zeros(2, 1, columns, device=DEVICE)
        x[0, -1] = end
        own, other = (c1, c0) if end == 0 else (c0, c1)
        own[0, -1], other[0, -1] = math.log(a), math.log(3)
        out, to_x, to_1, to_0 = results(x, c1, c0)
        assert float(out.detach()) == pytest.approx(value, rel=1e-6, abs=1e-6 * columns)
        own, other = (to_1, to_0) if end == 0 else (to_0, to_1)
        assert float(own[0, -1]) == -math.inf
        # b (ψ(a + b) - ψ(b)), as log(1 - 0) is 0.
        slope = 3 * (float(mpmath.digamma(a + 3)) - float(mpmath.digamma(3)))
        assert float(other[0, -1]) == pytest.approx(slope, rel=1e-6)
        inwards = {0.5: -math.inf, 1.0: -2.0, 2.0: math.inf}[a]
        assert float(to_x[0, -1]) == pytest.approx(inwards if end == 0 else -inwards, rel=1e-6)
        leaves = [t.clone().requires_grad_() for t in (x, c1, c0)]
        grads = torch.autograd.grad(ops.beta_log_prob(*leaves), leaves, torch.zeros(1, device=DEVICE))
        assert all(bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overflowing_concentrations_are_clamped(backend, dtype):
    """Log concentrations are clamped to ±80."""
    x = torch.full((1, 1), 0.5, dtype=dtype, device=DEVICE)
    for a, b, value in ((200.0, 200.0, 80.0), (math.inf, math.inf, 80.0), (-math.inf, 0.0, -80.0)):
        found = results(x, torch.full_like(x, a), torch.full_like(x, b))
        # For e⁸⁰ and e⁸⁰ at their mean, ½ log(2 n / π).
        expected = 0.5 * (value + 2 * math.log(2) - math.log(math.pi)) if value > 0 else value + math.log(2)
        assert float(found[0].detach()) == pytest.approx(expected, rel=1e-6)
        assert not any(bool(f.isnan().any()) for f in found)


def test_equals_torch_beta():
    """Equal to torch's Beta where that is accurate."""
    c1, c0 = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    theirs = torch.distributions.Beta(c1.exp(), c0.exp())
    x = Beta().sample((c1, c0), generator=torch.Generator().manual_seed(2)).clamp(1e-300, 1 - 1e-15)
    torch.testing.assert_close(Beta().log_prob(x, (c1, c0)), theirs.log_prob(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(Beta().mean((c1, c0)), theirs.mean)
