"""log p(x|z) of rows: the op of any likelihood, and the form in which the C++ is called."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import _backend
from .._checks import check_same_device, check_tensor, shape_of
from .op import Op, cast, empty_like, in_shape, new_empty

# How a parameter lies beside the others' [K, B, X]: in full, a row for all, a number a row, a number for all.
_FULL, _COLUMN, _ONE, _NUMBER = range(4)


@functools.cache
def number(likelihood: str) -> int:
    return _backend.extension().likelihoods.index(likelihood)


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that is computed and summed in."""
    for t in tensors:
        if t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _laid_out(parameter: Tensor, shape: tuple[int, ...]) -> tuple[int, Tensor]:
    """The kind of a parameter, and the parameter, expanded over the axes that it is shared along."""
    if parameter.shape == shape:
        return _FULL, parameter
    *leading, columns = parameter.shape
    shared = all(n == 1 for n in leading)
    alone, many = (_NUMBER, _ONE) if columns == 1 and shape[-1] != 1 else (_COLUMN, _FULL)
    return alone if shared else many, parameter.expand(shape)


def native_gradients(
    x: Tensor, parameters: tuple[Tensor, ...], need: list[bool], dtype: torch.dtype
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Tensors for the C++ to fill: those of parameters that broadcast are sums, kept in ``dtype``."""
    full = parameters[0].shape
    grads = [
        empty_like(p, None if p.shape == full else dtype) if n else None
        for p, n in zip(parameters, need[1:], strict=False)
    ]
    return empty_like(x) if need[0] else None, grads


def native_log_prob(likelihood: str, x: Tensor, *parameters: Tensor) -> tuple[Tensor, bool]:
    """log p(x|z) of rows, and whether x lies where it must; the first parameter has all axes."""
    shape = parameters[0].shape
    dtype = result_dtype(x, *parameters)
    if not parameters[0].numel():
        return x.new_zeros(shape[:-1], dtype=dtype), True
    rows = (number(likelihood), torch.get_num_threads(), x, *(_laid_out(p, shape) for p in parameters))
    out = new_empty(x, shape[:-1], dtype)
    in_range = _backend.extension().log_prob(rows, dtype == torch.float64, out)
    return out, in_range


def native_log_prob_backward(
    likelihood: str, grad: Tensor, x: Tensor, parameters: tuple[Tensor, ...], need: list[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of x and of the parameters, None where not needed."""
    given = (x, *parameters)
    if not parameters[0].numel():
        # There is nothing to sum over, and an empty tensor has no address to hand to C++.
        return tuple(t.new_zeros(t.shape) if n else None for t, n in zip(given, need, strict=True))
    shape = parameters[0].shape
    dtype = result_dtype(*given)
    rows, grads = [number(likelihood), torch.get_num_threads(), x], []
    for p, n in zip(parameters, need[1:], strict=True):
        kind, laid_out = _laid_out(p, shape)
        if kind != _FULL:
            sizes = {_COLUMN: shape[-1:], _ONE: shape[:-1], _NUMBER: ()}[kind]
            grads.append(new_empty(x, sizes, dtype) if n else None)
        else:
            if n and laid_out is not p:
                # The gradients of those that share a number are summed, and must not be rounded before.
                laid_out = laid_out.to(dtype)
            grads.append(empty_like(laid_out) if n else None)
        rows.append((kind, laid_out))
    grad_x = empty_like(x) if need[0] else None
    _backend.extension().log_prob_backward(tuple(rows), dtype == torch.float64, grad, grad_x, grads)
    finished = [None if g is None else _as_given(g, p) for g, p in zip(grads, parameters, strict=True)]
    return grad_x, *finished


def _as_given(grad: Tensor, parameter: Tensor) -> Tensor:
    if grad.shape != parameter.shape:
        if grad.numel() == parameter.numel():
            grad = grad.view(parameter.shape)
        else:
            while grad.dim() < parameter.dim():
                grad = grad.unsqueeze(-1)
            grad = grad.sum_to_size(parameter.shape)
    return cast(grad, parameter.dtype)


# The ops


def check_event(x_name: str, x: Tensor, name: str, parameter: Tensor) -> None:
    """Check x [B, *event] against a parameter [..., B, *event]."""
    check_tensor(x_name, x)
    check_tensor(name, parameter)
    check_same_device(name, parameter, x_name, x)
    lead = parameter.dim() - x.dim()
    if x.dim() == 0 or lead < 0 or parameter.shape[lead:] != x.shape:
        raise ValueError(
            f"{name} has shape {shape_of(parameter)}, which does not end in {x_name}'s {shape_of(x)} ([B, "
            f"*event]); expected [..., {', '.join(map(str, x.shape))}]"
        )


def _flat(x: Tensor, parameters: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
    """x [B, *event] as [B, X], parameters [..., B, *event] as [K, B, X]."""
    lead = parameters[0].dim() - x.dim()
    flat = []
    for p in parameters:
        # Written out, since -1 is ambiguous for an empty batch.
        shape = (p.shape[:lead].numel(), p.shape[lead], p.shape[lead + 1 :].numel())
        flat.append(p if p.shape == shape else p.reshape(shape))
    return x if x.dim() == 2 else x.reshape(x.shape[0], x.shape[1:].numel()), flat


def _are_rows(x: Tensor, parameters: tuple[Tensor, ...]) -> bool:
    """Whether these are all [B, X], of one shape and dtype: the C++ takes them as they are."""
    if x.dim() != 2:
        return False
    for t in parameters:  # noqa: SIM110
        if t.shape != x.shape or t.dtype != x.dtype:
            return False
    return True


class LogProb(Op):
    """log p(x|z) [..., B] of x [B, *event] and parameters [..., B, *event].

    Args:
        likelihood: its name.
        parameters: those of its decoder's outputs.
        refuse: called with x where the C++ found that it is not where it must be.
    """

    def __init__(self, likelihood: str, parameters: tuple[str, ...], refuse: Callable | None = None):
        self.likelihood = self.module = likelihood
        self.refuse = refuse
        self.name = f"{likelihood}_log_prob"
        self.schema = f"(Tensor x, {', '.join(f'Tensor {p}' for p in parameters)}) -> Tensor"
        self.gradient = _LogProbBackward(likelihood, parameters)
        super().__init__()

    def native(self, x, *parameters):
        if _are_rows(x, parameters):
            result, in_range = native_log_prob(self.likelihood, x, *parameters)
        else:
            rows, flat = _flat(x, parameters)
            result, in_range = native_log_prob(self.likelihood, rows, *flat)
            result = in_shape(result, self._shape(x, parameters))
        if not in_range:
            self.refuse(x)
        return result

    def composed(self, backend):
        function = super().composed(backend)

        def log_prob(x, *parameters):
            rows, flat = _flat(x, parameters)
            return in_shape(function(rows, *flat), self._shape(x, parameters))

        return log_prob

    def fake(self, x, *parameters):
        return x.new_empty(self._shape(x, parameters), dtype=result_dtype(x, *parameters))

    def save(self, ctx, args, results):
        ctx.save_for_backward(*args)

    def arguments_of_gradient(self, ctx, grad):
        return grad, *ctx.saved_tensors, list(ctx.needs_input_grad)

    @staticmethod
    def _shape(x, parameters):
        return parameters[0].shape[: parameters[0].dim() - x.dim() + 1]


class _LogProbBackward(Op):
    """Gradients of (x, *parameters), None where not needed."""

    def __init__(self, likelihood: str, parameters: tuple[str, ...]):
        self.likelihood = self.module = likelihood
        self.name = f"{likelihood}_log_prob_backward"
        number = len(parameters) + 1
        self.schema = (
            f"(Tensor grad, Tensor x, {', '.join(f'Tensor {p}' for p in parameters)}, bool[{number}] need) "
            f"-> ({', '.join(['Tensor'] * number)})"
        )
        super().__init__()

    def native(self, grad, x, *rest):
        *parameters, need = rest
        if _are_rows(x, parameters):
            return native_log_prob_backward(self.likelihood, grad, x, tuple(parameters), need)
        rows, flat = _flat(x, parameters)
        grads = native_log_prob_backward(
            self.likelihood, grad.reshape(flat[0].shape[:2]), rows, tuple(flat), need
        )
        return _reshaped(grads, (x, *parameters))

    def composed(self, backend):
        function = super().composed(backend)

        def backward(grad, x, *rest):
            *parameters, need = rest
            rows, flat = _flat(x, parameters)
            grads = function(grad.reshape(flat[0].shape[:2]), rows, *flat, need)
            return _reshaped(grads, (x, *parameters))

        return backward

    def fake(self, grad, *rest):
        *tensors, need = rest
        return tuple(t.new_empty(t.shape) if n else None for t, n in zip(tensors, need, strict=True))


def _reshaped(grads, tensors):
    return tuple(None if g is None else g.reshape(t.shape) for g, t in zip(grads, tensors, strict=True))
