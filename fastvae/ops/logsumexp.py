r"""log-mean-exp over importance samples, whose gradient is the normalised weights.

.. math::
    M = \max_k \log w_k, \quad S = \sum_k e^{\log w_k - M}, \quad
    \log \tfrac{1}{K} \sum_k w_k = M + \log S - \log K, \quad \tilde w_k = e^{\log w_k - M} / S

The backward pass computes the weights from (M, S), not from the bound: at :math:`\log w ≈ -1000` the bound's
rounding error would shift them all by :math:`10^{-4}`. A column of −∞ gives −∞ with zero gradient; NaN gives
NaN. Weights and gradients below the smallest normal number are zero: denormals would slow the decoder's
backward pass many times over.

Objectives do not call this op where the likelihood is fused: :mod:`fastvae.ops.reduce` computes the bound
from the decoder's output, in csrc/reduce.hpp and kernels/reduce.py. Evaluation folds log weights chunk by
chunk: ``fastvae/estimation/weights.py``.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..core import backend as _backend
from ..core.checks import as_int, check_tensor, shape_of
from .op import FEW_ROWS, Op, accumulator, are_few


def log_mean_exp(log_w: Tensor, dim: int = 0) -> Tensor:
    r"""Return the log of the mean of exp(log_w) over one axis; its gradient is the normalised weights.

    .. math:: \log \frac{1}{K} \sum_{k=1}^{K} \exp(\log w_k)

    Args:
        log_w: log weights, K of them along ``dim``.
        dim: the axis of the samples.

    Returns:
        A tensor of log_w's shape without ``dim``, in float32 (float64 for float64 input).

    Raises:
        ValueError: if the axis does not exist, or is empty.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016, eqs. 8 and 13.

    Example:
        >>> import torch, fastvae
        >>> log_w = torch.tensor([[-1000.0], [-1000.0]], requires_grad=True)
        >>> fastvae.ops.log_mean_exp(log_w).backward()
        >>> log_w.grad.flatten()
        tensor([0.5000, 0.5000])
    """
    check_tensor("log_w", log_w)
    dim = as_int("dim", dim, "the axis of the samples")
    if not -log_w.dim() <= dim < log_w.dim():
        raise ValueError(f"dim={dim} is not an axis of log_w, whose shape is {shape_of(log_w)}")
    moved = log_w if dim == 0 else log_w.movedim(dim, 0)
    if moved.shape[0] == 0:
        raise ValueError(
            f"log_w has no samples along dim={dim}: its shape is {tuple(log_w.shape)}; at least one is needed"
        )
    if moved.dim() == 2:
        return _log_mean_exp(moved)[0]
    rest = moved.shape[1:]
    return _log_mean_exp(moved.reshape(moved.shape[0], math.prod(rest)))[0].reshape(rest)


class _LogMeanExpBackward(Op):
    module = "logsumexp"
    name = "log_mean_exp_backward"
    schema = "(Tensor grad, Tensor log_w, Tensor maximum, Tensor total) -> Tensor"
    native = staticmethod(_backend.native(name))

    def is_fusable(self, grad, log_w, maximum, total):
        return are_few(FEW_ROWS, log_w)

    def check(self, grad, log_w, maximum, total):
        self.contract.expect("log_w", log_w, None, (-1, -1))
        for name, t in (("grad", grad), ("maximum", maximum), ("total", total)):
            self.contract.expect(name, t, accumulator(log_w.dtype), (log_w.shape[1],))

    def fake(self, grad, log_w, maximum, total):
        return log_w.new_empty(log_w.shape)


class _LogMeanExp(Op):
    """Op for the bound [N] of log_w [K, N]; the maximum and scaled sum are returned for the gradient."""

    module = "logsumexp"
    name = "log_mean_exp"
    schema = "(Tensor log_w) -> (Tensor, Tensor, Tensor)"
    shown = 1
    gradient = _LogMeanExpBackward()
    native = staticmethod(_backend.native(name))

    def is_fusable(self, log_w):
        return are_few(FEW_ROWS, log_w)

    def check(self, log_w):
        self.contract.expect("log_w", log_w, None, (-1, -1))
        self.contract.expect_count("the number of samples", log_w.shape[0])

    def fake(self, log_w):
        return tuple(log_w.new_empty(log_w.shape[1:], dtype=accumulator(log_w.dtype)) for _ in range(3))

    def forward(self, run, ctx, log_w):
        bound, maximum, total = run(log_w)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(maximum, total)
        ctx.save_for_backward(log_w, maximum, total)
        return bound, maximum, total

    def backward(self, run, ctx, grad, *_):
        return run(grad, *ctx.saved_tensors)


_log_mean_exp = _LogMeanExp()
