"""How noisy an objective's gradient is: its signal-to-noise ratio, streamed over evaluations."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_count
from ..ops.op import accumulator

__all__ = ["GradientMonitor", "GradientSNR", "gradient_snr"]


class GradientSNR(NamedTuple):
    """Signal-to-noise ratios of a gradient: of each parameter by its name, and of each group, such as
    ``"encoder"``, by what its parameters' names begin with.

    Attributes:
        snr: |mean| / std of each element, averaged over the elements. Those whose gradient was 0 each time do
            not count; NaN where there are no others.
        squared: ‖mean‖² / Σ variances, of all elements pooled. The mean's own noise is taken off, so that it
            is 0 on average, and as often below 0, where there is no signal.
        floor: what ``snr`` would be of pure noise, √(2 / (π n)) for n evaluations: below twice that, it says
            nothing.
        evaluations: how many gradients these are of; of a running mean, as many as count in full.
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
    r"""Running signal-to-noise ratios of the gradients of a training, from step to step.

    It keeps a mean and a mean square deviation of each parameter's gradient, two copies of it.

    **What it sees is confounded**: over the steps of a training the parameters and the batches change, too.
    What moves of the mean gradient counts as noise, and so does what differs between batches: the ratio is
    that of the steps, not the estimator's own at one place, which is :func:`gradient_snr`'s. See trends and
    compare runs by it; compare estimators by the other.

    Args:
        parameters: as :func:`gradient_snr` takes them.
        window: steps that a step counts for, beyond which it is forgotten: its weight is 1 / window or, in
            the first steps, 1 / step. Default: all steps count the same.

    Raises:
        TypeError, ValueError: for parameters that are none.

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
        """Forget what was seen."""
        self._mean = [torch.zeros_like(p, dtype=accumulator(p.dtype)) for p in self.parameters.values()]
        self._square = [torch.zeros_like(m) for m in self._mean]
        self.count = 0
        # The sum of the squares of the weights of what was seen, whose sum is 1.
        self._squares = 1.0

    @torch.no_grad()
    def update(self, gradients: Iterable[Tensor | None] | None = None) -> None:
        """See one gradient; no synchronisation.

        Args:
            gradients: one for each parameter, in their order; None stands for 0. Default: each parameter's
                ``.grad``.
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
            # E(g − mean)², which a new g at a distance of `move` from the old mean moves like this.
            square.add_(move.square_(), alpha=share).mul_(1 - share)

    def result(self) -> GradientSNR:
        """The ratios so far.

        Raises:
            ValueError: before the second gradient.
        """
        if self.count < 2 or self._squares >= 1:
            raise ValueError(
                f"a variance takes two gradients or more, and a window of as many; got {self.count}"
            )
        # Numbers of a parameter: Σ|mean|/std, how many have a gradient, Σ mean², Σ variances.
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
    r"""Signal-to-noise ratio of a bound's gradient, over evaluations with fresh noise at the same parameters.

    .. math:: \mathrm{SNR}(θ_i) = \frac{|E[g_i]|}{\sqrt{\mathrm{Var}[g_i]}}, \quad
              \text{squared, pooled: } \frac{\sum_i E[g_i]^2}{\sum_i \mathrm{Var}[g_i]}, \quad
              g = \nabla_θ\, \mathrm{bound}

    Of the encoder that of :func:`fastvae.iwae` falls like :math:`1/\sqrt K`, with ``estimator="dreg"`` it
    rises like :math:`\sqrt K`; the decoder's rises like :math:`\sqrt K`, all where K is large.

    The gradients are streamed: beside the gradient itself, two copies of it are kept. No ``.grad`` is read or
    changed. What else an evaluation changes, it changes: torch's random state, and the statistics of a
    BatchNorm in train mode.

    Args:
        bound: returns a bound [], of one batch and with fresh noise in each call, such as ``lambda:
            vae.iwae(x, k=50)``. One that takes another batch in each call says how noisy the gradient of a
            step is, batches included.
        parameters: what the gradient is of, by name: a module; a dict of modules, tensors, or dicts of these;
            or pairs (name, tensor), such as ``model.named_parameters()``. A group is what has the same name
            up to the first dot.
        evaluations: n, how many gradients.

    Returns:
        :class:`GradientSNR`.

    Raises:
        TypeError, ValueError: for arguments that do not fit, or a bound that is no number.

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
    """Tensors that require gradients, by name; each tensor once."""
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
