r"""The bound from the decoder's output: likelihood, term, and both reductions in one pass each way.

With :math:`L_{kb} = \log p(x_b|z_{kb})`, the event summed, a term :math:`t` of q and p, [K, B] or [B], and
its factor :math:`c_b` (:math:`-β_b` for a KL, :math:`β_b` for a log-ratio), the bound of a row is

.. math::
    \text{mean:}\quad \mathcal{L}_b &= \frac{1}{K} \sum_k \big[L_{kb} + c_b t_{kb}\big] \\
    \text{log-mean-exp:}\quad \mathcal{L}_b &= \log \frac{1}{K} \sum_k e^{\log w_{kb}}, \quad
    \log w_{kb} = L_{kb} + c_b t_{kb}

and the bound of the batch is the sum or the mean of these. A log-mean-exp may generalise to a power mean,
over M groups of K samples, mixed with a share s of the mean:

.. math::
    \mathcal{L}_b = s\, \frac{1}{MK} \sum_k \log w_{kb} + (1 - s) \frac{1}{M} \sum_{m=1}^{M}
    \frac{1}{1 - α} \log \frac{1}{K} \sum_{k \in m} w_{kb}^{1 - α}

whose weights are :math:`s / MK + (1 - s) \tilde w_{kb} / M`, normalised in each group. With a row's upstream
gradient :math:`g_b` and the weights :math:`\tilde w_{kb}` (or :math:`1/K`), the gradient of a sample's
log-likelihood is :math:`g_{kb} = g_b \tilde w_{kb}`, and that of its term :math:`c_b g_{kb}`. The forward
pass keeps the weights, so that the backward pass is a single pass over the likelihood's gradients. Weights
and gradients below the smallest normal number are zero (:mod:`fastvae.ops.logsumexp`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core import backend as _backend
from ..core.fast_path import ON_GPU
from ..core.torch_private import any_requires_grad
from ._contract import Contract
from .likelihood import Declaration, refuse, result_dtype
from .op import FEW_ROWS, Op, are_few, letters_of, or_none


class BoundReduction(NamedTuple):
    """Reduction of samples to a bound: the op's non-tensor arguments, in every layer."""

    coefficient: float  # factor of the term
    over: str  # reduction over the samples: "mean" or "log_mean_exp"
    reduction: str  # reduction over the batch: "mean" or "sum", or "none" for [B]
    # For a log-mean-exp only:
    alpha: float = 0.0  # (1 / (1 - alpha)) log mean w^(1 - alpha)
    groups: int = 1  # number of groups of consecutive samples, whose bounds are averaged
    share: float = 0.0  # share of the mean of the log weights in the bound

    @property
    def is_plain(self) -> bool:
        """True for a mean or a log-mean-exp over all samples."""
        return self.alpha == 0 and self.groups == 1 and self.share == 0


def finish(backend: str, how: BoundReduction) -> Callable[..., Any]:
    """Return the function that reduces log-likelihoods to the bound.

    Triton has the two plain reductions; others take a few small torch kernels in float64.
    """
    return _backend.layer(backend if how.is_plain else "reference", "reduce").reduce


