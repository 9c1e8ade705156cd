r"""Reparameterised sampling of a diagonal Gaussian, fused with its KL or with its log-ratio to the prior.

With :math:`q = N(μ, σ^2)`, :math:`\mathrm{logvar} = \log σ^2`, prior :math:`p = N(m, s^2)` (default
N(0, I)), noise :math:`ε_{kbd}` a function of its address (:mod:`fastvae.random`), and :math:`u = \log σ^2 -
\log s^2`:

.. math::
    z_{kbd} &= μ_{bd} + σ_{bd} ε_{kbd} \\
    \mathrm{KL}_b &= ½ \sum_d \big[(μ - m)^2 / s^2 + e^{u} - 1 - u\big] \\
    \log p(z_k) - \log q(z_k|x) &= ½ \sum_d \big[ε^2 - (z - m)^2 / s^2 + u\big]

:math:`e^u - 1 - u` is computed without cancellation near u = 0. On a GPU ε is regenerated in the backward
pass, never stored. On a CPU, where drawing a normal costs several times as much as moving a float
(docs/log.md), the forward pass of training keeps :math:`\partial z / \partial \mathrm{logvar} = ½σε`, the
``slope``.

Gradients. With the upstream gradients :math:`g^z` of z and :math:`g^r_k` of the log-ratio:

.. math::
    h_k &= g^z_k - g^r_k (z_k - m) / s^2 \\
    \bar μ &= \sum_k h_k, \quad \overline{\mathrm{logvar}} = ½ σ \sum_k h_k ε_k + ½ \sum_k g^r_k \\
    \bar m &= \sum_k g^r_k (z_k - m) / s^2, \quad
    \overline{\log s^2} = ½ \sum_k g^r_k \big[(z_k - m)^2 / s^2 - 1\big]

The argument logvar may hold another number r: with ``scale="log_scale"`` :math:`\log σ`, with ``"scale"`` σ
itself, with ``"softplus"`` the r in :math:`σ^2 = \log(1 + e^r) + \text{floor}`. The kernels compute both σ
and :math:`\log σ^2` from r directly, so that neither suffers the other's rounding. The gradient of r is
:math:`\overline{r} = \overline{\mathrm{logvar}} \cdot \partial \log σ^2 / \partial r`; the factor is 2, 2/σ,
or :math:`\mathrm{sigmoid}(r) / σ^2`, one per element [B, D], not per sample.

``estimator="stl"`` (sticking the landing, Roeder et al. 2017) drops q's own dependence on (μ, logvar) inside
log q: the last sum of the logvar gradient is dropped, and :math:`h_k` gains :math:`+ g^r_k ε_k / σ`.
``estimator="dreg"`` (Tucker et al. 2019) also multiplies the gradients of μ and logvar by the normalised
weights once more, giving :math:`\tilde w_k^2` in total. The weights need no hook: the upstream gradient of a
log-mean-exp is :math:`g^r_k = g \tilde w_k`, and the weights sum to one, so :math:`\tilde w_k = g^r_k /
\sum_j g^r_j`, with the sum over the log-mean-exp's group of samples. Under a power mean of order 1 - α the
factor is :math:`α + (1 - α) \tilde w_k` (Daudel et al. 2023). Any other factor comes through ``paths``: zeros
whose upstream gradient replaces the log-ratio's for q. The prior's gradients are those of the bound under
every estimator.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..core import backend as _backend
from ..core.checks import check_choice, check_count
from ..core.constants import cached_constant
from ..core.spread import spread
from ..reference.random import normal
from .normal_arguments import Draw, NormalPrior, form_of, prepare
from .op import FEW_DRAWS, Op, accumulator, are_few, empty_like, in_shape, or_none

ESTIMATORS = ("iwae", "dreg", "stl")

_INPUTS = "Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor seed, "
_DRAW = (
    "SymInt samples, SymInt sample_offset, SymInt row_offset, float logvar_min, float logvar_max, bool flat, "
    "str scale, float floor"
)


def rsample_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    k: int | None = None,
    prior: tuple[Tensor, Tensor] | NormalPrior | None = None,
    scale: str = "logvar",
    floor: float | None = None,
    logvar_range: tuple[float, float] | None = None,
    per_dimension: bool = False,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int = 0,
    row_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""Sample z = μ + σ·ε, σ = exp(logvar/2), and compute KL(q(z|x) ‖ p(z)) in one pass.

    .. math:: \mathrm{KL} = ½ \sum_d \big[(μ - m)^2 / s^2 + e^u - 1 - u\big],
              \quad u = \mathrm{logvar} - \log s^2

    Args:
        mu: mean of q, [B, D].
        logvar: log variance of q, or as set by ``scale``, [B, D].
        k: number of draws per row; None (the default) draws one and omits the axis.
        prior: mean and log variance of p, each broadcastable to [B, D], or a
            :class:`~fastvae.distributions.DiagonalNormal`; default N(0, I).
        scale: the meaning of logvar: ``"logvar"``, log σ²; ``"log_scale"``, log σ; ``"scale"``, σ, which must
            be positive (a negative σ gives NaN); ``"softplus"``, r in σ² = softplus(r) + floor.
        floor: lower bound of a softplus variance. Default: none, which is 0.
        logvar_range: clamp logvar to (lo, hi) first; its gradient is zero outside. Default: no clamp.
        per_dimension: return the KL of every dimension, [B, D], instead of their sum.
        seed: int64 tensor with no dimensions that fixes the noise; default: drawn from ``generator``.
        generator: source of the seed; default torch's own, so that ``torch.manual_seed`` applies.
        sample_offset: index of the first sample, for a chunk of a larger draw. Default: 0.
        row_offset: index of the first row, for a shard of a larger batch; −1 gives all rows the noise of
            row 0. Default: 0.

    Returns:
        z [K, B, D] (or [B, D] without ``k``) in the inputs' dtype, and the KL in nats, [B] or [B, D],
        in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: if mu and logvar are not floating-point tensors [B, D] on one device, or
            another argument is invalid.

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes, 2014, appendix B.

    Example:
        >>> import torch, fastvae
        >>> mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
        >>> z, kl = fastvae.ops.rsample_kl(mu, logvar, k=5)
        >>> z.shape, kl.shape
        (torch.Size([5, 4, 3]), torch.Size([4]))
    """
    if k is not None:
        k = check_count("k", k, "the draws per row")
    draws, flat = (1, True) if k is None else (k, False)
    form = form_of(scale, floor, logvar_range)
    arguments = prepare(mu, logvar, form, prior, seed, generator, draws, sample_offset, row_offset, flat)
    return _rsample_kl(*arguments, bool(per_dimension))


