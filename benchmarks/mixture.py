"""Benchmark of densities of normal mixtures, as of a learned prior or a VampPrior."""

from __future__ import annotations

import math

import torch

from fastvae import ops

from .measure import COMPILE, CPU, OURS, Place, op_works
from .normal_diagonal import EXP

LOG_2_PI = math.log(2 * math.pi)


def works(place: Place = CPU):
    yield from mixture(5000, 500, 50, {"eager": 3.0, COMPILE: 1.2}, place)
    yield from mixture(128, 500, 50, {}, place)
    yield from mixture(128, 10, 2, {}, place)
    yield from mixture(5000, 10, 50, {}, place)


def eager(z, mu, logvar, logits):
    """Compute the density as the VampPrior's own code does."""
    white = (z[:, None] - mu) * torch.exp(-0.5 * logvar)
    scores = -0.5 * (white.square() + logvar + LOG_2_PI).sum(2)
    return torch.logsumexp(torch.log_softmax(logits, 0) + scores, 1)


def matrices(z, mu, logvar, logits):
    """Compute the density by two matrix products, which lose (mu / sigma)² roundings."""
    precision = torch.exp(-logvar)
    constant = torch.log_softmax(logits, 0) - 0.5 * (mu.square() * precision + logvar + LOG_2_PI).sum(1)
    scores = constant + z @ (mu * precision).T - 0.5 * (z.square() @ precision.T)
    return torch.logsumexp(scores, 1)


def mixture(n: int, u: int, d: int, target, place: Place = CPU):
    """Yield the works of z [n, d] and u components."""
    pairs, size = n * u * d, place.dtype.itemsize
    once = size * (n * d + 2 * u * d)
    yield from op_works(
        "mixture_log_prob",
        f"{n}, {u} components, D={d}",
        lambda: (
            place.randn(n, d, requires_grad=True),
            place.randn(u, d, requires_grad=True),
            (0.3 * place.randn(u, d)).requires_grad_(),
            place.randn(u, requires_grad=True),
        ),
        {OURS: ops.mixture_log_prob, "eager": eager, "products of matrices": matrices},
        lambda outputs, *wide: eager(*wide),
        sampling=False,
        elements=pairs,
        moved=(once, 3 * once),
        operations=(3 * pairs + n * u * EXP, 12 * pairs + 2 * n * u * EXP),
        target=target,
        place=place,
        tolerance=1e-3,
    )
