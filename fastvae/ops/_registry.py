"""How an op meets torch: one dispatcher entry per op, with kernels per device, a fake, and autograd.

The Autograd kernel is Python and uses two private names of torch, ``_SingleLevelFunction`` and
``_AutoDispatchBelowAutograd``; this is the only file that does. Compared with
``torch.library.register_autograd`` it costs half the time per call and works under ``torch.func.grad``.
"""

from __future__ import annotations

import functools
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
    adapt: Callable = lambda function: function,
    flatten: Callable | None = None,
    results: int | None = None,
) -> Callable:
    """Register ``fastvae::name`` and return a function that calls it.

    In plain eager mode that function goes to the C++ or to Triton without the dispatcher, which would cost
    several times what a small kernel does (docs/NOTES.md); anything else, a compiler, a transform, a tensor
    subclass, a mode, another device or the reference, gets the registered op.

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
        adapt: makes the op's function out of the one in the reference or in ``kernels``, where the C++
            takes or returns more.
        flatten: for an op of one result, ``flatten(*args)`` gives the arguments in the form that the schema
            has them, by views, and the shape of the result. The function that is returned then takes them as
            they are; called directly, these views are no nodes of the autograd graph. Tensors [B, X] of one
            shape and dtype, and their gradients, ``native`` and ``backward`` must take as they are, on a CPU.
        results: how many of the op's results its caller wants; the others are there for ``setup``, and
            the function that is returned may leave them out.
    """
    # Tensors are always the leading arguments.
    tensors = schema.partition("->")[0].count("Tensor")
    _library.define(name + schema)
    op = getattr(torch.ops.fastvae, name).default

    def on_cpu(*args):
        return implementation(_backend.on_cpu())(*args)

    def on_gpu(*args):
        device = next(a.device for a in args if a is not None)
        return _backend.on_device(device, implementation(_backend.on_gpu(device)), args)

    def elsewhere(*args):
        return implementation("reference")(*args)

    @functools.cache
    def implementation(backend):
        return native if backend == "native" else adapt(getattr(_backend.layer(backend, module), name))

    _library.impl(name, on_cpu, "CPU")
    _library.impl(name, on_gpu, "CUDA")
    _library.impl(name, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastvae::{name}", fake, lib=_library)

    def node_forward(ctx, *args):
        with _C._AutoDispatchBelowAutograd():
            return record(ctx, args, op(*args))

    def direct_forward(function):
        def forward(ctx, *args):
            if flatten is None:
                return record(ctx, args, function(*args))[:results]
            ctx.shapes = None
            if function is native and _are_rows(args):
                return record(ctx, args, native(*args))
            ctx.shapes = [a.shape for a in args]
            args, shape = flatten(*args)
            return _in_shape(record(ctx, args, function(*args)), shape)

        return forward

    def direct_backward(ctx, *grads):
        grads = node_backward(ctx, *grads)
        if flatten is None or ctx.shapes is None:
            return grads
        return tuple(None if g is None else g.view(s) for g, s in zip(grads, ctx.shapes, strict=True))

    def record(ctx, args, result):
        ctx.set_materialize_grads(False)
        ctx.backend = _backend.chosen()
        if setup is not None:
            setup(ctx, args, result)
        return result

    def node_backward(ctx, *grads):
        for g in grads:
            if g is not None:
                break
        else:  # what follows may send no gradient at all
            return (None,) * len(ctx.needs_input_grad)
        if backward is None:
            raise RuntimeError(
                f"fastvae::{name.removesuffix('_backward')}: second derivatives are not implemented. "
                "Differentiate once (no create_graph=True on what you differentiate again), or compute this "
                "term in plain PyTorch: the formulas stand in fastvae/reference."
            )
        return _backend.run_on(ctx.backend, backward, ctx, *grads)

    def node_type(forward, backward):
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(name, (_SingleLevelFunction,), methods)

    node = node_type(node_forward, node_backward)
    direct = {f: node_type(direct_forward(f), direct_backward) for f in (native, on_cpu, on_gpu)}

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

    def call(*args):
        device = _plain_device(args[:tensors])
        if device is None:
            function = op
        elif device == "cuda":
            function = on_gpu
        else:
            function = native if _backend.on_cpu() == "native" else on_cpu
        if device is not None and _C.is_grad_enabled() and _C._any_requires_grad(*args):
            return direct[function].apply(*args)
        if flatten is None or (function is native and _are_rows(args)):
            return function(*args)
        args, shape = flatten(*args)
        result = function(*args)
        return result.reshape(shape) if function is op else _in_shape(result, shape)

    return call


def _in_shape(result: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """A kernel's result in the caller's shape, and no view: the caller could not modify one in place."""
    return result if result.shape == shape else result.contiguous().resize_(shape)


def _are_rows(tensors) -> bool:
    """Whether these are all [B, X], of one shape and dtype."""
    first = tensors[0]
    if first.dim() != 2:
        return False
    for t in tensors[1:]:  # noqa: SIM110
        if t.shape != first.shape or t.dtype != first.dtype:
            return False
    return True


_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
_is_wrapped = _C._functorch.is_functorch_wrapped_tensor


def _plain_device(tensors) -> str | None:
    """The type of these tensors' device, if nothing but eager mode stands between them and a kernel."""
    if (
        torch.compiler.is_compiling()
        or _C._are_functorch_transforms_active()
        or _C._len_torch_dispatch_stack()
        or _C._get_tracing_state() is not None
        or forward_ad._current_level >= 0
        or _backend.chosen() == "reference"
    ):
        return None
    device = None
    # A loop: a generator costs more than all else here.
    for t in tensors:
        if t is None:
            continue
        # What torch.func.vjp saved is still wrapped when its function is called, outside of the transform.
        if type(t) not in _PLAIN_TENSORS or _is_wrapped(t) or not (t.is_cpu or t.is_cuda):
            return None
        # The seed of a GPU's tensors is on the GPU, too; what is not must not be overlooked.
        kind = "cuda" if t.is_cuda else "cpu"
        if device is not None and kind != device:
            return None
        device = kind
    return device


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


_CPU = torch.device("cpu")


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised CPU tensor, whatever torch's default device is."""
    return torch.empty(shape, dtype=dtype, device=_CPU)


def empty_like(tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """An uninitialised contiguous tensor of this one's shape and device; half the price of empty."""
    if tensor.is_contiguous() and (dtype is None or dtype == tensor.dtype):
        return torch.empty_like(tensor)
    return tensor.new_empty(tensor.shape, dtype=dtype)


def cast(tensor: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """tensor.to(dtype), at no price where there is nothing to do."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def pointer(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's first element, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def strided(tensor: torch.Tensor | None, *leading: int) -> tuple[int, ...] | None:
    """Address and strides of a tensor, None for None; ``leading`` are strides of axes that it lacks."""
    return None if tensor is None else (tensor.data_ptr(), *leading, *tensor.stride())
