"""Philox4x32-10 and the Box-Muller transform in plain PyTorch: the noise that fastvae's kernels compute.

See :mod:`fastvae.random` for the meaning of the address. The computation is in float64, then rounded.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.quasirandom import SobolEngine

from ..core.constants import cached_constant
from ..core.torch_private import is_traced_on_gpu, without_dispatch_modes

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mulhilo(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Return the high and low 32 bits of a 32x32-bit product; int64 tensors hold unsigned 32-bit words."""
    # Computed in 16-bit halves: the full product does not fit a signed 64-bit integer.
    low = multiplier * (word & 0xFFFF)
    high = multiplier * (word >> 16) + (low >> 16)
    return high >> 16, ((high << 16) | (low & 0xFFFF)) & _MASK


def _mulhilo_by_wrapping(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """Compute :func:`_mulhilo` where a product beyond 64 bits keeps its lowest ones, as on a GPU."""
    product = multiplier * word
    return (product >> 32) & _MASK, product & _MASK


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    mulhilo: Callable[[int, Tensor], tuple[Tensor, Tensor]] = _mulhilo,
) -> tuple[Tensor, ...]:
    """Compute Philox4x32-10 of Salmon et al. (2011): four words from four counter words and two key words.

    All are int64 tensors that hold unsigned 32-bit words and broadcast together.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = mulhilo(_MULTIPLIERS[0], c0)
        high1, low1 = mulhilo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def words(
    seed: Tensor,
    samples: int,
    rows: int,
    columns: int,
    sample_offset: int = 0,
    row_offset: int = 0,
    level: int = 0,
) -> Tensor:
    """Return the words behind the normals: int64 [samples, rows, columns rounded up to 4]."""
    device = seed.device
    blocks = -(-columns // 4)
    block = torch.arange(blocks, device=device).view(1, 1, blocks)
    # Offset -1: all rows share the noise of row 0.
    row = (torch.arange(rows, device=device) + row_offset) * (row_offset >= 0)
    sample = (torch.arange(samples, device=device) + sample_offset).view(samples, 1, 1)
    in_net = None
    if seed.dim():
        # One seed per randomisation; samples cycle through them.
        point, turn = sample // seed.shape[0], sample % seed.shape[0]
        seed = seed[turn]
        in_net = (block < NET_COLUMNS // 4) & (level == 0)
        sample = torch.where(in_net, 0, sample)
    block, row, sample = torch.broadcast_tensors(block, row.view(1, rows, 1), sample)
    key = (seed & _MASK, (seed >> 32) & _MASK)
    result = torch.stack(philox((block, row, sample, torch.full_like(block, level)), key), dim=-1)
    if in_net is not None:
        result = torch.where(in_net[..., None], _net_points(point, blocks) ^ result, result)
    return result.reshape(samples, rows, 4 * blocks)


# Columns of a quasi-Monte-Carlo point, and bits of its index.
NET_COLUMNS, NET_BITS = 128, 30


@functools.cache
def _net_numbers() -> list[list[int]]:
    with without_dispatch_modes():  # torch's own table needs memory, which a fake tensor lacks
        numbers: list[list[int]] = (SobolEngine(NET_COLUMNS).sobolstate.to(torch.int64) << 2).mT.tolist()
    return numbers


@cached_constant(16)
def net(device: torch.device) -> Tensor:
    """Return each index bit's contribution to a point's words, modulo 2: int64 [NET_BITS, NET_COLUMNS]."""
    return torch.tensor(_net_numbers(), device=device)


def _net_points(number: Tensor, blocks: int) -> Tensor:
    """Return the words [K, 1, blocks, 4] of the points with these indices [K, 1, 1]."""
    generator = functional.pad(net(number.device), (0, max(0, 4 * blocks - NET_COLUMNS)))[:, : 4 * blocks]
    points = number.new_zeros(())
    for bit, column in enumerate(generator.unflatten(1, (blocks, 4))):
        points = points ^ (column * ((number >> bit) & 1)[..., None])
    return points


def normal(
    seed: Tensor,
    samples: int,
    rows: int,
    columns: int,
    sample_offset: int = 0,
    row_offset: int = 0,
    level: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return standard normals [samples, rows, columns]; words 2i and 2i+1 of a row give normals 2i, 2i+1."""
    if is_traced_on_gpu(seed) and dtype != torch.float64:
        return _elementwise_normal(seed, samples, rows, columns, sample_offset, row_offset, level).to(dtype)
    w = words(seed, samples, rows, columns, sample_offset, row_offset, level).double()
    # u lies in (0, 1), excluding 0 and 1: the largest radius is sqrt(2 ln 2^33) = 6.76.
    radius = torch.sqrt(-2 * torch.log((w[..., 0::2] + 0.5) * 2.0**-32))
    angle = (w[..., 1::2] + 0.5) * (2 * math.pi * 2.0**-32)
    eps = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return eps.flatten(-2)[..., :columns].to(dtype).contiguous()


def _elementwise_normal(
    seed: Tensor, samples: int, rows: int, columns: int, sample_offset: int, row_offset: int, level: int
) -> Tensor:
    """Return the float32 normals [samples, rows, columns] of a seed [], each from its own address.

    A compiler makes one loop of it. Each block of four columns is computed four times; on a GPU a small draw
    takes as long.
    """
    # In one shape from the beginning: the compiler would store smaller ones.
    shape = samples, rows, columns
    index = torch.arange(samples * rows * columns, device=seed.device).view(shape)
    seed = seed.expand(shape)
    column, row = index % columns, index // columns % rows + row_offset
    # Or'ed with zeros that depend on data: the compiler computes with an index in 32 bits.
    zero = seed & 0
    sample = index // (rows * columns) + sample_offset
    counter = column >> 2 | zero, row if row_offset >= 0 else zero, sample | zero, zero + level
    w0, w1, w2, w3 = philox(counter, (seed & _MASK, (seed >> 32) & _MASK), _mulhilo_by_wrapping)
    in_first = (column & 2) == 0
    w, v = torch.where(in_first, w0, w2), torch.where(in_first, w1, w3)
    # From u's distance to the nearer of 0 and 1, so that the smallest radii keep their accuracy.
    high = w >> 31 == 1
    distance = (2 * torch.where(high, _MASK - w, w) + 1).float() * 2.0**-33
    radius = torch.sqrt(-2 * torch.where(high, torch.log1p(-distance), torch.log(distance)))
    angle = (2 * (v - ((v >> 31) << 32)) + 1).float() * (math.pi * 2.0**-32)
    return radius * torch.where((column & 1) == 0, torch.cos(angle), torch.sin(angle))
