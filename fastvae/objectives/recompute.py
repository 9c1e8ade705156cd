"""Repetition of a forward pass during the backward pass: the same inputs, buffers and TorchScript kernels."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributions as td

from ..core.buffers import Buffers
from ..core.checks import may_look
from ..distributions import Distribution
from ..inputs.last_layer import called_by


def repeatable(draw: Callable[..., list[Tensor]], inputs: Mapping[str, Any]) -> Callable[..., list[Tensor]]:
    """Wrap ``draw(start, ...)`` so that a second call with the same ``start`` repeats the first, or raises.

    The second call runs with the modules' buffers and parameters as the first found them, and leaves the
    current ones: with spectral norm's power iteration, other buffers would give other weights, and
    ``torch.func.functional_call`` replaces parameters for one call. It refuses inputs that were changed in
    place, and other results. TorchScript runs unoptimised: it optimises a
    function after the first calls, and the optimised function saves other tensors for the backward pass.

    Args:
        draw: computation that returns log-likelihoods and other tensors; its first argument identifies the
            call.
        inputs: inputs of the computation (tensors, containers, distributions, modules), by name.
    """
    versions, modules = Versions(inputs), [m for value in inputs.values() for m in _modules(value)]
    first: dict[Any, tuple[Buffers, Tensor]] = {}
    rounded = any([parameter.dtype in _HALF for m in modules for parameter in m.parameters(recurse=False)])

    def run(start: Any, *args: Any) -> list[Tensor]:
        outputs: list[Tensor] = []
        try:
            with torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
                outputs = draw(start, *args)
        finally:
            versions.note(*outputs)
        return outputs

    def repeated(start: Any, *args: Any) -> list[Tensor]:
        if start in first:
            versions.check()
            buffers, log_likelihood = first[start]
            with buffers.restored():
                outputs = run(start, *args)
            _check_repetition(log_likelihood, outputs[0].detach(), rounded)
        else:
            buffers = Buffers(modules)
            outputs = run(start, *args)
            buffers.keep_changed()
            first[start] = buffers, outputs[0].detach()
        return outputs

    return repeated


# In these a compiled decoder, whose kernels are others with gradients than without, rounds differently.
_HALF = (torch.bfloat16, torch.float16)


def _check_repetition(first: Tensor, again: Tensor, rounded: bool) -> None:
    """Raise RuntimeError unless the log-likelihoods of the second pass are those of the first.

    Args:
        first: log-likelihoods of the first pass.
        again: those of the second.
        rounded: whether the decoder computes in half precision.
    """
    # Kernels may sum in another order, which is far below this bound; a changed decoder is far above it.
    rtol = 1e-3 if rounded or torch.is_autocast_enabled(again.device.type) else 1e-5
    if may_look(again) and not torch.allclose(first, again, rtol=rtol, atol=1e-3, equal_nan=True):
        off = (first - again).abs().nan_to_num(torch.inf).max()
        raise RuntimeError(
            f"the decoder gave other outputs for the same z when the backward pass ran it again: "
            f"log-likelihoods differ by up to {off:.3g} nats. With k_chunk, only torch's global random state "
            "and the buffers of modules that the decoder is, or reaches by name, are restored in between. "
            "Pass the module as the decoder, draw its noise from torch's global random state, or leave "
            "k_chunk out"
        )


class Versions:
    """In-place versions of the inputs of a checkpointed computation, as autograd tracks for saved tensors.

    A computation may change its parameters and restore them, so versions are recorded after each run
    and compared before the next.

    Args:
        inputs: inputs of the computation (tensors, containers, distributions, modules), by a name for
            the error message.
    """

    def __init__(self, inputs: Mapping[str, Any]):
        self._tensors: dict[int, tuple[str, Tensor]] = {}
        self._graph_ends = set()
        for owner, value in inputs.items():
            for name, tensor in _tensors(owner, value):
                self._add(name, tensor)
                if tensor.grad_fn is not None:
                    self._graph_ends.add(tensor.grad_fn)
        self._seen: dict[int, int] = {}

    def _add(self, name: str, tensor: Tensor) -> None:
        # Inference tensors do not track versions.
        if not tensor.is_inference():
            self._tensors.setdefault(id(tensor), (name, tensor))

    def note(self, *outputs: Tensor) -> None:
        """Record the versions after a run, including the leaves of the graph of ``outputs``."""
        done: set[Any] = set(self._graph_ends)
        todo = [t.grad_fn for t in outputs if t.grad_fn is not None]
        while todo:
            node = todo.pop()
            if node in done:
                continue
            done.add(node)
            if (leaf := getattr(node, "variable", None)) is not None:
                self._add("a tensor that the decoder reads", leaf)
            todo += [parent for parent, _ in node.next_functions if parent is not None]
        self._seen = {key: tensor._version for key, (_, tensor) in self._tensors.items()}

    def check(self) -> None:
        """Raise RuntimeError if a tensor was changed in place since the last run."""
        for key, version in self._seen.items():
            name, tensor = self._tensors[key]
            if tensor._version != version:
                raise RuntimeError(
                    f"{name}, {list(tensor.shape)}, was changed in place between the forward and the "
                    "backward pass. With k_chunk the backward pass computes from it again, and its gradients "
                    "would be those of other values: call backward() before optimizer.step() and any other "
                    "change, give a copy (such as x.clone()), or leave k_chunk out"
                )


def _tensors(name: str, value: Any, seen: tuple[Any, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield the named tensors of a value, without buffers of modules, which a forward pass may update."""
    if any(value is outer for outer in seen):  # a prior and its posterior may refer to each other
        return
    seen = (*seen, value)
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(f"{name}[{key!r}]", part, seen)
    elif isinstance(value, (tuple, list)):
        for i, part in enumerate(value):
            yield from _tensors(f"{name}[{i}]", part, seen)
    elif isinstance(value, (Distribution, td.Distribution)):
        for key, part in vars(value).items():
            yield from _tensors(f"{name}.{key}", part, seen)
    elif called_by(value) is not value:
        yield from _tensors(name, called_by(value), seen)
    elif isinstance(value, nn.Module):
        for key, part in value.named_parameters():
            yield f"{name}.{key}", part
        for key, part in value.named_children():
            if isinstance(part, Distribution):
                yield from _tensors(f"{name}.{key}", part, seen)  # it may have tensors other than parameters


