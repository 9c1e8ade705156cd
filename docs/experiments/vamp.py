"""``python -m docs.experiments.vamp``: why a VampPrior is worse under IWAE, for docs/latents.md.

Trains the demo's model with eight latents by IWAE-50 from the start, with variants that could explain it, and
after training by the ELBO with its warm-up of β.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastvae
from fastvae.cli import latents, models, training
from fastvae.cli.images import digits

LATENTS, K = 8, 50


class Detached(nn.Module):
    """An encoder without gradients of its parameters: a prior that follows q and does not steer it."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.follows = lambda: encoder

    def forward(self, u: Tensor) -> Any:
        encoder = self.follows()
        parameters = {name: p.detach() for name, p in encoder.named_parameters()}
        return torch.func.functional_call(encoder, parameters, (u,))


def detach_encoder(vae: fastvae.VAE) -> None:
    prior = vae.prior
    vae.prior = fastvae.distributions.VampPrior(Detached(vae.encoder), prior.pseudo_inputs, prior.logits)


def freeze_inputs(vae: fastvae.VAE) -> None:
    vae.prior.pseudo_inputs.requires_grad_(False)


def run(
    prior: str,
    first: int,
    epochs: int,
    name: str,
    change: Callable[[fastvae.VAE], None] | None = None,
    **options: Any,
) -> None:
    """Train by the ELBO for ``first`` epochs, then by IWAE-50, and print the test images' results."""
    images = digits()
    architecture = {"pixels": 64, "hidden": 128, "latent": LATENTS, "posterior": "diagonal", "prior": prior}
    torch.manual_seed(0)
    vae = models.build(architecture)
    latents.start(vae, images.train)
    if change is not None:
        change(vae)
    fit = functools.partial(training.fit, name, images=images, model=vae, architecture=architecture)
    if first:
        fit(k=None, epochs=first, eval_k=1, seed=0, progress=False)
    bound = functools.partial(fastvae.iwae, k=K, **options)
    trained = fit(k=K, epochs=epochs, eval_k=1000, seed=0, bound=bound, progress=False)
    noise = torch.Generator().manual_seed(1)
    found = vae.evaluate(images.test, k=1000, generator=noise, progress=False)
    print(
        f"{prior:8} {name:28} log p(x) {-found.nll:.2f}, ELBO {float(trained.elbo.mean()):.2f}, "
        f"active units {found.active_units}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.experiments.vamp", description=__doc__)
    parser.add_argument("--epochs", type=int, default=60, help="by IWAE-50")
    parser.add_argument("--first", type=int, default=100, help="by the ELBO, where it comes first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for prior in ("standard", "vamp"):
        run(prior, 0, options.epochs, "IWAE-50")
        run(prior, 0, options.epochs, "IWAE-50, DReG", estimator="dreg")
        run(prior, options.first, options.epochs, "IWAE-50 after the ELBO")
    run("vamp", 0, options.epochs, "encoder detached in the prior", detach_encoder)
    run("vamp", 0, options.epochs, "pseudo-inputs frozen", freeze_inputs)


if __name__ == "__main__":
    main()
