"""The Gaussian likelihood with the variance that fits best."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .._nested import Beside
from ..head import LastLayer
from ..ops.op import accumulator
from .base import Fused, describe
from .gaussian import NAMED_SCALES, Gaussian


class OptimalGaussian(Gaussian):
    r"""p(x|z) = N(mean, σ²) with the one σ² that makes the data likeliest, for decoders that return ``mean``:
    what ``fastvae.Gaussian(scale="optimal")`` is.

    .. math:: σ^2 = \frac1{|i, k|} \sum_{i,k} (x_i - m_{ki})^2

    over everything that is decoded together. There the derivative by σ² is 0, so none is taken. It is
    measured in training mode with gradients enabled, from the elements that a mask leaves. Otherwise, in
    ``eval()`` and wherever draws are streamed, σ² is a running mean of those in training, the buffer
    ``variance``.

    Args:
        momentum: the weight of the newest σ² in the running mean, as in BatchNorm; the first one sets it.

    Raises:
        RuntimeError: where the running mean is asked for before any training step.

    References:
        Rybkin, Daniilidis & Levine, Simple and effective VAE training with calibrated decoders, 2021.

    Example:
        >>> import torch, fastvae
        >>> likelihood = fastvae.Gaussian(scale="optimal")
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
                "fastvae.Gaussian(scale=0.1, learned=True)"
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
        """σ of the running mean; NaN before the first step."""
        return self.variance.sqrt()

    @contextmanager
    def _measured(
        self, x: Tensor, parameters: Any, samples: int, mask: Tensor | None = None
    ) -> Iterator[None]:
        """With σ² of these, in training."""
        if self._now is not None or not (self.training and torch.is_grad_enabled() and x.numel()):
            yield
            return
        (mean,) = self._read(x, parameters, samples, (0.0,))
        with torch.no_grad():
            square = (mean.to(accumulator(mean.dtype)).reshape(samples, *x.shape) - x).square()
            kept = self.variance.to(square.device, square.dtype)
            if mask is None:
                now = square.mean().clamp(min=1e-30)
                known = torch.ones_like(kept, dtype=torch.bool)
            else:
                count = samples * mask.expand(x.shape).sum()
                known = count > 0
                now = (torch.where(mask, square, 0.0).sum() / count).clamp(min=1e-30)
                # A batch without an observed element measures nothing, and has no use for a variance.
                now = torch.where(known, now, torch.where(kept.isnan(), 1.0, kept))
            new = torch.where(kept.isnan(), now, torch.lerp(kept, now, self.momentum))
            self.variance = torch.where(known, new, kept).to(self.variance.dtype)
        self._now = now
        try:
            yield
        finally:
            self._now = None

    def _layers(self, x: Tensor, layer: LastLayer, samples: int, beside: Beside | None) -> None:
        return None  # the variance is measured of the mean

    def _returned(self, held: int) -> tuple[str, ...]:
        return ("mean",)

    def _given(self, x: Tensor) -> tuple[float | Tensor, ...]:
        if self._now is not None:
            return (self._now.log(),)
        if not x.numel():
            return (0.0,)
        if bool(self.variance.isnan()):
            raise RuntimeError(
                "scale='optimal' has no variance yet, which it measures in training mode with gradients "
                "enabled; train first, load a state_dict, or give a number, as in "
                "fastvae.Gaussian(scale=0.1)"
            )
        return (self.variance.to(x.device).log(),)

    def _elements(self, x: Tensor, parameters: Any, samples: int, size: Tensor | None) -> Tensor:
        with self._measured(x, parameters, samples):
            return super()._elements(x, parameters, samples, size)

    def log_likelihood(
        self, x: Tensor, parameters: Any, samples: int, beside: Beside | None = None
    ) -> Tensor:
        """log p(x|z) [K, B] of what the decoder returned for K·B rows of z, sample-major."""
        with self._measured(x, parameters, samples, None if beside is None else beside.mask):
            return super().log_likelihood(x, parameters, samples, beside)

    def fused(self, x: Tensor, parameters: Any, samples: int, beside: Beside | None = None) -> Fused | None:
        """What the fused op takes, checked; None where it does not fit."""
        if beside is not None and beside.mask is not None:
            return None
        with self._measured(x, parameters, samples):
            return super().fused(x, parameters, samples, beside)

    def _wrong_output(self, came: Any) -> TypeError:
        return TypeError(
            "the decoder of Gaussian(scale='optimal') must return the mean alone, a tensor; got "
            f"{describe(came)}. For one that returns a variance, too, use likelihood='gaussian'"
        )


NAMED_SCALES["optimal"] = OptimalGaussian
