"""Benchmark of the bound from the decoder's output: likelihood, term and both reductions, with gradients."""

from __future__ import annotations

import math

import torch

from fastvae.ops.reduce import BoundReduction, reduce

from .likelihood import eager_bernoulli
from .measure import COMPILE, CPU, OURS, Place, op_works
from .normal_diagonal import EXP


def works():
    yield from bound(1, 32, 64, {"eager": 2.0})
    yield from bound(1, 128, 784, {"eager": 2.0, COMPILE: 1.0})
    yield from bound(50, 64, 784, {"eager": 2.0, COMPILE: 1.0})


def bound(k, b, pixels, target, place: Place = CPU):
    """Yield the works of one size: Bernoulli, batch mean; with one sample an ELBO, else an IWAE bound."""
    how = BoundReduction(-1.0, "mean", "mean") if k == 1 else BoundReduction(1.0, "log_mean_exp", "mean")

    def eager(x, logits, term):
        log_px = eager_bernoulli(x, logits.unflatten(0, (k, b)))
        if k == 1:
            return (log_px[0] - term).mean()
        return (torch.logsumexp(log_px + term, 0) - math.log(k)).mean()

    def make():
        x = torch.rand(b, pixels, device=place.device).round().to(place.dtype)
        # A factor of 0.1, so that no single sample has all the weight.
        logits = (0.1 * place.randn(k * b, pixels)).requires_grad_()
        term = torch.randn((k, b) if k > 1 else (b,), device=place.device).requires_grad_()
        return x, logits, term

    size, n = place.dtype.itemsize, k * b * pixels
    forward = size * (b * pixels + n) + 4 * k * b
    yield from op_works(
        "reduce",
        f"{k}×{b}×{pixels}",
        make,
        {OURS: lambda x, logits, term: reduce("bernoulli", x, (logits,), term, None, how)[0], "eager": eager},
        lambda outputs, *wide: eager(*wide),
        sampling=False,
        elements=n,
        moved=(forward, 2 * forward + size * n),
        operations=(n * (EXP + 10), n * (2 * EXP + 16)),
        target=target,
        place=place,
    )
