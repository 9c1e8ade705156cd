"""Training schedules, such as β's warm-up: functions of the step."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..core.checks import as_int, check_count, check_number

__all__ = ["cosine", "cyclical", "linear", "stages"]

Schedule = Callable[[int | Tensor], Tensor]
T = TypeVar("T")


def linear(
    first: float, last: float, steps: int, *, delay: int = 0, device: torch.device | str | None = None
) -> Schedule:
    r"""Return a linear schedule from ``first`` to ``last``, constant afterwards: KL warm-up, as ``beta=``.

    .. math:: β(t) = \mathrm{first} + (\mathrm{last} - \mathrm{first})\,
              \min(1, \max(0, (t - \mathrm{delay}) / \mathrm{steps}))

    The schedule returns a tensor, whose value compiled code does not specialise on: a training step that
    takes it as an argument is compiled once.

    Args:
        first: initial value.
        last: final value.
        steps: length of the ramp, in steps.
        delay: steps before the ramp begins. Default 0.
        device: device of the returned tensor. Default: the step's device if it is a tensor, else the CPU,
            whose scalar tensors every device accepts. A training step replayed as a CUDA graph needs the
            GPU, and a step that is a tensor there.

    Returns:
        A function of the step, an int or an integer tensor [], that returns a float32 tensor [].

    Raises:
        TypeError, ValueError: for invalid numbers.

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
    at = _between(first, last, steps, delay, device, lambda t: t / steps)
    return _Named(at, "linear", first, last, steps, delay=delay, device=device)


def cosine(
    first: float, last: float, steps: int, *, delay: int = 0, device: torch.device | str | None = None
) -> Schedule:
    r"""Return a half-cosine schedule from ``first`` to ``last``, constant afterwards.

    It is :func:`linear` without its two corners.

    .. math:: β(t) = \mathrm{first} + (\mathrm{last} - \mathrm{first})\, \frac{1 - \cos πu}{2}, \quad
              u = \min(1, \max(0, (t - \mathrm{delay}) / \mathrm{steps}))

    Args:
        first: initial value.
        last: final value.
        steps: length of the ramp, in steps.
        delay: steps before the ramp begins. Default 0.
        device: device of the returned tensor, as in :func:`linear`.

    Returns:
        A function of the step, an int or an integer tensor [], that returns a float32 tensor [].

    Raises:
        TypeError, ValueError: for invalid numbers.

    References:
        Loshchilov & Hutter, SGDR, 2017, eq. 5, for learning rates.

    Example:
        >>> import fastvae
        >>> beta = fastvae.schedules.cosine(0.0, 1.0, steps=100)
        >>> [round(float(beta(step)), 3) for step in (0, 25, 50, 100)]
        [0.0, 0.146, 0.5, 1.0]
    """
    at = _between(first, last, steps, delay, device, lambda t: (math.pi / 2 * t / steps).sin().square())
    return _Named(at, "cosine", first, last, steps, delay=delay, device=device)


def cyclical(
    first: float,
    last: float,
    steps: int,
    *,
    cycles: int = 4,
    ramp: float = 0.5,
    delay: int = 0,
    device: torch.device | str | None = None,
) -> Schedule:
    r"""Return a cyclical warm-up: in each cycle a linear ramp from ``first`` to ``last``, then constant.

    After the last cycle it stays at ``last``.

    With :math:`t' = t - \mathrm{delay}`, M cycles of :math:`\mathrm{steps} / M` steps each, and R the ramp,

    .. math:: β(t) = \mathrm{first} + (\mathrm{last} - \mathrm{first})\, \min(1, τ / R), \quad
              τ = (M t' / \mathrm{steps}) \bmod 1

    Args:
        first: value at the beginning of a cycle.
        last: value after the ramp of a cycle.
        steps: total length of all cycles; it need not be a multiple of ``cycles``.
        cycles: M, the number of cycles. Default 4.
        ramp: R, the ramp's fraction of a cycle, in (0, 1]. Default 0.5.
        delay: steps before the first cycle. Default 0.
        device: device of the returned tensor, as in :func:`linear`.

    Returns:
        A function of the step, an int or an integer tensor [], that returns a float32 tensor [].

    Raises:
        TypeError, ValueError: for invalid numbers.

    References:
        Fu et al., Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing, 2019, eq. 6–7.

    Example:
        >>> import fastvae
        >>> beta = fastvae.schedules.cyclical(0.0, 1.0, steps=80, cycles=2)
        >>> [float(beta(step)) for step in (0, 10, 20, 39, 40, 50, 80)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5, 1.0]
    """
    cycles = check_count("cycles", cycles, "how often the line begins")
    ramp = check_number("ramp", ramp, "the share of a cycle that its line takes")
    if not 0 < ramp <= 1:
        raise ValueError(f"ramp must lie in (0, 1], the share of a cycle that its line takes; got {ramp!r}")

    def way(t: Tensor) -> Tensor:
        # The remainder of an integer t is exact.
        return torch.where(t < steps, torch.remainder(t * cycles, steps) / (steps * ramp), 1.0)

    at = _between(first, last, steps, delay, device, way)
    return _Named(at, "cyclical", first, last, steps, cycles=cycles, ramp=ramp, delay=delay, device=device)


