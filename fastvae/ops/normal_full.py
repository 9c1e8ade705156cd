r"""Reparameterised sampling of a Gaussian with a full covariance, and the density of the draws.

With :math:`q = N(μ, L Lᵀ)`, the lower triangle L packed row by row with the logarithms of its diagonal, and
noise :math:`ε_{kbd}` a function of its address (:mod:`fastvae.random`):

.. math::
    z_{kbi} &= μ_{bi} + \sum_{j \le i} L_{bij} ε_{kbj} \\
    \log q(z_k|x) &= -½ \sum_d ε_{kbd}^2 - \sum_d \log L_{bdd} - \tfrac{D}{2} \log 2π

The density is computed from the noise: no triangular system is solved, and nothing cancels.

Gradients. With the upstream gradients :math:`g^z` of z and :math:`g^q_k` of the density, differentiated both
through z and through (μ, L) (the ``"iwae"`` estimator of :mod:`fastvae.ops.normal_diagonal`):

.. math::
    \bar μ_i = \sum_k g^z_{ki}, \quad \bar L_{ij} = \sum_k g^z_{ki} ε_{kj} \ (i > j), \quad
    \overline{\log L_{ii}} = L_{ii} \sum_k g^z_{ki} ε_{ki} - \sum_k g^q_k

On a CPU the forward pass of training keeps ε as [B, K, D], where a row's samples are a matrix; on a GPU the
backward pass regenerates it. The C++ and Triton kernels never store the matrices [B, D, D].
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import random
from ..core import backend as _backend
from ..core.checks import check_address, check_count, check_same_device, check_seed, check_tensor, shape_of
from ..reference.random import normal
from .normal_diagonal import shape_of_z, stacked
from .op import Op, accumulator, cast, empty_like, in_shape, or_none


class Draw(NamedTuple):
    """Parameters of a draw: the op's non-tensor arguments, in every layer."""

    samples: int
    sample_offset: int
    row_offset: int
    flat: bool = False  # z is [K·B, D], for a decoder


_INPUTS = "Tensor mu, Tensor tril, Tensor seed, "
_DRAW = "SymInt samples, SymInt sample_offset, SymInt row_offset, bool flat"


def rsample_tril(
    mu: Tensor,
    tril: Tensor,
    *,
    k: int,
    seed: Tensor | None = None,
    generator: torch.Generator | None = None,
    sample_offset: int = 0,
    row_offset: int = 0,
) -> tuple[Tensor, Tensor]:
    r"""Sample z = μ + L·ε and compute log q(z|x) of every sample in one pass.

    .. math:: \log q(z_k|x) = -½ \|ε_k\|^2 - \sum_d \log L_{dd} - \tfrac{D}{2} \log 2π

    Args:
        mu: mean of q, [B, D].
        tril: the lower triangle of L, row by row, [B, D(D+1)/2], with logarithms on its diagonal, so that any
            numbers are valid.
        k: number of draws per row.
        seed: int64 tensor with no dimensions that fixes the noise; default: drawn from ``generator``.
        generator: source of the seed; default torch's own, so that ``torch.manual_seed`` applies.
        sample_offset: index of the first sample, for a chunk of a larger draw. Default: 0.
        row_offset: index of the first row, for a shard of a larger batch; −1 gives all rows the noise of
            row 0. Default: 0.

    Returns:
        z [K, B, D] in the inputs' dtype, and the log density in nats [K, B] in float32 (float64 for float64
        inputs).

    Raises:
        TypeError, ValueError: if mu and tril are not floating-point tensors [B, D] and [B, D(D+1)/2] on one
            device, or another argument is invalid.

    References:
        Kingma & Welling, An Introduction to Variational Autoencoders, 2019, section 2.5.1.

    Example:
        >>> import torch, fastvae
        >>> mu, tril = torch.randn(4, 3), torch.randn(4, 6)
        >>> z, log_q = fastvae.ops.rsample_tril(mu, tril, k=5)
        >>> z.shape, log_q.shape
        (torch.Size([5, 4, 3]), torch.Size([5, 4]))
    """
    k = check_count("k", k, "the draws per row")
    mu, tril = _check_tensors(mu, tril)
    if not (
        type(sample_offset) is type(row_offset) is int and sample_offset == row_offset == 0 and k <= 2**32
    ):
        sample_offset, row_offset = check_address(k, mu.shape[0], sample_offset, row_offset)
    seed = random.draw_seed(mu.device, generator) if seed is None else check_seed(seed, mu.device)
    return _rsample_tril(mu, tril, seed, Draw(k, sample_offset, row_offset))


def flat_tril(
    mu: Tensor, tril: Tensor, seed: Tensor, samples: int, sample_offset: int = 0, row_offset: int = 0
) -> tuple[Tensor, Tensor]:
    """Return z [K·B, D] and log q [K, B] of :func:`rsample_tril`, for a validated pair and a seed."""
    if not (
        type(sample_offset) is type(row_offset) is int
        and sample_offset == row_offset == 0
        and samples <= 2**32
    ):
        sample_offset, row_offset = check_address(samples, mu.shape[0], sample_offset, row_offset)
    mu, tril = _in_one_dtype(mu, tril)
    return _rsample_tril(mu, tril, seed, Draw(samples, sample_offset, row_offset, True))


