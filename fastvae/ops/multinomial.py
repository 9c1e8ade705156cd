r"""The log_prob op of counts over an event.

With counts :math:`x_i`, their number :math:`n = \sum_i x_i` and logits :math:`a_i`,

.. math:: \log p = \sum_i x_i (a_i - L) + \log n! - \sum_i \log x_i!, \quad L = \log \sum_j e^{a_j}

and with the upstream gradient :math:`g`: :math:`\bar a_i = g\, (x_i - n\, e^{a_i - L})`. Each direction is
one pass over the logits. The coefficient :math:`\log n! - \sum \log x_i!` depends on x alone: it is computed
once for all samples, from counts other than 0 and 1.

A count of 0 adds 0, even if its class is impossible. Classes that a mask leaves out have count 0 and
probability 0. A sparse x is given by its values and columns; no dense copy of it exists.
"""

from __future__ import annotations

import functools
import math
from typing import NoReturn

import torch
from torch import Tensor

from ..core import backend as _backend
from ..core.checks import (
    INTEGERS,
    check_data,
    check_same_device,
    check_tensor,
    may_look,
    shape_of,
    signed,
)
from ..core.nested import as_mask
from ..core.sparse import check_matrix, csr_parts, is_sparse
from ._contract import Contract
from .categorical import Classes
from .likelihood import flat_mask, result_dtype
from .op import Op

_INPUTS = "Tensor x, Tensor? begins, Tensor? columns, Tensor? mask, Tensor logits"


def _batch(x: Tensor, begins: Tensor | None) -> int:
    return x.shape[0] if begins is None else begins.shape[0] - 1


def _check_inputs(
    contract: Contract,
    x: Tensor,
    begins: Tensor | None,
    columns: Tensor | None,
    mask: Tensor | None,
    logits: Tensor,
) -> None:
    contract.expect("logits", logits, None, (-1, -1))
    rows, width = logits.shape
    if begins is None:
        if x.is_complex() or x.dim() != 2 or x.shape[1] != width:
            contract.refuse("x", x, f"[B, {width}]")
    else:
        if x.is_complex() or x.dim() != 1:
            contract.refuse("x", x, "the values of a sparse x, [M]")
        contract.expect("begins", begins, torch.int64, (-1,))
        contract.expect_count("the number of begins", begins.shape[0])
        if columns is None or columns.dtype != torch.int64 or columns.shape != x.shape:
            contract.refuse("columns", x if columns is None else columns, f"torch.int64 [{x.shape[0]}]")
    batch = _batch(x, begins)
    contract.expect("mask", mask, torch.bool, (batch, width))
    if rows % batch if batch else rows:
        contract.refuse("logits", logits, f"a multiple of x's {batch} rows")


class _MultinomialLogProbBackward(Op):
    """Gradient of the logits."""

    module = "multinomial"
    name = "multinomial_log_prob_backward"
    schema = f"(Tensor grad, Tensor normaliser, Tensor total, {_INPUTS}) -> Tensor"

    def __init__(self):
        self.native = functools.partial(_backend.native(self.name), self.composed("reference"))
        super().__init__()

    def check(self, grad, normaliser, total, x, begins, columns, mask, logits):
        _check_inputs(self.contract, x, begins, columns, mask, logits)
        dtype = result_dtype(x, logits)
        self.contract.expect("grad", grad, dtype, (logits.shape[0],))
        self.contract.expect("normaliser", normaliser, dtype, (logits.shape[0],))
        self.contract.expect("total", total, dtype, (_batch(x, begins),))

    def fake(self, grad, normaliser, total, x, begins, columns, mask, logits):
        return logits.new_empty(logits.shape)