def rsample_log_ratio(
    mu: Tensor,
    logvar: Tensor,
    *,
    k: int,
    prior: tuple[Tensor, Tensor] | NormalPrior | None = None,
    estimator: str = "iwae",
    scale: str = "logvar",
    floor: float | None = None,
    logvar_range: tuple[float, float] | None = None,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int = 0,
    row_offset: int = 0,
    paths: bool = False,
) -> tuple[Tensor, ...]:
    r"""Sample z = μ + σ·ε, σ = exp(logvar/2), and compute log p(z) − log q(z|x) of every sample in one pass.

    .. math:: \log p(z) - \log q(z|x) = ½ \sum_d \big[ε^2 - (z - m)^2 / s^2 + \mathrm{logvar} - \log s^2\big]

    Args:
        mu: mean of q, [B, D].
        logvar: log variance of q, or as set by ``scale``, [B, D].
        k: number of draws per row.
        prior: mean and log variance of p, each broadcastable to [B, D], or a
            :class:`~fastvae.distributions.DiagonalNormal`; default N(0, I).
        estimator: the gradient of mu and logvar: ``"iwae"``, the derivative; ``"stl"``, without the score of
            q; ``"dreg"``, doubly reparameterised, which assumes that the ratio feeds one log-mean-exp over
            these samples; otherwise use ``paths``.
        scale: the meaning of logvar: ``"logvar"``, log σ²; ``"log_scale"``, log σ; ``"scale"``, σ, which must
            be positive (a negative σ gives NaN); ``"softplus"``, r in σ² = softplus(r) + floor.
        floor: lower bound of a softplus variance. Default: none, which is 0.
        logvar_range: clamp logvar to (lo, hi) first; its gradient is zero outside. Default: no clamp.
        seed: int64 tensor with no dimensions that fixes the noise; default: drawn from ``generator``.
        generator: source of the seed; default torch's own, so that ``torch.manual_seed`` applies.
        sample_offset: index of the first sample, for a chunk of a larger draw. Default: 0.
        row_offset: index of the first row, for a shard of a larger batch; −1 gives all rows the noise of
            row 0. Default: 0.
        paths: return zeros [K, B], too, an alternative to ``"dreg"``: their upstream gradient, instead of the
            ratio's, reaches mu and logvar, through z and without the score of q.

    Returns:
        z [K, B, D] in the inputs' dtype, and the log-ratio in nats [K, B] in float32 (float64 for float64
        inputs).

    Raises:
        TypeError, ValueError: if mu and logvar are not floating-point tensors [B, D] on one device, or
            another argument is invalid.

    References:
        Burda, Grosse & Salakhutdinov 2016; Roeder, Wu & Duvenaud 2017, eq. 8; Tucker, Lawson, Gu & Maddison
        2019, eq. 8.

    Example:
        >>> import torch, fastvae
        >>> mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
        >>> z, log_ratio = fastvae.ops.rsample_log_ratio(mu, logvar, k=5)
        >>> z.shape, log_ratio.shape
        (torch.Size([5, 4, 3]), torch.Size([5, 4]))
    """
    k = check_count("k", k, "the draws per row")
    check_choice("estimator", estimator, ESTIMATORS)
    form = form_of(scale, floor, logvar_range)
    arguments = prepare(mu, logvar, form, prior, seed, generator, k, sample_offset, row_offset, False)
    results = _rsample_log_ratio(*arguments, estimator, 0.0, 1, bool(paths))
    return results if paths else results[:2]


