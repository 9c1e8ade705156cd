"""Warnings, once per decoder, about outputs and data that the likelihood probably misreads."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch import distributions as td

from ..core.checks import is_dense, may_look
from ..core.sparse import csr_parts, is_sparse
from ..core.torch_private import functorch_is_active
from .last_layer import called_by

# For events of fewer numbers, all outputs may lie between 0 and 1 by chance.
_FEWEST = 5

_PROBABILITIES = (nn.Sigmoid, nn.LogSigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d)
# Suspicious last activations, by the likelihood's input. Class logits may end in LogSoftmax, since softmax
# is invariant to it.
_ACTIVATIONS: dict[str, tuple[type[nn.Module], ...]] = {
    "logits": (*_PROBABILITIES, nn.LogSoftmax),
    "class logits": _PROBABILITIES,
    "event logits": _PROBABILITIES,
    "log rates": (nn.Softplus, nn.ReLU, nn.Sigmoid, nn.Softmax),
}

_told: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_seen: dict[int, Callable[[], Any]] = {}
_MOST = 1000


def is_new(decoder: Any) -> bool:
    """Return True for a decoder not seen before; functions are identified by their code."""
    decoder = called_by(decoder)
    if type(decoder) is FunctionType:
        decoder = decoder.__code__
    known = _seen.get(id(decoder))
    if known is not None and known() is decoder:
        return False
    if len(_seen) >= _MOST:
        for key in [key for key, value in _seen.items() if value() is None]:
            del _seen[key]
    try:
        _seen[id(decoder)] = weakref.ref(decoder)
    except TypeError:
        return False
    return True


def look_at_structure(decoder: Any, likelihood: Any) -> bool:
    """Warn about a last activation that does not return the likelihood's input; return True if found."""
    kinds, fix = _expected(likelihood)
    decoder = called_by(decoder)
    last = last_of_sequential(decoder)
    if last is None or not isinstance(last, kinds):
        return False
    if decoder in _told:
        return True
    _told.add(decoder)
    _warn(f"the decoder ends in {type(last).__name__}()", likelihood, fix)
    return True


def look(decoder: Any, likelihood: Any, x: Any, outputs: Any, returned: Any) -> None:
    """Warn about a new decoder, or data, that the likelihood probably misreads.

    ``outputs`` is what the likelihood reads in what the decoder ``returned``.
    """
    if isinstance(outputs, Mapping) and isinstance(x, Mapping) and hasattr(likelihood, "parts"):
        for name, part in likelihood.parts.items():
            look(None, part, x[name], outputs[name], returned[name])
        return
    # Tensors under a transform, and subclasses, may have no values.
    if type(x) is not Tensor or not (is_dense(x) or is_sparse(x)) or functorch_is_active():
        return
    # A distribution says what its parameters are.
    if not isinstance(returned, td.Distribution) and not look_at_structure(decoder, likelihood):
        _look_at_outputs(likelihood, outputs)
    if likelihood.counts and x.is_floating_point() and may_look(x):
        values = csr_parts(x.detach())[0] if is_sparse(x) else x.detach()
        parts = values.isfinite() & (values != values.floor())
        if bool(parts.any()):
            warnings.warn(
                f"fastvae: x holds {float(values[parts][0]):g}, which is not a whole number, but a "
                f"{type(likelihood).__name__} likelihood is one of counts, and log p(x|z) then no "
                "log-probability. Pass the raw counts, neither normalised nor on a log scale "
                "(said once for each decoder)",
                UserWarning,
                stacklevel=4,
            )


def _look_at_outputs(likelihood: Any, outputs: Any) -> None:
    if likelihood.reads not in ("logits", "class logits", "event logits"):
        return
    if type(outputs) is not Tensor or not outputs.is_floating_point():
        return
    if not is_dense(outputs) or not may_look(outputs):
        return
    if outputs.dim() < 2 or outputs.shape[1:].numel() < _FEWEST:
        return
    values = outputs.detach()
    least, most = (float(v) for v in values.aminmax())
    # A zero-initialised last layer gives a constant output.
    if not (least >= 0 and most <= 1 and least < most):
        return
    if likelihood.reads != "logits":
        axes = likelihood.axis if likelihood.reads == "class logits" else tuple(range(1, values.dim()))
        if not bool(((values.float().sum(axes) - 1).abs() < 0.02).all()):
            return
    _warn(
        f"all outputs of the decoder lie in [{least:.3g}, {most:.3g}]", likelihood, _expected(likelihood)[1]
    )


def _expected(likelihood: Any) -> tuple[tuple[type[nn.Module], ...], str]:
    """Return the activations in which no decoder of this likelihood should end, and a fix."""
    reads, option = likelihood.reads, likelihood.option
    given = "rates" if reads == "log rates" else "probabilities"
    kind = type(likelihood).__name__
    by_option = f", or pass likelihood=fastvae.likelihoods.{kind}({option}=True) if it returns {given}"
    fix = f"reads {'log rates' if reads == 'log rates' else 'logits'}. Leave the last activation out"
    return _ACTIVATIONS.get(reads, ()), fix + (by_option if option else "")


def _warn(what: str, likelihood: Any, fix: str) -> None:
    warnings.warn(
        f"fastvae: {what}, but a {type(likelihood).__name__} likelihood {fix} (said once for each decoder)",
        UserWarning,
        stacklevel=5,
    )


def last_of_sequential(module: Any) -> nn.Module | None:
    """Return the last module of a (nested) Sequential, or of a module whose last child is one, else None."""
    inside = False
    while isinstance(module, nn.Module):
        children = [
            m for m in module.children() if not isinstance(m, (nn.Flatten, nn.Unflatten, nn.Identity))
        ]
        if not children:
            return module if inside else None
        inside = isinstance(module, nn.Sequential)
        module = children[-1]
    return None