def _modules(value: Any, seen: tuple[Any, ...] = ()) -> Iterator[nn.Module]:
    """Yield the modules of a value, each with the modules inside it."""
    if any(value is outer for outer in seen):
        return
    seen = (*seen, value)
    if isinstance(value, nn.Module):
        yield from value.modules()
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _modules(part, seen)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _modules(part, seen)
    elif isinstance(value, (Distribution, td.Distribution)):
        yield from _modules(vars(value), seen)
    elif called_by(value) is not value:
        yield from _modules(called_by(value), seen)
    elif isinstance(value, functools.partial):
        yield from _modules([value.func, *value.args, *value.keywords.values()], seen)
    elif isinstance(value, FunctionType):
        yield from _modules(_reached(value), seen)
    elif callable(value) and isinstance(type(value).__call__, FunctionType):
        own = [v for v in getattr(value, "__dict__", {}).values() if callable(v)]
        yield from _modules([*own, type(value).__call__], seen)


def _reached(function: FunctionType) -> list[Any]:
    """Return what a function may call: what is callable in its closure, and modules among its globals."""
    reached = [function.__globals__.get(name) for name in function.__code__.co_names]
    reached = [value for value in reached if isinstance(value, (nn.Module, MethodType))]
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # not set yet
            reached.append(cell.cell_contents)
    return [value for value in reached if callable(value)]
