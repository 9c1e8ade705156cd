"""Mixtures over a component axis in plain PyTorch; the mathematics is in :mod:`fastvae.ops.components`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.logistic_cells import cell_log_prob, cell_slopes, coupled
from ..core.special import upcast


def _of_each_sample(x: Tensor, logits: Tensor) -> Tensor:
    """Repeat x [B, ...] for the samples of the decoder's output: [K·B, ...]."""
    return x.repeat(logits.shape[0] // max(1, x.shape[0]), 1, 1)


def _components(
    x: Tensor, logits: Tensor, location: Tensor, log_scale: Tensor, coefficients: Tensor | None
) -> tuple[Tensor, ...]:
    """Return x [N, 1, E, P] and parameters [N, C, E, P], with coupled locations."""
    x = _of_each_sample(x, logits)[:, None]
    location, log_scale = (p.unflatten(1, (logits.shape[1], -1)) for p in (location, log_scale))
    if coefficients is not None:
        coefficients = coefficients.unflatten(1, (logits.shape[1], -1))
        location = coupled(x, location, coefficients)
    return x, location, log_scale, coefficients  # type: ignore[return-value]


def discretized_logistic_mixture_log_prob(
    x: Tensor,
    logits: Tensor,
    location: Tensor,
    log_scale: Tensor,
    coefficients: Tensor | None,
    half: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log p [N] and two tensors [N, P] for the gradient, given x [B, E, P] and logits [N, C, P]."""
    given = [x, logits, location, log_scale] + ([] if coefficients is None else [coefficients])
    x, logits, *rest = upcast(*given)
    wide, location, log_scale, _ = _components(x, logits, *rest, *[None] * (3 - len(rest)))
    normaliser = torch.logsumexp(logits, 1)
    joint = torch.logsumexp(logits + cell_log_prob(wide, location, log_scale, half).sum(2), 1)
    return (joint - normaliser).sum(1), normaliser, joint


def discretized_logistic_mixture_log_prob_backward(
    grad: Tensor,
    normaliser: Tensor,
    joint: Tensor,
    x: Tensor,
    logits: Tensor,
    location: Tensor,
    log_scale: Tensor,
    coefficients: Tensor | None,
    half: float,
    need: list[bool],
) -> tuple[Tensor | None, ...]:
    """Return gradients of (x, logits, location, log_scale, coefficients), None where not needed."""
    parameters = [logits, location, log_scale] + ([] if coefficients is None else [coefficients])
    x, logits, *rest = upcast(x, *parameters)
    wide, means, scales, coupling = _components(x, logits, *rest, *[None] * (3 - len(rest)))
    s = logits + cell_log_prob(wide, means, scales, half).sum(2)
    r = grad[:, None, None] * torch.exp(s - joint[:, None])
    by_location, by_log_scale = cell_slopes(wide, means, scales, half)
    by_location, by_log_scale = r[:, :, None] * by_location, r[:, :, None] * by_log_scale
    grads: list[Tensor] = [r - grad[:, None, None] * torch.exp(logits - normaliser[:, None])]
    grads += [by_location.flatten(1, 2), by_log_scale.flatten(1, 2)]
    if coupling is not None:
        slope = 1 - torch.tanh(coupling) ** 2
        red, green = wide[:, :, 0], wide[:, :, 1]
        _, second, third = by_location.unbind(2)
        grads.append((torch.stack([second * red, third * red, third * green], 2) * slope).flatten(1, 2))
    found = [g.to(p.dtype) if n else None for g, p, n in zip(grads, parameters, need[1:], strict=False)]
    return None, *found, *[None] * (4 - len(found))
