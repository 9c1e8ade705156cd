r"""The log_prob op of declared likelihoods, and its interface to the C++.

.. math:: \log p(x|z_k) = \sum_i v(x_i, p_{ki}) + \sum_i d(x_i)

with a value :math:`v` of each element and its parameters, and a term :math:`d` of the data alone. With the
upstream gradient :math:`g_k`, the gradient of each parameter is :math:`g_k\, ∂v/∂p`, summed in a fixed order
over its broadcast axes, and that of x is summed over the samples. A parameter has one entry per element, or
broadcasts over samples and rows (one number per pixel), or over pixels as well (one number, fixed or
learned).

With a mask, the sums run over the observed elements. Any other element adds exactly 0 to the value and to
every gradient, even if x or a parameter is NaN there.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..core import backend as _backend
from ..core.checks import (
    FLOATING,
    check_data,
    check_same_device,
    check_tensor,
    checks_data,
    shape_of,
)
from ..core.fast_path import in_eager_mode, is_native, is_usual
from ..core.nested import as_mask
from ..core.torch_private import any_requires_grad
from ._contract import Contract
from .op import FEW_ROWS, Op, accumulator, are_few, cast, in_shape


class Declaration(Protocol):
    """Declaration of a likelihood, from which its ops are derived.

    Attributes:
        name: in snake case; also the name of its files in ``kernels/likelihoods`` and ``csrc/likelihoods``.
        outputs: names of its parameters; the decoder returns at least the first.
        low, high: range of x.
        inside: an x in this range, which replaces elements that a mask leaves out.
        takes_integers: x may be integers, which are read without conversion.
        differentiable: x may have a gradient.
        elementary: value, gradient and data are a few elementary functions in the dtype of their arguments,
            which a compiler fuses well.
        hint: advice for data out of range.
        value, gradient, data: the definition in plain PyTorch: log p of an element; the gradients of x (None
            if not differentiable) and of each parameter for the upstream gradient g; the term of x alone, or
            None.
    """

    name: str
    outputs: tuple[str, ...]
    low: float
    high: float
    inside: float
    takes_integers: bool
    differentiable: bool
    elementary: bool
    hint: str
    value: Callable[..., Tensor]
    gradient: Callable[..., tuple[Tensor | None, ...]]
    data: Callable[[Tensor], Tensor] | None


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """Return the dtype of the computation and its sums: float64 if any tensor is, else float32."""
    for t in tensors:
        if t.dtype == torch.float64:
            return torch.float64
    return torch.float32


def _readable(parameter: Tensor, full: Tensor) -> Tensor:
    """Return a parameter as the C++ reads it: [K, B, X], or broadcast over samples and rows, columns, or all.

    Other broadcasts are expanded.
    """
    samples_and_rows, columns = parameter.shape[:2], parameter.shape[2]
    if samples_and_rows in (full.shape[:2], (1, 1)) and columns in (full.shape[2], 1):
        return parameter
    return parameter.expand(full.shape)


# The ops


def _check_inputs(contract: Contract, x: Tensor, mask: Tensor | None, parameters: Sequence[Tensor]) -> None:
    """Validate x and its mask [B, *event], the first parameter [..., B, *event], and others' broadcasts."""
    full = parameters[0]
    lead = full.dim() - x.dim()
    if x.is_complex():
        contract.refuse("x", x, "real numbers")
    for name, p in zip(contract.names[-len(parameters) :], parameters, strict=True):
        ones = all([n in (1, m) for n, m in zip(p.shape, full.shape, strict=False)])
        if p.dtype not in FLOATING or p.dim() != full.dim() or not ones:
            contract.refuse(name, p, f"floating-point {shape_of(full)}, or 1 in place of a size")
    if x.dim() == 0 or lead < 0 or full.shape[lead:] != x.shape:
        contract.refuse(contract.names[-len(parameters)], full, f"[..., {', '.join(map(str, x.shape))}]")
    contract.expect("mask", mask, torch.bool, tuple(x.shape))


