r"""Reparameterised sampling of a diagonal Gaussian, fused with its KL or with its log-ratio to the prior.

With :math:`q = N(μ, σ^2)`, :math:`σ = \exp(\mathrm{logvar}/2)`, prior :math:`p = N(m, s^2)` (default
N(0, I)), noise :math:`ε_{kbd}` a function of its address (:mod:`fastvae.random`), and :math:`u = \log σ^2 -
\log s^2`:

.. math::
    z_{kbd} &= μ_{bd} + σ_{bd} ε_{kbd} \\
    \mathrm{KL}_b &= ½ \sum_d \big[(μ - m)^2 / s^2 + e^{u} - 1 - u\big] \\
    \log p(z_k) - \log q(z_k|x) &= ½ \sum_d \big[ε^2 - (z - m)^2 / s^2 + u\big]

:math:`e^u - 1 - u` is computed without cancellation near u = 0. On a GPU ε is regenerated in the backward
pass, never stored. On a CPU, where drawing a normal costs several times what moving a float does
(docs/NOTES.md), the forward pass of training keeps :math:`\partial z / \partial \mathrm{logvar} = ½σε`, the
``slope``.

Gradients. With :math:`g^z` and :math:`g^r_k` what arrives at z and at the log-ratio:

.. math::
    h_k &= g^z_k - g^r_k (z_k - m) / s^2 \\
    \bar μ &= \sum_k h_k, \quad \overline{\mathrm{logvar}} = ½ σ \sum_k h_k ε_k + ½ \sum_k g^r_k \\
    \bar m &= \sum_k g^r_k (z_k - m) / s^2, \quad
    \overline{\log s^2} = ½ \sum_k g^r_k \big[(z_k - m)^2 / s^2 - 1\big]

``estimator="stl"`` (sticking the landing, Roeder et al. 2017) drops q's own dependence on (μ, logvar) inside
log q: the last sum of the logvar gradient goes, and :math:`h_k` gains :math:`+ g^r_k ε_k / σ`.
``estimator="dreg"`` (Tucker et al. 2019) does that and multiplies what reaches μ and logvar by the normalised
weights once more, giving :math:`\tilde w_k^2` in all. The weights need no hook: the gradient of a
log-mean-exp arrives here as :math:`g^r_k = g \tilde w_k`, and the weights sum to one,
so :math:`\tilde w_k = g^r_k / \sum_j g^r_j`. The prior's gradients are those of the bound under every
estimator.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import _backend, random
from .._checks import (
    FLOATING,
    check_address,
    check_choice,
    check_count,
    check_logvar_range,
    check_same_device,
    check_same_shape,
    check_seed,
    check_tensor,
    shape_of,
)
from ..reference.random import normal
from ._registry import accumulator, code, define, empty, empty_like, pointer, strided

ESTIMATORS = ("iwae", "dreg", "stl")
NO_AXIS = 0  # as the number of samples: one, whose axis z does not have

_INPUTS = "Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor seed, "
_ADDRESS = "SymInt samples, SymInt sample_offset, SymInt row_offset, float logvar_min, float logvar_max"


def rsample_kl(
    mu: Tensor,
    logvar: Tensor,
    *,
    samples: int | None = None,
    prior: tuple[Tensor, Tensor] | None = None,
    logvar_range: tuple[float, float] | None = None,
    per_dimension: bool = False,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int = 0,
    row_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""Sample z = μ + exp(logvar/2)·ε and compute KL(q(z|x) ‖ p(z)) in one pass.

    .. math:: \mathrm{KL} = ½ \sum_d \big[(μ - m)^2 / s^2 + e^u - 1 - u\big],
              \quad u = \mathrm{logvar} - \log s^2

    Args:
        mu, logvar: mean and log variance of q, each [B, D].
        samples: K draws per row; None (the default) draws one and leaves the axis out.
        prior: mean and log variance of p, each broadcastable to [B, D]; default N(0, I).
        logvar_range: clamp logvar to (lo, hi) first; its gradient is zero outside. Default: no clamp.
        per_dimension: return the KL of every dimension, [B, D], instead of their sum.
        seed: int64 tensor of no dimensions that fixes the noise; default: drawn from ``generator``.
        generator: where a seed is drawn from; default torch's own, so ``torch.manual_seed`` rules.
        sample_offset, row_offset: address of the first sample and row, for a chunk or a shard of a larger
            draw.

    Returns:
        z [K, B, D] (or [B, D] without ``samples``) in the inputs' dtype, and the KL in nats, [B] or [B, D],
        in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: for what is not a pair of [B, D] floating-point tensors on one device, and the
            like.

    References:
        Kingma & Welling, Auto-Encoding Variational Bayes, 2014, appendix B.

    Example:
        >>> import torch, fastvae
        >>> mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
        >>> z, kl = fastvae.ops.rsample_kl(mu, logvar, samples=5)
        >>> z.shape, kl.shape
        (torch.Size([5, 4, 3]), torch.Size([4]))
    """
    if samples is None:
        samples = NO_AXIS
    else:
        check_count("samples", samples, "the draws per row")
    arguments = _prepare(mu, logvar, samples, prior, logvar_range, seed, generator, sample_offset, row_offset)
    return _rsample_kl(*arguments, bool(per_dimension), _keeps_slope(arguments))[:2]