# Variants for a validated (mu, logvar, form), a seed and offsets, which return z [K·B, D].


def flat_kl(
    q: tuple[Any, Any, Any], prior: Any, seed: Tensor, samples: int, row_offset: int, per_dimension: bool
) -> tuple[Tensor, Tensor]:
    """Return z [K·B, D] and the KL of :func:`rsample_kl`."""
    if prior is None and q[2] is None and row_offset == 0 and samples <= 2**32:
        draw = Draw(samples, 0, 0, -math.inf, math.inf, True)
        return _rsample_kl(q[0], q[1], None, None, seed, draw, per_dimension)
    return _rsample_kl(*prepare(*q, prior, seed, None, samples, 0, row_offset, True), per_dimension)


def flat_log_ratio(
    q: tuple[Any, Any, Any],
    prior: Any,
    seed: Tensor,
    samples: int,
    row_offset: int,
    estimator: str,
    alpha: float = 0.0,
    groups: int = 1,
) -> tuple[Tensor, Tensor]:
    """Return z [K·B, D] and the log-ratio [K, B] of :func:`rsample_log_ratio`."""
    if prior is None and q[2] is None and row_offset == 0 and samples <= 2**32:
        draw = Draw(samples, 0, 0, -math.inf, math.inf, True)
        return _rsample_log_ratio(q[0], q[1], None, None, seed, draw, estimator, alpha, groups, False)[:2]
    arguments = prepare(*q, prior, seed, None, samples, 0, row_offset, True)
    return _rsample_log_ratio(*arguments, estimator, alpha, groups, False)[:2]


