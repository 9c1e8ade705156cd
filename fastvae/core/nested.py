"""Tensors, or dicts of tensors, with one batch axis: data of several parts, masks, sizes and contexts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributions as td

from .checks import check_dense, may_look, on_same_device, shape_of
from .hints import described, explained


def each(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to a tensor, or to each tensor of a nested dict; None stays None."""
    if isinstance(value, Mapping):
        return {name: each(function, part) for name, part in value.items()}
    return None if value is None else function(value)


def tensors(value: Any) -> list[Tensor]:
    """Return all tensors of a tensor or nested dict."""
    if isinstance(value, Mapping):
        return [t for part in value.values() for t in tensors(part)]
    return [value] if isinstance(value, Tensor) else []


def all_tensors(value: Any) -> list[Tensor]:
    """Return all tensors of a decoder's output: nested containers, a distribution, or an object."""
    if isinstance(value, (tuple, list)):
        return [t for part in value for t in all_tensors(part)]
    if isinstance(value, Mapping):
        return [t for part in value.values() for t in all_tensors(part)]
    if isinstance(value, td.Distribution):
        return [t for part in vars(value).values() for t in all_tensors(part)]
    if isinstance(value, Tensor):
        return [value]
    return [t for t in getattr(value, "__dict__", {}).values() if isinstance(t, Tensor)]


def repeat(value: Any, samples: int) -> Any:
    """Repeat [B, ...] to [K·B, ...], sample-major."""
    if samples == 1:
        return value
    return each(lambda t: t.expand(samples, *t.shape).flatten(0, 1), value)


def called(name: str, function: Callable[..., Any], first: Any, context: Any) -> Any:
    """Call ``function(first)``, or ``function(first, context)``, with a note on errors."""
    given = (first,) if context is None else (first, context)
    return explained(function, given, lambda: note_of_call(name, first, context))


def note_of_call(name: str, first: Any, context: Any) -> str:
    """Describe the inputs with which fastvae called a user's function."""
    if name != "decoder":
        what = f"x {described(first)}"
    elif first.dim() != 2:
        what = f"z [N, *latent] = {described(first)}"
    else:
        width = first.shape[1]
        what = (
            f"z [N, D] = {described(first)}, D = {width} being q's: that of mu, or half of a tensor "
            f"[B, 2 D] = [B, {2 * width}], mu and logvar side by side"
        )
    if context is not None:
        what += (
            f" and context {described(context)}; with context= fastvae calls the {name} with it as the "
            "second argument"
        )
    return f"fastvae called the {name} with {what}"


def decoded(decoder: Callable[..., Any], z: Tensor, context: Any, latent: tuple[int, ...] | None) -> Any:
    """Call the decoder on z [N, D], reshaped to the shape of its latents."""
    if latent is None:
        return called("decoder", decoder, z, context)
    if math.prod(latent) != z.shape[1]:
        raise ValueError(
            f"the latents have the shape {list(latent)}, {math.prod(latent)} numbers, but z has D = "
            f"{z.shape[1]}; expected as many"
        )
    z = z.unflatten(1, latent)
    try:
        return called("decoder", decoder, z, context)
    except Exception as error:
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(
                f"fastvae gave the decoder z [N, *latent] = {shape_of(z)}, in the shape of q's latents; a "
                "decoder that begins with a linear layer needs z.flatten(1)"
            )
        raise


def event_size(x: Any) -> int:
    """Return the number of elements in an example."""
    return sum(math.prod(t.shape[1:]) for t in tensors(x))


class Conditioning(NamedTuple):
    """Conditioning inputs of a batch: mask of observed elements, size factors and context.

    Each is None or has x's batch axis.
    """

    mask: Any = None
    size_factor: Any = None
    context: Any = None

    @classmethod
    def of(cls, mask: Any, size_factor: Any, context: Any) -> Conditioning | None:
        """Return the three inputs as a record, or None if all are None."""
        given = mask is not None or size_factor is not None or context is not None
        return cls(mask, size_factor, context) if given else None

    def at(self, rows: Tensor) -> Conditioning:
        """Select the examples with indices ``rows``."""
        return Conditioning(*(each(lambda t: t[rows], part) for part in self))

    def part(self, name: str) -> Conditioning | None:
        """Return the mask and size factors of one part of x, or None without both."""
        mask, size_factor = (p.get(name) if isinstance(p, Mapping) else None for p in self[:2])
        return Conditioning.of(mask, size_factor, None)


