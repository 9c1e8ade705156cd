r"""The log_prob op of declared likelihoods, its interface to the C++, and log p of all pairs.

.. math:: \log p(x|z_k) = \sum_i v(x_i, p_{ki}) + \sum_i d(x_i)

with a value :math:`v` of each element and its parameters, and a term :math:`d` of the data alone. With the
upstream gradient :math:`g_k`, the gradient of each parameter is :math:`g_k\, ∂v/∂p`, summed in a fixed order
over its broadcast axes, and that of x is summed over the samples. A parameter has one entry per element, or
broadcasts over samples and rows (one number per pixel), or over pixels as well (one number, fixed or
learned).

For latents that all examples share, such as draws from the prior or points of a lattice, log p of all pairs
is needed. If it is a sum of products of functions of x and functions of z,

.. math:: \log p(x|z) = \sum_j T_j(x) \cdot η_j(z) - A(z) + D(x)

all pairs take a few matrix products and vectors: for a Bernoulli :math:`T = x, η = a`; for a Poisson
:math:`T = x, η = m`; for a Gaussian :math:`T = (x, x^2), η = (m / s^2, -1 / 2 s^2)`, and with one row of
variances the term in x² is a vector, too. These terms cancel, the more the better the decoder fits, so the
products are computed in float64. Other likelihoods evaluate their op on tiles of the pairs. A tensor [K, B,
X] is never stored.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core import backend as _backend
from ..core.checks import (
    FLOATING,
    check_data,
    check_same_device,
    check_tensor,
    checks_data,
    may_look,
    shape_of,
)
from ..core.deferred import LastLayer, multiply_out
from ._contract import Contract
from .op import Op, accumulator, cast, in_shape


class Declaration(Protocol):
    """Declaration of a likelihood, from which its ops are derived.

    Attributes:
        name: in snake case; also the name of its files in ``kernels/likelihoods`` and ``csrc/likelihoods``.
        outputs: names of its parameters; the decoder returns at least the first.
        low, high: range of x.
        takes_integers: x may be integers, which are read without conversion.
        differentiable: x may have a gradient.
        hint: advice for data out of range.
        value, gradient, data: the definition in plain PyTorch: log p of an element; the gradients of x (None
            if not differentiable) and of each parameter for the upstream gradient g; the term of x alone, or
            None.
    """

    name: str
    outputs: tuple[str, ...]
    low: float
    high: float
    takes_integers: bool
    differentiable: bool
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


def _check_inputs(contract: Contract, x: Tensor, parameters: Sequence[Tensor]) -> None:
    """Validate x [B, *event], the first parameter [..., B, *event], and others that broadcast to it."""
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


def _flat(x: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Reshape x [B, *event] to [B, X] and parameters [..., B, *event] to [K, B, X]."""
    lead = parameters[0].dim() - x.dim()
    flat = []
    for p in parameters:
        # Explicit sizes, since -1 is ambiguous for an empty batch.
        shape = (p.shape[:lead].numel(), p.shape[lead], p.shape[lead + 1 :].numel())
        flat.append(p if p.shape == shape else p.reshape(shape))
    return x if x.dim() == 2 else x.reshape(x.shape[0], x.shape[1:].numel()), flat


