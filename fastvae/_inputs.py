"""What every objective takes, read and checked once, and the way from its draws to the bound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from ._checks import check_data, check_result, check_same_device, on_same_device, shape_of
from ._glance import are_batch, are_batch_in_python
from .distributions import (
    STANDARD,
    Distribution,
    as_posterior,
    as_prior,
    diagonal,
)
from .likelihoods.base import SHARED, Declared, Likelihood, as_likelihood
from .ops.weigh import Weighing, weigh


class Inputs(NamedTuple):
    """A batch and the three distributions that an objective is made of."""

    x: Tensor
    q: Distribution
    decoder: Callable[[Tensor], Any]
    likelihood: Likelihood
    prior: Distribution

    @classmethod
    def read(cls, x: Any, q: Any, decoder: Any, likelihood: Any, prior: Any) -> Inputs:
        """Read and check what the user gave."""
        # What is right at a glance is not asked one by one.
        if type(q) is tuple and len(q) == 2 and prior is None:
            known: Any = SHARED.get(likelihood) if type(likelihood) is str else None
            glance = are_batch_in_python if torch.compiler.is_compiling() else are_batch
            fits = known is not None and callable(decoder) and glance(x, *q)
            if fits and (known.differentiable or not x.requires_grad):
                return tuple.__new__(cls, (x, diagonal(*q), decoder, known, STANDARD))
        likelihood = as_likelihood(likelihood, shared=True)
        check_data(x, likelihood)
        q = as_posterior(q)
        if x.dim() == 0 or x.shape[0] != q.batch:
            raise ValueError(
                f"x has shape {shape_of(x)} but q has {q.batch} rows; the first axis of both must be the "
                "batch"
            )
        if not on_same_device(x.device, q.device):
            raise ValueError(f"x is on {x.device} but q is on {q.device}; move one of them")
        if not callable(decoder):
            raise TypeError(
                "decoder must be a callable z[N, D] -> parameters, such as an nn.Module; got "
                f"{type(decoder).__name__}. Pass the decoder itself, not its output"
            )
        return cls(x, q, decoder, likelihood, as_prior(prior))

    def bound(
        self, z: Tensor, term: Tensor, samples: int, beta: Tensor | None, how: Weighing, terms: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What :func:`fastvae.ops.weigh.weigh` returns, of z [K·B, D] and a term of q and p."""
        parameters = self.decoder(z)
        takes_fused = beta is None or not beta.requires_grad
        fused = self.likelihood.fused(self.x, parameters, samples) if takes_fused else None
        if fused is not None:
            return weigh(*fused, term, beta, how, terms)
        return weigh_samples(self._log_prob(z, self.x, parameters, samples), term, beta, how)

    def log_likelihood(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """log p(x|z) [K, B] of z [K, B, D]: the decoder sees one batch axis, sample-major."""
        x = self.x if x is None else x
        z_rows = z.flatten(0, 1)
        parameters = self.decoder(z_rows)
        return self._log_prob(z_rows, x, parameters, z.shape[0])

    def _log_prob(self, z: Tensor, x: Tensor, parameters: Any, samples: int) -> Tensor:
        """log p(x|z) [K, B] of the decoder's output for z [K·B, D], checked."""
        batch, first = x.shape[0], _first_of(parameters)
        if type(self.likelihood).log_prob is Declared.log_prob:
            return self.likelihood.log_prob(x, parameters, samples)
        if isinstance(first, Tensor):
            check_same_device("the decoder's output", first, "x", x)
        value = self.likelihood.log_prob(x, parameters, samples)
        # One of the user's may have broadcast what fastvae's own refuse.
        if isinstance(first, Tensor) and first.shape[:1] != (samples * batch,):
            raise ValueError(
                f"the decoder returned {shape_of(first)} for z [{samples * batch}, {z.shape[1]}]; expected "
                f"K·B = {samples}·{batch} rows, one for each row of z"
            )
        check_result(
            self.likelihood, "log_prob", "log p(x|z)", value, "[K, B]", (samples, batch), z.device,
            "sum over the axes of the event, not over samples or batch",
        )  # fmt: skip
        return value


def _first_of(parameters: Any) -> Any:
    return parameters[0] if isinstance(parameters, (tuple, list)) and parameters else parameters


def weigh_samples(
    log_likelihood: Tensor, term: Tensor, beta: Tensor | None, how: Weighing
) -> tuple[Tensor, Tensor]:
    """What :func:`fastvae.ops.weigh.weigh` returns, of log-likelihoods [K, B] that no fused op makes."""
    mean = log_likelihood.mean(0)
    factor = how.coefficient if beta is None else how.coefficient * beta.to(term.dtype)
    if how.over == "mean":
        bound = mean + factor * (term if term.dim() == 1 else term.mean(0))
    else:
        bound = ops.log_mean_exp(log_likelihood + factor * term)
        mean = mean.detach()
    return bound if how.reduction == "none" else getattr(bound, how.reduction)(), mean