class _Named:
    """Schedule whose repr is the call that created it."""

    def __init__(self, at: Callable[[Any], Any], name: str, *args: Any, **options: Any):
        self._at = at
        given = [repr(a) for a in args] + [f"{k}={v!r}" for k, v in options.items() if v not in (None, 0)]
        self._text = f"schedules.{name}({', '.join(given)})"

    def __call__(self, step: int | Tensor) -> Any:
        return self._at(step)

    def __repr__(self) -> str:
        return self._text


def _between(
    first: float,
    last: float,
    steps: int,
    delay: int,
    device: torch.device | str | None,
    way: Callable[[Tensor], Tensor],
) -> Schedule:
    """Return the schedule that interpolates from ``first`` to ``last`` by ``way``.

    ``way`` maps the steps since the delay, clamped to 0 … steps, to 0 … 1.
    """
    first = check_number("first", first, "where the line begins", -math.inf)
    last = check_number("last", last, "where the line ends", -math.inf)
    steps = check_count("steps", steps, "the length of the line")
    delay = check_count("delay", delay, "the steps before the line", least=0)

    def at(step: int | Tensor) -> Tensor:
        if not isinstance(step, Tensor):
            step = as_int("step", step, "or a tensor []")
            # Computed on the CPU, where scalar ops are cheap; only the result is copied to a GPU.
            step = torch.tensor(step)
        share = way((step - delay).clamp(0, steps)).clamp(max=1).to(device or step.device, torch.float32)
        return torch.lerp(torch.full_like(share, first), torch.full_like(share, last), share)

    return at


def stages(values: Sequence[tuple[int, T]]) -> Callable[[int | Tensor], T]:
    """Return a piecewise constant schedule, such as a growing K, or the name of an estimator.

    Values are returned as given, an int K as an int. K determines the shape of z, so compiled code is
    compiled once per value, and each value needs a separate CUDA graph.

    Args:
        values: pairs (first step of a stage, value), in order, the first at step 0.

    Returns:
        A function of the step, an int or an integer tensor [], that returns the stage's value. Reading a
        tensor on a GPU synchronises.

    Raises:
        TypeError, ValueError: for stages that are not such pairs, or out of order.

    Example:
        >>> import fastvae
        >>> k = fastvae.schedules.stages([(0, 1), (1000, 5), (5000, 50)])
        >>> [k(step) for step in (0, 999, 1000, 20_000)]
        [1, 1, 5, 50]
        >>> doubling = fastvae.schedules.stages([(1000 * i, 2**i) for i in range(7)])
        >>> doubling(3500), doubling(100_000)
        (8, 64)
    """
    if not isinstance(values, (list, tuple)) or not values:
        raise TypeError(
            "stages takes a list of pairs (first step, value), at least one; got "
            f"{'an empty one' if isinstance(values, (list, tuple)) else type(values).__name__}"
        )
    for pair in values:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise TypeError(f"stages takes pairs (first step, value), the step an int; got {pair!r}")
    starts = [as_int("a stage's first step", start, "in pairs (first step, value)") for start, _ in values]
    constants = [value for _, value in values]
    if starts[0] != 0 or any(b <= a for a, b in zip(starts, starts[1:], strict=False)):
        raise ValueError(f"stages must begin at step 0 and at rising steps after it; got {starts}")

    def at(step: int | Tensor) -> T:
        if not isinstance(step, Tensor):
            step = as_int("step", step, "or a tensor []")
        return constants[max(0, bisect_right(starts, int(step)) - 1)]  # type: ignore[no-any-return]

    return _Named(at, "stages", list(zip(starts, constants, strict=True)))
