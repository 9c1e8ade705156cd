r"""The log_prob op of classes.

With logits :math:`a_{nc}` of a position and its class :math:`x_n`,

.. math:: \log p = a_{n x_n} - L_n, \quad L_n = \log \sum_c e^{a_{nc}}

and with the upstream gradient :math:`g`: :math:`\bar a_{nc} = g\, ([x_n = c] - e^{a_{nc} - L_n})`. Each
direction is one pass over the logits. The log-sums :math:`L_n` are kept for the gradient. The classes are the
axis after the batch's, or the last axis; neither is copied. Where the number of classes varies by
position (the columns of a table), the logits of all positions are one row.
"""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..core import backend as _backend
from ..core.checks import check_data, check_same_device, check_tensor, may_look, shape_of
from ..core.constants import cached_constant
from ..core.fast_path import in_eager_mode, is_native, is_usual
from ..core.torch_private import is_functorch_wrapped
from ._contract import Contract
from .likelihood import result_dtype
from .op import Op

AXES = (1, -1)
_INPUTS = "Tensor x, Tensor? begins, Tensor logits, bool last, int ignore_index"


def _check_inputs(contract: Contract, x: Tensor, begins: Tensor | None, logits: Tensor, last: bool) -> None:
    if begins is not None:
        contract.expect("logits", logits, None, (-1, -1))
        contract.expect("begins", begins, torch.int64, (-1,))
        rows, positions = logits.shape[0], begins.shape[0] - 1
    else:
        contract.expect("logits", logits, None, (-1, -1, -1))
        rows, classes, positions = logits.shape if not last else (logits.shape[i] for i in (0, 2, 1))
        contract.expect_count("the number of classes", classes)
    if x.is_complex() or x.dim() != 2 or x.shape[1] != positions:
        contract.refuse("x", x, f"[B, {positions}]")
    if rows % x.shape[0] if x.shape[0] else rows:
        contract.refuse("logits", logits, f"a multiple of x's {x.shape[0]} rows")


class _CategoricalLogProbBackward(Op):
    """Gradient of the logits."""

    module = "categorical"
    name = "categorical_log_prob_backward"
    schema = f"(Tensor grad, Tensor normaliser, {_INPUTS}) -> Tensor"

    def __init__(self):
        self.native = functools.partial(_backend.native(self.name), self.composed("reference"))
        super().__init__()

    def check(self, grad, normaliser, x, begins, logits, last, ignore_index):
        _check_inputs(self.contract, x, begins, logits, last)
        dtype = result_dtype(x, logits)
        self.contract.expect("grad", grad, dtype, (logits.shape[0],))
        self.contract.expect("normaliser", normaliser, dtype, (logits.shape[0], x.shape[1]))

    def fake(self, grad, normaliser, x, begins, logits, last, ignore_index):
        return logits.new_empty(logits.shape)


class _CategoricalLogProb(Op):
    """Op for log p [N] and log-sums [N, P] of x [B, P], given logits [N, C, P], or [N, P, C] if ``last``.

    With ``begins`` [P + 1] logits are [N, W]; position p has the columns from begins[p] to begins[p + 1].
    """

    module = "categorical"
    name = "categorical_log_prob"
    schema = f"({_INPUTS}) -> (Tensor, Tensor)"
    shown = 1
    gradient = _CategoricalLogProbBackward()

    def __init__(self):
        self.native = functools.partial(_backend.native(self.name), self._not_native)
        super().__init__()

    def _not_native(self, x, begins, logits, last, ignore_index):
        """Handle calls that the C++ declines: nothing to sum, or an invalid class, which raises."""
        if logits.numel() and x.numel():
            if begins is not None:
                check_columns(x, begins.tolist(), ignore_index, True)
            refuse_classes(x, logits.shape[2 if last else 1], ignore_index)
        return self.composed("reference")(x, begins, logits, last, ignore_index)

    def check(self, x, begins, logits, last, ignore_index):
        _check_inputs(self.contract, x, begins, logits, last)

    def fake(self, x, begins, logits, last, ignore_index):
        dtype = result_dtype(x, logits)
        sums = logits.new_empty((logits.shape[0], x.shape[1]), dtype=dtype)
        return logits.new_empty(logits.shape[0], dtype=dtype), sums

    def forward(self, run, ctx, x, begins, logits, last, ignore_index):
        out, normaliser = run(x, begins, logits, last, ignore_index)
        ctx.settings = last, ignore_index
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(normaliser)
        ctx.save_for_backward(normaliser, x, begins, logits)
        return out, normaliser

    def backward(self, run, ctx, grad, *_):
        wanted = ctx.needs_input_grad[2]
        return None, None, run(grad, *ctx.saved_tensors, *ctx.settings) if wanted else None, None, None


