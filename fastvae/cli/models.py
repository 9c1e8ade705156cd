"""Models of the demo, and their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastvae

from . import latents
from .kinds import Outputs, kind_of


class Encoder(nn.Module):
    """Encoder x [B, pixels] -> q(z|x), by default a pair (mu, logvar), each [B, latent]."""

    def __init__(
        self,
        pixels: int,
        hidden: int,
        latent: int,
        likelihood: str = "bernoulli",
        posterior: str = latents.DIAGONAL,
    ):
        super().__init__()
        self.seen = kind_of(likelihood).seen
        self.body = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        widths, self.q = latents.POSTERIORS[posterior](latent)
        self.outputs = tuple(widths)
        for name, width in widths.items():
            self.add_module(name, nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Any:
        h = self.body(self.seen(x))
        return self.q(*(self.get_submodule(name)(h) for name in self.outputs))


class Decoder(nn.Sequential):
    """Decoder z [N, latent] -> logits [N, pixels], or the parameters of another likelihood."""

    def __init__(self, pixels: int, hidden: int, latent: int, likelihood: str = "bernoulli"):
        last = (
            nn.Linear(hidden, pixels) if likelihood == "bernoulli" else Outputs(hidden, kind_of(likelihood))
        )
        super().__init__(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), last)


def build(architecture: dict[str, Any]) -> fastvae.VAE:
    """Build the demo's model from an architecture, as stored in a checkpoint.

    It has the sizes pixels, hidden and latent, and the names of a non-default likelihood, posterior or prior.
    """
    sizes = dict(architecture)
    posterior, prior = sizes.pop("posterior", latents.DIAGONAL), sizes.pop("prior", latents.STANDARD)
    latents.check(posterior, prior, sizes["latent"])
    encoder, decoder = Encoder(**sizes, posterior=posterior), Decoder(**sizes)
    return fastvae.VAE(
        encoder,
        decoder,
        likelihood=kind_of(sizes.get("likelihood", "bernoulli")).likelihood(),
        prior=latents.prior_of(posterior, prior, encoder, sizes["pixels"], sizes["latent"]),
        latent_dim=sizes["latent"],
    )


def load(path: str | Path) -> fastvae.VAE:
    """Load the model from a checkpoint file that the demo wrote."""
    return of_checkpoint(torch.load(path, map_location="cpu", weights_only=True))


def of_checkpoint(checkpoint: dict[str, Any]) -> fastvae.VAE:
    """Build the model of a checkpoint, with its parameters."""
    model = build(checkpoint["architecture"])
    model.load_state_dict(checkpoint["state_dict"])
    return model
