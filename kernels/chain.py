"""log p(x|z) of a decoder of linear layers, whose values never leave the multiprocessor.

A program takes samples of one example: its tile of each hidden layer, up to 256 wide, stays in registers and
is an operand of the next product; the last layer's output is computed in columns, to which the likelihood is
applied at once. Only z is read and log p(x|z) written for each sample. Every program reads all weights, from
the L2 cache, so tiles have as many rows as registers allow.

A tile in registers cannot be cut, so hidden layers go in pairs: columns of the first are computed, and
accumulated into all columns of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import activations, common
from .common import INTERPRETED, cdiv, load, power_of_two, strides
from .elementary import log1p, log1p_of_odds, odds_of_both
from .head import OPTIONS, _padded
from .launching import Call, Result, fixed, planned
from .likelihood import value_of_tile
from .likelihood_parameters import is_heavy, scalar_functions

# Hidden layers of a call, their maximum width, and maximum number of latents.
MOST_HIDDEN, WIDEST, MOST_LATENTS = 3, 256, 128
# Outputs of the last layer, and inputs of a hidden one, per step.
BLOCK_X, BLOCK_J = 32, 32
# With fewer samples, most of a tile would be empty.
FEWEST_SAMPLES = 32
# The product of 1 + odds <= 2 over as many tiles of the output does not overflow.
MAX_TILES = tl.constexpr(100)


@triton.jit
def columns(
    b_h, p_w, p_b, o_w, W, V, stride_w_w, stride_w_v,
    DOT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Return columns o_w of h W' + c for a tile h [BLOCK_N, BLOCK_V] in registers; c may be None."""
    o_v = tl.arange(0, BLOCK_V)
    m_w = o_w < W
    mask = (o_v < V)[:, None] & m_w[None, :]
    b_w = load(p_w, o_w[None, :] * stride_w_w + o_v[:, None] * stride_w_v, mask, DOT)
    b_a = tl.dot(b_h, b_w, input_precision=PRECISION, out_dtype=DTYPE)
    if p_b is not None:
        b_a += load(p_b, o_w, m_w, DTYPE)[None, :]
    return b_a


@triton.jit
def first_layer(
    p_h, p_u, p_c, o_n, m_n, V, U, stride_h_n, stride_h_v, stride_u_u, stride_u_v,
    ACTIVATION: tl.constexpr, PARAMETER: tl.constexpr, DOT: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_U: tl.constexpr,
):  # fmt: skip
    """Return the value of a hidden layer, U wide, for rows of h in memory."""
    o_u = tl.arange(0, BLOCK_U)
    m_u = o_u < U
    b_a = tl.zeros([BLOCK_N, BLOCK_U], dtype=DTYPE)
    for i_v in range(0, V, BLOCK_J):
        o_v = i_v + tl.arange(0, BLOCK_J)
        m_v = o_v < V
        o_h = o_n[:, None] * stride_h_n + o_v[None, :] * stride_h_v
        b_h = load(p_h, o_h, m_n[:, None] & m_v[None, :], DOT)
        mask = m_v[:, None] & m_u[None, :]
        b_u = load(p_u, o_u[None, :] * stride_u_u + o_v[:, None] * stride_u_v, mask, DOT)
        b_a = tl.dot(b_h, b_u, b_a, input_precision=PRECISION)
    if p_c is not None:
        b_a += load(p_c, o_u, m_u, DTYPE)[None, :]
    # Beyond the layer, where infinite inputs give NaN, 0.
    return tl.where(m_u[None, :], ACTIVATION(b_a, PARAMETER), 0.0).to(DOT)


