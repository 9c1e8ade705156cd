"""Tests specific to bernoulli_log_prob; common ones are in test_likelihoods.py."""

from __future__ import annotations

import math

import pytest
import torch

from fastvae import ops

from .conftest import DEVICE


@pytest.mark.parametrize("columns", [1, 500])
@pytest.mark.parametrize(
    "x, logit, value, gradient",
    [
        (1.0, math.inf, 0.0, 0.0),
        (0.0, -math.inf, 0.0, 0.0),
        (0.0, math.inf, -math.inf, -1.0),
        (1.0, -math.inf, -math.inf, 1.0),
        (1.0, 200.0, 0.0, 0.0),
        (0.0, 200.0, -200.0, -1.0),
        (0.0, -20.0, -math.log1p(math.exp(-20.0)), -1 / (1 + math.exp(20.0))),
        (0.5, 0.0, -math.log(2), 0.0),
    ],
)
def test_infinite_logits(backend, x, logit, value, gradient, columns):
    """0 * inf is 0: an infinite logit has log p 0 if right and -inf if wrong."""
    # The other pixels of a long row have log p of about -e^-200.
    logits, data = torch.full((1, columns), 200.0, device=DEVICE), torch.ones(1, columns, device=DEVICE)
    logits[0, -1], data[0, -1] = logit, x
    logits.requires_grad_()
    out = ops.bernoulli_log_prob(data, logits)
    torch.testing.assert_close(out.detach().cpu(), torch.tensor([value]), rtol=1e-6, atol=0)
    grad = torch.autograd.grad(out.sum(), logits)[0]
    torch.testing.assert_close(grad[:, -1].cpu(), torch.tensor([gradient]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("low, high, hint", [(-1.0, 1.0, r"\(x \+ 1\) / 2"), (0.0, 255.0, "x / 255")])
def test_targets_outside_the_unit_interval(backend, monkeypatch, low, high, hint):
    monkeypatch.setenv("FASTVAE_CHECK", "1")  # on a GPU the check is optional
    x = torch.rand(4, 9, device=DEVICE) * (high - low) + low
    x[0, 0], x[3, 8] = low, high
    with pytest.raises(ValueError, match=rf"\[{low:g}, {high:g}\].*\[0, 1\].*{hint}"):
        ops.bernoulli_log_prob(x, torch.randn(2, 4, 9, device=DEVICE))