def _check_tensors(mu: Tensor, tril: Tensor) -> tuple[Tensor, Tensor]:
    check_tensor("mu", mu, 2, "[B, D]")
    check_tensor("tril", tril, 2, "[B, D(D+1)/2]")
    check_same_device("tril", tril, "mu", mu)
    b, d = mu.shape
    if tril.shape[0] != b or tril.shape[1] != d * (d + 1) // 2:
        raise ValueError(
            f"tril has shape {shape_of(tril)} and mu has {shape_of(mu)}; expected [B, D(D+1)/2] = "
            f"[{b}, {d * (d + 1) // 2}]: the lower triangle of L row by row, its diagonal as logarithms"
        )
    return _in_one_dtype(mu, tril)


def _in_one_dtype(mu: Tensor, tril: Tensor) -> tuple[Tensor, Tensor]:
    if mu.dtype == tril.dtype:
        return mu, tril
    dtype = torch.promote_types(mu.dtype, tril.dtype)
    return cast(mu, dtype), cast(tril, dtype)


def _noise(mu, seed, draw):
    """Return ε as the forward pass keeps it, [B, K, D]."""
    (b, d), dtype = mu.shape, accumulator(mu.dtype)
    eps = normal(seed, draw.samples, b, d, draw.sample_offset, draw.row_offset, dtype=dtype)
    return eps.transpose(0, 1).contiguous()


def _check_inputs(contract, mu, tril, seed, draw):
    contract.expect("mu", mu, None, (-1, -1))
    rows, dims = mu.shape
    contract.expect("tril", tril, mu.dtype, (rows, dims * (dims + 1) // 2))
    contract.expect("seed", seed, torch.int64, ())
    contract.expect_count("samples", draw.samples)


class _RsampleTrilBackward(Op):
    """Op for the gradients of (mu, tril), None where not needed."""

    module = "normal_full"
    name = "rsample_tril_backward"
    schema = (
        f"(Tensor? grad_z, Tensor? grad_log_q, Tensor? eps, {_INPUTS}{_DRAW}, bool[2] need) "
        "-> (Tensor, Tensor)"
    )
    record = Draw

    def __init__(self):
        self.native = functools.partial(_backend.native(self.name), self._without_noise)
        super().__init__()

    def _without_noise(self, grad_z, grad_log_q, _, mu, tril, seed, draw, need):
        """Call the C++ with regenerated noise if the forward pass did not keep it.

        A torch.func transform may not announce that it will differentiate, and a direct call need not.
        """
        return self.native(grad_z, grad_log_q, _noise(mu, seed, draw), mu, tril, seed, draw, need)

    def composed(self, backend):
        function = super().composed(backend)

        def backward(grad_z, grad_log_q, _, mu, tril, seed, draw, need):
            return function(stacked(grad_z, mu, draw), grad_log_q, mu, tril, seed, draw, need)

        return backward

    def check(self, grad_z, grad_log_q, eps, mu, tril, seed, draw, need):
        _check_inputs(self.contract, mu, tril, seed, draw)
        wide, k, (b, d) = accumulator(mu.dtype), draw.samples, mu.shape
        self.contract.expect("grad_z", grad_z, mu.dtype, (k * b, d), (k, b, d))
        self.contract.expect("grad_log_q", grad_log_q, wide, (k, b))
        self.contract.expect("eps", eps, wide, (b, k, d))

    def fake(self, grad_z, grad_log_q, eps, mu, tril, seed, draw, need):
        return tuple(empty_like(t) if n else None for t, n in zip((mu, tril), need, strict=True))


class _RsampleTril(Op):
    """Op for z and log q; its last result is the noise, kept if tril requires a gradient."""

    module = "normal_full"
    name = "rsample_tril"
    schema = f"({_INPUTS}{_DRAW}, bool keep_noise) -> (Tensor, Tensor, Tensor)"
    record = Draw
    takes_keep = True
    shown = 2
    gradient = _RsampleTrilBackward()
    native = staticmethod(_backend.native(name))

    def composed(self, backend):
        function = super().composed(backend)

        def sample(mu, tril, seed, draw, keep):
            z, log_q = function(mu, tril, seed, draw)
            return in_shape(z, shape_of_z(mu, draw)), log_q, _noise(mu, seed, draw) if keep else None

        return sample

    def check(self, mu, tril, seed, draw, keep):
        _check_inputs(self.contract, mu, tril, seed, draw)

    def fake(self, mu, tril, seed, draw, keep):
        (b, d), wide = mu.shape, accumulator(mu.dtype)
        z, log_q = mu.new_empty(shape_of_z(mu, draw)), mu.new_empty((draw.samples, b), dtype=wide)
        return z, log_q, mu.new_empty((b, draw.samples, d), dtype=wide) if keep else None

    def forward(self, run, ctx, mu, tril, seed, draw, keep):
        z, log_q, eps = run(mu, tril, seed, draw, keep and ctx.needs_input_grad[1])
        ctx.set_materialize_grads(False)
        if eps is not None:
            ctx.mark_non_differentiable(eps)
        ctx.save_for_backward(eps, mu, tril, seed)
        ctx.draw = draw
        return z, log_q, eps

    def backward(self, run, ctx, grad_z, grad_log_q, _):
        eps, *inputs = ctx.saved_tensors
        grads = run(grad_z, grad_log_q, or_none(eps), *inputs, ctx.draw, list(ctx.needs_input_grad[:2]))
        return *grads, None, None, None


_rsample_tril = _RsampleTril()
