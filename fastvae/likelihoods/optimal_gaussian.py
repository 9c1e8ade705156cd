"""The Gaussian likelihood with the maximum-likelihood variance."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..core.deferred import LastLayer
from ..core.nested import Conditioning
from ..ops.op import accumulator
from .base import Fused
from .gaussian import NAMED_SCALES, Gaussian
from .outputs import describe


class OptimalGaussian(Gaussian):
    r"""Gaussian likelihood p(x|z) = N(mean, σ²) with the maximum-likelihood σ², shared by all elements.

    The decoder returns ``mean``. ``fastvae.likelihoods.Gaussian(scale="optimal")`` creates it.

    .. math:: σ^2 = \frac1{|i, k|} \sum_{i,k} (x_i - m_{ki})^2

    over all elements decoded in one call. The derivative by σ² vanishes there, so σ² takes no gradient. It is
    estimated in training mode with gradients enabled, from the elements that the mask observes. Otherwise, in
    ``eval()`` and wherever draws are streamed, σ² is the running mean of the training estimates, the buffer
    ``variance``.

    Args:
        scale: always ``"optimal"``, the name by which :class:`Gaussian` creates it.
        momentum: the weight of the newest σ² in the running mean, in (0, 1], as in BatchNorm; the first
            estimate initialises the mean.
        learned: always False, as σ² is estimated.

    Raises:
        RuntimeError: if the running mean is needed before any training step. An exported program gives
            NaN instead.

    References:
        Rybkin, Daniilidis & Levine, Simple and effective VAE training with calibrated decoders, 2021.

    Example:
        >>> import torch, fastvae
        >>> likelihood = fastvae.likelihoods.Gaussian(scale="optimal")
        >>> x, q = torch.randn(4, 7), torch.zeros(4, 2 * 3)
        >>> bound = fastvae.elbo(x, q, lambda z: torch.zeros(len(z), 7), likelihood=likelihood)
        >>> torch.allclose(likelihood.variance, x.square().mean())
        True
    """

    variance: Tensor

    def __init__(self, scale: Any = "optimal", *, momentum: float = 0.1, learned: bool = False):
        if scale != "optimal" or learned:
            raise ValueError(
                "an optimal scale is measured, neither given nor learned; for these use "
                "fastvae.likelihoods.Gaussian(scale=0.1, learned=True)"
            )
        super().__init__()
        if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 < momentum <= 1:
            raise ValueError(f"momentum is the weight of the newest variance, in (0, 1], got {momentum!r}")
        self.momentum = float(momentum)
        self.register_buffer("variance", torch.tensor(math.nan))
        self._now: Tensor | None = None

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}"

    @property
    def scale(self) -> Tensor:
        """Square root of the running mean of σ²; NaN before the first step."""
        return self.variance.sqrt()

    @contextmanager
    def _measured(
        self, x: Tensor, parameters: Any, samples: int, mask: Tensor | None = None
    ) -> Iterator[None]:
        """Estimate σ² from this batch and use it within the context, in training only."""
        if self._now is not None or not (self.training and torch.is_grad_enabled() and x.numel()):
            yield
            return
        (mean,) = self._read(x, parameters, samples, (0.0,))
        with torch.no_grad():
            square = (mean.to(accumulator(mean.dtype)).reshape(samples, *x.shape) - x).square()
            kept = self.variance.to(square.device, square.dtype)
            if mask is None:
                now = square.mean().clamp(min=1e-30)
                known = now.isfinite()  # a NaN in x must not reach the running variance
            else:
                count = samples * mask.expand(x.shape).sum()
                now = (torch.where(mask, square, 0.0).sum() / count).clamp(min=1e-30)
                known = (count > 0) & now.isfinite()
                # A fully masked batch has no estimate and needs no variance; any finite value serves.
                now = torch.where(count > 0, now, torch.where(kept.isnan(), 1.0, kept))
            new = torch.where(kept.isnan(), now, torch.lerp(kept, now, self.momentum))
            self.variance = torch.where(known, new, kept).to(self.variance.dtype)
        self._now = now
        try:
            yield
        finally:
            self._now = None

    def _layers(self, x: Tensor, layer: LastLayer, samples: int, conditioning: Conditioning | None) -> None:
        return None  # the variance is estimated from the mean, so it must be computed

    def _returned(self, own: int) -> tuple[str, ...]:
        return ("mean",)

    def _given(self, x: Tensor) -> tuple[float | Tensor, ...]:
        if self._now is not None:
            return (self._now.log(),)
        if not x.numel():
            return (0.0,)
        # An exported program cannot branch on values; there an unmeasured variance gives NaN.
        if not torch.compiler.is_exporting() and bool(self.variance.isnan()):
            raise RuntimeError(
                "scale='optimal' has no variance yet, which it measures in training mode with gradients "
                "enabled; train first, load a state_dict, or give a number, as in "
                "fastvae.likelihoods.Gaussian(scale=0.1)"
            )
        return (self.variance.to(x.device).log(),)

    def _elements(self, x: Tensor, parameters: Any) -> Tensor:
        with self._measured(x, parameters, 1):
            return super()._elements(x, parameters)

    def log_likelihood(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Tensor:
        """Return log p(x|z) [K, B] for the decoder's output for K·B rows of z, sample-major."""
        with self._measured(x, parameters, samples, None if conditioning is None else conditioning.mask):
            return super().log_likelihood(x, parameters, samples, conditioning)

    def fused(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Fused | None:
        """Return the validated arguments of the fused op, or None if they do not fit it."""
        with self._measured(x, parameters, samples, None if conditioning is None else conditioning.mask):
            return super().fused(x, parameters, samples, conditioning)

    def _wrong_output(self, came: Any) -> TypeError:
        return TypeError(
            "the decoder of Gaussian(scale='optimal') must return the mean alone, a tensor; got "
            f"{describe(came)}. For one that returns a variance, too, use likelihood='gaussian'"
        )


NAMED_SCALES["optimal"] = OptimalGaussian
