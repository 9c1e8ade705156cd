"""Models, objectives and schedules of the papers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import fastvae

PIXELS = 784


def burda_rate(epoch: int) -> float:
    """Return the learning rate of Burda et al.: stage i has 3^i epochs at 0.001 · 10^(−i/7)."""
    stage, last = 0, 1
    while epoch >= last and stage < 7:
        stage += 1
        last += 3**stage
    return float(1e-3 * 10 ** (-stage / 7))


@dataclass(frozen=True)
class Run:
    """Configuration of a training: an objective of (vae, x, beta), a batch, a learning rate per epoch.

    ``static`` data is binarised once, otherwise anew in every epoch. ``warmup`` is the number of epochs in
    which β rises from 0 to 1. ``pseudo_inputs`` is the size of a VampPrior, None for N(0, I).
    """

    objective: Callable[[fastvae.VAE, Tensor, Tensor], Tensor]
    rate: Callable[[int], float] = burda_rate
    batch: int = 20
    eps: float = 1e-4
    hidden: int = 200
    latents: int = 50
    static: bool = False
    warmup: int = 0
    pseudo_inputs: int | None = None


def tomczak(pseudo_inputs: int | None) -> Run:
    """Return the one-level model of Tomczak & Welling, with an MLP where theirs has gated layers."""
    return Run(
        lambda vae, x, beta: vae.elbo(x, beta=beta, kl="analytic" if pseudo_inputs is None else "mc"),
        rate=lambda epoch: 5e-4,
        batch=100,
        eps=1e-8,
        hidden=300,
        latents=40,
        static=True,
        warmup=100,
        pseudo_inputs=pseudo_inputs,
    )


RUNS = {
    # Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016, table 1.
    "vae-1": Run(lambda vae, x, beta: vae.elbo(x)),
    "vae-5": Run(lambda vae, x, beta: vae.elbo(x, k=5)),
    "vae-50": Run(lambda vae, x, beta: vae.elbo(x, k=50)),
    "iwae-5": Run(lambda vae, x, beta: vae.iwae(x, k=5)),
    "iwae-50": Run(lambda vae, x, beta: vae.iwae(x, k=50)),
    # For the gradient's noise: with two latents the weights of some images have a finite variance.
    "iwae-5-2d": Run(lambda vae, x, beta: vae.iwae(x, k=5), latents=2),
    # The same number of draws by other bounds and gradients: Tucker et al., 2019; Roeder et al., 2017;
    # Rainforth et al., 2018.
    "dreg-50": Run(lambda vae, x, beta: vae.iwae(x, k=50, estimator="dreg")),
    "stl-50": Run(lambda vae, x, beta: vae.iwae(x, k=50, estimator="stl")),
    "miwae-5x10": Run(lambda vae, x, beta: vae.bound(x, fastvae.bounds.IWAE(groups=5), k=50)),
    "piwae-5x10": Run(
        lambda vae, x, beta: vae.bound(
            x, fastvae.bounds.IWAE(), k=50, q_objective=fastvae.bounds.IWAE(groups=5)
        )
    ),
    # Tomczak & Welling, VAE with a VampPrior, 2018, table 1.
    "standard": tomczak(None),
    "vamp-500": tomczak(500),
}


def network(*sizes: int) -> nn.Sequential:
    """Return linear layers with tanh between them, initialised as in Glorot & Bengio, 2010."""
    layers: list[nn.Module] = []
    for first, last in zip(sizes, sizes[1:], strict=False):
        layer = nn.Linear(first, last)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def build(run: Run, train: Tensor) -> fastvae.VAE:
    """Return the untrained model of a run; the pixels' mean is the decoder's first output."""
    pixels = train.shape[1]
    encoder = network(pixels, run.hidden, run.hidden, 2 * run.latents)
    decoder = network(run.latents, run.hidden, run.hidden, pixels)
    with torch.no_grad():
        decoder[-1].bias.copy_(torch.logit(train.mean(0).clamp(1e-3, 1 - 1e-3)))
    prior = None
    if run.pseudo_inputs is not None:
        # Near training images, and within [0, 1], as in the authors' code.
        some = train[torch.randperm(len(train))[: run.pseudo_inputs]]
        prior = fastvae.distributions.VampPrior(encoder, PseudoInputs(some))
    return fastvae.VAE(encoder, decoder, likelihood="bernoulli", prior=prior, latent_dim=run.latents)


class PseudoInputs(nn.Module):
    """Learned pixels, clipped to [0, 1]."""

    def __init__(self, first: Tensor):
        super().__init__()
        self.pixels = nn.Parameter(first.clamp(0.01, 0.99).clone())

    def forward(self) -> Tensor:
        return self.pixels.clamp(0, 1)


def beta_of(run: Run, epoch: int) -> float:
    """Return β in an epoch."""
    return min(1.0, epoch / run.warmup) if run.warmup else 1.0


def steps_of(run: Run, images: int) -> int:
    """Return the number of steps in an epoch."""
    return math.ceil(images / run.batch)