_categorical_log_prob = _CategoricalLogProb()


def refuse_classes(x: Tensor, classes: int, ignore_index: int, name: str = "x") -> NoReturn:
    """Raise ValueError for x that does not hold whole numbers in [0, classes)."""
    values = x.detach().double().flatten()
    wrong = ~((values >= 0) & (values < classes) & (values == values.floor()))
    wrong &= (values != ignore_index) & ~values.isnan()
    raise ValueError(
        f"{name} holds {values[wrong][0]:g}, but classes are whole numbers from 0 to {classes - 1}, as many "
        f"as logits has classes (or ignore_index={ignore_index:g}, which does not count)"
    )


def check_classes(x: Tensor, classes: int, ignore_index: int) -> None:
    """Validate classes where the op does not, if data checks are enabled or free."""
    if may_look(x):
        x = x if x.is_floating_point() else x.long()  # uint8 represents neither 256 nor -100
        fits = (x >= 0) & (x < classes) | (x == ignore_index) | (x != x)
        if x.is_floating_point():
            fits &= (x == x.floor()) | (x != x)
        if not bool(fits.all()):
            refuse_classes(x, classes, ignore_index)


def check_columns(x: Tensor, begins: list[int], ignore_index: int, look: bool = False) -> None:
    """Validate classes [B, P], of a number for each column, if data checks are enabled or free."""
    if not (look or may_look(x)):
        return
    widths = torch.tensor([end - begin for begin, end in itertools.pairwise(begins)], device=x.device)
    values = x.detach()
    wrong = ~(
        (values >= 0) & (values < widths) & (values == values.floor() if x.is_floating_point() else True)
    )
    wrong &= (values != ignore_index) & (values == values)
    if bool(wrong.any()):
        column = int(wrong.any(0).nonzero()[0])
        refuse_classes(x[:, column], int(widths[column]), ignore_index, f"column {column} of classes in x")


def column_rows(x: Tensor, begins: tuple[int, ...], logits: Tensor, ignore_index: int) -> Tensor:
    """Return log p [N] of classes x [B, P], given logits [N, W] that begin at ``begins`` for each column."""
    if not torch.compiler.is_compiling() and not (x.is_cpu and _backend.on_cpu() == "native"):
        check_columns(x, list(begins), ignore_index)
    table = _table(begins, logits.device)
    return _categorical_log_prob(x, table, logits, True, ignore_index)[0]


@cached_constant(256)
def _table(begins: tuple[int, ...], device: torch.device) -> Tensor:
    """Return begins as a tensor on the device."""
    return torch.tensor(begins, device=device)


def categorical_rows(x: Tensor, logits: Tensor, ignore_index: int, axis: int = 1) -> Tensor:
    """Return log p [N] of x [B, *event] and validated logits [N, C, *event], or [N, *event, C]."""
    batch, event = x.shape[0], math.prod(x.shape[1:])
    last, rows = axis == -1, logits.shape[0]
    # The C++ checks in the pass that reads the data.
    if not torch.compiler.is_compiling() and not (x.is_cpu and _backend.on_cpu() == "native"):
        check_classes(x, logits.shape[axis], ignore_index)
    x = x if x.dim() == 2 else x.reshape(batch, event)
    if event == 1 and logits.dim() == 2:
        # A table of one column: a view of the logits would cost as much as the kernel.
        begins = _table((0, logits.shape[1]), logits.device)
        return _categorical_log_prob(x, begins, logits, True, ignore_index)[0]
    if not last and logits.stride(1) == 1 and logits.shape[1] > 1:
        logits, last = logits.movedim(1, -1), True
    shape = (rows, event, logits.shape[-1]) if last else (rows, logits.shape[1], event)
    if logits.shape != shape:
        logits = logits.reshape(shape)
    return _categorical_log_prob(x, None, logits, last, ignore_index)[0]


