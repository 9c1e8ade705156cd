"""Toy models with known ground truth, and the objectives as a textbook writes them."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor, nn

import fastvae
from fastvae.likelihoods import Gaussian

from .conftest import DEVICE


def generator(seed: int) -> torch.Generator:
    """Return a fresh generator on the device under test."""
    return torch.Generator(device=DEVICE).manual_seed(seed)


def seed_of(seed: int) -> Tensor:
    """Return the seed tensor that an objective draws from ``generator(seed)``."""
    return fastvae.random.draw_seed(DEVICE, generator(seed))


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normals that do not depend on the device under test."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        DEVICE, dtype
    )


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return uniforms in [0, 1) that do not depend on the device under test."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        DEVICE, dtype
    )


class LinearGaussian:
    """Linear Gaussian model z ~ N(0, I), x|z ~ N(W z + c, s^2 I) with known log p(x) and diagonal p(z|x).

    The columns of W are orthogonal.

    Args:
        latent: number of latents D.
        features: number of features X.
        scale: standard deviation s.
        dtype: dtype of everything but the exact answers, which are float64.
    """

    def __init__(self, latent: int = 3, features: int = 7, scale: float = 0.6, dtype=torch.float64):
        orthogonal, _ = torch.linalg.qr(randn(features, latent, seed=1, dtype=torch.float64))
        self.gain = torch.linspace(0.5, 1.5, latent, dtype=torch.float64, device=DEVICE)
        self.weight = orthogonal * self.gain
        self.offset = randn(features, seed=2, dtype=torch.float64)
        self.scale = scale
        self.dtype = dtype

    def sample(self, batch: int, seed: int = 3) -> Tensor:
        """Draw x [B, X] from the model."""
        z = randn(batch, self.gain.numel(), seed=seed, dtype=torch.float64)
        noise = randn(batch, self.offset.numel(), seed=seed + 1000, dtype=torch.float64)
        return (z @ self.weight.T + self.offset + self.scale * noise).to(self.dtype)

    def log_px(self, x: Tensor) -> Tensor:
        """Return the exact log marginal likelihood [B]."""
        size = self.offset.numel()
        covariance = self.weight @ self.weight.T + self.scale**2 * torch.eye(
            size, dtype=torch.float64, device=DEVICE
        )
        return torch.distributions.MultivariateNormal(self.offset, covariance).log_prob(x.double())

    def posterior(self, x: Tensor, shift: float = 0.0, stretch: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return p(z|x) as (mu, logvar), mu moved by ``shift`` standard deviations, logvar by ``stretch``."""
        variance = self.scale**2 / (self.scale**2 + self.gain**2)
        mu = variance * ((x.double() - self.offset) @ self.weight) / self.scale**2 + shift * variance.sqrt()
        logvar = variance.log() + stretch
        return mu.to(self.dtype), logvar.expand(mu.shape).to(self.dtype).contiguous()

    def decoder(self, z: Tensor) -> Tensor:
        """Return the mean of p(x|z)."""
        return z @ self.weight.T.to(z.dtype) + self.offset.to(z.dtype)

    @property
    def likelihood(self) -> Gaussian:
        """Return p(x|z) for a decoder that returns the mean."""
        return Gaussian(scale=self.scale)

    def moment(self, n: int, shift: float, stretch: float) -> float:
        r"""Return E_q[(w / p(x))^n], q = ``posterior(x, shift, stretch)``: a Gaussian integral.

        It is equal for all x. Per dimension, in units of the posterior's standard deviation, it is that of
        p^n q^{1-n} with p = N(0, 1) and q = N(shift, v).
        """
        v = math.exp(stretch)
        precision = n - (n - 1) / v
        assert precision > 0, "the moment is infinite"
        linear = -(n - 1) * shift / v
        constant = (n - 1) * shift**2 / v
        one = v ** ((n - 1) / 2) / math.sqrt(precision) * math.exp(0.5 * (linear**2 / precision + constant))
        return one ** self.gain.numel()


def textbook_log_weights(
    x: Tensor,
    mu: Tensor,
    logvar: Tensor,
    log_likelihood,
    k: int,
    seed: Tensor,
    prior: tuple[Tensor, Tensor] | None = None,
    detached: bool = False,
) -> Tensor:
    """Return log w [K, B] by torch.distributions, differentiable in z.

    ``log_likelihood`` maps z [K, B, D] to log p(x|z) [K, B]; ``detached`` detaches (mu, logvar) inside log q.
    """
    Normal = torch.distributions.Normal
    eps = fastvae.random.normal(seed, k, *mu.shape, dtype=mu.dtype)
    sigma = torch.exp(0.5 * logvar)
    z = mu + sigma * eps
    q = Normal(mu.detach(), sigma.detach()) if detached else Normal(mu, sigma)
    prior_mu, prior_logvar = (torch.zeros_like(mu), torch.zeros_like(mu)) if prior is None else prior
    p = Normal(prior_mu, torch.exp(0.5 * prior_logvar))
    return log_likelihood(z) + (p.log_prob(z) - q.log_prob(z)).sum(2)


def gaussian_log_likelihood(decoder, x: Tensor):
    """Return z [K, B, D] -> log p(x|z) [K, B] by torch.distributions, for a decoder of (mean, logvar)."""

    def log_likelihood(z):
        mean, logvar = decoder(z)
        return torch.distributions.Normal(mean, torch.exp(0.5 * logvar)).log_prob(x).sum(2)

    return log_likelihood


class Encoder(nn.Module):
    """Encoder x [B, X] -> (mu, logvar) [B, D] that counts its calls."""

    def __init__(self, features: int, latent: int):
        super().__init__()
        self.linear = nn.Linear(features, 2 * latent)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.linear(x).chunk(2, dim=1)


class GaussianDecoder(nn.Module):
    """Decoder z [..., D] -> (mean, logvar) [..., X]."""

    def __init__(self, latent: int, features: int):
        super().__init__()
        self.linear = nn.Linear(latent, 2 * features)

    def forward(self, z):
        return self.linear(z).chunk(2, dim=-1)


def networks(
    features: int = 7, latent: int = 3, likelihood: str = "gaussian", seed: int = 0, dtype=torch.float32
):
    """Return a fresh encoder and decoder with fixed weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        decoder = (
            GaussianDecoder(latent, features) if likelihood == "gaussian" else nn.Linear(latent, features)
        )
        encoder = Encoder(features, latent)
    return encoder.to(DEVICE, dtype), decoder.to(DEVICE, dtype)


def values_of(result):
    """Return the tensors of a result: one, a tuple, or a record."""
    if dataclasses.is_dataclass(result):
        return tuple(vars(result).values())
    return tuple(result) if isinstance(result, tuple) else (result,)


class Parts:
    """Encoder, decoder, likelihood and prior that are evaluated without a VAE around them."""

    def __init__(self, *parts):
        self._parts = parts

    def evaluated_parts(self):
        return self._parts


def evaluate_parts(encoder, decoder, data, *, likelihood="gaussian", prior=None, **options):
    """Evaluate functions of any kind."""
    return fastvae.evaluate(Parts(encoder, decoder, likelihood, prior), data, **options)
