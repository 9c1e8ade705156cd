r"""Row-reduced Bernoulli log-likelihood from logits; x in [0, 1], broadcast over samples.

.. math:: \log p(x|z_k) = \sum_i \big[x_i l_{ki} - \mathrm{softplus}(l_{ki})\big]
          = -\sum_i \big[t_{ki} |l_{ki}| + \log(1 + e^{-|l_{ki}|})\big],
          \quad t = x \text{ if } l ≤ 0 \text{ else } 1 - x

The second form neither cancels nor overflows, and :math:`0 \cdot ∞ = 0`: a pixel that is certain and right
costs nothing.

With :math:`g_k` what arrives: :math:`\bar l_{ki} = g_k (x_i - σ(l_{ki}))` and
:math:`\bar x_i = \sum_k g_k l_{ki}`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend
from .._checks import checks_data
from ._registry import define
from ._rows import native_log_prob, native_log_prob_backward, result_dtype
from .gaussian import adapt_rows, check_event, flatten_event


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    r"""Log-likelihood of independent Bernoulli pixels, summed over the event.

    .. math:: \sum_i \big[x_i l_i - \log(1 + e^{l_i})\big]

    Args:
        x: targets in [0, 1], [B, *event]; broadcasts over the leading axes of logits.
        logits: [..., B, *event].

    Returns:
        nats [..., B], in float32 (float64 for float64 inputs).

    Raises:
        TypeError, ValueError: for shapes that do not fit, integer tensors, or several devices.
        ValueError: for targets outside [0, 1]: always on a CPU; on a GPU, where it would cost a
            synchronisation, if the environment variable FASTVAE_CHECK is 1.

    Example:
        >>> import torch, fastvae
        >>> x, logits = torch.ones(4, 8, 8), torch.zeros(50, 4, 8, 8)
        >>> fastvae.ops.bernoulli_log_prob(x, logits)[0, 0]  # 64 log ½
        tensor(-44.3614)
    """
    check_event("x", x, "logits", logits)
    if not torch.compiler.is_compiling() and _checks_targets_here(x.device):
        low, high = (x.detach().amin(), x.detach().amax()) if x.numel() else (x.new_zeros(()), x.new_ones(()))
        # Written so that NaN passes: NaN in gives NaN out.
        if bool(low < 0) or bool(high > 1):
            _refuse_targets(float(low), float(high))
    return _bernoulli_log_prob(x, logits)


def _checks_targets_here(device: torch.device) -> bool:
    """Whether targets are checked before the op: C++ does it in the pass that reads them."""
    return _backend.on_cpu() != "native" if device.type == "cpu" else checks_data()


def _refuse_targets(low: float, high: float):
    raise ValueError(
        f"x holds values in [{low:g}, {high:g}], but Bernoulli targets must lie in [0, 1]; images scaled to "
        "[-1, 1] are mended by (x + 1) / 2, bytes by x / 255, and data that is not bounded wants "
        "likelihood='gaussian'"
    )


def _native_bernoulli_log_prob(x, logits):
    out, in_range = native_log_prob("bernoulli", x, logits)
    if not in_range:
        _refuse_targets(float(x.amin()), float(x.amax()))
    return out


def _native_bernoulli_log_prob_backward(grad, x, logits, need):
    return native_log_prob_backward("bernoulli", grad, x, (logits,), need)


def _fake_bernoulli_log_prob(x, logits):
    return logits.new_empty(logits.shape[:2], dtype=result_dtype(x, logits))


def _fake_bernoulli_log_prob_backward(grad, x, logits, need):
    return tuple(t.new_empty(t.shape) if n else None for t, n in zip((x, logits), need, strict=True))


def _setup(ctx, args, result):
    ctx.save_for_backward(*args)


def _backward(ctx, grad):
    x, logits = ctx.saved_tensors
    if grad.dim() != logits.dim() - 1:
        grad = grad.reshape(logits.shape[:-1])
    return _bernoulli_log_prob_backward(grad, x, logits, list(ctx.needs_input_grad))


_bernoulli_log_prob_backward = define(
    "bernoulli",
    "bernoulli_log_prob_backward",
    "(Tensor grad, Tensor x, Tensor logits, bool[2] need) -> (Tensor, Tensor)",
    native=_native_bernoulli_log_prob_backward,
    fake=_fake_bernoulli_log_prob_backward,
    adapt=adapt_rows,
)
_bernoulli_log_prob = define(
    "bernoulli",
    "bernoulli_log_prob",
    "(Tensor x, Tensor logits) -> Tensor",
    native=_native_bernoulli_log_prob,
    fake=_fake_bernoulli_log_prob,
    setup=_setup,
    backward=_backward,
    flatten=flatten_event,
)
