"""Inputs of the objectives, validated once, and their evaluation from draws to the bound."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_same_device, shape_of, signed
from ..core.deferred import HiddenLayer
from ..core.fast_path import are_batch
from ..core.nested import (
    Conditioning,
    all_tensors,
    as_mask,
    as_size_factor,
    called,
    check_batch,
    decoded,
    each,
    event_size,
    repeat,
    tensors,
)
from ..core.sparse import at_rows
from ..distributions import Distribution, as_posterior, as_prior
from ..distributions.draws import STANDARD, check_support, promoted
from ..distributions.normal import diagonal
from ..distributions.spatial import flat_prior
from ..likelihoods.base import Likelihood
from ..likelihoods.declared import SHARED, Declared
from ..likelihoods.read import as_likelihood
from .last_layer import LastLayer
from .misread import is_new, look

REAL = torch.distributions.constraints.real


class Inputs(NamedTuple):
    """Batch x, posterior q, decoder, likelihood and prior of an objective."""

    x: Any
    q: Distribution
    decoder: Callable[..., Any]
    likelihood: Likelihood
    prior: Distribution
    conditioning: Conditioning | None = None

    @classmethod
    def read(
        cls,
        x: Any,
        q: Any,
        decoder: Any,
        likelihood: Any,
        prior: Any,
        conditioning: Conditioning | None = None,
        compared: bool = True,
    ) -> Inputs:
        """Validate the user's arguments; with ``compared``, also the supports of q and the prior."""
        # Fast path: a pair (mu, logvar), a named likelihood and the standard prior.
        if type(q) is tuple and len(q) == 2 and prior is None and conditioning is None:
            known: Any = SHARED.get(likelihood) if type(likelihood) is str else None
            fits = known is not None and callable(decoder) and are_batch(x, *q)
            if fits and (known.differentiable or not x.requires_grad):
                return tuple.__new__(cls, (x, diagonal(*q), decoder, known, STANDARD, None))
        likelihood = as_likelihood(likelihood, shared=True)
        likelihood.check(x)
        x = each(signed, x)
        q = as_posterior(q)
        check_batch("x", x, q.batch, q.device, q.latent, likelihood.takes_sparse)
        if not callable(decoder):
            raise TypeError(
                "decoder must be a callable z[N, D] -> parameters, such as an nn.Module; got "
                f"{type(decoder).__name__}. Pass the decoder itself, not its output"
            )
        context = None
        if conditioning is not None:
            mask, size_factor, context = conditioning
            if context is not None:
                check_batch("context", context, q.batch, q.device)
            mask = None if mask is None else as_mask(mask, x)
            conditioning = Conditioning(
                mask, None if size_factor is None else as_size_factor(size_factor, x), context
            )
        prior = as_prior(q.own_prior if prior is None else prior, context).prepared()
        if q.latent is not None:
            prior = flat_prior(prior, q.latent, q.batch, q)
        if compared and q.support is not REAL:
            check_support(q, prior)
        return cls(x, promoted(q, prior), decoder, likelihood, prior, conditioning)

    @property
    def device(self) -> torch.device:
        return self.q.device

    @property
    def observed(self) -> float:
        """Number of observed elements in an example, the mean of the batch."""
        mask = None if self.conditioning is None else self.conditioning.mask
        masks = tensors(mask) if mask is not None else []
        missing = sum(int((~m).sum()) for m in masks)
        return event_size(self.x) - missing / max(1, self.q.batch)

    def at(self, rows: Tensor) -> Inputs:
        """Select the data of the examples with indices ``rows``; q and the prior keep all rows."""
        conditioning = None if self.conditioning is None else self.conditioning.at(rows)
        return self._replace(x=each(lambda t: at_rows(t, rows), self.x), conditioning=conditioning)

    def decode(self, z: Tensor, samples: int) -> Any:
        """Call the decoder on z [K·B, D], reshaped to [K·B, *latent], and read its output."""
        return self.read_output(z, self._returned(z, samples), samples)

    def output(self, z: Tensor, samples: int) -> Any:
        """Call the decoder as :meth:`decode` does; return its output unread, last layers multiplied out."""
        returned = self._returned(z, samples)
        return self.likelihood.multiplied_out(returned, self.x) if _is_deferred(returned) else returned

    def shaped(self, z: Tensor, samples: int) -> Tensor:
        """Return z [K·B, D] as [K, B, *latent], in the dtype that the decoder gets."""
        z = z if self.q.z_dtype is None else z.to(self.q.z_dtype)
        z = z.unflatten(0, (samples, -1))
        return z if self.q.latent is None else z.unflatten(2, self.q.latent)

    def _returned(self, z: Tensor, samples: int) -> Any:
        latent = self.q.latent
        if self.q.z_dtype is not None:
            z = z.to(self.q.z_dtype)
        context = None if self.conditioning is None else self.conditioning.context
        if context is None and latent is None:
            return called("decoder", self.decoder, z, None)
        context = None if context is None else repeat(context, samples)
        return decoded(self.decoder, z, context, latent)

    def read_output(self, z: Tensor, returned: Any, samples: int) -> Any:
        """Read what the decoder returned for z [K·B, D] as the likelihood takes it."""
        likelihood, parameters = self.likelihood, returned
        if type(returned) is not Tensor:
            parameters = likelihood.read_output(self.x, returned, samples, self.conditioning)
        if self.q.latent is not None:
            self._check_rows(z, parameters, samples)
        looks = (likelihood.reads or likelihood.counts) and not torch.compiler.is_compiling()
        if looks and z.shape[0] and is_new(self.decoder):
            look(self.decoder, likelihood, self.x, parameters, returned)
        return parameters

    def log_likelihood(
        self,
        z: Tensor,
        seen: Callable[[Tensor, list[Tensor]], None] | None = None,
        output: Any = None,
        frozen: bool = False,
    ) -> Tensor:
        """Compute log p(x|z) [K, B] for z [K, B, D]; the decoder sees one batch axis, sample-major.

        ``seen`` is called with the rows of z and the tensors that the decoder returned. ``output`` is that of
        :meth:`output` for this z, if the decoder has been called. With ``frozen`` the deferred last layers
        have no gradient for their weights, whose products the fused op then omits.
        """
        z_rows = z.flatten(0, 1)
        if output is None:
            output = self._returned(z_rows, z.shape[0])
        if frozen:
            output = _frozen(output)
        parameters = self.read_output(z_rows, output, z.shape[0])
        if seen is not None:
            # len would specialise the batch size of an exported program.
            rows = z_rows.shape[0]
            seen(z_rows, [t for t in all_tensors(parameters) if t.dim() and t.shape[0] == rows])
        return self.log_prob(z_rows, parameters, z.shape[0])

    def log_prob(self, z: Tensor, parameters: Any, samples: int) -> Tensor:
        """Compute log p(x|z) [K, B] from the decoder's output for z [K·B, D]."""
        if not (isinstance(self.likelihood, Declared) and self.likelihood.is_declared):
            # A user's likelihood may broadcast shapes that fastvae's own reject.
            first = tensors(self.x)[0]
            for name, part in _named(parameters):
                check_same_device(f"the decoder's output{name}", part, "x", first)
            self._check_rows(z, parameters, samples)
        return self.likelihood.log_likelihood(self.x, parameters, samples, self.conditioning)

    def _check_rows(self, z: Tensor, parameters: Any, samples: int) -> None:
        rows = z.shape[0]
        for name, part in _named(parameters):
            if part.shape[:1] != (rows,):
                event = self.q.latent or (z.shape[1],)
                hint = "" if self.q.latent is None else "; z.flatten(1) keeps them"
                raise ValueError(
                    f"the decoder returned {shape_of(part)}{name and f' as {name}'} for z "
                    f"[{', '.join(map(str, (rows, *event)))}]; expected K·B = {samples}·{rows // samples} "
                    f"rows, one for each row of z{hint}"
                )