def check_batch(
    name: str,
    value: Any,
    batch: int,
    device: torch.device,
    latent: tuple[int, ...] | None = None,
    sparse: bool = False,
) -> None:
    """Validate that a tensor, or each of a dict, has this batch size and device.

    ``latent`` is q's shape; with ``sparse`` a tensor may have another layout.
    """
    if isinstance(value, Mapping):
        if not value:
            raise ValueError(f"{name} is an empty dict; expected tensors by name")
        for key, part in value.items():
            check_batch(f"{name}[{key!r}]", part, batch, device, latent, sparse)
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor or a dict of tensors, got {type(value).__name__}")
    if not sparse:
        check_dense(name, value)
    if value.dim() == 0 or value.shape[0] != batch:
        axes = "" if latent is None else f", read as [B, *latent] = {[batch, *latent]}"
        raise ValueError(
            f"{name} has shape {shape_of(value)} but q has {batch} rows{axes}; the first axis of both must "
            "be the batch"
        )
    if not on_same_device(value.device, device):
        raise ValueError(f"{name} is on {value.device} but q is on {device}; move one of them")


def as_mask(mask: Any, x: Any, name: str = "mask") -> Any:
    """Validate a bool mask of observed elements, of the shape of x or of its event; expand it to x."""
    if isinstance(x, Mapping):
        if not isinstance(mask, Mapping) or (unknown := [n for n in mask if n not in x]):
            came = f"parts {unknown}" if isinstance(mask, Mapping) else type(mask).__name__
            raise TypeError(
                f"{name} must be a dict with masks of parts of x ({', '.join(map(repr, x))}); those left out "
                f"are observed; got {came}"
            )
        return {n: as_mask(m, x[n], f"{name}[{n!r}]") for n, m in mask.items() if m is not None}
    if isinstance(mask, Tensor):
        check_dense(name, mask)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        came = f"{mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        hint = f"; fix it with {name}.bool()" if isinstance(mask, Tensor) else ""
        raise TypeError(f"{name} must be a tensor of bool, True where x was observed; got {came}{hint}")
    # Ranks first: of two shapes alone, a compiler would note that B differs from the event's first axis.
    expected = x.shape if mask.dim() == x.dim() else x.shape[1:]
    if mask.dim() != len(expected) or mask.shape != expected:
        raise ValueError(
            f"{name} has shape {shape_of(mask)}; expected that of x, {shape_of(x)}, or of one example, "
            f"{list(x.shape[1:])}"
        )
    if not on_same_device(mask.device, x.device):
        raise ValueError(f"{name} is on {mask.device} but x is on {x.device}; move one of them")
    return mask.expand(x.shape)


def where_observed(x: Any, mask: Any, fill: float) -> Any:
    """Return x with ``fill`` where the mask, that of :func:`as_mask`, is False.

    Integers are cast to the default dtype if theirs does not represent ``fill``.
    """
    if isinstance(x, Mapping):
        return {n: where_observed(part, mask[n], fill) if n in mask else part for n, part in x.items()}
    if not (x.is_floating_point() or _represents(x.dtype, fill)):
        x = x.to(torch.get_default_dtype())
    return torch.where(mask, x, torch.full((), fill, dtype=x.dtype, device=x.device))


def _represents(dtype: torch.dtype, value: float) -> bool:
    """Return True if an integer dtype, or bool, represents the value."""
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return low <= value <= high and float(value).is_integer()


def as_size_factor(size_factor: Any, x: Any, name: str = "size_factor") -> Any:
    """Validate positive size factors [B], in a dict by part if x is a dict."""
    if isinstance(x, Mapping):
        if not isinstance(size_factor, Mapping) or (unknown := [n for n in size_factor if n not in x]):
            came = f"parts {unknown}" if isinstance(size_factor, Mapping) else type(size_factor).__name__
            raise TypeError(
                f"{name} must be a dict with sizes of parts of x ({', '.join(map(repr, x))}); got {came}"
            )
        return {n: as_size_factor(s, x[n], f"{name}[{n!r}]") for n, s in size_factor.items() if s is not None}
    if not isinstance(size_factor, Tensor):
        raise TypeError(
            f"{name} must be a tensor [B], the factor of each example's mean; got "
            f"{type(size_factor).__name__}"
        )
    check_dense(name, size_factor)
    if size_factor.dim() == 2 and size_factor.shape[1] == 1:
        size_factor = size_factor[:, 0]
    if size_factor.shape != x.shape[:1]:
        raise ValueError(f"{name} has shape {shape_of(size_factor)}; expected [B] = [{x.shape[0]}]")
    if not on_same_device(size_factor.device, x.device):
        raise ValueError(f"{name} is on {size_factor.device} but x is on {x.device}; move one of them")
    if may_look(size_factor) and not bool((size_factor > 0).all()):
        row = int((~(size_factor > 0)).nonzero()[0, 0])
        raise ValueError(
            f"{name} must be positive, the factor of each example's mean; example {row} has "
            f"{float(size_factor[row]):g}. An example without counts has no library size: leave it out"
        )
    return size_factor if size_factor.is_floating_point() else size_factor.float()
