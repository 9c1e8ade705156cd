"""Gradients of a likelihood where none is summed: stretches of memory, whatever the rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .common import LAUNCH, accumulator, cdiv, event_offsets, load, power_of_two, store, strides, triton_dtype
from .launching import Call, Result, fixed
from .likelihood_parameters import ALONG_X, FULL, NONE, launching_of, observed, scalar_functions, varies_along

# Samples per program, sharing x, where no gradient is summed.
SAMPLES_FLAT = 2


@triton.jit
def load_flat(p_p, o_flat, o_x, mask, m_x, VARIES: tl.constexpr, DTYPE: tl.constexpr):
    """Load a parameter that lies in memory like the first, or is one row or one number."""
    if VARIES == ALONG_X:
        b_p = load(p_p, o_x, m_x, DTYPE)
    elif VARIES == 0:
        b_p = tl.load(p_p).to(DTYPE)
    else:
        b_p = load(p_p, o_flat, mask, DTYPE)
    return b_p


@triton.jit(do_not_specialize=["K", "G"])
def log_prob_flat_backward_kernel(
    p_grad,  # [K, B] gradient of the log-likelihood
    p_x,  # [B, X] data, of any type
    p_mask,  # [B, X] bool, True where x was observed, or None
    p_p0,  # [K, B, X] the parameters, contiguous; the others may also be one row, one number or None
    p_p1,
    p_p2,
    p_grad_x,  # None
    p_grad_p0,  # [K, B, X] out, contiguous, or None where not needed
    p_grad_p1,
    p_grad_p2,
    K,  # samples
    G,  # groups of VECTOR pixels of a sample, B * X / VECTOR
    X,  # pixels, a multiple of VECTOR
    stride_grad_k,
    stride_grad_b,
    stride_x_b,
    stride_x_x,
    stride_mask_b,
    stride_mask_x,
    VARIES_1: tl.constexpr,
    VARIES_2: tl.constexpr,
    GRADIENT: tl.constexpr,  # the likelihood's function, see fastvae.kernels.likelihoods
    INSIDE: tl.constexpr,  # an x in the support
    DTYPE: tl.constexpr,  # dtype of the computation: float32 or float64
    VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Compute the gradients where none is summed; one program per stretch of memory of a few samples.

    Row boundaries do not matter then, and long contiguous stretches use more of the memory bandwidth.
    """
    o_k = event_offsets(tl.program_id(1) * BLOCK_K, BLOCK_K, 0)  # [BLOCK_K, 1, 1]
    o_g = tl.program_id(0) * BLOCK_G + tl.arange(0, BLOCK_G)[None, :, None]  # [1, BLOCK_G, 1], within 2^31
    m_g = o_g < G
    mask = m_g & (o_k < K)
    o_vector = tl.arange(0, VECTOR)[None, None, :]  # [1, 1, VECTOR]
    o_b = o_g // (X // VECTOR)
    o_x = (o_g - o_b * (X // VECTOR)) * VECTOR + o_vector  # [1, BLOCK_G, VECTOR]
    o_b = o_b.to(tl.int64)
    b_g = load(p_grad, o_k * stride_grad_k + o_b * stride_grad_b, mask, DTYPE)  # [BLOCK_K, BLOCK_G, 1]
    b_x = load(p_x, o_b * stride_x_b + o_x * stride_x_x, m_g, DTYPE)  # [1, BLOCK_G, VECTOR]
    if p_mask is not None:
        o_mask = o_b * stride_mask_b + o_x * stride_mask_x
        b_x, m_seen = observed(p_mask, o_mask, b_x, m_g, INSIDE)
    o_flat = o_k * G * VECTOR + (o_g * VECTOR + o_vector)
    b_0 = load(p_p0, o_flat, mask, DTYPE)
    if p_p1 is not None:
        b_1 = load_flat(p_p1, o_flat, o_x, mask, m_g, VARIES_1, DTYPE)
    if p_p2 is not None:
        b_2 = load_flat(p_p2, o_flat, o_x, mask, m_g, VARIES_2, DTYPE)
    if p_p1 is None:
        b_grads = GRADIENT(b_g, b_x, b_0)
    elif p_p2 is None:
        b_grads = GRADIENT(b_g, b_x, b_0, b_1)
    else:
        b_grads = GRADIENT(b_g, b_x, b_0, b_1, b_2)
    if p_grad_p0 is not None:
        b_to_0 = b_grads[1]
        if p_mask is not None:
            b_to_0 = tl.where(m_seen, b_to_0, 0.0)
        store(p_grad_p0, o_flat, b_to_0, mask)
    if p_grad_p1 is not None:
        b_to_1 = b_grads[2]
        if p_mask is not None:
            b_to_1 = tl.where(m_seen, b_to_1, 0.0)
        store(p_grad_p1, o_flat, b_to_1, mask)
    if p_grad_p2 is not None:
        b_to_2 = b_grads[3]
        if p_mask is not None:
            b_to_2 = tl.where(m_seen, b_to_2, 0.0)
        store(p_grad_p2, o_flat, b_to_2, mask)


def is_flat(parameters: tuple[torch.Tensor | None, ...], layouts: list[int], need_x: bool) -> bool:
    """Return True if :func:`log_prob_flat_backward_kernel` applies.

    No gradient is summed, parameters that vary by sample and row lie in memory like the first, and 31 bits
    index one sample of it.
    """
    first, *others = parameters
    return (
        not need_x
        and set(layouts) <= {NONE.value, FULL.value}
        and first.is_contiguous()
        and first.shape[1] * first.shape[2] < 2**31 - LAUNCH["likelihood_backward"].tile
        # The limit of the grid's second axis.
        and first.shape[0] <= 65535 * SAMPLES_FLAT
        and all(
            p is None
            or (p.shape == first.shape and p.is_contiguous())
            or (layout == NONE.value and varies_along(p) in (0, ALONG_X.value) and strides(p, 3)[2] in (0, 1))
            for p, layout in zip(others, layouts[1:], strict=True)
        )
    )


def flat_gradients(grad, x, mask, parameters, likelihood, needed) -> Call:
    k, b, size = parameters[0].shape
    dtype = accumulator(x, *(p for p in parameters if p is not None))
    # Up to 16 bytes, one load, and a divisor of the row.
    vector = min(size & -size, 16 // parameters[0].element_size())
    block_k = min(power_of_two(k), SAMPLES_FLAT)
    launching = launching_of(likelihood, True)
    groups, block_g = b * size // vector, launching.tile // (block_k * vector)
    results = [Result((k, b, size), p.dtype) if n else None for p, n in zip(parameters, needed, strict=True)]
    return Call(
        log_prob_flat_backward_kernel,
        (cdiv(groups, block_g), cdiv(k, block_k)),
        (None, *results),
        (k, groups, fixed(size), *strides(grad, 2), *map(fixed, (*strides(x, 2), *strides(mask, 2)))),
        {
            **{f"VARIES_{i}": varies_along(p) for i, p in enumerate(parameters) if i},
            "GRADIENT": scalar_functions(likelihood.name)[1]["GRADIENT"],
            "INSIDE": float(likelihood.inside),
            "DTYPE": triton_dtype(dtype),
            "VECTOR": vector,
            "BLOCK_K": block_k,
            "BLOCK_G": block_g,
        },
        launching.warps(dtype),
        sum(p is None for p in parameters),
    )
