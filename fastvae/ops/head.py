r"""The likelihood fused with the decoder's last linear layer, whose output is never stored.

With the layer's input :math:`h_n` for each of N = K·B rows, its weights :math:`W` and bias :math:`c`, and
parameters :math:`a_n = W h_n + c` besides constant ones, :math:`\log p(x|z_n) = \sum_i v(x_i, a_{ni})` as in
:mod:`fastvae.ops.likelihood`. With the upstream gradient :math:`g_n` and :math:`u_{ni} = g_n ∂v/∂a`:

.. math:: \bar h_n = W^T u_n, \quad \bar W = \sum_n u_n h_n^T, \quad \bar c = \sum_n u_n

:math:`a` and :math:`u`, [N, X], are the largest tensors of a VAE with many samples. Blocks of their rows are
computed, used while they are in the processor's cache, and discarded. The gradients need :math:`g`, the
importance weights, which depend on all samples of a row. So, if the bound of the batch is a sum or a mean, a
block contains all samples of its rows: value and gradients then take one pass, at the cost of the products
alone. If the bound is per row, its upstream gradient is unknown in the forward pass, and the backward pass
recomputes the blocks.

Hidden layers before the last one, each a linear map and an activation, may be computed in the same blocks: h
is then the first one's input, and their values are discarded, too.

Sums over rows are kept in float32 (float64 for float64), whatever the dtype of h and W.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import backend as _backend
from ..core.checks import check_data, check_same_device, check_tensor, shape_of
from ..core.deferred import HiddenLayer
from ..core.numbers import as_tensor
from .likelihood import DECLARED, check_support, refuse, result_dtype
from .op import Op, cast, or_none
from .reduce import _HOW, BoundReduction, check_bound, check_grads, finish

# Hidden layers of a call, at most. As in csrc/arguments.hpp.
MOST_HIDDEN = 3
# Tensors of each op: x [B, X], h [K·B, H], weight [m·X, H] and bias [m·X] of the first m outputs, and the
# other outputs, each a row [X] or a number; then weight [W, V] and bias [W] of each hidden layer, whose
# activations follow the likelihood.
_INPUTS = "Tensor x, Tensor h, Tensor weight, Tensor? bias, Tensor? constant0, Tensor? constant1" + "".join(
    f", Tensor? hidden{i}, Tensor? hidden_bias{i}" for i in range(MOST_HIDDEN)
)
_TENSORS = 6 + 2 * MOST_HIDDEN
# All of them but x have gradients: those of the last layer and the constants, then those of hidden layers.
_GRADIENTS = _TENSORS - 1
_LAST = _GRADIENTS - 2 * MOST_HIDDEN

# A batch with fewer rows does not occupy all cores by rows; its samples are divided among them instead. As in
# csrc/calls/head.hpp.
FEWEST_ROWS = 8


# Below these sizes dividing the work costs more than storing the output, and each weight's gradient, which is
# accumulated block by block, pays only with enough rows. With torch's BLAS instead of the C++ tiles the gain
# is smaller (measured: docs/log.md).
FEWEST_NUMBERS, ROWS_PER_INPUT = 2**18, 2
FEWEST_BY_BLAS, NUMBERS_PER_INPUT = 2**20, 2**13
# Hidden layers in blocks; weights of wider ones do not fit a core's own cache. AVX2's smaller tiles read them
# more often.
FEWEST_HIDDEN_ROWS, WIDEST_HIDDEN = 128, 1024
# On a GPU: rows of programs that occupy it.
FEWEST_CHAIN_ROWS = 2**14

# True if the C++ uses its own matrix products. Evaluated at import, before any compiler traces it.
HAS_TILES = False
with contextlib.suppress(RuntimeError):  # without the extension
    HAS_TILES = _backend.extension().products() == "tiles"
    WIDEST_HIDDEN = 1024 if _backend.extension().isa() == "avx512" else 256


def pays(rows: int, size: int, h: Tensor, inner: int) -> bool:
    """Return True if not storing an output [rows, size] of a layer is at least as fast as storing it.

    ``inner`` is the number of the layer's inputs, and h has the dtype and the device.
    """
    if h.device.type != "cpu":
        # Fused on request alone, by a FusedHead, which saves memory.
        return True
    if h.dtype.itemsize == 2:
        return False  # torch's products in half precision are faster than the blocks' in float32
    fewest, per_input = FEWEST_NUMBERS, ROWS_PER_INPUT
    if h.dtype == torch.float64 or not HAS_TILES:
        fewest, per_input = max(FEWEST_BY_BLAS, NUMBERS_PER_INPUT * inner), 2 * ROWS_PER_INPUT
    return rows * size >= fewest and rows >= per_input * inner


def hidden_may_pay(h: Tensor) -> bool:
    """Return True if :func:`hidden_pay` may be True for some widths."""
    if h.is_cuda:
        # The kernel of whole decoders has no gradients.
        few = h.shape[0] < FEWEST_CHAIN_ROWS or torch.is_grad_enabled()
        return not few and _backend.on_gpu(h.device) == "triton"
    return (
        HAS_TILES and h.dtype == torch.float32 and h.device.type == "cpu" and h.shape[0] >= FEWEST_HIDDEN_ROWS
    )


def hidden_pay(h: Tensor, widths: Sequence[int]) -> bool:
    """Return True if hidden layers of these widths, with input h, are faster in the blocks."""
    if h.is_cuda:
        return hidden_may_pay(h) and bool(_backend.layer("triton", "chain").fits(h, widths))
    most = max(widths)
    return hidden_may_pay(h) and h.shape[0] >= ROWS_PER_INPUT * most and most <= WIDEST_HIDDEN


def in_one_kernel(likelihood: str, x: Tensor, layers: Layers) -> bool:
    """Return True if a GPU computes log p(x|z) of x [B, X] from these layers in one kernel."""
    if not layers.hidden or not hidden_may_pay(layers.h):
        return False
    given = _Layers(x, layers.weight, *layers.tensors[2:], activations=layers.activations)
    return bool(_backend.layer("triton", "chain").takes(DECLARED[likelihood], x, layers.h, given))


class _Layers:
    """Weights and other parameters by output, and hidden layers.

    Attributes:
        weights, biases: [X, H] each, and [X] or None, of the first outputs, which are products.
        constants: the other outputs, each a row [X] or one number.
        hidden: the hidden layers.
    """

    def __init__(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, *others: Tensor | None, activations: str = ""
    ):
        constants, hidden = others[:2], others[2:]
        self.constants = tuple(p for p in constants if p is not None)
        self.hidden = tuple(
            HiddenLayer(hidden[2 * i], hidden[2 * i + 1], name)  # type: ignore[arg-type]
            for i, name in enumerate(activations.split())
        )
        self.products = weight.shape[0] // x.shape[1] if x.shape[1] else 1
        self.weights = weight.chunk(self.products) if self.products > 1 else (weight,)
        self.biases: tuple[Tensor | None, ...] = (None,) * self.products
        if bias is not None:
            self.biases = bias.chunk(self.products) if self.products > 1 else (bias,)

    def each(self, need: Sequence[bool]) -> tuple[bool, ...]:
        """Return the needs of (h, weight, bias, constants) as those of (h, *weights, *biases, *constants)."""
        need_h, need_weight, need_bias, *need_constants = need
        each = (need_h, *[need_weight] * self.products, *[need_bias] * self.products)
        return *each, *need_constants[: len(self.constants)]

    def together(self, grads: Sequence[Tensor | None], need: Sequence[bool]) -> tuple[Tensor | None, ...]:
        """Return gradients of (h, *weights, *biases, *constants) as those of (h, weight, bias, constants)."""
        n, (to_h, *others) = self.products, grads
        to_weight = torch.cat(others[:n]) if need[1] else None  # type: ignore[arg-type]
        to_bias = torch.cat(others[n : 2 * n]) if need[2] else None  # type: ignore[arg-type]
        return to_h, to_weight, to_bias, *[*others[2 * n :], None, None][: _LAST - 3]

    def wide(self, h: Tensor) -> tuple[Tensor, tuple[HiddenLayer, ...]]:
        """Return the first hidden layer's input and the hidden layers in the dtype of the computation."""
        dtype = result_dtype(h, *(t for layer in self.hidden for t in layer[:2] if t is not None))
        layers = [
            HiddenLayer(cast(w, dtype), b if b is None else cast(b, dtype), a) for w, b, a in self.hidden
        ]
        return cast(h, dtype), tuple(layers)


