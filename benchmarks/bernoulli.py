"""bernoulli_log_prob."""

from __future__ import annotations

import torch
from torch.nn import functional

from fastvae import ops

from .gaussian import likelihood_works
from .latent import EXP
from .measure import COMPILE


def works():
    def eager(x, logits):
        # The careful way: stable, and x is expanded, not copied.
        loss = functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        return -loss.sum(-1)

    yield from likelihood_works(
        "bernoulli_log_prob",
        lambda *shape: (torch.rand(*shape[-2:]).round(), torch.randn(*shape, requires_grad=True)),
        ops.bernoulli_log_prob,
        eager,
        # Forward: an exponential, the linear term, a product, 1/16 of a logarithm. Backward: a quotient.
        operations=(EXP + 10, EXP + 6),
        target={"eager": 3.0, COMPILE: 1.2},
    )
