"""Conversion of decoders' probabilities and rates to logits and log rates."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import may_look
from ..core.torch_private import functorch_is_active
from ..ops.op import accumulator

# Smallest logarithm, and smallest variance p (1 - p) in a slope, as in F.binary_cross_entropy.
LEAST_LOG, LEAST_VARIANCE = -100.0, 1e-12
# Probabilities and rates are clamped to at least this in the slope of their logarithm.
LEAST = 1e-30


class Natural(NamedTuple):
    """Logits or log rates that need no conversion, though the likelihood converts a tensor."""

    value: Tensor


class _Logarithm(torch.autograd.Function):
    """Function log p, or with ``both`` log p − log(1 − p), in at least float32."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor, both: bool) -> Tensor:
        p = p.to(accumulator(p.dtype))
        log = p.log().clamp(min=LEAST_LOG)
        return log - torch.log1p(-p).clamp(min=LEAST_LOG) if both else log

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        p, ctx.both = inputs
        ctx.save_for_backward(p)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (p,) = ctx.saved_tensors
        wide = p.to(grad.dtype)
        slope = (wide * (1 - wide)).clamp(min=LEAST_VARIANCE) if ctx.both else wide.clamp(min=LEAST)
        # A zero gradient is that of an element which was not observed, whose p may be NaN.
        grad = torch.where(grad == 0, grad, grad / slope)
        if p.dtype == torch.float16:
            # An infinite gradient times a zero slope, such as a saturated sigmoid's, would be NaN.
            limit = torch.finfo(p.dtype).max
            grad = grad.clamp(-limit, limit)
        return grad.to(p.dtype), None


class _LogOfPositive(torch.autograd.Function):
    """Function log p, unbounded, in at least float32; a zero gradient stays zero, even if p is 0 or NaN."""

    generate_vmap_rule = True

    @staticmethod
    def forward(p: Tensor) -> Tensor:
        return p.to(accumulator(p.dtype)).log()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        (p,) = ctx.saved_tensors
        return torch.where(grad == 0, grad, grad / p.to(grad.dtype)).to(p.dtype)


def log_of_positive(value: Tensor) -> Tensor:
    """Return the logarithm of a positive parameter of a torch.distributions object, in at least float32.

    These objects broadcast their parameters: an axis along which a number was expanded is computed once.
    """
    narrow = value
    for axis, stride in enumerate(value.stride()):
        if stride == 0 and value.shape[axis] > 1:
            narrow = narrow.narrow(axis, 0, 1)
    log: Tensor = _LogOfPositive.apply(narrow)  # type: ignore[no-untyped-call]
    return log.expand(value.shape)


def logits_of(probs: Any, owner: str, seen: Tensor | None = None) -> Any:
    """Return the logits of independent probabilities; ``seen`` as in :func:`log_of`."""
    if type(probs) is Natural:
        return probs.value
    if not _is_numbers(probs):
        return probs
    _check(probs, 1.0, owner, "probabilities in [0, 1]", "logits", seen)
    return _Logarithm.apply(probs, True)  # type: ignore[no-untyped-call]


def log_of(values: Any, owner: str, what: str, instead: str, seen: Tensor | None = None) -> Any:
    """Return the logarithms of rates, or of probabilities up to a common factor.

    Where ``seen``, a mask broadcastable to an example's values [B, ...], is False, they may be out of range.
    """
    if type(values) is Natural:
        return values.value
    if not _is_numbers(values):
        return values
    _check(values, float("inf"), owner, f"{what} at or above 0", instead, seen)
    return _Logarithm.apply(values, False)  # type: ignore[no-untyped-call]


def _is_numbers(value: Any) -> bool:
    """Return True for a floating-point tensor; anything else raises where outputs are read."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _check(values: Tensor, high: float, owner: str, expected: str, instead: str, seen: Tensor | None) -> None:
    known = type(values) is Tensor and not functorch_is_active()
    if not known or not may_look(values):
        return
    least, most = (float(v) for v in values.detach().aminmax())
    # Written so that NaN passes: NaN in gives NaN out.
    outside = least < 0 or most > high
    if outside and seen is not None and _fits(seen, values):
        rows = values.detach().unflatten(0, (-1, seen.shape[0]))
        least, most = (float(v) for v in torch.where(seen, rows, 0.0).aminmax())
        outside = least < 0 or most > high
    if outside:
        raise ValueError(
            f"the decoder returned values in [{least:g}, {most:g}], but {owner} reads {expected}; for a "
            f"decoder that returns {instead} leave the option out"
        )


def _fits(seen: Tensor, values: Tensor) -> bool:
    """Return True if a mask [B, ...] broadcasts to values [K·B, ...]; other shapes raise elsewhere."""
    own, of_values = seen.shape[1:], values.shape[1:]
    return (
        values.shape[0] % seen.shape[0] == 0
        and len(own) == len(of_values)
        and all([n in (1, m) for n, m in zip(own, of_values, strict=True)])
    )


def check_flag(name: str, value: Any) -> bool:
    """Validate that a flag is True or False, and return it."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False; got {value!r} ({type(value).__name__})")
    return value
