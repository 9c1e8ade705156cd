"""Recorder of the addresses that kernels load and store under Triton's interpreter.

Every access is attributed to the argument it falls in, so a test can check how often each element is read or
written; an access outside all arguments fails, which the interpreter itself would not notice. With
``touch=False`` memory is not accessed, loads return zeros, and tensors may be larger than memory.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor


@dataclass
class Launch:
    """Launch: its arguments, and the byte offsets loaded and stored, by argument."""

    kernel: str
    grid: tuple[int, ...]
    tensors: dict[str, Tensor]
    loads: dict[str, list[np.ndarray]] = field(default_factory=dict)
    stores: dict[str, list[np.ndarray]] = field(default_factory=dict)

    def bytes(self) -> int:
        """Return the bytes loaded and stored."""
        return sum(
            offsets.size * self.tensors[name].element_size()
            for accesses in (self.loads, self.stores)
            for name, parts in accesses.items()
            for offsets in parts
        )

    def loaded(self, name: str) -> int:
        """Return the bytes loaded from one argument."""
        return sum(o.size for o in self.loads.get(name, [])) * self.tensors[name].element_size()

    def counts(self, accesses: dict[str, list[np.ndarray]], name: str) -> np.ndarray:
        """Return how often each element of an argument, in index order, is loaded or stored."""
        tensor = self.tensors[name]
        offsets = np.sort(np.concatenate([np.zeros(0, np.int64), *accesses.get(name, [])]))
        every = _offsets(tensor)
        assert np.isin(offsets, every).all(), f"{self.kernel}: {name}: addresses between its elements"
        return np.searchsorted(offsets, every, "right") - np.searchsorted(offsets, every, "left")


def _offsets(tensor: Tensor) -> np.ndarray:
    """Return the byte offsets of all elements of a tensor."""
    every = np.zeros((1,) * tensor.dim(), np.int64)
    for axis, (n, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        shape = [n if i == axis else 1 for i in range(tensor.dim())]
        every = every + (np.arange(n) * stride).reshape(shape)
    return (every * tensor.element_size()).flatten()


def _spans(tensor: Tensor, addresses: np.ndarray) -> bool:
    """Return True if all addresses lie between the tensor's first and last byte."""
    first = tensor.data_ptr()
    span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    last = first + span * tensor.element_size()
    return bool(tensor.numel() and addresses.min() >= first and addresses.max() < last)


def _has(tensor: Tensor, addresses: np.ndarray) -> bool:
    """Return True if all addresses are those of the tensor's elements, which must not overlap."""
    left, rest = np.divmod(addresses - tensor.data_ptr(), tensor.element_size())
    for stride, n in sorted(zip(tensor.stride(), tensor.shape, strict=True), reverse=True):
        if stride:
            left = left - np.minimum(left // stride, n - 1) * stride
    return not (left.any() or rest.any())


@contextlib.contextmanager
def recorded(
    *, touch: bool = True, programs: Callable[[tuple[int, ...]], list[tuple[int, int, int]]] | None = None
) -> Iterator[list[Launch]]:
    """Record every launch within the block.

    Args:
        touch: read and write memory. Default: True.
        programs: ``programs(grid)`` lists the programs to run. Default: all.
    """
    from triton.runtime import interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    original = builder.create_masked_load, builder.create_masked_store, executor.__call__
    launches: list[Launch] = []

    def attributed(pointers, mask, accesses) -> None:
        launch = launches[-1]
        addresses = np.broadcast_to(pointers, mask.shape)[mask.astype(bool)].astype(np.int64)
        if not addresses.size:
            return
        reached = [n for n, t in launch.tensors.items() if _spans(t, addresses)]
        if len(reached) > 1:  # interleaved rows of the halves of one tensor
            reached = [n for n in reached if _has(launch.tensors[n], addresses)] or reached
        if reached:
            name = reached[0]
            accesses(launch).setdefault(name, []).append(addresses - launch.tensors[name].data_ptr())
            return
        raise AssertionError(f"{launch.kernel} reaches beyond its arguments: {addresses.min():#x}")

    def load(self, pointers, mask, other, *rest):
        attributed(pointers.data, mask.data, lambda launch: launch.loads)
        if touch:
            return original[0](self, pointers, mask, other, *rest)
        kind = pointers.get_element_ty()
        zeros = np.zeros(pointers.data.shape, interpreter._get_np_dtype(kind))
        return interpreter.TensorHandle(zeros, kind)

    def store(self, pointers, value, mask, *rest):
        attributed(pointers.data, mask.data, lambda launch: launch.stores)
        return original[1](self, pointers, value, mask, *rest) if touch else None

    def call(self, *args, **kwargs):
        names = inspect.getfullargspec(self.fn).args
        given = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in names})
        tensors = {n: v for n, v in given.items() if isinstance(v, Tensor)}
        grid = (*self.grid, 1, 1)[:3]
        launches.append(Launch(self.fn.__name__, grid, tensors))
        scope = interpreter._patch_lang(self.fn)
        try:
            given = {n: v if n in self.constexprs else interpreter._implicit_cvt(v) for n, v in given.items()}
            interpreter.interpreter_builder.set_grid_dim(*grid)
            for program in np.ndindex(grid) if programs is None else programs(grid):
                interpreter.interpreter_builder.set_grid_idx(*program)
                self.fn(**given)
        finally:
            scope.restore()

    builder.create_masked_load, builder.create_masked_store, executor.__call__ = load, store, call
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store, executor.__call__ = original