class LogProb(Op):
    """Op for log p(x|z) [..., B] of x [B, *event] and parameters [..., B, *event]."""

    module = "likelihood"

    def __init__(self, likelihood: Declaration):
        self.likelihood = likelihood
        self.name = f"{likelihood.name}_log_prob"
        self.schema = f"(Tensor x, {', '.join(f'Tensor {p}' for p in likelihood.outputs)}) -> Tensor"
        self.gradient = _LogProbBackward(likelihood)
        self.native = functools.partial(_backend.native("log_prob"), likelihood.name, self._native)
        super().__init__()

    def _native(self, x, *parameters):
        """Handle calls that the C++ declines: reshape the arguments, and raise if x is out of range."""
        self.check(x, *parameters)
        rows, flat = _flat(x, parameters)
        shape, full = self._shape(x, parameters), flat[0]
        if not full.numel():
            return x.new_zeros(shape, dtype=result_dtype(x, *parameters))
        given = [_readable(p, full) for p in flat]
        run = _backend.native("log_prob")
        return in_shape(run(self.likelihood.name, self._refuse, rows, *given), shape)

    def _refuse(self, x, *_):
        refuse(self.likelihood, x)

    def composed(self, backend):
        function = _backend.layer(backend, self.module).log_prob

        def log_prob(x, *parameters):
            rows, flat = _flat(x, parameters)
            return in_shape(function(self.likelihood, rows, *flat), self._shape(x, parameters))

        return log_prob

    def check(self, x, *parameters):
        _check_inputs(self.contract, x, parameters)

    def fake(self, x, *parameters):
        return x.new_empty(self._shape(x, parameters), dtype=result_dtype(x, *parameters))

    def forward(self, run, ctx, *args):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*args)
        return run(*args)

    def backward(self, run, ctx, grad):
        need_x, *need = ctx.needs_input_grad
        return run(grad, *ctx.saved_tensors, [need_x and self.likelihood.differentiable, *need])

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
            f"(Tensor grad, Tensor x, {', '.join(f'Tensor {p}' for p in likelihood.outputs)}, "
            f"bool[{number}] need) -> ({', '.join(['Tensor'] * number)})"
        )
        self.native = functools.partial(_backend.native("log_prob_backward"), likelihood.name, self._native)
        super().__init__()

    def _native(self, grad, x, *rest):
        """Handle calls that the C++ declines, by reshaping the arguments."""
        self.check(grad, x, *rest)
        *parameters, need = rest
        rows, flat = _flat(x, parameters)
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
        grad_x, *grads = run(
            self.likelihood.name, self.composed("reference"), grad.reshape(full.shape[:2]), rows, *given, need
        )
        grads = [
            g if g is None else cast(g.sum_to_size(p.shape), p.dtype)
            for g, p in zip(grads, flat, strict=True)
        ]
        return _reshaped((grad_x, *grads), (x, *parameters))

    def composed(self, backend):
        function = _backend.layer(backend, self.module).log_prob_backward

        def backward(grad, x, *rest):
            *parameters, need = rest
            rows, flat = _flat(x, parameters)
            grads = function(self.likelihood, grad.reshape(flat[0].shape[:2]), rows, *flat, need)
            return _reshaped(grads, (x, *parameters))

        return backward

    def check(self, grad, x, *rest):
        *parameters, _ = rest
        _check_inputs(self.contract, x, parameters)
        shape = tuple(LogProb._shape(x, parameters))
        self.contract.expect("grad", grad, result_dtype(x, *parameters), shape)

    def fake(self, grad, *rest):
        *tensors, need = rest
        return tuple(t.new_empty(t.shape) if n else None for t, n in zip(tensors, need, strict=True))


def _reshaped(grads, tensors):
    return tuple(None if g is None else g.reshape(t.shape) for g, t in zip(grads, tensors, strict=True))


# Public functions


def check_support(likelihood: Declaration, x: Tensor) -> None:
    """Validate that x lies in [low, high], unless the op itself does.

    On a GPU it runs only if FASTVAE_CHECK asks for it, since it would synchronise.
    """
    # Test for a compiler first: it would treat floats that it sees as variables.
    if torch.compiler.is_compiling() or (likelihood.low == -math.inf and likelihood.high == math.inf):
        return
    # The C++ checks in the pass that reads the data.
    if (_backend.on_cpu() == "native" if x.is_cpu else not checks_data()) or not x.numel():
        return
    values = x.detach()
    # Written so that NaN passes: NaN in gives NaN out.
    if bool(((values < likelihood.low) | (values > likelihood.high)).any()):
        refuse(likelihood, values)


def refuse(likelihood: Declaration, x: Tensor) -> None:
    """Raise ValueError for x outside of [low, high]."""
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
_PUBLIC: dict[str, Callable[..., Tensor]] = {}


def declare(likelihood: Declaration) -> Callable[..., Tensor]:
    """Register the op of a likelihood, and return the function that validates its arguments and calls it."""
    op = LogProb(likelihood)
    DECLARED[likelihood.name] = likelihood
    first, *others = likelihood.outputs

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    types = {"x": Tensor, first: Tensor} | dict.fromkeys(others, Tensor | float)
    signature = inspect.Signature(
        [inspect.Parameter(n, kind, annotation=t) for n, t in types.items()], return_annotation=Tensor
    )

    def log_prob(*args: Any, **named: Any) -> Tensor:
        if named or len(args) != 1 + len(likelihood.outputs):
            try:
                args = signature.bind(*args, **named).args
            except TypeError as error:
                takes = ", ".join(signature.parameters)
                raise TypeError(f"{op.name}() {error}; it takes ({takes})") from None
        x, full, *rest = args
        x = check_data(x, likelihood)
        _check_event(x, first, full)
        check_support(likelihood, x)
        return op(x, full, *(_spread(n, p, first, full, x) for n, p in zip(others, rest, strict=True)))

    log_prob.__name__ = log_prob.__qualname__ = op.name
    log_prob.__signature__ = signature  # type: ignore[attr-defined]
    log_prob.__doc__ = _DOCUMENTATION.format(
        name=likelihood.name.replace("_", " "),
        owner=getattr(likelihood, "__name__", likelihood.name),
        first=first,
        others="".join(_OF_OTHERS.format(name=n, first=first) for n in others),
    )
    _PUBLIC[likelihood.name] = log_prob
    return log_prob


