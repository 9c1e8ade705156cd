"""Tests specific to log_normal_log_prob; common ones are in test_likelihoods.py."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

import fastvae
from fastvae import ops

from .conftest import DEVICE


@pytest.mark.parametrize("columns", [1, 300])
@pytest.mark.parametrize("x", [1e-44, 1.2e-38, 1e-30, 0.5, 1.0, 7.0, 1e30, 3e38])
def test_any_size(backend, columns, x):
    """Accurate for x of any size, including denormal numbers."""
    data = torch.full((1, columns), x, device=DEVICE)
    out = ops.log_normal_log_prob(data, torch.full((1, 1, columns), 3.0, device=DEVICE), math.log(20.0))
    exact = columns * stats.lognorm.logpdf(float(data[0, 0]), 20.0, scale=math.exp(3.0))
    assert float(out) == pytest.approx(exact, rel=2e-6, abs=2e-6 * columns * abs(math.log(x)))


@pytest.mark.parametrize("columns", [1, 300])
def test_zeros_and_infinities_have_no_density(backend, columns):
    for x in (0.0, -0.0, math.inf):
        data = torch.ones(2, columns, device=DEVICE)
        data[1, -1] = x
        out = ops.log_normal_log_prob(data, torch.zeros(3, 2, columns, device=DEVICE), 0.0)
        assert bool(out[:, 0].isfinite().all()) and bool((out[:, 1] == -math.inf).all())


def test_a_row_of_zero_weight_has_no_gradient(backend):
    """A row with a zero has bound -inf and no gradient, and does not affect the others' gradients."""
    x = torch.rand(3, 5, device=DEVICE) + 0.5
    x[1, 2] = 0
    x.requires_grad_()
    leaves = [torch.randn(4 * 3, 5, device=DEVICE).requires_grad_() for _ in range(2)]
    q = torch.zeros(3, 2, device=DEVICE)
    bound = fastvae.iwae(x, q, lambda z: tuple(leaves), k=4, likelihood="log_normal", reduction="none")
    assert bound[1] == -math.inf
    for grad in torch.autograd.grad(bound.sum(), [x, *leaves]):
        row = grad.reshape(-1, 3, 5)[:, 1]
        assert bool(grad.isfinite().all()) and bool((row == 0).all()) and bool((grad != 0).any())


@pytest.mark.parametrize("scale", [0.3, torch.tensor([0.1, 0.4, 0.9])])
def test_the_mean_with_a_scale(scale):
    location = torch.randn(4, 3)
    expected = torch.distributions.LogNormal(location, torch.as_tensor(scale)).mean
    torch.testing.assert_close(fastvae.likelihoods.LogNormal(scale).mean(location), expected)
