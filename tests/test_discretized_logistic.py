"""Tests specific to discretized_logistic_log_prob; common ones are in test_likelihoods.py."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

import fastvae
from fastvae import ops
from fastvae.likelihoods import DiscretizedLogistic

from .conftest import DEVICE
from .models import rand, randn

SCALES = (1e-20, 1e-4, 1e-3, 0.03, 1.0, 1e3, 1e15)
POINTS = (0.0, 1 / 255, 0.25, 0.5, 1.0)
MEANS = (-30.0, 0.0, 0.2499, 0.25, 0.5019, 3.0)


def exact(x: float, mean: float, log_scale: float, log_width: float) -> tuple[list[float], list[float]]:
    """Return log p, its derivatives by mean and logarithms, and the sizes of each one's cancelling terms."""
    with mpmath.workdps(80):
        x, mean, t, u = (mpmath.mpf(v) for v in (x, mean, log_scale, log_width))
        s, z, h = mpmath.exp(t), (x - mean) / mpmath.exp(t), mpmath.exp(u - t) / 2
        sigmoid = lambda v: 1 / (1 + mpmath.exp(-v))  # noqa: E731
        softplus = lambda v: max(v, 0) + mpmath.log1p(mpmath.exp(-abs(v)))  # noqa: E731
        r = -z if x == 0 else z if x == 1 else abs(z)
        if x in (0, 1):
            log_p, by_r, by_width = -softplus(r - h), sigmoid(r - h), h * sigmoid(r - h)
        else:
            log_p = mpmath.log(-mpmath.expm1(-2 * h)) - softplus(r - h) - softplus(-r - h)
            by_r = -sigmoid(r - h) * sigmoid(r + h) * mpmath.expm1(-2 * r)
            by_width = h * (sigmoid(r - h) + sigmoid(-r - h)) + 2 * h / mpmath.expm1(2 * h)
        side = -1 if x == 0 or (x < 1 and z < 0) else 1
        values = [log_p, side * by_r / s, r * by_r - by_width, by_width]
        # An error of r or of h, in addition to the errors of their logarithms.
        move = (abs(z) + h) * sigmoid(r - h) * (1 + abs(t) + abs(u)) / 8
        steep = move * (1 + (abs(z) + h) * sigmoid(h - r)) / 2
        sizes = [abs(log_p) + move, abs(values[1]) * (1 + (abs(z) + h) / 8 * (1 + abs(t) + abs(u))),
                 by_width + abs(r * by_r) + steep, by_width + steep]  # fmt: skip
        return [float(v) for v in values], [float(v) for v in sizes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("levels", [2, 256, 65536])
def test_any_scale(backend, dtype, levels):
    """Accurate for narrow and wide bins, near the mean and far in the tail."""
    rows = [(x, m, math.log(s), -math.log(levels - 1)) for x in POINTS for m in MEANS for s in SCALES]
    x, *given = torch.tensor(rows, dtype=dtype, device=DEVICE).T.contiguous()[:, :, None]
    leaves = [p.clone().requires_grad_() for p in given]
    out = ops.discretized_logistic_log_prob(x, *leaves)
    found = [out, *torch.autograd.grad(out.sum(), leaves)]
    u = torch.finfo(dtype).eps / 2
    for i, row in enumerate(zip(*(t.flatten().tolist() for t in (x, *given)), strict=True)):
        expected, sizes = exact(*row)
        for name, got, e, size in zip(
            ("log p", "mean", "scale", "width"), found, expected, sizes, strict=True
        ):
            number = float(got.flatten()[i])
            beyond = abs(e) > torch.finfo(dtype).max and number == math.copysign(math.inf, e)
            assert beyond or abs(number - e) <= 16 * u * size + 1e-37, (name, row)
        assert float(out.flatten()[i].detach()) <= 0


def test_overflowing_scales_are_clamped(backend):
    """Log scales are clamped to ±60."""
    x, mean = torch.tensor([[0.5, 0.0, 1.0]], device=DEVICE), torch.full((1, 3), 0.5, device=DEVICE)
    for log_scale, clamped in ((math.inf, 60.0), (200.0, 60.0), (-math.inf, -60.0), (-200.0, -60.0)):
        found, expected = (ops.discretized_logistic_log_prob(x, mean, v, -5.5) for v in (log_scale, clamped))
        assert bool(found.isfinite().all()) and torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "levels, low, high", [(2, 0, 1), (3, -1, 1), (256, 0, 1), (256, -1, 1), (256, 0, 255), (100, -3.5, 2.7)]
)
def test_probabilities_of_all_levels_add_to_1(backend, dtype, levels, low, high):
    likelihood = DiscretizedLogistic(levels=levels, low=low, high=high)
    values = torch.linspace(low, high, levels, dtype=dtype, device=DEVICE)[:, None].expand(-1, 60)
    width = high - low
    mean = (low + width * (1.4 * rand(60, seed=1, dtype=dtype) - 0.2)).expand(levels, -1)
    log_scale = (math.log(width) + randn(60, seed=2, dtype=dtype).abs() * -1.5).expand(levels, -1)
    total = likelihood.log_prob(values.contiguous(), (mean, log_scale)).double().exp().sum(0)
    torch.testing.assert_close(
        total, torch.ones_like(total), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12
    )


