r"""Log p(x_i|z_k) of all pairs of examples and latents, by matrix products.

For latents that all examples share, such as draws from the prior or points of a lattice, log p of all pairs
is needed. If it is a sum of products of functions of x and functions of z,

.. math:: \log p(x|z) = \sum_j T_j(x) \cdot η_j(z) - A(z) + D(x)

all pairs take a few matrix products and vectors: for a Bernoulli :math:`T = x, η = a`; for a Poisson
:math:`T = x, η = m`; for a Gaussian :math:`T = (x, x^2), η = (m / s^2, -1 / 2 s^2)`, and with one row of
variances the term in x² is a vector, too. These terms cancel, the more the better the decoder fits, so the
products are computed in float64. Other likelihoods evaluate their op on tiles of the pairs. A tensor [K, B,
X] is never stored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core import backend as _backend
from ..core.checks import check_data, check_same_device, check_tensor, may_look, shape_of
from ..core.deferred import LastLayer, multiply_out
from ..core.numbers import as_tensor
from ..core.sparse import span
from .likelihood import DECLARED, PUBLIC, check_support, result_dtype
from .op import accumulator

# Elements of a tile, K' B X.
_TILE = 2**22


def all_pairs_log_prob(x: Tensor, parameters: Any, *, likelihood: Any = "bernoulli") -> Tensor:
    r"""Return log p(x_i | z_k) of every example with each of K latents, without storing [K, B, X].

    .. math:: \log p(x_i|z_k) = \sum_j T_j(x_i) \cdot η_j(z_k) - A(z_k) + D(x_i)

    Bernoulli, Poisson and Gaussian likelihoods are computed in this form, by matrix products in float64, if
    the parameters are finite; other likelihoods are evaluated tile by tile.

    Args:
        x: data [B, \*event].
        parameters: the decoder's output for z [K, D], in any form that :func:`fastvae.elbo` reads, such as a
            tensor [K, \*event], or a tuple of them; those of a tuple after the first may also be a row
            [\*event] or a number. On a GPU, where they are not checked, they must be finite.
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
    if isinstance(likelihood, str) and likelihood in DECLARED and not _is_plain(parameters):
        kind: Any = DECLARED[likelihood]
        likelihood = kind()  # which reads parameters by name
    if isinstance(likelihood, str) and likelihood in DECLARED:
        if type(parameters) is LastLayer:
            parameters = multiply_out(parameters, parameters.event or tuple(x.shape[1:]))
        name, outputs = likelihood, parameters if isinstance(parameters, (tuple, list)) else (parameters,)
        expected = DECLARED[name].outputs
        if len(outputs) != len(expected):
            raise ValueError(
                f"parameters must be the outputs of a {name} likelihood, ({', '.join(expected)}); got "
                f"{len(outputs)} of them"
            )
    elif hasattr(likelihood, "log_likelihood"):
        parameters = likelihood.read(parameters, x)
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


def _is_plain(parameters: Any) -> bool:
    return isinstance(parameters, Tensor) or type(parameters) in (tuple, list, LastLayer)


def _declared(name: str, x: Tensor, outputs: Any) -> Tensor:
    declared = DECLARED[name]
    x = check_data(x, declared)
    first = outputs[0]
    check_tensor(declared.outputs[0], first)
    if x.dim() == 0 or first.shape[1:] != x.shape[1:] or first.dim() != x.dim():
        raise ValueError(
            f"{declared.outputs[0]} has shape {shape_of(first)} and x {shape_of(x)}; expected [K, *event] "
            "and [B, *event], of the same event"
        )
    size = math.prod(x.shape[1:])
    flat, rows = [first.reshape(first.shape[0], size)], x.reshape(x.shape[0], size)
    for output, value in zip(declared.outputs[1:], outputs[1:], strict=True):
        dtype = None if isinstance(value, Tensor) else accumulator(first.dtype)
        p = as_tensor(value, dtype, x.device)
        check_tensor(output, p)
        is_row = p.shape == x.shape[1:] or p.shape == (1, *x.shape[1:])
        if not (p.shape == first.shape or p.numel() == 1 or is_row):
            raise ValueError(
                f"{output} has shape {shape_of(p)}; expected that of {declared.outputs[0]}, "
                f"{shape_of(first)}, a row {list(x.shape[1:])}, or one number"
            )
        flat.append(p.reshape(first.shape[0], size) if p.shape == first.shape else p.reshape(1, -1))
    for output, p in zip(declared.outputs, flat, strict=True):
        check_same_device(output, p, "x", x)
    check_support(declared, x)
    dtype = result_dtype(x, *flat)
    # A logit of -inf contributes 0 where x is 0, but 0 · inf in a matrix product is NaN.
    finite = not may_look(first) or all(bool(p.isfinite().all()) for p in flat)
    if name in _PRODUCTS and finite:
        _check_here(declared, x)
        return _PRODUCTS[name](rows.double(), *[p.double() for p in flat]).to(dtype)
    op = PUBLIC[name]

    def of_tile(part: Tensor, tile: Any, samples: int) -> Tensor:
        spread = [p[:, None].expand(samples, part.shape[0], size) for p in tile]
        return op(part, *spread)

    return _by_tiles(rows, [p.expand(first.shape[0], size) for p in flat], of_tile, spread=False)


