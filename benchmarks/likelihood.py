"""Benchmarks of <likelihood>_log_prob."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

from fastvae import ops

from .measure import COMPILE, CPU, OURS, Place, op_works
from .normal_diagonal import EXP

LOG_2PI = math.log(2 * math.pi)


SIZES = (
    *((128, 32), (50, 128, 32), (128, 784), (8192, 64), (8192, 784), (50, 64, 784), (50, 8192, 64)),
    (50, 8192, 784),
)
LARGE = ((8192, 784), (50, 64, 784))
TARGETS = {
    "gaussian": {"eager": 4.0, COMPILE: 1.2},
    "bernoulli": {"eager": 3.0, COMPILE: 1.2},
    "continuous_bernoulli": {"eager": 3.0, COMPILE: 1.0},
    "beta": {"eager": 3.0, COMPILE: 1.0},
    "discretized_logistic": {"eager": 3.0, COMPILE: 1.0},
    "softplus_gaussian": {"eager": 3.0, COMPILE: 1.0},
    "poisson": {"eager": 2.0, COMPILE: 1.0},
    "laplace": {"eager": 3.0, COMPILE: 1.0},
    "student_t": {"eager": 3.0, COMPILE: 1.0},
}


def works():
    for name, target in TARGETS.items():
        for shape in SIZES:
            yield from log_prob(name, shape, _target(shape, target))
    yield from all_pairs(1000, 1000, 784)


def _target(shape, large):
    """Return a likelihood's required speed-ups at a size on a CPU; ``large`` for large tensors."""
    return large if shape in LARGE else {"eager": 2.0, COMPILE: 1.0} if shape == (128, 784) else {}


def eager_bernoulli(x, logits):
    """Compute log p carefully: stable, with x expanded, not copied."""
    loss = functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    return -loss.sum(-1)


def eager_continuous_bernoulli(x, logits):
    return torch.distributions.ContinuousBernoulli(logits=logits, validate_args=False).log_prob(x).sum(-1)


def eager_beta(x, log_concentration1, log_concentration0):
    a, b = torch.exp(log_concentration1), torch.exp(log_concentration0)
    gammas = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    return (gammas + (a - 1) * torch.log(x) + (b - 1) * torch.log1p(-x)).sum(-1)


def eager_discretized_logistic(x, mean, log_scale, log_bin_width):
    """Compute log p carefully: the usual difference of two sigmoids fails far from the mean."""
    inverse_s, half = torch.exp(-log_scale), 0.5 * torch.exp(log_bin_width)
    upper = functional.logsigmoid((x + half - mean) * inverse_s)
    lower = functional.logsigmoid((mean - x + half) * inverse_s)
    inside = upper + lower + torch.log(-torch.expm1(-2 * half * inverse_s))
    return torch.where(x <= 0, upper, torch.where(x >= 1, lower, inside)).sum(-1)


def eager_gaussian(x, mean, logvar):
    return -0.5 * (LOG_2PI + logvar + (x - mean).square() * torch.exp(-logvar)).sum(-1)


def eager_softplus_gaussian(x, mean, raw, log_floor):
    variance = functional.softplus(raw) + torch.exp(log_floor)
    return -0.5 * (LOG_2PI + torch.log(variance) + (x - mean).square() / variance).sum(-1)


def eager_poisson(x, log_rate):
    loss = functional.poisson_nll_loss(log_rate, x.expand_as(log_rate), reduction="none")
    return -loss.sum(-1) - torch.lgamma(x + 1).sum(-1)


def eager_laplace(x, location, log_scale):
    return -(math.log(2) + log_scale + (x - location).abs() * torch.exp(-log_scale)).sum(-1)


def eager_student_t(x, location, log_scale, log_df):
    df = torch.exp(log_df)
    half = 0.5 * (df + 1)
    gammas = torch.lgamma(half) - torch.lgamma(0.5 * df) - 0.5 * (math.log(math.pi) + log_df)
    square = ((x - location) * torch.exp(-log_scale)).square()
    return (gammas - log_scale - half * torch.log1p(square / df)).sum(-1)


def _pixels(place, shape):
    return torch.rand(*shape, device=place.device).round().to(place.dtype)


def _counts(place, shape):
    """Return counts as of genes: nine in ten are zero."""
    counts = torch.poisson(torch.rand(*shape, device=place.device) * 6)
    return (counts * (torch.rand(*shape, device=place.device) < 0.1)).to(place.dtype)


