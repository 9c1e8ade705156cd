"""Fused last linear layer and log p(x|z), and the gradients; the layer's output is never stored.

Forward, a program computes tiles of h W' in registers and applies the likelihood there. Backward, blocks of
rows go through torch's product, the likelihood's kernel and two more products while they lie in the L2 cache:
a program that kept a tile of a gradient in registers would recompute the output for every 64 of the layer's
inputs (docs/log.md). Heavy likelihoods, and float64, for which matrix units are not universal, take this
route forward too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import linear

from .common import INTERPRETED, PROGRAMS, accumulator, cdiv, load, strides
from .elementary import log1p
from .launching import Call, Result, fixed, planned
from .likelihood import bound_backward, log_prob, log_prob_backward, value_of_tile
from .likelihood_parameters import MAX_PARAMETERS, is_heavy, scalar_functions
from .reduce import reduce, reduce_backward

# Rows of a tile; its outputs in float32, and in half precision, with several products or with DATA; inputs of
# the layer per step in float32 and in half precision. None of these spills on four architectures.
BLOCK_N, BLOCK_X, BLOCK_FEW, BLOCK_H, BLOCK_HALF = 64, 64, 32, 16, 32
# Two tiles in flight: three take the registers of the sums. Allow all registers, or NVIDIA's assembler spills
# some bytes to use half as many; AMD's has no such limit.
OPTIONS = {"num_stages": 2} if torch.version.hip else {"num_stages": 2, "maxnreg": 255}
# Output elements per block, 16 MiB: with their gradients they fit into a GPU's L2 cache.
BLOCK = 2**22


@triton.jit
def parameter_tile(
    p_h, p_w, p_b, p_fixed, o_n, o_x, m_n, m_x, H, stride_h_n, stride_h_h, stride_w_x, stride_w_h, stride_p,
    VARIES: tl.constexpr, DOT: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Return a tile of a parameter: the layer's output, or a fixed parameter."""
    if p_w is not None:
        b_a = tl.zeros([BLOCK_N, BLOCK_X], dtype=DTYPE)  # [BLOCK_N, BLOCK_X]
        for i_h in range(0, H, BLOCK_H):
            o_h = i_h + tl.arange(0, BLOCK_H)
            m_h = o_h < H
            o_left = o_n[:, None] * stride_h_n + o_h[None, :] * stride_h_h
            b_h = load(p_h, o_left, m_n[:, None] & m_h[None, :], DOT)  # [BLOCK_N, BLOCK_H]
            o_right = o_x[None, :] * stride_w_x + o_h[:, None] * stride_w_h
            b_w = load(p_w, o_right, m_h[:, None] & m_x[None, :], DOT)  # [BLOCK_H, BLOCK_X]
            b_a = tl.dot(b_h, b_w, b_a, input_precision=PRECISION)
        if p_b is not None:
            b_a += load(p_b, o_x, m_x, DTYPE)[None, :]
    elif VARIES:
        b_a = load(p_fixed, o_x * stride_p, m_x, DTYPE)[None, :]  # [1, BLOCK_X]
    else:
        b_a = tl.load(p_fixed).to(DTYPE)
    return b_a


