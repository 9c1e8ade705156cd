"""Gradients of a likelihood where none is summed: stretches of memory, whatever the rows.

Those of a bound are computed in the same launch: a row's gradient from that of its bound, and the term's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .common import LAUNCH, accumulator, cdiv, event_offsets, load, power_of_two, store, strides, triton_dtype
from .launching import Call, Result, fixed, planned
from .likelihood_parameters import (
    ALONG_X,
    FULL,
    MAX_PARAMETERS,
    NONE,
    all_parameters,
    launching_of,
    observed,
    scalar_functions,
    varies_along,
)
from .reduce import bound_gradient, on_device, sample_gradient, term_factor, unit_of

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


@triton.jit(do_not_specialize=["coefficient", "K", "G"])
def log_prob_flat_backward_kernel(
    p_grad,  # [K, B] gradient of the log-likelihood; with OF_BOUND [B] that of the bound, or [] with stride 0
    p_x,  # [B, X] data, of any type
    p_mask,  # [B, X] bool, True where x was observed, or None
    p_p0,  # [K, B, X] the parameters, contiguous; the others may also be one row, one number or None
    p_p1,
    p_p2,
    p_weights,  # [K, B] contiguous, weights in the bound, or None for 1 / K
    p_beta,  # [B], or [] with stride 0: a factor of the term, or None for 1
    p_grad_x,  # None
    p_grad_p0,  # [K, B, X] out, contiguous, or None where not needed
    p_grad_p1,
    p_grad_p2,
    p_grad_term,  # [K, B] out, contiguous: gradient of a term per sample, or None
    p_grad_kl,  # [B] out: gradient of a term shared by all samples, or None
    coefficient,  # the bits of a further factor of the term, where UNIT is 0
    K,  # samples
    G,  # groups of VECTOR pixels of a sample, B * X / VECTOR
    X,  # pixels, a multiple of VECTOR
    stride_grad_k,
    stride_grad_b,
    stride_x_b,
    stride_x_x,
    stride_mask_b,
    stride_mask_x,
    stride_beta,
    OF_BOUND: tl.constexpr,  # upstream is the gradient of a bound: "none", "rows", or "mean" for their mean
    UNIT: tl.constexpr,  # the further factor if it is 1 or -1, else 0
    TINY: tl.constexpr,  # the smallest normal number of the computation
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
    if OF_BOUND == "none":
        b_g = load(p_grad, o_k * stride_grad_k + o_b * stride_grad_b, mask, DTYPE)  # [BLOCK_K, BLOCK_G, 1]
    else:
        B = G // (X // VECTOR)
        b_bound = bound_gradient(p_grad, o_b, m_g, B, stride_grad_b, OF_BOUND == "mean", DTYPE)
        b_g = sample_gradient(p_weights, b_bound, o_k, o_b, mask, K, B, TINY, DTYPE)
        b_factor = term_factor(p_beta, coefficient, o_b, m_g, stride_beta, UNIT, DTYPE)
        m_first = mask & (o_g - o_b * (X // VECTOR) == 0)
        if p_grad_term is not None:
            store(p_grad_term, o_k * B + o_b, b_factor * b_g + tl.zeros(mask.shape, dtype=DTYPE), m_first)
        if p_grad_kl is not None:
            b_kl = b_factor * b_bound + tl.zeros(mask.shape, dtype=DTYPE)
            store(p_grad_kl, o_b + 0 * o_k, b_kl, m_first & (o_k == 0))
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


class Bound(NamedTuple):
    """A bound whose upstream gradient is given: of the mean over the batch, and the term of its samples.

    Attributes:
        of_mean: the upstream gradient is that of the mean over the batch.
        unit: factor of the term, see :func:`fastvae.kernels.reduce.unit_of`.
        term_axes: 2 for a term [K, B], 1 for [B], 0 for none.
    """

    of_mean: bool
    unit: float
    term_axes: int


def flat_gradients(
    grad, x, mask, parameters, likelihood, needed, bound: Bound | None = None, beta=None
) -> Call:
    k, b, size = parameters[0].shape
    dtype = accumulator(x, *(p for p in parameters if p is not None))
    # Up to 16 bytes, one load, and a divisor of the row.
    vector = min(size & -size, 16 // parameters[0].element_size())
    block_k = min(power_of_two(k), SAMPLES_FLAT)
    launching = launching_of(likelihood, True)
    groups, block_g = b * size // vector, launching.tile // (block_k * vector)
    results: list[Result | None] = [
        Result((k, b, size), p.dtype) if n else None for p, n in zip(parameters, needed, strict=True)
    ]
    axes = 0 if bound is None else bound.term_axes
    results += [Result((k, b), dtype) if axes == 2 else None, Result((b,), dtype) if axes == 1 else None]
    grad_strides = strides(grad, 2) if bound is None else (0, *strides(grad, 1)) if grad.dim() else (0, 0)
    stride_beta = beta.stride(0) if beta is not None and beta.dim() else 0
    return Call(
        log_prob_flat_backward_kernel,
        (cdiv(groups, block_g), cdiv(k, block_k)),
        (None, *results),
        (
            *((0,) if bound is None else ()),
            *(k, groups, fixed(size), *grad_strides),
            *(*map(fixed, (*strides(x, 2), *strides(mask, 2))), stride_beta),
        ),
        {
            "OF_BOUND": "none" if bound is None else "mean" if bound.of_mean else "rows",
            "UNIT": 1.0 if bound is None else bound.unit,
            "TINY": torch.finfo(dtype).tiny,
            **{f"VARIES_{i}": varies_along(p) for i, p in enumerate(parameters) if i},
            "GRADIENT": scalar_functions(likelihood.name)[1]["GRADIENT"],
            "INSIDE": float(likelihood.inside),
            "DTYPE": triton_dtype(dtype),
            "VECTOR": vector,
            "BLOCK_K": block_k,
            "BLOCK_G": block_g,
        },
        launching.warps(dtype),
        # Without a bound, neither weights nor beta are given.
        sum(p is None for p in parameters) + 2 if bound is None else 0,
    )


@planned
def _of_bound(grad_bound, x, mask, p_0, p_1, p_2, weights, beta, likelihood, needed, bound) -> Call:
    return flat_gradients(grad_bound, x, mask, (p_0, p_1, p_2), likelihood, needed, bound, beta)


def bound_backward(
    likelihood: Any,
    upstream: tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None],
    x: torch.Tensor,
    mask: torch.Tensor | None,
    parameters: Sequence[torch.Tensor],
    beta: torch.Tensor | None,
    how: Any,
    need: Sequence[bool],
    term_axes: int,
) -> tuple[torch.Tensor | None, ...] | None:
    """Return the gradients of (x, *parameters, term) of a bound by one launch, None if that does not apply.

    Args:
        likelihood: the declared likelihood.
        upstream: gradients of the bound and of the mean log-likelihood, and the weights, or None each.
        x: data [B, X].
        mask: bool [B, X], True where x was observed, or None.
        parameters: [K, B, X], the others broadcast to it.
        beta: factor of the term, [B] or [], or None for 1.
        how: the reduction (:class:`fastvae.ops.reduce.BoundReduction`).
        need: which of (x, *parameters) need a gradient.
        term_axes: number of the term's axes if it needs a gradient, else 0.
    """
    grad_bound, grad_mean, weights = upstream
    needed = (*need[1:], *[False] * (MAX_PARAMETERS - len(parameters)))
    layouts = [FULL.value if n else NONE.value for n in needed]
    if (
        grad_bound is None
        or grad_mean is not None
        or not any(needed)
        or parameters[0].numel() == 0
        or (term_axes == 1 and weights is not None)
        or any(n and p.shape != parameters[0].shape for p, n in zip(parameters, need[1:], strict=True))
        or not is_flat(all_parameters(tuple(parameters)), layouts, need[0])
    ):
        return None
    unit, bits = unit_of(how)
    bound = Bound(how.reduction == "mean", unit, term_axes)
    weights = weights if weights is None else weights.contiguous()
    every = all_parameters(tuple(parameters))
    tensors = grad_bound, x, mask, *every, weights, on_device(beta, grad_bound)
    results = _of_bound(tensors, (likelihood, needed, bound), (bits,))
    grads, (grad_term, grad_kl) = results[1 : 1 + len(parameters)], results[-2:]
    return None, *grads, grad_kl if grad_term is None else grad_term
