"""Gradients of :mod:`fastvae.kernels.normal_diagonal`, in Triton; the noise is drawn again."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.target_info import is_hip

from .common import INTERPRETED, LAUNCH, accumulator, computed, load, split_program, store, strides
from .elementary import exp, expm1_parts, quotient
from .launching import Call, Result, fixed, planned
from .normal_tiles import (
    chain,
    compile_time,
    form_of,
    input_strides,
    inverse_scale,
    latent_tiles,
    load_inputs,
    scale,
)
from .random import address_of_rows, normals

# Steps of a backward program's loop over samples. Minimum: every split writes its part of the sums, which is
# wasteful if it is short. Maximum: float32 sums of that length are as accurate as torch's blockwise ones.
MIN_STEPS = 8
MAX_STEPS = 32


@triton.jit
def load_upstream(
    p_grad_z,
    p_grad_log_ratio,
    p_weight,
    o_k,
    o_b,
    o_d,
    k_stop,
    B,
    D,
    stride_grad_z_k,
    stride_grad_z_b,
    stride_grad_z_d,
    stride_grad_log_ratio_k,
    stride_grad_log_ratio_b,
    stride_weight_k,
    stride_weight_b,
    Q: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Load a step's upstream gradients of z (as stored) and of the log-ratio, and the weights.

    Shapes: [BLOCK_K, BLOCK_B, BLOCK_D], [BLOCK_K, BLOCK_B, 1], [BLOCK_K, BLOCK_B, 1].
    """
    m_row = (o_k < k_stop) & (o_b < B)
    b_h = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_D], dtype=DTYPE)
    b_g = tl.zeros([BLOCK_K, BLOCK_B, 1], dtype=DTYPE)
    b_weight = tl.zeros([BLOCK_K, BLOCK_B, 1], dtype=DTYPE)
    if Q and p_grad_z is not None:
        o_z = o_k * stride_grad_z_k + o_b * stride_grad_z_b + o_d * stride_grad_z_d
        b_h = tl.load(p_grad_z + o_z, mask=m_row & (o_d < D), other=0.0)
    if p_grad_log_ratio is not None:
        o_g = o_k * stride_grad_log_ratio_k + o_b * stride_grad_log_ratio_b
        b_g = load(p_grad_log_ratio, o_g, m_row, DTYPE)
    if Q and p_weight is not None:
        o_w = o_k * stride_weight_k + o_b * stride_weight_b
        b_weight = load(p_weight, o_w, m_row, DTYPE)
    return b_h, b_g, b_weight


@triton.jit
def store_part(p_x, b_x, i_split, o_b, o_d, B, D):
    """Store one split's part of a sum over samples, [1, BLOCK_B, BLOCK_D] of [splits, B, D]."""
    o_b = o_b + i_split.to(tl.int64) * B
    store(p_x, o_b * D + o_d, b_x, (o_b < (i_split.to(tl.int64) + 1) * B) & (o_d < D))


