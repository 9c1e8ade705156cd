"""Likelihoods p(x|z): what the decoder's output means."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from ._checks import check_same_device, check_tensor, shape_of
from .ops.bernoulli import check_targets
from .ops.op import accumulator

__all__ = ["Bernoulli", "Gaussian", "Likelihood", "as_likelihood"]


class Likelihood(nn.Module):
    """What the objectives ask of p(x|z); a module, so that its own parameters are found.

    Example:
        >>> import torch, fastvae
        >>> class Poisson(fastvae.Likelihood):
        ...     def log_prob(self, x, log_rate, samples):
        ...         log_rate = log_rate.reshape(samples, *x.shape)
        ...         return (x * log_rate - log_rate.exp() - torch.lgamma(x + 1)).sum(-1)
        >>> x, q = torch.ones(4, 7), torch.zeros(4, 2 * 3)
        >>> fastvae.iwae(x, q, torch.nn.Linear(3, 7), k=5, likelihood=Poisson()).shape
        torch.Size([])
    """

    def log_prob(self, x: Tensor, parameters: Any, samples: int) -> Tensor:
        """log p(x|z) [K, B], a floating-point tensor, from x [B, *event] and what the decoder returned for
        K·B rows of z, sample-major. It is summed over the event alone; another shape is refused.
        """
        raise NotImplementedError

    def mean(self, parameters: Any) -> Tensor:
        """The mean of x given the decoder's output, for reconstructions and pictures."""
        raise NotImplementedError


# What fastvae.ops.weigh takes: the likelihood's name, x [B, X], and parameters, the first [K·B, X].
Fused = tuple[str, Tensor, tuple[Tensor, ...]]


