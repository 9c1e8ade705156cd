"""Tests specific to laplace_log_prob and logistic_log_prob; common ones are in test_likelihoods.py."""

from __future__ import annotations

import math

import pytest
import torch

from fastvae import ops

from .conftest import DEVICE


def run(likelihood, columns, *values):
    """Return log p and the gradients by x, location and log_scale of a row's last element."""
    filled = [torch.zeros(1, columns, device=DEVICE) for _ in values]
    for tensor, value in zip(filled, values, strict=True):
        tensor[0, -1] = value
        tensor.requires_grad_()
    out = getattr(ops, f"{likelihood}_log_prob")(*filled)
    grads = torch.autograd.grad(out.sum(), filled)
    # The other elements are at their location, where the scale is 1.
    at_zero = {"laplace": -math.log(2), "logistic": -2 * math.log(2)}[likelihood]
    return float(out.detach()) - (columns - 1) * at_zero, *(float(g[0, -1]) for g in grads)


def check(found, columns, value, *slopes):
    """Assert slopes to a few roundings, and the value to those of a row's sum."""
    assert found[0] == pytest.approx(value, rel=1e-6, abs=4e-7 * columns)
    assert found[1:] == pytest.approx(slopes, rel=1e-6, abs=1e-30)


@pytest.mark.parametrize("columns", [1, 500])
@pytest.mark.parametrize(
    "x, location, log_scale, value, to_location, to_scale",
    [
        # A tie has gradient 0.
        (1.5, 1.5, 0.0, -math.log(2), 0.0, -1.0),
        (-0.0, 0.0, 0.0, -math.log(2), 0.0, -1.0),
        # The smallest difference has a sign.
        (1e-45, 0.0, 0.0, -math.log(2), 1.0, -1.0),
        (-1e-45, 0.0, 0.0, -math.log(2), -1.0, -1.0),
        (3e38, -3e38, 0.0, -math.inf, 1.0, math.inf),
        (math.inf, 0.0, 0.0, -math.inf, 1.0, math.inf),
        (0.0, math.inf, 0.0, -math.inf, -1.0, math.inf),
        (2.0, 1.0, 80.0, -math.log(2) - 80, math.exp(-80), -1.0),
        (2.0, 1.0, -80.0, -math.exp(80), math.exp(80), math.exp(80)),
    ],
)
def test_laplace_at_extreme_arguments(backend, columns, x, location, log_scale, value, to_location, to_scale):
    found = run("laplace", columns, x, location, log_scale)
    check(found, columns, value, -to_location, to_location, to_scale)


@pytest.mark.parametrize("columns", [1, 500])
@pytest.mark.parametrize(
    "x, location, log_scale, value, to_location, to_scale",
    [
        (1.5, 1.5, 0.0, -2 * math.log(2), 0.0, -1.0),
        (2e-20, 0.0, 0.0, -2 * math.log(2), 1e-20, -1.0),
        (100.0, 0.0, 0.0, -100.0, 1.0, 99.0),
        (-100.0, 0.0, 0.0, -100.0, -1.0, 99.0),
        (math.inf, 0.0, 0.0, -math.inf, 1.0, math.inf),
        (-math.inf, 0.0, 0.0, -math.inf, -1.0, math.inf),
        (2.0, 1.0, -80.0, -math.exp(80), math.exp(80), math.exp(80)),
    ],
)
def test_logistic_at_extreme_arguments(
    backend, columns, x, location, log_scale, value, to_location, to_scale
):
    found = run("logistic", columns, x, location, log_scale)
    check(found, columns, value, -to_location, to_location, to_scale)


@pytest.mark.parametrize("likelihood", ["laplace", "logistic"])
def test_nan_reaches_every_gradient(backend, likelihood):
    for at in range(3):
        values = [0.5, 0.25, 0.0]
        values[at] = math.nan
        assert all(math.isnan(v) for v in run(likelihood, 3, *values)), at
