"""Counts and words: recommenders (Mult-VAE, RecVAE), single cells (SCVI) and sentences."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastvae
from fastvae.likelihoods import Categorical, Multinomial, ZeroInflatedNegativeBinomial

from .case import Case, Noise, log_normal, mlp, standard_kl
from .images import Pair

# 5. Mult-VAE: the multinomial of a user's items.


class Users(nn.Module):
    """Encoder of normalised rows of items."""

    def __init__(self, body: nn.Module):
        super().__init__()
        self.dropout, self.body = nn.Dropout(0.5), body

    def forward(self, x: Tensor) -> Any:
        return self.body(self.dropout(functional.normalize(x)))


def _build_mult(batch: int, items: int, hidden: int, latent: int) -> tuple[nn.Module, Tensor]:
    encoder = Users(mlp(items, hidden, 2 * latent, activation=nn.Tanh))
    decoder = mlp(latent, hidden, items, activation=nn.Tanh)
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder}), (torch.rand(batch, items) < 0.015).float()


def _eager_mult(model: Any, x: Tensor, noise: Noise) -> Tensor:
    mu, logvar = model["encoder"](x).chunk(2, 1)
    z = mu + noise(*mu.shape) * torch.exp(0.5 * logvar)
    bce = -(functional.log_softmax(model["decoder"](z), 1) * x).sum(1).mean()
    return bce + 0.2 * standard_kl(mu, logvar).mean()


# Without the multinomial coefficient, which the authors leave out.
CLICKS = Multinomial(coefficient=False)


def _ours_mult(model: Any, x: Tensor) -> Tensor:
    return -fastvae.elbo(x, model["encoder"](x), model["decoder"], likelihood=CLICKS, beta=0.2)


MULT = Case(
    "Mult-VAE, 4000 items",
    {"batch": 500, "items": 4000, "hidden": 600, "latent": 200},
    {"batch": 5, "items": 300, "hidden": 9, "latent": 3},
    _build_mult, _eager_mult, _ours_mult,
)  # fmt: skip


# 6. RecVAE: the prior mixes N(0, I), the posterior of an earlier encoder and a wide normal, by dimension.

SHARES, WIDE, GAMMA = (0.15, 0.75, 0.1), 10.0, 0.005


def _build_rec(batch: int, items: int, hidden: int, latent: int) -> tuple[nn.Module, Any]:
    def encoder() -> Users:
        body = nn.Sequential(
            *(nn.Linear(items, hidden), nn.SiLU(), nn.LayerNorm(hidden)),
            *(nn.Linear(hidden, hidden), nn.SiLU(), nn.LayerNorm(hidden)),
        )
        return Users(Pair(body, hidden, latent))

    model = nn.ModuleDict({"encoder": encoder(), "old": encoder(), "decoder": nn.Linear(latent, items)})
    model["old"].requires_grad_(False).eval()
    x = (torch.rand(batch, items) < 0.015).float()
    return model, (x, GAMMA * x.sum(1))


def _log_composite(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    parts = (
        log_normal(z, 0.0, torch.zeros_like(logvar)) + math.log(SHARES[0]),
        log_normal(z, mu, logvar) + math.log(SHARES[1]),
        log_normal(z, 0.0, torch.full_like(logvar, WIDE)) + math.log(SHARES[2]),
    )
    return torch.logsumexp(torch.stack([p.expand(z.shape) for p in parts], -1), -1).sum(-1)


class Composite(fastvae.distributions.Distribution):
    """RecVAE's prior, given the posterior of the earlier encoder."""

    per_row = True

    def __init__(self, mu: Tensor, logvar: Tensor):
        self.mu, self.logvar = mu, logvar

    def log_prob(self, z: Tensor) -> Tensor:
        return _log_composite(z, self.mu, self.logvar)


def _eager_rec(model: Any, batch: Any, noise: Noise) -> Tensor:
    x, weight = batch
    mu, logvar = model["encoder"](x)
    z = mu + noise(*mu.shape) * torch.exp(0.5 * logvar)
    with torch.no_grad():
        old = model["old"](x)
    kl = (log_normal(z, mu, logvar).sum(1) - _log_composite(z, *old)) * weight
    return (kl - (functional.log_softmax(model["decoder"](z), 1) * x).sum(1)).mean()


def _ours_rec(model: Any, batch: Any) -> Tensor:
    x, weight = batch
    q = model["encoder"](x)
    with torch.no_grad():
        prior = Composite(*model["old"](x))
    options = {"likelihood": CLICKS, "prior": prior, "kl": "mc", "beta": weight}
    return -fastvae.elbo(x, q, model["decoder"], **options)


REC = Case(
    "RecVAE, composite prior",
    {"batch": 500, "items": 4000, "hidden": 600, "latent": 200},
    {"batch": 5, "items": 300, "hidden": 9, "latent": 3},
    _build_rec, _eager_rec, _ours_rec,
)  # fmt: skip


# 8. SCVI: zero-inflated negative binomials of genes, with library sizes.