@triton.jit
def two_layers(
    b_h, p_u, p_c, p_w, p_b, V, U, W, stride_u_u, stride_u_v, stride_w_w, stride_w_u,
    FIRST: tl.constexpr, SECOND: tl.constexpr, A: tl.constexpr, B: tl.constexpr,
    DOT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Return the value of the second of two hidden layers, U and W wide, for a tile h."""
    o_w = tl.arange(0, BLOCK_W)
    m_w = o_w < W
    b_a = tl.zeros([BLOCK_N, BLOCK_W], dtype=DTYPE)
    for i_u in range(0, U, BLOCK_J):
        o_u = i_u + tl.arange(0, BLOCK_J)
        b_u = columns(b_h, p_u, p_c, o_u, U, V, stride_u_u, stride_u_v, DOT, DTYPE, PRECISION, BLOCK_V)
        m_u = o_u < U
        b_u = tl.where(m_u[None, :], FIRST(b_u, A), 0.0).to(DOT)
        mask = m_u[:, None] & m_w[None, :]
        b_w = load(p_w, o_w[None, :] * stride_w_w + o_u[:, None] * stride_w_u, mask, DOT)
        b_a = tl.dot(b_u, b_w, b_a, input_precision=PRECISION)
    if p_b is not None:
        b_a += load(p_b, o_w, m_w, DTYPE)[None, :]
    return tl.where(m_w[None, :], SECOND(b_a, B), 0.0).to(DOT)


@triton.jit
def output_tile(
    b_h, p_w, p_b, p_fixed, o_x, m_x, X, H, stride_w_x, stride_w_h, stride_p,
    VARIES: tl.constexpr, DOT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Return columns of a parameter: of the last layer's output, or of a fixed parameter."""
    if p_w is not None:
        b_a = columns(b_h, p_w, p_b, o_x, X, H, stride_w_x, stride_w_h, DOT, DTYPE, PRECISION, BLOCK_H)
    elif VARIES:
        b_a = load(p_fixed, o_x * stride_p, m_x, DTYPE)[None, :]
    else:
        b_a = tl.load(p_fixed).to(DTYPE)
    return b_a


@triton.jit(do_not_specialize=["K", "B", "k_blocks"])
def chain_log_prob_kernel(
    p_x,  # [B, X] data, of any type
    p_h,  # [K B, V] input of the first layer, sample-major
    p_w0,  # [X, W] weights of the parameters that the last layer outputs; None for the others
    p_w1,
    p_w2,
    p_b0,  # [X] biases, or None
    p_b1,
    p_b2,
    p_p1,  # [X] or one number: the fixed parameters
    p_p2,
    p_u0,  # [U0, V], [U1, U0], ...: weights of the hidden layers, the last one W wide; None for the others
    p_u1,
    p_u2,
    p_c0,  # [U0], [U1], ... biases, or None
    p_c1,
    p_c2,
    p_out,  # [K, B] out, contiguous: log-likelihoods
    K,  # samples
    B,  # batch size
    k_blocks,  # tiles of samples
    X,  # outputs
    V,  # inputs of the first layer
    U0,  # widths of the hidden layers
    U1,
    U2,
    stride_x_b,
    stride_x_x,
    stride_h_n,
    stride_h_v,
    stride_w0_x,
    stride_w0_h,
    stride_w1_x,
    stride_w1_h,
    stride_w2_x,
    stride_w2_h,
    stride_p1,
    stride_p2,
    stride_u0_u,
    stride_u0_v,
    stride_u1_u,
    stride_u1_v,
    stride_u2_u,
    stride_u2_v,
    HIDDEN: tl.constexpr,  # number of hidden layers
    A0: tl.constexpr,  # activations
    A1: tl.constexpr,
    A2: tl.constexpr,
    PARAMETER0: tl.constexpr,  # of the activations
    PARAMETER1: tl.constexpr,
    PARAMETER2: tl.constexpr,
    VARIES_1: tl.constexpr,
    VARIES_2: tl.constexpr,
    VALUE: tl.constexpr,  # the likelihood's functions, see fastvae.kernels.likelihoods
    DATA: tl.constexpr,
    FACTOR: tl.constexpr,
    SHARED_LOG: tl.constexpr,
    DOT: tl.constexpr,  # dtype of the products' operands
    DTYPE: tl.constexpr,  # dtype of the computation
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,  # samples of a tile
    BLOCK_V: tl.constexpr,  # all inputs
    BLOCK_J: tl.constexpr,  # columns of the first of two hidden layers per step
    BLOCK_U0: tl.constexpr,  # all columns of the first hidden layer
    BLOCK_W: tl.constexpr,  # all columns of the last hidden layer
    BLOCK_X: tl.constexpr,
):
    """Compute log p(x|z); one program per tile of samples of an example."""
    i_b = (tl.program_id(0) // k_blocks).to(tl.int64)
    o_k = (tl.program_id(0) % k_blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_k = o_k < K
    o_n = o_k * B + i_b
    if HIDDEN != 2:
        b_h = first_layer(
            p_h, p_u0, p_c0, o_n, m_k, V, U0, stride_h_n, stride_h_v, stride_u0_u, stride_u0_v,
            A0, PARAMETER0, DOT, DTYPE, PRECISION, BLOCK_N, BLOCK_J, BLOCK_U0,
        )  # fmt: skip
    if HIDDEN == 2:
        o_v = tl.arange(0, BLOCK_V)
        mask = m_k[:, None] & (o_v < V)[None, :]
        b_h = load(p_h, o_n[:, None] * stride_h_n + o_v[None, :] * stride_h_v, mask, DOT)
        b_h = two_layers(
            b_h, p_u0, p_c0, p_u1, p_c1, V, U0, U1, stride_u0_u, stride_u0_v, stride_u1_u, stride_u1_v,
            A0, A1, PARAMETER0, PARAMETER1, DOT, DTYPE, PRECISION, BLOCK_N, BLOCK_V, BLOCK_J, BLOCK_W,
        )  # fmt: skip
        W = U1
    elif HIDDEN == 3:
        b_h = two_layers(
            b_h, p_u1, p_c1, p_u2, p_c2, U0, U1, U2, stride_u1_u, stride_u1_v, stride_u2_u, stride_u2_v,
            A1, A2, PARAMETER1, PARAMETER2, DOT, DTYPE, PRECISION, BLOCK_N, BLOCK_U0, BLOCK_J, BLOCK_W,
        )  # fmt: skip
        W = U2
    else:
        W = U0
    # log(1 + a) + log(1 + b) = log(1 + (a + b + a b)): one logarithm for all tiles.
    PRODUCT: tl.constexpr = SHARED_LOG and MAX_TILES * BLOCK_X >= X
    b_sum = tl.zeros([BLOCK_N, BLOCK_X], dtype=DTYPE)
    if PRODUCT:
        b_product = tl.zeros([BLOCK_N, BLOCK_X], dtype=DTYPE)
    for i_x in range(0, X, BLOCK_X):
        o_x = i_x + tl.arange(0, BLOCK_X)
        m_x = o_x < X
        b_x = load(p_x, i_b * stride_x_b + o_x * stride_x_x, m_x, DTYPE)[None, :]
        b_0 = output_tile(
            b_h, p_w0, p_b0, None, o_x, m_x, X, W, stride_w0_x, stride_w0_h, 0, 0,
            DOT, DTYPE, PRECISION, BLOCK_W,
        )  # fmt: skip
        b_1, b_2 = b_0, b_0
        if (p_w1 is not None) or (p_p1 is not None):
            b_1 = output_tile(
                b_h, p_w1, p_b1, p_p1, o_x, m_x, X, W, stride_w1_x, stride_w1_h, stride_p1, VARIES_1,
                DOT, DTYPE, PRECISION, BLOCK_W,
            )  # fmt: skip
        if (p_w2 is not None) or (p_p2 is not None):
            b_2 = output_tile(
                b_h, p_w2, p_b2, p_p2, o_x, m_x, X, W, stride_w2_x, stride_w2_h, stride_p2, VARIES_2,
                DOT, DTYPE, PRECISION, BLOCK_W,
            )  # fmt: skip
        OUTPUTS: tl.constexpr = (
            1 + ((p_w1 is not None) or (p_p1 is not None)) + ((p_w2 is not None) or (p_p2 is not None))
        )
        b_value, b_odds = value_of_tile(b_x, b_0, b_1, b_2, OUTPUTS, VALUE, DATA, SHARED_LOG)
        b_sum += tl.where(m_x[None, :], b_value, 0.0)
        if PRODUCT:
            b_product = odds_of_both(b_product, tl.where(m_x[None, :], b_odds, 0.0))
        elif SHARED_LOG:
            b_sum += tl.where(m_x[None, :], log1p(b_odds), 0.0)
    if PRODUCT:
        b_sum += log1p_of_odds(b_product)
    tl.store(p_out + o_n, FACTOR * tl.sum(b_sum, axis=1), mask=m_k)


def fits(h: Tensor, widths: Sequence[int]) -> bool:
    """Return True if the kernel computes hidden layers of these widths, with input h, in half precision.

    In TF32 it took 1.5 times as long as layer by layer.
    """
    return (
        (h.dtype.itemsize == 2 or INTERPRETED.value)
        and 0 < len(widths) <= MOST_HIDDEN
        and (min(widths) > 0 and max(widths) <= WIDEST and 0 < h.shape[1] <= MOST_LATENTS)
    )


def takes(likelihood: Any, x: Tensor, h: Tensor, layers: Any) -> bool:
    """Return True if the kernel computes these layers, and is faster than products of torch's.

    In another precision, with a heavy likelihood, or with too few samples for a tile, it is slower.
    """
    of_hidden = [t for layer in layers.hidden for t in layer[:2]]
    given = (x, h, *layers.weights, *layers.biases, *layers.constants, *of_hidden)
    products = {h.dtype, *(w.dtype for w in layers.weights), *(layer.weight.dtype for layer in layers.hidden)}
    return (
        len(products) == 1
        and fits(h, [layer.weight.shape[0] for layer in layers.hidden])
        and len(h) >= FEWEST_SAMPLES * len(x) > 0
        and x.shape[1] > 0
        and not is_heavy(likelihood.name)
        and torch.float64 not in {t.dtype for t in given if t is not None}
    )


def _launch(names: tuple[str, ...]) -> tuple[int, int, int]:
    """Return samples of a tile, weights in flight, and warps of a program, by the activations.

    A tile is 256 wide and fits in registers with its activation. On an H200 these are the fastest of 19,
    apart from those that spill (docs/log.md).
    """
    if common.LANES == 64:
        return 32 if "gelu" in names else 64, 1, 8
    if "gelu" in names:
        return 64, 1, 8
    return 64, 3 if len(names) == 1 else 2, 4


@planned
def _rows(x, h, *rest) -> Call:
    weights, fixed_ones, inner = rest[:3], [None, *rest[6:8]], rest[8:11]
    likelihood, names = rest[14:]
    (b, size), k, inputs = x.shape, h.shape[0] // x.shape[0], h.shape[1]
    widths = [u.shape[0] for u in inner if u is not None]
    # Float32 only where products are emulated.
    in_half = h.dtype.itemsize == 2 and not INTERPRETED.value
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[h.dtype] if in_half else tl.float32
    block, stages, warps = _launch(names)
    k_blocks = cdiv(k, block)
    constants = {"HIDDEN": len(widths)}
    for i in range(MOST_HIDDEN):
        name, _, parameter = (names[i] if i < len(names) else "identity").partition(":")
        constants |= {f"A{i}": getattr(activations, name), f"PARAMETER{i}": float(parameter or 0)}
    constants |= {
        **{f"VARIES_{i}": p is not None and p.numel() > 1 for i, p in enumerate(fixed_ones) if i},
        "DOT": dot,
        "DTYPE": tl.float32,
        "PRECISION": "ieee",
        "BLOCK_N": block,
        "BLOCK_V": max(16, power_of_two(inputs)),
        "BLOCK_J": BLOCK_J,
        "BLOCK_U0": max(16, power_of_two(widths[0])),
        "BLOCK_W": max(16, power_of_two(widths[-1])),
        # On AMD two tiles of the output do not fit.
        "BLOCK_X": BLOCK_X // 2 if common.LANES == 64 and weights[1] is not None else BLOCK_X,
        **OPTIONS,
        "num_stages": stages,
    }
    functions = {name: f for name, f in scalar_functions(likelihood.name)[0].items() if name != "PADDING"}
    each = [n for w in weights for n in strides(w, 2)]
    of_fixed = [0 if p is None or p.numel() == 1 else p.stride(0) for p in fixed_ones[1:]]
    of_hidden = [n for u in inner for n in strides(u, 2)]
    sizes = (size, inputs, *widths, *[0] * (MOST_HIDDEN - len(widths)))
    return Call(
        chain_log_prob_kernel,
        (k_blocks * b,),
        (Result((k, b), torch.float32),),
        (k, b, k_blocks, *map(fixed, (*sizes, *strides(x, 2), *h.stride(), *each, *of_fixed, *of_hidden))),
        constants | functions,
        warps,
    )


def chain_log_prob(likelihood: Any, x: Tensor, h: Tensor, layers: Any) -> Tensor:
    """Return log p(x|z) [K, B] of x [B, X] and the hidden layers' input h [K·B, V], sample-major.

    For layers that :func:`takes` accepts: as :func:`fastvae.kernels.head.linear_log_prob`, and the hidden
    layers in ``hidden``.
    """
    none = (None,) * (MOST_HIDDEN - len(layers.hidden))
    weights = [layer.weight for layer in layers.hidden]
    biases = [None if layer.bias is None else layer.bias.contiguous() for layer in layers.hidden]
    names = tuple(layer.activation for layer in layers.hidden)
    tensors = (x, h, *_padded(layers), *weights, *none, *biases, *none)
    return _rows(tensors, (likelihood, names))[0]
