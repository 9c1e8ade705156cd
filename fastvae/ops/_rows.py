"""log p(x|z) of rows by the C++: what any likelihood is called with."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import _backend
from ._registry import cast, code, empty, empty_like, pointer

# How a parameter lies beside the others' [K, B, X]: in full, a row for all, a number a row, a number for all.
_FULL, _COLUMN, _ONE, _NUMBER = range(4)


@functools.cache
def _number(likelihood: str) -> int:
    return _backend.extension().likelihoods.index(likelihood)


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype that is computed and summed in."""
    return torch.float64 if any([t.dtype == torch.float64 for t in tensors]) else torch.float32


def _laid_out(parameter: Tensor, shape: tuple[int, ...]) -> tuple[int, Tensor]:
    """The kind of a parameter, and the parameter, expanded over the axes that it is shared along."""
    if parameter.shape == shape:
        return _FULL, parameter
    *leading, columns = parameter.shape
    shared = all(n == 1 for n in leading)
    alone, many = (_NUMBER, _ONE) if columns == 1 and shape[-1] != 1 else (_COLUMN, _FULL)
    return alone if shared else many, parameter.expand(shape)


def _call(likelihood: str, x: Tensor, parameters: tuple[Tensor, ...], kinds: tuple[int, ...]) -> tuple:
    """The form in which the C++ takes x [B, X] and parameters [K, B, X] or [B, X]."""
    shape = parameters[0].shape
    threads = torch.get_num_threads()
    if len(shape) == 2:
        head, lacks = (_number(likelihood), 1, *shape, threads), (0,)
    else:
        head, lacks = (_number(likelihood), *shape, threads), ()
    rows = [
        (kind, p.data_ptr(), code(p.dtype), *lacks, *p.stride())
        for kind, p in zip(kinds, parameters, strict=True)
    ]
    return *head, (x.data_ptr(), code(x.dtype), *x.stride()), *rows


def native_log_prob(likelihood: str, x: Tensor, *parameters: Tensor) -> tuple[Tensor, bool]:
    """log p(x|z) of rows, and whether x lies where it must; the first parameter has all axes."""
    shape = parameters[0].shape
    dtype = result_dtype(x, *parameters)
    if not parameters[0].numel():
        return torch.zeros(shape[:-1], dtype=dtype), True
    kinds, parameters = zip(*(_laid_out(p, shape) for p in parameters), strict=True)
    out = empty(shape[:-1], dtype)
    call = _call(likelihood, x, parameters, kinds)
    in_range = _backend.extension().log_prob(call, dtype == torch.float64, out.data_ptr())
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
    kinds, tensors, grads = [], [], []
    for p, n in zip(parameters, need[1:], strict=True):
        kind, laid_out = _laid_out(p, shape)
        if kind != _FULL:
            sizes = {_COLUMN: shape[-1:], _ONE: shape[:-1], _NUMBER: ()}[kind]
            grads.append(empty(sizes, dtype) if n else None)
        else:
            if n and laid_out is not p:
                # The gradients of those that share a number are summed, and must not be rounded before.
                laid_out = laid_out.to(dtype)
            grads.append(empty_like(laid_out) if n else None)
        kinds.append(kind)
        tensors.append(laid_out)
    grad_x = empty_like(x) if need[0] else None
    lacks = () if len(shape) == 3 else (0,)
    addresses = [pointer(g) for g in grads]
    _backend.extension().log_prob_backward(
        _call(likelihood, x, tuple(tensors), tuple(kinds)), dtype == torch.float64,
        (grad.data_ptr(), code(dtype), *lacks, *grad.stride()),
        pointer(grad_x), *addresses, *[0] * (3 - len(addresses)),
    )  # fmt: skip
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
