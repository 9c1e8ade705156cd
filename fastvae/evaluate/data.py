"""Data as users give them, as batches; and the encoder's device and dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from .._checks import FLOATING, shape_of
from .._nested import Beside, tensors
from ..likelihoods.base import Declared, Likelihood
from .modules import modules_of


def batches_of(data: Any, batch_size: int, shard: str) -> Iterable[Any]:
    if isinstance(data, Mapping):
        return _batches_of_parts(data, batch_size)
    if hasattr(data, "__array__") and not isinstance(data, Tensor):
        data = np.asarray(data)
    if isinstance(data, (Tensor, np.ndarray)):
        if data.ndim == 0:
            raise ValueError(f"data is a {type(data).__name__} of no dimensions; expected [N, *event]")
        return [data[i : i + batch_size] for i in range(0, len(data), batch_size)]
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(data, batch_size)
    sampler = data.sampler if isinstance(data, DataLoader) else None
    if isinstance(sampler, DistributedSampler) and shard != "none":
        raise ValueError(
            "data has a DistributedSampler, but evaluate shares the batches among the ranks itself; give it "
            'a loader of the whole data set, or shard="none" to evaluate this rank\'s part alone'
        )
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise TypeError(
            "data must be a tensor or array [N, *event], a Dataset, or an iterable of batches such as a "
            f"DataLoader; got {type(data).__name__}"
        )
    return data


def _batches_of_parts(data: Mapping[str, Any], batch_size: int) -> list[dict[str, Any]]:
    """Of a dict of tensors or arrays, all with one batch axis."""
    sizes = {name: len(part) for name, part in data.items() if np.ndim(part)}
    if len(sizes) < len(data) or len(set(sizes.values())) != 1:
        came = ", ".join(f"{name!r} of {sizes.get(name, 'no')} rows" for name in data) or "an empty one"
        raise ValueError(
            f"data is a dict, whose parts must be tensors or arrays with one batch axis; got {came}"
        )
    rows = range(0, next(iter(sizes.values())), batch_size)
    return [{name: part[i : i + batch_size] for name, part in data.items()} for i in rows]


def length_of(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader of one
        return None


def unpacked(batch: Any, unpack: Callable[[Any], Mapping[str, Any]] | None) -> tuple[Any, Beside | None]:
    """A batch's x, and what comes with it."""
    if unpack is None:
        return batch, None
    parts = unpack(batch)
    known = ("x", *Beside._fields)
    if not isinstance(parts, Mapping) or "x" not in parts or (extra := [n for n in parts if n not in known]):
        came = type(parts).__name__
        if isinstance(parts, Mapping):
            came = f"unknown {extra[0]!r}" if "x" in parts else f"{', '.join(map(repr, parts))} without 'x'"
        raise TypeError(
            f"unpack must return a dict with 'x' and those of {', '.join(map(repr, known[1:]))} that there "
            f"are; got {came}"
        )
    return parts["x"], Beside.of(*(each_array(parts.get(name)) for name in known[1:]))


def each_array(value: Any) -> Any:
    """A NumPy array, or each of a dict, as a tensor."""
    if isinstance(value, Mapping):
        return {name: each_array(part) for name, part in value.items()}
    if isinstance(value, np.ndarray):
        with contextlib.suppress(TypeError):  # of strings or objects
            return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
    return value


def data_of(batch: Any, axes: list[int] | None, likelihood: Likelihood) -> Any:
    """x [B, *event] of a batch, or a dict of such; ``axes`` is how many those before it had."""
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
    """Device and floating dtype of the encoder's modules, else the decoder's; None where they have none."""
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
