"""log p(x|z) of rows from the decoder's last linear layer, and its gradients: block by block of rows, whose
outputs are made by torch's product, weighed by the likelihood's kernel, and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from .likelihood import log_prob, log_prob_backward

# Numbers of a block's outputs: enough to fill a card, little beside what it spares.
BLOCK = 2**24


def linear_log_prob(
    likelihood: Any,
    x: Tensor,
    h: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    held: tuple[Tensor, ...],
) -> Tensor:
    """log p(x|z) [K, B] of x [B, X] and h [K·B, H], sample-major; the first outputs are products with weights
    [X, H] and biases [X] or None, the others are held, each a row [X] or one number.
    """
    dtype, layers = _upcast(x, h, weights, biases, held)
    rows = h.unflatten(0, (-1, x.shape[0])) if x.shape[0] else h.new_empty(0, 0, h.shape[1])
    out = rows.new_empty(rows.shape[:2], dtype=dtype)
    given = [p.reshape(1, 1, -1) for p in held]
    for block in _blocks(rows, x.shape[1] * len(weights)):
        outputs, _ = _outputs(rows[block], layers, dtype)
        out[block] = log_prob(likelihood, x[block[1]], *outputs, *given)
    return out


def linear_log_prob_backward(
    likelihood: Any,
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    weights: tuple[Tensor, ...],
    biases: tuple[Tensor | None, ...],
    held: tuple[Tensor, ...],
    need: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients for (h, *weights, *biases, *held), None where not needed, as ``need`` says in this order.
    Sums over rows are kept in float32, or float64.
    """
    dtype, layers = _upcast(x, h, weights, biases, held)
    count = len(weights)
    need_h, need_weights, need_biases = need[0], need[1 : 1 + count], need[1 + count : 1 + 2 * count]
    need_held = need[1 + 2 * count :]
    rows = h.unflatten(0, (-1, x.shape[0])) if x.shape[0] else h.new_empty(0, 0, h.shape[1])
    to_h = torch.zeros_like(rows, dtype=dtype) if need_h else None
    like = [*weights, *biases, *held]
    sums = [
        torch.zeros_like(t, dtype=dtype) if n and t is not None else None
        for t, n in zip(like, need[1:], strict=True)
    ]
    given = [p.reshape(1, 1, -1).to(dtype) for p in held]
    each = [need_h or w or b for w, b in zip(need_weights, need_biases, strict=True)]
    for block in _blocks(rows, x.shape[1] * count):
        outputs, wide = _outputs(rows[block], layers, dtype)
        asked = [False, *each, *need_held]
        _, *grads = log_prob_backward(
            likelihood, grad[block].contiguous(), x[block[1]], *outputs, *given, asked
        )
        for j, g in enumerate(grads):
            if j >= count:
                if g is not None:
                    sums[count + j] += g.reshape(held[j - count].shape)
                continue
            if g is None:
                continue
            flat = g.flatten(0, 1)
            if to_h is not None:
                to_h[block] += (flat @ layers[j][0]).reshape(to_h[block].shape)
            if need_weights[j]:
                sums[j] = torch.addmm(sums[j], flat.mT, wide)
            if sums[count + j] is not None:
                sums[count + j] += flat.sum(0)
    results = [None if to_h is None else to_h.reshape(h.shape), *sums]
    return tuple(None if r is None else r.to(t.dtype) for r, t in zip(results, (h, *like), strict=True))


def _upcast(x: Tensor, h: Tensor, weights: Any, biases: Any, held: Any) -> tuple[torch.dtype, list[Any]]:
    """The dtype of the computation, and the layers in it."""
    every = [t for t in (x, h, *weights, *biases, *held) if t is not None]
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in every) else torch.float32
    return dtype, [
        (w.to(dtype), None if b is None else b.to(dtype)) for w, b in zip(weights, biases, strict=True)
    ]


def _outputs(rows: Tensor, layers: list[Any], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
    """Each output [K', B', X] of rows [K', B', H], and these, flat."""
    wide = rows.flatten(0, 1).to(dtype)
    return [linear(wide, w, b).unflatten(0, rows.shape[:2]) for w, b in layers], wide


def _blocks(rows: Tensor, width: int) -> Iterator[tuple[slice, slice]]:
    """Samples and rows of the batch, as many as make about BLOCK numbers."""
    samples, batch = rows.shape[:2]
    if not rows.shape[2] or not width:
        yield slice(0, samples), slice(0, batch)
        return
    most = max(1, BLOCK // width)
    some_rows = min(batch, most)
    some_samples = max(1, most // max(1, some_rows))
    for b in range(0, batch, max(1, some_rows)):
        for k in range(0, samples, some_samples):
            yield slice(k, k + some_samples), slice(b, b + some_rows)
