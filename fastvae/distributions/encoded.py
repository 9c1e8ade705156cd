"""Mixtures of the encoder's posteriors at other inputs: VampPrior and the aggregate posterior."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core.checks import check_count, check_tensor, shape_of
from .base import Distribution, hold
from .mixture import mixture_of_rows
from .read import as_posterior


class _Encoded(Distribution, nn.Module):  # type: ignore[misc]
    """Mixture of the posteriors of inputs that the prior stores."""

    encoder: Any
    logits: Tensor | None

    def __init__(self, encoder: Callable[..., Any], logits: Tensor | None):
        super().__init__()
        if not callable(encoder):
            raise TypeError(
                "encoder must be a module or another callable, x -> q(z|x), got " + type(encoder).__name__
            )
        self.encoder = encoder
        if logits is not None:
            check_tensor("logits", logits, 1, "[U]")
        hold(self, logits=logits)

    def _inputs(self) -> Iterator[Any]:
        """Yield the inputs batch by batch."""
        raise NotImplementedError

    def prepared(self) -> Distribution:
        name, parts = self.family.__name__, []
        for x in self._inputs():
            try:
                parts.append(as_posterior(self.encoder(x)))
            except Exception as error:
                if hasattr(error, "add_note"):  # Python 3.11
                    given = shape_of(x) if isinstance(x, Tensor) else type(x).__name__
                    error.add_note(f"fastvae.distributions.{name} gave the encoder its own inputs, {given}")
                raise
        made = mixture_of_rows(parts, self.logits)
        made.__dict__["made_by"] = name
        return made

    def log_prob(self, z: Tensor) -> Tensor:
        return self.prepared().log_prob(z)

    @torch.no_grad()
    def sample(
        self,
        k: int = 1,
        *,
        dim: int | None = None,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        return self.prepared().sample(k, dim=dim, device=device, generator=generator)

    @property
    def mean(self) -> Tensor:
        mean: Tensor = self.prepared().mean
        return mean

    @property
    def variance(self) -> Tensor:
        variance: Tensor = self.prepared().variance
        return variance


class VampPrior(_Encoded):
    r"""Variational mixture of posteriors (VampPrior): a mixture of q(z|u) over U learned pseudo-inputs.

    .. math:: p(z) = \sum_u π_u\, q(z | u_u)

    An objective encodes the pseudo-inputs once, whatever its number of draws and chunks; an evaluation
    encodes them once for the whole data set.

    Args:
        encoder: the VAE's encoder, x -> q in a form that :func:`fastvae.elbo` accepts.
        pseudo_inputs: [U, \*event], ``nn.Parameter`` if learned; or a module (or another callable) without
            arguments that returns them, such as one that keeps them within [0, 1].
        logits: π = softmax(logits), [U]. Default: equal weights.

    Raises:
        TypeError, ValueError: for invalid arguments.

    References:
        Tomczak & Welling, VAE with a VampPrior, 2018, eq. 9.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(7, 6), torch.nn.Linear(3, 7)
        >>> prior = fastvae.distributions.VampPrior(encoder, torch.nn.Parameter(torch.rand(9, 7)))
        >>> vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli", prior=prior, latent_dim=3)
        >>> (-vae.elbo(torch.rand(4, 7), kl="mc")).backward()
        >>> vae.sample(2).shape
        torch.Size([2, 7])
    """

    pseudo_inputs: Any

    def __init__(self, encoder: Callable[..., Any], pseudo_inputs: Any, logits: Tensor | None = None):
        super().__init__(encoder, logits)
        if isinstance(pseudo_inputs, Tensor):
            check_tensor("pseudo_inputs", pseudo_inputs)
            if pseudo_inputs.dim() < 2 or not pseudo_inputs.shape[0]:
                raise ValueError(
                    f"pseudo_inputs has shape {shape_of(pseudo_inputs)}; expected [U, *event], inputs of the "
                    "encoder, at least one"
                )
            hold(self, pseudo_inputs=pseudo_inputs)
        elif callable(pseudo_inputs):
            self.pseudo_inputs = pseudo_inputs
        else:
            raise TypeError(
                "pseudo_inputs must be a tensor [U, *event] or a callable that returns one, got "
                f"{type(pseudo_inputs).__name__}"
            )

    def _inputs(self) -> Iterator[Any]:
        yield self.pseudo_inputs if isinstance(self.pseudo_inputs, Tensor) else self.pseudo_inputs()


class AggregatePosterior(_Encoded):
    r"""Aggregate posterior of a data set, as a prior or for inspection.

    .. math:: q(z) = \frac{1}{N} \sum_n q(z | x_n)

    Among all priors it maximises the ELBO, and it overfits: use it as a diagnostic
    (:func:`fastvae.diagnostics.latents`). An objective encodes the whole data set in every call, an
    evaluation once.

    Args:
        encoder: the VAE's encoder, x -> q in a form that :func:`fastvae.elbo` accepts.
        data: [N, \*event].
        batch_size: number of examples encoded at a time.

    Raises:
        TypeError, ValueError: for invalid arguments.

    References:
        Hoffman & Johnson, ELBO surgery, 2016; Makhzani et al., Adversarial Autoencoders, 2015.

    Example:
        >>> import torch, fastvae
        >>> from fastvae.distributions import AggregatePosterior
        >>> encoder = torch.nn.Linear(7, 6)
        >>> AggregatePosterior(encoder, torch.rand(40, 7)).log_prob(torch.zeros(5, 4, 3)).shape
        torch.Size([5, 4])
    """

    data: Tensor

    def __init__(self, encoder: Callable[..., Any], data: Tensor, *, batch_size: int = 1000):
        super().__init__(encoder, None)
        check_tensor("data", data)
        if data.dim() < 2 or not data.shape[0]:
            raise ValueError(f"data has shape {shape_of(data)}; expected [N, *event], at least one example")
        self.batch_size = check_count("batch_size", batch_size, "the examples that are encoded at a time")
        # Excluded from checkpoints.
        self.register_buffer("data", data, persistent=False)

    def _inputs(self) -> Iterator[Any]:
        yield from self.data.split(self.batch_size)