def _refuse_outside(likelihood: str, x: Tensor) -> None:
    """Raise ValueError for x out of range, found by the C++ or not."""
    declared = DECLARED[likelihood]
    if bool(((x < declared.low) | (x > declared.high)).any()):
        refuse(declared, x)


def _check_inputs(contract, x, h, weight, bias, *others):
    """Validate the inputs shared by all ops here, and return K."""
    constants, hidden = others[:2], others[2:]
    if x.is_complex() or x.dim() != 2:
        contract.refuse("x", x, "[B, X]")
    batch, size = x.shape
    contract.expect("h", h, None, (-1, -1))
    inner = h.shape[1]
    for i in range(0, len(hidden), 2):
        if hidden[i] is not None:
            contract.expect(f"hidden{i // 2}", hidden[i], None, (-1, inner))
            inner = hidden[i].shape[0]
            contract.expect(f"hidden_bias{i // 2}", hidden[i + 1], None, (inner,))
    contract.expect("weight", weight, None, (-1, inner))
    if h.shape[0] % batch if batch else h.shape[0]:
        contract.refuse("h", h, f"a multiple of x's {batch} rows")
    most = 3 - sum(p is not None for p in constants)
    if weight.shape[0] % size or not size <= weight.shape[0] <= most * size if size else weight.shape[0]:
        contract.refuse("weight", weight, f"[m·{size}, {inner}] of m outputs, 1 to {most}")
    contract.expect("bias", bias, None, (weight.shape[0],))
    for i, p in enumerate(constants):
        contract.expect(f"constant{i}", p, None, (size,), (1,), ())
    return h.shape[0] // batch if batch else 0


