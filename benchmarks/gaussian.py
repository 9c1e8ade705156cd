"""gaussian_log_prob."""

from __future__ import annotations

import math

import torch

from fastvae import ops

from .latent import EXP
from .measure import COMPILE, CPU, OURS, Place, op_works

LOG_2PI = math.log(2 * math.pi)


SIZES = (
    *((128, 32), (50, 128, 32), (128, 784), (8192, 64), (8192, 784), (50, 64, 784), (50, 8192, 64)),
    (50, 8192, 784),
)
LARGE = ((8192, 784), (50, 64, 784))
TARGET = {"eager": 4.0, COMPILE: 1.2}


def works():
    for shape in SIZES:
        yield from gaussian_log_prob(shape, likelihood_target(shape, TARGET))


def likelihood_target(shape, large):
    """What a likelihood shall reach at each size on a CPU; ``large`` where tensors are large."""
    return large if shape in LARGE else {"eager": 2.0, COMPILE: 1.0} if shape == (128, 784) else {}


def gaussian_log_prob(shape, target, place: Place = CPU, peers=None):
    """The works of one size [..., B, X]; ``peers`` are implementations besides eager PyTorch."""
    yield from likelihood_works(
        "gaussian_log_prob",
        shape,
        lambda: (
            place.randn(*shape[-2:]),
            *(place.randn(*shape, requires_grad=True) for _ in range(2)),
        ),
        ops.gaussian_log_prob,
        lambda x, mean, logvar: -0.5 * (LOG_2PI + logvar + (x - mean).square() * torch.exp(-logvar)).sum(-1),
        parameters=2,
        operations=(EXP + 4, EXP + 5),
        target=target,
        place=place,
        peers=peers,
    )


def likelihood_works(
    group, shape, make, ours, eager, *, parameters, operations, target, place: Place = CPU, peers=None
):
    """The works of a likelihood whose parameters are tensors [..., B, X].

    Args:
        make: makes x and the parameters.
        ours, eager: functions of these.
        parameters: how many there are.
        operations: of one element, forward and backward.
        peers: implementations besides.
    """
    n, rows = math.prod(shape), math.prod(shape[:-1])
    size = place.dtype.itemsize
    read = size * (math.prod(shape[-2:]) + parameters * n)
    yield from op_works(
        group,
        "×".join(map(str, shape)),
        make,
        {OURS: ours, "eager": eager, **(peers or {})},
        lambda outputs, *wide: eager(*wide),
        sampling=False,
        elements=n,
        moved=(read + 4 * rows, 2 * read + 8 * rows + size * parameters * n),
        operations=(n * operations[0], n * sum(operations)),
        target=target,
        place=place,
    )