class Gaussian(Likelihood):
    r"""p(x|z) = N(mean, s²), for decoders that return ``(mean, logvar)``, or ``mean`` alone when ``scale`` is
    given.

    Args:
        scale: standard deviation s > 0: a number, a tensor broadcastable to the event, or a tensor that a
            network computed. Default: the decoder returns the log variance, too.
        learned: train the scale, beginning at this one. It is kept as the parameter ``log_scale``, so that no
            step of an optimiser can make it 0 or negative; ``scale`` reads it.

    Raises:
        TypeError, ValueError: if scale is not positive, or is an ``nn.Parameter``.

    Example:
        >>> import torch, fastvae
        >>> likelihood = fastvae.Gaussian(scale=0.1, learned=True)
        >>> likelihood.log_prob(torch.zeros(4, 7), torch.zeros(3 * 4, 7), samples=3).shape
        torch.Size([3, 4])
        >>> [name for name, _ in likelihood.named_parameters()]
        ['log_scale']
    """

    def __init__(self, scale: float | Tensor | None = None, *, learned: bool = False):
        super().__init__()
        if isinstance(scale, nn.Parameter) or (learned and isinstance(scale, Tensor) and scale.requires_grad):
            raise TypeError(
                "scale must be a value to begin training at, not a parameter, which a step of an optimiser "
                "can make negative; use fastvae.Gaussian(scale=0.1, learned=True), which trains log_scale, "
                "the logarithm"
            )
        if learned and scale is None:
            raise ValueError(
                "learned=True needs a scale to begin at, such as fastvae.Gaussian(scale=0.1, learned=True)"
            )
        if scale is not None and not isinstance(scale, Tensor):
            if isinstance(scale, bool) or not isinstance(scale, (int, float)):
                raise TypeError(f"scale must be a number or a tensor, got {type(scale).__name__}")
            if not (scale > 0 and math.isfinite(scale)):
                raise ValueError(
                    f"scale is a standard deviation and must be positive and finite, got {scale}"
                )
            scale = float(scale)
        if isinstance(scale, Tensor):
            check_tensor("scale", scale)
            values = scale.detach()
            if scale.device.type == "cpu" and not bool(((values > 0) & values.isfinite()).all()):
                raise ValueError("scale is a standard deviation and must be positive and finite everywhere")
        self.learned = learned
        if learned:
            scale = scale if isinstance(scale, Tensor) else torch.tensor(scale)
            self.log_scale = nn.Parameter(scale.log())
        elif isinstance(scale, Tensor) and not scale.requires_grad:
            self.register_buffer("fixed_scale", scale)
        else:
            # A number, or computed by a network: no state of ours, and it must stay in its graph.
            self.__dict__["fixed_scale"] = scale

    @property
    def scale(self) -> float | Tensor | None:
        """The standard deviation, learned or not."""
        return self.log_scale.exp() if self.learned else self.fixed_scale

    def _log_scale(self) -> float | Tensor:
        if self.learned:
            return self.log_scale
        scale = self.fixed_scale
        return scale.log() if isinstance(scale, Tensor) else math.log(scale)

    def log_prob(self, x, parameters, samples):
        mean, logvar = self._read(x, parameters, samples)
        mean = mean.reshape(samples, *x.shape)
        if isinstance(logvar, Tensor) and self._from_decoder:
            logvar = logvar.reshape(samples, *x.shape)
        return ops.gaussian_log_prob(x, mean, logvar)

    def _fused(self, x, parameters, samples):
        mean, logvar = self._read(x, parameters, samples)
        if not self._from_decoder:
            logvar = _of_the_event(logvar, mean, x)
            if logvar is None:
                return None
        return ("gaussian", *_flat(x, mean, logvar))

    @property
    def _from_decoder(self) -> bool:
        """Whether the decoder returns the log variance, too."""
        return not self.learned and self.fixed_scale is None

    def _read(self, x: Tensor, parameters: Any, samples: int) -> tuple[Tensor, Tensor | float]:
        """The mean [K·B, *event], and the log variance, like it or broadcastable to the event."""
        if self._from_decoder:
            if not (isinstance(parameters, (tuple, list)) and len(parameters) == 2):
                hint = (
                    "; for a mean alone, give the standard deviation: likelihood=fastvae.Gaussian(scale=0.1)"
                )
                raise TypeError(
                    "the decoder of a gaussian likelihood must return (mean, logvar), got "
                    f"{_describe(parameters)}{hint if isinstance(parameters, Tensor) else ''}"
                )
            mean, logvar = parameters
            check_rows("the decoder's mean", mean, x, samples)
            check_rows("the decoder's logvar", logvar, x, samples)
            if logvar.device != mean.device:
                check_same_device("the decoder's logvar", logvar, "the decoder's mean", mean)
            return mean, logvar
        if not isinstance(parameters, Tensor):
            raise TypeError(
                "the decoder of Gaussian(scale=...) must return the mean alone, a tensor; got "
                f"{_describe(parameters)}. For a decoder that returns (mean, logvar) use "
                "likelihood='gaussian', without a scale"
            )
        check_rows("the decoder's mean", parameters, x, samples)
        log_scale = self._log_scale()
        _check_scale(log_scale, x)
        return parameters, 2 * log_scale

    def mean(self, parameters):
        return parameters if isinstance(parameters, Tensor) else parameters[0]


def _of_the_event(logvar: float | Tensor, mean: Tensor, x: Tensor) -> Tensor | None:
    """A log variance as one number or one row [X]; None where the rows of the batch have their own."""
    if not isinstance(logvar, Tensor):
        # Not in half precision, which the decoder may compute in.
        return torch.full((), logvar, dtype=accumulator(mean.dtype), device=mean.device)
    if logvar.numel() == 1:
        return logvar.reshape(())
    if logvar.dim() == x.dim():
        if logvar.shape[0] != 1:
            return None
        logvar = logvar[0]
    return logvar.expand(x.shape[1:]).reshape(-1)


def _check_scale(scale: float | Tensor, x: Tensor) -> None:
    if not isinstance(scale, Tensor):
        return
    check_same_device("the scale", scale, "x", x)
    missing = x.dim() - scale.dim()
    if missing < 0 or any(n not in (1, m) for n, m in zip(scale.shape, x.shape[missing:], strict=True)):
        raise ValueError(
            f"scale has shape {shape_of(scale)}, which does not broadcast to an x of shape {shape_of(x)}; "
            f"expected one number, or one for each element of the event, {list(x.shape[1:])}"
        )


