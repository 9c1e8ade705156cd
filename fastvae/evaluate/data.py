"""Data as users give them, as batches; and the encoder's device and dtype."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from .._checks import FLOATING, check_data, shape_of
from ..likelihoods.base import Likelihood
from .modules import modules_of


def batches_of(data: Any, batch_size: int, shard: str) -> Iterable[Any]:
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


def length_of(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader of one
        return None


def data_of(batch: Any, axes: int | None, likelihood: Likelihood) -> Tensor:
    """x [B, *event] of a batch; ``axes`` is how many those before it had."""
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(x, np.ndarray):
        with contextlib.suppress(TypeError):  # of strings or objects
            x = torch.from_numpy(x.astype(x.dtype.newbyteorder("="), order="C"))
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
    if axes not in (None, x.dim()):
        raise ValueError(
            f"data has a batch of shape {shape_of(x)} after batches of {axes} axes. A tuple or list is taken "
            "as batches: of (x, labels) give x alone"
        )
    return check_data(x, likelihood, "data")


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
