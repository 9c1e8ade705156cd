"""Results of single batches, as saved, exchanged between ranks, and combined into an evaluation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Part(NamedTuple):
    """Results of one batch; the last axis of the second group of fields is its examples."""

    index: int  # type: ignore[assignment] # index of the batch
    digest: np.ndarray  # [16] bytes, hash of the data
    latent: (
        np.ndarray
    )  # [3, D]: posterior means' mean and sum of squared deviations, the KL's sum; [2, D] without KL
    dims: int  # elements in one example

    log_px: np.ndarray
    stderr: np.ndarray
    ess: np.ndarray
    khat: np.ndarray
    jackknife: np.ndarray
    jackknife_stderr: np.ndarray
    psis: np.ndarray
    low: np.ndarray
    high: np.ndarray
    k: np.ndarray
    elbo: np.ndarray
    curve: np.ndarray  # [R, n]: the bound after each recorded number of draws


_PER_BATCH = ("index", "digest", "latent", "dims")
# dtype kind and number of axes of each array of packed parts.
_PACKED = dict.fromkeys(Part._fields, ("f", 1)) | {
    "index": ("i", 1),
    "digest": ("u", 2),
    "latent": ("f", 3),
    "dims": ("i", 1),
    "k": ("i", 1),
    "curve": ("f", 2),
    "sizes": ("i", 1),
}


def pack(parts: list[Part]) -> dict[str, np.ndarray]:
    """Pack parts, at least one, into arrays for np.savez."""
    fields = {name: [getattr(p, name) for p in parts] for name in Part._fields}
    arrays = {name: np.stack([np.asarray(v) for v in fields.pop(name)]) for name in _PER_BATCH}
    arrays["sizes"] = np.array([len(p.log_px) for p in parts])
    return arrays | {name: np.concatenate(values, -1) for name, values in fields.items()}


def unpack(arrays: dict[str, np.ndarray]) -> list[Part]:
    """Unpack the arrays of :func:`pack` to parts.

    Raises:
        KeyError, ValueError: for arrays that :func:`pack` did not return.
    """
    for name, (kind, axes) in _PACKED.items():
        if arrays[name].dtype.kind != kind or arrays[name].ndim != axes:
            raise ValueError(f"{name} is of {arrays[name].dtype} with {arrays[name].ndim} axes")
    sizes = arrays["sizes"]
    for name in Part._fields:
        length = arrays[name].shape[0 if name in _PER_BATCH else -1]
        expected = len(sizes) if name in _PER_BATCH else sizes.sum()
        if length != expected or (sizes < 1).any():
            raise ValueError(f"sizes {sizes[:5].tolist()}… do not fit {name}, which has {length} entries")
    cuts = np.cumsum(sizes)[:-1]
    fields = {
        name: list(arrays[name]) if name in _PER_BATCH else np.split(arrays[name], cuts, -1)
        for name in Part._fields
    }
    parts = [Part(*values) for values in zip(*fields.values(), strict=True)]
    return [p._replace(index=int(p.index), dims=int(p.dims)) for p in parts]
