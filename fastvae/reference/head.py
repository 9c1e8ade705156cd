"""Log-likelihood p(x|z) of rows from the decoder's last linear layer, and its gradients, in plain PyTorch.

The layer's whole output is materialised.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..core.special import upcast
from .likelihood import log_prob, log_prob_backward


def linear_log_prob(likelihood: Any, x: Tensor, h: Tensor, layers: Any) -> Tensor:
    """Return log p(x|z) [K, B] of x [B, X] and h [K·B, H], sample-major.

    ``layers`` has the weights [X, H] and biases [X] or None of the first outputs, which are products, and
    the values of the other outputs, each a row [X] or one number.
    """
    return log_prob(likelihood, x, None, *_outputs(x, h, layers), *_spread(layers))


def linear_log_prob_backward(
    likelihood: Any, grad: Tensor, x: Tensor, h: Tensor, layers: Any, need: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return gradients for (h, *weights, *biases, *constants) in the order of ``need``, or None."""
    weights, biases, constants = layers.weights, layers.biases, layers.constants
    outputs, given = _outputs(x, h, layers), _spread(layers)
    every = [False, *[True] * (len(outputs) + len(given))]
    grads: list[Any] = list(log_prob_backward(likelihood, grad, x, None, *outputs, *given, every)[1:])
    rows = [g.flatten(0, 1) for g in grads[: len(weights)]]
    wide: torch.dtype = rows[0].dtype
    to_h = torch.stack([g @ w.to(wide) for g, w in zip(rows, weights, strict=True)]).sum(0)
    results: list[Any] = [to_h, *(g.mT @ h.to(wide) for g in rows), *(g.sum(0) for g in rows)]
    results += [g.reshape(p.shape) for g, p in zip(grads[len(weights) :], constants, strict=True)]
    like = (h, *weights, *biases, *constants)
    return tuple(
        r.to(t.dtype) if n and t is not None else None for r, t, n in zip(results, like, need, strict=True)
    )


def _outputs(x: Tensor, h: Tensor, layers: Any) -> list[Tensor]:
    """Return the layer's outputs, [K, B, X] each."""
    batch, columns = x.shape
    _, wide_h, *wide = upcast(x, h, *layers.weights, *layers.biases)
    count = len(layers.weights)
    samples = h.shape[0] // batch if batch else 0
    return [
        linear(wide_h, w, b).reshape(samples, batch, columns)
        for w, b in zip(wide[:count], wide[count:], strict=True)
    ]


def _spread(layers: Any) -> list[Tensor]:
    return [p.reshape(1, 1, -1) for p in layers.constants]
