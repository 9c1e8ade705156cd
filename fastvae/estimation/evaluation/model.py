"""The model under evaluation: its functions, where they run, and what they are given."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...core.checks import shape_of
from ...core.nested import Conditioning, called, each, tensors
from ...distributions import Distribution, as_posterior, as_prior
from ...distributions.draws import STANDARD
from ...distributions.read import is_conditional
from ...inputs.batch import Inputs
from ...inputs.modules import modules_of, parameters_digest
from ...likelihoods.base import Likelihood
from ...likelihoods.read import as_likelihood
from .data import place_of

# Default batch sizes, and on a GPU the most examples and numbers of data of a larger one. A GPU waits for the
# host if batches are small: docs/log.md.
BATCH, BATCH_ON_GPU, MOST_ON_GPU, MOST_NUMBERS_ON_GPU = 100, 500, 2000, 2**21


@dataclass(frozen=True, eq=False)
class Model:
    """Encoder, decoder, likelihood and prior."""

    encoder: Callable[..., Any]
    decoder: Callable[..., Any]
    likelihood: Likelihood
    prior: Any  # None may stand for the posterior's own prior

    @classmethod
    def of(cls, vae: Any) -> Model:
        """Return the parts of a :class:`fastvae.VAE`."""
        parts = getattr(vae, "evaluated_parts", None)
        if parts is None:
            raise TypeError(
                f"vae must be a fastvae.VAE, got {type(vae).__name__}; wrap your networks: "
                "fastvae.evaluate(fastvae.VAE(encoder, decoder, likelihood=...), data)"
            )
        return cls.read(*parts())

    @classmethod
    def read(cls, encoder: Any, decoder: Any, likelihood: str | Likelihood, prior: Any) -> Model:
        """Validate the parts of a model."""
        likelihood = as_likelihood(likelihood)
        prior = prior if prior is None or is_conditional(prior) else as_prior(prior)
        for name, value in (("encoder", encoder), ("decoder", decoder)):
            if not callable(value):
                raise TypeError(f"{name} must be a module or another callable, got {type(value).__name__}")
        return cls(encoder, decoder, likelihood, prior)

    @functools.cached_property
    def place(self) -> tuple[torch.device | None, torch.dtype | None]:
        """Device and floating dtype of the modules; None without modules."""
        return place_of(self.encoder, self.decoder)

    @functools.cached_property
    def modules(self) -> list[nn.Module]:
        """All modules that the model refers to."""
        return [m for f in (self.encoder, self.decoder, self.likelihood, self.prior) for m in modules_of(f)]

    def batch_size(self, data: Any) -> int:
        """Return the default batch size for the model's device, or the data's."""
        device = self.place[0] or getattr(data, "device", None)
        on_gpu = isinstance(device, torch.device) and device.type != "cpu"
        if not on_gpu:
            return BATCH
        # Each batch costs the host some milliseconds. Of data without a shape the examples may be large.
        shape = getattr(data, "shape", ())
        numbers = math.prod(shape[1:]) if len(shape) else MOST_NUMBERS_ON_GPU
        return min(max(BATCH_ON_GPU, MOST_NUMBERS_ON_GPU // max(1, numbers)), MOST_ON_GPU)

    def digest(self) -> str:
        """Hash the parameters."""
        prior = STANDARD if self.prior is None else self.prior
        return parameters_digest(self.encoder, self.decoder, self.likelihood, prior)

    def prepared(self) -> Model:
        """Return the model with what all batches have in common of the prior computed once."""
        if isinstance(self.prior, Distribution):
            return dataclasses.replace(self, prior=self.prior.prepared())
        return self

    def read_batch(self, name: str, x: Any, conditioning: Conditioning | None) -> Inputs:
        """Encode a batch; ``name`` describes it in a note on the encoder's errors."""
        seen, x = each(self._for_modules, x), each(self._for_likelihood, x)
        context = None
        if conditioning is not None:
            context = each(self._for_context, conditioning.context)
            mask, size_factor = (
                each(self._for_likelihood, v) for v in (conditioning.mask, conditioning.size_factor)
            )
            conditioning = Conditioning(mask, size_factor, context)
        try:
            q = as_posterior(called("encoder", self.encoder, seen, context))
        except Exception as error:
            if hasattr(error, "add_note"):  # Python 3.11
                given = ", ".join(f"{shape_of(t)}, {t.dtype}" for t in tensors(seen))
                error.add_note(
                    f"fastvae.evaluate gave the encoder {name}: {given}"
                    f"{'' if context is None else ' and the context'}"
                )
            raise
        return Inputs.read(x, q, self.decoder, self.likelihood, self.prior, conditioning)

    def _for_modules(self, t: Tensor) -> Tensor:
        device, dtype = self.place
        own = t.dtype if t.is_floating_point() else torch.get_default_dtype()
        return t.to(device or t.device, dtype or own)

    def _for_likelihood(self, t: Tensor) -> Tensor:
        """Move data that the likelihood reads: half precision would round integers and float32."""
        device, dtype = self.place
        t = t.to(device or t.device)
        if not t.is_floating_point() or dtype is None:
            return t
        return t.to(dtype if dtype.itemsize > 2 or t.dtype.itemsize == 2 else torch.float32)

    def _for_context(self, t: Tensor) -> Tensor:
        return self._for_modules(t) if t.is_floating_point() else self._for_likelihood(t)
