"""Nearest code of a VQ-VAE."""

from __future__ import annotations

import torch

from fastvae.ops.codebook import nearest_code

from .measure import CPU, OURS, Place, Work


def works(place: Place = CPU):
    yield nearest(8192, 512, 64, place)
    yield nearest(65536, 512, 64, place)
    yield nearest(8192, 8192, 64, place)


def whole_matrix(z, codes):
    """Find nearest codes as the paper's own code does."""
    return (z.square().sum(1, keepdim=True) + codes.square().sum(1) - 2 * z @ codes.T).argmin(1)


def cdist(z, codes):
    return torch.cdist(z, codes).argmin(1)


def nearest(n: int, u: int, d: int, place: Place = CPU) -> Work:
    z, codes = place.randn(n, d), place.randn(u, d)
    functions = {OURS: nearest_code, "eager": whole_matrix, "torch.cdist": cdist}

    def check(function):
        """Assert that no other code is nearer, up to rounding."""
        z64, codes64 = z[:256].double(), codes.double()
        distances = (z64[:, None] - codes64).square().sum(2)
        found = distances.gather(1, function(z, codes)[:256, None])[:, 0]
        assert bool((found <= distances.amin(1) + 1e-5 * d).all())

    size = place.dtype.itemsize
    return Work(
        "nearest_code",
        f"{n}, {u} codes, D={d}",
        "forward",
        {name: lambda f=f: f(z, codes) for name, f in functions.items()},
        {name: lambda f=f: check(f) for name, f in functions.items()},
        bytes=size * (n + u) * d + 8 * n,
        operations=n * u * d,
    )