def direct_draw(
    mu: Tensor, logvar: Tensor, seed: Tensor, samples: int, estimator: str | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return :func:`flat_log_ratio`, or :func:`flat_kl` without an estimator, by :meth:`Op.direct`.

    The third result, on a GPU, is a counter for :func:`fastvae.ops.reduce.direct_reduce`.
    """
    draw = _ONE_DRAW if samples == 1 else Draw(samples, 0, 0, -math.inf, math.inf, True)
    wanted = (mu.requires_grad or logvar.requires_grad) and torch.is_grad_enabled()
    if estimator is None:
        z, term, kept = _rsample_kl.direct(wanted, mu, logvar, None, None, seed, draw, False)
    else:
        options = estimator, 0.0, 1, False
        z, term, _, kept = _rsample_log_ratio.direct(wanted, mu, logvar, None, None, seed, draw, *options)
    return z, term, None if mu.is_cpu else kept


_ONE_DRAW = Draw(1, 0, 0, -math.inf, math.inf, True)


def native_kl(
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None = None,
    prior_logvar: Tensor | None = None,
    per_dimension: bool = False,
) -> Tensor:
    """Return the KL of :func:`rsample_kl` alone by the C++, without autograd.

    All tensors are [B, D], of one dtype. A draw that is not used costs less than one of torch's operations.
    """
    seed = _no_seed()
    kl: Tensor = _rsample_kl.native(
        mu, logvar, prior_mu, prior_logvar, seed, _ONE_DRAW, per_dimension, False
    )[1]
    return kl


def native_kl_backward(
    grad_z: Tensor | None,
    grad_kl: Tensor | None,
    slope: Tensor,
    mu: Tensor,
    logvar: Tensor,
    prior_mu: Tensor | None,
    prior_logvar: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of one draw and its KL by the C++; ``slope`` is that of the caller's noise."""
    need = [True, True, prior_mu is not None, prior_logvar is not None]
    grads: tuple[Tensor | None, ...] = _rsample_kl.gradient.native(
        grad_z, grad_kl, slope, mu, logvar, prior_mu, prior_logvar, _no_seed(), _ONE_DRAW, need
    )
    return grads


@cached_constant(1)
def _no_seed() -> Tensor:
    return torch.zeros((), dtype=torch.int64, device="cpu")


# Helpers shared by the two ops


def shape_of_z(mu, draw):
    rows, columns = mu.shape
    return (draw.samples * rows, columns) if draw.flat else (draw.samples, rows, columns)


def _fake_draw(mu, draw, keep):
    shape = shape_of_z(mu, draw)
    return mu.new_empty(shape), mu.new_empty(shape, dtype=accumulator(mu.dtype)) if keep else None


def _slope(mu, logvar, seed, draw):
    wide = accumulator(mu.dtype)
    eps = normal(seed, draw.samples, *mu.shape, draw.sample_offset, draw.row_offset, dtype=wide)  # type: ignore[call-arg, misc]
    slope = 0.5 * spread(logvar.to(wide), draw).sigma * eps
    return slope.reshape(shape_of_z(mu, draw))


def stacked(grad_z, mu, draw):
    """Reshape z's upstream gradient to [K, B, D]."""
    if grad_z is None or not draw.flat:
        return grad_z
    return grad_z.reshape(draw.samples, *mu.shape)


def _composed_draw(backend, function, mu, logvar, prior_mu, prior_logvar, seed, draw, option, keep):
    """Call the reference or Triton, whose z is [K, B, D] and which regenerate noise in the backward pass."""
    counts = (True,) if keep and backend == "triton" and not mu.is_cpu else ()
    z, second, *kept = function(mu, logvar, prior_mu, prior_logvar, seed, draw, option, *counts)
    slope = _slope(mu, logvar, seed, draw) if keep and mu.is_cpu else None
    return in_shape(z, shape_of_z(mu, draw)), second, kept[0] if counts else slope


def _check_inputs(contract, mu, logvar, prior_mu, prior_logvar, seed, draw):
    contract.expect("mu", mu, None, (-1, -1))
    for name, t in (("logvar", logvar), ("prior_mu", prior_mu), ("prior_logvar", prior_logvar)):
        contract.expect(name, t, mu.dtype, tuple(mu.shape))
    contract.expect("seed", seed, torch.int64, ())
    contract.expect_count("samples", draw.samples)


def _is_fusable(mu, logvar, prior_mu, prior_logvar, seed, draw):
    if type(draw.samples) is not int or not mu.numel() or seed.dim():
        return False
    return are_few(FEW_DRAWS, mu.expand(draw.samples, *mu.shape), logvar, prior_mu, prior_logvar)


class _Draw(Op):
    """Op whose last result is kept for later ops.

    On a CPU it is the slope of the noise, for the backward pass; on a GPU a counter at zero, for the op that
    computes the bound (:meth:`Op.direct` alone requests it).
    """

    module = "normal_diagonal"
    record = Draw
    takes_keep = True

    def check(self, *args):
        _check_inputs(self.contract, *args[:6])

    def is_fusable(self, *args):
        return _is_fusable(*args[:6])

    def forward(self, run, ctx, mu, logvar, prior_mu, prior_logvar, seed, draw, *options):
        results = run(mu, logvar, prior_mu, prior_logvar, seed, draw, *options)
        kept = results[-1]
        ctx.set_materialize_grads(False)
        if kept is not None:
            ctx.mark_non_differentiable(kept)
        slope = kept if mu.is_cpu else None
        ctx.save_for_backward(slope, mu, logvar, prior_mu, prior_logvar, seed)
        ctx.draw, ctx.options = draw, options
        return results


class _Gradient(Op):
    """Op for the gradients of (mu, logvar, prior_mu, prior_logvar), None where not needed.

    Attributes:
        arrives: the number of leading arguments that are upstream gradients or their factors.
    """

    module = "normal_diagonal"
    record = Draw
    arrives: int

    def __init__(self):
        self.native = functools.partial(_backend.native(self.name), self._without_slope)
        super().__init__()

    def _without_slope(self, *args):
        """Call the C++ with a recomputed slope if the forward pass did not keep it.

        A torch.func transform may not announce that it will differentiate, and a direct call need not.
        """
        n = self.arrives
        mu, logvar, _, _, seed, draw = args[n + 1 : n + 7]
        return self.native(*args[:n], _slope(mu, logvar, seed, draw), *args[n + 1 :])

    def is_fusable(self, *args):
        return args[self.arrives] is None and _is_fusable(*args[self.arrives + 1 : self.arrives + 7])

    def check(self, grad_z, *args):
        *grads, slope = args[: self.arrives]
        inputs = args[self.arrives : self.arrives + 6]
        mu, draw = inputs[0], inputs[-1]
        _check_inputs(self.contract, *inputs)
        wide, (rows, columns) = accumulator(mu.dtype), mu.shape
        shapes = (draw.samples * rows, columns), (draw.samples, rows, columns)
        self.contract.expect("grad_z", grad_z, mu.dtype, *shapes)
        self.contract.expect("slope", slope, wide, *shapes)
        for name, t in zip(self.contract.names[1:], grads, strict=False):
            self.contract.expect(name, t, wide, *self.shapes_of_grads(mu, draw))

    @staticmethod
    def shapes_of_grads(mu, draw):
        """Return the allowed shapes of the second upstream gradient and its factor."""
        return (mu.shape[0],), tuple(mu.shape)

    def fake(self, *args):
        # The record ends the inputs; further options may follow it.
        mu = next(args[i - 5] for i in range(5, len(args)) if isinstance(args[i], Draw))
        return tuple(empty_like(mu) if n else None for n in args[-1])


_GRADS = "-> (Tensor, Tensor, Tensor, Tensor)"


class _RsampleKLBackward(_Gradient):
    name = "rsample_kl_backward"
    schema = f"(Tensor? grad_z, Tensor? grad_kl, Tensor? slope, {_INPUTS}{_DRAW}, bool[4] need) {_GRADS}"
    arrives = 2

    def composed(self, backend):
        function = super().composed(backend)

        def backward(grad_z, grad_kl, slope, mu, logvar, prior_mu, prior_logvar, seed, draw, need):
            return function(
                stacked(grad_z, mu, draw), grad_kl, mu, logvar, prior_mu, prior_logvar, seed, draw, need
            )

        return backward


class _RsampleKL(_Draw):
    name = "rsample_kl"
    schema = f"({_INPUTS}{_DRAW}, bool per_dimension, bool keep_slope) -> (Tensor, Tensor, Tensor)"
    shown = 2
    gradient = _RsampleKLBackward()
    native = staticmethod(_backend.native(name))

    def composed(self, backend):
        return functools.partial(_composed_draw, backend, super().composed(backend))

    def fake(self, mu, logvar, prior_mu, prior_logvar, seed, draw, per_dimension, keep):
        kl = mu.new_empty(mu.shape if per_dimension else mu.shape[:1], dtype=accumulator(mu.dtype))
        z, slope = _fake_draw(mu, draw, keep)
        return z, kl, slope

    def backward(self, run, ctx, grad_z, grad_kl, _):
        slope, *inputs = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:4])
        grads = run(grad_z, grad_kl, or_none(slope), *inputs, ctx.draw, need)
        return *grads, None, None, None, None


