r"""Likelihoods with a component axis: classes, and mixtures marginalised over their components.

With logits :math:`a_{nc}` and components' log-likelihoods :math:`v_{nc} = \sum_e v(x_e, θ_{nce})` over the
channels of a position,

.. math:: \log p = \log \sum_c e^{s_{nc}} - \log \sum_c e^{a_{nc}}, \quad s_{nc} = a_{nc} + v_{nc}

where a class is a component that emits its number with certainty. With the upstream gradient :math:`g`,
:math:`π_{nc} = e^{a_{nc}} / \sum e^{a}` and :math:`r_{nc} = e^{s_{nc}} / \sum e^{s}`:
:math:`\bar a_{nc} = g\, (r_{nc} - π_{nc})` and :math:`\bar θ_{nce} = g\, r_{nc}\, ∂v/∂θ`. Each
direction is one pass over the parameters, component by component, with running maxima and sums. The two
log-sums of each position are kept for the gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..core import backend as _backend
from ..core.checks import check_data, check_same_device, check_tensor, may_look, shape_of
from ._contract import Contract
from .likelihood import result_dtype
from .op import Op

# For fewer positions the SIMD lanes of a CPU would be partly empty. As in csrc/calls/components.hpp.
FEWEST_POSITIONS = 8


class _Components(Op):
    """Op for log p [N], and both log-sums [N, P].

    It takes x [B, E, P], logits [N, C, P] and the components' parameters [N, C E, P].
    """

    module = "components"
    shown = 1

    def __init__(self, name: str, parameters: tuple[str, ...], optional: tuple[str, ...] = ()):
        self.likelihood = name
        self.name = f"{name}_log_prob"
        self.parameters = len(parameters) + len(optional)
        inputs = ", ".join([f"Tensor {p}" for p in parameters] + [f"Tensor? {p}" for p in optional])
        self.schema = f"(Tensor x, {inputs}, float setting) -> (Tensor, Tensor, Tensor)"
        self.gradient = _ComponentsBackward(name, self.parameters, inputs)
        self.native = functools.partial(_backend.native("components_log_prob"), self._not_native)
        super().__init__()

    def _not_native(self, x, *rest):
        """Handle calls that the C++ does not: :func:`_left_to_torch`, or an invalid class, which raises."""
        *parameters, setting = rest
        if not _left_to_torch(x, parameters):
            refuse_classes(x, parameters[0].shape[1], setting)
        return self.composed("reference")(x, *rest)

    def composed(self, backend):
        return getattr(_backend.layer(backend, self.module), self.likelihood)

    def check(self, x, *rest):
        _check_inputs(self.contract, x, rest[:-1])

    def fake(self, x, *rest):
        logits = rest[0]
        dtype = result_dtype(x, *(p for p in rest[: self.parameters] if p is not None))
        sums = [logits.new_empty((logits.shape[0], logits.shape[2]), dtype=dtype) for _ in range(2)]
        return logits.new_empty(logits.shape[0], dtype=dtype), *sums

    def forward(self, run, ctx, *args):
        out, normaliser, joint = run(*args)
        *tensors, ctx.setting = args
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(normaliser, joint)
        ctx.save_for_backward(normaliser, joint, *tensors)
        return out, normaliser, joint

    def backward(self, run, ctx, grad, *_):
        _, *need = ctx.needs_input_grad[: 1 + self.parameters]
        return *run(grad, *ctx.saved_tensors, ctx.setting, [False, *need]), None


class _ComponentsBackward(Op):
    """Op for the gradients of (x, *parameters), None where not needed."""

    module = "components"

    def __init__(self, name: str, parameters: int, inputs: str):
        self.likelihood, self.parameters = name, parameters
        self.name = f"{name}_log_prob_backward"
        results = ", ".join(["Tensor"] * (1 + parameters))
        self.schema = (
            f"(Tensor grad, Tensor normaliser, Tensor joint, Tensor x, {inputs}, float setting, "
            f"bool[{1 + parameters}] need) -> ({results})"
        )
        self.native = functools.partial(
            _backend.native("components_log_prob_backward"), self.composed("reference")
        )
        super().__init__()

    def composed(self, backend):
        function = getattr(_backend.layer(backend, self.module), f"{self.likelihood}_backward")

        def backward(*args):
            return function(*args)[: 1 + self.parameters]

        return backward

    def check(self, grad, normaliser, joint, x, *rest):
        parameters = rest[:-2]
        _check_inputs(self.contract, x, parameters)
        dtype = result_dtype(x, *(p for p in parameters if p is not None))
        rows, _, positions = parameters[0].shape
        self.contract.expect("grad", grad, dtype, (rows,))
        self.contract.expect("normaliser", normaliser, dtype, (rows, positions))
        self.contract.expect("joint", joint, dtype, (rows, positions))

    def fake(self, grad, normaliser, joint, *rest):
        *tensors, _, need = rest
        return tuple(t.new_empty(t.shape) if n else None for t, n in zip(tensors, need, strict=True))


def _left_to_torch(x: Tensor, parameters: list[Tensor]) -> bool:
    """Return True for nothing to sum, classes with few positions, or more channels than the C++ supports."""
    few = len(parameters) == 1 and parameters[0].shape[2] < FEWEST_POSITIONS
    return not parameters[0].numel() or not x.numel() or few or x.shape[1] > 3


def _check_inputs(contract: Contract, x: Tensor, parameters: Sequence[Tensor | None]) -> None:
    logits, *others = parameters
    assert logits is not None
    contract.expect("logits", logits, None, (-1, -1, -1))
    rows, components, positions = logits.shape
    contract.expect_count("the number of components", components)
    if x.is_complex() or x.dim() != 3 or x.shape[2] != positions or (not others and x.shape[1] != 1):
        contract.refuse("x", x, f"[B, {'E' if others else 1}, {positions}]")
    if rows % x.shape[0] if x.shape[0] else rows:
        contract.refuse("logits", logits, f"a multiple of x's {x.shape[0]} rows")
    for name, p in zip(contract.names[-len(others) :] if others else (), others, strict=True):
        contract.expect(name, p, None, (rows, components * x.shape[1], positions))
        if name == "coefficients" and p is not None and x.shape[1] != 3:
            contract.refuse(name, p, "None, where x has not three channels")


_categorical = _Components("categorical", ("logits",))
_mixture = _Components("discretized_logistic_mixture", ("logits", "location", "log_scale"), ("coefficients",))


def refuse_classes(x: Tensor, classes: int, ignore_index: float) -> None:
    """Raise ValueError for x that does not hold whole numbers in [0, classes)."""
    values = x.detach().double().flatten()
    wrong = ~((values >= 0) & (values < classes) & (values == values.floor()))
    wrong &= (values != ignore_index) & ~values.isnan()
    raise ValueError(
        f"x holds {values[wrong][0]:g}, but classes are whole numbers from 0 to {classes - 1}, as many as "
        f"logits has along axis 1 (or ignore_index={ignore_index:g}, which does not count); pass class "
        "indices, not one-hot vectors"
    )


def check_classes(x: Tensor, classes: int, ignore_index: float) -> None:
    """Validate classes where the op does not, if data checks are enabled or free."""
    if may_look(x):
        x = x if x.is_floating_point() else x.long()  # uint8 represents neither 256 nor -100
        fits = (x >= 0) & (x < classes) | (x == ignore_index) | (x != x)
        if x.is_floating_point():
            fits &= (x == x.floor()) | (x != x)
        if not bool(fits.all()):
            refuse_classes(x, classes, ignore_index)


def categorical_rows(x: Tensor, logits: Tensor, ignore_index: int) -> Tensor:
    """Return log p [N] of x [B, *event] and validated logits [N, C, *event]."""
    # The C++ checks in the pass that reads the data.
    if not torch.compiler.is_compiling() and not (
        x.is_cpu and _backend.on_cpu() == "native" and logits.shape[2:].numel() >= FEWEST_POSITIONS
    ):
        check_classes(x, logits.shape[1], ignore_index)
    return _categorical(x.reshape(len(x), 1, x.shape[1:].numel()), _flat(logits, 2), float(ignore_index))[0]


def mixture_rows(x: Tensor, parameters: Sequence[Tensor | None], half: float) -> Tensor:
    """Return log p [N] of x [B, E, *positions], logits [N, C, *positions], others [N, C, E, *positions]."""
    logits, *others = parameters
    assert logits is not None
    parts = [None if p is None else _flat(p.flatten(1, 2), 2) for p in others]
    return _mixture(_flat(x, 2), _flat(logits, 2), *parts, half)[0]


def _flat(tensor: Tensor, first: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:first], tensor.shape[first:].numel())


def categorical_log_prob(x: Tensor, logits: Tensor, ignore_index: int = -100) -> Tensor:
    r"""Return log p(x|z) of classes, summed over the event; see :class:`fastvae.likelihoods.Categorical`.

    Args:
        x: classes [B, \*event], whole numbers of any dtype; broadcast over the leading axes of logits.
        logits: class logits [..., B, C, \*event].
        ignore_index: the class whose elements are skipped.

    Returns:
        nats [..., B], in float32 (float64 if logits is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, several devices, or an invalid class in x
            (on a GPU if FASTVAE_CHECK is 1).
    """
    x = check_data(x, _Classes)
    check_tensor("logits", logits)
    check_same_device("logits", logits, "x", x)
    lead = logits.dim() - x.dim() - 1
    if x.dim() == 0 or lead < 0 or (logits.shape[lead], *logits.shape[lead + 2 :]) != x.shape:
        raise ValueError(
            f"logits has shape {shape_of(logits)} and x {shape_of(x)}; expected [..., B, C, *event] and [B, "
            "*event]: the classes are the axis after the batch's"
        )
    rows = logits.reshape(logits.shape[: lead + 1].numel(), *logits.shape[lead + 1 :])
    return categorical_rows(x, rows, ignore_index).reshape(logits.shape[: lead + 1])


def discretized_logistic_mixture_log_prob(
    x: Tensor,
    logits: Tensor,
    location: Tensor,
    log_scale: Tensor,
    coefficients: Tensor | None = None,
    *,
    levels: int = 256,
) -> Tensor:
    r"""Return log p(x|z) of values on a grid, summed over the event.

    The formula is that of :class:`fastvae.likelihoods.DiscretizedLogisticMixture`.

    Args:
        x: data [B, E, \*positions] on [−1, 1], of E channels; broadcast over the leading axes of logits.
        logits: logits of the components [..., B, M, \*positions].
        location: locations [..., B, M, E, \*positions].
        log_scale: log scales [..., B, M, E, \*positions].
        coefficients: coefficients of the preceding colours, [..., B, M, 3, \*positions], if E is 3, or None.
        levels: number of values of x.

    Returns:
        nats [..., B], in float32 (float64 if one of the arguments is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.
    """
    x = check_data(x, _Classes)
    lead = logits.dim() - x.dim()
    named = {"logits": logits, "location": location, "log_scale": log_scale, "coefficients": coefficients}
    for name, p in named.items():
        if p is None:
            continue
        check_tensor(name, p)
        check_same_device(name, p, "x", x)
        own = (x.shape[1],) if name != "logits" else ()
        expected = (*logits.shape[: lead + 2], *own, *x.shape[2:])
        if x.dim() < 2 or lead < 0 or logits.shape[lead] != len(x) or p.shape != expected:
            raise ValueError(
                f"{name} has shape {shape_of(p)} for an x of {shape_of(x)}; expected x [B, E, *positions], "
                "logits [..., B, M, *positions], the others [..., B, M, E, *positions]"
            )
    if coefficients is not None and x.shape[1] != 3:
        raise ValueError(f"coefficients are of 3 colours, but x has {x.shape[1]} channels: {shape_of(x)}")
    rows = [
        None if p is None else p.reshape(p.shape[: lead + 1].numel(), *p.shape[lead + 1 :])
        for p in named.values()
    ]
    return mixture_rows(x, rows, 1.0 / (levels - 1)).reshape(logits.shape[: lead + 1])


class _Classes:
    """Properties of x, for check_data."""

    takes_integers = True
    differentiable = False
