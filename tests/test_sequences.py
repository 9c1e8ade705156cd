"""Sequences: docs/sequences.md runs, and its loop and its two calls compute the textbook's bound."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import distributions as td
from torch.nn import functional

from fastvae import ops
from fastvae.random import draw_seed, normal

from .conftest import DEVICE
from .models import randn

PAGE = Path(__file__).parents[1] / "docs" / "sequences.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the documentation is not there")
def test_the_page_runs():
    """Every block runs, and its numbers are those of torch's densities for the same noise."""
    text = PAGE.read_text("utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.S | re.M))
    assert len(blocks) == 3
    space: dict = {"__name__": "sequences"}
    torch.manual_seed(2)
    for i, block in enumerate(blocks):
        lines = "\n" * text[: block.start(1)].count("\n")
        exec(compile(lines + block[1], str(PAGE), "exec"), space)
        if i == 1:
            _check_two_calls(space)
    assert space["bound"].shape == (32,) and bool((space["bound"] < 0).all())


def _check_two_calls(space):
    """Assert that z is the first call's, and the KL that of the same q to the transition's normal."""
    mu, logvar, z, (m, v) = (space[name] for name in ("mu", "logvar", "z", "prior"))
    eps = normal(space["seed"], 1, *mu.shape)[0]
    torch.testing.assert_close(z, mu + torch.exp(0.5 * logvar) * eps, rtol=1e-5, atol=1e-5)
    q, p = td.Normal(mu, torch.exp(0.5 * logvar)), td.Normal(m, torch.exp(0.5 * v))
    # A sum of 16 terms of order one in float32.
    torch.testing.assert_close(space["kl"], td.kl_divergence(q, p).sum(1), rtol=1e-5, atol=1e-5)


def test_a_loop_has_the_bound_and_the_gradients_of_the_textbook(backend):
    """A recurrence of three steps, whose prior has a row for each example, against plain PyTorch."""
    length, batch, latent, features = 3, 5, 4, 7
    x = randn(length, batch, features, seed=1).gt(0).double()
    weights = [
        randn(n, m, seed=2 + i, dtype=torch.float64).mul_(0.5).requires_grad_()
        for i, (n, m) in enumerate(
            ((latent, 2 * latent), (features + latent, 2 * latent), (latent, features))
        )
    ]

    def run(ours):
        """Return the bound; the state is the last draw."""
        torch.manual_seed(4)
        state, total = x.new_zeros(batch, latent), 0.0
        for x_t in x:
            m, v = (state @ weights[0]).chunk(2, 1)
            mu, logvar = (torch.cat((x_t, state), 1) @ weights[1]).chunk(2, 1)
            if ours:
                z, kl = ops.rsample_kl(mu, logvar, prior=(m, v))
                log_px = ops.bernoulli_log_prob(x_t, z @ weights[2])
            else:
                eps = normal(draw_seed(x.device), 1, batch, latent, dtype=torch.float64)[0]
                z = mu + torch.exp(0.5 * logvar) * eps
                kl = 0.5 * (v - logvar + (logvar - v).exp() + (mu - m) ** 2 / v.exp() - 1).sum(1)
                loss = functional.binary_cross_entropy_with_logits(z @ weights[2], x_t, reduction="none")
                log_px = -loss.sum(1)
            total, state = total + (log_px - kl).mean(), z
        return total, torch.autograd.grad(total, weights)

    bound, grads = run(True)
    expected, wanted = run(False)
    # Sums of a few dozen terms in float64 (Triton's elementary functions have float32's accuracy).
    tolerance = 1e-5 if backend == "triton" else 1e-12
    torch.testing.assert_close(bound, expected, rtol=tolerance, atol=tolerance)
    for got, want in zip(grads, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=100 * tolerance, atol=100 * tolerance)


@pytest.mark.parametrize("change", ["shape", "dtype", "list"])
def test_priors_that_need_validation_give_the_same_numbers(change, backend):
    """A prior that broadcasts, has another dtype or is a list equals the same one as two tensors [B, D]."""
    mu, logvar, m, v = (randn(5, 3, seed=i) for i in range(4))
    if change == "shape":
        m, v = m[:1], v[0]
    other = (m.double(), v.double()) if change == "dtype" else [m, v] if change == "list" else (m, v)
    seed = torch.tensor(7, device=DEVICE)
    z, kl = ops.rsample_kl(mu, logvar, prior=other, seed=seed)
    want_z, want_kl = ops.rsample_kl(
        mu, logvar, prior=(m.expand(5, 3).contiguous(), v.expand(5, 3).contiguous()), seed=seed
    )
    torch.testing.assert_close(z.float(), want_z, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(kl.float(), want_kl, rtol=1e-5, atol=1e-5)