def rsample_log_ratio(
    mu: Tensor,
    logvar: Tensor,
    *,
    samples: int,
    prior: tuple[Tensor, Tensor] | None = None,
    estimator: str = "iwae",
    logvar_range: tuple[float, float] | None = None,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int = 0,
    row_offset: int = 0,
    chunk: bool = False,
) -> tuple[Tensor, ...]:
    r"""Sample z = μ + exp(logvar/2)·ε and compute log p(z) − log q(z|x) of every sample in one pass.

    .. math:: \log p(z) - \log q(z|x) = ½ \sum_d \big[ε^2 - (z - m)^2 / s^2 + \mathrm{logvar} - \log s^2\big]

    Args:
        mu, logvar: mean and log variance of q, each [B, D].
        samples: K draws per row.
        prior: mean and log variance of p, each broadcastable to [B, D]; default N(0, I).
        estimator: which gradient reaches mu and logvar: ``"iwae"``, the derivative; ``"stl"``, without the
            score of q; ``"dreg"``, doubly reparameterised. The last takes it that the ratio feeds one
            log-mean-exp over these samples, or else needs ``chunk``.
        logvar_range, seed, generator, sample_offset, row_offset: as in :func:`rsample_kl`.
        chunk: for ``"dreg"``, when these are some of the samples of a log-mean-exp: return zeros [B] as well,
            to be added to it. Their gradient is the sum that a sample's weight is a share of, which the other
            chunks' samples belong to.

    Returns:
        z [K, B, D] in the inputs' dtype, and the log-ratio in nats [K, B] in float32 (float64 for float64
        inputs).

    Raises:
        TypeError, ValueError: as :func:`rsample_kl`, and for an unknown estimator.

    References:
        Burda, Grosse & Salakhutdinov 2016; Roeder, Wu & Duvenaud 2017, eq. 8; Tucker, Lawson, Gu & Maddison
        2019, eq. 8.

    Example:
        >>> import torch, fastvae
        >>> mu, logvar = torch.randn(4, 3), torch.randn(4, 3)
        >>> z, log_ratio = fastvae.ops.rsample_log_ratio(mu, logvar, samples=5)
        >>> z.shape, log_ratio.shape
        (torch.Size([5, 4, 3]), torch.Size([5, 4]))
    """
    check_count("samples", samples, "the draws per row")
    check_choice("estimator", estimator, ESTIMATORS)
    arguments = _prepare(mu, logvar, samples, prior, logvar_range, seed, generator, sample_offset, row_offset)
    results = _rsample_log_ratio(*arguments, estimator, bool(chunk), _keeps_slope(arguments))
    return results[:3] if chunk else results[:2]


def _keeps_slope(arguments) -> bool:
    mu, logvar, *prior = arguments[:4]
    # A list and not a generator, which would cost more than all else here.
    wanted = any(
        [mu.requires_grad, logvar.requires_grad, *[p is not None and p.requires_grad for p in prior]]
    )
    if not (wanted and torch.is_grad_enabled() and mu.device.type == "cpu"):
        return False
    # A compiled graph serves every backend.
    return torch.compiler.is_compiling() or _backend.on_cpu() == "native"


