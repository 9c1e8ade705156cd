"""Philox4x32-10 and the Box-Muller transform in plain PyTorch: the definition of fastvae's noise.

See :mod:`fastvae.random` for what the address means. Everything is computed in float64 and then rounded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _mulhilo(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32x32-bit product; int64 tensors holding unsigned 32-bit words."""
    # In halves of 16 bits: the full product would not fit a signed 64-bit integer.
    low = multiplier * (word & 0xFFFF)
    high = multiplier * (word >> 16) + (low >> 16)
    return high >> 16, ((high << 16) | (low & 0xFFFF)) & _MASK


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 of Salmon et al. (2011): four words from four counter words and two key words.

    All are int64 tensors that hold unsigned 32-bit words and broadcast together.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _mulhilo(_MULTIPLIERS[0], c0)
        high1, low1 = _mulhilo(_MULTIPLIERS[1], c2)
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
    """The words behind the normals: int64 [samples, rows, columns rounded up to 4]."""
    device = seed.device
    blocks = -(-columns // 4)
    block = torch.arange(blocks, device=device).view(1, 1, blocks)
    row = (torch.arange(rows, device=device) + row_offset).view(1, rows, 1)
    sample = (torch.arange(samples, device=device) + sample_offset).view(samples, 1, 1)
    on_lattice = None
    if seed.dim():
        # One seed for each randomisation, which take turns.
        point, turn = sample // seed.shape[0], sample % seed.shape[0]
        seed = seed[turn]
        on_lattice = (block < LATTICE_COLUMNS // 4) & (level == 0)
        sample = torch.where(on_lattice, 0, sample)
    block, row, sample = torch.broadcast_tensors(block, row, sample)
    key = (seed & _MASK, (seed >> 32) & _MASK)
    result = torch.stack(philox((block, row, sample, torch.full_like(block, level)), key), dim=-1)
    if on_lattice is not None:
        result = torch.where(on_lattice[..., None], _lattice(point, blocks, result), result)
    return result.reshape(samples, rows, 4 * blocks)


# A rank-1 lattice in base 2 of Korobov's form; fastvae/random.py says how its base was found.
LATTICE_BASE = 927149
LATTICE_COLUMNS = 128


def _lattice(point: Tensor, blocks: int, shift: Tensor) -> Tensor:
    """Words [K, B, blocks, 4] of the lattice's points [K, 1, 1], moved by the shift and folded."""
    generator = [1]
    while len(generator) < 4 * blocks:
        generator.append(generator[-1] * LATTICE_BASE & _MASK)
    g = torch.tensor(generator[: 4 * blocks], dtype=torch.int64, device=point.device).view(blocks, 4)
    bits = torch.arange(32, device=point.device)
    reversed_point = (((point[..., None] >> bits) & 1) << (31 - bits)).sum(-1, keepdim=True)
    # The product's lower half; the whole does not fit a signed 64-bit integer.
    low = reversed_point * (g & 0xFFFF) + ((reversed_point * (g >> 16) & 0xFFFF) << 16)
    moved = (low + shift) & _MASK
    # The tent: twice the distance to the nearer end of the unit interval, a bijection of words.
    return torch.where(moved < 2**31, 2 * moved, 2 * (_MASK - moved) + 1)


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
    """Standard normals [samples, rows, columns]: words 2i and 2i+1 of a row make normals 2i and 2i+1."""
    w = words(seed, samples, rows, columns, sample_offset, row_offset, level).double()
    # u in (0, 1), never 0 or 1: the largest radius is sqrt(2 ln 2^33) = 6.76.
    radius = torch.sqrt(-2 * torch.log((w[..., 0::2] + 0.5) * 2.0**-32))
    angle = (w[..., 1::2] + 0.5) * (2 * math.pi * 2.0**-32)
    eps = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return eps.flatten(-2)[..., :columns].to(dtype).contiguous()