class Genes(nn.Module):
    """Decoder z -> log share of each gene, and the logit of a dropout."""

    def __init__(self, latent: int, hidden: int, genes: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(latent, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
        self.scale, self.dropout = nn.Linear(hidden, genes), nn.Linear(hidden, genes)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(z)
        return torch.log_softmax(self.scale(h), 1), self.dropout(h)


def _build_cells(batch: int, genes: int, hidden: int, latent: int) -> tuple[nn.Module, Tensor]:
    body = nn.Sequential(nn.Linear(genes, hidden), nn.BatchNorm1d(hidden), nn.ReLU())
    likelihood = ZeroInflatedNegativeBinomial(torch.rand(genes) + 0.5, learned=True)
    model = nn.ModuleDict(
        {
            "encoder": Pair(body, hidden, latent),
            "decoder": Genes(latent, hidden, genes),
            "likelihood": likelihood,
        }
    )
    x = torch.poisson(torch.exp(torch.randn(batch, genes) - 1.5))
    return model, x


def _eager_cells(model: Any, x: Tensor, noise: Noise, eps: float = 1e-8) -> Tensor:
    mu, logvar = model["encoder"](torch.log1p(x))
    z = mu + noise(*mu.shape) * torch.exp(0.5 * logvar)
    log_share, pi = model["decoder"](z)
    mean = x.sum(1, keepdim=True) * log_share.exp()
    theta = model["likelihood"].log_inverse_dispersion.exp()
    softplus_pi, log_theta = functional.softplus(-pi), torch.log(theta + eps)
    log_theta_mean = torch.log(theta + mean + eps)
    pi_theta_log = -pi + theta * (log_theta - log_theta_mean)
    zero = functional.softplus(pi_theta_log) - softplus_pi
    other = (
        -softplus_pi + pi_theta_log + x * (torch.log(mean + eps) - log_theta_mean)
        + torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
    )  # fmt: skip
    log_px = ((x < eps).float() * zero + (x > eps).float() * other).sum(1)
    return (standard_kl(mu, logvar) - log_px).mean()


def _ours_cells(model: Any, x: Tensor) -> Tensor:
    q = model["encoder"](torch.log1p(x))
    options = {"likelihood": model["likelihood"], "size_factor": x.sum(1)}
    return -fastvae.elbo(x, q, model["decoder"], **options)


CELLS = Case(
    "SCVI, 2000 genes",
    {"batch": 128, "genes": 2000, "hidden": 128, "latent": 10},
    {"batch": 5, "genes": 30, "hidden": 9, "latent": 3},
    _build_cells, _eager_cells, _ours_cells,
)  # fmt: skip


# 9. Sentences: a GRU that is given the words before, and ignores the padding.

PAD = 0


class Sentences(nn.Module):
    """Encoder and decoder with one embedding."""

    def __init__(self, words: int, width: int, hidden: int, latent: int):
        super().__init__()
        self.embedding = nn.Embedding(words, width, padding_idx=PAD)
        self.encoder = nn.GRU(width, hidden, batch_first=True)
        self.to_q = nn.Linear(hidden, 2 * latent)
        self.to_hidden = nn.Linear(latent, hidden)
        self.decoder = nn.GRU(width, hidden, batch_first=True)
        self.output = nn.Linear(hidden, words)

    def q(self, x: Tensor) -> Tensor:
        return self.to_q(self.encoder(self.embedding(x))[1][0])

    def decode(self, z: Tensor, before: Tensor) -> Tensor:
        """Return the logits of each word, [N, positions, words]."""
        start = torch.tanh(self.to_hidden(z))[None]
        return self.output(self.decoder(self.embedding(before), start)[0])


def _build_text(
    batch: int, positions: int, words: int, width: int, hidden: int, latent: int
) -> tuple[nn.Module, Any]:
    x = torch.randint(1, words, (batch, positions))
    lengths = torch.randint(positions // 3, positions + 1, (batch, 1))
    x = torch.where(torch.arange(positions) < lengths, x, PAD)
    before = functional.pad(x[:, :-1], (1, 0), value=1)
    return Sentences(words, width, hidden, latent), (x, before)


def _eager_text(model: Any, batch: Any, noise: Noise) -> Tensor:
    x, before = batch
    mu, logvar = model.q(x).chunk(2, 1)
    z = mu + noise(*mu.shape) * torch.exp(0.5 * logvar)
    logits = model.decode(z, before)
    loss = functional.cross_entropy(logits.flatten(0, 1), x.flatten(), ignore_index=PAD, reduction="sum")
    return loss / len(x) + standard_kl(mu, logvar).mean()


TEXT_LIKELIHOOD = Categorical(ignore_index=PAD, axis=-1)


def _ours_text(model: Any, batch: Any) -> Tensor:
    x, before = batch

    def decoder(z: Tensor, before: Tensor) -> Tensor:
        return model.decode(z, before)

    return -fastvae.elbo(x, model.q(x), decoder, likelihood=TEXT_LIKELIHOOD, context=before)


TEXT = Case(
    "text, 30 of 5000 words",
    {"batch": 32, "positions": 30, "words": 5000, "width": 128, "hidden": 128, "latent": 16},
    {"batch": 4, "positions": 6, "words": 20, "width": 5, "hidden": 9, "latent": 3},
    _build_text, _eager_text, _ours_text,
)  # fmt: skip