def _flat(
    x: Tensor, mask: Tensor | None, parameters: Sequence[Tensor]
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Reshape x and its mask [B, *event] to [B, X], and parameters [..., B, *event] to [K, B, X]."""
    lead = parameters[0].dim() - x.dim()
    flat = []
    for p in parameters:
        # Explicit sizes, since -1 is ambiguous for an empty batch.
        shape = (math.prod(p.shape[:lead]), p.shape[lead], math.prod(p.shape[lead + 1 :]))
        flat.append(p if p.shape == shape else p.reshape(shape))
    return x if x.dim() == 2 else x.reshape(x.shape[0], math.prod(x.shape[1:])), flat_mask(mask), flat


def flat_mask(mask: Tensor | None) -> Tensor | None:
    """Reshape a mask [B, *event] to [B, X]; one that all rows share is not copied for each."""
    if mask is None or mask.dim() == 2:
        return mask
    rows, size = mask.shape[0], math.prod(mask.shape[1:])
    if rows > 1 and mask.stride(0) == 0:
        return mask[:1].reshape(1, size).expand(rows, size)
    return mask.reshape(rows, size)


class LogProb(Op):
    """Op for log p(x|z) [..., B] of x [B, *event] and parameters [..., B, *event]."""

    module = "likelihood"

    def __init__(self, likelihood: Declaration):
        self.likelihood = likelihood
        self.name = f"{likelihood.name}_log_prob"
        parameters = ", ".join(f"Tensor {p}" for p in likelihood.outputs)
        self.schema = f"(Tensor x, Tensor? mask, {parameters}) -> Tensor"
        self.gradient = _LogProbBackward(likelihood)
        self.native = functools.partial(_backend.native("log_prob"), likelihood.name, self._native)
        super().__init__()

    def _native(self, x, mask, *parameters):
        """Handle calls that the C++ declines: reshape the arguments, and raise if x is out of range."""
        self.check(x, mask, *parameters)
        rows, seen, flat = _flat(x, mask, parameters)
        shape, full = self._shape(x, parameters), flat[0]
        if not full.numel():
            return x.new_zeros(shape, dtype=result_dtype(x, *parameters))
        given = [_readable(p, full) for p in flat]
        run = _backend.native("log_prob")
        return in_shape(run(self.likelihood.name, self._refuse, rows, seen, *given), shape)

    def _refuse(self, x, mask, *_):
        refuse(self.likelihood, x, mask)

    def composed(self, backend):
        function = _backend.layer(backend, self.module).log_prob

        def log_prob(x, mask, *parameters):
            rows, seen, flat = _flat(x, mask, parameters)
            return in_shape(function(self.likelihood, rows, seen, *flat), self._shape(x, parameters))

        return log_prob

    def check(self, x, mask, *parameters):
        _check_inputs(self.contract, x, mask, parameters)

    def is_fusable(self, x, mask, *parameters):
        return self.likelihood.elementary and are_few(FEW_ROWS, x, *parameters)

    def fake(self, x, mask, *parameters):
        return x.new_empty(self._shape(x, parameters), dtype=result_dtype(x, *parameters))

    def forward(self, run, ctx, *args):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args)
        return run(*args)

    def backward(self, run, ctx, grad):
        need_x, _, *need = ctx.needs_input_grad
        needed = [need_x and self.likelihood.differentiable, *need]
        grad_x, *grads = run(grad, *ctx.saved_tensors, needed)
        return grad_x, None, *grads

    @staticmethod
    def _shape(x, parameters):
        return parameters[0].shape[: parameters[0].dim() - x.dim() + 1]


class _LogProbBackward(Op):
    """Op for the gradients of (x, *parameters), None where not needed."""

    module = "likelihood"

    def __init__(self, likelihood: Declaration):
        self.likelihood = likelihood
        self.name = f"{likelihood.name}_log_prob_backward"
        number = len(likelihood.outputs) + 1
        self.schema = (
            f"(Tensor grad, Tensor x, Tensor? mask, {', '.join(f'Tensor {p}' for p in likelihood.outputs)}, "
            f"bool[{number}] need) -> ({', '.join(['Tensor'] * number)})"
        )
        self.native = functools.partial(_backend.native("log_prob_backward"), likelihood.name, self._native)
        super().__init__()

    def _native(self, grad, x, mask, *rest):
        """Handle calls that the C++ declines, by reshaping the arguments."""
        self.check(grad, x, mask, *rest)
        *parameters, need = rest
        rows, seen, flat = _flat(x, mask, parameters)
        full = flat[0]
        if not full.numel():
            return tuple(
                t.new_zeros(t.shape) if n else None for t, n in zip((x, *parameters), need, strict=True)
            )
        dtype, given = result_dtype(x, *flat), []
        for p, n in zip(flat, need[1:], strict=True):
            expanded = _readable(p, full)
            # The gradients of an expanded parameter are summed, and must not be rounded before.
            given.append(expanded if expanded is p or not n else expanded.to(dtype))
        run = _backend.native("log_prob_backward")
        arrives = grad.reshape(full.shape[:2])
        grad_x, *grads = run(
            self.likelihood.name, self.composed("reference"), arrives, rows, seen, *given, need
        )
        grads = [
            g if g is None else cast(g.sum_to_size(p.shape), p.dtype)
            for g, p in zip(grads, flat, strict=True)
        ]
        return _reshaped((grad_x, *grads), (x, *parameters))

    def composed(self, backend):
        function = _backend.layer(backend, self.module).log_prob_backward

        def backward(grad, x, mask, *rest):
            *parameters, need = rest
            rows, seen, flat = _flat(x, mask, parameters)
            grads = function(self.likelihood, grad.reshape(flat[0].shape[:2]), rows, seen, *flat, need)
            return _reshaped(grads, (x, *parameters))

        return backward

    def check(self, grad, x, mask, *rest):
        *parameters, _ = rest
        _check_inputs(self.contract, x, mask, parameters)
        shape = tuple(LogProb._shape(x, parameters))
        self.contract.expect("grad", grad, result_dtype(x, *parameters), shape)

    def is_fusable(self, grad, x, mask, *rest):
        return self.likelihood.elementary and are_few(FEW_ROWS, x, *rest[:-1])

    def fake(self, grad, x, mask, *rest):
        *parameters, need = rest
        tensors = x, *parameters
        return tuple(t.new_empty(t.shape) if n else None for t, n in zip(tensors, need, strict=True))


def _reshaped(grads, tensors):
    return tuple(None if g is None else g.reshape(t.shape) for g, t in zip(grads, tensors, strict=True))


# Public functions


def check_support(likelihood: Declaration, x: Tensor, mask: Tensor | None = None) -> None:
    """Validate that the observed x lie in [low, high], unless the op itself does.

    On a GPU it runs only if FASTVAE_CHECK asks for it, since it would synchronise.
    """
    # Test for a compiler first: it would treat floats that it sees as variables.
    if torch.compiler.is_compiling() or (likelihood.low == -math.inf and likelihood.high == math.inf):
        return
    # The C++ checks in the pass that reads the data.
    if (_backend.on_cpu() == "native" if x.is_cpu else not checks_data()) or not x.numel():
        return
    values = x.detach() if mask is None else x.detach()[mask]
    # Written so that NaN passes: NaN in gives NaN out.
    if bool(((values < likelihood.low) | (values > likelihood.high)).any()):
        refuse(likelihood, values)


def refuse(likelihood: Declaration, x: Tensor, mask: Tensor | None = None) -> None:
    """Raise ValueError for observed x outside of [low, high]."""
    x = x if mask is None else x[mask]
    known = x[~x.isnan()] if x.is_floating_point() else x
    low, high = float(known.amin()), float(known.amax())
    bounds = f"in [{likelihood.low:g}, {likelihood.high:g}]"
    if likelihood.high == math.inf:
        bounds = f"at or above {likelihood.low:g}"
    kind = likelihood.name.replace("_", " ")
    kind = kind[0].upper() + kind[1:]
    raise ValueError(
        f"x holds values in [{low:g}, {high:g}], but {kind} targets must lie {bounds}; {likelihood.hint}"
    )


# Likelihoods and their public functions, by name.
DECLARED: dict[str, Declaration] = {}
PUBLIC: dict[str, Callable[..., Tensor]] = {}


def declare(likelihood: Declaration) -> Callable[..., Tensor]:
    """Register the op of a likelihood, and return the function that validates its arguments and calls it."""
    op = LogProb(likelihood)
    DECLARED[likelihood.name] = likelihood
    first, *others = likelihood.outputs

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    types = {"x": Tensor, first: Tensor} | dict.fromkeys(others, Tensor | float)
    named_mask = inspect.Parameter(
        "mask", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Tensor | None
    )
    signature = inspect.Signature(
        [*(inspect.Parameter(n, kind, annotation=t) for n, t in types.items()), named_mask],
        return_annotation=Tensor,
    )

    def log_prob(*args: Any, mask: Tensor | None = None, **named: Any) -> Tensor:
        if named or len(args) != 1 + len(likelihood.outputs):
            try:
                args = signature.bind(*args, **named).args
            except TypeError as error:
                takes = ", ".join(signature.parameters)
                raise TypeError(f"{op.name}() {error}; it takes ({takes})") from None
        if mask is None and _are_alike(args) and (likelihood.differentiable or not args[0].requires_grad):
            # Small tensors, whose validation one by one would take longer than the kernel.
            return op.direct(torch.is_grad_enabled() and any_requires_grad(*args), args[0], None, *args[1:])
        x, full, *rest = args
        x = check_data(x, likelihood)
        _check_event(x, first, full)
        if mask is not None:
            mask = as_mask(mask, x)
        check_support(likelihood, x, mask)
        return op(x, mask, full, *(_spread(n, p, first, full, x) for n, p in zip(others, rest, strict=True)))

    log_prob.__name__ = log_prob.__qualname__ = op.name
    log_prob.__signature__ = signature  # type: ignore[attr-defined]
    log_prob.__doc__ = _DOCUMENTATION.format(
        name=likelihood.name.replace("_", " "),
        owner=getattr(likelihood, "__name__", likelihood.name),
        first=first,
        others="".join(_OF_OTHERS.format(name=n, first=first) for n in others),
        op=op.name,
        outputs=", ".join(likelihood.outputs),
        zeros=len(likelihood.outputs),
        value=(likelihood.low + likelihood.high) / 2 if likelihood.high < math.inf else 1.0,
    )
    PUBLIC[likelihood.name] = log_prob
    return log_prob


def _are_alike(tensors: Sequence[Any]) -> bool:
    """Return True if the native backend takes x and the parameters as they are, all of one shape [B, ...]."""
    x = tensors[0]
    if torch.compiler.is_compiling() or not (in_eager_mode() and is_native(x)):
        return False
    gpu = None if x.is_cpu else x.device
    # x first: a nested tensor has no shape.
    fits = is_usual(x, gpu) and x.dim() > 0
    return fits and all([is_usual(t, gpu) and t.shape == x.shape for t in tensors[1:]])


_DOCUMENTATION = """Compute log p(x|z) of a {name} likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.{owner}`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of {first}.
        {first}: [..., B, *event].{others}
        mask: bool [B, *event], or [*event] for all rows: True where x was observed. Other elements add
            exactly 0, to the gradients, too, whatever x and the parameters hold there. None: all observed.

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x = torch.full((4, 7), {value})
        >>> outputs = torch.zeros({zeros}, 3, 4, 7)  # {outputs}
        >>> fastvae.ops.{op}(x, *outputs).shape
        torch.Size([3, 4])
    """
_OF_OTHERS = """
        {name}: broadcastable to {first}: its shape, one row [*event], or one number."""


def _check_event(x: Tensor, name: str, parameter: Any) -> None:
    """Validate that a parameter [..., B, *event] fits x [B, *event]."""
    check_tensor(name, parameter)
    check_same_device(name, parameter, "x", x)
    lead = parameter.dim() - x.dim()
    if x.dim() == 0 or lead < 0 or parameter.shape[lead:] != x.shape:
        raise ValueError(
            f"{name} has shape {shape_of(parameter)}, which does not end in x's {shape_of(x)} ([B, *event]); "
            f"expected [..., {', '.join(map(str, x.shape))}]"
        )


def _spread(name: str, parameter: Any, first: str, full: Tensor, x: Tensor) -> Tensor:
    """Return a parameter with the first parameter's axes.

    Broadcast axes keep size 1 if all samples, all rows or the whole event share the number; others are
    expanded.
    """
    if not isinstance(parameter, Tensor):
        if isinstance(parameter, bool) or not isinstance(parameter, (int, float)):
            raise TypeError(f"{name} must be a tensor or a number, got {type(parameter).__name__}")
        parameter = torch.full((), parameter, dtype=accumulator(full.dtype), device=full.device)
    check_tensor(name, parameter)
    check_same_device(name, parameter, first, full)
    if parameter.shape == full.shape:
        return parameter
    missing, lead = full.dim() - parameter.dim(), full.dim() - x.dim()
    fits = missing >= 0 and all(
        n in (1, m) for n, m in zip(parameter.shape, full.shape[missing:], strict=True)
    )
    if not fits:
        raise ValueError(
            f"{name} has shape {shape_of(parameter)}, which does not broadcast to {first}'s "
            f"{shape_of(full)}; expected that shape, one row {list(full.shape[lead + 1 :])}, or one number"
        )
    parameter = parameter.reshape((1,) * missing + tuple(parameter.shape))
    for start, stop in ((0, lead), (lead, lead + 1), (lead + 1, full.dim())):
        if any(n != 1 for n in parameter.shape[start:stop]):
            parameter = parameter.expand(
                *parameter.shape[:start], *full.shape[start:stop], *parameter.shape[stop:]
            )
    return parameter
