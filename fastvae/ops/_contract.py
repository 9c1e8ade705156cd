"""Validation of tensors in a direct call through torch's dispatcher.

The functions of :mod:`fastvae.ops` promote, broadcast and validate users' arguments, and the C++ validates
its inputs again (``Contract`` in csrc/arguments.hpp). Direct calls of ``torch.ops.fastvae.*``, as in an
exported program, meet these checks on every backend.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from torch import Tensor

from ..core.checks import FLOATING, shape_of

Shape = tuple[int, ...]  # -1: any size
_HINT = "The functions of fastvae.ops promote, broadcast and validate their arguments: call the op by them"


def reaches_beyond(tensor: Tensor) -> bool:
    """Return True if the tensor's storage was freed or shrunk, as sharding does with parameters."""
    if not tensor.numel() or tensor.is_meta:
        return False
    last = tensor.storage_offset() + sum(
        (n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (last + 1) * tensor.itemsize > tensor.untyped_storage().nbytes()


class Contract:
    """Expected tensors of an op; any deviation raises ValueError."""

    def __init__(self, op: str, names: tuple[str, ...]):
        self.op, self.names = op, names

    def check_devices(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Validate that all tensors are on one device, except for scalars on the CPU."""
        given = [(n, t) for n, t in zip(self.names, tensors, strict=True) if t is not None]
        device = next((t.device for _, t in given if t.dim() or not t.is_cpu), None)
        for name, t in given:
            if device is not None and t.device != device and not (t.is_cpu and t.dim() == 0):
                raise ValueError(
                    f"fastvae::{self.op}: {name} is on {t.device}; expected {device}, like the others; move "
                    f"it with .to({str(device)!r})"
                )

    def check_storage(self, tensors: tuple[Tensor | None, ...]) -> None:
        """Validate that the tensors are dense and their storage is still allocated."""
        for name, t in zip(self.names, tensors, strict=True):
            if t is None:
                continue
            if t.layout != torch.strided:
                raise ValueError(
                    f"fastvae::{self.op}: {name} has layout {t.layout}; expected a dense strided tensor: "
                    "convert it with .to_dense()"
                )
            if type(t) in (Tensor, torch.nn.Parameter) and reaches_beyond(t):
                raise ValueError(
                    f"fastvae::{self.op}: {name} {shape_of(t)} reaches beyond its storage, which was freed "
                    "or made smaller; expected a tensor whose data are there (a sharded parameter must be "
                    "gathered first)"
                )

    def expect(self, name: str, tensor: Tensor | None, dtype: torch.dtype | None, *shapes: Shape) -> None:
        """Validate a tensor's dtype (None: any floating-point) and shape (one of several); None passes."""
        if tensor is None:
            return
        right = tensor.dtype in FLOATING if dtype is None else tensor.dtype == dtype
        if not right or not any(_fits(tensor.shape, shape) for shape in shapes):
            kind = "floating-point" if dtype is None else str(dtype)
            self.refuse(name, tensor, f"{kind} {' or '.join(map(_described, shapes))}")

    def expect_count(self, name: str, value: int, least: int = 1) -> None:
        if value < least:
            raise ValueError(f"fastvae::{self.op}: {name} is {value}; expected at least {least}")

    def refuse(self, name: str, tensor: Tensor, expected: str) -> NoReturn:
        raise ValueError(
            f"fastvae::{self.op}: {name} is {tensor.dtype} {shape_of(tensor)}; expected {expected}. {_HINT}"
        )


def _fits(shape: torch.Size, expected: Shape) -> bool:
    if len(shape) != len(expected):
        return False
    return all([m == -1 or n == m for n, m in zip(shape, expected, strict=True)])


def _described(shape: Shape) -> str:
    return f"[{', '.join('*' if n == -1 else str(n) for n in shape)}]"
