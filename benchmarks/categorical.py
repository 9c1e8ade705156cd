"""Classes of pixels, words and columns, the class axis first or last."""

from __future__ import annotations

import torch
from torch.nn import functional

from fastvae import ops

from .measure import COMPILE, CPU, OURS, Place, op_works
from .normal_diagonal import EXP

# Required speed-ups on a CPU, forward and backward.
TARGET = {"eager": 1.5, COMPILE: 1.0}


def works(place: Place = CPU):
    yield from classes(64, 256, 784, 1, place)
    yield from classes(32, 5000, 30, -1, place)
    yield from classes(500, 4000, 1, -1, place)
    yield from classes(500, 8, 200, -1, place)


def _eager(x, logits, axis):
    rows = logits if axis == 1 else logits.movedim(-1, 1)
    return -functional.cross_entropy(rows, x.long(), reduction="none").sum(-1)


def classes(rows: int, count: int, positions: int, axis: int, place: Place = CPU):
    n, size = rows * count * positions, place.dtype.itemsize
    shape = (rows, count, positions) if axis == 1 else (rows, positions, count)
    yield from op_works(
        "categorical_log_prob",
        "×".join(map(str, shape)) + (", classes last" if axis == -1 else ""),
        lambda: (
            torch.randint(count, (rows, positions), dtype=torch.int32, device=place.device),
            place.randn(*shape, requires_grad=True),
        ),
        {
            OURS: lambda x, logits: ops.categorical_log_prob(x, logits, axis=axis),
            "eager": lambda x, logits: _eager(x, logits, axis),
        },
        lambda outputs, *wide: _eager(*wide, axis),
        sampling=False,
        elements=n,
        moved=(size * n, 3 * size * n),
        operations=(n * (EXP + 5), n * (2 * EXP + 8)),
        target=TARGET,
        place=place,
    )
