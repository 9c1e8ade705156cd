"""Classes in plain PyTorch; the mathematics is in :mod:`fastvae.ops.categorical`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.special import upcast


def _blocks(begins: Tensor | None, logits: Tensor, last: bool) -> list[Tensor]:
    """Return logits [N, C, P], or [N, C, 1] of each position if the numbers of classes differ."""
    if begins is None:
        return [logits.mT if last else logits]
    return [part[..., None] for part in logits.split(begins.diff().tolist(), 1)]


def _parts(x: Tensor, begins: Tensor | None, logits: Tensor, last: bool) -> list[tuple[Tensor, Tensor]]:
    """Return x [N, P] and logits [N, C, P] of positions with equally many classes, in float32 or float64."""
    x, wide = upcast(x, logits)
    x = x.repeat(logits.shape[0] // max(1, x.shape[0]), 1)
    parts = _blocks(begins, wide, last)
    return list(zip(x.split(1, 1) if begins is not None else [x], parts, strict=True))


def categorical_log_prob(
    x: Tensor, begins: Tensor | None, logits: Tensor, last: bool, ignore_index: int
) -> tuple[Tensor, Tensor]:
    """Return log p [N] and the log-sums [N, P] of x [B, P] and logits [N, C, P], or [N, P, C] if ``last``."""
    values, normalisers = [], []
    for data, wide in _parts(x, begins, logits, last):
        known = (data >= 0) & (data < wide.shape[1]) & (data == data.round())
        normaliser = torch.logsumexp(wide, 1)
        index = torch.where(known, data, 0).long()[:, None]
        picked = torch.where(known, wide.gather(1, index)[:, 0], data * 0 - torch.inf)
        values.append(torch.where(data == ignore_index, 0.0, picked - normaliser).sum(1))
        normalisers.append(normaliser)
    return torch.stack(values).sum(0), torch.cat(normalisers, 1)


def categorical_log_prob_backward(
    grad: Tensor,
    normaliser: Tensor,
    x: Tensor,
    begins: Tensor | None,
    logits: Tensor,
    last: bool,
    ignore_index: int,
) -> Tensor:
    """Return the gradient of the logits."""
    parts = _parts(x, begins, logits, last)
    sums = normaliser.split(1, 1) if begins is not None else [normaliser]
    grads = []
    for (data, wide), own in zip(parts, sums, strict=True):
        number = torch.arange(wide.shape[1], device=logits.device)[:, None]
        share = torch.exp(wide - own[:, None])
        slope = grad[:, None, None] * ((data[:, None] == number).to(wide.dtype) - share)
        grads.append(torch.where(data[:, None] == ignore_index, 0.0, slope).to(logits.dtype))
    if begins is not None:
        return torch.cat(grads, 1)[..., 0]
    return grads[0].mT if last else grads[0]
