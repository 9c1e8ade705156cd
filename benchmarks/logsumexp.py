"""Benchmark of log_mean_exp."""

from __future__ import annotations

import math

import torch

from fastvae import ops

from .measure import COMPILE, CPU, OURS, Place, op_works
from .normal_diagonal import EXP


def works():
    for k, n in ((1, 128), (50, 128), (50, 8192), (5000, 256)):
        yield from log_mean_exp(k, n, {"eager": 2.0, COMPILE: 1.0} if k == 5000 else {})


def log_mean_exp(k, n, target, place: Place = CPU):
    """Yield the works of one size [K, N]."""

    def eager(log_w):
        return torch.logsumexp(log_w, 0) - math.log(k)

    size = place.dtype.itemsize
    forward = size * k * n + 4 * n
    yield from op_works(
        "log_mean_exp",
        f"{k}×{n}",
        lambda: ((10 * place.randn(k, n)).requires_grad_(),),
        {OURS: ops.log_mean_exp, "eager": eager},
        lambda outputs, *wide: eager(*wide),
        sampling=False,
        elements=k * n,
        moved=(forward, forward + 2 * size * k * n + 4 * n),
        operations=(k * n * (EXP + 3), k * n * (2 * EXP + 6)),
        target=target,
        place=place,
    )
