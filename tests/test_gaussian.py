"""Tests specific to gaussian_log_prob; common ones are in test_likelihoods.py."""

from __future__ import annotations

import math

import pytest
import torch

from fastvae import ops

from .conftest import DEVICE
from .models import randn


def test_large_inputs(backend):
    """Large inputs, with x - mean = 1 at 1e4, reveal a bias added per tile or a dropped constant."""
    x = torch.full((2, 3), 10001.0, device=DEVICE)
    mean = torch.full((5, 2, 3), 10000.0, device=DEVICE)
    out = ops.gaussian_log_prob(x, mean, 2 * math.log(0.5))
    expected = 3 * (-0.5 * math.log(2 * math.pi) + math.log(2) - 2.0)
    torch.testing.assert_close(out, torch.full((5, 2), expected, device=DEVICE), rtol=1e-6, atol=0)


def test_padding_samples_have_no_gradient(backend):
    """Padding samples, with mean 0 at distance 1e3 from x, add no gradient: 0 times infinity would be NaN."""
    x, mean = torch.full((5, 6), 1e3, device=DEVICE), torch.full((3, 5, 6), 1e3, device=DEVICE)
    logvar = torch.full((6,), -80.0, device=DEVICE, requires_grad=True)
    grad = torch.autograd.grad(ops.gaussian_log_prob(x, mean, logvar).sum(), logvar)[0]
    torch.testing.assert_close(grad, torch.full((6,), -7.5, device=DEVICE))


def test_half_precision_subtracts_in_float32(backend):
    """The difference is taken in float32: 256.5 - 256 would be lost by rounding x to bfloat16 first."""
    x = torch.full((1, 1), 256.5, device=DEVICE)
    mean = torch.full((1, 1), 256.0, device=DEVICE, dtype=torch.bfloat16)
    out = ops.gaussian_log_prob(x, mean, 0.0)
    torch.testing.assert_close(out, torch.full((1,), -0.5 * (math.log(2 * math.pi) + 0.25), device=DEVICE))


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 5)])
def test_a_float64_log_variance_widens_the_result(backend, shape):
    """A float64 log variance gives a float64 result, eager, compiled and on every backend."""
    x, mean = torch.randn(3, 5, device=DEVICE), torch.randn(2, 3, 5, device=DEVICE, requires_grad=True)
    logvar = torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
    out = ops.gaussian_log_prob(x, mean, logvar)
    exact = -0.5 * (math.log(2 * math.pi) + logvar + (x - mean.double()) ** 2 * torch.exp(-logvar)).sum(2)
    torch.testing.assert_close(out, exact)
    grads = torch.autograd.grad(out.sum(), (mean, logvar))
    assert [g.dtype for g in grads] == [torch.float32, torch.float64]


def test_the_gradients_of_a_shared_log_variance_are_summed_before_they_are_rounded(backend):
    """Opposite gradients cancel to a thousandth, which rounding each to bfloat16 would bury."""
    k, b, n = 64, 3, 5
    x = torch.zeros(b, n, dtype=torch.bfloat16, device=DEVICE)
    mean = torch.randn(1, b, n, device=DEVICE).bfloat16().expand(k, b, n)
    logvar = torch.zeros(b, n, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    sign = torch.tensor([1.0, -0.999], device=DEVICE).repeat(k // 2)[:, None].expand(k, b)
    (grad,) = torch.autograd.grad(ops.gaussian_log_prob(x, mean, logvar), logvar, sign)
    square = mean.double().square()
    exact = (sign.double()[:, :, None] * 0.5 * (square - 1)).sum(0)
    # One rounding to bfloat16, and those of a sum of k terms in float32, in any order.
    bound = 2**-9 * exact.abs() + k * 2**-23 * (square + 1).sum(0)
    assert bool(((grad.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("shape", [(), (20,), (3, 1, 1), (1, 7, 20), (3, 7, 20)])
def test_a_fixed_log_variance_gets_no_gradient(backend, shape):
    """Only the mean's gradient is computed for a fixed log variance of any shape."""
    k, b, x = 3, 7, 20
    data, mean, grad = randn(b, x, seed=1), randn(k, b, x, seed=2).requires_grad_(), randn(k, b, seed=3)
    logvar = randn(*shape, seed=4)
    (got,) = torch.autograd.grad(ops.gaussian_log_prob(data, mean, logvar), mean, grad)
    wide = (t.detach().double() for t in (data, mean, logvar, grad))
    data, mean, logvar, grad = wide
    expected = grad[..., None] * (data - mean) * torch.exp(-logvar)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_one_variance_for_each_long_row(backend):
    """The gradient of a variance that a row shares sums over all tiles of the row."""
    k, b, size = 2, 3, 2500
    x, mean = randn(b, size, seed=1), randn(k, b, size, seed=2)
    logvar = randn(k, b, 1, seed=3).requires_grad_()
    upstream = randn(k, b, seed=4)
    (grad,) = torch.autograd.grad((ops.gaussian_log_prob(x, mean, logvar) * upstream).sum(), logvar)
    wide = (x.double() - mean.double()).square().sum(-1, keepdim=True) * torch.exp(-logvar.detach().double())
    expected = 0.5 * upstream[..., None].double() * (wide - size)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-5, atol=1e-5 * size)
