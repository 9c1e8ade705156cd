"""Registration of an op with torch: a dispatcher entry with kernels per device, a fake, and autograd.

The Autograd kernel is Python and uses private names of torch (core/torch_private.py). Compared with
``torch.library.register_autograd`` it costs half the time per call and works under ``torch.func.grad``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..core import backend as _backend
from ..core.backend import _choice, _default
from ..core.compiled_cache import tag_cache_keys
from ..core.fast_path import ON_CPU, ON_GPU, PLACES, WANTED, plain
from ..core.torch_private import (
    BelowAutograd,
    SingleLevelFunction,
    any_requires_grad,
    forward_ad_is_active,
    from_handles,
    handle_of,
    is_traced_on_gpu,
    named_in_trace,
    single_level_autograd,
)
from ._contract import Contract

_library = torch.library.Library("fastvae", "DEF")
# All ops, by name.
REGISTERED: dict[str, Op] = {}
# The overload below autograd, which appears in compiled graphs.
_KERNEL = "kernel"


class Op:
    """Op registered with torch on construction, and called like a function.

    In plain eager mode a call goes to the C++ or to Triton without the dispatcher, which would cost several
    times as much as a small kernel (docs/log.md). Everything else (a compiler, a transform, a tensor
    subclass, a mode, another device or the reference) uses the registered op.

    Tensors are the leading arguments. The ``record``, if any, follows: a NamedTuple, which the dispatcher
    gets field by field.

    Unrequested results are None. The dispatcher cannot represent None and gets an empty tensor [0]
    (:func:`or_none`).

    Attributes:
        module: the op's file name in every layer, such as ``"normal_diagonal"``.
        name: the op, and the function that computes it in ``fastvae.reference.<module>`` and
            ``fastvae.kernels.<module>``.
        schema: arguments and results, in torch's syntax.
        record: the type of the record.
        shown: the number of results that a caller gets; the others are for the gradient.
        replays: its launches on a GPU depend on its arguments alone, so that the C++ may repeat them.
        takes_keep: the op has a last argument, which callers omit: whether to keep a tensor for the backward
            pass of the C++, or by :meth:`direct` on a GPU for the next op.
        gradient: the op that computes this op's gradients; without it, differentiation raises.
    """

    module: str
    name: str
    schema: str
    record: type[Any] | None = None
    shown: int | None = None
    replays: bool = True
    takes_keep: bool = False
    gradient: Op | None = None

    # A subclass defines these.

    native: Callable
    """The op in C++, for CPU tensors."""

    def check(self, *args: Any) -> None:
        """Validate the tensors of a call through the dispatcher by ``self.contract``; raises ValueError."""

    def fake(self, *args: Any) -> Any:
        """Return results of the right shapes and dtypes for fake arguments."""
        raise NotImplementedError

    def is_fusable(self, *args: Any) -> bool:
        """Return True if a compiler for a GPU should get the op's formulas instead of its kernel.

        A launch from the compiler's code costs a tenth of a call of an op, which is what counts for small
        tensors; for large ones the kernel saves time and memory.
        """
        return False

    def composed(self, backend: str) -> Callable:
        """Return the op's implementation in the reference or in Triton."""
        return getattr(_backend.layer(backend, self.module), self.name)

    def forward(self, run: Callable, ctx: Any, *args: Any) -> Any:
        """Call ``run`` on the arguments, and save the gradient's inputs in ``ctx``."""
        return run(*args)

    def backward(self, run: Callable, ctx: Any, *grads: Any) -> tuple:
        """Return gradients of all arguments, None for non-tensors; ``run`` is ``gradient``'s function."""
        raise NotImplementedError

    # Derived from the above.

    def __init__(self) -> None:
        names = re.findall(r"Tensor\?? (\w+)", self.schema.partition("->")[0])
        self._tensors = len(names)
        self.contract = Contract(self.name, tuple(names))
        self._fields = len(self.record._fields) if self.record else 0
        self._by_backend = functools.cache(self._implementation)
        REGISTERED[self.name] = self
        self._gpu = self._replayed(self._on_gpu, letters_of(self.schema) if self.replays else None)
        self._formulas = self._dispatched(self._checked_formulas)
        self._registered = self._register("")
        self._kernel = self._register(_KERNEL)
        _library.impl(self.name, self._autograd, "Autograd")
        _library.impl(f"{self.name}.{_KERNEL}", torch.library.fallthrough_kernel, "Autograd")
        self._dispatched_node = self._node(self._below_autograd)
        # Fast paths by device and backend: a function, the autograd node that calls it, and whether it is the
        # C++. Everything else goes through the dispatcher.
        on_cpu = self._on_cpu, self._node(self._on_cpu, ON_CPU), False
        on_gpu = self._gpu, self._node(self._gpu, ON_GPU), False
        self._ways: dict[tuple[int, str], tuple[Callable, type[Any], bool]] = {
            (ON_CPU, "triton"): on_cpu,
            (ON_GPU, "triton"): on_gpu,
            (ON_GPU, "native"): (self._gpu, self._native_node(self._gpu, ON_GPU), False),
        }
        if not _backend.LEFT_OUT:
            self._ways[ON_CPU, "native"] = (self.native, self._native_node(self.native, ON_CPU), True)

    def __call__(self, *args: Any) -> Any:
        tensors = args[: self._tensors]
        found = 0 if torch.compiler.is_compiling() else plain(tensors)
        way = self._ways.get((found & PLACES, _choice.get() or _default())) if found else None
        if way is None:
            if self.takes_keep:
                args = (*args, _cpp_differentiates(tensors))
            results = self._registered(*self._unpacked(args))
        else:
            function, node, native = way
            wanted = found & WANTED and torch.is_grad_enabled()
            if self.takes_keep:
                args = (*args, native if wanted else False)
            results = node.apply(*args) if wanted else function(*args)
        return results if self.shown is None else results[: self.shown]

    def direct(self, wanted: bool, *args: Any) -> Any:
        """Return all results for arguments that the caller has found fit for the fast path.

        Args:
            wanted: whether autograd will request gradients.
            args: plain tensors on the CPU or on one GPU, in eager mode on the native backend, and the other
                arguments.
        """
        function, node, native = self._ways[ON_CPU if args[0].is_cpu else ON_GPU, "native"]
        if self.takes_keep:
            args = (*args, wanted if native else True)
        return node.apply(*args) if wanted else function(*args)

    def _register(self, overload: str) -> Any:
        """Register an overload of the op, with all kernels below autograd."""
        name = f"{self.name}.{overload}" if overload else self.name
        _library.define(name + self.schema)
        registered = getattr(getattr(torch.ops.fastvae, self.name), overload or "default")
        on_cpu = self._dispatched(self._checked(self._on_cpu))
        if not (overload and _implemented_in_cpp(self.name, registered, on_cpu)):
            _library.impl(name, on_cpu, "CPU")
        on_gpu = self._dispatched(self._checked(self._gpu))
        if not (overload and self._replayed_by_dispatcher(name, registered, on_gpu)):
            _library.impl(name, on_gpu, "CUDA")
        _library.impl(name, self._dispatched(self._checked(self._elsewhere)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fastvae::{name}", self._dispatched(self._on_fake), lib=_library)
        return registered

    def _implementation(self, backend: str) -> Callable:
        if backend == "native":
            return self.native
        function = self.composed(backend)
        return _with_contiguous_results(function) if backend == "reference" else function

    def _on_cpu(self, *args):
        return self._by_backend(_backend.on_cpu())(*args)

    def _on_gpu(self, *args):
        device = next(a.device for a in args if a is not None)
        return _backend.on_device(device, self._by_backend(_backend.on_gpu(device)), args)

    def _replayed(self, function: Callable, types: str | None) -> Callable:
        """Return a function of GPU tensors in C++, which replays the launches that Python plans."""
        try:
            replayed = _backend.extension().replayed
        except (
            RuntimeError,
            AttributeError,
        ):  # left out, or missing by accident, which the first call reports
            return function
        if types is None:
            return function

        def planned(*args):
            device = next(a.device for a in args if a is not None)
            if _backend.on_gpu(device) != "triton" or not watches_launches():
                return function(*args), None
            return _backend.layer("triton", "recording").record(function, args, types)

        return replayed(self.name, types, planned, function)

    def _replayed_by_dispatcher(self, name: str, registered: Any, in_python: Callable) -> bool:
        """Register the C++ for GPU tensors, and return whether that succeeded."""
        if self._gpu == self._on_gpu:
            return False
        empty_for_none = self.gradient is not None and self.shown is not None
        with_handles = _with_handles(_types(registered), in_python)
        return bool(_backend.extension().implement_on_gpu(self._gpu, name, empty_for_none, with_handles))

    def _checked_formulas(self, *args):
        tensors = args[: self._tensors]
        self.contract.check_devices(tensors)
        self.contract.check_storage(tensors)
        self.check(*args)
        return self._by_backend("reference")(*args)

    def _elsewhere(self, *args):
        return self._by_backend("reference")(*args)

    def _on_fake(self, *args):
        tensors = args[: self._tensors]
        self.contract.check_devices(tensors)
        if any([t is not None and t.is_cuda for t in tensors]):
            tag_cache_keys()
        return self.fake(*args)

    def _checked(self, function: Callable) -> Callable:
        def checked(*args):
            tensors = args[: self._tensors]
            self.contract.check_devices(tensors)
            self.contract.check_storage(tensors)
            self.check(*args)
            return function(*args)

        return checked

    def _packed(self, function: Callable) -> Callable:
        """Adapt a function to the dispatcher, which passes the record field by field."""
        if self.record is None:
            return function
        begin, end, record = self._tensors, self._tensors + self._fields, self.record

        def of_fields(*args):
            return function(*args[:begin], record(*args[begin:end]), *args[end:])

        return of_fields

    def _dispatched(self, function: Callable) -> Callable:
        """Adapt a function to the dispatcher, replacing results that are None by empty tensors."""
        function = self._packed(function)
        if self.gradient is None or self.shown is None:
            return function

        def without_none(*args):
            results = function(*args)
            return tuple(results[0].new_empty(0) if r is None else r for r in results)

        return without_none

    def _unpacked(self, args: tuple) -> tuple:
        if self.record is None:
            return args
        n = self._tensors
        return *args[:n], *args[n], *args[n + 1 :]

    # Autograd

    def _below_autograd(self, *args):
        with BelowAutograd():
            return self._run(*self._unpacked(args))

    def _autograd(self, *fields):
        """Run the op as the dispatcher's Autograd kernel, with a node if a gradient is needed."""
        if forward_ad_is_active() and _any_tangent(fields):
            raise RuntimeError(
                f"fastvae::{self.name}: forward-mode differentiation is not implemented; use reverse mode "
                "(backward, torch.func.grad, torch.func.vjp)."
            )
        if wants_gradients(fields[: self._tensors]):
            with single_level_autograd():
                return self._packed(self._dispatched_node.apply)(*fields)
        with BelowAutograd():
            return self._run(*fields)

    def _run(self, *fields):
        """Run the op below autograd: its kernel or, where a compiler should fuse them, its formulas."""
        first = next(t for t in fields if t is not None)
        if is_traced_on_gpu(first) and self._packed(self.is_fusable)(*fields):
            with named_in_trace(self._registered):
                return self._formulas(*fields)
        return self._kernel(*fields)

    def _node(self, function: Callable, place: int = 0) -> type[Any]:
        """Return the op's autograd node that computes it with ``function``, for the backend in force.

        With a ``place``, all tensors are on that device, and the gradient bypasses the dispatcher, too.
        """

        def forward(ctx, *args):
            ctx.backend = _backend.chosen()
            return self.forward(function, ctx, *args)

        if self.gradient is None or not place:
            return self._node_of(forward, self._differentiate)
        run = self.gradient._on_cpu if place == ON_CPU else self.gradient._gpu

        def backward(ctx, *grads):
            # Backend, grad mode or tensors may have changed since the forward pass.
            if ctx.backend != _backend.chosen() or torch.is_grad_enabled() or plain(grads) != place:
                return self._differentiate(ctx, *grads)
            return self.backward(run, ctx, *grads)

        return self._node_of(forward, backward)

    def _native_node(self, function: Callable, place: int) -> type:
        """Return the autograd node of the native backend, without the dispatcher in either pass."""
        gradient = self.gradient
        run = gradient and (gradient.native if place == ON_CPU else gradient._gpu)

        def backward(ctx, *grads):
            # Grad mode or tensors may have changed since the forward pass, and the backend, which the
            # function for GPU tensors looks up.
            changed = place == ON_GPU and _backend.chosen() != "native"
            if run is None or changed or torch.is_grad_enabled() or plain(grads) != place:
                ctx.backend = "native"
                return self._differentiate(ctx, *grads)
            return self.backward(run, ctx, *grads)

        return self._node_of(functools.partial(self.forward, function), backward)

    def _node_of(self, forward: Callable, backward: Callable) -> type[Any]:
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(self.name, (SingleLevelFunction,), methods)

    def _differentiate(self, ctx, *grads):
        if all([g is None for g in grads]):  # no upstream gradient reached the op
            return (None,) * len(ctx.needs_input_grad)
        if self.gradient is None:
            raise RuntimeError(
                f"fastvae::{self.name.removesuffix('_backward')}: second derivatives are not implemented. "
                "Differentiate once (no create_graph=True on what you differentiate again), or compute this "
                "term in plain PyTorch: the formulas stand in fastvae/reference."
            )
        return self.backward(functools.partial(_backend.run_on, ctx.backend, self.gradient), ctx, *grads)


# Letters by which the C++ identifies the argument types of an op that the dispatcher calls.
_LETTERS = {
    "Tensor": "t", "Optional[Tensor]": "T", "int": "i", "SymInt": "i", "float": "f", "bool": "b", "str": "s",
    "List[bool]": "l", "ScalarType": "d",
}  # fmt: skip
# The same in a schema, and the arguments that vary from call to call.
_IN_SCHEMA = {"Tensor?": "T", "ScalarType": "d"} | _LETTERS
_VARY = {("SymInt", "sample_offset"): "n", ("SymInt", "row_offset"): "n", ("float", "coefficient"): "v"}


def _types(registered: Any) -> list[str]:
    # A dtype's type is that of its number.
    return [str(a.real_type if str(a.type) == "int" else a.type) for a in registered._schema.arguments]


def letters_of(schema: str) -> str | None:
    """Return the letters of a schema's arguments for the C++ that replays launches."""
    letters = []
    for argument in schema.partition("->")[0].strip(" ()").split(", "):
        kind, _, name = argument.replace("*", "").strip().partition(" ")
        kind = "List[bool]" if kind.startswith("bool[") else kind
        if kind not in _IN_SCHEMA:
            return None
        letters.append(_VARY.get((kind, name), _IN_SCHEMA[kind]))
    return "".join(letters)


@functools.cache
def watches_launches() -> bool:
    """Name to the C++ what it checks before each replay: the backend in force, and Triton's hooks.

    Returns False where Triton must see every launch.
    """
    watched = _backend.layer("triton", "launching").watched()
    if watched is not None:
        _backend.extension().watch(_choice, _default(), watched)
    return watched is not None


def _with_handles(types: list[str], function: Callable) -> Callable:
    """Adapt a function to a caller in C++, whose tensors are handles."""

    def with_handles(*args):
        given = zip(types, args, strict=True)
        results = function(
            *(from_handles([a])[0] if "Tensor" in t and a is not None else a for t, a in given)
        )
        results = results if isinstance(results, tuple) else (results,)
        return [None if r is None else handle_of(r) for r in results]

    return with_handles


def _implemented_in_cpp(name: str, registered: Any, in_python: Callable) -> bool:
    """Register the C++ for CPU tensors, and return whether that succeeded.

    A compiled graph then calls it without Python, which costs 20 µs more per op. Calls that the C++ does not
    handle, and other backends, go to ``in_python``.
    """
    types = _types(registered)
    try:
        implement = _backend.extension().implement
    except (RuntimeError, AttributeError):  # left out, or missing by accident, which the first call reports
        return False
    if not all(t in _LETTERS for t in types):
        return False
    letters = "".join(_LETTERS[t] for t in types)
    return bool(implement(name, _KERNEL, letters, _with_handles(types, in_python), _backend.on_cpu))


def or_none(tensor: Tensor | None) -> Tensor | None:
    """Return a tensor kept by the forward pass, or None for its placeholder in a graph, a tensor [0]."""
    return None if tensor is None or (tensor.dim() == 1 and tensor.shape[0] == 0) else tensor


def wants_gradients(tensors: tuple[Tensor | None, ...]) -> bool:
    """Return True if autograd will request the gradient of one of the tensors."""
    if not torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return any([t is not None and t.requires_grad for t in tensors])
    return any_requires_grad(*tensors)


def _cpp_differentiates(tensors: tuple[Any, ...]) -> bool:
    """Return True if autograd will request gradients of these tensors from the C++."""
    if not (tensors[0].is_cpu and wants_gradients(tensors)):
        return False
    # A compiled graph is shared by every backend.
    return torch.compiler.is_compiling() or _backend.on_cpu() == "native"


def _any_tangent(args) -> bool:
    tensors = (a for a in args if isinstance(a, torch.Tensor))
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


# Helpers shared by the ops


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which sums are accumulated and returned."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Elements up to which a compiled graph on a GPU computes rows of a decoder's output, and draws, by formulas.
# A call of an op costs the host 10 µs more. On an H100 Inductor's rows take 1.03 to 1.18 times as long as the
# op's (docs/gpu.md), 1 µs for 2^22 elements; its draws twice as long, 5 µs for 2^19.
FEW_ROWS, FEW_DRAWS = 2**22, 2**19


def are_few(most: int, *tensors: Tensor | None) -> bool:
    """Return True for tensors of at most ``most`` elements, of constant shapes, that are not float64."""
    for t in tensors:
        if t is None:
            continue
        if t.dtype == torch.float64 or not all([type(n) is int for n in t.shape]) or t.numel() > most:
            return False
    return True


def empty_like(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return an uninitialised contiguous tensor of the same shape and device, in half torch.empty's time."""
    if tensor.is_contiguous() and (dtype is None or dtype == tensor.dtype):
        return torch.empty_like(tensor)
    return tensor.new_empty(tensor.shape, dtype=dtype)


def new_empty(tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an uninitialised tensor on the same device; passing ``dtype=`` costs as much as allocating."""
    return tensor.new_empty(shape) if tensor.dtype == dtype else tensor.new_empty(shape, dtype=dtype)


def in_shape(result: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a kernel's result in the caller's shape, not as a view, which could not be modified in place."""
    if result.shape == shape:
        return result
    if is_traced_on_gpu(result):  # a compiler drops the copy
        return result.reshape(shape).clone()
    return result.contiguous().resize_(shape)


@overload
def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Cast to ``dtype``; return the tensor itself if it already has it."""
    return tensor if tensor is None or tensor.dtype == dtype else tensor.to(dtype)


def _with_contiguous_results(function: Callable) -> Callable:
    """Give results of plain PyTorch, which follow the inputs' layout, the contiguous layout of the fakes."""

    def contiguous(result):
        return None if result is None else result.contiguous()

    def call(*args):
        results = function(*args)
        return tuple(map(contiguous, results)) if isinstance(results, tuple) else contiguous(results)

    return call
