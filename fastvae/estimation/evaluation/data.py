"""Conversion of the user's data to batches, and the encoder's device and dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, default_collate

from ...core.checks import FLOATING, check_dense, shape_of
from ...core.nested import Conditioning, tensors
from ...core.sparse import check_matrix, is_sparse, span
from ...inputs.modules import modules_of
from ...likelihoods.base import Likelihood
from ...likelihoods.declared import Declared


@dataclass(frozen=True, eq=False)
class Batch:
    """Batch of the data."""

    index: int
    row: int  # index of its first example in the data
    x: Any  # [B, *event], or a dict of these
    conditioning: Conditioning | None

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors of the batch."""
        return [*tensors(self.x), *(t for part in self.conditioning or () for t in tensors(part))]


class Batches:
    """Batches of the user's data, validated and counted; those without examples are left out.

    Args:
        data: as in :func:`fastvae.evaluate`.
        batch_size: examples per batch, for data not in batches.
        likelihood: the likelihood, which validates x.
        prepare_batch: the user's function of a batch, or None.
        shard: division of the work over the ranks.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        likelihood: Likelihood,
        prepare_batch: Callable[[Any], Mapping[str, Any]] | None,
        shard: str,
    ):
        self._batches = batches_of(data, batch_size, shard)
        self._likelihood, self._prepare_batch = likelihood, prepare_batch
        self.number = length_of(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        row, axes = 0, None
        for index, batch in enumerate(_explained(self._batches)):
            batch, conditioning = unpacked(batch, self._prepare_batch)
            x = data_of(batch, axes, self._likelihood)
            examples, axes = tensors(x)[0].shape[0], [t.dim() for t in tensors(x)]
            if examples:
                yield Batch(index, row, x, conditioning)
            row += examples


def check_prepare_batch(prepare_batch: Any) -> None:
    """Validate that it is None or a function."""
    if prepare_batch is not None and not callable(prepare_batch):
        raise TypeError(
            "prepare_batch must be a function of a batch, such as lambda batch: {'x': batch[0], 'context': "
            f"batch[1]}}; got {type(prepare_batch).__name__}"
        )


def batches_of(data: Any, batch_size: int, shard: str) -> Iterable[Any]:
    if isinstance(data, Mapping):
        return _batches_of_parts(data, batch_size)
    if is_array(data):
        return Slices(sliceable("data", data), batch_size)
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(data, batch_size, collate_fn=collated)
    sampler = data.sampler if isinstance(data, DataLoader) else None
    if isinstance(sampler, DistributedSampler) and shard != "none":
        raise ValueError(
            "data has a DistributedSampler, but evaluate shares the batches among the ranks itself; give it "
            'a loader of the whole data set, or shard="none" to evaluate this rank\'s part alone'
        )
    if hasattr(data, "tocsr"):
        raise TypeError(
            f"data is a {type(data).__name__}, a sparse matrix of another library; expected torch's: pass "
            "torch.sparse_csr_tensor(m.indptr, m.indices, m.data, m.shape) of m = data.tocsr()"
        )
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise TypeError(
            "data must be a tensor or array [N, *event], a Dataset, or an iterable of batches such as a "
            f"DataLoader; got {type(data).__name__}"
        )
    return data


def collated(examples: list[Any]) -> Any:
    """Return a batch of examples as torch does, and of rows of sparse matrices a sparse matrix, COO."""
    first = examples[0]
    if is_sparse(first):
        return torch.stack([example.to_sparse() for example in examples])
    if isinstance(first, Mapping) and any([is_sparse(part) for part in first.values()]):
        return {name: collated([example[name] for example in examples]) for name in first}
    if isinstance(first, (tuple, list)) and any([is_sparse(part) for part in first]):
        return [collated(list(parts)) for parts in zip(*examples, strict=True)]
    return default_collate(examples)


def _explained(batches: Iterable[Any]) -> Iterator[Any]:
    """Yield the batches; explain torch's error for a loader of sparse examples."""
    try:
        yield from batches
    except RuntimeError as error:
        if not ("sparse" in str(error) and "collate_fn" in str(error)):
            raise
        raise TypeError(
            "data is a DataLoader of sparse examples, which torch's default collate_fn does not put into a "
            "batch; expected batches [B, X]: pass the data set, loader.dataset, or the sparse matrix [N, X] "
            "itself, or give the loader a collate_fn, such as torch.stack for rows [X]"
        ) from error


