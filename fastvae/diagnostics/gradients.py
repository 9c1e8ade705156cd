"""Signal-to-noise ratio of an objective's gradient, streamed over evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.checks import check_count
from ..ops.op import accumulator

__all__ = ["GradientMonitor", "GradientSNR", "gradient_snr"]


class GradientSNR(NamedTuple):
    """Signal-to-noise ratios of a gradient, per parameter and per group, by name.

    A group, such as ``"encoder"``, contains the parameters with the same name up to the first dot.

    Attributes:
        snr: ``|mean| / std`` of each element, averaged over the elements. Elements whose gradient is always
            0 are excluded; NaN if there are no others.
        squared: ‖mean‖² / Σ variances, pooled over all elements. It is corrected for the noise of the mean,
            so that without signal it is 0 on average, and may be negative.
        floor: value of ``snr`` for pure noise, √(2 / (π n)) for n evaluations: below twice this value
            ``snr`` is not meaningful.
        evaluations: number of gradients; for a running mean, the effective number.
    """

    snr: dict[str, float]
    squared: dict[str, float]
    floor: float
    evaluations: float

    def __str__(self) -> str:
        lines = [
            f"signal-to-noise of the gradient, {self.evaluations:.0f} evaluations (noise: {self.floor:.3g})"
        ]
        width = max(map(len, self.snr))
        for name, value in self.snr.items():
            lines.append(f"  {name:<{width}}  {value:.3g}   squared, pooled {self.squared[name]:.3g}")
        return "\n".join(lines)


class GradientMonitor:
    r"""Running signal-to-noise ratios of gradients during training.

    It stores a mean and a mean squared deviation of each parameter's gradient, two copies of its size.

    **The ratios are confounded**: during training the parameters and the batches change, too. Drift of the
    mean gradient counts as noise, and so do differences between batches: the ratio is that of the training
    steps, not of the estimator at fixed parameters, which :func:`gradient_snr` measures. Use it to see trends
    and compare runs; use :func:`gradient_snr` to compare estimators.

    Args:
        parameters: parameters by name, as in :func:`gradient_snr`.
        window: time constant in steps of an exponential average: a new step has weight 1 / window or, in
            the first steps, 1 / step. Default: None, equal weights for all steps.

    Raises:
        TypeError, ValueError: for invalid parameters.

    References:
        Welford, Note on a method for calculating corrected sums of squares and products, 1962; Rainforth et
        al., Tighter Variational Bounds are Not Necessarily Better, 2018.

    Example:
        >>> import torch, fastvae
        >>> vae = fastvae.VAE(torch.nn.Linear(7, 6), torch.nn.Linear(3, 7), likelihood="bernoulli")
        >>> optimizer = torch.optim.Adam(vae.parameters())
        >>> monitor = fastvae.diagnostics.GradientMonitor(vae, window=100)
        >>> for x in torch.rand(5, 16, 7):
        ...     optimizer.zero_grad()
        ...     (-vae.iwae(x, k=5)).backward()
        ...     monitor.update()  # before gradients are clipped
        ...     optimizer.step()
        >>> sorted(monitor.result().snr)  # doctest: +NORMALIZE_WHITESPACE
        ['decoder', 'decoder.bias', 'decoder.weight', 'encoder', 'encoder.bias', 'encoder.weight']
    """

    def __init__(
        self,
        parameters: nn.Module | Mapping[str, Any] | Iterable[tuple[str, Tensor]],
        *,
        window: int | None = None,
    ):
        self.parameters = _named(parameters)
        self.window = None if window is None else check_count("window", window, "the steps that count")
        self.reset()

    def reset(self) -> None:
        """Discard all gradients seen so far."""
        self._mean = [torch.zeros_like(p, dtype=accumulator(p.dtype)) for p in self.parameters.values()]
        self._square = [torch.zeros_like(m) for m in self._mean]
        self.count = 0
        # Sum of the squared weights of the gradients; the weights sum to 1.
        self._squares = 1.0

    @torch.no_grad()
    def update(self, gradients: Iterable[Tensor | None] | None = None) -> None:
        """Add one gradient, without synchronising a GPU.

        Args:
            gradients: one per parameter, in order; None stands for 0. Default: each parameter's ``.grad``.
        """
        if gradients is None:
            gradients = [p.grad for p in self.parameters.values()]
        self.count += 1
        share = 1 / (self.count if self.window is None else min(self.count, self.window))
        self._squares = (1 - share) ** 2 * self._squares + share**2
        for mean, square, gradient in zip(self._mean, self._square, gradients, strict=True):
            if gradient is None:
                move = -mean
            else:
                dense = gradient.to_dense() if gradient.layout != torch.strided else gradient
                move = dense.to(mean.dtype) - mean
            mean.add_(move, alpha=share)
            # E(g − mean)², after a new g at distance `move` from the old mean (Welford).
            square.add_(move.square_(), alpha=share).mul_(1 - share)

    def result(self) -> GradientSNR:
        """Return the current ratios.

        Raises:
            ValueError: before the second gradient.
        """
        if self.count < 2 or self._squares >= 1:
            raise ValueError(
                f"a variance takes two gradients or more, and a window of as many; got {self.count}"
            )
        # Per parameter: Σ|mean|/std, number of elements with a gradient, Σ mean², Σ variances.
        sums: dict[str, Tensor] = {}
        for name, mean, square in zip(self.parameters, self._mean, self._square, strict=True):
            variance = square / (1 - self._squares)
            some = (mean != 0) | (variance != 0)
            ratio = torch.where(some, mean.abs() / variance.sqrt(), 0.0)
            parts = [v.double().sum() for v in (ratio, some, mean.double().square(), variance)]
            of_all = torch.stack(parts).cpu()
            for title in dict.fromkeys((name.partition(".")[0], name)):
                sums[title] = sums[title] + of_all if title in sums else of_all
        snr, squared = {}, {}
        for title, of_all in sums.items():
            ratios, count, signal, noise = of_all.tolist()
            snr[title] = ratios / count if count else math.nan
            signal -= self._squares * noise
            squared[title] = (
                signal / noise if noise else math.copysign(math.inf, signal) if signal else math.nan
            )
        return GradientSNR(snr, squared, math.sqrt(2 * self._squares / math.pi), 1 / self._squares)


def gradient_snr(
    bound: Callable[[], Tensor],
    parameters: nn.Module | Mapping[str, Any] | Iterable[tuple[str, Tensor]],
    *,
    evaluations: int = 100,
) -> GradientSNR:
    r"""Measure the signal-to-noise ratio of a bound's gradient over evaluations with fresh noise.

    .. math:: \mathrm{SNR}(θ_i) = \frac{|E[g_i]|}{\sqrt{\mathrm{Var}[g_i]}}, \quad
              \text{squared, pooled: } \frac{\sum_i E[g_i]^2}{\sum_i \mathrm{Var}[g_i]}, \quad
              g = \nabla_θ\, \mathrm{bound}

    The parameters stay fixed. For large K, the encoder's ratio with :func:`fastvae.iwae` falls like
    :math:`1/\sqrt K`, and with ``estimator="dreg"`` it rises like :math:`\sqrt K`; the decoder's rises like
    :math:`\sqrt K`.

    The gradients are streamed: in addition to the gradient, two copies of it are stored. ``.grad`` is neither
    read nor changed. Other side effects of an evaluation persist: torch's random state, and the statistics of
    a BatchNorm in train mode.

    Args:
        bound: function without arguments that returns a bound [] of one batch, with fresh noise in each call,
            such as ``lambda: vae.iwae(x, k=50)``. With a new batch in each call, the ratio includes the noise
            of batches, as in a training step.
        parameters: parameters to differentiate by, with names: a module; a dict of modules, tensors, or dicts
            of these; or pairs (name, tensor), such as ``model.named_parameters()``. Parameters with the same
            name up to the first dot form a group.
        evaluations: n, the number of gradients, at least 2. Default 100.

    Returns:
        :class:`GradientSNR`.

    Raises:
        TypeError, ValueError: for invalid arguments, or a bound that is not a tensor [].

    References:
        Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018, section 3 and theorem
        1; Tucker et al., Doubly Reparameterized Gradient Estimators for Monte Carlo Objectives, 2019.

    Example:
        >>> import torch, fastvae
        >>> vae = fastvae.VAE(torch.nn.Linear(7, 6), torch.nn.Linear(3, 7), likelihood="bernoulli")
        >>> x = torch.rand(16, 7)
        >>> found = fastvae.diagnostics.gradient_snr(lambda: vae.iwae(x, k=5), vae, evaluations=20)
        >>> found.snr["decoder"] > 0 and found.floor < 0.2
        True
    """
    if not callable(bound):
        raise TypeError(
            "bound must be a function without arguments that returns a bound [], such as lambda: "
            f"vae.elbo(x); got {type(bound).__name__}"
        )
    meaning = "the gradients that are compared, of which a variance takes two"
    evaluations = check_count("evaluations", evaluations, meaning, least=2)
    monitor = GradientMonitor(parameters)
    tensors = list(monitor.parameters.values())
    for _ in range(evaluations):
        with torch.enable_grad():
            value = bound()
        if not isinstance(value, Tensor) or value.dim():
            came = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"bound returned {came}; expected a tensor [], the bound of the batch")
        if not value.requires_grad:
            raise ValueError("bound returned a tensor without a gradient: its parameters do not reach it")
        monitor.update(torch.autograd.grad(value, tensors, allow_unused=True))
    return monitor.result()


def _named(parameters: Any) -> dict[str, Tensor]:
    """Collect the tensors that require gradients, by name, each tensor once."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()

    def add(name: str, value: Any) -> None:
        prefix = f"{name}." if name else ""
        if isinstance(value, nn.Module):
            for own, parameter in value.named_parameters():
                add(prefix + own, parameter)
        elif isinstance(value, Mapping):
            for own, part in value.items():
                add(f"{prefix}{own}", part)
        elif not isinstance(value, Tensor):
            raise TypeError(
                f"parameters{f'[{name!r}]' if name else ''} must be a module, a dict of modules and tensors, "
                f"or pairs (name, tensor) such as model.named_parameters(); got {type(value).__name__}"
            )
        elif value.requires_grad and id(value) not in seen:
            seen.add(id(value))
            found[name] = value

    if isinstance(parameters, Iterable) and not isinstance(parameters, (nn.Module, Mapping, Tensor, str)):
        for pair in parameters:
            if not isinstance(pair, (tuple, list)) or len(pair) != 2:
                raise TypeError(
                    f"parameters yields {type(pair).__name__}; expected pairs (name, tensor), such as "
                    "model.named_parameters()"
                )
            add(*pair)
    elif isinstance(parameters, Tensor):
        raise TypeError("parameters is a tensor without a name; pass a dict, such as {'encoder': parameters}")
    else:
        add("", parameters)
    if not found:
        raise ValueError("parameters holds no tensor that requires a gradient")
    return found
