"""Results of single batches, as saved, exchanged between ranks, and combined into an evaluation."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from ..weights import LogMarginal


@dataclass(frozen=True, eq=False, kw_only=True)
class Examples(LogMarginal):
    """Estimates of the examples of a batch or of a data set, each field [n], on the CPU."""

    k: Tensor
    """Number of draws, int64."""
    elbo: Tensor
    """Mean of the log weights of draws from q: the bound for k=1. NaN without draws from q."""


# Fields with a number for each example.
PER_EXAMPLE = tuple(f.name for f in fields(Examples))


def joined(parts: list[Examples]) -> dict[str, Tensor]:
    """Concatenate the fields of batches."""
    return {name: torch.cat([getattr(p, name) for p in parts]) for name in PER_EXAMPLE}


@dataclass(frozen=True, eq=False)
class Part:
    """Results of one batch."""

    index: int  # index of the batch
    digest: np.ndarray  # [16] bytes, hash of the data
    # [3, D]: posterior means' mean and sum of squared deviations, the KL's sum; [2, D] without KL
    latent: np.ndarray
    dims: float  # observed elements in an example, the mean
    curve: np.ndarray  # [R, n]: the bound after each recorded number of draws
    left_out: np.ndarray  # [G, n]: log_px without each group of draws; [0, n] unless the noise is shared
    examples: Examples

    def __len__(self) -> int:
        return len(self.examples.log_px)


_PER_BATCH = ("index", "digest", "latent", "dims")
# Arrays with a column for each example.
_BY_COLUMN = ("curve", "left_out")
# dtype kind and number of axes of each array of packed parts.
_PACKED = dict.fromkeys(PER_EXAMPLE, ("f", 1)) | {
    "index": ("i", 1),
    "digest": ("u", 2),
    "latent": ("f", 3),
    "dims": ("f", 1),
    "k": ("i", 1),
    "curve": ("f", 2),
    "left_out": ("f", 2),
    "sizes": ("i", 1),
}


def pack(parts: list[Part]) -> dict[str, np.ndarray]:
    """Pack parts, at least one, into arrays for np.savez."""
    arrays = {name: np.stack([np.asarray(getattr(p, name)) for p in parts]) for name in _PER_BATCH}
    arrays["sizes"] = np.array([len(p) for p in parts])
    for name in _BY_COLUMN:
        arrays[name] = np.concatenate([getattr(p, name) for p in parts], -1)
    return arrays | {name: v.numpy() for name, v in joined([p.examples for p in parts]).items()}


def unpack(arrays: dict[str, np.ndarray]) -> list[Part]:
    """Unpack the arrays of :func:`pack` to parts.

    Raises:
        KeyError, ValueError: for arrays that :func:`pack` did not return.
    """
    for name, (kind, axes) in _PACKED.items():
        if arrays[name].dtype.kind != kind or arrays[name].ndim != axes:
            raise ValueError(f"{name} is of {arrays[name].dtype} with {arrays[name].ndim} axes")
    sizes = arrays["sizes"]
    for name in _PACKED:
        length = arrays[name].shape[0 if name in _PER_BATCH else -1]
        expected = len(sizes) if name in (*_PER_BATCH, "sizes") else sizes.sum()
        if length != expected or (sizes < 1).any():
            raise ValueError(f"sizes {sizes[:5].tolist()}… do not fit {name}, which has {length} entries")
    stops = np.cumsum(sizes)
    rows = [slice(stop - size, stop) for stop, size in zip(stops, sizes, strict=True)]
    return [_part(arrays, index, span) for index, span in enumerate(rows)]


def _part(arrays: dict[str, np.ndarray], index: int, rows: slice) -> Part:
    """Return the part at an index, whose examples are these rows."""
    estimates = {name: torch.from_numpy(arrays[name][rows]) for name in PER_EXAMPLE}
    return Part(
        index=int(arrays["index"][index]),
        digest=arrays["digest"][index],
        latent=arrays["latent"][index],
        dims=float(arrays["dims"][index]),
        **{name: arrays[name][:, rows] for name in _BY_COLUMN},
        examples=Examples(**estimates),
    )
