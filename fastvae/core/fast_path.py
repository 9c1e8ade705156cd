"""Fast-path checks before each kernel call.

They accept the usual arguments at once; whatever fails them is validated argument by argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backend as _backend
from .checks import FLOATING, checks_data, is_dense
from .torch_private import (
    dispatch_mode_depth,
    forward_ad_is_active,
    functorch_is_active,
    is_functorch_wrapped,
    is_legacy_batched,
    tracing_state,
)

ON_CPU, ON_GPU, WANTED = 1, 2, 4
PLACES = ON_CPU | ON_GPU
_PLAIN = (torch.Tensor, torch.nn.Parameter)


def in_eager_mode() -> bool:
    """Return True outside transforms, dispatch modes, tracing and forward-mode AD."""
    return not (
        functorch_is_active()
        or dispatch_mode_depth()
        or tracing_state() is not None
        or forward_ad_is_active()
    )


def is_native(x: Any) -> bool:
    """Return True for data on the CPU or on a GPU if the native backend takes them unread.

    With FASTVAE_CHECK the values of x on a GPU are read, off the fast path.
    """
    if not isinstance(x, Tensor):
        return False
    if x.is_cpu:
        return _backend.on_cpu() == "native"
    return x.is_cuda and _backend.is_native_on_gpu(x.device) and not checks_data()


def is_usual(t: Any, gpu: torch.device | None = None) -> bool:
    """Return True for a plain, dense, floating-point tensor on the CPU, or on ``gpu``."""
    return (
        type(t) in _PLAIN
        and (t.is_cpu if gpu is None else t.device == gpu)
        and t.dtype in FLOATING
        and t.layout is torch.strided
        and not (t.is_nested or t.is_neg() or is_functorch_wrapped(t))
    )


def plain(tensors: Sequence[Tensor | None]) -> int:
    """Return ``ON_CPU`` or ``ON_GPU``, plus ``WANTED`` if a tensor requires a gradient; 0 off the fast path.

    The fast path requires plain tensors in eager mode: no transform, dispatch mode, tracing, forward-mode AD,
    tensor subclass or mixed devices.
    """
    if not in_eager_mode():
        return 0
    found = 0
    for t in tensors:
        if t is None:
            continue
        # Tensors saved by torch.func.vjp are still wrapped when its function is called outside the transform.
        # Only the dispatcher resolves lazily negated views.
        if type(t) not in _PLAIN or is_functorch_wrapped(t) or is_legacy_batched(t):
            return 0
        if t.is_neg() or not (t.is_cpu or t.is_cuda):
            return 0
        found |= (ON_CPU if t.is_cpu else ON_GPU) | (WANTED if t.requires_grad else 0)
    # The seed of GPU tensors must be on the GPU, too, so mixed devices go to full validation.
    return 0 if found & ON_CPU and found & ON_GPU else found


def _is_tensor(value: Any) -> bool:
    """Return True for a plain tensor or parameter; under a compiler, which has subclasses, for any."""
    return type(value) in _PLAIN or (torch.compiler.is_compiling() and isinstance(value, Tensor))


def are_rows(mu: Any, logvar: Any) -> bool:
    """Return True if (mu, logvar) are common: dense tensors [B, D] of one floating dtype and device."""
    if not (isinstance(mu, Tensor) and isinstance(logvar, Tensor)):
        return False
    # Without a function's call for each property, which would cost more than they do.
    return (
        mu.layout is torch.strided
        and logvar.layout is torch.strided
        and not (mu.is_nested or logvar.is_nested)
        and mu.dim() == 2
        and mu.shape == logvar.shape
        and mu.dtype == logvar.dtype
        and mu.dtype in FLOATING
        and mu.device == logvar.device
    )


def are_batch(x: Any, mu: Any, logvar: Any) -> bool:
    """Return True if x [B, *event] and a pair [B, D] are common; False means that they need validation."""
    return (
        _is_tensor(x)
        and _is_tensor(mu)
        and _is_tensor(logvar)
        and is_dense(x)
        and are_rows(mu, logvar)
        and x.dim() > 0
        and x.shape[0] == mu.shape[0]
        and x.dtype in FLOATING
        and x.device == mu.device
    )


def are_outputs(x: Tensor, samples: int, parameters: tuple[Any, ...]) -> bool:
    """Return True if x is [B, X], not empty, and the decoder's outputs are [K·B, X] on its device."""
    if x.dim() != 2 or not x.numel():
        return False
    shape = (samples * x.shape[0], x.shape[1])
    for p in parameters:
        if not (
            _is_tensor(p)
            and is_dense(p)
            and p.shape == shape
            and p.dtype in FLOATING
            and p.device == x.device
        ):
            return False
    return True
