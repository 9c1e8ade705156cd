"""Bound of a batch from its draws: the decoder, the likelihood and the reduction."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .. import ops
from ..core.reductions import times
from ..inputs.batch import Inputs
from ..ops.head import Layers, reduce_linear
from ..ops.reduce import BoundReduction, reduce
from .bounds import CIWAE, IWAE
from .from_weights import bound_from_weights


def reduce_draws(
    inputs: Inputs,
    z: Tensor,
    term: Tensor,
    samples: int,
    beta: Tensor | None,
    how: BoundReduction,
    terms: bool,
) -> tuple[Tensor, Tensor | None, Any]:
    """Decode z [K·B, D] and compute :func:`fastvae.ops.reduce.reduce` with a term of q and the prior.

    With ``terms`` the third result is the decoder's output.
    """
    output = None
    if terms:
        output = inputs.output(z, samples)
        parameters = inputs.read_output(z, output, samples)
    else:
        parameters = inputs.decode(z, samples)
    return *reduce_parameters(inputs, z, parameters, term, samples, beta, how, terms), output


def reduce_parameters(
    inputs: Inputs,
    z: Tensor,
    parameters: Any,
    term: Tensor,
    samples: int,
    beta: Tensor | None,
    how: BoundReduction,
    terms: bool,
) -> tuple[Tensor, Tensor | None]:
    """Compute :func:`reduce_draws` from the decoder's output, which :class:`Inputs` has read."""
    takes_fused = beta is None or not beta.requires_grad
    fused = (
        inputs.likelihood.fused(inputs.x, parameters, samples, inputs.conditioning) if takes_fused else None
    )
    if fused is not None:
        name, x, parameters, mask = fused
        # From the decoder's output, or from the input of its last layer.
        if isinstance(parameters, Layers):
            return reduce_linear(name, x, parameters, term, beta, how, terms)
        return reduce(name, x, parameters, term, beta, how, terms, mask)
    return reduce_samples(inputs.log_prob(z, parameters, samples), term, beta, how)


def reduce_samples(
    log_likelihood: Tensor, term: Tensor, beta: Tensor | None, how: BoundReduction
) -> tuple[Tensor, Tensor]:
    """Compute :func:`fastvae.ops.reduce.reduce` from log-likelihoods [K, B], without a fused op."""
    mean = log_likelihood.mean(0)
    factor = how.coefficient if beta is None else how.coefficient * beta.to(term.dtype)
    if how.over == "mean":
        bound = mean + times(factor, term if term.dim() == 1 else term.mean(0))
    else:
        mean = mean.detach()
        if how.is_plain:
            bound = ops.log_mean_exp(log_likelihood + times(factor, term))
        else:
            objective = CIWAE(how.share) if how.share else IWAE(how.groups, how.alpha)
            bound = bound_from_weights(log_likelihood, times(factor, term), None, objective, None)
    return bound if how.reduction == "none" else getattr(bound, how.reduction)(), mean