def _prepare(mu, logvar, samples, prior, logvar_range, seed, generator, sample_offset, row_offset):
    """Check what the user gave and bring it into the form of the schema."""
    if not (_is_pair_of_rows(mu, logvar) and prior is None and logvar_range is None):
        mu, logvar, prior_mu, prior_logvar = _check_tensors(mu, logvar, prior)
        logvar_min, logvar_max = check_logvar_range(logvar_range)
    else:
        prior_mu = prior_logvar = None
        logvar_min, logvar_max = -math.inf, math.inf
    if sample_offset != 0 or row_offset != 0 or samples > 2**32:
        check_address(samples or 1, mu.shape[0], sample_offset, row_offset)
    seed = random.draw_seed(mu.device, generator) if seed is None else check_seed(seed, mu.device)
    return (
        mu, logvar, prior_mu, prior_logvar, seed, samples, sample_offset, row_offset, logvar_min, logvar_max
    )  # fmt: skip


def _is_pair_of_rows(mu, logvar) -> bool:
    """Whether these are what they should be. In a small call Python is most of the cost, and what is seen at
    a glance need not be asked one by one.
    """
    return (
        isinstance(mu, Tensor)
        and isinstance(logvar, Tensor)
        and mu.dim() == 2
        and mu.shape == logvar.shape
        and mu.dtype == logvar.dtype
        and mu.dtype in FLOATING
        and mu.device == logvar.device
    )


def _check_tensors(mu, logvar, prior):
    check_tensor("mu", mu, 2, "[B, D]")
    check_tensor("logvar", logvar, 2, "[B, D]")
    check_same_shape("logvar", logvar, "mu", mu)
    check_same_device("logvar", logvar, "mu", mu)
    tensors = [mu, logvar]
    if prior is not None:
        tensors += [
            _prior_part(name, value, mu) for name, value in zip(("mean", "logvar"), _pair(prior), strict=True)
        ]
    dtype = mu.dtype
    if any(t.dtype != dtype for t in tensors):
        for t in tensors:
            dtype = torch.promote_types(dtype, t.dtype)
        tensors = [t.to(dtype) for t in tensors]
    return *tensors, *[None] * (4 - len(tensors))


def _pair(prior):
    try:
        mean, logvar = prior
    except (TypeError, ValueError):
        raise TypeError(
            f"prior must be a pair of tensors (mean, logvar) or None for N(0, I), got {type(prior).__name__}"
        ) from None
    return mean, logvar


def _prior_part(name: str, value: Tensor, mu: Tensor) -> Tensor:
    check_tensor(f"prior {name}", value)
    check_same_device(f"prior {name}", value, "mu", mu)
    try:
        return value.expand(mu.shape)
    except RuntimeError:
        raise ValueError(
            f"prior {name} has shape {shape_of(value)}, which does not broadcast to mu's {shape_of(mu)} ([B, "
            "D])"
        ) from None


# What the two ops share


def _sample_shape(mu, samples):
    return mu.shape if samples == NO_AXIS else (samples, *mu.shape)


def _native_draw(
    function, second, mu, logvar, prior_mu, prior_logvar, seed, samples, k0, b0, lo, hi, keep, *rest
):
    """z, and the slope, empty if it is not kept; ``second`` is the second result, a tensor to fill."""
    z = empty_like(mu) if samples == NO_AXIS else empty((samples, *mu.shape), mu.dtype)
    slope = empty_like(z, second.dtype) if keep else second.new_empty(0)
    function(
        code(mu.dtype), z.data_ptr(), slope.data_ptr(), second.data_ptr(),
        strided(mu), strided(logvar), strided(prior_mu), strided(prior_logvar),
        samples or 1, *mu.shape, lo, hi, torch.get_num_threads(), seed.data_ptr(), k0, b0, *rest,
    )  # fmt: skip
    return z, slope


def _fake_draw(mu, samples, keep):
    shape = _sample_shape(mu, samples)
    return mu.new_empty(shape), mu.new_empty(shape if keep else (0,), dtype=accumulator(mu.dtype))


def _slope(slope, mu, logvar, seed, samples, k0, b0, lo, hi):
    """The slope that the forward pass kept, or else made again: a transform of torch.func may not say that it
    will differentiate, and a caller of the dispatcher's op need not.
    """
    if slope.numel() or not mu.numel():
        return slope
    wide = accumulator(mu.dtype)
    eps = normal(seed, samples or 1, *mu.shape, k0, b0, dtype=wide)
    slope = 0.5 * torch.exp(0.5 * logvar.to(wide).clamp(lo, hi)) * eps
    return slope.reshape(_sample_shape(mu, samples))


