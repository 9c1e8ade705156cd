"""Mixtures over a component axis, and counts with one dispersion per gene."""

from __future__ import annotations

import torch
from torch.nn import functional

from fastvae import ops

from .likelihood import _counts
from .measure import COMPILE, CPU, OURS, Place, op_works
from .normal_diagonal import EXP

# Required speed-ups on a CPU, forward and backward.
COUNTS = {"eager": 5.0, COMPILE: 2.0}
MIXTURE = {"eager": 3.0, COMPILE: 1.2}


def works(place: Place = CPU):
    for name in EAGER_COUNTS:
        yield from counts(name, 64, 2000, place)
    yield from mixture(64, 10, 1024, place)


def eager_negative_binomial(x, log_mean, log_inverse_dispersion, eps=1e-8):
    """Compute log p as scvi-tools does."""
    mu, theta = log_mean.exp(), log_inverse_dispersion.exp()
    log_sum = torch.log(theta + mu + eps)
    value = theta * (torch.log(theta + eps) - log_sum) + x * (torch.log(mu + eps) - log_sum)
    return (value + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)).sum(-1)


def eager_zero_inflated_negative_binomial(x, log_mean, log_inverse_dispersion, dropout_logit, eps=1e-8):
    """Compute log p as scvi-tools does."""
    mu, theta, pi = log_mean.exp(), log_inverse_dispersion.exp(), dropout_logit
    log_sum = torch.log(theta + mu + eps)
    softplus = functional.softplus(-pi)
    rest = -pi + theta * (torch.log(theta + eps) - log_sum)
    zero = functional.softplus(rest) - softplus
    gammas = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    other = -softplus + rest + x * (torch.log(mu + eps) - log_sum) + gammas
    return ((x < eps).to(zero.dtype) * zero + (x > eps).to(zero.dtype) * other).sum(-1)


def eager_mixture(x, logits, location, log_scale, coefficients):
    """Compute log p as PixelCNN++ does, with the exact bin everywhere."""
    x, t, half = x[:, None], torch.tanh(coefficients), 1 / 255
    first, second, third = location.unbind(2)
    second = second + t[:, :, 0] * x[:, :, 0]
    third = third + t[:, :, 1] * x[:, :, 0] + t[:, :, 2] * x[:, :, 1]
    inverse, delta = torch.exp(-log_scale), x - torch.stack([first, second, third], 2)
    upper, lower = (delta + half) * inverse, (delta - half) * inverse
    above, below = functional.logsigmoid(upper), functional.logsigmoid(-lower)
    inner = above + below + torch.log(-torch.expm1(-2 * half * inverse))
    value = torch.where(x < half - 1, above, torch.where(x > 1 - half, below, inner))
    log_p = torch.logsumexp(torch.log_softmax(logits, 1) + value.sum(2), 1)
    return log_p.sum(-1)


EAGER_COUNTS = {
    "negative_binomial": eager_negative_binomial,
    "zero_inflated_negative_binomial": eager_zero_inflated_negative_binomial,
}


def counts(name: str, cells: int, genes: int, place: Place = CPU):
    """Yield works of gene counts, nine in ten of them 0, with one dispersion per gene."""
    inflated = name.startswith("zero")
    n, size = cells * genes, place.dtype.itemsize
    tensors = 2 + inflated
    yield from op_works(
        f"{name}_log_prob",
        f"{cells}×{genes}, a dispersion a gene",
        lambda: (
            _counts(place, (cells, genes)),
            place.randn(cells, genes, requires_grad=True),
            place.randn(genes, requires_grad=True),
            *([place.randn(cells, genes, requires_grad=True)] if inflated else []),
        ),
        {OURS: getattr(ops, f"{name}_log_prob"), "eager": EAGER_COUNTS[name]},
        lambda outputs, *wide: EAGER_COUNTS[name](*wide),
        sampling=False,
        elements=n,
        moved=(size * tensors * n, size * (3 * tensors - 1) * n),
        operations=(n * 4 * EXP * (1 + inflated), n * 9 * EXP * (1 + inflated)),
        target=COUNTS,
        place=place,
        tolerance=1e-4,
    )


def mixture(rows: int, components: int, positions: int, place: Place = CPU):
    """Yield works of mixtures with coupled colours."""

    def make():
        levels = torch.randint(256, (rows, 3, positions), device=place.device)
        return (
            (levels * (2 / 255) - 1).to(place.dtype),
            place.randn(rows, components, positions, requires_grad=True),
            (0.5 * place.randn(rows, components, 3, positions)).requires_grad_(),
            (place.randn(rows, components, 3, positions) - 3).requires_grad_(),
            place.randn(rows, components, 3, positions, requires_grad=True),
        )

    n, size = rows * components * positions, place.dtype.itemsize
    yield from op_works(
        "discretized_logistic_mixture_log_prob",
        f"{rows}×{components}×3×{positions}",
        make,
        {OURS: ops.discretized_logistic_mixture_log_prob, "eager": eager_mixture},
        lambda outputs, *wide: eager_mixture(*wide),
        sampling=False,
        elements=10 * n,
        moved=(10 * size * n, 30 * size * n),
        operations=(n * (16 * EXP + 60), n * (40 * EXP + 150)),
        target=MIXTURE,
        place=place,
        # A bin's ends are close to each other.
        tolerance=2e-3,
    )
