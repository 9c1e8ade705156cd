"""Addressed noise in Triton: Philox4x32-10, and a Box-Muller transform that uses both halves of a pair.

:mod:`fastvae.random` defines the address. In float32 the transform is plain arithmetic, see :mod:`.common`:
the uniform number keeps its relative accuracy at both ends, so the normals are right to a few ulps from the
smallest radius to the tail. On a GPU, hardware functions accurate to 1e-5 are the default (FAST).
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_hip

from fastvae.reference import random as reference

from .common import INTERPRETED, LAUNCH, cdiv, power_of_two, split_program, tile_width, triton_dtype
from .elementary import add_bits, log_of_parts, split_float
from .launching import Call, Result, fixed, planned

# Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011): multipliers, and the key's increments.
PHILOX_0, PHILOX_1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
WEYL_0, WEYL_1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
TWO_TO_MINUS_32 = tl.constexpr(2.0**-32)
TWO_PI_HIGH = tl.constexpr(6.2831854820251465)
TWO_PI_LOW = tl.constexpr(-1.7484556025237907e-07)
MINUS_TWO_LOG_2 = tl.constexpr(-1.3862943611198906)
# Compute float32 normals with the hardware's functions: to 1e-5, with 18 instructions fewer each.
FAST = tl.constexpr(not INTERPRETED.value and os.environ.get("FASTVAE_NOISE", "fast") != "accurate")


@triton.jit
def philox_words(seed, o_k, o_b, o_j, level):
    """Generate four uint32 words per block of four columns.

    Args:
        seed: int64 scalar, the key.
        o_k: int64 samples [BLOCK_K, 1, 1], offset included.
        o_b: int64 rows [1, BLOCK_B, 1], offset included.
        o_j: blocks of four columns [1, 1, BLOCK_D // 4].
        level: level of a hierarchical latent, the counter's last word.
    """
    # Broadcast late: the first rounds then work on few elements.
    b_0, b_1, b_2 = o_j.to(tl.uint32), o_b.to(tl.uint32), o_k.to(tl.uint32)
    b_3 = tl.full([1, 1, 1], level, dtype=tl.uint32)
    key_0 = seed.to(tl.uint32)
    key_1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        # One instruction gives both halves of a product; tl.philox takes one for each.
        b_p = b_0.to(tl.uint64) * PHILOX_0
        b_q = b_2.to(tl.uint64) * PHILOX_1
        b_0, b_2 = (b_q >> 32).to(tl.uint32) ^ b_1 ^ key_0, (b_p >> 32).to(tl.uint32) ^ b_3 ^ key_1
        b_1, b_3 = b_q.to(tl.uint32), b_p.to(tl.uint32)
        key_0 = add_bits(key_0, WEYL_0)
        key_1 = add_bits(key_1, WEYL_1)
    return b_0, b_1, b_2, b_3


# Quasi-Monte-Carlo words from a digital net, defined in fastvae/random.py.
NET_COLUMNS = tl.constexpr(reference.NET_COLUMNS)


@triton.jit
def net_words(
    p_seed,
    p_net,
    o_k,
    o_b,
    o_j,
    level,
    top,
    RANDOMISATIONS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Generate four words per block of four columns; sample k comes from net k % RANDOMISATIONS.

    Args:
        p_seed: [RANDOMISATIONS] int64 seeds.
        p_net: [NET_BITS, NET_COLUMNS] int64 generator matrices.
        o_k: samples, as for :func:`philox_words`.
        o_b: rows, likewise.
        o_j: blocks of four columns, likewise.
        level: level of a hierarchical latent, likewise.
        top: int64 scalar, greater than every o_k.
        RANDOMISATIONS: number of nets.
        BLOCK_K: samples of the tile.
        BLOCK_D: columns of the tile.
    """
    b_in_net = (o_j < NET_COLUMNS // 4) & (level == 0)  # [1, 1, BLOCK_D // 4]
    b_seed = tl.load(p_seed + o_k % RANDOMISATIONS)  # [BLOCK_K, 1, 1]
    b_w0, b_w1, b_w2, b_w3 = philox_words(b_seed, tl.where(b_in_net, 0, o_k), o_b, o_j, level)
    b_p = o_k // RANDOMISATIONS
    p_net += 4 * o_j
    b_0 = tl.zeros([BLOCK_K, 1, BLOCK_D // 4], dtype=tl.uint32)
    b_1, b_2, b_3 = b_0, b_0, b_0
    top = tl.minimum(top // RANDOMISATIONS, 2**30 - 1)
    while top > 0:
        b_bit = (b_p & 1).to(tl.uint32)
        b_0 ^= tl.load(p_net, mask=b_in_net, other=0).to(tl.uint32) * b_bit
        b_1 ^= tl.load(p_net + 1, mask=b_in_net, other=0).to(tl.uint32) * b_bit
        b_2 ^= tl.load(p_net + 2, mask=b_in_net, other=0).to(tl.uint32) * b_bit
        b_3 ^= tl.load(p_net + 3, mask=b_in_net, other=0).to(tl.uint32) * b_bit
        b_p >>= 1
        p_net += NET_COLUMNS
        top >>= 1
    return b_w0 ^ b_0, b_w1 ^ b_1, b_w2 ^ b_2, b_w3 ^ b_3


@triton.jit
def _distance(b_s):
    """Return the distance of u to the nearer of 0 and 1, given the word as an int32."""
    # The exclusive or negates words from 2^31 on. Twice the word plus one is exact in 32 bits, so only the
    # conversion rounds.
    b_x = (((b_s ^ (b_s >> 31)) << 1) | 1).to(tl.uint32, bitcast=True)
    return b_x.to(tl.float32) * (0.5 * TWO_TO_MINUS_32)


@triton.jit
def _radius(b_w):
    """Compute sqrt(-2 log u), u = (w + 1/2) 2^-32."""
    b_s = b_w.to(tl.int32, bitcast=True)
    b_high = b_s < 0
    b_f = _distance(b_s)
    b_m, b_e = split_float(tl.where(b_high, 1.0 - b_f, b_f))
    # For u > 1/2 use the distance instead of the rounded 1 - f: the smallest radii keep their accuracy. There
    # e is 0 or -1.
    b_g = tl.where(b_high, tl.where(b_e == 0, -b_f, 1.0 - 2.0 * b_f), b_m - 1.0)
    return tl.sqrt(-2.0 * log_of_parts(b_g, b_e.to(tl.float32)))


@triton.jit
def _with_sign(b_x, b_bit):
    """Negate x where the given sign bit is set."""
    return (b_x.to(tl.int32, bitcast=True) ^ b_bit).to(tl.float32, bitcast=True)


@triton.jit
def _cosine_and_sine(b_w):
    """Compute cos and sin of 2 pi (w + 1/2) 2^-32."""
    b_s = b_w.to(tl.int32, bitcast=True)
    # The nearest multiple of a quarter turn is exact in integers; the remainder is at most an eighth turn.
    b_n = (add_bits(b_s >> 29, 1) >> 1) & 3
    b_t = (((b_s << 2) >> 1) | 1).to(tl.float32) * (0.5 * TWO_TO_MINUS_32)
    # Cephes' polynomials with the argument in turns, so that TWO_PI_LOW can compensate the rounding of 2 pi.
    b_z = b_t * b_t
    b_sin = ((-75.4456525 * b_z + 81.59376781) * b_z - 41.34167234) * b_z + TWO_PI_LOW
    # An explicit fma: of two products the compiler may round either, differently in different tiles.
    b_sin = tl.fma(b_t, TWO_PI_HIGH, b_t * b_sin)
    b_cos = (((59.3497009 * b_z - 85.44714096) * b_z + 64.93936132) * b_z - 19.7392088) * b_z + 1.0
    b_odd = (b_n & 1) != 0
    b_c = _with_sign(tl.where(b_odd, b_sin, b_cos), (add_bits(b_n, 1) & 2) << 30)
    return b_c, _with_sign(tl.where(b_odd, b_cos, b_sin), (b_n & 2) << 30)


@triton.jit
def _hardware(b_x, CUDA: tl.constexpr, HIP: tl.constexpr):
    """Apply a hardware instruction, given its name on NVIDIA and on AMD."""
    if is_hip():
        b_y = tl.inline_asm_elementwise(HIP, "=v,v", [b_x], tl.float32, is_pure=True, pack=1)
    else:
        b_y = tl.inline_asm_elementwise(CUDA, "=f,f", [b_x], tl.float32, is_pure=True, pack=1)
    return b_y


@triton.jit
def _fast_box_muller(b_u, b_v):
    """Compute two normals to 1e-5 absolute; NVIDIA's sine and cosine err by 2^-20.5, its log2 by 2^-22."""
    b_s = b_u.to(tl.int32, bitcast=True)
    b_f = _distance(b_s)
    b_u = tl.where(b_s < 0, 1.0 - b_f, b_f)
    b_square = _hardware(b_u, "lg2.approx.ftz.f32 $0, $1;", "v_log_f32 $0, $1") * MINUS_TWO_LOG_2
    # Near 1, where the error of log2 is too large for a small radius: a series to 2e-8.
    b_near = b_f * (2.0 + b_f * (1.0 + b_f * (2.0 / 3.0)))
    b_square = tl.where((b_s < 0) & (b_s >= -(2**24)), b_near, b_square)
    b_r = _hardware(b_square, "sqrt.approx.ftz.f32 $0, $1;", "v_sqrt_f32 $0, $1")
    # In radians; in turns on AMD.
    UNIT: tl.constexpr = TWO_TO_MINUS_32 if is_hip() else TWO_PI_HIGH * TWO_TO_MINUS_32
    b_a = b_v.to(tl.int32, bitcast=True).to(tl.float32) * UNIT
    b_x = b_r * _hardware(b_a, "cos.approx.ftz.f32 $0, $1;", "v_cos_f32 $0, $1")
    b_y = b_r * _hardware(b_a, "sin.approx.ftz.f32 $0, $1;", "v_sin_f32 $0, $1")
    return b_x, b_y


@triton.jit
def box_muller(b_u, b_v, DTYPE: tl.constexpr):
    """Compute two normals from two words."""
    if DTYPE == tl.float64:  # noqa: SIM300 (DTYPE is not a Python constant)
        b_r = tl.sqrt(-2.0 * tl.log((b_u.to(tl.float64) + 0.5) * TWO_TO_MINUS_32))
        b_a = (b_v.to(tl.float64) + 0.5) * (TWO_TO_MINUS_32 * (TWO_PI_HIGH + TWO_PI_LOW))
        b_x, b_y = b_r * tl.cos(b_a), b_r * tl.sin(b_a)
    elif FAST:
        b_x, b_y = _fast_box_muller(b_u, b_v)
    else:
        b_r = _radius(b_u)
        b_c, b_s = _cosine_and_sine(b_v)
        b_x, b_y = b_r * b_c, b_r * b_s
    return b_x, b_y


@triton.jit
def interleaved(b_0, b_1, b_2, b_3, BLOCK_K: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr):
    """Interleave four tiles of every fourth column; one element of each becomes four adjacent in a thread."""
    b_x = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))  # [BLOCK_K, BLOCK_B, BLOCK_D // 4, 2, 2]
    return tl.reshape(b_x, [BLOCK_K, BLOCK_B, BLOCK_D])


@triton.jit
def normals(
    seed,
    o_k,
    o_b,
    i_d,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    level=0,
):
    """Generate standard normals [BLOCK_K, BLOCK_B, BLOCK_D] of a tile that begins at column i_d.

    Args:
        seed: int64 scalar.
        o_k: int64 samples [BLOCK_K, 1, 1], offset included.
        o_b: int64 rows [1, BLOCK_B, 1], offset included.
        i_d: first column, a multiple of 4.
        DTYPE: dtype of the normals, float32 or float64.
        BLOCK_K: samples of the tile.
        BLOCK_B: rows of the tile.
        BLOCK_D: columns of the tile, a multiple of 4.
        level: last word of the address. Default: 0.
    """
    o_j = (i_d // 4 + tl.arange(0, BLOCK_D // 4))[None, None, :]  # [1, 1, BLOCK_D // 4]
    b_w0, b_w1, b_w2, b_w3 = philox_words(seed, o_k, o_b, o_j, level)
    return normals_of_words(b_w0, b_w1, b_w2, b_w3, DTYPE, BLOCK_K, BLOCK_B, BLOCK_D)


@triton.jit
def normals_of_words(
    b_w0,
    b_w1,
    b_w2,
    b_w3,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the standard normals of a tile from its words."""
    b_0, b_1 = box_muller(b_w0, b_w1, DTYPE)
    b_2, b_3 = box_muller(b_w2, b_w3, DTYPE)
    return interleaved(b_0, b_1, b_2, b_3, BLOCK_K, BLOCK_B, BLOCK_D)  # [BLOCK_K, BLOCK_B, BLOCK_D]


@triton.jit
def address_of_rows(o_b, row_offset):
    """Return the addresses of rows: o_b + row_offset, or 0 if all share the noise of row 0, offset -1."""
    return tl.where(row_offset < 0, 0, o_b + row_offset)


@triton.jit(
    do_not_specialize=["sample_offset", "row_offset", "level", "K", "B"],
    do_not_specialize_on_alignment=["k_tiles"],
)
def noise_kernel(
    p_seed,  # [] int64, or [RANDOMISATIONS]
    p_net,  # [NET_BITS, NET_COLUMNS] int64, or None without randomisations
    p_out,  # [K, B, D], contiguous: int64 words, or normals in float32 or float64
    sample_offset,  # address of the first sample
    row_offset,  # address of the first row, or -1
    level,  # level of the address
    K,  # samples
    B,  # rows
    D,  # columns; a multiple of 4 with WORDS
    k_tiles,  # blocks of samples
    WORDS: tl.constexpr,  # write the words instead of the normals
    RANDOMISATIONS: tl.constexpr,  # number of randomised quasi-Monte-Carlo nets; 0 for plain noise
    DTYPE: tl.constexpr,  # dtype of the normals
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Write normals or words; one program per tile [BLOCK_K, BLOCK_B, BLOCK_D]."""
    i_b, i_k = split_program(k_tiles)
    i_k *= BLOCK_K
    i_b *= BLOCK_B
    i_d = tl.program_id(1) * BLOCK_D
    o_k = (i_k + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None, None]  # [BLOCK_K, 1, 1]
    o_b = (i_b + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :, None]  # [1, BLOCK_B, 1]
    o_d = (i_d + tl.arange(0, BLOCK_D))[None, None, :]  # [1, 1, BLOCK_D]
    o_j = (i_d // 4 + tl.arange(0, BLOCK_D // 4))[None, None, :]  # [1, 1, BLOCK_D // 4]
    if RANDOMISATIONS:
        b_w0, b_w1, b_w2, b_w3 = net_words(
            p_seed,
            p_net,
            o_k + sample_offset,
            address_of_rows(o_b, row_offset),
            o_j,
            level,
            sample_offset.to(tl.int64) + K,
            RANDOMISATIONS,
            BLOCK_K,
            BLOCK_D,
        )
    else:
        b_w0, b_w1, b_w2, b_w3 = philox_words(
            tl.load(p_seed), o_k + sample_offset, address_of_rows(o_b, row_offset), o_j, level
        )
    if WORDS:
        b_out = interleaved(b_w0, b_w1, b_w2, b_w3, BLOCK_K, BLOCK_B, BLOCK_D).to(tl.int64)
    else:
        b_out = normals_of_words(b_w0, b_w1, b_w2, b_w3, DTYPE, BLOCK_K, BLOCK_B, BLOCK_D)
    tl.store(p_out + (o_k * B + o_b) * D + o_d, b_out, mask=(o_k < K) & (o_b < B) & (o_d < D))


def noise_tile(k: int, b: int, d: int, tile: int) -> tuple[int, int, int]:
    """Return (BLOCK_K, BLOCK_B, BLOCK_D) of a tile with noise.

    Rows take precedence over samples: quantities that depend on the row alone are then computed once.
    """
    # Four columns share their random words.
    block_d = max(tile_width(d, tile), 4)
    block_b = min(power_of_two(max(b, 1)), tile // block_d)
    block_k = min(power_of_two(max(k, 1)), tile // (block_d * block_b))
    return block_k, block_b, block_d


@planned
def _noise(seed, net, k, b, d, dtype) -> Call:
    """Plan the noise kernel: normals of ``dtype``, or words if it is int64."""
    want_words = dtype == torch.int64
    computed = torch.float32 if want_words else dtype
    block_k, block_b, block_d = noise_tile(k, b, d, LAUNCH["normal_diagonal"].tile)
    k_tiles = cdiv(k, block_k)
    return Call(
        noise_kernel,
        (k_tiles * cdiv(b, block_b), cdiv(d, block_d)),
        (Result((k, b, d), dtype),),
        (k, b, fixed(d), k_tiles),
        {
            "WORDS": want_words,
            "RANDOMISATIONS": seed.shape[0] if seed.dim() else 0,
            "DTYPE": triton_dtype(computed),
            "BLOCK_K": block_k,
            "BLOCK_B": block_b,
            "BLOCK_D": block_d,
        },
        LAUNCH["normal_diagonal"].warps(computed),
    )


def _draw(
    seed: torch.Tensor, k: int, b: int, d: int, dtype: torch.dtype, address: tuple[int, int, int]
) -> torch.Tensor:
    if k == 0 or b == 0 or d == 0:
        return torch.empty((k, b, d), dtype=dtype, device=seed.device)
    net = reference.net(seed.device) if seed.dim() else None
    return _noise((seed, net), (k, b, d, dtype), address)[0]


def words(
    seed: torch.Tensor,
    samples: int,
    rows: int,
    columns: int,
    sample_offset: int = 0,
    row_offset: int = 0,
    level: int = 0,
) -> torch.Tensor:
    """Return the random words of the normals: int64 [samples, rows, columns rounded up to 4], below 2^32."""
    return _draw(seed, samples, rows, 4 * -(-columns // 4), torch.int64, (sample_offset, row_offset, level))


def normal(
    seed: torch.Tensor,
    samples: int,
    rows: int,
    columns: int,
    sample_offset: int = 0,
    row_offset: int = 0,
    level: int = 0,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Return standard normals [samples, rows, columns]; words 2i, 2i+1 of a row give normals 2i, 2i+1."""
    return _draw(seed, samples, rows, columns, dtype, (sample_offset, row_offset, level))
