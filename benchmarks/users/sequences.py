"""A recurrent VAE (VRNN): at each time step a prior and a posterior that depend on earlier draws."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastvae import ops

from .case import Case, Noise, mlp

LENGTH = 20


class VRNN(nn.Module):
    """Networks of Chung et al. 2015, with a Bernoulli output."""

    def __init__(self, features: int, hidden: int, latent: int):
        super().__init__()
        self.prior = mlp(hidden, hidden, 2 * latent)
        self.encoder = mlp(features + hidden, hidden, 2 * latent)
        self.decoder = mlp(latent + hidden, hidden, features)
        self.cell = nn.GRUCell(features + latent, hidden)
        self.hidden = hidden


def _build(batch: int, length: int, features: int, hidden: int, latent: int) -> tuple[nn.Module, Tensor]:
    return VRNN(features, hidden, latent), torch.rand(length, batch, features).round()


def _eager(model: Any, x: Tensor, noise: Noise) -> Tensor:
    h = x.new_zeros(x.shape[1], model.hidden)
    loss = 0.0
    for x_t in x:
        prior_mu, prior_logvar = model.prior(h).chunk(2, 1)
        mu, logvar = model.encoder(torch.cat((x_t, h), 1)).chunk(2, 1)
        z = mu + noise(*mu.shape) * torch.exp(0.5 * logvar)
        logits = model.decoder(torch.cat((z, h), 1))
        kl = 0.5 * (
            prior_logvar - logvar + (logvar.exp() + (mu - prior_mu).pow(2)) / prior_logvar.exp() - 1
        ).sum(1)
        bce = functional.binary_cross_entropy_with_logits(logits, x_t, reduction="none").sum(1)
        loss = loss + (bce + kl).mean()
        h = model.cell(torch.cat((x_t, z), 1), h)
    return loss


def _ours(model: Any, x: Tensor) -> Tensor:
    h = x.new_zeros(x.shape[1], model.hidden)
    logits, kl = [], []
    for x_t in x:
        prior = model.prior(h).chunk(2, 1)
        mu, logvar = model.encoder(torch.cat((x_t, h), 1)).chunk(2, 1)
        z, kl_t = ops.rsample_kl(mu, logvar, prior=prior)
        kl.append(kl_t)
        logits.append(model.decoder(torch.cat((z, h), 1)))
        h = model.cell(torch.cat((x_t, z), 1), h)
    log_px = ops.bernoulli_log_prob(x.flatten(0, 1), torch.cat(logits))
    return (torch.cat(kl) - log_px).sum() / x.shape[1]


VRNN_CASE = Case(
    "VRNN, 20 steps",
    {"batch": 32, "length": LENGTH, "features": 28, "hidden": 64, "latent": 16},
    {"batch": 5, "length": 4, "features": 6, "hidden": 9, "latent": 3},
    _build, _eager, _ours,
)  # fmt: skip