class _LinearLogProbBackward(Op):
    """Op for the gradients of (h, weight, bias, constants), None where not needed."""

    module = "head"
    replays = False  # its products depend on torch's settings
    name = "linear_log_prob_backward"
    results = ", ".join(["Tensor"] * _GRADIENTS)
    schema = (
        f"(Tensor grad, {_INPUTS}, str likelihood, str activations, bool[{_GRADIENTS}] need) -> ({results})"
    )

    def __init__(self):
        self.native = functools.partial(_backend.native(self.name), self.composed("reference"))
        super().__init__()

    def composed(self, backend):
        function = _backend.layer(backend, "head").linear_log_prob_backward
        plain = _backend.layer("reference", "hidden")

        def backward(grad, *args):
            x, h, *rest, likelihood, activations, need = args
            layers = _Layers(x, *rest, activations=activations)
            if not layers.hidden:
                grads = function(DECLARED[likelihood], grad, x, h, layers, layers.each(need[:_LAST]))
                return *layers.together(grads, need[:_LAST]), *[None] * (_GRADIENTS - _LAST)
            first, hidden = layers.wide(h)
            of_last = [need[0] or any(need[_LAST:]), *need[1:_LAST]]
            value = plain.forward(first, hidden)
            grads = function(DECLARED[likelihood], grad, x, value, layers, layers.each(of_last))
            to_value, *rest_of_last = layers.together(grads, of_last)
            below = [] if to_value is None else plain.backward(to_value, first, hidden)
            below += [None] * (1 + _GRADIENTS - _LAST - len(below))
            found = (below[0], *rest_of_last, *below[1:])
            like = (h, *rest)
            return tuple(
                cast(g, t.dtype) if n and t is not None and g is not None else None
                for g, t, n in zip(found, like, need, strict=True)
            )

        return backward

    def check(self, grad, *args):
        *tensors, _, _, _ = args
        samples = _check_inputs(self.contract, *tensors)
        dtype = result_dtype(*(t for t in tensors if t is not None))
        self.contract.expect("grad", grad, dtype, (samples, tensors[0].shape[0]))

    def fake(self, grad, x, *rest):
        *tensors, _, _, need = rest
        return tuple(
            t.new_empty(t.shape) if n and t is not None else None for t, n in zip(tensors, need, strict=True)
        )