def test_log_prob_does_not_depend_on_the_unit_of_pixels(backend):
    """The same pixels in [0, 1], in [-1, 1] and in bytes have the same log p."""
    pixels = torch.arange(256, device=DEVICE)[None, :]
    mean, log_scale = rand(3, 256, seed=1), randn(3, 256, seed=2) - 2
    q = torch.zeros(1, 2, device=DEVICE)
    expected = DiscretizedLogistic().log_likelihood(pixels / 255, (mean, log_scale), 3)
    for low, high in ((-1.0, 1.0), (0.0, 255.0)):
        likelihood = DiscretizedLogistic(low=low, high=high)
        width, x = high - low, low + (high - low) * (pixels / 255)
        given = low + width * mean, log_scale + math.log(width)
        torch.testing.assert_close(likelihood.log_likelihood(x, given, 3), expected, rtol=1e-5, atol=1e-3)
        terms = fastvae.elbo(x, q, lambda z, g=given: g, k=3, likelihood=likelihood, terms=True)
        torch.testing.assert_close(terms.log_likelihood, expected.mean(0), rtol=1e-5, atol=1e-3)
        in_units = DiscretizedLogistic().mean((mean, log_scale))
        torch.testing.assert_close(
            likelihood.mean(given), low + width * in_units, rtol=1e-4, atol=1e-4 * width
        )
        drawn = likelihood.sample(given)
        level = (drawn - low) / width * 255
        assert bool(
            ((level - level.round()).abs() < 1e-3).all() & (drawn >= low).all() & (drawn <= high).all()
        )


def test_a_scale_learned_by_the_likelihood(backend):
    x, mean = (rand(4, 7, seed=1) * 255).round() / 255, rand(4, 7, seed=2)
    likelihood = DiscretizedLogistic(low=-1.0, scale=0.2, learned=True).to(DEVICE)
    assert [n for n, _ in likelihood.named_parameters()] == ["log_scale"]
    free = DiscretizedLogistic(low=-1.0)
    x = 2 * x - 1
    expected = free.log_prob(x, (mean, torch.full_like(mean, math.log(0.2))))
    torch.testing.assert_close(likelihood.log_prob(x, mean), expected)


def test_invalid_grids_are_refused():
    for levels in (1, 2.0, True):
        with pytest.raises((TypeError, ValueError), match="levels must be .*the number of values of x; got"):
            DiscretizedLogistic(levels=levels)
    with pytest.raises(ValueError, match="low must be below high"):
        DiscretizedLogistic(low=1.0)
    with pytest.raises(TypeError, match=r"must return \(mean, log_scale\), got a tensor.*scale=0.1"):
        DiscretizedLogistic().log_prob(torch.zeros(2, 3), torch.zeros(2, 3))
