"""gaussian_log_prob."""

from __future__ import annotations

import math

import torch

from fastvae import ops

from .latent import EXP
from .measure import COMPILE, OURS, op_works

LOG_2PI = math.log(2 * math.pi)


def works():
    yield from likelihood_works(
        "gaussian_log_prob",
        lambda *shape: (
            torch.randn(*shape[-2:]),
            *(torch.randn(*shape, requires_grad=True) for _ in range(2)),
        ),
        ops.gaussian_log_prob,
        lambda x, mean, logvar: -0.5 * (LOG_2PI + logvar + (x - mean).square() * torch.exp(-logvar)).sum(-1),
        operations=(EXP + 4, EXP + 5),
        target={"eager": 4.0, COMPILE: 1.2},
    )


def likelihood_works(group, make, ours, eager, *, operations, target):
    """The works of a likelihood whose parameters are tensors [..., B, X].

    Args:
        make: ``make(*shape)`` makes x and the parameters.
        ours, eager: functions of these.
        operations: of one element, forward and backward.
        target: for the sizes that are large.
    """
    sizes = [(128, 32), (50, 128, 32), (128, 784), (8192, 64), (8192, 784), (50, 64, 784), (50, 8192, 64)]
    for shape in (*sizes, (50, 8192, 784)):
        torch.manual_seed(0)
        inputs = make(*shape)
        x, *parameters = inputs
        n, rows = parameters[0].numel(), parameters[0].numel() // shape[-1]
        read = 4 * (x.numel() + len(parameters) * n)
        if shape in ((8192, 784), (50, 64, 784)):
            wanted = target
        else:
            wanted = {"eager": 2.0, COMPILE: 1.0} if shape == (128, 784) else {}
        yield from op_works(
            group,
            "×".join(map(str, shape)),
            inputs,
            {OURS: ours, "eager": eager},
            lambda outputs, *wide: eager(*wide),
            sampling=False,
            elements=n,
            moved=(read + 4 * rows, 2 * read + 8 * rows + 4 * len(parameters) * n),
            operations=(n * operations[0], n * sum(operations)),
            target=wanted,
        )