class _LinearLogProb(Op):
    """Op for log p(x|z) [K, B]."""

    module = "head"
    replays = False  # its products depend on torch's settings
    name = "linear_log_prob"
    schema = f"({_INPUTS}, str likelihood, str activations) -> Tensor"
    gradient = _LinearLogProbBackward()

    def __init__(self):
        self.native = functools.partial(_backend.native(self.name), self._not_native)
        super().__init__()

    def _not_native(self, x, *rest):
        """Handle calls that the C++ does not: an empty product, no BLAS, or x out of range, which raises."""
        _refuse_outside(rest[-2], x)
        return self.composed("reference")(x, *rest)

    def composed(self, backend):
        function = _backend.layer(backend, "head").linear_log_prob
        plain = _backend.layer("reference", "hidden")
        chain = _backend.layer(backend, "chain") if backend == "triton" else None

        def log_prob(*args):
            x, h, *rest, likelihood, activations = args
            layers = _Layers(x, *rest, activations=activations)
            if layers.hidden:
                if chain and chain.takes(DECLARED[likelihood], x, h, layers):
                    return chain.chain_log_prob(DECLARED[likelihood], x, h, layers)
                h = plain.forward(*layers.wide(h))
            return function(DECLARED[likelihood], x, h, layers)

        return log_prob

    def check(self, *args):
        _check_inputs(self.contract, *args[:-2])

    def fake(self, x, h, *rest):
        dtype = result_dtype(*(t for t in (x, h, *rest[:-2]) if t is not None))
        return h.new_empty(h.shape[0] // x.shape[0], x.shape[0], dtype=dtype)

    def forward(self, run, ctx, *args):
        ctx.set_materialize_grads(False)
        *tensors, ctx.likelihood, ctx.activations = args
        ctx.save_for_backward(*tensors)
        return run(*args)

    def backward(self, run, ctx, grad):
        need = list(ctx.needs_input_grad[1:_TENSORS])
        return None, *run(grad, *ctx.saved_tensors, ctx.likelihood, ctx.activations, need), None, None


class _ReduceLinearBackward(Op):
    """Op for the gradients of (h, weight, bias, constants, term), None where not needed."""

    module = "head"
    replays = False  # its products depend on torch's settings
    name = "reduce_linear_backward"
    record = BoundReduction
    results = ", ".join(["Tensor"] * (_GRADIENTS + 1))
    schema = (
        f"(Tensor? grad_bound, Tensor? grad_log_likelihood, Tensor? weights, {_INPUTS}, Tensor? term, "
        f"Tensor? beta, {_HOW}, str likelihood, str activations, bool[{_GRADIENTS + 1}] need) -> ({results})"
    )

    def native(self, *args):
        return self._by(_linear_log_prob.gradient.native, "reference", args)

    def composed(self, backend):
        rows = _linear_log_prob.gradient.composed(backend)
        return lambda *args: self._by(rows, backend, args)

    @staticmethod
    def _by(rows, backend, args):
        grad_bound, grad_mean, weights, x, h, *rest = args
        *others, term, beta, how, likelihood, activations, need = rest
        batch = x.shape[0]
        grad, grad_term = _backend.layer(backend, "reduce").reduce_backward(
            grad_bound,
            grad_mean,
            weights,
            beta,
            how,
            h.shape[0] // batch,
            batch,
            term.dim() if need[-1] else 0,
        )
        grads = [None] * _GRADIENTS
        if any(need[:-1]):
            grads = rows(grad, x, h, *others, likelihood, activations, need[:-1])
        return *grads, grad_term if grad_term is None else grad_term.to(term.dtype).contiguous()

    def check(self, *args):
        grads, tensors, (term, beta, how) = (
            args[:3],
            args[3 : 3 + _TENSORS],
            args[3 + _TENSORS : 6 + _TENSORS],
        )
        samples = _check_inputs(self.contract, *tensors)
        check_bound(self.contract, tensors[0].shape[0], tensors[1].shape[0], term, beta, how)
        dtype = result_dtype(*(t for t in tensors if t is not None))
        check_grads(self.contract, tensors[0].shape[0], samples, how, dtype, grads)

    def fake(self, grad_bound, grad_log_likelihood, weights, x, *rest):
        tensors, need = [*rest[:_GRADIENTS], rest[_GRADIENTS]], rest[-1]
        return tuple(
            t.new_empty(t.shape) if n and t is not None else None for t, n in zip(tensors, need, strict=True)
        )


class _ReduceLinear(Op):
    """Op for the bound, the mean log-likelihood and the normalised weights.

    It also returns the gradients of (h, weight, bias, constants) for an upstream gradient of 1, if needed
    and take no further pass.
    """

    module = "head"
    replays = False  # its products depend on torch's settings
    name = "reduce_linear"
    record = BoundReduction
    shown = 2
    results = ", ".join(["Tensor"] * (3 + _GRADIENTS))
    schema = (
        f"({_INPUTS}, Tensor? term, Tensor? beta, {_HOW}, str likelihood, str activations, bool terms, "
        f"bool[{_GRADIENTS}] need) -> ({results})"
    )
    gradient = _ReduceLinearBackward()

    def __init__(self):
        self.native = functools.partial(_backend.native(self.name), self._not_native)
        super().__init__()

    def __call__(self, *args):
        wanted = torch.is_grad_enabled()
        need = [wanted and t is not None and t.requires_grad for t in args[1:_TENSORS]]
        return super().__call__(*args, need)

    @staticmethod
    def _at_once(x, h, how, terms, need):
        return any(need) and how.reduction != "none" and not terms and x.shape[0] >= FEWEST_ROWS

    def _not_native(self, x, *rest):
        """Handle calls that the C++ does not: an empty product, no BLAS, or x out of range, which raises."""
        _refuse_outside(rest[-4], x)
        return self.composed("reference")(x, *rest)

    def composed(self, backend):
        rows = _linear_log_prob.composed(backend)
        rows_backward = _linear_log_prob.gradient.composed(backend)
        layer = _backend.layer(backend, "reduce")
        in_blocks = getattr(_backend.layer(backend, "head"), "reduce_linear", None)  # Triton's

        def function(*args):
            *tensors, term, beta, how, likelihood, activations, terms, need = args
            x, h = tensors[:2]
            if (
                in_blocks
                and not activations
                and how.is_plain
                and h.numel()
                and self._at_once(x, h, how, terms, need)
            ):
                dtype = result_dtype(*(t for t in tensors if t is not None))
                # Gradients keep full precision here: they are rounded to half once, after scaling.
                rest: Any
                h, *rest = [t if t is None else cast(t, dtype) for t in tensors[1:]]
                layers = _Layers(x, *rest)
                bound, weights, *grads = in_blocks(
                    DECLARED[likelihood], x, h, layers, term, beta, how, layers.each(need[:_LAST])
                )
                grads = layers.together(grads, need[:_LAST])
                return bound, None, weights, *grads, *[None] * (_GRADIENTS - _LAST)
            log_p = rows(*tensors, likelihood, activations)
            bound, mean, weights = finish(backend, how)(log_p, term, beta, how, terms)
            grads = [None] * _GRADIENTS
            if self._at_once(x, h, how, terms, need):
                samples = h.shape[0] // x.shape[0]
                arrives, _ = layer.reduce_backward(
                    torch.ones_like(bound), None, weights, beta, how, samples, x.shape[0], 0
                )
                # Keep full precision here: the gradients are rounded to half once, after scaling.
                wide = [x, *(t if t is None else cast(t, bound.dtype) for t in tensors[1:])]
                grads = rows_backward(arrives, *wide, likelihood, activations, need)
            return bound, mean, weights, *grads

        return function

    def check(self, *args):
        tensors, (term, beta, how) = args[:_TENSORS], args[_TENSORS : _TENSORS + 3]
        _check_inputs(self.contract, *tensors)
        check_bound(self.contract, tensors[0].shape[0], tensors[1].shape[0], term, beta, how)

    def fake(self, x, h, *rest):
        *others, term, _, how, _, _, terms, need = rest
        batch, dtype = x.shape[0], result_dtype(*(t for t in (x, h, *others) if t is not None))
        bound = h.new_empty((batch,) if how.reduction == "none" else (), dtype=dtype)
        weights = None
        if how.over == "log_mean_exp":
            weights = h.new_empty(h.shape[0] // batch, batch, dtype=dtype)
        once = self._at_once(x, h, how, terms, need)
        grads = [
            t.new_empty(t.shape, dtype=dtype) if once and n and t is not None else None
            for t, n in zip((h, *others), need, strict=True)
        ]
        return bound, h.new_empty(batch, dtype=dtype) if terms else None, weights, *grads

    def forward(self, run, ctx, *args):
        results = run(*args)
        bound, mean, weights, *kept = results
        *tensors, ctx.how, ctx.likelihood, ctx.activations, _, _ = args
        ctx.set_materialize_grads(False)
        differentiable = (bound, mean) if ctx.how.over == "mean" else (bound,)
        ctx.mark_non_differentiable(
            *(r for r in results if r is not None and not any(r is d for d in differentiable))
        )
        ctx.save_for_backward(or_none(weights), *tensors)
        ctx.kept = kept if any(or_none(g) is not None for g in kept) else None
        # In a graph the gradients are outputs, which must not be modified in place.
        ctx.own = run == self.native
        return results

    def backward(self, run, ctx, grad_bound, grad_mean, *_):
        weights, *tensors = ctx.saved_tensors
        *_, term, beta = tensors
        needs = ctx.needs_input_grad
        need = [*needs[1:_TENSORS], needs[_TENSORS]]
        grad_mean = or_none(grad_mean) if grad_bound is not None else grad_mean
        rest = (None,) * 6  # beta, how, likelihood, activations, terms, need
        kept = ctx.kept and all(or_none(g) is not None for g, n in zip(ctx.kept, need[:-1], strict=True) if n)
        if not kept or grad_bound is None or grad_mean is not None or torch.is_grad_enabled():
            others = ctx.how, ctx.likelihood, ctx.activations, need
            grads = run(grad_bound, grad_mean, weights, *tensors, *others)
            return None, *grads, *rest
        # Released: a second backward pass recomputes them.
        kept, ctx.kept = ctx.kept, None
        scale = Tensor.mul_ if ctx.own else torch.mul
        grads = [
            cast(scale(g, grad_bound), t.dtype) if n else None
            for g, t, n in zip(kept, tensors[1:_TENSORS], need, strict=False)
        ]
        grad_term = None
        if need[-1]:
            x, h = tensors[:2]
            finish = _backend.layer("reference", "reduce").reduce_backward
            _, grad_term = finish(
                grad_bound, None, weights, beta, ctx.how, h.shape[0] // x.shape[0], x.shape[0], term.dim()
            )
            grad_term = cast(grad_term, term.dtype)
        return None, *grads, grad_term, *rest


class Layers(NamedTuple):
    """Unmultiplied last layers in place of a decoder's output.

    h is [K·B, H], weight [m·X, H] and bias [m·X] or None belong to the first m outputs; each further output
    is a row [X], one number [1], or None if there are fewer. h is the input of the hidden layers, if any.
    """

    h: Tensor
    weight: Tensor
    bias: Tensor | None
    constant0: Tensor | None = None
    constant1: Tensor | None = None
    hidden: tuple[HiddenLayer, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return the op's tensors after x."""
        if not self.hidden:
            return *self[:5], *_NO_HIDDEN
        of_hidden = [t for layer in self.hidden for t in layer[:2]]
        return *self[:5], *of_hidden, *_NO_HIDDEN[len(of_hidden) :]

    @property
    def activations(self) -> str:
        return " ".join([layer.activation for layer in self.hidden]) if self.hidden else ""


_NO_HIDDEN = (None,) * (2 * MOST_HIDDEN)


_linear_log_prob = _LinearLogProb()
_reduce_linear = _ReduceLinear()


def reduce_linear(
    likelihood: str,
    x: Tensor,
    layers: Layers,
    term: Tensor | None,
    beta: Tensor | None,
    how: BoundReduction,
    terms: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return the bound of a batch, as :func:`fastvae.ops.reduce.reduce`, for x [B, X] and :class:`Layers`."""
    activations = layers.activations
    bound, mean = _reduce_linear(x, *layers.tensors, term, beta, how, likelihood, activations, terms)
    return bound, mean if terms else None


def linear_rows(likelihood: str, x: Tensor, layers: Layers) -> Tensor:
    """Return log p(x|z) [K, B] for x [B, X] and :class:`Layers`."""
    return _linear_log_prob(x, *layers.tensors, likelihood, layers.activations)


def linear_log_prob(
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *constants: Tensor | float,
    likelihood: str = "bernoulli",
) -> Tensor:
    r"""Return log p(x|z) for a decoder that ends in a linear layer, whose output is never stored.

    .. math:: \log p(x|z_k) = \sum_i v(x_i, a_{ki}), \quad a_k = W h_k + c

    Args:
        x: data [B, \*event] with X numbers per example; it has no gradient.
        h: the layer's input, [..., B, H].
        weight: [m·X, H], for the concatenation of the likelihood's first m outputs: for a Gaussian m is 2,
            (mean, logvar), or 1 if its logvar is given in ``constants``.
        bias: [m·X], or None.
        *constants: the other outputs, each a number, or a tensor with one or X numbers.
        likelihood: the name of a likelihood that has an op ``fastvae.ops.<name>_log_prob``.

    Returns:
        nats [..., B], in float32 (float64 if one of the tensors is). Sums are accumulated in this dtype,
        including those over rows in the gradients of a half-precision weight.

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, several devices, an unknown likelihood,
            or data out of its range.

    References:
        Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024, for a softmax.

    Example:
        >>> import torch, fastvae
        >>> x, h, layer = torch.ones(4, 7), torch.randn(50, 4, 3), torch.nn.Linear(3, 7)
        >>> log_p = fastvae.ops.linear_log_prob(x, h, layer.weight, layer.bias, likelihood="bernoulli")
        >>> log_p.shape, torch.allclose(log_p, fastvae.ops.bernoulli_log_prob(x, layer(h)), atol=1e-5)
        (torch.Size([50, 4]), True)
    """
    if likelihood not in DECLARED:
        known = ", ".join(map(repr, sorted(DECLARED)))
        raise ValueError(f"likelihood={likelihood!r} is unknown here; known: {known}")
    declared = DECLARED[likelihood]
    x = check_data(x, declared)
    if isinstance(x, Tensor) and x.requires_grad:
        raise ValueError(
            "x requires a gradient, which linear_log_prob does not have; pass x.detach(), or run the layer "
            f"and use fastvae.ops.{likelihood}_log_prob"
        )
    named = {"h": h, "weight": weight, "bias": bias}
    for name, t in named.items():
        if t is not None:
            check_tensor(name, t)
            check_same_device(name, t, "x", x)
    size = math.prod(x.shape[1:])
    if x.dim() == 0 or h.dim() < 2 or h.shape[-2] != x.shape[0]:
        raise ValueError(
            f"h has shape {shape_of(h)} and x {shape_of(x)}; expected [..., B, H] and [B, *event], of the "
            "same B"
        )
    outputs = len(declared.outputs)
    products = outputs - len(constants)
    names = ", ".join(declared.outputs)
    if weight.dim() != 2 or products < 1 or weight.shape != (products * size, h.shape[-1]):
        raise ValueError(
            f"weight has shape {shape_of(weight)}; expected [m·X, H] = [{products}·{size}, {h.shape[-1]}], "
            f"of the {products} outputs of a {likelihood} likelihood ({names}) that are not constant"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {shape_of(bias)}; expected [m·X] = [{weight.shape[0]}]")
    check_support(declared, x)
    rows = []
    for name, value in zip(declared.outputs[products:], constants, strict=True):
        p = as_tensor(value, None if isinstance(value, Tensor) else torch.float32, x.device)
        if p.numel() not in (1, size):
            raise ValueError(f"{name} has shape {shape_of(p)}; expected one number, or X = {size} of them")
        check_same_device(name, p, "x", x)
        rows.append(p.reshape(-1))
    first, second = [*rows, None, None][:2]
    layers = Layers(h.reshape(-1, h.shape[-1]), weight, bias, first, second)
    return linear_rows(likelihood, x.reshape(x.shape[0], size), layers).reshape(h.shape[:-1])
