r"""Likelihoods that are mixtures, marginalised over a component axis.

With logits :math:`a_{nc}` and components' log-likelihoods :math:`v_{nc} = \sum_e v(x_e, θ_{nce})` over the
channels of a position,

.. math:: \log p = \log \sum_c e^{s_{nc}} - \log \sum_c e^{a_{nc}}, \quad s_{nc} = a_{nc} + v_{nc}

With the upstream gradient :math:`g`,
:math:`π_{nc} = e^{a_{nc}} / \sum e^{a}` and :math:`r_{nc} = e^{s_{nc}} / \sum e^{s}`:
:math:`\bar a_{nc} = g\, (r_{nc} - π_{nc})` and :math:`\bar θ_{nce} = g\, r_{nc}\, ∂v/∂θ`. Each
direction is one pass over the parameters, component by component, with running maxima and sums. The two
log-sums of each position are kept for the gradient.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

from torch import Tensor

from ..core import backend as _backend
from ..core.checks import check_data, check_same_device, check_tensor, shape_of
from ._contract import Contract
from .categorical import Classes
from .likelihood import result_dtype
from .op import Op

_PARAMETERS = "Tensor logits, Tensor location, Tensor log_scale, Tensor? coefficients"


def _check_inputs(contract: Contract, x: Tensor, parameters: Sequence[Tensor | None]) -> None:
    logits, *others = parameters
    assert logits is not None
    contract.expect("logits", logits, None, (-1, -1, -1))
    rows, components, positions = logits.shape
    contract.expect_count("the number of components", components)
    if x.is_complex() or x.dim() != 3 or x.shape[2] != positions:
        contract.refuse("x", x, f"[B, E, {positions}]")
    if rows % x.shape[0] if x.shape[0] else rows:
        contract.refuse("logits", logits, f"a multiple of x's {x.shape[0]} rows")
    for name, p in zip(("location", "log_scale", "coefficients"), others, strict=True):
        contract.expect(name, p, None, (rows, components * x.shape[1], positions))
        if name == "coefficients" and p is not None and x.shape[1] != 3:
            contract.refuse(name, p, "None, where x has not three channels")


class _MixtureBackward(Op):
    """Op for the gradients of (x, *parameters), None where not needed and always for x."""

    module = "components"
    name = "discretized_logistic_mixture_log_prob_backward"
    schema = (
        f"(Tensor grad, Tensor normaliser, Tensor joint, Tensor x, {_PARAMETERS}, float half, bool[5] need) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def __init__(self):
        self.native = functools.partial(
            _backend.native("components_log_prob_backward"), self.composed("reference")
        )
        super().__init__()

    def check(self, grad, normaliser, joint, x, *rest):
        *parameters, _, _ = rest
        _check_inputs(self.contract, x, parameters)
        dtype = result_dtype(x, *(p for p in parameters if p is not None))
        rows, _, positions = parameters[0].shape
        self.contract.expect("grad", grad, dtype, (rows,))
        self.contract.expect("normaliser", normaliser, dtype, (rows, positions))
        self.contract.expect("joint", joint, dtype, (rows, positions))

    def fake(self, grad, normaliser, joint, *rest):
        *tensors, _, need = rest
        return tuple(t.new_empty(t.shape) if n else None for t, n in zip(tensors, need, strict=True))


class _Mixture(Op):
    """Op for log p [N], and both log-sums [N, P].

    It takes x [B, E, P], logits [N, C, P] and the components' parameters [N, C E, P].
    """

    module = "components"
    name = "discretized_logistic_mixture_log_prob"
    schema = f"(Tensor x, {_PARAMETERS}, float half) -> (Tensor, Tensor, Tensor)"
    shown = 1
    gradient = _MixtureBackward()

    def __init__(self):
        self.native = functools.partial(_backend.native("components_log_prob"), self.composed("reference"))
        super().__init__()

    def check(self, x, *rest):
        _check_inputs(self.contract, x, rest[:-1])

    def fake(self, x, logits, *rest):
        dtype = result_dtype(x, logits, *(p for p in rest[:-1] if p is not None))
        sums = [logits.new_empty((logits.shape[0], logits.shape[2]), dtype=dtype) for _ in range(2)]
        return logits.new_empty(logits.shape[0], dtype=dtype), *sums

    def forward(self, run, ctx, *args):
        out, normaliser, joint = run(*args)
        *tensors, ctx.half = args
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(normaliser, joint)
        ctx.save_for_backward(normaliser, joint, *tensors)
        return out, normaliser, joint

    def backward(self, run, ctx, grad, *_):
        _, *need, _ = ctx.needs_input_grad
        return *run(grad, *ctx.saved_tensors, ctx.half, [False, *need]), None


_mixture = _Mixture()


def mixture_rows(x: Tensor, parameters: Sequence[Tensor | None], half: float) -> Tensor:
    """Return log p [N] of x [B, E, *positions], logits [N, C, *positions], others [N, C, E, *positions]."""
    logits, *others = parameters
    assert logits is not None
    parts = [None if p is None else _flat(p.flatten(1, 2), 2) for p in others]
    return _mixture(_flat(x, 2), _flat(logits, 2), *parts, half)[0]


def _flat(tensor: Tensor, first: int) -> Tensor:
    return tensor.reshape(*tensor.shape[:first], math.prod(tensor.shape[first:]))


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

    Example:
        >>> import torch, fastvae
        >>> x = torch.zeros(4, 3, 5)  # three channels of five positions; six components
        >>> logits, (location, log_scale) = torch.zeros(2, 4, 6, 5), torch.zeros(2, 2, 4, 6, 3, 5)
        >>> fastvae.ops.discretized_logistic_mixture_log_prob(x, logits, location, log_scale).shape
        torch.Size([2, 4])
    """
    x = check_data(x, Classes)
    lead = logits.dim() - x.dim()
    named = {"logits": logits, "location": location, "log_scale": log_scale, "coefficients": coefficients}
    for name, p in named.items():
        if p is None:
            continue
        check_tensor(name, p)
        check_same_device(name, p, "x", x)
        own = (x.shape[1],) if name != "logits" else ()
        expected = (*logits.shape[: lead + 2], *own, *x.shape[2:])
        if x.dim() < 2 or lead < 0 or logits.shape[lead] != x.shape[0] or p.shape != expected:
            raise ValueError(
                f"{name} has shape {shape_of(p)} for an x of {shape_of(x)}; expected x [B, E, *positions], "
                "logits [..., B, M, *positions], the others [..., B, M, E, *positions]"
            )
    if coefficients is not None and x.shape[1] != 3:
        raise ValueError(f"coefficients are of 3 colours, but x has {x.shape[1]} channels: {shape_of(x)}")
    rows = [
        None if p is None else p.reshape(math.prod(p.shape[: lead + 1]), *p.shape[lead + 1 :])
        for p in named.values()
    ]
    return mixture_rows(x, rows, 1.0 / (levels - 1)).reshape(logits.shape[: lead + 1])
