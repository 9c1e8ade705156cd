"""bernoulli_log_prob."""

from __future__ import annotations

import torch
from torch.nn import functional

from fastvae import ops

from .gaussian import SIZES, likelihood_target, likelihood_works
from .latent import EXP
from .measure import COMPILE, CPU, Place

TARGET = {"eager": 3.0, COMPILE: 1.2}


def works():
    for shape in SIZES:
        yield from bernoulli_log_prob(shape, likelihood_target(shape, TARGET))


def bernoulli_log_prob(shape, target, place: Place = CPU, peers=None):
    """The works of one size [..., B, X]; ``peers`` are implementations besides eager PyTorch."""
    yield from likelihood_works(
        "bernoulli_log_prob",
        shape,
        lambda: (
            torch.rand(*shape[-2:], device=place.device).round().to(place.dtype),
            place.randn(*shape, requires_grad=True),
        ),
        ops.bernoulli_log_prob,
        eager_bernoulli,
        parameters=1,
        # Forward: an exponential, the linear term, a product, 1/16 of a logarithm. Backward: a quotient.
        operations=(EXP + 10, EXP + 6),
        target=target,
        place=place,
        peers=peers,
    )


def eager_bernoulli(x, logits):
    """The careful way: stable, and x is expanded, not copied."""
    loss = functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    return -loss.sum(-1)
