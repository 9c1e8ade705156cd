r"""The density of a mixture of diagonal normal distributions, for learned priors and VampPrior.

With means :math:`μ_{ud}`, log variances :math:`λ_{ud}` and log weights :math:`a_u` of U components, and
:math:`w_{nud} = (z_{nd} - μ_{ud})\, e^{-λ_{ud}/2}`,

.. math::
    s_{nu} = a_u - ½ \sum_d \big[w_{nud}^2 + λ_{ud} + \log 2π\big], \quad
    M_n = \max_u s_{nu}, \quad S_n = \sum_u e^{s_{nu} - M_n}, \quad \log p(z_n) = M_n + \log S_n

The differences z − μ are computed directly. A matrix product, from :math:`w^2 = z^2/σ^2 - 2 z μ/σ^2 +
μ^2/σ^2`, loses :math:`(μ/σ)^2` roundings: at σ = 1e-4 all of float32's digits.

With the upstream gradient g and :math:`r_{nu} = g_n\, e^{s_{nu} - M_n} / S_n`, recomputing the scores:

.. math::
    \bar z_{nd} = -\sum_u r\, w\, e^{-λ/2}, \quad \bar μ_{ud} = e^{-λ/2} \sum_n r\, w, \quad
    \barλ_{ud} = ½ \Big(\sum_n r\, w^2 - \sum_n r\Big), \quad \bar a_u = \sum_n r

No tensor of size [N, U, D] or [N, U] is stored. A z with zero density under every component has −∞ and zero
gradient. An r below the smallest normal number is flushed to zero.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..core import backend as _backend
from ..core.checks import check_same_device, check_same_shape, check_tensor, shape_of
from ._contract import Contract
from .op import Op, cast

_INPUTS = "Tensor z, Tensor mu, Tensor logvar, Tensor log_weight"


def mixture_log_prob(z: Tensor, mu: Tensor, logvar: Tensor, logits: Tensor | None = None) -> Tensor:
    r"""Return the log density of a mixture of diagonal normal distributions, summed over D.

    .. math:: \log p(z) = \log \sum_u π_u \prod_d N(z_d; μ_{ud}, e^{\mathrm{logvar}_{ud}}),
        \quad π = \mathrm{softmax}(\mathrm{logits})

    Args:
        z: points [..., D].
        mu: means of the components, [U, D].
        logvar: log variances of the components, [U, D].
        logits: logits of the components' weights, [U]; −∞ removes a component. Default: equal weights.

    Returns:
        nats [...], in float32 (float64 if one of the arguments is).

    Raises:
        TypeError, ValueError: for shapes or dtypes that do not fit, or several devices.

    References:
        Tomczak & Welling, VAE with a VampPrior, 2018, eq. 9, for the use.

    Example:
        >>> import torch, fastvae
        >>> z, mu, logvar = torch.zeros(5, 4, 2), torch.zeros(3, 2), torch.zeros(3, 2)
        >>> fastvae.ops.mixture_log_prob(z, mu, logvar).shape
        torch.Size([5, 4])
    """
    check_tensor("z", z)
    check_components(mu, logvar, logits)
    check_same_device("mu", mu, "z", z)
    if z.dim() == 0 or z.shape[-1] != mu.shape[1]:
        raise ValueError(
            f"z has shape {shape_of(z)} and mu {shape_of(mu)}; expected z [..., D] and mu [U, D] "
            "with the same D"
        )
    wide = torch.float64 in (z.dtype, mu.dtype, logvar.dtype, None if logits is None else logits.dtype)
    dtype = torch.float64 if wide else torch.float32
    count = mu.shape[0]
    if logits is None:
        log_weight = z.new_full((count,), -math.log(count), dtype=dtype)
    else:
        log_weight = torch.log_softmax(cast(logits, dtype), 0)
    rows = z if z.dim() == 2 else z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
    value = _mixture_log_prob(cast(rows, dtype), cast(mu, dtype), cast(logvar, dtype), log_weight)[0]
    return value if z.dim() == 2 else value.reshape(z.shape[:-1])


def check_components(mu: Tensor, logvar: Tensor, logits: Tensor | None) -> None:
    """Validate components [U, D], [U, D] and logits [U], with U at least 1, on one device."""
    check_tensor("mu", mu, 2, "[U, D]")
    check_tensor("logvar", logvar, 2, "[U, D]")
    check_same_shape("logvar", logvar, "mu", mu)
    check_same_device("logvar", logvar, "mu", mu)
    if mu.shape[0] == 0:
        raise ValueError(f"mu has shape {shape_of(mu)}: a mixture needs at least one component")
    if logits is not None:
        check_tensor("logits", logits, 1, "[U]")
        check_same_device("logits", logits, "mu", mu)
        if logits.shape[0] != mu.shape[0]:
            raise ValueError(
                f"logits has shape {shape_of(logits)}; expected [U] = [{mu.shape[0]}], a number for each "
                f"component of mu {shape_of(mu)}"
            )


def _check_inputs(contract: Contract, z: Tensor, mu: Tensor, logvar: Tensor, log_weight: Tensor) -> None:
    contract.expect("z", z, torch.float64 if z.dtype == torch.float64 else torch.float32, (-1, -1))
    contract.expect("mu", mu, z.dtype, (-1, z.shape[1]))
    contract.expect_count("the number of components", mu.shape[0])
    contract.expect("logvar", logvar, z.dtype, tuple(mu.shape))
    contract.expect("log_weight", log_weight, z.dtype, (mu.shape[0],))


class _MixtureLogProbBackward(Op):
    """Gradients of (z, mu, logvar, log_weight), None where not needed."""

    module = "mixture"
    name = "mixture_log_prob_backward"
    schema = (
        f"(Tensor grad, Tensor maximum, Tensor total, {_INPUTS}, bool[4] need) "
        "-> (Tensor, Tensor, Tensor, Tensor)"
    )

    def __init__(self):
        self.native = functools.partial(_backend.native(self.name), self.composed("reference"))
        super().__init__()

    def check(self, grad, maximum, total, z, mu, logvar, log_weight, need):
        _check_inputs(self.contract, z, mu, logvar, log_weight)
        for name, t in (("grad", grad), ("maximum", maximum), ("total", total)):
            self.contract.expect(name, t, z.dtype, (z.shape[0],))

    def fake(self, grad, maximum, total, z, mu, logvar, log_weight, need):
        tensors = z, mu, logvar, log_weight
        return tuple(t.new_empty(t.shape) if n else None for t, n in zip(tensors, need, strict=True))


class _MixtureLogProb(Op):
    """Op for log p [N] of z [N, D] given components [U, D], [U, D], [U]; keeps maximum and scaled sum."""

    module = "mixture"
    name = "mixture_log_prob"
    schema = f"({_INPUTS}) -> (Tensor, Tensor, Tensor)"
    shown = 1
    gradient = _MixtureLogProbBackward()

    def __init__(self):
        self.native = functools.partial(_backend.native(self.name), self.composed("reference"))
        super().__init__()

    def check(self, z, mu, logvar, log_weight):
        _check_inputs(self.contract, z, mu, logvar, log_weight)

    def fake(self, z, mu, logvar, log_weight):
        return tuple(z.new_empty(z.shape[0]) for _ in range(3))

    def forward(self, run, ctx, *tensors):
        value, maximum, total = run(*tensors)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(maximum, total)
        ctx.save_for_backward(maximum, total, *tensors)
        return value, maximum, total

    def backward(self, run, ctx, grad, *_):
        return run(grad, *ctx.saved_tensors, list(ctx.needs_input_grad))


_mixture_log_prob = _MixtureLogProb()
