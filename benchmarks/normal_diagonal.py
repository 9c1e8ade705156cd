"""Benchmarks of rsample_kl and rsample_log_ratio."""

from __future__ import annotations

import torch

from fastvae import ops

from .measure import COMPILE, CPU, FALLBACK, OURS, Place, op_works

# Operations per element, counted in instructions of the C++: a normal (Philox 30, as 64-bit products take two
# lanes, and Box-Muller 27), an exponential, exp(u) - 1 - u.
NORMAL, EXP, EXPM1 = 57, 16, 20


def works():
    for b, d in ((128, 32), (8192, 64), (8192, 784)):
        for k in (1, 50):
            large = {"eager": 8.0, COMPILE: 5.0, FALLBACK: 5.0} if b > 128 and k == 1 else {}
            yield from rsample_kl(
                k, b, d, large or ({"eager": 3.0, COMPILE: 4.0, FALLBACK: 4.0} if k == 1 else {})
            )
    for k, b, d in (
        (1, 128, 32),
        (50, 128, 32),
        (50, 64, 50),
        (1, 8192, 64),
        (50, 8192, 64),
        (50, 8192, 784),
    ):
        target = {"eager": 8.0, COMPILE: 5.0, FALLBACK: 5.0} if b == 64 else {}
        yield from rsample_log_ratio(k, b, d, target)


def eps_of(outputs, mu, logvar):
    """Recover the noise behind any implementation's z, and assert that it is standard normal."""
    eps = ((outputs[0] - mu) / torch.exp(0.5 * logvar)).detach()
    n = eps.numel()
    assert abs(float(eps.mean())) < 6 / n**0.5, f"the noise has a mean of {float(eps.mean()):.3g}"
    variance = float(eps.var())
    assert abs(variance - 1) < 6 * (2 / n) ** 0.5, f"the noise has a variance of {variance:.3g}"
    return eps


def rsample_kl(k, b, d, target, place: Place = CPU, peers=None, chunked=False):
    """Yield the works of one size.

    ``peers`` are implementations other than eager PyTorch, of K samples (None for one sample without an
    axis); mu and logvar are the halves of an encoder's output if ``chunked``.
    """

    def eager(mu, logvar):
        z = torch.addcmul(
            mu, torch.exp(0.5 * logvar), torch.randn_like(mu) if k == 1 else place.randn(k, b, d)
        )
        return z, 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)

    def exact(outputs, mu, logvar):
        z = mu + torch.exp(0.5 * logvar) * eps_of(outputs, mu, logvar)
        return z, 0.5 * (mu**2 + torch.expm1(logvar) - logvar).sum(-1)

    samples = None if k == 1 else k
    functions = {OURS: lambda mu, logvar: ops.rsample_kl(mu, logvar, k=samples), "eager": eager}
    for name, peer in (peers or {}).items():
        functions[name] = lambda mu, logvar, peer=peer: peer(mu, logvar, samples)
    forward = b * d * (EXP + EXPM1 + 3) + k * b * d * (NORMAL + 2)
    backward = b * d * (EXPM1 + 4) + 2 * k * b * d
    case = f"{'' if k == 1 else f'{k}×'}{b}×{d}"
    yield from _works(
        "rsample_kl", case, (k, b, d), functions, exact, b, (forward, backward), target, place, chunked
    )


def rsample_log_ratio(k, b, d, target, place: Place = CPU, chunked=False):
    """Yield the works of one size; mu and logvar are the halves of an encoder's output if ``chunked``."""

    def eager(mu, logvar):
        eps = place.randn(k, b, d)
        z = torch.addcmul(mu, torch.exp(0.5 * logvar), eps)
        return z, 0.5 * ((eps.square() - z.square()).sum(-1) + logvar.sum(-1))

    def exact(outputs, mu, logvar):
        eps = eps_of(outputs, mu, logvar)
        z = mu + torch.exp(0.5 * logvar) * eps
        return z, 0.5 * (eps**2 - z**2 + logvar).sum(-1)

    functions = {OURS: lambda mu, logvar: ops.rsample_log_ratio(mu, logvar, k=k), "eager": eager}
    forward, backward = b * d * EXP + k * b * d * (NORMAL + 5), 6 * k * b * d
    case = f"{k}×{b}×{d}"
    yield from _works(
        "rsample_log_ratio",
        case,
        (k, b, d),
        functions,
        exact,
        k * b,
        (forward, backward),
        target,
        place,
        chunked,
    )


def posterior(place: Place, b: int, d: int, chunked: bool):
    """Return leaves mu and logvar [B, D]: two tensors, or as from ``encoder(x).chunk(2, dim=1)``."""
    if not chunked:
        return tuple(place.randn(b, d, requires_grad=True) for _ in range(2))
    return tuple(t.requires_grad_() for t in place.randn(b, 2 * d).chunk(2, dim=1))


def _works(group, case, sizes, functions, exact, second, operations, target, place, chunked):
    """Yield the works of either op; ``second`` is the number of elements of its second result."""
    k, b, d = sizes
    # Forward: mu, logvar in, both results out. Backward: mu, logvar, upstream gradients in, gradients out.
    size = place.dtype.itemsize
    forward = size * (2 * b * d + k * b * d) + 4 * second
    backward = forward + size * 2 * b * d
    yield from op_works(
        group,
        case + ", chunked" * chunked,
        lambda: posterior(place, b, d, chunked),
        functions,
        exact,
        sampling=True,
        elements=k * b * d,
        moved=(forward, forward + backward),
        operations=(operations[0], sum(operations)),
        target=target,
        place=place,
    )
