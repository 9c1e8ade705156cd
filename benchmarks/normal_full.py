"""Benchmark of rsample_tril: draws of a normal distribution with a full covariance."""

from __future__ import annotations

import functools
import math

import torch

from fastvae import ops

from .measure import COMPILE, CPU, FALLBACK, OURS, Place, op_works
from .normal_diagonal import EXP, NORMAL

LOG_2_PI = math.log(2 * math.pi)


def works(place: Place = CPU):
    yield from rsample_tril(50, 128, 50, {"eager": 2.0, COMPILE: 2.0, FALLBACK: 2.0}, place)
    yield from rsample_tril(1, 128, 50, {}, place)
    yield from rsample_tril(50, 128, 2, {}, place)
    yield from rsample_tril(50, 64, 128, {}, place)
    yield from rsample_tril(5000, 4, 50, {}, place)


@functools.cache
def places(d: int, device: torch.device):
    """Return rows and columns of the packed numbers, and the packed indices of the diagonal."""
    rows, columns = torch.tril_indices(d, d, device=device)
    diagonal = torch.arange(d, device=device)
    return rows, columns, diagonal * (diagonal + 3) // 2


def matrices(tril, d: int):
    """Return L [B, D, D], and the logarithms of its diagonal [B, D]."""
    rows, columns, diagonal = places(d, tril.device)
    logs = tril[:, diagonal]
    scale = tril.new_zeros(len(tril), d, d)
    scale[:, rows, columns] = tril.index_copy(1, diagonal, logs.exp())
    return scale, logs


def formula(eps, mu, scale, logs):
    z = mu + torch.bmm(eps.transpose(0, 1), scale.mT).transpose(0, 1)
    return z, -0.5 * (eps.square() + LOG_2_PI).sum(-1) - logs.sum(-1)


def exact(outputs, mu, tril):
    """Recover the noise behind any implementation's z, assert that it is standard normal; return results."""
    scale, logs = matrices(tril, mu.shape[1])
    moved = (outputs[0] - mu).detach().transpose(0, 1).mT
    eps = torch.linalg.solve_triangular(scale.detach(), moved, upper=False).mT.transpose(0, 1)
    n = eps.numel()
    assert abs(float(eps.mean())) < 6 / n**0.5, f"the noise has a mean of {float(eps.mean()):.3g}"
    variance = float(eps.var())
    assert abs(variance - 1) < 6 * (2 / n) ** 0.5, f"the noise has a variance of {variance:.3g}"
    return formula(eps, mu, scale, logs)


def rsample_tril(k: int, b: int, d: int, target, place: Place = CPU):
    """Yield the works of one size."""

    def eager(mu, tril):
        scale, logs = matrices(tril, d)
        return formula(place.randn(k, b, d), mu, scale.to(mu.dtype), logs)

    packed = d * (d + 1) // 2
    # Forward: mu and tril in, both results out. Backward: tril and both upstream gradients in, gradients out.
    size = place.dtype.itemsize
    forward = size * (b * (d + packed) + k * b * d) + 4 * k * b
    backward = forward + size * b * packed
    products = k * b * packed
    yield from op_works(
        "rsample_tril",
        f"{k}×{b}×{d}",
        lambda: (
            place.randn(b, d, requires_grad=True),
            # The noise could not be recovered from a larger one.
            (0.5 / d**0.5 * place.randn(b, packed)).requires_grad_(),
        ),
        {OURS: lambda mu, tril: ops.rsample_tril(mu, tril, k=k), "eager": eager},
        exact,
        sampling=True,
        elements=max(k * b * d, b * d * d),
        moved=(forward, forward + backward),
        operations=(
            k * b * d * (NORMAL + 3) + products + b * d * EXP,
            k * b * d * (NORMAL + 4) + 2 * products,
        ),
        target=target,
        place=place,
    )
