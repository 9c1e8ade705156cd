"""Formulas of torch operations as one autograd node each, with their gradient in closed form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backend as _backend
from .fast_path import ON_CPU, WANTED, plain
from .torch_private import SingleLevelFunction


class Formula:
    """Function of tensors, composed of torch operations, whose gradient has a closed form.

    For small tensors a node for each operation costs more than the operations. A call on plain tensors of a
    CPU, on the native backend, is one node instead, of the same numbers. Anywhere else, and where the
    gradient itself is differentiated, the composition runs as it is.

    Args:
        composed: the function: tensors, then other arguments, to a tensor or a tuple of tensors.
        forward: the same, without autograd: to the result, and to a tuple of tensors kept for the gradient.
        gradient: function of the upstream gradients, one for each result and None where none arrived, of the
            tensors kept, and of the arguments, to the gradients of the tensors.
        tensors: number of tensors among the arguments, which come first; some may be None.
    """

    def __init__(
        self,
        composed: Callable[..., Any],
        forward: Callable[..., tuple[Any, tuple[Tensor, ...]]],
        gradient: Callable[..., Sequence[Tensor | None]],
        tensors: int,
    ):
        self._composed, self._value = composed, forward
        self._gradient, self._tensors = gradient, tensors
        methods = {"forward": staticmethod(self._forward), "backward": staticmethod(self._backward)}
        self._node: Any = type(composed.__name__.strip("_"), (SingleLevelFunction,), methods)

    def __call__(self, *args: Any) -> Any:
        if torch.compiler.is_compiling() or _backend.on_cpu() != "native":
            return self._composed(*args)
        found = plain(args[: self._tensors])
        if found == ON_CPU | WANTED and torch.is_grad_enabled():
            return self._node.apply(*args)
        return self._value(*args)[0] if found & ON_CPU else self._composed(*args)

    def _forward(self, ctx: Any, *args: Any) -> Any:
        ctx.set_materialize_grads(False)
        result, kept = self._value(*args)
        ctx.save_for_backward(*args[: self._tensors], *kept)
        ctx.options = args[self._tensors :]
        return result

    def _backward(self, ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        n, options = self._tensors, ctx.options
        if torch.is_grad_enabled() or plain(grads) != ON_CPU:
            return *self._differentiated(ctx, ctx.needs_input_grad[:n], grads), *[None] * len(options)
        saved = ctx.saved_tensors
        return *self._gradient(grads, saved[n:], *saved[:n], *options), *[None] * len(options)

    def _differentiated(
        self, ctx: Any, needed: Sequence[bool], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Return the gradients of the composition, which can be differentiated further."""
        again = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views, since one tensor may be several arguments.
            inputs = [t if t is None else t.view_as(t) for t in ctx.saved_tensors[: self._tensors]]
            results = self._composed(*inputs, *ctx.options)
            results = results if isinstance(results, tuple) else (results,)
        arrived = [(r, g) for r, g in zip(results, grads, strict=True) if g is not None]
        if not arrived:
            return [None] * len(needed)
        found = torch.autograd.grad(
            [r for r, _ in arrived],
            [t for t, need in zip(inputs, needed, strict=True) if need and t is not None],
            [g for _, g in arrived],
            create_graph=again,
            allow_unused=True,
        )
        each = iter(found)
        return [next(each) if need else None for need in needed]