@triton.jit(
    do_not_specialize=["K", "B", "sample_offset", "row_offset", "k_per_program"],
    # Strides of tensors with one number per row: they change with the batch, and specialising on them gains
    # nothing.
    do_not_specialize_on_alignment=[
        "d_splits",
        "stride_grad_log_ratio_k",
        "stride_grad_log_ratio_b",
        "stride_weight_k",
        "stride_weight_b",
    ],
)
def rsample_backward_kernel(
    p_grad_z,  # [K, B, D] gradient of z, or None
    p_grad_kl,  # [B], or [B, D] with PER_DIMENSION, gradient of the KL, or None
    p_grad_log_ratio,  # [K, B] gradient of the log-ratio, or None
    p_weight,  # [K, B] factor of the gradients of mu and logvar, or None
    p_mu,  # [B, D] mean of q
    p_logvar,  # [B, D] log variance of q
    p_prior_mu,  # [B, D] mean of the prior, or None for N(0, I)
    p_prior_logvar,  # [B, D] log variance of the prior, or None likewise
    p_seed,  # [] int64
    p_grad_mu,  # [splits, B, D] out, contiguous, or None where not needed
    p_grad_logvar,  # likewise
    p_grad_prior_mu,  # likewise
    p_grad_prior_logvar,  # likewise
    sample_offset,  # address of the first sample
    row_offset,  # address of the first row
    K,  # samples
    B,  # rows
    D,  # columns
    k_per_program,  # samples of one program
    d_splits,  # programs along the columns
    stride_grad_z_k,
    stride_grad_z_b,
    stride_grad_z_d,
    stride_grad_kl_b,
    stride_grad_kl_d,
    stride_grad_log_ratio_k,
    stride_grad_log_ratio_b,
    stride_weight_k,
    stride_weight_b,
    stride_mu_b,
    stride_mu_d,
    stride_logvar_b,
    stride_logvar_d,
    stride_prior_mu_b,
    stride_prior_mu_d,
    stride_prior_logvar_b,
    stride_prior_logvar_d,
    LOGVAR_MIN: tl.constexpr,  # clamp of logvar, with CLAMP
    LOGVAR_MAX: tl.constexpr,
    CLAMP: tl.constexpr,  # whether logvar is clamped
    SCALE: tl.constexpr,  # form of p_logvar: "logvar", "log_scale", "scale", "softplus"
    FLOOR: tl.constexpr,  # added to a softplus
    ALIGN: tl.constexpr,  # alignment of logvar's rows in bytes, up to 16
    PER_DIMENSION: tl.constexpr,  # the KL is [B, D] instead of [B]
    PATH: tl.constexpr,  # drop the direct dependence of log q on (mu, logvar)
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    BLOCK_K: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute the gradients: one program per block of rows, block of columns and split of the samples.

    The first split adds the KL's gradients.
    """
    # Compile-time flags of the quantities needed per sample.
    Q: tl.constexpr = (p_grad_mu is not None) or (p_grad_logvar is not None)
    RATIO: tl.constexpr = p_grad_log_ratio is not None
    PRIOR: tl.constexpr = (p_grad_prior_mu is not None) or (p_grad_prior_logvar is not None)
    ENTROPY: tl.constexpr = RATIO and (not PATH) and (p_grad_logvar is not None)
    NOISE: tl.constexpr = RATIO or (p_grad_z is not None and p_grad_logvar is not None)
    SAMPLES: tl.constexpr = (Q and p_grad_z is not None) or (RATIO and (Q or PRIOR))
    # Loads are issued one step ahead, or a warp would wait for memory at each step; AMD's multiprocessors
    # hold enough other warps to hide the latency.
    AHEAD: tl.constexpr = INTERPRETED or not is_hip()

    i_b, i_d = split_program(d_splits)
    i_b *= BLOCK_B
    i_d *= BLOCK_D
    i_split = tl.program_id(1)
    o_b = (i_b + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :, None]  # [1, BLOCK_B, 1]
    o_d = (i_d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, None, :]  # [1, 1, BLOCK_D]
    b_mu, b_logvar, b_given, b_prior_mu, b_prior_logvar = load_inputs(
        p_mu, p_logvar, p_prior_mu, p_prior_logvar, o_b, o_d, B, D,
        stride_mu_b, stride_mu_d, stride_logvar_b, stride_logvar_d,
        stride_prior_mu_b, stride_prior_mu_d, stride_prior_logvar_b, stride_prior_logvar_d,
        LOGVAR_MIN, LOGVAR_MAX, CLAMP, SCALE, FLOOR, ALIGN, DTYPE,
    )  # fmt: skip
    b_sigma = scale(b_logvar, b_given, SCALE, FLOOR)
    b_half_sigma = 0.5 * b_sigma
    b_inverse_s = inverse_scale(b_prior_logvar, p_prior_logvar)
    b_delta = b_mu - b_prior_mu
    # Sums over samples, per lane until the end.
    s_mu = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_D], dtype=DTYPE)  # sum of h
    s_logvar = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_D], dtype=DTYPE)  # sum of h eps; with RATIO times sigma / 2
    s_entropy = tl.zeros([BLOCK_K, BLOCK_B, 1], dtype=DTYPE)  # sum of g
    s_prior_mu = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_D], dtype=DTYPE)  # without a factor 1 / s
    s_prior_logvar = tl.zeros([BLOCK_K, BLOCK_B, BLOCK_D], dtype=DTYPE)
    if SAMPLES:
        seed = tl.load(p_seed)
        if PATH and RATIO:
            b_shift, b_spread = b_delta * b_inverse_s, b_sigma * b_inverse_s
        if PATH and RATIO and Q:
            if SCALE == "logvar":
                b_inverse_sigma = exp(-0.5 * b_logvar)
            else:
                b_inverse_sigma = quotient(tl.zeros_like(b_sigma) + 1.0, b_sigma)
        k_start = i_split * k_per_program
        k_stop = tl.minimum(k_start + k_per_program, K)
        o_k = (k_start + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None, None]  # [BLOCK_K, 1, 1]
        n_h, n_g, n_weight = load_upstream(
            p_grad_z, p_grad_log_ratio, p_weight, o_k, o_b, o_d, k_stop, B, D,
            stride_grad_z_k, stride_grad_z_b, stride_grad_z_d, stride_grad_log_ratio_k,
            stride_grad_log_ratio_b, stride_weight_k, stride_weight_b,
            Q, DTYPE, BLOCK_K, BLOCK_B, BLOCK_D,
        )  # fmt: skip
        for i_k in range(k_start, k_stop, BLOCK_K):
            o_k = (i_k + tl.arange(0, BLOCK_K)).to(tl.int64)[:, None, None]  # [BLOCK_K, 1, 1]
            m_k = o_k < k_stop
            if AHEAD:
                b_h, b_g, b_weight = computed(n_h, DTYPE), n_g, n_weight
            n_h, n_g, n_weight = load_upstream(
                p_grad_z, p_grad_log_ratio, p_weight, o_k + BLOCK_K if AHEAD else o_k, o_b, o_d, k_stop, B, D,
                stride_grad_z_k, stride_grad_z_b, stride_grad_z_d, stride_grad_log_ratio_k,
                stride_grad_log_ratio_b, stride_weight_k, stride_weight_b,
                Q, DTYPE, BLOCK_K, BLOCK_B, BLOCK_D,
            )  # fmt: skip
            if not AHEAD:
                b_h, b_g, b_weight = computed(n_h, DTYPE), n_g, n_weight
            if NOISE:
                rows = address_of_rows(o_b, row_offset)
                b_eps = normals(seed, o_k + sample_offset, rows, i_d, DTYPE, BLOCK_K, BLOCK_B, BLOCK_D)
            if RATIO:
                # The distance from the prior's mean over s, its product with g, and that times sigma / (2 s).
                # A sample with zero upstream gradient contributes zero, even where the distance is infinite.
                # PATH keeps one more number, which leaves registers for fewer of these.
                if PATH:
                    b_white = tl.where(b_g == 0, 0.0, b_shift + b_spread * b_eps)
                    b_part = b_g * b_white
                    b_pull_scaled = (0.5 * b_part) * b_spread
                else:
                    b_white = tl.where(b_g == 0, 0.0, (b_delta + b_sigma * b_eps) * b_inverse_s)
                    b_part = b_g * b_white
                    b_pull_scaled = b_part * (b_half_sigma * b_inverse_s)
                b_pull = b_part * b_inverse_s
                # h sigma / 2, factor by factor: it can be finite where h overflows.
                b_scaled = b_h * b_half_sigma - b_pull_scaled
                b_h -= b_pull
                # Samples beyond the last have g = 0, and 0 times infinity would be NaN.
                if p_grad_prior_mu is not None:
                    s_prior_mu += tl.where(m_k, b_part, 0.0)
                if p_grad_prior_logvar is not None:
                    s_prior_logvar += tl.where(m_k, 0.5 * (b_part * b_white - b_g), 0.0)
                if PATH and Q:
                    b_push = b_g * b_eps
                    b_h += b_push * b_inverse_sigma
                    b_scaled += 0.5 * b_push
                b_h = tl.where(m_k, b_h, 0.0)
                b_scaled = tl.where(m_k, b_scaled, 0.0)
            else:
                b_scaled = b_h
            if p_weight is not None and Q:
                b_h *= b_weight
                b_scaled *= b_weight
                if ENTROPY:
                    s_entropy += b_g * b_weight
            elif ENTROPY:
                s_entropy += b_g
            if p_grad_mu is not None:
                s_mu += b_h
            if p_grad_logvar is not None:
                s_logvar += b_scaled * b_eps

    # Gradient of the KL; only the first split adds it.
    b_kl = tl.zeros([1, BLOCK_B, 1], dtype=DTYPE)  # [1, BLOCK_B, 1 or BLOCK_D]
    b_ratio = b_kl
    if p_grad_kl is not None:
        if PER_DIMENSION:
            o_kl = o_b * stride_grad_kl_b + o_d * stride_grad_kl_d
            b_kl = load(p_grad_kl, o_kl, (o_b < B) & (o_d < D), DTYPE)
        else:
            b_kl = load(p_grad_kl, o_b * stride_grad_kl_b, o_b < B, DTYPE)  # [1, BLOCK_B, 1]
        b_ratio, _ = expm1_parts(b_logvar - b_prior_logvar)
        b_ratio = tl.where(b_kl == 0, 0.0, b_ratio)
    # A KL with zero upstream gradient contributes zero, even where it is infinite.
    b_white = tl.where(b_kl == 0, 0.0, b_delta * b_inverse_s)
    b_part = b_kl * b_white
    b_push = tl.where(b_kl == 0, 0.0, b_part * b_inverse_s)
    if p_grad_mu is not None:
        b_out = tl.sum(s_mu, axis=0, keep_dims=True)
        if p_grad_kl is not None:
            b_out += tl.where(i_split == 0, b_push, 0.0)
        store_part(p_grad_mu, b_out, i_split, o_b, o_d, B, D)
    if p_grad_logvar is not None:
        b_out = tl.sum(s_logvar, axis=0, keep_dims=True)
        if SAMPLES and not RATIO:
            b_out *= b_half_sigma
        if ENTROPY:
            b_out += 0.5 * tl.sum(s_entropy, axis=0, keep_dims=True)
        if p_grad_kl is not None:
            b_out += tl.where(i_split == 0, 0.5 * b_kl * b_ratio, 0.0)
        if SCALE != "logvar":
            b_out *= chain(b_given, SCALE, FLOOR)
        elif CLAMP:
            b_out = tl.where(b_given, b_out, 0.0)
        store_part(p_grad_logvar, b_out, i_split, o_b, o_d, B, D)
    if p_grad_prior_mu is not None:
        b_out = tl.sum(s_prior_mu, axis=0, keep_dims=True)
        if RATIO:
            b_out *= b_inverse_s
        if p_grad_kl is not None:
            b_out -= tl.where(i_split == 0, b_push, 0.0)
        store_part(p_grad_prior_mu, b_out, i_split, o_b, o_d, B, D)
    if p_grad_prior_logvar is not None:
        b_out = tl.sum(s_prior_logvar, axis=0, keep_dims=True)
        if p_grad_kl is not None:
            b_square = 0.5 * (b_kl * b_ratio + b_part * b_white)
            b_out -= tl.where(i_split == 0, b_square, 0.0)
        store_part(p_grad_prior_logvar, b_out, i_split, o_b, o_d, B, D)


def rsample_kl_backward(
    grad_z: torch.Tensor | None,
    grad_kl: torch.Tensor | None,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    prior_mu: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    seed: torch.Tensor,
    draw: Any,
    need: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of (mu, logvar, prior_mu, prior_logvar), None where not needed."""
    return _backward(
        grad_z, grad_kl, None, None, mu, logvar, prior_mu, prior_logvar, seed, draw, False, need
    )  # fmt: skip


def rsample_log_ratio_backward(
    grad_z: torch.Tensor | None,
    grad_log_ratio: torch.Tensor | None,
    weight: torch.Tensor | None,
    mu: torch.Tensor,
    logvar: torch.Tensor,
    prior_mu: torch.Tensor | None,
    prior_logvar: torch.Tensor | None,
    seed: torch.Tensor,
    draw: Any,
    path: bool,
    need: list[bool],
) -> tuple[torch.Tensor | None, ...]:
    """Return the gradients of (mu, logvar, prior_mu, prior_logvar), None where not needed.

    With ``path``, the direct dependence of log q on (mu, logvar) is dropped (sticking the landing).
    ``weight`` [K, B] multiplies the gradients of mu and logvar, and nothing else (DReG).
    """
    return _backward(
        grad_z, None, grad_log_ratio, weight, mu, logvar, prior_mu, prior_logvar, seed, draw, path, need
    )  # fmt: skip


@planned
def _gradients(
    grad_z, grad_kl, grad_log_ratio, weight, mu, logvar, prior_mu, prior_logvar, seed, samples, form, path,
    need,
) -> Call:  # fmt: skip
    """Plan either backward pass: absent upstream gradients are None and cost nothing."""
    b, d = mu.shape
    dtype, launching = accumulator(mu), LAUNCH["latent_backward"]
    per_dimension = grad_kl is not None and grad_kl.dim() == 2
    stride_kl = strides(grad_kl, 2) if per_dimension else (*strides(grad_kl, 1), 0)
    # The KL alone needs no samples.
    k = 1 if grad_z is None and grad_log_ratio is None else samples
    # Every split writes its part of the sums, wasteful if its loop is short; a long loop loses accuracy.
    tiles = latent_tiles(k, b, d, launching.tile, min_steps=MIN_STEPS, max_steps=MAX_STEPS)
    inputs = mu, logvar, prior_mu, prior_logvar
    stride_z = strides(grad_z, 3)
    return Call(
        rsample_backward_kernel,
        tiles.grid,
        tuple(
            Result((b, d), t.dtype, tiles.k_splits, dtype) if n else None
            for t, n in zip(inputs, need, strict=True)
        ),
        (
            *(
                k,
                b,
                fixed(d),
                *tiles.numbers,
                stride_z[0],
                fixed(stride_z[1]),
                fixed(stride_z[2]),
                *stride_kl,
            ),
            *(*strides(grad_log_ratio, 2), *strides(weight, 2), *input_strides(*inputs)),
        ),
        {"PER_DIMENSION": per_dimension, "PATH": path} | compile_time(dtype, form, tiles, logvar),
        # With the prior's sums too, 8 half-precision elements per thread leave registers for too few threads.
        launching.warps(dtype if need[2] or need[3] else mu.dtype),
    )


def _backward(
    grad_z, grad_kl, grad_log_ratio, weight, mu, logvar, prior_mu, prior_logvar, seed, draw, path, need
):  # fmt: skip
    # Without a prior no tensor receives these gradients.
    need = need[0], need[1], need[2] and prior_mu is not None, need[3] and prior_logvar is not None
    if not any(need):
        return None, None, None, None
    tensors = mu, logvar, prior_mu, prior_logvar
    if mu.shape[0] == 0 or mu.shape[1] == 0:
        return tuple(torch.empty_like(t) if n else None for t, n in zip(tensors, need, strict=True))
    settings = draw.samples, form_of(draw), path, need
    return _gradients(
        (grad_z, grad_kl, grad_log_ratio, weight, *tensors, seed),
        settings,
        (draw.sample_offset, draw.row_offset),
    )
