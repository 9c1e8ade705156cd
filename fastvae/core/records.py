"""Registration of result records with torch's exporter."""

from __future__ import annotations

from typing import TypeVar

import torch

_R = TypeVar("_R")


def registered(cls: type[_R]) -> type[_R]:
    """Let a frozen dataclass of tensors be a result of exported programs, CUDA graphs and ``vmap``.

    A NamedTuple is a pytree without registration, but can be unpacked in the wrong order.
    """
    torch.export.register_dataclass(cls, serialized_type_name=f"fastvae.{cls.__name__}")
    return cls
