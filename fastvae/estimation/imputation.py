"""Statistics of p(x|z) over the posterior: missing elements, reconstructions, and scores of elements."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import as_int64
from ..core.nested import each, repeat
from ..distributions.draws import draw_z, log_stratum_weights
from ..inputs.batch import Inputs
from ..likelihoods.base import Likelihood, observed
from ..likelihoods.joint import Joint
from ..likelihoods.multinomial import Multinomial
from ..ops.op import accumulator
from . import stream as _stream
from .pareto import finite_shift, pareto_khat
from .stream import Chunks


class Imputation(NamedTuple):
    """Missing elements of a batch x, given its observed ones."""

    mean: Any
    """x [B, *event], with the means of the missing elements in their places; a dict for a Joint."""
    draws: Any
    """Draws [n, B, *event] of x given its observed elements, which are x's own; None for ``draws=0``."""
    ess: Tensor
    """Effective sample size of the weights [B]."""
    khat: Tensor
    """Pareto k̂ of the weights [B]: above 0.7 they are unreliable."""


class _Kept:
    """Decoder that keeps its last output; a chunk that ran out of memory is decoded again."""

    def __init__(self, decoder: Callable[..., Any]):
        self.decoder, self.output = decoder, None

    def __call__(self, *given: Any) -> Any:
        self.output = self.decoder(*given)
        return self.output


def check_mean(likelihood: Likelihood) -> None:
    """Raise TypeError unless the likelihood has a mean for each element."""
    parts = likelihood.parts.values() if isinstance(likelihood, Joint) else [likelihood]
    if any([isinstance(part, Multinomial) for part in parts]):
        raise TypeError(
            "the likelihood is a Multinomial, whose mean is each class's share of a total count that is not "
            "known; expected one with a mean for each element, such as 'poisson'"
        )


def posterior_mean(inputs: Inputs, seed: Tensor, k: int, chunks: Chunks) -> tuple[Any, list[Tensor]]:
    r"""Return the mean of x' over p(x'|x), [B, *event], and each chunk's log weights, [K, B] in all.

    .. math:: \sum_k \tilde w_k\, E[x' | z_k], \quad z_k \sim q(z|x), \quad
              \tilde w_k \propto p(x, z_k) / q(z_k|x)
    """
    likelihood = inputs.likelihood
    check_mean(likelihood)
    decoder = _Kept(inputs.decoder)
    total: Any = None
    top = torch.full((), -math.inf, device=inputs.device)
    kept = []
    for log_w in _stream.stream(inputs._replace(decoder=decoder), seed, 0, k, chunks):
        mean = likelihood.mean(likelihood.read(decoder.output, inputs.x))
        peak = torch.maximum(top, log_w.amax(0))
        shift = finite_shift(peak)
        weights, shrink = torch.exp(log_w - shift), torch.exp(top - shift)
        part = each(functools.partial(_weighted_sum, weights), mean)
        total = part if total is None else _zipped(functools.partial(_added, shrink), total, part)
        top = peak
        kept.append(log_w)
    size = torch.exp(torch.cat(kept) - finite_shift(top)).sum(0)
    return each(lambda t: t / _per_row(size, t), total), kept


def impute(
    inputs: Inputs, seed: Tensor, k: int, draws: int, chunks: Chunks, generator: torch.Generator | None
) -> Imputation:
    """Return means and draws of the elements of x that the mask of ``inputs`` leaves out."""
    mean, of_chunks = posterior_mean(inputs, seed, k, chunks)
    log_w = torch.cat(of_chunks)
    weights = torch.softmax(log_w.double(), 0)
    drawn = None
    if draws:
        counts = [len(part) for part in of_chunks]
        drawn = _filled(inputs, _resampled(inputs, seed, weights, counts, draws, generator))
    return Imputation(_filled(inputs, mean), drawn, 1 / weights.square().sum(0), pareto_khat(log_w))


def elementwise_log_prob(inputs: Inputs, seed: Tensor, k: int, chunks: Chunks, row_offset: int) -> Any:
    r"""Return :math:`\log \frac1K \sum_k p(x_d|z_k)` of each element d of x [B, *event], 0 where masked."""
    decoder = _Kept(inputs.decoder)
    mask = None if inputs.conditioning is None else inputs.conditioning.mask
    total: Any = None
    start = 0
    place: dict[str, Any] = {"row_offset": row_offset, "ratio": False}
    for log_p in _stream.stream(inputs._replace(decoder=decoder), seed, 0, k, chunks, **place):
        count = len(log_p)
        shares = log_stratum_weights(inputs.q, count, seed, start)

        def summed(t: Tensor, count: int = count, shares: Tensor | None = shares) -> Tensor:
            t = t.unflatten(0, (count, -1))
            if shares is not None:
                t = t + shares.reshape(*shares.shape, *[1] * (t.dim() - 2))
            return t.logsumexp(0)

        part = each(summed, _elements(inputs.likelihood, inputs.x, decoder.output, count, mask))
        total = part if total is None else _zipped(torch.logaddexp, total, part)
        start += count
    value = each(lambda t: t - math.log(k), total)
    return (
        value
        if mask is None
        else _zipped(lambda t, m: t if m is None else torch.where(m, t, 0.0), value, mask)
    )


