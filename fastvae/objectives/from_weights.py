"""A bound as one autograd node over log weights, with the gradients that :mod:`fastvae.bounds` defines."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.reductions import without_denormals
from .bounds import Bound

# Least weight of a sample for the decoder. Samples with a smaller weight get this one, so that the encoder's
# weight, which is relative to it, stays finite. The weights sum to 1, so the change is below rounding. It is
# the same for float64: the decoder, z or the prior may be in float32, where less would underflow.
_LEAST = 2.0**-100
# Float16 gradients lack that range: there the decoder's weight is at least this fraction of the encoder's.
# The weights sum to 1, so this adds at most half a unit in the last place of float16.
_LEAST_OF_FLOAT16 = 2.0**-11


class _BoundFromWeights(torch.autograd.Function):
    """Bound [B] with its backward weights [K, B]: derivatives by log weights, and the encoder's weights."""

    @staticmethod
    def forward(
        log_likelihood: Tensor,
        log_ratio: Tensor,
        q_grad: Tensor | None,
        objective: Bound,
        encoder: Bound,
        float16: bool,
    ) -> tuple[Any, ...]:
        log_w = log_likelihood + log_ratio.to(log_likelihood.dtype)
        dtype, wide = log_w.dtype, log_w.double()
        bound, grads = objective.reduce(wide)
        grads = without_denormals(grads, dtype)
        if q_grad is None:
            return bound.to(dtype), grads, None
        to_q = without_denormals(encoder.q_grad(wide), dtype)
        if encoder.route != "score":
            floor = torch.full_like(grads, _LEAST)
            if float16:
                floor = torch.maximum(floor, _LEAST_OF_FLOAT16 * to_q.abs())
            least = torch.copysign(floor, grads)
            grads = torch.where((grads.abs() < least.abs()) & (to_q != 0), least, grads)
        return bound.to(dtype), grads, to_q

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, outputs: Any) -> None:
        _, *kept = outputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*(t for t in kept if t is not None))
        ctx.save_for_backward(*kept)
        ctx.dtypes = [None if t is None else t.dtype for t in inputs[:3]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Any, *_: Any) -> Any:
        if grad is None:
            return (None,) * 6
        grads, to_q = ctx.saved_tensors
        each = [grads, grads, to_q]
        sent = [None if d is None else (grad * t).to(d) for t, d in zip(each, ctx.dtypes, strict=True)]
        return *sent, None, None, None


def bound_from_weights(
    log_likelihood: Tensor,
    log_ratio: Tensor,
    q_grad: Tensor | None,
    objective: Bound,
    encoder: Bound | None,
    float16: bool = False,
) -> Tensor:
    """Compute the bound [B] from log p(x|z) and log p(z) − log q(z|x), each [K, B].

    ``q_grad`` receives the gradient for q, of the encoder's bound or else of the objective. ``float16`` is
    True if gradients by z pass through that dtype.
    """
    bound, *_ = _BoundFromWeights.apply(  # type: ignore[no-untyped-call]
        log_likelihood, log_ratio, q_grad, objective, encoder or objective, float16
    )
    return bound  # type: ignore[no-any-return]