class _MultinomialLogProb(Op):
    """Op for log p [N], log-sums [N] and numbers of counts [B], of x [B, X] and logits [N, X].

    A sparse x is given by its values [M], where rows begin among them [B + 1], and columns [M].
    """

    module = "multinomial"
    name = "multinomial_log_prob"
    schema = f"({_INPUTS}, bool coefficient) -> (Tensor, Tensor, Tensor)"
    shown = 1
    gradient = _MultinomialLogProbBackward()

    def __init__(self):
        self.native = functools.partial(_backend.native(self.name), self._not_native)
        super().__init__()

    def _not_native(self, x, begins, columns, mask, logits, coefficient):
        """Handle calls that the C++ declines: nothing to sum, or invalid counts or columns, which raise."""
        if logits.numel():
            if begins is not None:
                check_columns(begins, columns, logits.shape[1])
            refuse_counts(x if mask is None or begins is not None else x[mask])
        return self.composed("reference")(x, begins, columns, mask, logits, coefficient)

    def check(self, x, begins, columns, mask, logits, coefficient):
        _check_inputs(self.contract, x, begins, columns, mask, logits)

    def fake(self, x, begins, columns, mask, logits, coefficient):
        dtype = result_dtype(x, logits)
        rows = [logits.new_empty(logits.shape[0], dtype=dtype) for _ in range(2)]
        return *rows, logits.new_empty(_batch(x, begins), dtype=dtype)

    def forward(self, run, ctx, *args):
        out, normaliser, total = run(*args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(normaliser, total)
        ctx.save_for_backward(normaliser, total, *args[:-1])
        return out, normaliser, total

    def backward(self, run, ctx, grad, *_):
        wanted = ctx.needs_input_grad[4]
        return *[None] * 4, run(grad, *ctx.saved_tensors) if wanted else None, None


_multinomial_log_prob = _MultinomialLogProb()


def refuse_counts(x: Tensor, name: str = "x") -> NoReturn:
    """Raise ValueError for negative counts."""
    raise ValueError(f"{name} holds {float(x[x < 0].min()):g}, but counts must lie at or above 0")


def check_columns(begins: Tensor, columns: Tensor, width: int) -> None:
    """Validate the indices of a sparse x in CSR form: in range, and ascending in each row."""
    count = columns.shape[0]
    ends = begins.shape[0] == 0 or (int(begins[0]) == 0 and int(begins[-1]) == count)
    inside = not count or (int(columns.min()) >= 0 and int(columns.max()) < width)
    if ends and inside and bool((begins.diff() >= 0).all()):
        starts = torch.zeros(count + 1, dtype=torch.bool, device=columns.device)
        starts[begins] = True
        if bool(((columns.diff() >= 0) | starts[1:count]).all()):
            return
    raise ValueError(
        "x is a sparse tensor whose indices are invalid: expected columns that ascend in each row, from 0 to "
        f"{width - 1}, and {count} of them in all; build it with x.to_sparse_csr(), or "
        "torch.sparse_csr_tensor(..., check_invariants=True)"
    )


def multinomial_rows(x: Tensor, logits: Tensor, mask: Tensor | None, coefficient: bool) -> Tensor:
    """Return log p [N] of x [B, *event] and validated logits [N, *event]."""
    rows = logits if logits.dim() == 2 else logits.reshape(logits.shape[0], math.prod(logits.shape[1:]))
    begins = columns = None
    if is_sparse(x):
        x, begins, columns = csr_parts(x)
    elif x.dim() != 2:
        x = x.reshape(x.shape[0], math.prod(x.shape[1:]))
    # The C++ checks in the pass that reads the data. A compiler cannot look up the backend.
    compiling = torch.compiler.is_compiling()
    if not compiling and not (x.is_cpu and _backend.on_cpu() == "native") and may_look(x):
        seen = x if mask is None or begins is not None else x[flat_mask(mask)]
        if bool((seen < 0).any()):
            refuse_counts(seen)
        if begins is not None and columns is not None:
            check_columns(begins, columns, rows.shape[1])
    return _multinomial_log_prob(x, begins, columns, flat_mask(mask), rows, coefficient)[0]


def check_counts(x: Tensor, name: str = "x") -> Tensor:
    """Validate the kind of counts: a dense tensor, or a sparse matrix [B, X], COO or CSR."""
    if isinstance(x, Tensor):
        check_matrix(name, x)
    if not is_sparse(x):
        return check_data(x, Classes, name)
    if not (x.dtype.is_floating_point or x.dtype in INTEGERS):
        raise TypeError(f"{name} is {x.dtype}; expected counts, floating-point or integers")
    if x.requires_grad:
        raise ValueError(f"{name} requires a gradient, but counts have none; pass {name}.detach()")
    return signed(x)


def multinomial_log_prob(
    x: Tensor, logits: Tensor, *, mask: Tensor | None = None, coefficient: bool = True
) -> Tensor:
    r"""Return log p(x|z) of counts over the whole event; see :class:`fastvae.likelihoods.Multinomial`.

    .. math:: \log p(x|z_k) = \log n! - \sum_i \log x_i! + \sum_i x_i \log \mathrm{softmax}(l_k)_i,
              \quad n = \sum_i x_i

    Args:
        x: counts [B, \*event] of any dtype, or a sparse matrix [B, X], COO or CSR; broadcast over the leading
            axes of logits.
        logits: logits of the classes [..., B, \*event].
        mask: bool [B, \*event], or [\*event] for all rows: True for classes that exist. The others have count
            0 and probability 0. None: all exist.
        coefficient: include :math:`\log n! - \sum \log x_i!`, which no gradient depends on; default True.

    Returns:
        nats [..., B], in float32 (float64 if logits is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, several devices, or negative counts (on a
            GPU if FASTVAE_CHECK is 1).

    References:
        Liang, Krishnan, Hoffman & Jebara, Variational Autoencoders for Collaborative Filtering, 2018, eq. 2,
        which leaves the coefficient out.

    Example:
        >>> import torch, fastvae
        >>> clicks, logits = torch.tensor([[1, 0, 1], [0, 2, 0]]), torch.zeros(2, 3)
        >>> fastvae.ops.multinomial_log_prob(clicks, logits)  # log 2 − 2 log 3, −2 log 3
        tensor([-1.5041, -2.1972])
        >>> fastvae.ops.multinomial_log_prob(clicks.to_sparse_csr(), logits, coefficient=False)
        tensor([-2.1972, -2.1972])
    """
    x = check_counts(x)
    check_tensor("logits", logits)
    check_same_device("logits", logits, "x", x)
    lead = logits.dim() - x.dim()
    if x.dim() == 0 or lead < 0 or logits.shape[lead:] != x.shape:
        raise ValueError(
            f"logits has shape {shape_of(logits)} and x {shape_of(x)}; expected [..., B, *event] and [B, "
            "*event]"
        )
    if mask is not None:
        mask = as_mask(mask, x)
    lead_shape = logits.shape[: lead + 1]
    rows = logits if lead == 0 else logits.reshape(math.prod(lead_shape), *logits.shape[lead + 1 :])
    return multinomial_rows(x, rows, mask, coefficient).reshape(lead_shape)
