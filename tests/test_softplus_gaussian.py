"""Tests specific to softplus_gaussian_log_prob; common ones are in test_likelihoods.py."""

from __future__ import annotations

import math
import pickle

import mpmath
import pytest
import torch

import fastvae
from fastvae import ops
from fastvae.likelihoods import Gaussian, SoftplusGaussian

from .conftest import DEVICE
from .models import randn

RAW = (-79.0, -40.0, -10.0, -1.0, 0.0, 1e-6, 3.0, 30.0, 1e4, 1e30)
FLOORS = (0.0, 1e-30, 1e-4, 1.0)


def exact(delta: float, raw: float, log_floor: float) -> list[float]:
    """Return log p and its derivatives by the mean, raw and log_floor."""
    with mpmath.workdps(60):
        delta, raw, log_floor = mpmath.mpf(delta), mpmath.mpf(raw), mpmath.mpf(log_floor)
        k, floor = mpmath.exp(-abs(raw)), mpmath.exp(log_floor)
        variance = max(raw, 0) + mpmath.log1p(k) + floor
        by_raw = (1 if raw > 0 else k) / (1 + k)
        pull = (delta**2 / variance - 1) / 2 / variance
        log_p = -(mpmath.log(2 * mpmath.pi * variance) + delta**2 / variance) / 2
        return [float(v) for v in (log_p, delta / variance, pull * by_raw, pull * floor)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("floor", FLOORS)
def test_any_variance(backend, dtype, floor):
    """Accurate for any variance, also where the softplus is negligible against the floor, or without one."""
    log_floor = math.log(floor) if floor else -math.inf
    u = torch.finfo(dtype).eps / 2
    for delta in (0.0, 0.3, -2.0):
        raw = torch.tensor(RAW, dtype=dtype, device=DEVICE)[:, None]
        x = torch.full_like(raw, delta)
        given = [torch.zeros_like(raw), raw, torch.full_like(raw, log_floor)]
        leaves = [p.clone().requires_grad_() for p in given]
        out = ops.softplus_gaussian_log_prob(x, *leaves)
        found = [out, *torch.autograd.grad(out.sum(), leaves)]
        for i, row in enumerate(zip(*(t.flatten().tolist() for t in (x, *given[1:])), strict=True)):
            expected = exact(*row)
            # Errors of the variance's logarithm, and of the log floor in its exponential.
            size = 1 + abs(math.log(2 * math.pi)) + (abs(log_floor) if floor else 0)
            for name, got, e in zip(("log p", "mean", "raw", "floor"), found, expected, strict=True):
                number = float(got.flatten()[i])
                # Where d² / σ² - 1 cancels, the error is relative to its terms.
                cancels = abs(expected[1] ** 2) + abs(expected[1] / row[0] if row[0] else 0)
                bound = 16 * u * (size * abs(e) + (abs(log_floor) if floor and name == "log p" else 1))
                assert abs(number - e) <= bound + 16 * u * size * cancels, (name, row)


def test_infinite_raw_values_and_floors(backend):
    """Infinite raw values and floors give numbers; NaN gives NaN."""
    x = torch.full((1, 1), 0.5, device=DEVICE)
    for raw, log_floor in (
        (-math.inf, 0.0),
        (-1e30, -math.inf),
        (math.inf, 0.0),
        (0.0, math.inf),
        (0.0, 200.0),
    ):
        leaves = [torch.full_like(x, v).requires_grad_() for v in (0.0, raw, log_floor)]
        out = ops.softplus_gaussian_log_prob(x, *leaves)
        grads = torch.autograd.grad(out.sum(), leaves)
        # 1 / σ² may be as large as e⁸⁰.
        assert not any(bool(t.isnan().any()) for t in (out, *grads)), (raw, log_floor)
    for at in range(3):
        values = [torch.full_like(x, math.nan if i == at else 0.1) for i in range(3)]
        assert bool(ops.softplus_gaussian_log_prob(x, *values).isnan().all())


@pytest.mark.parametrize("floor", [0.0, 1e-4, 0.5])
def test_equals_a_gaussian(backend, floor):
    likelihood = Gaussian(scale="softplus", floor=floor)
    assert type(likelihood) is SoftplusGaussian and isinstance(likelihood, Gaussian)
    assert pickle.loads(pickle.dumps(likelihood)).floor == likelihood.floor == floor
    assert likelihood.scale is None
    x, mean, raw = randn(4, 7, seed=1), randn(12, 7, seed=2), randn(12, 7, seed=3)
    variance = torch.nn.functional.softplus(raw) + floor
    expected = Gaussian().log_likelihood(x, (mean, variance.log()), 3)
    torch.testing.assert_close(likelihood.log_likelihood(x, (mean, raw), 3), expected)
    q = torch.zeros(4, 2, device=DEVICE)
    terms = fastvae.elbo(x, q, lambda z: (mean, raw), k=3, likelihood=likelihood, terms=True)
    torch.testing.assert_close(terms.log_likelihood, expected.mean(0))
    assert torch.equal(likelihood.mean((mean, raw)), mean)
    assert Gaussian(scale="softplus").floor == 1e-4


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: Gaussian(scale="softmax"),
            TypeError,
            r"number or a tensor, or a name \(.*'softplus'.*got the str 'softmax'",
        ),
        (
            lambda: Gaussian(scale="softplus", floor=-1.0),
            ValueError,
            "floor is the least variance.*-1.0",
        ),
        (
            lambda: Gaussian(scale="softplus", floor=None),
            TypeError,
            "floor must be a number.*NoneType",
        ),
        (
            lambda: Gaussian(scale="softplus", learned=True),
            ValueError,
            r"comes from the decoder.*fastvae.likelihoods.Gaussian\(scale=0.1, learned=True\)",
        ),
        (
            lambda: Gaussian(scale="softplus").log_prob(torch.zeros(2, 3), torch.zeros(2, 3)),
            TypeError,
            r"must return \(mean, raw\), got a tensor.*fastvae.likelihoods.Gaussian\(scale=0.1\)",
        ),
    ],
)
def test_mistakes(make, error, message):
    with pytest.raises(error, match=message):
        make()