@triton.jit(do_not_specialize=["N", "B", "x_tiles"])
def linear_log_prob_kernel(
    p_x,  # [B, X] data, of any type
    p_h,  # [N, H] input of the layer
    p_w0,  # [X, H] weights of the parameters the layer outputs; None for the others
    p_w1,
    p_w2,
    p_b0,  # [X] biases, or None
    p_b1,
    p_b2,
    p_p1,  # [X] or one number: the fixed parameters
    p_p2,
    p_out,  # [x_splits, N] out, contiguous: partial log-likelihoods
    N,  # rows, K B
    B,  # batch size
    X,  # outputs
    H,  # inputs of the layer
    x_tiles,  # tiles of outputs of one program
    stride_x_b,
    stride_x_x,
    stride_h_n,
    stride_h_h,
    stride_0_x,
    stride_0_h,
    stride_1_x,
    stride_1_h,
    stride_2_x,
    stride_2_h,
    stride_p1,
    stride_p2,
    VARIES_1: tl.constexpr,
    VARIES_2: tl.constexpr,
    VALUE: tl.constexpr,  # the likelihood's functions, see fastvae.kernels.likelihoods
    DATA: tl.constexpr,
    FACTOR: tl.constexpr,
    SHARED_LOG: tl.constexpr,
    DOT: tl.constexpr,  # dtype of the products' operands
    DTYPE: tl.constexpr,  # dtype of the computation
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Compute log p(x|z); one program per block of rows, and split of the outputs."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_b = o_n % B
    x_start = tl.program_id(1) * x_tiles * BLOCK_X
    x_stop = tl.minimum(x_start + x_tiles * BLOCK_X, X)
    b_sum = tl.zeros([BLOCK_N], dtype=DTYPE)  # [BLOCK_N]
    for i_x in range(x_start, x_stop, BLOCK_X):
        o_x = tl.arange(0, BLOCK_X).to(tl.int64) + i_x
        m_x = o_x < X
        mask = m_n[:, None] & m_x[None, :]
        b_x = load(p_x, o_b[:, None] * stride_x_b + o_x[None, :] * stride_x_x, mask, DTYPE)
        b_0 = parameter_tile(
            p_h, p_w0, p_b0, None, o_n, o_x, m_n, m_x, H, stride_h_n, stride_h_h, stride_0_x, stride_0_h, 0,
            0, DOT, DTYPE, PRECISION, BLOCK_N, BLOCK_X, BLOCK_H,
        )  # fmt: skip
        b_1, b_2 = b_0, b_0
        if (p_w1 is not None) or (p_p1 is not None):
            b_1 = parameter_tile(
                p_h, p_w1, p_b1, p_p1, o_n, o_x, m_n, m_x, H, stride_h_n, stride_h_h, stride_1_x, stride_1_h,
                stride_p1, VARIES_1, DOT, DTYPE, PRECISION, BLOCK_N, BLOCK_X, BLOCK_H,
            )  # fmt: skip
        if (p_w2 is not None) or (p_p2 is not None):
            b_2 = parameter_tile(
                p_h, p_w2, p_b2, p_p2, o_n, o_x, m_n, m_x, H, stride_h_n, stride_h_h, stride_2_x, stride_2_h,
                stride_p2, VARIES_2, DOT, DTYPE, PRECISION, BLOCK_N, BLOCK_X, BLOCK_H,
            )  # fmt: skip
        OUTPUTS: tl.constexpr = (
            1 + ((p_w1 is not None) or (p_p1 is not None)) + ((p_w2 is not None) or (p_p2 is not None))
        )
        b_value, b_odds = value_of_tile(b_x, b_0, b_1, b_2, OUTPUTS, VALUE, DATA, SHARED_LOG)
        if SHARED_LOG:
            b_value += log1p(b_odds)
        b_sum += tl.sum(tl.where(mask, b_value, 0.0), axis=1)
    tl.store(p_out + tl.program_id(1).to(tl.int64) * N + o_n, FACTOR * b_sum, mask=m_n)


def _is_exact() -> bool:
    """Return True if torch's settings exclude TF32 from products."""
    return torch.get_float32_matmul_precision() == "highest" or bool(torch.version.hip)


def _constants(
    likelihood: Any, h: Tensor, weights: list[Any], parameters: list[Any], exact: bool
) -> tuple[dict[str, Any], int]:
    """Return the kernel's compile-time arguments, and the warps of a program."""
    dtypes = {h.dtype, *(w.dtype for w in weights if w is not None)}
    (half, *more) = dtypes
    in_half = not more and half.itemsize == 2 and not INTERPRETED.value
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[half] if in_half else tl.float32
    few = in_half or sum(w is not None for w in weights) > 1 or likelihood.data is not None
    constants = {
        **{f"VARIES_{i}": p is not None and p.numel() > 1 for i, p in enumerate(parameters) if i},
        "DOT": dot,
        "DTYPE": tl.float32,
        "PRECISION": "ieee" if exact else "tf32",
        "BLOCK_N": BLOCK_N,
        "BLOCK_X": BLOCK_FEW if few else BLOCK_X,
        "BLOCK_H": BLOCK_HALF if in_half else BLOCK_H,
        **OPTIONS,
    }
    # With 128 threads, each would need more registers than there are.
    return constants, 8


def _numbers(x: Tensor, h: Tensor, weights: list[Any], parameters: list[Any]) -> tuple[Any, ...]:
    """Return the strides of x, h, the weights and the fixed parameters."""
    each = [n for w in weights for n in strides(w, 2)]
    stride_of_each = [0 if p is None or p.numel() == 1 else p.stride(0) for p in parameters[1:]]
    return tuple(map(fixed, (*strides(x, 2), *h.stride(), *each, *stride_of_each)))


def _sizes(x: Tensor, h: Tensor) -> tuple[Any, ...]:
    return h.shape[0], x.shape[0], fixed(x.shape[1]), fixed(h.shape[1])


@planned
def _rows(x, h, *rest) -> Call:
    weights, parameters, (likelihood, exact) = list(rest[:3]), [None, *rest[6:8]], rest[8:]
    (b, size), n = x.shape, h.shape[0]
    constants, warps = _constants(likelihood, h, weights, parameters, exact)
    blocks, tiles = cdiv(n, BLOCK_N), cdiv(size, constants["BLOCK_X"])
    x_tiles = max(1, cdiv(tiles, max(1, PROGRAMS // blocks)))
    splits = cdiv(tiles, x_tiles)
    functions = {name: f for name, f in scalar_functions(likelihood.name)[0].items() if name != "PADDING"}
    return Call(
        linear_log_prob_kernel,
        (blocks, splits),
        (Result((n // b, b), torch.float32, splits),),
        (*_sizes(x, h), x_tiles, *_numbers(x, h, weights, parameters)),
        constants | functions,
        warps,
    )


def _padded(layers: Any) -> tuple[Any, ...]:
    """Return, padded with None: weights, biases, and the fixed second and third parameters."""
    count = len(layers.weights)
    none = (None,) * (MAX_PARAMETERS - count)
    all_parameters = [*[None] * count, *layers.constants, *none[len(layers.constants) :]]
    biases = [b if b is None else b.contiguous() for b in layers.biases]
    return *layers.weights, *none, *biases, *none, *all_parameters[1:]


def _dtype(x: Tensor, h: Tensor, layers: Any) -> torch.dtype:
    """Return the dtype of the computation."""
    given = (*layers.weights, *layers.biases, *layers.constants)
    return accumulator(x, h, *(t for t in given if t is not None))


def linear_log_prob(likelihood: Any, x: Tensor, h: Tensor, layers: Any) -> Tensor:
    """Return log p(x|z) [K, B] of x [B, X] and h [K·B, H], sample-major.

    ``layers`` has the weights [X, H] and biases ([X] or None) of the first parameters, which the layer
    outputs, and in ``constants`` the fixed others, each a row [X] or one number.
    """
    is_empty = not (x.numel() and h.numel())
    if not (is_heavy(likelihood.name) or is_empty or _dtype(x, h, layers) == torch.float64):
        return _rows((x, h, *_padded(layers)), (likelihood, _is_exact()))[0]
    walk = _Walk(x, h, layers)
    out = walk.rows.new_empty(walk.rows.shape[:2], dtype=walk.dtype)
    for block in walk.blocks():
        outputs, _ = walk.outputs(block)
        out[block] = log_prob(likelihood, x[block[1]], None, *outputs, *walk.parameters)
    return out


def linear_log_prob_backward(
    likelihood: Any, grad: Tensor, x: Tensor, h: Tensor, layers: Any, need: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Return the gradients of (h, *weights, *biases, *constants) in the order of ``need``, or None.

    Sums over rows are accumulated in float32, or float64.
    """
    walk = _Walk(x, h, layers)
    sums = _Sums(walk, h, layers, need)
    for block in walk.blocks():
        outputs, wide = walk.outputs(block)
        upstream = grad[block].contiguous()
        _, *grads = log_prob_backward(
            likelihood, upstream, x[block[1]], None, *outputs, *walk.parameters, sums.need
        )
        sums.add(block, wide, grads)
    return sums.results()


def reduce_linear(
    likelihood: Any,
    x: Tensor,
    h: Tensor,
    layers: Any,
    term: Tensor | None,
    beta: Tensor | None,
    how: Any,
    need: tuple[bool, ...],
) -> tuple[Any, ...]:
    """Return the bound, the weights, and the gradients of (h, *weights, *biases, *constants).

    The gradients are those for an upstream gradient of 1. A block has all samples of some rows, so that its
    weights are known while its output lies in the cache: three products, where a backward pass of its own
    would compute the output again. (Hsu et al., Liger Kernel, 2024.)
    """
    walk = _Walk(x, h, layers)
    sums, (samples, batch) = _Sums(walk, h, layers, need), walk.rows.shape[:2]
    every = how._replace(reduction="none")
    bound = walk.rows.new_empty(batch, dtype=walk.dtype)
    weights = walk.rows.new_empty((samples, batch), dtype=walk.dtype) if how.over == "log_mean_exp" else None
    arrives = bound.new_full((), 1 / batch if how.reduction == "mean" else 1.0)
    for block in walk.blocks(whole=True):
        rows = block[1]
        outputs, wide = walk.outputs(block)
        parameters, some = (*outputs, *walk.parameters), x[rows]
        own_term = term if term is None else term[..., rows]
        own_beta = beta[rows] if beta is not None and beta.dim() else beta
        found = log_prob(likelihood, some, None, *parameters)
        bound[rows], _, own = reduce(found, own_term, own_beta, every, False)
        if weights is not None:
            weights[:, rows] = own
        grads = bound_backward(
            likelihood, (arrives, None, own), some, None, parameters, own_beta, every, sums.need, 0
        )
        if grads is None:
            size = rows.stop - rows.start
            upstream, _ = reduce_backward(arrives.expand(size), None, own, own_beta, every, samples, size, 0)
            grads = log_prob_backward(likelihood, upstream, some, None, *parameters, sums.need)
        sums.add(block, wide, grads[1 : 1 + len(parameters)])
    total = bound.mean() if how.reduction == "mean" else bound.sum()
    return total, weights, *sums.results()


class _Sums:
    """Gradients of (h, *weights, *biases, *constants), accumulated over blocks."""

    def __init__(self, walk: _Walk, h: Tensor, layers: Any, need: tuple[bool, ...]):
        count = len(layers.weights)
        self.walk, self.like = walk, (h, *layers.weights, *layers.biases, *layers.constants)
        self.sums = [
            torch.zeros_like(t, dtype=walk.dtype) if n and t is not None else None
            for t, n in zip(self.like, need, strict=True)
        ]
        self.to_h = None if self.sums[0] is None else self.sums[0].view(walk.rows.shape)
        self.to_weights, self.to_biases = self.sums[1 : 1 + count], self.sums[1 + count : 1 + 2 * count]
        self.to_parameters = self.sums[1 + 2 * count :]
        # Gradients of (x, *outputs, *constants) that a block needs.
        pairs = zip(self.to_weights, self.to_biases, strict=True)
        self.need = [
            False,
            *(self.to_h is not None or w is not None or b is not None for w, b in pairs),
            *(t is not None for t in self.to_parameters),
        ]

    def add(self, block: tuple[slice, slice], wide: Tensor, grads: Sequence[Tensor | None]) -> None:
        """Add a block's part, from the gradients of its outputs and constants."""
        count = len(self.to_weights)
        for j, g in enumerate(grads[:count]):
            if g is None:
                continue
            flat = g.flatten(0, 1)
            if self.to_h is not None:
                self.to_h[block] += (flat @ self.walk.layers[j][0]).view(self.to_h[block].shape)
            if self.to_weights[j] is not None:
                self.to_weights[j].addmm_(flat.mT, wide)
            if self.to_biases[j] is not None:
                self.to_biases[j] += flat.sum(0)
        for total, g in zip(self.to_parameters, grads[count:], strict=True):
            if total is not None:
                total += g.reshape(total.shape)

    def results(self) -> tuple[Tensor | None, ...]:
        return tuple(None if r is None else r.to(t.dtype) for r, t in zip(self.sums, self.like, strict=True))


class _Walk:
    """Iteration over blocks of the layer's input [K, B, H], in the dtype of the computation."""

    def __init__(self, x: Tensor, h: Tensor, layers: Any):
        self.dtype = _dtype(x, h, layers)
        self.rows = h.unflatten(0, (-1, x.shape[0])) if x.shape[0] else h.new_empty(0, 0, h.shape[1])
        self.layers = [
            (w.to(self.dtype), None if b is None else b.to(self.dtype))
            for w, b in zip(layers.weights, layers.biases, strict=True)
        ]
        self.parameters = [p.reshape(1, 1, -1).to(self.dtype) for p in layers.constants]
        self.width = x.shape[1] * len(self.layers)

    def outputs(self, block: tuple[slice, slice]) -> tuple[list[Tensor], Tensor]:
        """Return each output [K', B', X] of a block, and its inputs [K'·B', H]."""
        rows = self.rows[block]
        wide = rows.flatten(0, 1).to(self.dtype)
        return [linear(wide, w, b).unflatten(0, rows.shape[:2]) for w, b in self.layers], wide

    def blocks(self, whole: bool = False) -> Iterator[tuple[slice, slice]]:
        """Yield slices of samples and of the batch with about BLOCK output elements.

        Blocks are ``whole`` if they have all samples of their rows, however many these are.
        """
        samples, batch, _ = self.rows.shape
        limit = max(1, BLOCK // max(1, self.width * (samples if whole else 1)))
        block_rows = max(1, min(batch, limit))
        block_samples = max(1, samples if whole else limit // block_rows)
        for b in range(0, batch, block_rows):
            for k in range(0, samples, block_samples):
                yield slice(k, k + block_samples), slice(b, min(b + block_rows, batch))