def _check_here(declared: Any, x: Tensor) -> None:
    """Validate the range of x, as the C++ would have done in its pass over x."""
    if x.is_cpu and not torch.compiler.is_compiling():
        with _backend.use_backend("reference"):
            check_support(declared, x)


def _by_tiles(x: Any, parameters: Any, function: Callable[..., Tensor], spread: bool = True) -> Tensor:
    """Return [K, B] of ``function(x, parameters of K' latents, K')`` tile by tile.

    For gradients the inside of each tile is recomputed, not stored.

    With ``spread`` the parameters have a row for each pair.
    """
    single = isinstance(parameters, Tensor)
    parts, made = [parameters] if single else list(parameters), getattr(parameters, "_make", tuple)
    if not all(isinstance(p, Tensor) and p.dim() and p.shape[0] == parts[0].shape[0] for p in parts):
        raise TypeError("parameters must be a tensor [K, ...], or a tuple of such")
    batch, count = x.shape[0], parts[0].shape[0]
    numbers = max(1, sum(p[:1].numel() for p in parts))
    rows = max(1, min(batch, _TILE // numbers))
    at_once = max(1, _TILE // (numbers * rows))
    wants = torch.is_grad_enabled() and any(p.requires_grad for p in (x, *parts))

    def of_tile(part: Tensor, *tile: Tensor) -> Tensor:
        samples = tile[0].shape[0]
        if spread:
            tile = tuple(p.repeat_interleave(part.shape[0], 0) for p in tile)
        return function(part, tile[0] if single else made(tile), samples)

    result = []
    # Run once even if empty: the result then has the usual dtype and graph.
    for k in range(0, max(1, count), at_once):
        tile = [p[k : k + at_once] for p in parts]
        row = []
        for b in range(0, max(1, batch), rows):
            part = span(x, b, b + rows)
            row.append(
                checkpoint(of_tile, part, *tile, use_reentrant=False) if wants else of_tile(part, *tile)
            )
        result.append(row[0] if len(row) == 1 else torch.cat(row, 1))
    return result[0] if len(result) == 1 else torch.cat(result)


def _bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    return logits @ x.mT - torch.nn.functional.softplus(logits).sum(1, keepdim=True)


def _poisson(x: Tensor, log_mean: Tensor) -> Tensor:
    return log_mean @ x.mT - log_mean.exp().sum(1, keepdim=True) - torch.lgamma(x + 1).sum(1)


def _gaussian(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    # Centring reduces cancellation. The centre skips non-finite examples, which must not affect others.
    centre = (torch.where(x.isfinite(), x, 0.0).sum(0) / max(1, x.shape[0])).detach()
    x, mean = x - centre, mean - centre
    precision = torch.exp(-logvar).expand(logvar.shape[0], x.shape[1])
    of_z = (mean.square() * precision + logvar + math.log(2 * math.pi)).sum(1, keepdim=True)
    return (mean * precision) @ x.mT - 0.5 * (of_z + precision @ x.square().mT)


_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "bernoulli": _bernoulli,
    "poisson": _poisson,
    "gaussian": _gaussian,
}