def _elements(likelihood: Likelihood, x: Any, returned: Any, samples: int, mask: Any) -> Any:
    """Return log p of each element of x repeated for the samples, [K·B, *event]."""
    if isinstance(likelihood, Joint):
        masks = mask or {}
        return {
            name: _elements(part, x[name], returned[name], samples, masks.get(name))  # type: ignore[arg-type]
            for name, part in likelihood.parts.items()
        }
    rows = repeat(each(as_int64, observed(x, mask, likelihood)), samples)
    value = likelihood.log_prob(rows, likelihood.read(returned, rows))
    if not isinstance(rows, Tensor) or value.shape != rows.shape:
        raise TypeError(
            f"elementwise=True needs log p of each element of x, {list(rows.shape)}, but "
            f"{type(likelihood).__name__}.log_prob returned {list(value.shape)}; leave elementwise out"
        )
    return value.to(accumulator(value.dtype))


def _resampled(
    inputs: Inputs,
    seed: Tensor,
    weights: Tensor,
    counts: list[int],
    n: int,
    generator: torch.Generator | None,
) -> Any:
    """Draw z by the weights [K, B] of its samples, then x from p(x|z): [n, B, *event].

    ``counts`` are the samples of each chunk that was weighted.
    """
    batch = weights.shape[1]
    bad = ~weights.isfinite().all(0)
    if bool(bad.any()):
        raise ValueError(
            f"the weights of examples {bad.nonzero()[:5, 0].tolist()} are NaN or all 0, so that nothing can "
            "be drawn; check their x, q and decoder output, or give draws=0"
        )
    index = torch.multinomial(weights.T, n, replacement=True, generator=generator).T
    chosen: Tensor | None = None
    start = 0
    # What torch draws depends on the chunk: only the same chunks are the z that were weighted.
    for count in counts:
        z = draw_z(inputs.q, count, seed, start, 0)
        chosen = z.new_empty(n, *z.shape[1:]) if chosen is None else chosen
        row, example = ((index >= start) & (index < start + count)).nonzero(as_tuple=True)
        chosen[row, example] = z[index[row, example] - start, example]
        start += count
    assert chosen is not None
    parameters = inputs.likelihood.read(inputs.output(chosen.flatten(0, 1), n), inputs.x)
    sample = inputs.likelihood.sample(parameters, generator=generator)
    return each(lambda t: t.unflatten(0, (n, batch)), sample)


def _filled(inputs: Inputs, values: Any) -> Any:
    """Return x where it was observed, and these values [..., B, *event] elsewhere."""
    assert inputs.conditioning is not None

    def fill(value: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        return x.expand(value.shape) if mask is None else torch.where(mask, x, value)

    return _zipped(fill, values, inputs.x, inputs.conditioning.mask)


def _zipped(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """Apply a function to corresponding tensors of nested dicts; a part that a dict lacks is None."""
    if isinstance(first, Mapping):
        return {name: _zipped(function, part, *(o.get(name) for o in others)) for name, part in first.items()}
    return function(first, *others)


def _per_row(values: Tensor, like: Tensor) -> Tensor:
    """Return values [B], or one number, in the dtype of ``like`` [B, *event] and broadcastable to it."""
    values = values.to(like.dtype)
    return values.reshape(*values.shape, *[1] * (like.dim() - values.dim())) if values.dim() else values


def _added(shrink: Tensor, total: Tensor, part: Tensor) -> Tensor:
    """Add a sum [B, *event] to the total times ``shrink`` [B]."""
    return _per_row(shrink, total) * total + part


def _weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """Sum rows [K·B, *event] by weights [K, B]: [B, *event]."""
    rows = rows.to(accumulator(rows.dtype)).unflatten(0, weights.shape)
    # A row of weight 0 may be infinite.
    rows = torch.where(_per_row(weights, rows) == 0, 0.0, rows)
    return torch.einsum("kb,kbx->bx", weights.to(rows.dtype), rows.flatten(2)).reshape(rows.shape[1:])
