"""log p(x|z) of all pairs of examples and latents, beside one product in float32 and beside tiles."""

from __future__ import annotations

import torch
from torch.nn import functional

from fastvae import ops

from .latent import EXP
from .measure import CPU, OURS, Place, op_works


def works(place: Place = CPU):
    yield from bernoulli(1000, 1000, 784, place)


def tiles(x, logits):
    """By the likelihood, some latents at a time."""
    parts = [ops.bernoulli_log_prob(x, p[:, None].expand(len(p), *x.shape)) for p in logits.split(5)]
    return torch.cat(parts)


def eager(x, logits):
    """In the precision of the logits, whose digits cancel."""
    return logits @ x.mT - functional.softplus(logits).sum(1, keepdim=True)


def bernoulli(k: int, b: int, size: int, place: Place = CPU):
    n = place.dtype.itemsize
    yield from op_works(
        "all_pairs_log_prob",
        f"{k}×{b}×{size}",
        lambda: (torch.rand(b, size, device=place.device).round(), place.randn(k, size, requires_grad=True)),
        {OURS: ops.all_pairs_log_prob, "eager": eager, "tiles": tiles},
        lambda outputs, x, logits: eager(x, logits),
        sampling=False,
        elements=k * size,
        moved=(n * (b + k) * size + n * k * b, n * (2 * b + 3 * k) * size + 2 * n * k * b),
        operations=(k * b * size + k * size * EXP, 2 * k * b * size + 2 * k * size * EXP),
        target={},
        place=place,
    )