def _is_deferred(returned: Any) -> bool:
    """Return True if a decoder's output has a last layer that is not multiplied out."""
    if type(returned) is LastLayer:
        return True
    if isinstance(returned, Mapping):
        return any([_is_deferred(part) for part in returned.values()])
    return type(returned) in (tuple, list) and any([_is_deferred(part) for part in returned])


def _detached(t: Any) -> Any:
    return t.detach() if t is not None and t.is_leaf else t


def _frozen(returned: Any) -> Any:
    """Detach the weights of deferred last layers, except those that are not leaves: they may depend on z."""
    if type(returned) is LastLayer:
        weights, biases = map(_detached, returned.weights), map(_detached, returned.biases)
        hidden = [HiddenLayer(_detached(w), _detached(b), a) for w, b, a in returned.hidden]
        return returned._replace(weights=tuple(weights), biases=tuple(biases), hidden=tuple(hidden))
    if not _is_deferred(returned):
        return returned
    if isinstance(returned, Mapping):
        return {name: _frozen(part) for name, part in returned.items()}
    return type(returned)([_frozen(part) for part in returned])


def _named(parameters: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the first tensor of a decoder's output, or of each entry if it is a dict, with its name."""
    if isinstance(parameters, Tensor):
        if parameters.dim():
            yield name, parameters
    elif isinstance(parameters, Mapping):
        for key, part in parameters.items():
            yield from _named(part, f"{name}[{key!r}]")
    elif isinstance(parameters, (tuple, list)) and parameters:
        yield from _named(parameters[0], name)