_DOCUMENTATION = """Compute log p(x|z) of a {name} likelihood, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.{owner}`.

    Args:
        x: data [B, *event]; broadcast over the leading axes of {first}.
        {first}: [..., B, *event].{others}

    Returns:
        Nats [..., B], in float32 (float64 if an argument is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
        ValueError: if x is out of range: always on a CPU; on a GPU, where the check costs a
            synchronisation, only if the environment variable FASTVAE_CHECK is 1.
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


# All pairs


# Elements of a tile, K' B X.
_TILE = 2**22


def all_pairs_log_prob(x: Tensor, parameters: Any, *, likelihood: Any = "bernoulli") -> Tensor:
    r"""Return log p(x_i | z_k) of every example with each of K latents, without storing [K, B, X].

    .. math:: \log p(x_i|z_k) = \sum_j T_j(x_i) \cdot η_j(z_k) - A(z_k) + D(x_i)

    Bernoulli, Poisson and Gaussian likelihoods are computed in this form, by matrix products in float64, if
    the parameters are finite; other likelihoods are evaluated tile by tile.

    Args:
        x: data [B, \*event].
        parameters: the decoder's output for z [K, D]: a tensor [K, \*event], or a tuple of them; those after
            the first may also be a row [\*event] or a number. On a GPU, where they are not checked, they must
            be finite.
        likelihood: a name or an object, as in :func:`fastvae.elbo`.

    Returns:
        nats [K, B], in float32 (float64 if one of the tensors is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, several devices, an unknown likelihood,
            or data out of its range.

    Example:
        >>> import math, torch, fastvae
        >>> decoder, x = torch.nn.Linear(2, 7), torch.ones(4, 7)
        >>> z = torch.randn(1000, 2)  # from the prior
        >>> pairs = fastvae.ops.all_pairs_log_prob(x, decoder(z), likelihood="bernoulli")
        >>> (pairs.logsumexp(0) - math.log(len(z))).shape  # log p(x), with no encoder
        torch.Size([4])
    """
    if isinstance(likelihood, str) and likelihood in DECLARED:
        if type(parameters) is LastLayer:
            parameters = multiply_out(parameters, parameters.event or tuple(x.shape[1:]))
        name, outputs = likelihood, parameters if isinstance(parameters, (tuple, list)) else (parameters,)
        expected = DECLARED[name].outputs
        if len(outputs) != len(expected):
            raise ValueError(
                f"parameters must be the outputs of a {name} likelihood, ({', '.join(expected)}); got "
                f"{len(outputs)} of them"
            )
    elif hasattr(likelihood, "log_likelihood"):
        parameters = likelihood.multiplied_out(parameters, x)
        found = likelihood.all_outputs(x, parameters)
        if found is None:
            return _by_tiles(x, parameters, lambda part, rows, k: likelihood.log_likelihood(part, rows, k))
        name, outputs = found
    else:
        known = ", ".join(map(repr, sorted(DECLARED)))
        raise ValueError(
            f"likelihood={likelihood!r} is unknown here; give a likelihood object, or of {known}"
        )
    return _declared(name, x, outputs)


def _declared(name: str, x: Tensor, outputs: Any) -> Tensor:
    declared = DECLARED[name]
    x = check_data(x, declared)
    first = outputs[0]
    check_tensor(declared.outputs[0], first)
    if x.dim() == 0 or first.shape[1:] != x.shape[1:] or first.dim() != x.dim():
        raise ValueError(
            f"{declared.outputs[0]} has shape {shape_of(first)} and x {shape_of(x)}; expected [K, *event] "
            "and [B, *event], of the same event"
        )
    size = x.shape[1:].numel()
    flat, rows = [first.reshape(len(first), size)], x.reshape(len(x), size)
    for output, value in zip(declared.outputs[1:], outputs[1:], strict=True):
        dtype = None if isinstance(value, Tensor) else accumulator(first.dtype)
        p = torch.as_tensor(value, dtype=dtype, device=x.device)
        check_tensor(output, p)
        is_row = p.shape == x.shape[1:] or p.shape == (1, *x.shape[1:])
        if not (p.shape == first.shape or p.numel() == 1 or is_row):
            raise ValueError(
                f"{output} has shape {shape_of(p)}; expected that of {declared.outputs[0]}, "
                f"{shape_of(first)}, a row {list(x.shape[1:])}, or one number"
            )
        flat.append(p.reshape(len(first), size) if p.shape == first.shape else p.reshape(1, -1))
    for output, p in zip(declared.outputs, flat, strict=True):
        check_same_device(output, p, "x", x)
    check_support(declared, x)
    dtype = result_dtype(x, *flat)
    # A logit of -inf contributes 0 where x is 0, but 0 · inf in a matrix product is NaN.
    finite = not may_look(first) or all(bool(p.isfinite().all()) for p in flat)
    if name in _PRODUCTS and finite:
        _check_here(declared, x)
        return _PRODUCTS[name](rows.double(), *[p.double() for p in flat]).to(dtype)
    op = _PUBLIC[name]

    def of_tile(part: Tensor, tile: Any, samples: int) -> Tensor:
        spread = [p[:, None].expand(samples, len(part), size) for p in tile]
        return op(part, *spread)

    return _by_tiles(rows, [p.expand(len(first), size) for p in flat], of_tile, spread=False)


def _check_here(declared: Any, x: Tensor) -> None:
    """Validate the range of x, as the C++ would have done in its pass over x."""
    if x.is_cpu and not torch.compiler.is_compiling():
        with _backend.use_backend("reference"):
            check_support(declared, x)


def _by_tiles(x: Any, parameters: Any, function: Callable[..., Tensor], spread: bool = True) -> Tensor:
    """Return [K, B] of ``function(x, parameters of K' latents, K')`` tile by tile.

    For gradients the inside of each tile is recomputed, not stored.

    With ``spread`` the parameters have a row for each pair.
    """
    single = isinstance(parameters, Tensor)
    parts = [parameters] if single else list(parameters)
    if not all(isinstance(p, Tensor) and p.dim() and len(p) == len(parts[0]) for p in parts):
        raise TypeError("parameters must be a tensor [K, ...], or a tuple of such")
    batch, count = len(x), len(parts[0])
    numbers = max(1, sum(p[:1].numel() for p in parts))
    rows = max(1, min(batch, _TILE // numbers))
    at_once = max(1, _TILE // (numbers * rows))
    wants = torch.is_grad_enabled() and any(p.requires_grad for p in (x, *parts))

    def of_tile(part: Tensor, *tile: Tensor) -> Tensor:
        samples = len(tile[0])
        if spread:
            tile = tuple(p.repeat_interleave(len(part), 0) for p in tile)
        return function(part, tile[0] if single else tile, samples)

    result = []
    # Run once even if empty: the result then has the usual dtype and graph.
    for k in range(0, max(1, count), at_once):
        tile = [p[k : k + at_once] for p in parts]
        row = []
        for b in range(0, max(1, batch), rows):
            part = x[b : b + rows]
            row.append(
                checkpoint(of_tile, part, *tile, use_reentrant=False) if wants else of_tile(part, *tile)
            )
        result.append(row[0] if len(row) == 1 else torch.cat(row, 1))
    return result[0] if len(result) == 1 else torch.cat(result)


def _bernoulli(x: Tensor, logits: Tensor) -> Tensor:
    return logits @ x.mT - torch.nn.functional.softplus(logits).sum(1, keepdim=True)


def _poisson(x: Tensor, log_mean: Tensor) -> Tensor:
    return log_mean @ x.mT - log_mean.exp().sum(1, keepdim=True) - torch.lgamma(x + 1).sum(1)


def _gaussian(x: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
    # Centring reduces cancellation. The centre skips non-finite examples, which must not affect others.
    centre = (torch.where(x.isfinite(), x, 0.0).sum(0) / max(1, len(x))).detach()
    x, mean = x - centre, mean - centre
    precision = torch.exp(-logvar).expand(len(logvar), x.shape[1])
    of_z = (mean.square() * precision + logvar + math.log(2 * math.pi)).sum(1, keepdim=True)
    return (mean * precision) @ x.mT - 0.5 * (of_z + precision @ x.square().mT)


_PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "bernoulli": _bernoulli,
    "poisson": _poisson,
    "gaussian": _gaussian,
}
