"""Digest of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from .sparse import csr_parts, is_sparse


def digest(tensors: Iterable[Tensor]) -> np.ndarray:
    """Hash the dtypes, shapes and values of tensors to [16] bytes; sparse matrices by their parts."""
    found = hashlib.blake2b(digest_size=16)
    for t in (part for whole in tensors for part in _dense_parts(whole)):
        t = t.detach().cpu().contiguous()
        found.update(f"{t.dtype}{tuple(t.shape)}".encode())
        found.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return np.frombuffer(found.digest(), np.uint8).copy()


def _dense_parts(t: Tensor) -> tuple[Tensor, ...]:
    return (*csr_parts(t), torch.tensor(t.shape)) if is_sparse(t) else (t,)
