"""Tiles of a diagonal normal q and its prior, which the kernels of normal_diagonal share both ways."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .common import PROGRAMS, cdiv, load, row_alignment, strides, triton_dtype
from .elementary import exp, log, log_positive, quotient, softplus
from .launching import fixed
from .random import noise_tile

# Below it softplus(raw) is exp(raw) to the last digit, and may underflow.
TAIL = tl.constexpr(-40.0)


@triton.jit
def log_variance(b_raw, SCALE: tl.constexpr, FLOOR: tl.constexpr):
    """Convert ``b_raw`` (log scale, scale or softplus) to log sigma^2."""
    if SCALE == "log_scale":
        b_logvar = 2.0 * b_raw
    elif SCALE == "scale":
        b_logvar = 2.0 * log_positive(b_raw)
    else:
        b_variance, _ = softplus(b_raw)
        # Normal unless infinite.
        b_logvar = log(b_variance + FLOOR)
        b_right = b_raw < float("inf")
        if FLOOR == 0.0:
            b_right = b_right & (b_raw >= TAIL)
        b_logvar = tl.where(b_right, b_logvar, b_raw)
    return b_logvar


@triton.jit
def scale(b_logvar, b_raw, SCALE: tl.constexpr, FLOOR: tl.constexpr):
    """Return sigma, from the log variance if SCALE is "logvar", else from the raw parameter."""
    if SCALE == "logvar":
        b_sigma = exp(0.5 * b_logvar)
    elif SCALE == "log_scale":
        b_sigma = exp(b_raw)
    elif SCALE == "scale":
        b_sigma = b_raw
    else:
        b_variance, _ = softplus(b_raw)
        b_sigma = tl.sqrt(b_variance + FLOOR)
        if FLOOR == 0.0:
            b_sigma = tl.where(b_raw < TAIL, exp(0.5 * b_raw), b_sigma)
    return b_sigma


@triton.jit
def chain(b_raw, SCALE: tl.constexpr, FLOOR: tl.constexpr):
    """Return the derivative of :func:`log_variance`."""
    if SCALE == "log_scale":
        b_chain = 2.0
    elif SCALE == "scale":
        b_chain = quotient(tl.zeros_like(b_raw) + 2.0, b_raw)
    else:
        b_variance, b_slope = softplus(b_raw)
        b_chain = quotient(b_slope, b_variance + FLOOR)
        if FLOOR == 0.0:
            b_chain = tl.where(b_raw < TAIL, 1.0, b_chain)
    return b_chain


@triton.jit
def load_inputs(
    p_mu,
    p_logvar,
    p_prior_mu,
    p_prior_logvar,
    o_b,
    o_d,
    B,
    D,
    stride_mu_b,
    stride_mu_d,
    stride_logvar_b,
    stride_logvar_d,
    stride_prior_mu_b,
    stride_prior_mu_d,
    stride_prior_logvar_b,
    stride_prior_logvar_d,
    LOGVAR_MIN: tl.constexpr,
    LOGVAR_MAX: tl.constexpr,
    CLAMP: tl.constexpr,
    SCALE: tl.constexpr,
    FLOOR: tl.constexpr,
    ALIGN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Load mu, logvar, its origin, the prior's mean and logvar: [1, BLOCK_B, BLOCK_D] each.

    The origin is the raw parameter if SCALE is not "logvar", else a mask of the elements the clamp leaves
    unchanged.
    """
    mask = (o_b < B) & (o_d < D)
    b_mu = load(p_mu, o_b * stride_mu_b + o_d * stride_mu_d, mask, DTYPE)
    b_logvar = load(p_logvar, o_b * stride_logvar_b + o_d * stride_logvar_d, mask, DTYPE, ALIGN=ALIGN)
    b_given = mask
    if SCALE != "logvar":
        b_given = b_logvar
        b_logvar = log_variance(b_given, SCALE, FLOOR)
    elif CLAMP:
        # NaN compares as inside and is kept.
        b_low = b_logvar < LOGVAR_MIN
        b_high = b_logvar > LOGVAR_MAX
        b_logvar = tl.where(b_low, LOGVAR_MIN, tl.where(b_high, LOGVAR_MAX, b_logvar))
        b_given = (b_low | b_high) == 0
    if p_prior_mu is not None:
        b_prior_mu = load(p_prior_mu, o_b * stride_prior_mu_b + o_d * stride_prior_mu_d, mask, DTYPE)
        b_prior_logvar = load(
            p_prior_logvar, o_b * stride_prior_logvar_b + o_d * stride_prior_logvar_d, mask, DTYPE
        )
    else:
        b_prior_mu = tl.zeros([1, 1, 1], dtype=DTYPE)
        b_prior_logvar = tl.zeros([1, 1, 1], dtype=DTYPE)
    return b_mu, b_logvar, b_given, b_prior_mu, b_prior_logvar


