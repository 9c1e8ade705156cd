"""VAE: an encoder, a decoder and what their outputs mean, bundled in one module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import objectives
from ._checks import check_count
from .evaluate import Evaluation, evaluate
from .likelihoods import Likelihood, as_likelihood
from .objectives import LogMarginal, Terms
from .posteriors import as_posterior
from .priors import Prior, as_prior

__all__ = ["VAE"]


class VAE(nn.Module):
    """A variational autoencoder: encoder, decoder, likelihood and prior in one module.

    Args:
        encoder: module x [B, *event] -> q, a pair (mu, logvar) or any other posterior that
            :func:`fastvae.elbo` takes.
        decoder: module z [N, D] -> parameters of the likelihood.
        likelihood: ``"gaussian"``, ``"bernoulli"`` or an object.
        prior: default N(0, I), or an object such as ``fastvae.DiagonalNormal``.
        latent_dim: D; found from the encoder's first output if not given, and needed for :meth:`sample`
            before that.

    Example:
        >>> import torch, fastvae
        >>> class Encoder(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return super().forward(x).chunk(2, dim=1)
        >>> vae = fastvae.VAE(Encoder(8, 4), torch.nn.Linear(2, 8), likelihood="bernoulli", latent_dim=2)
        >>> x = torch.rand(16, 8)
        >>> (-vae.elbo(x)).backward()
        >>> vae.sample(3).shape, vae.reconstruct(x).shape, vae.log_marginal(x, k=10).log_px.shape
        (torch.Size([3, 8]), torch.Size([16, 8]), torch.Size([16]))
    """

    def __init__(
        self,
        encoder: Callable[[Tensor], Any],
        decoder: Callable[[Tensor], Any],
        *,
        likelihood: str | Likelihood = "gaussian",
        prior: Prior | None = None,
        latent_dim: int | None = None,
    ):
        super().__init__()
        for name, value in (("encoder", encoder), ("decoder", decoder)):
            if not callable(value):
                raise TypeError(f"{name} must be a module or another callable, got {type(value).__name__}")
        self.encoder = encoder
        self.decoder = decoder
        self.likelihood = as_likelihood(likelihood)
        self.prior = as_prior(prior)
        self.latent_dim = (
            None if latent_dim is None else check_count("latent_dim", latent_dim, "the number of latents")
        )

    def posterior(self, x: Tensor):
        """q(z|x), the posterior object of the encoder's output."""
        q = as_posterior(self.encoder(x))
        if self.latent_dim is None:
            mu = getattr(q, "mu", None)
            self.latent_dim = None if mu is None else mu.shape[1]
        return q

    def elbo(self, x: Tensor, **options) -> Tensor | Terms:
        """:func:`fastvae.elbo` of x; options are its keyword arguments."""
        return objectives.elbo(x, self.posterior(x), self.decoder, **self._meaning(), **options)

    def iwae(self, x: Tensor, k: int = 50, **options) -> Tensor | Terms:
        """:func:`fastvae.iwae` of x with k samples; options are its keyword arguments."""
        return objectives.iwae(x, self.posterior(x), self.decoder, k=k, **self._meaning(), **options)

    @torch.no_grad()
    def log_marginal(self, x: Tensor, k: int = 5000, **options) -> LogMarginal:
        """:func:`fastvae.log_marginal` of x with k samples, in the mode (train or eval) that the module is
        in.
        """
        return objectives.log_marginal(x, self.posterior(x), self.decoder, k=k, **self._meaning(), **options)

    def evaluate(self, data, **options) -> Evaluation:
        """:func:`fastvae.evaluate` of a data set; options are its keyword arguments."""
        return evaluate(self.posterior, self.decoder, data, **self._meaning(), **options)

    @torch.no_grad()
    def anomaly_score(self, x: Tensor, samples: int = 100, **options) -> Tensor:
        """How unlike the training data x is, [B], in nats; high is anomalous.

        It is minus :func:`fastvae.reconstruction_log_prob`, An and Cho's reconstruction probability; options
        are its keyword arguments. Minus :meth:`log_marginal` is the other usual score: it also charges for
        latents that are rare under the prior.
        """
        options = {"likelihood": self.likelihood, "samples": samples, **options}
        return -objectives.reconstruction_log_prob(x, self.posterior(x), self.decoder, **options)

    @torch.no_grad()
    def sample(self, n: int, *, generator: torch.Generator | None = None) -> Tensor:
        """The means of p(x|z) for n draws of z from the prior, [n, *event]."""
        check_count("n", n, "the number of draws")
        if self.latent_dim is None:
            raise ValueError(
                "the latent dimension is not known yet: give VAE(..., latent_dim=D), or encode a batch first"
            )
        reference = next(self.parameters(), torch.empty(()))
        z = self.prior.sample(n, self.latent_dim, device=reference.device, generator=generator)
        return self.likelihood.mean(self.decoder(z.to(reference.dtype)))

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """The mean of p(x|z) at the mean of q(z|x), [B, *event]."""
        return self.likelihood.mean(self.decoder(self.posterior(x).mu))

    def _meaning(self) -> dict[str, Any]:
        return {"likelihood": self.likelihood, "prior": self.prior}
