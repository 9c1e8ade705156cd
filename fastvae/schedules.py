"""Schedules of a training, such as β's warm-up: functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ._checks import check_count, check_number

__all__ = ["linear"]


def linear(
    first: float, last: float, steps: int, *, delay: int = 0, device: torch.device | str | None = None
) -> Callable[[int | Tensor], Tensor]:
    r"""A straight line from ``first`` to ``last``, which stays there: KL warm-up, as ``beta=``.

    .. math:: β(t) = \mathrm{first} + (\mathrm{last} - \mathrm{first})\,
              \min(1, \max(0, (t - \mathrm{delay}) / \mathrm{steps}))

    It returns a tensor, whose value is no part of compiled code: a training step that takes it as an argument
    is compiled once.

    Args:
        first, last: values at the ends.
        steps: the length of the line, in steps.
        delay: steps before it begins.
        device: of the tensor; default the CPU's, which every device takes as a number. A step that is
            replayed as a CUDA graph needs the card's, and a step that is a tensor there.

    Returns:
        A function of the step, an int or an integer tensor [], that returns a float32 tensor [].

    Raises:
        TypeError, ValueError: for arguments that are no such numbers.

    References:
        Bowman et al., Generating Sentences from a Continuous Space, 2016; Sønderby et al., Ladder Variational
        Autoencoders, 2016.

    Example:
        >>> import torch, fastvae
        >>> beta = fastvae.schedules.linear(0.0, 1.0, steps=100)
        >>> [float(beta(step)) for step in (0, 25, 100, 1000)]
        [0.0, 0.25, 1.0, 1.0]
        >>> x, q, decoder = torch.rand(4, 8), torch.zeros(4, 4), torch.nn.Linear(2, 8)
        >>> fastvae.elbo(x, q, decoder, likelihood="bernoulli", beta=beta(25)).shape
        torch.Size([])
    """
    first = check_number("first", first, "where the line begins", -math.inf)
    last = check_number("last", last, "where the line ends", -math.inf)
    check_count("steps", steps, "the length of the line")
    if isinstance(delay, bool) or not isinstance(delay, int) or delay < 0:
        raise ValueError(f"delay must be an int of at least 0, the steps before the line; got {delay!r}")

    def at(step: int | Tensor) -> Tensor:
        if isinstance(step, Tensor):
            way = ((step - delay) / steps).clamp(0, 1).to(device or step.device, torch.float32)
            return torch.lerp(torch.full_like(way, first), torch.full_like(way, last), way)
        if isinstance(step, bool) or not isinstance(step, int):
            raise TypeError(f"step must be an int or a tensor [], got {type(step).__name__}")
        share = min(1.0, max(0.0, (step - delay) / steps))
        return torch.tensor(first + (last - first) * share, dtype=torch.float32, device=device)

    return at