class Bernoulli(Likelihood):
    """p(x|z) = independent Bernoulli pixels, for decoders that return logits; x may be soft, in [0, 1].

    Example:
        >>> import torch, fastvae
        >>> fastvae.Bernoulli().log_prob(torch.ones(4, 7), torch.zeros(3 * 4, 7), samples=3).shape
        torch.Size([3, 4])
    """

    def log_prob(self, x, parameters, samples):
        self._check(x, parameters, samples)
        return ops.bernoulli_log_prob(x, parameters.reshape(samples, *x.shape))

    def _fused(self, x, parameters, samples):
        self._check(x, parameters, samples)
        check_targets(x)
        return ("bernoulli", *_flat(x, parameters))

    def _check(self, x: Tensor, parameters: Any, samples: int) -> None:
        if not isinstance(parameters, Tensor):
            raise TypeError(
                "the decoder of a bernoulli likelihood must return logits, one tensor; got "
                f"{_describe(parameters)}"
            )
        check_rows("the decoder's logits", parameters, x, samples)

    def mean(self, parameters):
        return torch.sigmoid(parameters)


def check_rows(name: str, value: Any, x: Tensor, samples: int) -> None:
    """Check a decoder's output [K·B, *event] against x [B, *event]."""
    check_tensor(name, value)
    expected = (samples * x.shape[0], *x.shape[1:])
    if value.shape != expected:
        same = value.shape[:1] == expected[:1] and value.shape[1:].numel() == x.shape[1:].numel()
        hint = (
            f"; the event's {x.shape[1:].numel()} values are there in another shape: reshape the decoder's "
            "output or flatten x"
            if same
            else ""
        )
        raise ValueError(
            f"{name} has shape {shape_of(value)}; expected [{', '.join(map(str, expected))}]: K·B = "
            f"{samples}·{x.shape[0]} rows (samples times batch), each shaped like an x of shape "
            f"{shape_of(x)}{hint}"
        )


def _flat(x: Tensor, *parameters: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """x [B, *event] as [B, X], and parameters [K·B, *event] as [K·B, X]; others have no event."""
    if x.dim() == 2:
        return x, parameters
    return x.reshape(len(x), -1), tuple(
        p.reshape(len(p), -1) if p.dim() == x.dim() else p for p in parameters
    )


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor {shape_of(value)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return type(value).__name__


_NAMES = {"gaussian": Gaussian, "bernoulli": Bernoulli}
# For a call that gives a name: making a module costs more than the kernels of a small batch.
_SHARED = {name: kind() for name, kind in _NAMES.items()}


def fused(likelihood: Likelihood, x: Tensor, parameters: Any, samples: int) -> Fused | None:
    """The arguments of the fused op, checked; None for a likelihood that has none."""
    if type(likelihood).log_prob not in _OWN or x.numel() == 0:
        return None
    return likelihood._fused(x, parameters, samples)


# What a subclass may have replaced.
_OWN = (Gaussian.log_prob, Bernoulli.log_prob)


def as_likelihood(likelihood: Any, shared: bool = False) -> Likelihood:
    """A name or a likelihood object; of a name a module of its own, or ``shared`` with others."""
    if isinstance(likelihood, Likelihood):
        return likelihood
    if shared and type(likelihood) is str and likelihood in _SHARED:
        return _SHARED[likelihood]
    if isinstance(likelihood, str):
        if likelihood not in _NAMES:
            raise ValueError(f"likelihood={likelihood!r} is unknown; known: {', '.join(map(repr, _NAMES))}")
        return _NAMES[likelihood]()
    raise TypeError(
        f"likelihood must be a name ({', '.join(map(repr, _NAMES))}) or an object such as "
        f"fastvae.Gaussian(scale=0.1); got {likelihood!r}"
    )