def _adapted_draw(function, mu, logvar, prior_mu, prior_logvar, seed, samples, k0, b0, lo, hi, option, keep):
    """From the reference and Triton, which give z its axis and make the noise again in the backward pass."""
    z, second = function(mu, logvar, prior_mu, prior_logvar, seed, samples or 1, k0, b0, lo, hi, option)
    slope = mu.new_empty(0, dtype=second.dtype)
    if keep:
        slope = _slope(slope, mu, logvar, seed, samples, k0, b0, lo, hi)
    # In place, here and below: a view could not be modified by the user.
    return z.squeeze_(0) if samples == NO_AXIS else z, second, slope


def _empty_grads(mu, need):
    return tuple(empty_like(mu) if n else None for n in need)


def _save(ctx, args, slope):
    ctx.save_for_backward(*args[:5], slope)
    ctx.constants = args[5:]


_GRADS = "-> (Tensor, Tensor, Tensor, Tensor)"


# rsample_kl: schema, C++, fake, autograd


def _native_rsample_kl(mu, *rest):
    *rest, per_dimension, keep = rest
    kl = empty(mu.shape if per_dimension else mu.shape[:1], accumulator(mu.dtype))
    z, slope = _native_draw(_backend.extension().rsample_kl, kl, mu, *rest, keep, per_dimension)
    return z, kl, slope


def _fake_rsample_kl(mu, logvar, prior_mu, prior_logvar, seed, samples, k0, b0, lo, hi, per_dimension, keep):
    kl = mu.new_empty(mu.shape if per_dimension else mu.shape[:1], dtype=accumulator(mu.dtype))
    z, slope = _fake_draw(mu, samples, keep)
    return z, kl, slope


def _setup_rsample_kl(ctx, args, result):
    ctx.mark_non_differentiable(result[2])
    _save(ctx, args, result[2])


def _native_rsample_kl_backward(
    grad_z, grad_kl, slope, mu, logvar, prior_mu, prior_logvar, seed, samples, k0, b0, lo, hi, need
):
    grads = _empty_grads(mu, need)
    slope = _slope(slope, mu, logvar, seed, samples, k0, b0, lo, hi)
    axis = (0,) if samples == NO_AXIS else ()
    _backend.extension().rsample_kl_backward(
        code(mu.dtype), *map(pointer, grads),
        strided(grad_z, *axis), strided(grad_kl), strided(slope, *axis),
        strided(mu), strided(logvar), strided(prior_mu), strided(prior_logvar),
        samples or 1, *mu.shape, lo, hi, torch.get_num_threads(),
    )  # fmt: skip
    return grads


def _backward_rsample_kl(ctx, grad_z, grad_kl, *_):
    *inputs, slope = ctx.saved_tensors
    need = list(ctx.needs_input_grad[:4])
    grads = _rsample_kl_backward(grad_z, grad_kl, slope, *inputs, *ctx.constants[:-2], need)
    return *grads, *[None] * 8


def _adapt_rsample_kl_backward(function):
    def backward(grad_z, grad_kl, slope, mu, logvar, prior_mu, prior_logvar, seed, samples, *rest):
        if grad_z is not None and samples == NO_AXIS:
            grad_z = grad_z.unsqueeze(0)
        return function(grad_z, grad_kl, mu, logvar, prior_mu, prior_logvar, seed, samples or 1, *rest)

    return backward


_rsample_kl_backward = define(
    "latent",
    "rsample_kl_backward",
    f"(Tensor? grad_z, Tensor? grad_kl, Tensor slope, {_INPUTS}{_ADDRESS}, bool[4] need) {_GRADS}",
    native=_native_rsample_kl_backward,
    fake=lambda grad_z, grad_kl, slope, mu, *rest: _empty_grads(mu, rest[-1]),
    adapt=_adapt_rsample_kl_backward,
)
_rsample_kl = define(
    "latent",
    "rsample_kl",
    f"({_INPUTS}{_ADDRESS}, bool per_dimension, bool keep_slope) -> (Tensor, Tensor, Tensor)",
    native=_native_rsample_kl,
    fake=_fake_rsample_kl,
    setup=_setup_rsample_kl,
    backward=_backward_rsample_kl,
    adapt=lambda function: lambda *args: _adapted_draw(function, *args),
    results=2,
)


# rsample_log_ratio: schema, C++, fake, autograd


def _native_rsample_log_ratio(
    mu, logvar, prior_mu, prior_logvar, seed, samples, k0, b0, lo, hi, estimator, chunk, keep
):
    log_ratio = empty((samples, mu.shape[0]), accumulator(mu.dtype))
    z, slope = _native_draw(
        _backend.extension().rsample_log_ratio, log_ratio,
        mu, logvar, prior_mu, prior_logvar, seed, samples, k0, b0, lo, hi, keep,
    )  # fmt: skip
    return z, log_ratio, _whole(mu, chunk), slope