@triton.jit
def inverse_scale(b_prior_logvar, p_prior_logvar):
    """Return 1 / s of the prior, or 1 for N(0, I).

    Callers multiply by one 1 / s at a time: 1 / s^2 overflows long before a product that contains it.
    """
    b_inverse_s = b_prior_logvar + 1.0
    if p_prior_logvar is not None:
        b_inverse_s = exp(-0.5 * b_prior_logvar)
    return b_inverse_s


class LatentTiles(NamedTuple):
    """Partition of [K, B, D]: tile sizes, and one program's share of each axis."""

    k_per_program: int
    d_tiles: int
    k_splits: int
    b_tiles: int
    d_splits: int
    blocks: dict[str, int]  # the compile-time arguments

    @property
    def numbers(self) -> tuple[int, int]:
        """Integer arguments common to the kernels of this file."""
        return self.k_per_program, self.d_splits

    @property
    def grid(self) -> tuple[int, int]:
        """Grid of one program per split; columns vary fastest, so that neighbours read adjacent memory."""
        return self.b_tiles * self.d_splits, self.k_splits


@functools.lru_cache(4096)
def latent_tiles(
    k: int, b: int, d: int, tile: int, *, loop_d: bool = False, min_steps: int = 1, max_steps: int = 0
) -> LatentTiles:
    """Cut [K, B, D] into tiles and programs.

    Args:
        k: samples.
        b: rows, not 0.
        d: columns, not 0.
        tile: elements per tile.
        loop_d: let a program loop over several tiles of columns, as long as enough programs remain; otherwise
            each takes one.
        min_steps: minimum steps of a program's loop over samples, where there are as many. Samples are
            split to get enough programs.
        max_steps: maximum steps of that loop, which may split the samples further; 0 means no limit.
    """
    block_k, block_b, block_d = noise_tile(k, b, d, tile)
    k_tiles, b_tiles, d_tiles = cdiv(k, block_k), cdiv(b, block_b), cdiv(d, block_d)
    d_per = cdiv(d_tiles, max(1, PROGRAMS // b_tiles)) if loop_d else 1
    d_splits = cdiv(d_tiles, d_per)
    k_splits = min(PROGRAMS // (b_tiles * d_splits), cdiv(k_tiles, min_steps))
    k_splits = max(k_splits, cdiv(k_tiles, max_steps) if max_steps else 1, 1)
    # The limit of the grid's second axis.
    k_splits = min(k_splits, 65535)
    k_per = cdiv(max(k_tiles, 1), k_splits) * block_k
    blocks = {"BLOCK_K": block_k, "BLOCK_B": block_b, "BLOCK_D": block_d}
    return LatentTiles(k_per, d_per, max(cdiv(k, k_per), 1), b_tiles, d_splits, blocks)


def input_strides(mu, logvar, prior_mu, prior_logvar) -> tuple[Any, ...]:
    """Return the strides of the four inputs, in the kernels' order."""
    return tuple(fixed(s) for t in (mu, logvar, prior_mu, prior_logvar) for s in strides(t, 2))


def form_of(draw: Any) -> tuple[float, float, str, float]:
    """Return the form of logvar: (logvar_min, logvar_max, scale, floor)."""
    return draw.logvar_min, draw.logvar_max, draw.scale, draw.floor


def compile_time(
    dtype: torch.dtype, form: tuple[float, float, str, float], tiles: LatentTiles, logvar: torch.Tensor
) -> dict:
    """Return the kernels' common compile-time arguments, including the hyperparameters clamp and floor."""
    low, high, scale, floor = form
    return {
        "LOGVAR_MIN": low,
        "LOGVAR_MAX": high,
        "CLAMP": low > float("-inf") or high < float("inf"),
        "SCALE": scale,
        "FLOOR": floor,
        "ALIGN": row_alignment(logvar),
        "DTYPE": triton_dtype(dtype),
        **tiles.blocks,
    }
