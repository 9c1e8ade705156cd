"""Launch parameters, tiles, loads and stores, shared by the kernels."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

# Triton's interpreter truncates to bfloat16 and mangles its denormals, so there the casts operate on bits.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Lanes of a warp: AMD's compute GPUs have wavefronts of 64.
LANES = 64 if torch.version.hip else 32


class Launch(NamedTuple):
    """Elements per tile, and threads per program by dtype of the computation (half: of the data)."""

    tile: int
    single: int
    double: int
    half: int

    def warps(self, dtype: torch.dtype) -> int:
        threads = {2: self.half, 4: self.single, 8: self.double}[dtype.itemsize]
        return threads // LANES


# Launch parameters, and why (`python -m tools.kernels` shows their effect). No autotuning: a choice by
# timing would change the order of sums, and with it the bits, from run to run.
LAUNCH = {
    # With noise: 8 elements, two Philox blocks, per thread; limited by the registers of the ten rounds.
    "normal_diagonal": Launch(1024, 128, 256, 128),
    # Up to four sums in addition: half as many per thread, or float64 spills. Half precision needs 8 elements
    # per thread for 16-byte loads.
    "latent_backward": Launch(512, 128, 128, 64),
    # Of one parameter. 16 elements per thread: four 16-byte loads of float32 in flight for each operand.
    # Twice that halves the occupancy.
    "likelihood": Launch(2048, 128, 256, 128),
    # More parameters, or sums and two results in addition: half as many per thread, or they spill.
    "likelihood_backward": Launch(1024, 128, 256, 128),
    # With three parameters and a mask: half as many again, or float32 spills.
    "likelihood_masked": Launch(512, 128, 256, 64),
    # A maximum, a sum and a product per element: half as many as of a likelihood's sums.
    "multinomial": Launch(512, 128, 128, 64),
    # Long functions, bound by arithmetic: two elements per thread, or they spill.
    "likelihood_heavy": Launch(512, 256, 256, 256),
    # A mixture's component takes long to compute; there are many rows and positions.
    "components": Launch(256, 128, 128, 128),
    # Gradients of one side of a mixture's scores: two sums and their operands, 8 elements per thread.
    "mixture_backward": Launch(1024, 128, 256, 128),
    # A product's tile, samples and columns of z: 16 sums per thread, and their operands.
    "normal_full": Launch(2048, 128, 128, 128),
    # Samples and columns of noise of one step: 8 normals per thread, and 16 sums of a block of the triangle.
    "full_backward": Launch(1024, 128, 256, 128),
    # As for the likelihoods: one operand and little arithmetic.
    "logsumexp": Launch(2048, 128, 256, 128),
}
# Maximum columns of a likelihood's tile; the remaining factor goes to samples, which share x, and to rows.
TILE_X = 512
# Target number of programs when work is split or merged: several for each of some 130 multiprocessors. A
# constant instead of the device's count, so that the order of sums, and with it every bit, is the same on
# every GPU of an architecture.
PROGRAMS = 1024


@triton.jit
def split_program(n):
    """Return (i // n, i % n) for this program's index i along the grid's first axis.

    One division, none if n is 1. The grid's other axes are limited to 65535 programs.
    """
    i = tl.program_id(0)
    i_slow = i // n
    return i_slow, i - i_slow * n


@triton.jit
def event_offsets(start, BLOCK: tl.constexpr, AXIS: tl.constexpr):
    """Return indices start, start + 1, … along one of three axes; int64, as strides multiply them."""
    o_x = (start + tl.arange(0, BLOCK)).to(tl.int64)
    if AXIS == 0:
        o_x = o_x[:, None, None]  # [BLOCK, 1, 1]
    elif AXIS == 1:
        o_x = o_x[None, :, None]  # [1, BLOCK, 1]
    else:
        o_x = o_x[None, None, :]  # [1, 1, BLOCK]
    return o_x


@triton.jit
def pixel_span(X, x_tiles, BLOCK_X: tl.constexpr):
    """Return the first pixel and the end of this program's part of a row, along the grid's second axis.

    The first is visibly a multiple of BLOCK_X and the masks compare with X, so the compiler knows that loads
    are aligned.
    """
    x_start = tl.program_id(1) * x_tiles * BLOCK_X
    return x_start, tl.minimum(x_start + x_tiles * BLOCK_X, X)


@triton.jit
def computed(b_x, DTYPE: tl.constexpr):
    """Cast a loaded tile to the dtype of the computation."""
    if b_x.dtype == tl.bfloat16:
        if INTERPRETED:
            b_x = (b_x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
        # Via float32, the only cast from bfloat16 that every backend supports.
        b_x = b_x.to(tl.float32)
    return b_x.to(DTYPE)


@triton.jit
def load(
    p_x, offsets, mask, DTYPE: tl.constexpr, other: tl.constexpr = 0.0, ALIGN: tl.constexpr = 16,
    CACHE: tl.constexpr = "",
):  # fmt: skip
    """Load a tile in the dtype of the computation; ``other`` outside the mask.

    ALIGN is the alignment in bytes of each row's address if below 16; without it the compiler would load one
    number at a time. CACHE is ".cg" for what other programs of the launch have written.
    """
    p_tile = p_x + offsets
    if ALIGN < 16:
        p_tile = tl.multiple_of(p_tile, [1, 1, ALIGN])
    return computed(tl.load(p_tile, mask=mask, other=other, cache_modifier=CACHE), DTYPE)


@triton.jit
def store(p_x, offsets, b_x, mask):
    """Store a tile in the dtype of the target tensor."""
    if p_x.dtype.element_ty == tl.bfloat16:
        b_x = b_x.to(tl.float32)
        if INTERPRETED:
            b_bits = b_x.to(tl.uint32, bitcast=True)
            b_bits = (b_bits + 0x7FFF + ((b_bits >> 16) & 1)) >> 16
            b_bits = tl.where(b_x == b_x, b_bits, 0x7FC0)
            b_x = b_bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    tl.store(p_x + offsets, b_x.to(p_x.dtype.element_ty), mask=mask)


def cdiv(n: int, m: int) -> int:
    """Return n / m, rounded up; Triton's own takes five microseconds outside a kernel."""
    return -(-n // m)


def power_of_two(n: int) -> int:
    """Return the smallest power of two >= n; 1 for n = 0."""
    return 1 << (n - 1).bit_length() if n > 1 else 1


def tile_width(n: int, limit: int) -> int:
    """Return the tile width for rows of n: the widest power of two up to ``limit`` that wastes few lanes.

    784 columns take 7 tiles of 128, an eighth of them empty, instead of 2 of 512, almost a quarter empty. A
    warp's 16-byte loads of float32 span 128.
    """
    if n <= 128:
        return min(power_of_two(n), limit)
    widths = [w for w in (1024, 512, 256, 128) if w <= limit]
    padded = min(cdiv(n, w) * w for w in widths)
    return next(w for w in widths if cdiv(n, w) * w <= max(padded, n + n // 16))


class EventTiles(NamedTuple):
    """Partition of a likelihood over [K, B, X]: tile sizes, and one program's share of each axis."""

    block_k: int
    block_b: int
    block_x: int
    k_per_program: int
    b_per_program: int
    x_tiles: int
    k_splits: int
    b_splits: int
    x_splits: int
    blocks: dict[str, int]  # the compile-time arguments

    @property
    def grid(self) -> tuple[int, int]:
        """Grid of one program per split; samples vary fastest, so that programs sharing x run together."""
        # Rows and samples on the first axis: the second is limited to 65535.
        return self.k_splits * self.b_splits, self.x_splits


@functools.lru_cache(4096)
def event_tiles(
    k: int, b: int, x: int, tile: int, *, merge_k: bool = False, merge_b: bool = False, max_tiles: int = 0
) -> EventTiles:
    """Cut [K, B, X] into tiles and programs.

    Args:
        k: samples, not 0.
        b: rows, not 0.
        x: pixels, not 0.
        tile: elements per tile.
        merge_k: let a program loop over several tiles of samples, as long as enough programs remain. Used for
            sums over samples, of which each program writes its part.
        merge_b: likewise for tiles of rows.
        max_tiles: maximum tiles of a row per program; 0 means no limit.
    """
    block_x = tile_width(x, TILE_X)
    # Rows first, until each thread loads 16 bytes of x; then samples, which share them.
    block_b = min(power_of_two(b), max(1, TILE_X // block_x))
    block_k = min(power_of_two(k), tile // (block_x * block_b))
    block_b = min(power_of_two(b), tile // (block_x * block_k))
    k_tiles, b_tiles, x_tiles = cdiv(k, block_k), cdiv(b, block_b), cdiv(x, block_x)
    # Long rows are split only where there are few of them: summing the parts takes another pass.
    x_splits = min(x_tiles, max(1, PROGRAMS // (k_tiles * b_tiles)))
    if max_tiles:
        x_splits = max(x_splits, cdiv(x_tiles, max_tiles))
    b_splits = min(b_tiles, max(1, PROGRAMS // x_splits)) if merge_b else b_tiles
    k_splits = min(k_tiles, max(1, PROGRAMS // (x_splits * b_splits))) if merge_k else k_tiles
    k_per, b_per, x_per = (
        cdiv(tiles, splits)
        for tiles, splits in ((k_tiles, k_splits), (b_tiles, b_splits), (x_tiles, x_splits))
    )
    return EventTiles(
        block_k,
        block_b,
        block_x,
        k_per * block_k,
        b_per * block_b,
        x_per,
        cdiv(k_tiles, k_per),
        cdiv(b_tiles, b_per),
        cdiv(x_tiles, x_per),
        {"BLOCK_K": block_k, "BLOCK_B": block_b, "BLOCK_X": block_x},
    )


def accumulator(*tensors: torch.Tensor) -> torch.dtype:
    """Return the dtype of computation and sums: float64 if any tensor is float64, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def triton_dtype(dtype: torch.dtype) -> tl.dtype:
    """Return Triton's dtype for an accumulator dtype."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def row_alignment(t: torch.Tensor) -> int:
    """Return the alignment in bytes, up to 16, of the rows of [B, D].

    It can be below 16 where one tensor was chunked into halves. 16 where rows are not contiguous: irrelevant.
    """
    if t.stride(1) != 1:
        return 16
    return math.gcd(16, t.data_ptr(), t.element_size() * t.stride(0))


def strides(tensor: torch.Tensor | None, dims: int) -> tuple[int, ...]:
    """Return strides for a kernel: 0 along axes of size 1, which broadcast, and for None."""
    if tensor is None:
        return (0,) * dims
    shape, stride = tensor.shape, tensor.stride()
    return tuple(0 if n == 1 else s for n, s in zip(shape, stride, strict=True)) if 1 in shape else stride
