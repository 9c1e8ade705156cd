"""Frozen dataclasses of tensors as results of compiled and exported functions."""

from __future__ import annotations

from typing import TypeVar

from torch.utils import _pytree

C = TypeVar("C", bound=type)


def as_pytree(cls: C) -> C:
    """Register a dataclass with torch, so that exported, wrapped and transformed functions can return it."""
    _pytree.register_dataclass(cls, serialized_type_name=f"fastvae.{cls.__name__}")
    return cls
