"""Log-mean-exp over importance samples, in plain PyTorch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.reductions import shift
from ..core.special import upcast


def log_mean_exp(log_w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return log (1/K) sum_k exp(log_w[k]), the maximum, and sum_k exp(log_w[k] - maximum), [N] each.

    log_w is [K, N]. A column of -inf has bound -inf and total 0.
    """
    (log_w,) = upcast(log_w)
    maximum = log_w.amax(0)
    total = torch.exp(log_w - shift(maximum)).sum(0)
    return maximum + torch.log(total) - math.log(log_w.shape[0]), maximum, total


def log_mean_exp_backward(grad: Tensor, log_w: Tensor, maximum: Tensor, total: Tensor) -> Tensor:
    """Return grad times the normalised weights softmax_k(log_w): [K, N].

    A column of -inf has zero gradient; weights and gradients below the smallest normal number are zero.
    """
    dtype = log_w.dtype
    (log_w,) = upcast(log_w)
    tiny = torch.finfo(log_w.dtype).tiny
    weight = torch.exp(log_w - shift(maximum)) / total
    weight = torch.where((weight < tiny) | (total == 0), torch.zeros_like(weight), weight)
    result = grad * weight
    result = torch.where((result.abs() < tiny) | (weight == 0), torch.zeros_like(result), result)
    return result.to(dtype)
