r"""The density of an aggregate posterior and of its marginals, for the total correlation of z.

With means :math:`μ_{ud}` and log variances :math:`λ_{ud}` of U posteriors, log weights :math:`a_{nu}`, and
:math:`w_{nud} = (z_{nd} - μ_{ud})\, e^{-λ_{ud}/2}`,

.. math::
    t_{nud} = -½ \big[w_{nud}^2 + λ_{ud} + \log 2π\big], \quad
    \log q(z_n) = \log \sum_u e^{a_{nu} + \sum_d t_{nud}}, \quad
    \log q(z_{nd}) = \log \sum_u e^{a_{nu} + t_{nud}}

The weights are all 1/U, or those of minibatch-stratified sampling: with B = U and row n a draw of example
:math:`b = n \bmod B`, 1/N for u = b, (N − B + 1)/(N (B − 1)) for u = (b + 1) mod B, and 1/(B − 1) for the
others. As in :mod:`fastvae.ops.mixture` the differences z − μ are computed directly.

With upstream gradients :math:`g_n` and :math:`h_{nd}`, recomputing the scores,

.. math::
    r_{nud} = g_n\, e^{a_{nu} + \sum_d t_{nud} - \log q(z_n)}
              + h_{nd}\, e^{a_{nu} + t_{nud} - \log q(z_{nd})},

.. math::
    \bar z_{nd} = -\sum_u r\, w\, e^{-λ/2}, \quad \bar μ_{ud} = e^{-λ/2} \sum_n r\, w, \quad
    \barλ_{ud} = ½ \sum_n r\, (w^2 - 1)

No tensor of size [N, U, D] is stored, and only the results are saved for the gradient. The C++ computes one
exponential for each (n, u, d) in each direction, and stores no tensor [N, U]. A z with zero density under
every posterior has −∞ and zero gradient. A term of r below the smallest normal number is flushed to zero.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..core import backend as _backend
from ..core.checks import check_count, check_same_device, check_tensor, shape_of
from ._contract import Contract
from .mixture import check_components
from .op import Op, cast

_INPUTS = "Tensor z, Tensor mu, Tensor logvar, SymInt dataset_size"


def aggregate_log_prob(
    z: Tensor, mu: Tensor, logvar: Tensor, *, dataset_size: int | None = None
) -> tuple[Tensor, Tensor]:
    r"""Return the log density of an aggregate posterior, and of each of its marginals, in one pass.

    .. math:: \log q(z) = \log \sum_u π_u \prod_d N(z_d; μ_{ud}, e^{\mathrm{logvar}_{ud}}), \quad
        \log q(z_d) = \log \sum_u π_u\, N(z_d; μ_{ud}, e^{\mathrm{logvar}_{ud}})

    Args:
        z: points [..., D]; with ``dataset_size`` draws of each example of the batch, [..., B, D], or
            [K·B, D] sample-major.
        mu: means of the posteriors, [U, D]; of a batch with ``dataset_size``, U = B.
        logvar: log variances of the posteriors, [U, D].
        dataset_size: N, the number of examples of the data set, at least B, for the weights of
            minibatch-stratified sampling: 1/N for the example's own posterior, (N − B + 1)/(N (B − 1)) for
            that of the next example, 1/(B − 1) for the others. Default: equal weights, 1/U.

    Returns:
        log q(z) [...] and log q(z_d) [..., D] in nats, in float32 (float64 if one of the arguments is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, several devices, or a batch of one
            example with ``dataset_size``.

    References:
        Chen, Li, Grosse & Duvenaud, Isolating Sources of Disentanglement in VAEs, 2018, appendix C.

    Example:
        >>> import torch, fastvae
        >>> z, mu, logvar = torch.zeros(5, 4, 2), torch.zeros(3, 2), torch.zeros(3, 2)
        >>> log_q, marginals = fastvae.ops.aggregate_log_prob(z, mu, logvar)
        >>> log_q.shape, marginals.shape
        (torch.Size([5, 4]), torch.Size([5, 4, 2]))
    """
    check_tensor("z", z)
    check_components(mu, logvar, None)
    check_same_device("mu", mu, "z", z)
    if z.dim() == 0 or z.shape[-1] != mu.shape[1]:
        raise ValueError(
            f"z has shape {shape_of(z)} and mu {shape_of(mu)}; expected z [..., D] and mu [U, D] "
            "with the same D"
        )
    if dataset_size is not None:
        _check_strata(z, mu, check_count("dataset_size", dataset_size, "the examples of the whole data set"))
    dtype = torch.float64 if torch.float64 in (z.dtype, mu.dtype, logvar.dtype) else torch.float32
    rows = z if z.dim() == 2 else z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
    inputs = (cast(t, dtype) for t in (rows, mu, logvar))
    whole, each = _aggregate_log_prob(*inputs, dataset_size or 0)
    return (whole, each) if z.dim() == 2 else (whole.reshape(z.shape[:-1]), each.reshape(z.shape))


def _check_strata(z: Tensor, mu: Tensor, dataset_size: int) -> None:
    batch = mu.shape[0]
    if batch < 2:
        raise ValueError(
            f"mu has shape {shape_of(mu)}: stratified weights need a batch of at least 2 examples; use equal "
            "weights (dataset_size=None)"
        )
    if dataset_size < batch:
        raise ValueError(
            f"dataset_size is {dataset_size}, less than the {batch} examples of the batch; expected the "
            "number of examples of the whole data set"
        )
    if z.shape[-2] % batch if z.dim() == 2 else z.dim() == 1 or z.shape[-2] != batch:
        raise ValueError(
            f"z has shape {shape_of(z)} and mu {shape_of(mu)}; with dataset_size expected z [..., B, D] or "
            f"[K·B, D], draws of each of the B = {batch} examples"
        )


def _check_inputs(contract: Contract, z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int) -> None:
    contract.expect("z", z, torch.float64 if z.dtype == torch.float64 else torch.float32, (-1, -1))
    contract.expect("mu", mu, z.dtype, (-1, z.shape[1]))
    contract.expect("logvar", logvar, z.dtype, tuple(mu.shape))
    contract.expect_count("the number of components", mu.shape[0], 2 if dataset_size else 1)
    contract.expect_count("dataset_size", dataset_size, mu.shape[0] if dataset_size else 0)
    if dataset_size and z.shape[0] % mu.shape[0]:
        contract.refuse("z", z, f"a multiple of {mu.shape[0]} rows, whole draws of the batch")


class _AggregateLogProbBackward(Op):
    """Gradients of (z, mu, logvar), None where not needed."""

    module = "aggregate"
    name = "aggregate_log_prob_backward"
    schema = (
        f"(Tensor? grad, Tensor? grad_each, Tensor log_q, Tensor log_q_each, {_INPUTS}, bool[3] need) "
        "-> (Tensor, Tensor, Tensor)"
    )

    def __init__(self):
        self.native = functools.partial(_backend.native(self.name), self.composed("reference"))
        super().__init__()

    def check(self, grad, grad_each, log_q, log_q_each, z, mu, logvar, dataset_size, need):
        _check_inputs(self.contract, z, mu, logvar, dataset_size)
        for name, t in (("grad", grad), ("log_q", log_q)):
            self.contract.expect(name, t, z.dtype, (z.shape[0],))
        for name, t in (("grad_each", grad_each), ("log_q_each", log_q_each)):
            self.contract.expect(name, t, z.dtype, tuple(z.shape))

    def fake(self, grad, grad_each, log_q, log_q_each, z, mu, logvar, dataset_size, need):
        return tuple(t.new_empty(t.shape) if n else None for t, n in zip((z, mu, logvar), need, strict=True))


class _AggregateLogProb(Op):
    """Op for log q(z) [N] and log q(z_d) [N, D] of z [N, D] given posteriors [U, D], [U, D]."""

    module = "aggregate"
    name = "aggregate_log_prob"
    schema = f"({_INPUTS}) -> (Tensor, Tensor)"
    gradient = _AggregateLogProbBackward()

    def __init__(self):
        self.native = functools.partial(_backend.native(self.name), self.composed("reference"))
        super().__init__()

    def check(self, z, mu, logvar, dataset_size):
        _check_inputs(self.contract, z, mu, logvar, dataset_size)

    def fake(self, z, mu, logvar, dataset_size):
        return z.new_empty(z.shape[0]), z.new_empty(z.shape)

    def forward(self, run, ctx, z, mu, logvar, dataset_size):
        whole, each = run(z, mu, logvar, dataset_size)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(whole, each, z, mu, logvar)
        ctx.dataset_size = dataset_size
        return whole, each

    def backward(self, run, ctx, grad, grad_each):
        need = list(ctx.needs_input_grad[:3])
        return *run(grad, grad_each, *ctx.saved_tensors, ctx.dataset_size, need), None


_aggregate_log_prob = _AggregateLogProb()