def _is_column(x: Any, logits: Any) -> bool:
    """Return True for int64 classes [B] and logits [B, C] on the fast path, the smallest of all calls."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and in_eager_mode()
        and is_native(x)
        and is_usual(logits, None if x.is_cpu else x.device)
        and x.dtype is torch.int64
        and x.layout is torch.strided
        and x.dim() == 1
        and logits.dim() == 2
        and x.shape[0] == logits.shape[0]
        and not is_functorch_wrapped(x)
    )


def check_axis(axis: int) -> None:
    if isinstance(axis, bool) or axis not in AXES:
        raise ValueError(f"axis must be 1, the axis after the batch's, or -1, the last; got {axis!r}")


def categorical_log_prob(x: Tensor, logits: Tensor, ignore_index: int = -100, *, axis: int = 1) -> Tensor:
    r"""Return log p(x|z) of classes, summed over the event; see :class:`fastvae.likelihoods.Categorical`.

    .. math:: \log p(x|z_k) = \sum_i \Big[l_{k x_i i} - \log \sum_c e^{l_{kci}}\Big]

    Args:
        x: classes [B, \*event], whole numbers of any dtype; broadcast over the leading axes of logits.
        logits: class logits [..., B, C, \*event], or [..., B, \*event, C] for ``axis=-1``.
        ignore_index: the class whose elements are skipped.
        axis: the classes' axis: 1 (default), the one after the batch's, or −1, the last.

    Returns:
        nats [..., B], in float32 (float64 if logits is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, several devices, or an invalid class in x
            (on a GPU if FASTVAE_CHECK is 1).

    Example:
        >>> import torch, fastvae
        >>> tokens, logits = torch.tensor([[1, 3, 2], [0, -100, -100]]), torch.zeros(2, 3, 4)
        >>> fastvae.ops.categorical_log_prob(tokens, logits, axis=-1)  # -3 log 4, -log 4
        tensor([-4.1589, -1.3863])
    """
    if _is_column(x, logits):
        check_axis(axis)
        begins = _table((0, logits.shape[1]), logits.device)
        wanted = logits.requires_grad and torch.is_grad_enabled()
        return _categorical_log_prob.direct(wanted, x.unsqueeze(1), begins, logits, True, ignore_index)[0]
    x = check_data(x, Classes)
    check_axis(axis)
    check_tensor("logits", logits)
    check_same_device("logits", logits, "x", x)
    lead = logits.dim() - x.dim() - 1
    event = logits.shape[lead + 2 :] if axis == 1 else logits.shape[lead + 1 : -1]
    if x.dim() == 0 or lead < 0 or (logits.shape[lead], *event) != x.shape:
        order = "C, *event" if axis == 1 else "*event, C"
        raise ValueError(
            f"logits has shape {shape_of(logits)} and x {shape_of(x)}; expected [..., B, {order}] and [B, "
            f"*event]{classes_hint(x, logits.flatten(0, lead) if lead > 0 else logits, axis)}"
        )
    if lead == 0:
        return categorical_rows(x, logits, ignore_index, axis)
    rows = logits.reshape(math.prod(logits.shape[: lead + 1]), *logits.shape[lead + 1 :])
    return categorical_rows(x, rows, ignore_index, axis).reshape(logits.shape[: lead + 1])


def classes_hint(x: Tensor, logits: Tensor, axis: int) -> str:
    """Explain the usual mistakes: one-hot x, and classes along the other axis."""
    if x.shape[1:] == logits.shape[1:]:
        where = 1 if axis == 1 else -1
        return f"; x is as large as the logits: of one-hot vectors pass the classes, x.argmax({where})"
    event = logits.shape[1:-1] if axis == 1 else logits.shape[2:]
    if logits.dim() == x.dim() + 1 and event == x.shape[1:]:
        other = -axis
        return f"; the logits' classes are axis {other}: pass axis={other}"
    return f": the classes are {'the axis after the batch' if axis == 1 else 'the last axis'}"


class Classes:
    """Properties of x, for check_data."""

    takes_integers = True
    differentiable = False
