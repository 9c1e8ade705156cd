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
from ._rows import LogProb, check_event


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
    check_targets(x)
    return _bernoulli_log_prob(x, logits)


def check_targets(x: Tensor) -> None:
    """Refuse targets outside [0, 1], where the op itself does not and looking is asked for or free."""
    if torch.compiler.is_compiling() or not _checks_targets_here(x.device) or not x.numel():
        return
    values = x.detach()
    # Written so that NaN passes: NaN in gives NaN out.
    if bool(values.amin() < 0) or bool(values.amax() > 1):
        refuse_targets(values)


def _checks_targets_here(device: torch.device) -> bool:
    """Whether targets are checked before the op: C++ does it in the pass that reads them."""
    return _backend.on_cpu() != "native" if device.type == "cpu" else checks_data()


def refuse_targets(x: Tensor):
    """They are outside of [0, 1]."""
    low, high = float(x.amin()), float(x.amax())
    raise ValueError(
        f"x holds values in [{low:g}, {high:g}], but Bernoulli targets must lie in [0, 1]; for images scaled "
        "to [-1, 1] use (x + 1) / 2, for bytes x / 255, and for data that is not bounded "
        "likelihood='gaussian'"
    )


_bernoulli_log_prob = LogProb("bernoulli", ("logits",), refuse_targets)