# Data; eager PyTorch; number of parameters; operations per element, forward and backward.
CASES = {
    "gaussian": (lambda place, shape: place.randn(*shape), eager_gaussian, 2, (EXP + 4, EXP + 5)),
    # Forward: an exponential, the linear term, a product, 1/16 of a logarithm. Backward: a quotient.
    "bernoulli": (_pixels, eager_bernoulli, 1, (EXP + 10, EXP + 6)),
    # An exponential, a quotient, a logarithm, and a polynomial.
    "continuous_bernoulli": (
        lambda place, shape: torch.rand(*shape, device=place.device).to(place.dtype),
        eager_continuous_bernoulli,
        1,
        (2 * EXP + 15, EXP + 15),
    ),
    # Three logarithms of the data; three gamma functions, four exponentials and three logarithms.
    "beta": (
        lambda place, shape: (0.01 + 0.98 * torch.rand(*shape, device=place.device)).to(place.dtype),
        eager_beta,
        2,
        (13 * EXP + 60, 10 * EXP + 60),
    ),
    # Six exponentials, a logarithm and 1/16 of one; backward two more exponentials, and quotients.
    "discretized_logistic": (
        lambda place, shape: (torch.rand(*shape, device=place.device) * 255).round().div(255).to(place.dtype),
        eager_discretized_logistic,
        3,
        (7 * EXP + 20, 8 * EXP + 40),
    ),
    # Two exponentials, two logarithms, a quotient.
    "softplus_gaussian": (
        lambda place, shape: place.randn(*shape),
        eager_softplus_gaussian,
        3,
        (4 * EXP + 10, 3 * EXP + 15),
    ),
    # A logarithm of the data and Stirling's series, once for all samples; then two exponentials.
    "poisson": (_counts, eager_poisson, 1, (4 * EXP + 30, EXP + 2)),
    "laplace": (lambda place, shape: place.randn(*shape), eager_laplace, 2, (EXP + 4, EXP + 7)),
    # Three exponentials, two logarithms and the gamma functions; backward one logarithm less.
    "student_t": (lambda place, shape: place.randn(*shape), eager_student_t, 3, (5 * EXP + 30, 4 * EXP + 50)),
}


def log_prob(name, shape, target, place: Place = CPU, peers=None):
    """Yield the works of one size [..., B, X]; ``peers`` are implementations other than eager PyTorch."""
    data, eager, parameters, operations = CASES[name]
    yield from _works(
        f"{name}_log_prob",
        shape,
        lambda: (
            data(place, shape[-2:]),
            *(place.randn(*shape, requires_grad=True) for _ in range(parameters)),
        ),
        getattr(ops, f"{name}_log_prob"),
        eager,
        parameters=parameters,
        operations=operations,
        target=target,
        place=place,
        peers=peers,
    )


def _works(
    group, shape, make, ours, eager, *, parameters, operations, target, place: Place = CPU, peers=None
):
    """Yield the works of a likelihood with parameters [..., B, X].

    ``make`` returns x and the parameters, of which ``ours``, ``eager`` and the additional ``peers`` are
    functions; ``parameters`` is their number, ``operations`` the operations per element, forward and
    backward.
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


# All pairs of examples and latents


def tiles(x, logits):
    """Compute all pairs by the likelihood, some latents at a time."""
    parts = [ops.bernoulli_log_prob(x, p[:, None].expand(len(p), *x.shape)) for p in logits.split(5)]
    return torch.cat(parts)


def product(x, logits):
    """Compute all pairs by a product in the logits' precision, which cancels."""
    return logits @ x.mT - functional.softplus(logits).sum(1, keepdim=True)


def all_pairs(k: int, b: int, size: int, place: Place = CPU):
    n = place.dtype.itemsize
    yield from op_works(
        "all_pairs_log_prob",
        f"{k}×{b}×{size}",
        lambda: (torch.rand(b, size, device=place.device).round(), place.randn(k, size, requires_grad=True)),
        {OURS: ops.all_pairs_log_prob, "eager": product, "tiles": tiles},
        lambda outputs, x, logits: product(x, logits),
        sampling=False,
        elements=k * size,
        moved=(n * (b + k) * size + n * k * b, n * (2 * b + 3 * k) * size + 2 * n * k * b),
        operations=(k * b * size + k * size * EXP, 2 * k * b * size + 2 * k * size * EXP),
        place=place,
    )