def reduce(
    likelihood: str,
    x: Tensor,
    parameters: tuple[Tensor, ...],
    term: Tensor | None,
    beta: Tensor | None,
    how: BoundReduction,
    terms: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Return the bound of a batch from its decoder's output.

    .. math:: \frac{1}{K} \sum_k \big[\log p(x|z_k) + c\, t_k\big] \quad \text{or} \quad
              \log \frac{1}{K} \sum_k e^{\log p(x|z_k) + c\, t_k}

    Args:
        likelihood: name of a declared likelihood.
        x: data [B, X].
        parameters: the decoder's output: the first [K·B, X], sample-major; others alike, [K·B, 1], one row
            [X], or one number.
        term: the term added to each sample's log-likelihood, [K, B], or shared by a row's samples, [B].
        beta: factor of the term, in addition to how.coefficient: [] or [B], without a gradient; None for 1.
        how: the reduction, a :class:`BoundReduction`.
        terms: also return the mean of the log-likelihoods. For a log-mean-exp it has no gradient.
        mask: bool [B, X], True where x was observed; None if all of it was.

    Returns:
        The bound in nats, and the mean of log p(x|z) over the samples, [B], or None without ``terms``: in
        float32 (float64 if one of the tensors is).

    Example:
        >>> import torch
        >>> from fastvae.ops.reduce import BoundReduction, reduce
        >>> x, logits, log_ratio = torch.ones(4, 7), torch.zeros(3 * 4, 7), torch.zeros(3, 4)
        >>> how = BoundReduction(1.0, "log_mean_exp", "none")
        >>> bound, _ = reduce("bernoulli", x, (logits,), log_ratio, None, how)
        >>> bound  # 7 log ½
        tensor([-4.8520, -4.8520, -4.8520, -4.8520])
    """
    bound, mean, *_ = _reduce[likelihood](x, mask, *parameters, term, beta, how, terms)
    return bound, mean if terms else None


def direct_reduce(
    likelihood: str,
    x: Tensor,
    parameters: tuple[Tensor, ...],
    term: Tensor,
    how: BoundReduction,
    counter: Tensor | None,
) -> Tensor:
    """Return the bound of :func:`reduce` by :meth:`Op.direct`.

    With a counter, [1] int32 on a GPU, zero before and after, rows and bound of a small batch are one launch.
    """
    wanted = torch.is_grad_enabled() and any_requires_grad(x, term, *parameters)
    op, args = _reduce[likelihood], (x, None, *parameters, term, None, how, False)
    if counter is None:
        return op.direct(wanted, *args)[0]
    function, node = op.counted
    bound: Tensor = (node.apply if wanted else function)(*args, counter)[0]
    return bound


_HOW = "float coefficient, str over, str reduction, float alpha, SymInt groups, float share"


def check_bound(
    contract: Contract, batch: int, rows: int, term: Tensor | None, beta: Tensor | None, how: BoundReduction
) -> int:
    """Validate the inputs of a bound of K·B rows, and return K."""
    samples = rows // batch if batch else 0
    contract.expect("term", term, None, (samples if batch else -1, batch), (batch,))
    contract.expect("beta", beta, None, (), (batch,))
    contract.expect_count("groups", how.groups)
    if samples % how.groups:
        raise ValueError(
            f"fastvae::{contract.op}: groups is {how.groups}; expected a divisor of the {samples} samples"
        )
    return samples


def check_grads(
    contract: Contract,
    batch: int,
    samples: int,
    how: BoundReduction,
    dtype: torch.dtype,
    grads: tuple[Any, ...],
) -> None:
    """Validate the upstream gradients and the saved weights."""
    bound, log_likelihood, weights = grads
    contract.expect("grad_bound", bound, dtype, (batch,) if how.reduction == "none" else ())
    contract.expect("grad_log_likelihood", log_likelihood, dtype, (batch,))
    contract.expect("weights", weights, dtype, (samples, batch))
    if weights is None and how.over == "log_mean_exp":
        raise ValueError(f"fastvae::{contract.op}: weights is None; expected those of the forward pass")


def _check_inputs(contract: Contract, number: int, x: Tensor, mask: Tensor | None, rest: Any) -> int:
    parameters, (term, beta, how) = rest[:number], rest[number : number + 3]
    if x.is_complex() or x.dim() != 2:
        contract.refuse("x", x, "[B, X]")
    contract.expect("mask", mask, torch.bool, tuple(x.shape))
    names = contract.names[-2 - number : -2]
    rows, columns = math.prod(parameters[0].shape[:1]), x.shape[1]
    contract.expect(names[0], parameters[0], None, (-1, columns))
    if rows % x.shape[0] if x.shape[0] else rows:
        contract.refuse(names[0], parameters[0], f"a multiple of x's {x.shape[0]} rows")
    shapes = (rows, columns), (rows, 1), (1, columns), (columns,), (1, 1), (1,), ()
    for name, p in zip(names[1:], parameters[1:], strict=True):
        contract.expect(name, p, None, *shapes)
    return check_bound(contract, x.shape[0], rows, term, beta, how)


def _is_fusable(likelihood: Declaration, *tensors: Tensor | None, how: BoundReduction) -> bool:
    return likelihood.elementary and how.is_plain and are_few(FEW_ROWS, *tensors)


class _Reduce(Op):
    module = "reduce"
    record = BoundReduction
    shown = 2

    def __init__(self, likelihood: Declaration):
        self.likelihood, self.number = likelihood, len(likelihood.outputs)
        self.name = f"reduce_{likelihood.name}"
        parameters = ", ".join(f"Tensor {p}" for p in likelihood.outputs)
        inputs = f"Tensor x, Tensor? mask, {parameters}, Tensor? term, Tensor? beta, {_HOW}"
        self.schema = f"({inputs}, bool terms) -> (Tensor, Tensor, Tensor)"
        self.gradient = _ReduceBackward(likelihood, inputs)
        self.native = functools.partial(_backend.native("reduce"), likelihood.name, self._not_native)
        super().__init__()
        # A function of the arguments and a counter, and the autograd node that calls it.
        counted = self._replayed(self._counted_on_gpu, f"{letters_of(self.schema)}t")
        self.counted: tuple[Callable[..., Any], Any] = counted, self._native_node(counted, ON_GPU)

    def _not_native(self, *args):
        """Handle calls that the C++ does not: an empty sum, or x out of range, which raises."""
        x, mask, first, *_ = args
        if first.numel():
            refuse(self.likelihood, x, mask)
        return self.composed("reference")(*args)

    def composed(self, backend):
        rows = _backend.layer(backend, "likelihood").log_prob

        def function(x, mask, *rest):
            parameters, (term, beta, how, terms) = rest[: self.number], rest[self.number :]
            # Triton's reduction adds the parts of rows that several programs summed.
            options = {"in_parts": True} if backend == "triton" and how.is_plain else {}
            log_likelihood = rows(self.likelihood, x, mask, *_with_samples(x, parameters), **options)
            return finish(backend, how)(log_likelihood, term, beta, how, terms)

        return function

    def _counted_on_gpu(self, *args):
        return _backend.on_device(args[0].device, self._counted, args)

    def _counted(self, x, mask, *rest):
        """Compute rows and bound by one launch where that applies."""
        parameters, (term, beta, how, terms, counter) = rest[: self.number], rest[self.number :]
        at_once = _backend.layer("triton", "likelihood").log_prob_bound
        found = None
        if mask is None and not terms:
            found = at_once(self.likelihood, x, _with_samples(x, parameters), term, beta, how, counter)
        if found is None:
            return self._by_backend("triton")(x, mask, *rest[:-1])
        bound, weights = found
        return bound, None, weights

    def check(self, x, mask, *rest):
        _check_inputs(self.contract, self.number, x, mask, rest)

    def is_fusable(self, x, mask, *rest):
        return _is_fusable(self.likelihood, x, *rest[:-3], how=rest[-2])

    def fake(self, x, mask, *rest):
        parameters, (_, _, how, terms) = rest[: self.number], rest[self.number :]
        batch = x.shape[0]
        shape = (batch,) if how.reduction == "none" else ()
        bound = x.new_empty(shape, dtype=result_dtype(x, *parameters))
        samples = parameters[0].shape[0] // batch
        weights = bound.new_empty((samples, batch)) if how.over == "log_mean_exp" else None
        return bound, bound.new_empty(batch) if terms else None, weights

    def forward(self, run, ctx, *args):
        bound, mean, weights = run(*args)
        tensors, how = args[: self._tensors], args[self._tensors]  # and a counter may end the arguments
        ctx.set_materialize_grads(False)
        if how.over == "log_mean_exp":
            ctx.mark_non_differentiable(*((weights,) if mean is None else (mean, weights)))
        ctx.save_for_backward(weights, *tensors)
        ctx.how = how
        return bound, mean, weights

    def backward(self, run, ctx, grad_bound, grad_mean, _):
        weights, *inputs = ctx.saved_tensors
        need_x, _, *need = ctx.needs_input_grad[: self.number + 3]
        need = [need_x and self.likelihood.differentiable, *need]
        # In a graph, an unrequested mean, a tensor [0], gets a gradient, too.
        if grad_bound is not None:
            grad_mean = or_none(grad_mean)
        grad_x, *grads = run(grad_bound, grad_mean, or_none(weights), *inputs, ctx.how, need)
        return grad_x, None, *grads, *[None] * (len(ctx.needs_input_grad) - self.number - 3)


class _ReduceBackward(Op):
    """Op for the gradients of (x, *parameters, term), None where not needed."""

    module = "reduce"
    record = BoundReduction

    def __init__(self, likelihood: Declaration, inputs: str):
        self.likelihood, self.number = likelihood, len(likelihood.outputs)
        self.name = f"reduce_{likelihood.name}_backward"
        results = self.number + 2
        self.schema = (
            f"(Tensor? grad_bound, Tensor? grad_log_likelihood, Tensor? weights, {inputs}, "
            f"bool[{results}] need) -> ({', '.join(['Tensor'] * results)})"
        )
        self.native = functools.partial(
            _backend.native("reduce_backward"), likelihood.name, self.composed("reference")
        )
        super().__init__()

    def composed(self, backend):
        likelihoods, reduction = (_backend.layer(backend, name) for name in ("likelihood", "reduce"))
        rows, spread_out = likelihoods.log_prob_backward, reduction.reduce_backward
        at_once = getattr(likelihoods, "bound_backward", None)  # Triton's, where a launch does both

        def function(grad_bound, grad_log_likelihood, weights, x, mask, *rest):
            parameters, (term, beta, how, need) = rest[: self.number], rest[self.number :]
            spread = _with_samples(x, parameters)
            axes = term.dim() if need[-1] else 0
            upstream = grad_bound, grad_log_likelihood, weights
            found = at_once and at_once(
                self.likelihood, upstream, x, mask, spread, beta, how, need[:-1], axes
            )
            if found is not None:
                grad_x, *grads, grad_term = found
            else:
                grad, grad_term = spread_out(*upstream, beta, how, *spread[0].shape[:2], axes)
                grad_x, *grads = rows(self.likelihood, grad, x, mask, *spread, list(need[:-1]))
            grads = [g if g is None else g.reshape(p.shape) for g, p in zip(grads, parameters, strict=True)]
            return grad_x, *grads, grad_term if grad_term is None else grad_term.to(term.dtype)

        return function

    def is_fusable(self, *args):
        x, _, *rest = args[3:]
        return _is_fusable(self.likelihood, x, *rest[:-3], how=rest[-2])

    def check(self, *args):
        x, mask, *rest = args[3:]
        samples = _check_inputs(self.contract, self.number, x, mask, rest)
        dtype, how = result_dtype(x, *rest[: self.number]), rest[self.number + 2]
        check_grads(self.contract, x.shape[0], samples, how, dtype, args[:3])

    def fake(self, grad_bound, grad_log_likelihood, weights, x, mask, *rest):
        tensors = x, *rest[: self.number + 1]
        return tuple(t.new_empty(t.shape) if n else None for t, n in zip(tensors, rest[-1], strict=True))


def _with_samples(x: Tensor, parameters: tuple[Tensor, ...]) -> list[Tensor]:
    """Reshape parameters [K·B, X] to [K, B, X], and rows or numbers to [1, 1, ...]."""
    batch, first = x.shape[0], parameters[0]
    samples = first.shape[0] // batch if batch else 0
    spread = []
    for p in parameters:
        if p.dim() == 2 and p.shape[0] == first.shape[0]:
            spread.append(p.reshape(samples, batch, p.shape[1]))
        else:
            spread.append(p.reshape(1, 1, -1))
    return spread


_reduce: dict[str, _Reduce] = {}


def declare(likelihood: Declaration) -> None:
    """Register the op of a likelihood."""
    _reduce[likelihood.name] = _Reduce(likelihood)
