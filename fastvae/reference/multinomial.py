"""Counts over an event in plain PyTorch; the mathematics is in :mod:`fastvae.ops.multinomial`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.reductions import shift
from ..core.special import upcast


def dense(x: Tensor, begins: Tensor | None, columns: Tensor | None, width: int) -> Tensor:
    """Return x [B, X], of a sparse x from its values, begins of rows and columns."""
    if begins is None or columns is None:
        return x
    made = x.new_zeros((begins.shape[0] - 1, width))
    rows = torch.repeat_interleave(begins.diff(), output_size=columns.shape[0])
    return made.index_put_((rows, columns), x, accumulate=True)


def log_coefficient(counts: Tensor) -> Tensor:
    """Return log n! − Σ log x! [B] of counts [B, X], in float64."""
    wide = counts.double()
    return torch.lgamma(wide.sum(1) + 1) - torch.lgamma(wide + 1).sum(1)


def _read(
    x: Tensor, begins: Tensor | None, columns: Tensor | None, mask: Tensor | None, logits: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return counts [B, X], logits [K, B, X], and the mask."""
    counts, wide = upcast(dense(x, begins, columns, logits.shape[1]), logits)
    wide = wide.reshape(-1, *counts.shape) if counts.numel() else wide.reshape(-1, *counts.shape[:1], 0)
    if mask is not None:
        counts, wide = torch.where(mask, counts, 0.0), torch.where(mask, wide, -torch.inf)
    return counts, wide, mask


def multinomial_log_prob(
    x: Tensor,
    begins: Tensor | None,
    columns: Tensor | None,
    mask: Tensor | None,
    logits: Tensor,
    coefficient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p [N], log-sums [N] and numbers of counts [B]."""
    rows = logits.shape[0]
    if not logits.numel():
        batch = x.shape[0] if begins is None else begins.shape[0] - 1
        dtype = torch.float64 if torch.float64 in (x.dtype, logits.dtype) else torch.float32
        empty = logits.new_zeros(rows, dtype=dtype)
        return empty, empty.clone(), logits.new_zeros(batch, dtype=dtype)
    counts, wide, _ = _read(x, begins, columns, mask, logits)
    total = counts.sum(1)
    normaliser = torch.logsumexp(wide, 2)
    # Relative to the largest logit, as large logits differ by little.
    relative = wide - shift(wide.amax(2, keepdim=True))
    each = torch.where(counts == 0, 0.0, counts * (relative - torch.logsumexp(relative, 2, keepdim=True)))
    value = each.sum(2)
    if coefficient:
        value = value + log_coefficient(counts).to(value.dtype)
    value = torch.where(total == 0, 0.0, value)
    return value.reshape(rows), torch.where(total == 0, 0.0, normaliser).reshape(rows), total


def multinomial_log_prob_backward(
    grad: Tensor,
    normaliser: Tensor,
    total: Tensor,
    x: Tensor,
    begins: Tensor | None,
    columns: Tensor | None,
    mask: Tensor | None,
    logits: Tensor,
) -> Tensor:
    """Return the gradient of the logits."""
    if not logits.numel():
        return torch.zeros_like(logits)
    counts, wide, seen = _read(x, begins, columns, mask, logits)
    share = torch.exp(wide - normaliser.reshape(wide.shape[:2])[..., None])
    grads = grad.reshape(wide.shape[:2])[..., None] * (counts - total[:, None] * share)
    grads = torch.where(total[:, None] == 0, 0.0, grads)
    if seen is not None:
        grads = torch.where(seen, grads, 0.0)
    return grads.reshape(logits.shape).to(logits.dtype)