_rsample_kl = _RsampleKL()


class _RsampleLogRatioBackward(_Gradient):
    name = "rsample_log_ratio_backward"
    schema = (
        f"(Tensor? grad_z, Tensor? grad_log_ratio, Tensor? weight, Tensor? slope, {_INPUTS}{_DRAW}, "
        f"bool path, bool[4] need) {_GRADS}"
    )
    arrives = 3

    @staticmethod
    def shapes_of_grads(mu, draw):
        return ((draw.samples, mu.shape[0]),)

    def composed(self, backend):
        function = super().composed(backend)

        def backward(grad_z, grad_log_ratio, weight, slope, mu, *rest):
            draw = next(r for r in rest if isinstance(r, Draw))
            return function(stacked(grad_z, mu, draw), grad_log_ratio, weight, mu, *rest)

        return backward


class _RsampleLogRatio(_Draw):
    name = "rsample_log_ratio"
    schema = (
        f"({_INPUTS}{_DRAW}, str estimator, float alpha, SymInt groups, bool paths, bool keep_slope) -> "
        "(Tensor, Tensor, Tensor, Tensor)"
    )
    shown = 3
    gradient = _RsampleLogRatioBackward()
    native = staticmethod(_backend.native(name))

    def composed(self, backend):
        function = super().composed(backend)

        def draw(mu, *rest):
            *rest, _, _, paths, keep = rest  # type: ignore[assignment]
            z, log_ratio, kept = _composed_draw(backend, function, mu, *rest, keep)  # type: ignore[call-arg]
            return z, log_ratio, torch.zeros_like(log_ratio) if paths else None, kept

        return draw

    def fake(self, mu, logvar, prior_mu, prior_logvar, seed, draw, estimator, alpha, groups, paths, keep):
        log_ratio = mu.new_empty((draw.samples, mu.shape[0]), dtype=accumulator(mu.dtype))
        z, slope = _fake_draw(mu, draw, keep)
        return z, log_ratio, torch.empty_like(log_ratio) if paths else None, slope

    def backward(self, run, ctx, grad_z, grad_log_ratio, grad_paths, _):
        slope, *inputs = ctx.saved_tensors
        estimator, alpha, groups, paths, _ = ctx.options
        weight = None
        if paths:
            weight = path_weight(grad_log_ratio, grad_paths)
        elif estimator == "dreg":
            weight = dreg_weight(grad_log_ratio, alpha, groups)
        need, path = list(ctx.needs_input_grad[:4]), paths or estimator != "iwae"
        grads = run(grad_z, grad_log_ratio, weight, or_none(slope), *inputs, ctx.draw, path, need)
        return *grads, *[None] * 7


