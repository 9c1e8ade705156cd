"""Detection of in-place changes to tensors that a backward pass recomputes from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch import distributions as td

from .distributions import Distribution
from .head import called_by


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
