"""How an op meets torch: one dispatcher entry per op, with kernels per device, a fake, and autograd.

The Autograd kernel is Python and uses two private names of torch, ``_SingleLevelFunction`` and
``_AutoDispatchBelowAutograd``; this is the only file that does. Compared with
``torch.library.register_autograd`` it costs half the time per call and works under ``torch.func.grad``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import _C
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction

from .. import _backend

_library = torch.library.Library("fastvae", "DEF")


def define(
    module: str,
    name: str,
    schema: str,
    *,
    native: Callable,
    fake: Callable,
    setup: Callable | None = None,
    backward: Callable | None = None,
) -> Callable:
    """Register ``fastvae::name`` and return its overload.

    Args:
        module: the op's file name in every layer, such as ``"latent"``.
        name: the op, and the name of the function that computes it in ``fastvae.reference.<module>`` and
            ``fastvae.kernels.<module>``.
        schema: arguments and results, as torch writes them.
        native: the same function in C++, for CPU tensors.
        fake: the shapes and dtypes of the results, from fake inputs.
        setup: ``setup(ctx, args, result)`` saves what backward needs.
        backward: ``backward(ctx, *grads)`` returns a gradient or None per argument. Without it,
            differentiating raises.
    """
    _library.define(name + schema)
    op = getattr(torch.ops.fastvae, name).default

    def on_cpu(*args):
        backend = _backend.chosen()
        if backend == "native":
            return native(*args)
        return getattr(_backend.layer(backend, module), name)(*args)

    def on_gpu(*args):
        backend = "reference" if _backend.chosen() == "reference" else "triton"
        return getattr(_backend.layer(backend, module), name)(*args)

    def elsewhere(*args):
        return getattr(_backend.layer("reference", module), name)(*args)

    _library.impl(name, on_cpu, "CPU")
    _library.impl(name, on_gpu, "CUDA")
    _library.impl(name, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvae::{name}", fake, lib=_library)

    def node_forward(ctx, *args):
        ctx.set_materialize_grads(False)
        with _C._AutoDispatchBelowAutograd():
            result = op(*args)
        if setup is not None:
            setup(ctx, args, result)
        return result

    def node_backward(ctx, *grads):
        # What follows may send no gradient at all.
        if all(g is None for g in grads):
            return (None,) * len(ctx.needs_input_grad)
        if backward is None:
            raise RuntimeError(
                f"fastvae::{name.removesuffix('_backward')}: second derivatives are not implemented. "
                "Differentiate once (no create_graph=True on what you differentiate again), or compute this "
                "term in plain PyTorch: the formulas stand in fastvae/reference."
            )
        return backward(ctx, *grads)

    node = type(
        f"{name}_node",
        (_SingleLevelFunction,),
        {"forward": staticmethod(node_forward), "backward": staticmethod(node_backward)},
    )

    def autograd(*args):
        if forward_ad._current_level >= 0 and _any_tangent(args):
            raise RuntimeError(
                f"fastvae::{name}: forward-mode differentiation is not implemented; use reverse mode "
                "(backward, torch.func.grad, torch.func.vjp)."
            )
        if _C.is_grad_enabled() and _C._any_requires_grad(*args):
            with enable_single_level_autograd_function():
                return node.apply(*args)
        with _C._AutoDispatchBelowAutograd():
            return op(*args)

    _library.impl(name, autograd, "Autograd")
    return op


def _any_tangent(args) -> bool:
    tensors = (a for a in args if isinstance(a, torch.Tensor))
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


# What the C++ shims of the ops pass: pointers, strides in elements, and a code per dtype.

_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def code(dtype: torch.dtype) -> int:
    """The extension's number for a dtype (enum Dtype in csrc/common.hpp)."""
    return _CODES[dtype]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums are kept and returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def pointer(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def strided(tensor: torch.Tensor | None) -> tuple[int, ...] | None:
    """Address and strides of a tensor, None for None."""
    return None if tensor is None else (tensor.data_ptr(), *tensor.stride())
