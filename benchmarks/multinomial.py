"""Counts of clicks and words, few of them not 0."""

from __future__ import annotations

import torch

from fastvae import ops

from .measure import COMPILE, CPU, OURS, Place, op_works
from .normal_diagonal import EXP

# Required speed-ups on a CPU, forward and backward.
TARGET = {"eager": 1.3, COMPILE: 1.0}


def works(place: Place = CPU):
    yield from clicks(500, 4000, place)
    yield from clicks(128, 20000, place)


def _eager(x, logits):
    return (x * torch.log_softmax(logits, 1)).sum(1)


def clicks(rows: int, items: int, place: Place = CPU):
    n, size = rows * items, place.dtype.itemsize
    yield from op_works(
        "multinomial_log_prob",
        f"{rows}×{items}, without the coefficient",
        lambda: (
            (torch.rand(rows, items, device=place.device) < 0.015).to(place.dtype),
            place.randn(rows, items, requires_grad=True),
        ),
        {OURS: lambda x, logits: ops.multinomial_log_prob(x, logits, coefficient=False), "eager": _eager},
        lambda outputs, *wide: _eager(*wide),
        sampling=False,
        elements=n,
        moved=(2 * size * n, 5 * size * n),
        operations=(n * (EXP + 6), n * (2 * EXP + 9)),
        target=TARGET,
        place=place,
        # Relative to sums of which the benchmark's data cancel little.
        tolerance=1e-4,
    )
