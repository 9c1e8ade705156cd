r"""Row-reduced log-likelihood of a diagonal Gaussian, x broadcast over samples without being copied.

.. math::
    \log p(x|z_k) = -½ \sum_i \big[\log 2π + \log s_{ki}^2 + (x_i - m_{ki})^2 / s_{ki}^2\big]

With :math:`g_k` what arrives, and :math:`r = (x - m) / s^2`:

.. math::
    \bar m_{ki} = g_k r_{ki}, \quad \overline{\log s^2}_{ki} = ½ g_k \big[(x_i - m_{ki}) r_{ki} - 1\big],
    \quad \bar x_i = -\sum_k \bar m_{ki}

The log variance has one entry per element, or broadcasts over samples and rows (a row per pixel), or over
pixels as well (one number, fixed or learned); its gradient is then summed in a fixed order inside the kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._checks import check_same_device, check_tensor, shape_of
from ._rows import LogProb, check_event
from .op import accumulator


def gaussian_log_prob(x: Tensor, mean: Tensor, logvar: Tensor | float) -> Tensor:
    r"""Log-likelihood of a diagonal Gaussian, summed over the event.

    .. math:: -½ \sum_i \big[\log 2π + \mathrm{logvar}_i
              + (x_i - \mathrm{mean}_i)^2 e^{-\mathrm{logvar}_i}\big]

    Args:
        x: data [B, *event]; broadcasts over the leading axes of mean.
        mean: [..., B, *event].
        logvar: log variance, broadcastable to mean: a tensor like mean, one row [*event], or one number.

    Returns:
        nats [..., B], in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: for shapes that do not fit, integer tensors, or several devices.

    Example:
        >>> import torch, fastvae
        >>> x, mean = torch.zeros(4, 3, 8, 8), torch.zeros(50, 4, 3, 8, 8)
        >>> fastvae.ops.gaussian_log_prob(x, mean, 0.0).shape
        torch.Size([50, 4])
    """
    check_event("x", x, "mean", mean)
    if not isinstance(logvar, Tensor):
        if isinstance(logvar, bool) or not isinstance(logvar, (int, float)):
            raise TypeError(f"logvar must be a tensor or a number, got {type(logvar).__name__}")
        logvar = torch.full((), logvar, dtype=accumulator(mean.dtype), device=mean.device)
    check_tensor("logvar", logvar)
    check_same_device("logvar", logvar, "mean", mean)
    return _gaussian_log_prob(x, mean, _spread_logvar(logvar, mean, x))


def _spread_logvar(logvar: Tensor, mean: Tensor, x: Tensor) -> Tensor:
    """Give logvar mean's axes, expanding what is broadcast in part: over all of the samples, the rows, or the
    event, it stays one number.
    """
    if logvar.shape == mean.shape:
        return logvar
    missing, lead = mean.dim() - logvar.dim(), mean.dim() - x.dim()
    fits = missing >= 0 and all(n in (1, m) for n, m in zip(logvar.shape, mean.shape[missing:], strict=True))
    if not fits:
        raise ValueError(
            f"logvar has shape {shape_of(logvar)}, which does not broadcast to mean's {shape_of(mean)}; "
            f"expected that shape, one row {list(mean.shape[lead + 1 :])}, or one number"
        )
    logvar = logvar.reshape((1,) * missing + tuple(logvar.shape))
    for start, stop in ((0, lead), (lead, lead + 1), (lead + 1, mean.dim())):
        if any(n != 1 for n in logvar.shape[start:stop]):
            full = mean.shape[start:stop]
            logvar = logvar.expand(*logvar.shape[:start], *full, *logvar.shape[stop:])
    return logvar


_gaussian_log_prob = LogProb("gaussian", ("mean", "logvar"))
