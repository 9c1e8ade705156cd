r"""log p(x_i | z_k) of all examples i and all latents k, for latents that all examples share: draws from the
prior, points of a lattice, posterior means of other examples.

Where log p is a sum of products of what depends on x and what depends on z,

.. math:: \log p(x|z) = \sum_j T_j(x) \cdot η_j(z) - A(z) + D(x)

all pairs are a few matrix products and vectors: for a Bernoulli :math:`T = x, η = a`; for a Poisson
:math:`T = x, η = m`; for a Gaussian :math:`T = (x, x^2), η = (m / s^2, -1 / 2 s^2)`, and with one row of
variances x² is a vector, too. These terms cancel, all the more the better a decoder fits, so they are
products in float64. Other likelihoods go through their op by tiles of the pairs. [K, B, X] is never stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .. import _backend
from .._checks import check_data, check_same_device, check_tensor, may_look, shape_of
from .head import DECLARED
from .likelihood import check_support, result_dtype

# Numbers of a tile, K' B X.
_TILE = 2**22


def all_pairs_log_prob(x: Tensor, parameters: Any, *, likelihood: Any = "bernoulli") -> Tensor:
    r"""log p(x_i | z_k) of every example with every one of K latents, in the memory of neither's product.

    .. math:: \log p(x_i|z_k) = \sum_j T_j(x_i) \cdot η_j(z_k) - A(z_k) + D(x_i)

    For Bernoulli, Poisson and Gaussian likelihoods this is what is computed, by matrix products in float64;
    for others the likelihood itself, by tiles.

    Args:
        x: data [B, \*event].
        parameters: what the decoder returns for z [K, D]: a tensor [K, \*event], or a tuple of such; those
            after the first may be a row [\*event] or a number, too. On a GPU, where nobody looks at them,
            they must be finite.
        likelihood: a name or an object, as in :func:`fastvae.elbo`.

    Returns:
        nats [K, B], in float32 (float64 if one of the tensors is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, several devices, an unknown likelihood,
            or data out of its range.

    Example:
        >>> import math, torch, fastvae
        >>> decoder, x = torch.nn.Linear(2, 7), torch.ones(4, 7)
        >>> z = torch.randn(1000, 2)  # from the prior
        >>> pairs = fastvae.ops.all_pairs_log_prob(x, decoder(z), likelihood="bernoulli")
        >>> (pairs.logsumexp(0) - math.log(len(z))).shape  # log p(x), with no encoder
        torch.Size([4])
    """
    if isinstance(likelihood, str) and likelihood in DECLARED:
        name, outputs = likelihood, parameters if isinstance(parameters, (tuple, list)) else (parameters,)
        expected = DECLARED[name].outputs
        if len(outputs) != len(expected):
            raise ValueError(
                f"parameters must be the outputs of a {name} likelihood, ({', '.join(expected)}); got "
                f"{len(outputs)} of them"
            )
    elif hasattr(likelihood, "log_likelihood"):
        found = likelihood.all_outputs(x, parameters)
        if found is None:
            return _by_tiles(x, parameters, lambda part, rows, k: likelihood.log_likelihood(part, rows, k))
        name, outputs = found
    else:
        known = ", ".join(map(repr, sorted(DECLARED)))
        raise ValueError(
            f"likelihood={likelihood!r} is unknown here; give a likelihood object, or of {known}"
        )
    return _declared(name, x, outputs)


def _declared(name: str, x: Tensor, outputs: Any) -> Tensor:
    declared = DECLARED[name]
    check_data(x, declared)
    first = outputs[0]
    check_tensor(declared.outputs[0], first)
    if x.dim() == 0 or first.shape[1:] != x.shape[1:] or first.dim() != x.dim():
        raise ValueError(
            f"{declared.outputs[0]} has shape {shape_of(first)} and x {shape_of(x)}; expected [K, *event] "
            "and [B, *event], of the same event"
        )
    size = x.shape[1:].numel()
    flat, rows = [first.reshape(len(first), size)], x.reshape(len(x), size)
    for output, value in zip(declared.outputs[1:], outputs[1:], strict=True):
        dtype = None if isinstance(value, Tensor) else torch.float32
        p = torch.as_tensor(value, dtype=dtype, device=x.device)
        check_tensor(output, p)
        is_row = p.shape == x.shape[1:] or p.shape == (1, *x.shape[1:])
        if not (p.shape == first.shape or p.numel() == 1 or is_row):
            raise ValueError(
                f"{output} has shape {shape_of(p)}; expected that of {declared.outputs[0]}, "
                f"{shape_of(first)}, a row {list(x.shape[1:])}, or one number"
            )
        flat.append(p.reshape(len(first), size) if p.shape == first.shape else p.reshape(1, -1))
    for output, p in zip(declared.outputs, flat, strict=True):
        check_same_device(output, p, "x", x)
    check_support(declared, x)
    dtype = result_dtype(x, *flat)
    # A logit of -inf costs nothing where x is 0, which 0 · inf in a product is not.
    finite = not may_look(first) or all(bool(p.isfinite().all()) for p in flat)
    if name in _PRODUCTS and finite:
        _check_here(declared, x)
        return _PRODUCTS[name](rows.double(), *[p.double() for p in flat]).to(dtype)
    from .. import ops

    op: Callable[..., Tensor] = getattr(ops, f"{name}_log_prob")

    def of_tile(part: Tensor, tile: Any, samples: int) -> Tensor:
        spread = [p[:, None].expand(samples, len(part), size) for p in tile]
        return op(part, *spread)

    return _by_tiles(rows, [p.expand(len(first), size) for p in flat], of_tile, spread=False)


def _check_here(declared: Any, x: Tensor) -> None:
    """What the C++ would have seen in its pass over x."""
    if x.is_cpu and not torch.compiler.is_compiling():
        with _backend.use_backend("reference"):
            check_support(declared, x)


def _by_tiles(x: Any, parameters: Any, function: Callable[..., Tensor], spread: bool = True) -> Tensor:
    """[K, B] of function(x, parameters of K' latents, K'), tile by tile, whose insides are not kept for a
    gradient; ``spread``: a row for each pair.
    """
    single = isinstance(parameters, Tensor)
    parts = [parameters] if single else list(parameters)
    if not all(isinstance(p, Tensor) and p.dim() and len(p) == len(parts[0]) for p in parts):
        raise TypeError("parameters must be a tensor [K, ...], or a tuple of such")
    batch, count = len(x), len(parts[0])
    numbers = max(1, sum(p[:1].numel() for p in parts))
    rows = max(1, min(batch, _TILE // numbers))
    at_once = max(1, _TILE // (numbers * rows))
    wants = torch.is_grad_enabled() and any(p.requires_grad for p in (x, *parts))

    def of_tile(part: Tensor, *tile: Tensor) -> Tensor:
        samples = len(tile[0])
        if spread:
            tile = tuple(p.repeat_interleave(len(part), 0) for p in tile)
        return function(part, tile[0] if single else tile, samples)

    result = []
    for k in range(0, count, at_once):
        tile = [p[k : k + at_once] for p in parts]
        row = []
        for b in range(0, batch, rows):
            part = x[b : b + rows]
            row.append(
                checkpoint(of_tile, part, *tile, use_reentrant=False) if wants else of_tile(part, *tile)
            )
        result.append(row[0] if len(row) == 1 else torch.cat(row, 1))
    if not result or not batch:
        return parts[0].new_zeros(count, batch)
    return torch.cat(result)


def _bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    return logits @ x.mT - torch.nn.functional.softplus(logits).sum(1, keepdim=True)


def _poisson(x: Tensor, log_mean: Tensor) -> Tensor:
    return log_mean @ x.mT - log_mean.exp().sum(1, keepdim=True) - torch.lgamma(x + 1).sum(1)


def _gaussian(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    # Around a common centre less cancels.
    centre = x.mean(0).detach()
    x, mean = x - centre, mean - centre
    precision = torch.exp(-logvar).expand(len(logvar), x.shape[1])
    of_z = (mean.square() * precision + logvar + math.log(2 * math.pi)).sum(1, keepdim=True)
    return (mean * precision) @ x.mT - 0.5 * (of_z + precision @ x.square().mT)


_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "bernoulli": _bernoulli,
    "poisson": _poisson,
    "gaussian": _gaussian,
}
