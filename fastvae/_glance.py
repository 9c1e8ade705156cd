"""What is asked of every call before its kernel: in C++ where the extension is there (csrc/glance.hpp).

Where models are small, asking in Python costs more than the kernels. A compiler cannot look into the C++:
under ``torch.compiler.is_compiling()`` use those ``_in_python``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import _C, Tensor
from torch.autograd import forward_ad

from ._checks import FLOATING, is_dense

ON_CPU, ON_GPU, WANTED = 1, 2, 4
PLACES = ON_CPU | ON_GPU
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_is_wrapped = _C._functorch.is_functorch_wrapped_tensor


def plain_in_python(tensors: Sequence[Tensor | None]) -> int:
    """Where these tensors lie, ``ON_CPU`` or ``ON_GPU``, if nothing but eager mode stands between them and a
    kernel, else 0; and ``WANTED`` if one of them requires a gradient.
    """
    if (
        _C._are_functorch_transforms_active()
        or _C._len_torch_dispatch_stack()
        or _C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
    ):
        return 0
    found = 0
    for t in tensors:
        if t is None:
            continue
        # What torch.func.vjp saved is still wrapped when its function is called, outside of the transform.
        # A view that is negative lazily is for the dispatcher to resolve.
        if type(t) not in _PLAIN or _is_wrapped(t) or t.is_neg() or not (t.is_cpu or t.is_cuda):
            return 0
        found |= (ON_CPU if t.is_cpu else ON_GPU) | (WANTED if t.requires_grad else 0)
    # The seed of a GPU's tensors is on the GPU, too; what is not must not be overlooked.
    return 0 if found & ON_CPU and found & ON_GPU else found


def are_rows(mu: Any, logvar: Any) -> bool:
    """Whether a pair (mu, logvar) is right at a glance: [B, D] each."""
    return (
        isinstance(mu, Tensor)
        and isinstance(logvar, Tensor)
        and is_dense(mu)
        and is_dense(logvar)
        and mu.dim() == 2
        and mu.shape == logvar.shape
        and mu.dtype == logvar.dtype
        and mu.dtype in FLOATING
        and mu.device == logvar.device
    )


def are_batch_in_python(x: Any, mu: Any, logvar: Any) -> bool:
    """Whether x [B, *event] and a pair [B, D] are right at a glance; if not, they may still be right."""
    return (
        isinstance(x, Tensor)
        and is_dense(x)
        and are_rows(mu, logvar)
        and x.dim() > 0
        and x.shape[0] == mu.shape[0]
        and x.dtype in FLOATING
        and x.device == mu.device
    )


def are_outputs_in_python(x: Tensor, samples: int, parameters: tuple[Any, ...]) -> bool:
    """Whether x is [B, X], not empty, and what the decoder returned are tensors [K·B, X] beside it."""
    if x.dim() != 2 or not x.numel():
        return False
    shape = (samples * x.shape[0], x.shape[1])
    for p in parameters:
        if not (isinstance(p, Tensor) and p.shape == shape and p.dtype in FLOATING and p.device == x.device):
            return False
    return True


plain, are_batch, are_outputs = plain_in_python, are_batch_in_python, are_outputs_in_python
with contextlib.suppress(ImportError):  # left out on purpose, or else the first op says what is wrong
    from ._C import are_batch, are_outputs, plain  # type: ignore[no-redef] # noqa: F401, F811