def path_weight(grad_log_ratio: Tensor | None, grad_paths: Tensor | None) -> Tensor:
    """Return the ratio of the upstream gradients of the paths and the log-ratio, z's gradient factor."""
    if grad_log_ratio is None or grad_paths is None:
        raise RuntimeError(
            "paths=True takes what reaches q from the gradient of its third result, and what reaches z from "
            "that of the log-ratio, of which one did not arrive: let the objective depend on both"
        )
    return torch.where(grad_paths == 0, 0.0, grad_paths / grad_log_ratio)


def dreg_weight(grad_log_ratio: Tensor | None, alpha: float, groups: int) -> Tensor:
    """Return DReG's normalised weights: each sample's share of its group's upstream gradient."""
    if grad_log_ratio is None:
        raise RuntimeError(
            "estimator='dreg' takes its weights from the gradient of the log-ratio, which did not "
            "arrive: pass log_ratio + log p(x|z) through fastvae.ops.log_mean_exp, or use "
            "estimator='stl'"
        )
    each = grad_log_ratio.unflatten(0, (groups, -1)) if groups > 1 else grad_log_ratio
    total = each.sum(-2, keepdim=True)
    share = torch.where(total == 0, 0.0, each / total).reshape(grad_log_ratio.shape)
    return share if alpha == 0 else alpha + (1 - alpha) * share


_rsample_log_ratio = _RsampleLogRatio()
