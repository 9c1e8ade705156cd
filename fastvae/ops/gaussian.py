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

from .. import _backend
from .._checks import check_same_device, check_tensor, shape_of
from ._registry import accumulator, code, define, empty, empty_like, pointer, strided


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
    x2, mean3, lead = flatten_event("x", x, "mean", mean)
    event = mean.shape[len(lead) + 1 :]
    if not isinstance(logvar, Tensor):
        if isinstance(logvar, bool) or not isinstance(logvar, (int, float)):
            raise TypeError(f"logvar must be a tensor or a number, got {type(logvar).__name__}")
        logvar = torch.full((), logvar, dtype=accumulator(mean.dtype), device=mean.device)
    check_tensor("logvar", logvar)
    check_same_device("logvar", logvar, "mean", mean)
    return _gaussian_log_prob(x2, mean3, _fold_logvar(logvar, mean, lead, event)).reshape(*lead, x.shape[0])


def flatten_event(
    x_name: str, x: Tensor, name: str, parameter: Tensor
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Check x [B, *event] against a parameter [..., B, *event]; return [B, X], [K, B, X], leading axes."""
    check_tensor(x_name, x)
    check_tensor(name, parameter)
    check_same_device(name, parameter, x_name, x)
    lead = parameter.dim() - x.dim()
    if x.dim() == 0 or lead < 0 or parameter.shape[lead:] != x.shape:
        raise ValueError(
            f"{name} has shape {shape_of(parameter)}, which does not end in {x_name}'s {shape_of(x)} ([B, "
            f"*event]); expected [..., {', '.join(map(str, x.shape))}]"
        )
    b = x.shape[0]
    # Written out, since -1 is ambiguous for an empty batch.
    size = x.shape[1:].numel()
    samples = parameter.shape[:lead]
    return x.reshape(b, size), parameter.reshape(samples.numel(), b, size), tuple(samples)


def _fold_logvar(logvar: Tensor, mean: Tensor, lead: tuple[int, ...], event: tuple[int, ...]) -> Tensor:
    """Bring logvar to [1 or K, 1 or B, 1 or X], expanding only what is broadcast in part."""
    missing = mean.dim() - logvar.dim()
    fits = missing >= 0 and all(n in (1, m) for n, m in zip(logvar.shape, mean.shape[missing:], strict=True))
    if not fits:
        raise ValueError(
            f"logvar has shape {shape_of(logvar)}, which does not broadcast to mean's {shape_of(mean)}; "
            f"expected that shape, one row {list(event)}, or one number"
        )
    logvar = logvar.reshape((1,) * missing + tuple(logvar.shape))
    groups = ((0, len(lead)), (len(lead), len(lead) + 1), (len(lead) + 1, mean.dim()))
    sizes = []
    for start, stop in groups:
        ours, full = logvar.shape[start:stop], mean.shape[start:stop]
        if all(n == 1 for n in ours):
            sizes.append(1)
            continue
        logvar = logvar.expand(*logvar.shape[:start], *full, *logvar.shape[stop:])
        sizes.append(full.numel())
    return logvar.reshape(sizes)


_FULL, _COLUMN, _ROW = 0, 1, 2


def _native_layout(x, mean, logvar):
    """Dtypes that the C++ has code for, and which of its three layouts the log variance takes."""
    # A log variance in float64 widens everything, as in plain PyTorch.
    wide = torch.float64 if logvar.dtype == torch.float64 else mean.dtype
    data, parameter = _pair_of_dtypes(x.dtype, wide)
    wide = accumulator(parameter)
    if logvar.shape[2] == 1 and mean.shape[2] != 1:
        # One per row: a column of numbers, kept in the dtype of the sums.
        return data, parameter, logvar.to(wide).expand(*mean.shape[:2], 1), _ROW
    if logvar.shape[0] == 1 and logvar.shape[1] == 1:
        return data, parameter, logvar.to(wide).contiguous().expand(*mean.shape), _COLUMN
    if logvar.dtype != parameter:
        parameter = torch.promote_types(parameter, logvar.dtype)
        data, parameter = _pair_of_dtypes(data, parameter)
    return data, parameter, logvar.to(parameter).expand(mean.shape), _FULL


def _pair_of_dtypes(data: torch.dtype, parameter: torch.dtype) -> tuple[torch.dtype, torch.dtype]:
    """C++ has code for equal dtypes, and for float32 data with half-precision parameters."""
    if data == parameter or (data == torch.float32 and parameter != torch.float64):
        return data, parameter
    wide = torch.promote_types(data, parameter)
    return wide, wide


def _native_gaussian_log_prob(x, mean, logvar):
    if not mean.numel():
        return torch.zeros(mean.shape[:2], dtype=_result_dtype(x, mean, logvar))
    data, parameter, logvar, layout = _native_layout(x, mean, logvar)
    x, mean = x.to(data), mean.to(parameter)
    out = empty(mean.shape[:2], accumulator(parameter))
    _backend.extension().gaussian_log_prob(
        code(data), code(parameter), layout, out.data_ptr(),
        strided(x), strided(mean), strided(logvar),
        *mean.shape, torch.get_num_threads(),
    )  # fmt: skip
    return out


def _native_gaussian_log_prob_backward(grad, x, mean, logvar, need):
    if not mean.numel():
        return _zero_grads((x, mean, logvar), need)
    shape, dtypes = logvar.shape, (x.dtype, mean.dtype, logvar.dtype)
    data, parameter, logvar, layout = _native_layout(x, mean, logvar)
    x, mean = x.to(data), mean.to(parameter)
    wide = accumulator(parameter)
    k, b, size = mean.shape
    ext = _backend.extension()
    grad_x = empty_like(x) if need[0] else None
    grad_mean = empty_like(mean) if need[1] else None
    grad_logvar = None
    if need[2]:
        partial = {_FULL: (k, b, size), _COLUMN: (ext.column_partials(b), size), _ROW: (k, b, 1)}[layout]
        grad_logvar = empty(partial, parameter if layout == _FULL else wide)
    ext.gaussian_log_prob_backward(
        code(data), code(parameter), layout, pointer(grad_x), pointer(grad_mean), pointer(grad_logvar),
        strided(grad), strided(x), strided(mean), strided(logvar),
        k, b, size, torch.get_num_threads(),
    )  # fmt: skip
    if grad_logvar is not None:
        grad_logvar = (
            grad_logvar.sum(0).view(1, 1, size) if layout == _COLUMN else grad_logvar.sum_to_size(shape)
        )
    grads = (grad_x, grad_mean, grad_logvar)
    return tuple(None if g is None else g.to(d) for g, d in zip(grads, dtypes, strict=True))


def _zero_grads(tensors, need):
    """Gradients where there is nothing to sum over: an empty tensor has no address to hand to C++."""
    return tuple(t.new_zeros(t.shape) if n else None for t, n in zip(tensors, need, strict=True))


def _fake_gaussian_log_prob(x, mean, logvar):
    return mean.new_empty(mean.shape[:2], dtype=_result_dtype(x, mean, logvar))


def _result_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _fake_gaussian_log_prob_backward(grad, x, mean, logvar, need):
    return tuple(t.new_empty(t.shape) if n else None for t, n in zip((x, mean, logvar), need, strict=True))


def _setup(ctx, args, result):
    ctx.save_for_backward(*args)


def _backward(ctx, grad):
    return _gaussian_log_prob_backward(grad, *ctx.saved_tensors, list(ctx.needs_input_grad))


_gaussian_log_prob_backward = define(
    "gaussian",
    "gaussian_log_prob_backward",
    "(Tensor grad, Tensor x, Tensor mean, Tensor logvar, bool[3] need) -> (Tensor, Tensor, Tensor)",
    native=_native_gaussian_log_prob_backward,
    fake=_fake_gaussian_log_prob_backward,
)
_gaussian_log_prob = define(
    "gaussian",
    "gaussian_log_prob",
    "(Tensor x, Tensor mean, Tensor logvar) -> Tensor",
    native=_native_gaussian_log_prob,
    fake=_fake_gaussian_log_prob,
    setup=_setup,
    backward=_backward,
)
