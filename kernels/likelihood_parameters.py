"""Parameters and functions of a likelihood as its kernels take them."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
import triton
import triton.language as tl

from .common import LAUNCH, Launch, strides
from .launching import fixed

MAX_PARAMETERS = 3
# Layout of a parameter's gradient: none, one per element, one per pixel, or one per row.
NONE, FULL, COLUMN, ROW = (tl.constexpr(i) for i in range(4))
# Bits of VARIES, the axes along which a parameter has more than one value.
ALONG_K, ALONG_B, ALONG_X, ALONG_ALL = (tl.constexpr(i) for i in (1, 2, 4, 7))


@triton.jit
def observed(p_mask, o_mask, b_x, mask, INSIDE: tl.constexpr):
    """Return x with INSIDE where it was not observed, and where it was."""
    m_seen = tl.load(p_mask + o_mask, mask=mask, other=0) != 0  # a bool is a byte
    return tl.where(m_seen, b_x, INSIDE), m_seen


@functools.cache
def is_heavy(name: str) -> bool:
    """Return True if the likelihood takes much arithmetic per element."""
    return getattr(importlib.import_module(f"{__package__}.likelihoods.{name}"), "HEAVY", False)


def launching_of(likelihood: Any, backward: bool, masked: bool = False) -> Launch:
    """Return the launch parameters of a likelihood."""
    if is_heavy(likelihood.name):
        return LAUNCH["likelihood_heavy"]
    # Quantities computed from the data take registers, and so does a second parameter: a larger tile leaves
    # room for fewer programs that wait for memory.
    three = len(likelihood.outputs) == MAX_PARAMETERS
    many = likelihood.data is not None or len(likelihood.outputs) > 1
    if three and masked and not backward:
        return LAUNCH["likelihood_masked"]
    return LAUNCH["likelihood_backward" if backward or many else "likelihood"]


@functools.cache
def scalar_functions(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a likelihood's functions and constants for the forward and for the backward pass."""
    module = importlib.import_module(f"{__package__}.likelihoods.{name}")
    forward = {
        "VALUE": module.value,
        "DATA": getattr(module, "data", None),
        "FACTOR": getattr(module, "FACTOR", 1.0),
        "SHARED_LOG": getattr(module, "SHARED_LOG", False),
        "PADDING": getattr(module, "PADDING", None),
    }
    return forward, {"GRADIENT": module.gradient, "FINITE": getattr(module, "FINITE", False)}


def all_parameters(parameters: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor | None, ...]:
    return *parameters, *(None,) * (MAX_PARAMETERS - len(parameters))


def varies_along(parameter: torch.Tensor | None) -> int:
    """Return the bit mask of axes with a nonzero stride, that is neither broadcast nor expanded."""
    return sum((s != 0) << i for i, s in enumerate(strides(parameter, 3)))


def described(parameters: tuple[torch.Tensor | None, ...]) -> tuple:
    """Return the kernels' arguments for the parameters: strides, and the axes along which each varies."""
    numbers = [n for p in parameters for n in _fixed_strides(p)]
    # The first is loaded along all axes: beyond the bounds it is PADDING.
    return numbers, {f"VARIES_{i}": varies_along(p) for i, p in enumerate(parameters) if i}


def _fixed_strides(tensor: torch.Tensor | None) -> tuple[Any, ...]:
    """Return the strides, fixed for row and pixel; the sample's changes with the batch."""
    first, *others = strides(tensor, 3)
    return first, *map(fixed, others)
