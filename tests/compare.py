"""The comparison that every kernel test uses, and its bound."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_accurate(
    name: str, actual: Tensor, eager: Tensor, exact: Tensor, scale: Tensor | None = None, least: float = 1
) -> None:
    """Element by element: error <= 2 * (eager's largest error relative to the scale) * scale + 1 ulp.

    Args:
        actual: what the kernel gave.
        eager: plain PyTorch on the same inputs in the same dtype.
        exact: the same in float64.
        scale: the sum of the magnitudes of the terms that make up each element, in float64; by default,
            |exact|.
        least: what eager's error counts as at least, in ulps.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert actual.dtype == eager.dtype, f"{name}: dtype {actual.dtype}, expected {eager.dtype}"
    info = torch.finfo(actual.dtype)
    actual, eager, exact = (t.detach().double().cpu() for t in (actual, eager, exact))
    scale = (exact if scale is None else scale.detach().cpu().expand(exact.shape)).abs().clamp(min=info.tiny)
    finite = exact.isfinite() & eager.isfinite()
    # Where the true value or plain PyTorch is infinite or NaN in this dtype, the kernel must agree with
    # PyTorch.
    same = (actual == eager) | (actual.isnan() & eager.isnan())
    assert bool(same[~finite].all()), f"{name}: {int((~same & ~finite).sum())} non-finite elements differ"
    if not bool(finite.any()):
        return
    # What eager's error is over many elements, its largest over these few only estimates: a formula of three
    # roundings or more (all are) has one of an ulp somewhere, even if not in the row at hand.
    relative = ((eager - exact).abs() / scale)[finite].max().clamp(min=least * info.eps)
    # For float64 the exact value is itself rounded: a few operations and a sum in another order.
    ulps = 16 if info.bits == 64 else 1
    bound = (2 * relative + ulps * info.eps) * scale
    error = (actual - exact).abs()
    # Written so that a NaN is a failure.
    good = (error <= bound) | ~finite
    if not bool(good.all()):
        worst = torch.where(good, 0.0, error.nan_to_num(nan=torch.inf) / bound).flatten().argmax()
        raise AssertionError(
            f"{name}: {int((~good).sum())} of {good.numel()} elements are off; worst at {int(worst)}: got "
            f"{actual.flatten()[worst]:.9g}, exact {exact.flatten()[worst]:.9g}, eager "
            f"{eager.flatten()[worst]:.9g}, "
            f"allowed error {bound.flatten()[worst]:.3g}"
        )
