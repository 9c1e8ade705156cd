"""Hypothesis strategies: shapes, dtypes, values and the memory layouts that break kernels."""

from __future__ import annotations

import math
import mmap

import torch
from hypothesis import strategies as st
from torch import Tensor

SIZES = (1, 2, 3, 4, 5, 7, 8, 13, 16, 17, 31, 33, 64, 70)
LAYOUTS = ("contiguous", "transposed", "sliced", "strided", "expanded")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def of_addresses(*shape: int, stride: tuple[int, ...] | None = None, dtype=torch.bfloat16) -> Tensor:
    """Return CPU zeros that may be larger than memory: only the touched pages are allocated."""
    stride = stride or tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    elements = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    buffer = mmap.mmap(-1, elements * dtype.itemsize, flags=flags)
    return torch.frombuffer(buffer, dtype=dtype).as_strided(shape, stride)


def distinct_sizes(count: int, largest: int = 70, least: int = 1, elements: int = 20_000):
    """Draw ``count`` distinct sizes, so that a swapped axis shows; their product is at most ``elements``."""
    sizes = [n for n in SIZES if least <= n <= largest]
    lists = st.lists(st.sampled_from(sizes), min_size=count, max_size=count, unique=True)
    return lists.filter(lambda drawn: math.prod(drawn) <= elements)


dtypes = st.sampled_from(DTYPES)
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**31 - 1)


def _poison(values: Tensor) -> float:
    """Return a value that spoils, or at least changes, every result it enters."""
    return math.nan if values.is_floating_point() else 1 if values.dtype == torch.bool else 99


def laid_out(values: Tensor, layout: str) -> Tensor:
    """Return the values in another memory layout; "expanded" repeats the first row."""
    if values.dim() == 0:
        return values
    if layout == "transposed":
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        # An odd offset along every axis: no alignment, and neighbours that must not be read.
        padded = values.new_full([n + 3 for n in values.shape], _poison(values))
        view = padded[tuple(slice(1, 1 + n) for n in values.shape)]
        view.copy_(values)
        return view
    if layout == "strided":
        spread = values.new_full((*values.shape[:-1], 2 * values.shape[-1]), _poison(values))
        spread[..., ::2] = values
        return spread[..., ::2]
    if layout == "expanded":
        return values[:1].expand(values.shape) if values.shape[0] else values
    return values.contiguous()


@st.composite
def tensors(draw, shape, dtype, *, spread=1.0, device="cpu", low=None, high=None):
    """Draw normals times ``spread``, or uniforms in [low, high], ends included, in a drawn layout."""
    generator = torch.Generator().manual_seed(draw(seeds))
    if low is None:
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * spread
    else:
        values = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
        ends = torch.rand(shape, generator=generator)
        values = torch.where(ends < 0.1, torch.full_like(values, low), values)
        values = torch.where(ends > 0.9, torch.full_like(values, high), values)
    return laid_out(values.to(device=device, dtype=dtype), draw(layouts))
