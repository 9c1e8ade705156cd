"""log_mean_exp of every backend against plain PyTorch in float64, and its edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastvae
from fastvae import ops

from . import formulas, strategies
from .compare import assert_accurate
from .conftest import DEVICE

SIZES = strategies.distinct_sizes(2)


@st.composite
def cases(draw, sizes=SIZES):
    k, n = draw(sizes)
    dtype = draw(strategies.dtypes)
    spread = draw(st.sampled_from([0.01, 1.0, 30.0]))
    shift = draw(st.sampled_from([0.0, -100.0, -1000.0, 700.0]))
    log_w = draw(strategies.tensors((k, n), dtype, spread=spread, device=DEVICE)) + shift
    return log_w, draw(strategies.tensors((n,), torch.float32, device=DEVICE))


def _run(log_w, grad):
    log_w = log_w.detach().requires_grad_()
    out = ops.log_mean_exp(log_w)
    return out, *torch.autograd.grad(out, log_w, grad.to(out.dtype))


def results(case):
    """Return (name, actual, plain PyTorch's, expected) for both results."""
    actual = _run(*case)
    with fastvae.use_backend("reference"):
        eager = _run(*case)
    return list(zip(("bound", "weights"), actual, eager, formulas.log_mean_exp(*case), strict=True))


@given(case=cases())
def test_log_mean_exp(backend, case):
    for result in results(case):
        assert_accurate(*result)


@pytest.mark.parametrize("k", [1, 5, 17, 40])
def test_the_gradient_equals_the_normalised_weights(backend, k):
    log_w = (3 * torch.randn(k, 6, device=DEVICE) - 1000).requires_grad_()
    ops.log_mean_exp(log_w).sum().backward()
    torch.testing.assert_close(log_w.grad.sum(0), torch.ones(6, device=DEVICE), rtol=1e-6, atol=0)
    torch.testing.assert_close(log_w.grad, torch.softmax(log_w.detach(), 0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("n", [1, 9])
@pytest.mark.parametrize("order", ["rising", "falling", "shuffled"])
def test_more_samples_than_a_tile(backend, n, order):
    """The running sum is rescaled whenever the maximum rises, over several tiles."""
    k = 5000
    log_w = torch.linspace(-60, 0, k, dtype=torch.float64, device=DEVICE)[:, None] - 100 * torch.arange(
        n, device=DEVICE
    )
    if order == "falling":
        log_w = log_w.flip(0)
    elif order == "shuffled":
        log_w = log_w[torch.randperm(k, generator=torch.Generator().manual_seed(n))]
    narrow = log_w.float().requires_grad_()
    out = ops.log_mean_exp(narrow)
    torch.testing.assert_close(out.double(), torch.logsumexp(log_w, 0) - math.log(k), rtol=1e-6, atol=1e-6)
    weights = torch.autograd.grad(out.sum(), narrow)[0]
    torch.testing.assert_close(weights.double(), torch.softmax(log_w, 0), rtol=2e-4, atol=1e-7)


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -3])
def test_any_axis(backend, dim):
    log_w = torch.randn(4, 3, 5, device=DEVICE, requires_grad=True)
    out = ops.log_mean_exp(log_w, dim)
    expected = torch.logsumexp(log_w, dim) - math.log(log_w.shape[dim])
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    actual, wanted = (torch.autograd.grad(o, log_w, grad)[0] for o in (out, expected))
    torch.testing.assert_close(actual, wanted)


def test_equal_weights_are_exact(backend):
    """Equal weights far from zero give themselves: exp would underflow, log K must not cost digits."""
    log_w = torch.full((7, 3), -1234.5, device=DEVICE)
    torch.testing.assert_close(ops.log_mean_exp(log_w), log_w[0], rtol=1e-7, atol=0)


@pytest.mark.parametrize("k", [1, 3, 20])
def test_all_minus_infinity(backend, k):
    log_w = torch.randn(k, 3, device=DEVICE)
    log_w[:, 1] = -math.inf
    log_w.requires_grad_()
    out = ops.log_mean_exp(log_w)
    assert out[1] == -math.inf and bool(out[[0, 2]].isfinite().all())
    out.sum().backward()
    assert torch.equal(log_w.grad[:, 1], torch.zeros(k, device=DEVICE))
    torch.testing.assert_close(log_w.grad[:, 0].sum(), torch.ones((), device=DEVICE))


@pytest.mark.parametrize("position", [0, 1, 18])
def test_some_minus_infinity(backend, position):
    log_w = torch.randn(19, 2, device=DEVICE) - 500
    log_w[position] = -math.inf
    log_w.requires_grad_()
    out = ops.log_mean_exp(log_w)
    torch.testing.assert_close(out, torch.logsumexp(log_w, 0) - math.log(19))
    out.sum().backward()
    assert torch.equal(log_w.grad[position], torch.zeros(2, device=DEVICE))


@pytest.mark.parametrize("position", [0, 1, 18])
@pytest.mark.parametrize("others", [0.0, -math.inf])
def test_nan_stays_in_its_column(backend, position, others):
    log_w = torch.full((19, 3), others, device=DEVICE)
    log_w[position, 1] = math.nan
    out = ops.log_mean_exp(log_w)
    assert out.isnan().tolist() == [False, True, False]


def test_plus_infinity(backend):
    log_w = torch.zeros(3, 2, device=DEVICE)
    log_w[1, 0] = math.inf
    assert ops.log_mean_exp(log_w).tolist() == [math.inf, 0.0]
    log_w[2, 0] = math.nan
    assert bool(ops.log_mean_exp(log_w)[0].isnan())


def test_denormal_weights_and_gradients_are_zero(backend):
    """Denormal weights and gradients are flushed to zero: they would slow a CPU's backward pass."""
    tiny = torch.finfo(torch.float32).tiny
    log_w = torch.tensor([[0.0], [-88.0], [-100.0], [-86.0]], device=DEVICE, requires_grad=True)
    grad = torch.autograd.grad(ops.log_mean_exp(log_w), log_w, torch.ones(1, device=DEVICE))[0].flatten()
    assert grad[1] == 0 and grad[2] == 0 and grad[3] > tiny
    grad = torch.autograd.grad(ops.log_mean_exp(log_w), log_w, torch.full((1,), 1e-3, device=DEVICE))[
        0
    ].flatten()
    assert grad[3] == 0 and float(grad[0]) == pytest.approx(1e-3)
    # A denormal weight is zero whatever its factor.
    grad = torch.autograd.grad(ops.log_mean_exp(log_w), log_w, torch.full((1,), 1e6, device=DEVICE))[
        0
    ].flatten()
    assert grad[1] == 0 and grad[3] > tiny


def test_empty(backend):
    log_w = torch.randn(4, 0, device=DEVICE, requires_grad=True)
    out = ops.log_mean_exp(log_w)
    assert out.shape == (0,)
    assert torch.autograd.grad(out.sum(), log_w)[0].shape == (4, 0)
    with pytest.raises(ValueError, match="no samples"):
        ops.log_mean_exp(torch.randn(0, 4, device=DEVICE))
