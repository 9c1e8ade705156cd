"""Tests specific to poisson_log_prob; common ones are in test_likelihoods.py."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from fastvae import ops

from .conftest import DEVICE


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 500])
@pytest.mark.parametrize("count", [0, 1, 2, 7, 100, 10**4, 10**6, 10**9])
def test_counts_of_any_size(backend, dtype, columns, count):
    """Accurate in float32 near the mode, where x r, exp(r) and log x! cancel to a few nats."""
    for ratio in (0.3, 0.9, 1.0, 1.001, 1.3, 4.0):
        rate = max(count, 0.5) * ratio
        log_rate = torch.tensor(math.log(rate), dtype=dtype)
        exact = stats.poisson.logpmf(count, math.exp(float(log_rate)))
        x = torch.full((1, columns), count, dtype=torch.int64, device=DEVICE)
        out = ops.poisson_log_prob(x, log_rate.to(DEVICE).expand(1, columns))
        # The difference of log rate and log count has the roundings of both, times its derivative.
        u = torch.finfo(dtype).eps / 2
        moved = abs(count - rate) * (4 * abs(float(log_rate)) + 8 * abs(math.log(max(count, 1))) + 8)
        # SciPy's own terms cancel in float64.
        bound = columns * (u * (moved + 40 * abs(exact) + 40) + 1e-14 * max(count, 1) * 30)
        assert abs(float(out) - columns * exact) <= bound


@pytest.mark.parametrize("columns", [1, 300])
@pytest.mark.parametrize(
    "x, log_rate, value, gradient",
    [
        (0.0, -math.inf, 0.0, 0.0),
        (3.0, -math.inf, -math.inf, 3.0),
        (0.0, math.inf, -math.inf, -math.inf),
        (3.0, math.inf, -math.inf, -math.inf),
        (0.0, -200.0, 0.0, 0.0),
        (1.0, -200.0, -200.0, 1.0),
        (0.0, 0.0, -1.0, -1.0),
        (1e-40, 1.0, -math.e, -math.e),
        (1e-30, 20.0, -math.exp(20.0), -math.exp(20.0)),
    ],
)
def test_infinite_rates(backend, x, log_rate, value, gradient, columns):
    # The other elements of a long row are certain: count 0 at rate 0.
    rates, data = torch.full((1, columns), -math.inf, device=DEVICE), torch.zeros(1, columns, device=DEVICE)
    rates[0, -1], data[0, -1] = log_rate, x
    rates.requires_grad_()
    out = ops.poisson_log_prob(data, rates)
    torch.testing.assert_close(out.detach().cpu(), torch.tensor([value]), rtol=1e-6, atol=0)
    grad = torch.autograd.grad(out.sum(), rates)[0]
    torch.testing.assert_close(grad[:, -1].cpu(), torch.tensor([gradient]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [1, 300])
def test_a_sample_of_zero_weight_has_no_gradient(backend, columns):
    """A sample of weight 0 has zero gradient for any rate: 0 times infinity would spoil the whole batch's."""
    rates = torch.tensor([1.0, 200.0, math.inf], device=DEVICE)[:, None, None].expand(3, 2, columns).clone()
    x, grad = torch.ones(2, columns, device=DEVICE), torch.tensor([1.0, 0.0, 0.0], device=DEVICE)
    out = ops.poisson_log_prob(x, rates.requires_grad_())
    (found,) = torch.autograd.grad(out, rates, grad[:, None].expand(3, 2))
    expected = (1 - math.e) * grad[:, None, None].expand(3, 2, columns)
    torch.testing.assert_close(found, expected)


def test_many_zeros_add_nothing(backend):
    """Zeros at tiny rates add nothing: a constant error in each would be a nat in a million genes."""
    x = torch.zeros(1, 10**5, dtype=torch.uint8, device=DEVICE)
    out = ops.poisson_log_prob(x, torch.full((1, 10**5), -30.0, device=DEVICE))
    torch.testing.assert_close(out.double().cpu(), torch.tensor([-1e5 * math.exp(-30.0)]).double())