def _whole(mu, chunk):
    return mu.new_zeros(mu.shape[:1] if chunk else (0,), dtype=accumulator(mu.dtype))


def _fake_rsample_log_ratio(
    mu, logvar, prior_mu, prior_logvar, seed, samples, k0, b0, lo, hi, estimator, chunk, keep
):
    log_ratio = mu.new_empty((samples, mu.shape[0]), dtype=accumulator(mu.dtype))
    z, slope = _fake_draw(mu, samples, keep)
    return z, log_ratio, _whole(mu, chunk), slope


def _adapt_rsample_log_ratio(function):
    def draw(mu, *rest):
        *rest, chunk, keep = rest
        z, log_ratio, slope = _adapted_draw(function, mu, *rest, keep)
        return z, log_ratio, _whole(mu, chunk), slope

    return draw


def _setup_rsample_log_ratio(ctx, args, result):
    *_, chunk, _ = args
    ctx.mark_non_differentiable(*result[3 if chunk else 2 :])
    _save(ctx, args, result[3])


def _native_rsample_log_ratio_backward(
    grad_z, grad_log_ratio, weight, slope,
    mu, logvar, prior_mu, prior_logvar, seed, samples, k0, b0, lo, hi, path, need,
):  # fmt: skip
    grads = _empty_grads(mu, need)
    slope = _slope(slope, mu, logvar, seed, samples, k0, b0, lo, hi)
    _backend.extension().rsample_log_ratio_backward(
        code(mu.dtype), *map(pointer, grads),
        strided(grad_z), strided(grad_log_ratio), strided(weight), strided(slope),
        strided(mu), strided(logvar), strided(prior_mu), strided(prior_logvar),
        samples or 1, *mu.shape, lo, hi, torch.get_num_threads(), path,
    )  # fmt: skip
    return grads


def _backward_rsample_log_ratio(ctx, grad_z, grad_log_ratio, grad_whole, *_):
    *inputs, slope = ctx.saved_tensors
    *constants, estimator, chunk, _ = ctx.constants
    weight = None
    if estimator == "dreg":
        if grad_log_ratio is None:
            raise RuntimeError(
                "estimator='dreg' takes its weights from the gradient of the log-ratio, which did not "
                "arrive: pass log_ratio + log p(x|z) through fastvae.ops.log_mean_exp, or use "
                "estimator='stl'"
            )
        if chunk and grad_whole is None:
            raise RuntimeError(
                "estimator='dreg' with chunk=True takes its weights as shares of the gradient of its third "
                "result, which did not arrive: add those zeros [B] to the log-mean-exp over all chunks"
            )
        total = grad_whole if chunk else grad_log_ratio.sum(0)
        weight = torch.where(total == 0, 0.0, grad_log_ratio / total)
    grads = _rsample_log_ratio_backward(
        grad_z, grad_log_ratio, weight, slope, *inputs,
        *constants, estimator != "iwae", list(ctx.needs_input_grad[:4]),
    )  # fmt: skip
    return *grads, *[None] * 9


_rsample_log_ratio_backward = define(
    "latent",
    "rsample_log_ratio_backward",
    f"(Tensor? grad_z, Tensor? grad_log_ratio, Tensor? weight, Tensor slope, {_INPUTS}{_ADDRESS}, bool path, "
    f"bool[4] need) {_GRADS}",
    native=_native_rsample_log_ratio_backward,
    fake=lambda grad_z, grad_log_ratio, weight, slope, mu, *rest: _empty_grads(mu, rest[-1]),
    adapt=lambda function: (
        lambda grad_z, grad_log_ratio, weight, slope, *rest: function(grad_z, grad_log_ratio, weight, *rest)
    ),
)
_rsample_log_ratio = define(
    "latent",
    "rsample_log_ratio",
    f"({_INPUTS}{_ADDRESS}, str estimator, bool chunk, bool keep_slope) -> (Tensor, Tensor, Tensor, Tensor)",
    native=_native_rsample_log_ratio,
    fake=_fake_rsample_log_ratio,
    setup=_setup_rsample_log_ratio,
    backward=_backward_rsample_log_ratio,
    adapt=_adapt_rsample_log_ratio,
    results=3,
)
