"""Mixtures of discretised logistic distributions, as in PixelCNN++ and NVAE."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.checks import check_count, check_data, check_same_device, check_tensor, may_look, shape_of
from ..core.logistic_cells import cell_log_prob, coupled
from ..core.nested import Conditioning
from ..ops.components import mixture_rows
from .base import NAMED, Likelihood
from .outputs import describe

_OUTPUTS = ("logits", "location", "log_scale", "coefficients")


class DiscretizedLogisticMixture(Likelihood):
    r"""Discretised mixture of M logistic distributions p(x|z), for pixels of E channels.

    The decoder returns ``(logits, location, log_scale)``, [N, M, \*positions] and twice [N, M, E,
    \*positions], or with ``coefficients`` [N, M, 3, \*positions] as a fourth output for colours.

    .. math:: \log p(x|z) = \sum_p \log \sum_m π_m \prod_e
              \big[σ((x_e + h - μ_{me}) / s_{me}) - σ((x_e - h - μ_{me}) / s_{me})\big],
              \quad π = \mathrm{softmax}(\text{logits}), \quad h = \frac{1}{\text{levels} - 1}

    for x in [−1, 1]; the first σ is 1 at the upper end, the second 0 at the lower. A bin's probability is
    computed as :math:`σ(a) σ(-b) (1 - e^{b - a})`, which does not cancel. With coefficients c the locations
    of green and blue are :math:`μ_G + \tanh(c_0) x_R` and :math:`μ_B + \tanh(c_1) x_R + \tanh(c_2) x_G`.
    Gradients: :mod:`fastvae.ops.components`. Scales are clamped to :math:`[e^{-60}, e^{60}]`.

    x is [B, E, \*positions], or for one channel [B, \*positions], with location and log_scale shaped like
    logits. Locations and scales refer to [−1, 1], whatever ``low`` and ``high`` are. The op is
    ``fastvae.ops.discretized_logistic_mixture_log_prob(x, logits, location, log_scale, coefficients)``.

    Args:
        levels: number of values of a pixel.
        low, high: the range of floating-point x, which lies on the grid between them; integer x holds levels
            from 0 on.

    Raises:
        TypeError, ValueError: for fewer than two levels, or if low is not below high.

    References:
        Salimans, Karpathy, Chen & Kingma, PixelCNN++, 2017, section 2.1; Vahdat & Kautz, NVAE, 2020.

    Example:
        >>> import torch, fastvae
        >>> x = torch.randint(256, (2, 3, 4, 4), dtype=torch.uint8)
        >>> def decoder(z):
        ...     zeros = torch.zeros(len(z), 5, 3, 4, 4)
        ...     return zeros[:, :, 0], zeros, zeros - 3, zeros
        >>> mixture = fastvae.likelihoods.DiscretizedLogisticMixture()
        >>> fastvae.iwae(x, torch.zeros(2, 2 * 3), decoder, k=5, likelihood=mixture).shape
        torch.Size([])
    """

    takes_integers = True
    differentiable = False
    optional_names = _OUTPUTS[3:]

    def __init__(self, levels: int = 256, *, low: float = 0.0, high: float = 1.0):
        super().__init__()
        levels = check_count("levels", levels, "the values of a pixel", least=2)
        if not low < high:
            raise ValueError(f"low must be below high, the ends of the data; got {low} and {high}")
        self.levels, self.low, self.high = levels, float(low), float(high)

    def check(self, x: Any, name: str = "x") -> None:
        check_data(x, self, name)

    def _check_grid(self, x: Tensor, mask: Tensor | None) -> None:
        """Validate that observed pixels are on the grid; NaN in gives NaN out."""
        if not may_look(x):
            return
        seen = ~x.isnan() if mask is None else mask & ~x.isnan()
        level = torch.where(seen, self._levels_of(x), 0.0)
        off = (level - level.round()).abs().amax()
        if bool(level.amin() < -0.01) or bool(level.amax() > self.levels - 0.99) or not bool(off <= 0.01):
            low, high = (self.low, self.high) if x.is_floating_point() else (0, self.levels - 1)
            raise ValueError(
                f"x holds values in [{float(x[seen].amin()):g}, {float(x[seen].amax()):g}], but must be on "
                f"the grid of {self.levels} values from {low:g} to {high:g}; for data with other ends give "
                "low= and high=, for other grids levels=, for data with noise a density such as 'logistic'"
            )

    def log_likelihood(
        self, x: Tensor, parameters: Any, samples: int, conditioning: Conditioning | None = None
    ) -> Tensor:
        if type(self).log_prob is not DiscretizedLogisticMixture.log_prob:  # overridden by a subclass
            return super().log_likelihood(x, parameters, samples, conditioning)
        mask, size_factor, _ = conditioning or Conditioning()
        if size_factor is not None:
            raise self.no_size()
        self._check_grid(x, mask)
        x, parts = self._read(x, parameters, samples)
        if mask is not None:
            return self._masked(x, parts, mask.reshape(x.shape)).reshape(samples, x.shape[0])
        return mixture_rows(x, parts, self._half).reshape(samples, x.shape[0])

    def log_prob(self, x: Tensor, parameters: Any) -> Tensor:
        """Return log p [N] of each row."""
        return self.log_likelihood(x, self.read(parameters, x), 1)[0]

    def mean(self, parameters: Any) -> Tensor:
        r"""Return the weighted mean of the components' locations, clipped to [low, high].

        The result is [N, E, \*positions], or [N, \*positions]. Green and blue are conditioned on the means of
        the channels before them.
        """
        return self._along(
            parameters, lambda logits, part: (logits.softmax(1).unsqueeze(2) * part).sum(1), None
        )

    def sample(self, parameters: Any, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw x in floating point, on the grid between low and high."""

        def choose(logits: Tensor, part: Tensor) -> Tensor:
            rows = logits.softmax(1).movedim(1, -1)
            if not hasattr(choose, "drawn"):
                drawn = torch.multinomial(rows.reshape(-1, rows.shape[-1]), 1, generator=generator)
                choose.drawn = drawn.reshape(rows.shape[:-1])[:, None, None]  # type: ignore[attr-defined]
            index = choose.drawn.expand(-1, 1, *part.shape[2:])  # type: ignore[attr-defined]
            return part.gather(1, index)[:, 0]

        def noise(like: Tensor) -> Tensor:
            first, second = (torch.empty_like(like).exponential_(generator=generator) for _ in range(2))
            return torch.log(first / second)

        return self._along(parameters, choose, noise)

    @property
    def expected_names(self) -> tuple[str, ...]:
        """Names of the tensors that the decoder returns; none if a subclass overrides log_prob."""
        return _OUTPUTS[:3] if type(self).log_prob is DiscretizedLogisticMixture.log_prob else ()

    @property
    def _half(self) -> float:
        return 1.0 / (self.levels - 1)

    def _levels_of(self, x: Tensor) -> Tensor:
        """Return the level of each pixel, unrounded."""
        if not x.is_floating_point():
            return x.float()
        wide = x if x.dtype == torch.float64 else x.float()
        return (wide - self.low) * ((self.levels - 1) / (self.high - self.low))

    def _read(self, x: Tensor, parameters: Any, samples: int) -> tuple[Tensor, list[Tensor | None]]:
        """Return x on [−1, 1] and the validated outputs [N, M, E, *positions], None for those missing."""
        if not (isinstance(parameters, (tuple, list)) and len(parameters) in (3, 4)):
            raise TypeError(
                "the decoder of a discretized logistic mixture must return (logits, location, log_scale) or "
                f"(logits, location, log_scale, coefficients); got {describe(parameters)}"
            )
        logits, location, *_ = parameters
        for name, part in zip(_OUTPUTS, parameters, strict=False):
            check_tensor(f"the decoder's {name}", part)
            check_same_device(f"the decoder's {name}", part, "x", x)
        rows = samples * x.shape[0]
        one = location.dim() == logits.dim()
        positions = x.shape[1:] if one else x.shape[2:]
        if logits.dim() < 2 or (logits.shape[0], *logits.shape[2:]) != (rows, *positions):
            raise ValueError(
                f"the decoder's logits has shape {shape_of(logits)}; expected [N, M, *positions] = [{rows}, M"
                f"{''.join(f', {n}' for n in positions)}] for an x of {shape_of(x)}"
            )
        channels = () if one else (x.shape[1],)
        for name, part in zip(_OUTPUTS[1:], parameters[1:], strict=False):
            expected = (rows, logits.shape[1], *channels, *positions)
            if part.shape != expected:
                raise ValueError(
                    f"the decoder's {name} has shape {shape_of(part)}; expected [N, M, E, *positions] = "
                    f"{list(expected)}, like its logits {shape_of(logits)} and x {shape_of(x)}"
                )
        if not one and x.shape[1] > 3:
            raise ValueError(f"x has {x.shape[1]} channels: {shape_of(x)}; a mixture takes one to three")
        if len(parameters) == 4 and channels != (3,):
            raise ValueError(
                f"the decoder returned coefficients, which are of colours, but x has shape {shape_of(x)}; "
                "expected [B, 3, *positions]"
            )
        scaled = self._levels_of(x) * (2 * self._half) - 1
        parts = [logits] + [p.unsqueeze(2) if one else p for p in parameters[1:]]
        return scaled.unsqueeze(1) if one else scaled, [*parts, *[None] * (4 - len(parts))]

    def _masked(self, x: Tensor, parts: list[Tensor | None], mask: Tensor) -> Tensor:
        """Return log p [N] of the observed channels, in plain PyTorch; the others' outputs are not read."""
        logits, location, log_scale, coefficients = (
            None if p is None else p.flatten(3 if i else 2).to(torch.promote_types(p.dtype, torch.float32))
            for i, p in enumerate(parts)
        )
        assert logits is not None and location is not None and log_scale is not None
        k = logits.shape[0] // max(1, x.shape[0])
        x, mask = (v.flatten(2).repeat(k, 1, 1)[:, None] for v in (torch.where(mask, x, 0.0), mask))
        seen = mask.any(2)[:, 0]
        logits = torch.where(seen[:, None], logits, 0.0)
        location, log_scale = (torch.where(mask, p, 0.0) for p in (location, log_scale))
        if coefficients is not None:
            # Each belongs to the channel that it moves.
            coefficients = torch.where(mask[:, :, [1, 2, 2]], coefficients, 0.0)
            location = coupled(x, location, coefficients)
        own = torch.where(mask, cell_log_prob(x, location, log_scale, self._half), 0.0).sum(2)
        log_p = torch.logsumexp(logits + own, 1) - torch.logsumexp(logits, 1)
        return torch.where(seen, log_p, 0.0).sum(1)

    def _along(self, parameters: Any, choose: Any, noise: Any) -> Tensor:
        """Generate x channel by channel; ``choose`` reduces components, ``noise`` is None for the mean."""
        logits, location, log_scale, *coefficients = [p.to(torch.promote_types(p.dtype, torch.float32))
                                                      for p in self.read(parameters)]  # fmt: skip
        one = location.dim() == logits.dim()
        if one:
            location, log_scale = location.unsqueeze(2), log_scale.unsqueeze(2)
        drawn: list[Tensor] = []
        means, scales = choose(logits, location), choose(logits, log_scale).exp()
        t = choose(logits, torch.tanh(coefficients[0])) if coefficients else None
        for e in range(means.shape[1]):
            x = means[:, e]
            if t is not None and e:
                x = x + (t[:, 0] * drawn[0] if e == 1 else t[:, 1] * drawn[0] + t[:, 2] * drawn[1])
            if noise is not None:
                x = x + scales[:, e] * noise(x)
                x = torch.round((x + 1) / (2 * self._half)) * (2 * self._half) - 1
            drawn.append(x.clamp(-1, 1))
        x = self.low + (torch.stack(drawn, 1) + 1) * ((self.high - self.low) / 2)
        return x[:, 0] if one else x

    def extra_repr(self) -> str:
        return f"levels={self.levels}, low={self.low:g}, high={self.high:g}"


NAMED["discretized_logistic_mixture"] = DiscretizedLogisticMixture
