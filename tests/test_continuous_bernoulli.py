"""Tests specific to continuous_bernoulli_log_prob; common ones are in test_likelihoods.py."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch

from fastvae import ops
from fastvae.likelihoods import ContinuousBernoulli

from .conftest import DEVICE

LOGITS = (0.0, 1e-30, 1e-7, 1e-3, 0.1, 0.999999, 1.0, 1.000001, 2.0, 7.0, 30.0, 88.0, 200.0, 1e4, 1e30)


def exact(x: float, logit: float) -> tuple[float, float]:
    """Return log p and its derivative by the logit."""
    with mpmath.workdps(60):
        x, logit = mpmath.mpf(x), mpmath.mpf(logit)
        a, miss = abs(logit), 1 - x if logit > 0 else x
        if a == 0:
            return 0.0, float(x - 0.5)
        log_p = -miss * a - mpmath.log(-mpmath.expm1(-a) / a)
        # For a tiny logit 60 digits are too few.
        mean = 0.5 + logit / 12 if a < 1e-6 else 1 / -mpmath.expm1(-logit) - 1 / logit
        return float(log_p), float(x - mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [0.0, 1e-6, 0.3, 0.5, 0.75, 1.0])
def test_any_logit(backend, dtype, x):
    """Accurate to a few roundings of the terms, also around λ = ½, where its two poles meet."""
    u = torch.finfo(dtype).eps / 2
    for logit in (*LOGITS, *(-v for v in LOGITS)):
        given = torch.tensor([[logit]], dtype=dtype, device=DEVICE, requires_grad=True)
        data = torch.tensor([[x]], dtype=dtype, device=DEVICE, requires_grad=True)
        out = ops.continuous_bernoulli_log_prob(data, given)
        to_x, slope = torch.autograd.grad(out.sum(), (data, given))
        logit, value = float(given.detach()), float(data.detach())
        log_p, expected = exact(value, logit)
        miss = 1 - value if logit > 0 else value
        size = miss * abs(logit) + math.log(max(abs(logit), 1)) + min(abs(logit), 1)
        assert abs(float(out.detach()) - log_p) <= 8 * u * size, logit
        assert abs(float(slope) - expected) <= 8 * u, logit
        assert float(to_x) == logit


@pytest.mark.parametrize("columns", [1, 500])
def test_infinite_logits(backend, columns):
    """An infinite logit is a point mass at an end."""
    for x, logit, log_p in ((1, 1, math.inf), (0, 1, -math.inf), (1, -1, -math.inf), (0, -1, math.inf)):
        data, logits = (torch.full((1, columns), 0.0, device=DEVICE) for _ in range(2))
        data[0, -1], logits[0, -1] = x, logit * math.inf
        logits.requires_grad_()
        out = ops.continuous_bernoulli_log_prob(data, logits)
        (slope,) = torch.autograd.grad(out.sum(), logits)
        assert float(out.detach()) == log_p
        assert float(slope[0, -1]) == x - (logit > 0)


def test_the_density_integrates_to_1(backend):
    """The integral over x is 1, by Gauss-Legendre quadrature on 64 intervals."""
    logits = torch.tensor([-50.0, -3.0, 0.0, 1e-3, 0.7, 12.0], dtype=torch.float64, device=DEVICE)
    nodes = torch.tensor([-math.sqrt(0.6), 0.0, math.sqrt(0.6)], dtype=torch.float64, device=DEVICE)
    x = ((torch.arange(64, device=DEVICE)[:, None] + 0.5 + 0.5 * nodes) / 64).reshape(-1, 1)
    density = ContinuousBernoulli().log_prob(x.repeat(1, 6), logits.repeat(192, 1)).exp()
    weights = torch.tensor([5.0, 8.0, 5.0], dtype=torch.float64, device=DEVICE).repeat(64) / (18 * 64)
    torch.testing.assert_close(weights @ density, torch.ones_like(logits), rtol=1e-5, atol=0)
