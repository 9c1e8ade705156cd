"""Arguments of the diagonal normal's ops: the meaning of logvar, the prior and the noise's address."""

from __future__ import annotations

import math
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import random
from ..core.checks import (
    check_address,
    check_choice,
    check_logvar_range,
    check_number,
    check_same_device,
    check_same_shape,
    check_seed,
    check_tensor,
    shape_of,
)
from ..core.fast_path import are_rows

SCALES = ("logvar", "log_scale", "scale", "softplus")
# The smallest normal number of float32: with such a floor the variance is normal in any dtype.
_LEAST_FLOOR = 2.0**-126


class NormalPrior(Protocol):
    """Diagonal normal prior, as :class:`fastvae.distributions.DiagonalNormal` is."""

    mu: Tensor

    def log_variance(self) -> Tensor:
        """Return log σ²."""


class Draw(NamedTuple):
    """Parameters of a draw: the non-tensor arguments of both ops, in every layer."""

    samples: int
    sample_offset: int
    row_offset: int
    logvar_min: float
    logvar_max: float
    flat: bool = False  # z is [K·B, D], for a decoder
    scale: str = "logvar"  # meaning of ``logvar``
    floor: float = 0.0


class Form(NamedTuple):
    """Meaning of the logvar argument, if it is not an unclamped log variance."""

    logvar_min: float = -math.inf
    logvar_max: float = math.inf
    scale: str = "logvar"
    floor: float = 0.0


def form_of(
    scale: str, floor: float | None, logvar_range: tuple[float, float] | None, name: str = "scale"
) -> Form | None:
    """Validate these options, and return them as a Form; None for an unclamped log variance.

    ``name`` is that of the user's argument for ``scale``.

    Raises:
        TypeError, ValueError: if an option is invalid, or does not apply to the others.
    """
    # Return early: a compiler would specialise on floats that are tested, and recompile.
    if logvar_range is None and scale == "logvar" and floor is None:
        return None
    check_choice(name, scale, SCALES)
    floor = 0.0 if floor is None else check_number("floor", floor, "the least variance")
    if scale != "softplus" and floor != 0:
        raise ValueError(
            f"floor={floor} is added to the variance of {name}='softplus', and has no meaning with "
            f"{name}={scale!r}; leave it out"
        )
    if 0 < floor < _LEAST_FLOOR:
        raise ValueError(
            f"floor must be 0 or at least {_LEAST_FLOOR:.3g}, the smallest normal number of float32; got "
            f"{floor}"
        )
    if scale != "logvar" and logvar_range is not None:
        raise ValueError(
            f"logvar_range bounds a log variance, and has no meaning with {name}={scale!r}; bound what the "
            f"network returns, or give {name}='softplus' a floor"
        )
    return Form(*check_logvar_range(logvar_range), scale, floor)


def options(form: Form | None) -> dict[str, Any]:
    """Return a form as keyword arguments of the ops."""
    if form is None:
        return {}
    low, high, scale, floor = form
    bounded = scale == "logvar"
    return {"scale": scale, "floor": floor or None, "logvar_range": (low, high) if bounded else None}


def prepare(mu, logvar, form, prior, seed, generator, samples, sample_offset, row_offset, flat):
    """Validate the arguments and convert them to those of the schema."""
    if prior is None and are_rows(mu, logvar):
        prior_mu = prior_logvar = None
    elif type(prior) is tuple and len(prior) == 2 and are_rows(mu, logvar) and _are_alike(mu, *prior):
        prior_mu, prior_logvar = prior
    else:
        mu, logvar, prior_mu, prior_logvar = _check_tensors(mu, logvar, prior)
    # Literals, which a compiler treats as constants.
    logvar_min, logvar_max, scale, floor = (-math.inf, math.inf, "logvar", 0.0) if form is None else form
    if not (
        type(sample_offset) is type(row_offset) is int
        and sample_offset == row_offset == 0
        and samples <= 2**32
    ):
        sample_offset, row_offset = check_address(samples, mu.shape[0], sample_offset, row_offset)
    seed = random.draw_seed(mu.device, generator) if seed is None else check_seed(seed, mu.device)
    draw = Draw(samples, sample_offset, row_offset, logvar_min, logvar_max, flat, scale, floor)
    return mu, logvar, prior_mu, prior_logvar, seed, draw


def _are_alike(mu, prior_mu, prior_logvar):
    """Return True for a prior [B, D] of mu's dtype and device: of a recurrent model, of each example."""
    return (
        are_rows(prior_mu, prior_logvar)
        and prior_mu.shape == mu.shape
        and prior_mu.dtype == mu.dtype
        and prior_mu.device == mu.device
    )


def _check_tensors(mu, logvar, prior):
    check_tensor("mu", mu, 2, "[B, D]")
    check_tensor("logvar", logvar, 2, "[B, D]")
    check_same_shape("logvar", logvar, "mu", mu)
    check_same_device("logvar", logvar, "mu", mu)
    tensors = [mu, logvar]
    if prior is not None:
        tensors += [
            _prior_part(name, value, mu) for name, value in zip(("mean", "logvar"), _pair(prior), strict=True)
        ]
    dtype = mu.dtype
    if any(t.dtype != dtype for t in tensors):
        for t in tensors:
            dtype = torch.promote_types(dtype, t.dtype)
        tensors = [t.to(dtype) for t in tensors]
    return *tensors, *[None] * (4 - len(tensors))


def _pair(prior):
    # A subclass may have another density.
    if getattr(prior, "is_own", False) and hasattr(prior, "log_variance"):
        if prior.logvar.dtype.itemsize == 2 and not prior.has_logvar:
            raise ValueError(
                f"prior has {prior.logvar.dtype} parameters that are not log variances, which half precision "
                "would round; pass (mean, logvar), or parameters in float32"
            )
        return prior.mu, prior.log_variance()
    try:
        mean, logvar = prior
    except (TypeError, ValueError):
        raise TypeError(
            "prior must be a pair of tensors (mean, logvar), a fastvae.distributions.DiagonalNormal or None "
            f"for N(0, I); got {type(prior).__name__}"
        ) from None
    return mean, logvar


def _prior_part(name: str, value: Tensor, mu: Tensor) -> Tensor:
    check_tensor(f"prior {name}", value)
    check_same_device(f"prior {name}", value, "mu", mu)
    try:
        return value.expand(mu.shape)
    except RuntimeError:
        raise ValueError(
            f"prior {name} has shape {shape_of(value)}, which does not broadcast to mu's {shape_of(mu)} ([B, "
            "D])"
        ) from None