class Slices(Sequence[Any]):
    """Batches of a tensor or array, or of a dict of these, read lazily."""

    def __init__(self, data: Any, batch_size: int):
        self._data, self._size = data, batch_size
        self._rows = len(next(iter(data.values())) if isinstance(data, dict) else data)

    def __len__(self) -> int:
        return -(-self._rows // self._size)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = index * self._size, min((index + 1) * self._size, self._rows)
        if isinstance(self._data, dict):
            return {name: span(part, *rows) for name, part in self._data.items()}
        return span(self._data, *rows)


def is_array(value: Any) -> bool:
    """Return True for a tensor, or an array of NumPy or a similar library: h5py, zarr, dask, pandas."""
    return isinstance(value, Tensor) or (hasattr(value, "__array__") and not isinstance(value, Dataset))


def sliceable(name: str, array: Any) -> Any:
    """Return a tensor or array [N, ...] that can be sliced by rows, without reading it if possible."""
    if isinstance(array, Tensor):
        check_matrix(name, array)
        if not is_sparse(array):
            check_dense(name, array)
        elif array.layout is torch.sparse_coo:
            array = array.coalesce()
    elif not (hasattr(array, "shape") and hasattr(array, "__getitem__")) or hasattr(array, "iloc"):
        array = np.asarray(array)  # pandas slices by label
    if len(array.shape) == 0:
        raise ValueError(f"{name} is a {type(array).__name__} of no dimensions; expected [N, *event]")
    return array


def _batches_of_parts(data: Mapping[str, Any], batch_size: int) -> Iterable[Any]:
    """Return batches of a dict of tensors or arrays, all with the same batch size."""
    data = {n: sliceable(f"data[{n!r}]", t) if is_array(t) and has_axes(t) else t for n, t in data.items()}
    sizes = {name: len(part) for name, part in data.items() if has_axes(part)}
    if len(sizes) < len(data) or len(set(sizes.values())) != 1:
        came = ", ".join(f"{name!r} of {sizes.get(name, 'no')} rows" for name in data) or "an empty one"
        raise ValueError(
            f"data is a dict, whose parts must be tensors or arrays with one batch axis; got {came}"
        )
    return Slices(data, batch_size)


def has_axes(value: Any) -> bool:
    """Return True for an array with at least one axis."""
    return len(value.shape) > 0 if hasattr(value, "shape") else np.ndim(value) > 0


def length_of(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader of one
        return None


def unpacked(
    batch: Any, prepare_batch: Callable[[Any], Mapping[str, Any]] | None
) -> tuple[Any, Conditioning | None]:
    """Split a batch into x and its conditioning inputs (mask, size_factor, context)."""
    if prepare_batch is None:
        return batch, None
    parts = prepare_batch(batch)
    known = ("x", *Conditioning._fields)
    if not isinstance(parts, Mapping) or "x" not in parts or (extra := [n for n in parts if n not in known]):
        came = type(parts).__name__
        if isinstance(parts, Mapping):
            came = f"unknown {extra[0]!r}" if "x" in parts else f"{', '.join(map(repr, parts))} without 'x'"
        raise TypeError(
            "prepare_batch must return a dict with 'x' and, where there are any, "
            f"{', '.join(map(repr, known[1:]))}; got {came}"
        )
    return parts["x"], Conditioning.of(*(each_array(parts.get(name)) for name in known[1:]))


def each_array(value: Any) -> Any:
    """Convert a NumPy array, or each of a dict, to a tensor."""
    if isinstance(value, Mapping):
        return {name: each_array(part) for name, part in value.items()}
    if is_array(value) and not isinstance(value, Tensor):
        value = np.asarray(value)
    if isinstance(value, np.ndarray):
        with contextlib.suppress(TypeError):  # arrays of strings or objects
            return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
    return value


def data_of(batch: Any, axes: list[int] | None, likelihood: Likelihood) -> Any:
    """Return x [B, *event] of a batch, or a dict of these; ``axes`` are the previous batches' axis counts."""
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    x = each_array(x)
    if isinstance(x, Mapping) and not isinstance(likelihood, Declared):
        likelihood.check(x, "data")
        if any(t.dim() == 0 or len(t) != len(tensors(x)[0]) for t in tensors(x)):
            shapes = ", ".join(f"{name!r}: {shape_of(t)}" for name, t in x.items())
            raise ValueError(f"the parts of a batch of data must have one batch axis; got {shapes}")
        return x
    if not isinstance(x, Tensor):
        kind = f"{type(x).__name__} of {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
        came = f"a {kind}" if x is batch else f"a {type(batch).__name__} of {kind}"
        hint = ": (batch['x'] for batch in loader)" if isinstance(batch, dict) else " of tensors"
        raise TypeError(
            "a batch must be a tensor or array of numbers, or a tuple or list that begins with one; got "
            f"{came}. Give evaluate a generator{hint}"
        )
    if x.dim() == 0:
        raise ValueError("a batch of data is a tensor of no dimensions; expected [B, *event]")
    if axes not in (None, [x.dim()]):
        raise ValueError(
            f"data has a batch of shape {shape_of(x)} after batches of {axes[0]} axes. A tuple or list is "
            "taken as batches: of (x, labels) give x alone"
        )
    likelihood.check(x, "data")
    return x


def place_of(
    encoder: Callable[..., Any], decoder: Callable[..., Any]
) -> tuple[torch.device | None, torch.dtype | None]:
    """Return device and floating dtype of the encoder's modules, else the decoder's, else None."""
    devices, dtypes = {}, []
    for name, function in (("encoder", encoder), ("decoder", decoder)):
        modules = modules_of(function)
        tensors = [t for m in modules for t in m.parameters()] + [t for m in modules for t in m.buffers()]
        if tensors:
            devices[name] = tensors[0].device
        dtypes += [t.dtype for t in tensors if t.dtype in FLOATING]
    if len(set(devices.values())) > 1:
        where = [f"the {name} is on {device}" for name, device in devices.items()]
        raise ValueError(f"{where[0]} but {where[1]}; move one of them")
    if any(d.type == "meta" for d in devices.values()):
        raise ValueError("encoder and decoder are on meta, a device without numbers; load their weights")
    return devices.get("encoder", devices.get("decoder")), dtypes[0] if dtypes else None
