"""Benchmark of an aggregate posterior and its marginals, as of a β-TCVAE's batch."""

from __future__ import annotations

import math

import torch

from fastvae import ops

from .measure import COMPILE, CPU, OURS, Place, op_works
from .normal_diagonal import EXP

LOG_2_PI = math.log(2 * math.pi)


def works(place: Place = CPU):
    yield from aggregate(64, 16, {"eager": 2.0}, place)
    yield from aggregate(512, 64, {"eager": 2.0, COMPILE: 1.2}, place)


def eager(z, mu, logvar):
    """Compute both densities from all pairs, as β-TCVAE's own code does."""
    white = (z[:, None] - mu) * torch.exp(-0.5 * logvar)
    pairs = -0.5 * (white.square() + logvar + LOG_2_PI) - math.log(len(mu))
    whole = torch.logsumexp(pairs.sum(2) + (z.shape[1] - 1) * math.log(len(mu)), 1)
    return whole, torch.logsumexp(pairs, 1)


def aggregate(b: int, d: int, target, place: Place = CPU):
    """Yield the works of a batch [b, d]."""
    pairs, once = b * b * d, place.dtype.itemsize * 3 * b * d
    yield from op_works(
        "aggregate_log_prob",
        f"{b}×{d}",
        lambda: (
            place.randn(b, d, requires_grad=True),
            place.randn(b, d, requires_grad=True),
            (0.3 * place.randn(b, d)).requires_grad_(),
        ),
        {OURS: ops.aggregate_log_prob, "eager": eager},
        lambda outputs, *wide: eager(*wide),
        sampling=False,
        elements=pairs,
        moved=(once, 3 * once),
        operations=(pairs * (6 + EXP), pairs * (18 + 2 * EXP)),
        target=target,
        place=place,
        tolerance=1e-3,
    )
