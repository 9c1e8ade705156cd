"""Images: the VAE of PyTorch's examples, a convolutional one, IWAE, MIWAE, β-TC, M2 and the VampPrior."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastvae

from .case import Case, Noise, log_normal, mlp, standard_kl

PIXELS = 784


class Pair(nn.Module):
    """Encoder x -> (mu, logvar) with a layer each."""

    def __init__(self, body: nn.Module, hidden: int, latent: int):
        super().__init__()
        self.body, self.mu, self.logvar = body, nn.Linear(hidden, latent), nn.Linear(hidden, latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return self.mu(h), self.logvar(h)


def _images(batch: int, pixels: int = PIXELS) -> Tensor:
    return torch.rand(batch, pixels).round()


# 1. Cross-entropy of an image's pixels.


def _build_bce(batch: int, pixels: int, hidden: int, latent: int) -> tuple[nn.Module, Tensor]:
    body = nn.Sequential(nn.Linear(pixels, hidden), nn.ReLU())
    decoder = mlp(latent, hidden, pixels)
    return nn.ModuleDict({"encoder": Pair(body, hidden, latent), "decoder": decoder}), _images(batch, pixels)


def _eager_bce(model: Any, x: Tensor, noise: Noise) -> Tensor:
    mu, logvar = model["encoder"](x)
    z = mu + noise(*mu.shape) * torch.exp(0.5 * logvar)
    recon = torch.sigmoid(model["decoder"](z))
    bce = functional.binary_cross_entropy(recon, x, reduction="sum")
    return (bce + standard_kl(mu, logvar).sum()) / len(x)


def _ours_bce(model: Any, x: Tensor) -> Tensor:
    return -fastvae.elbo(x, model["encoder"](x), model["decoder"], likelihood="bernoulli")


BCE = Case(
    "image VAE, BCE",
    {"batch": 128, "pixels": PIXELS, "hidden": 400, "latent": 20},
    {"batch": 7, "pixels": 12, "hidden": 9, "latent": 3},
    _build_bce, _eager_bce, _ours_bce,
)  # fmt: skip


# 2. Mean squared error of a convolutional decoder.


def _block(kind: Any, n: int, m: int, **options: int) -> nn.Sequential:
    layer = kind(n, m, 3, stride=2, padding=1, **options)
    return nn.Sequential(layer, nn.BatchNorm2d(m), nn.LeakyReLU())


def _build_conv(batch: int, size: int, channels: int, latent: int) -> tuple[nn.Module, Tensor]:
    c, side = channels, size // 8
    body = nn.Sequential(
        _block(nn.Conv2d, 3, c), _block(nn.Conv2d, c, 2 * c), _block(nn.Conv2d, 2 * c, 4 * c), nn.Flatten()
    )
    decoder = nn.Sequential(
        nn.Linear(latent, 4 * c * side**2),
        nn.Unflatten(1, (4 * c, side, side)),
        _block(nn.ConvTranspose2d, 4 * c, 2 * c, output_padding=1),
        _block(nn.ConvTranspose2d, 2 * c, c, output_padding=1),
        _block(nn.ConvTranspose2d, c, c, output_padding=1),
        nn.Conv2d(c, 3, 3, padding=1),
        nn.Tanh(),
    )
    encoder = Pair(body, 4 * c * side**2, latent)
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder}), 2 * torch.rand(batch, 3, size, size) - 1


WEIGHT = 0.00025
MSE = fastvae.likelihoods.Gaussian(scale=0.5**0.5)


def _eager_conv(model: Any, x: Tensor, noise: Noise) -> Tensor:
    mu, logvar = model["encoder"](x)
    recon = model["decoder"](mu + noise(*mu.shape) * torch.exp(0.5 * logvar))
    return functional.mse_loss(recon, x) + WEIGHT * standard_kl(mu, logvar).mean()


def _ours_conv(model: Any, x: Tensor) -> Tensor:
    numbers = x.numel() // len(x)
    beta = WEIGHT * numbers
    return fastvae.elbo(x, model["encoder"](x), model["decoder"], likelihood=MSE, beta=beta) / -numbers


CONV = Case(
    "convolutional VAE, MSE",
    {"batch": 32, "size": 32, "channels": 32, "latent": 64},
    {"batch": 5, "size": 8, "channels": 2, "latent": 3},
    _build_conv, _eager_conv, _ours_conv, lambda x: 0.5 * math.log(math.pi),
)  # fmt: skip


# 3. and 4. Importance weights, of whole images and of images with missing pixels.


def _build_iwae(batch: int, pixels: int, hidden: int, latent: int) -> tuple[nn.Module, Tensor]:
    body = nn.Sequential(mlp(pixels, hidden, hidden, activation=nn.Tanh), nn.Tanh())
    decoder = mlp(latent, hidden, hidden, pixels, activation=nn.Tanh)
    return nn.ModuleDict({"encoder": Pair(body, hidden, latent), "decoder": decoder}), _images(batch, pixels)


def _log_weights(mu: Tensor, logvar: Tensor, z: Tensor, log_px: Tensor) -> Tensor:
    log_p = log_normal(z, 0.0, torch.zeros_like(z)).sum(-1)
    return log_px + log_p - log_normal(z, mu, logvar).sum(-1)


def _eager_iwae(model: Any, x: Tensor, noise: Noise, k: int = 50) -> Tensor:
    mu, logvar = model["encoder"](x)
    z = mu + noise(k, *mu.shape) * torch.exp(0.5 * logvar)
    logits = model["decoder"](z)
    bce = functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    log_w = _log_weights(mu, logvar, z, -bce.sum(-1))
    return -(torch.logsumexp(log_w, 0) - math.log(k)).mean()


def _ours_iwae(model: Any, x: Tensor) -> Tensor:
    return -fastvae.iwae(x, model["encoder"](x), model["decoder"], k=50, likelihood="bernoulli")


IWAE = Case(
    "IWAE, K=50",
    {"batch": 20, "pixels": PIXELS, "hidden": 200, "latent": 50},
    {"batch": 4, "pixels": 12, "hidden": 9, "latent": 3},
    _build_iwae, _eager_iwae, _ours_iwae,
)  # fmt: skip


def _build_evaluation(batch: int, pixels: int, hidden: int, latent: int) -> tuple[nn.Module, Tensor]:
    model, x = _build_iwae(batch, pixels, hidden, latent)
    return fastvae.VAE(model["encoder"], model["decoder"], likelihood="bernoulli"), x


def _eager_evaluation(model: Any, x: Tensor, noise: Noise, k: int = 1000, chunk: int = 100) -> Tensor:
    mu, logvar = model.encoder(x)
    found = []
    for eps in noise(k, *mu.shape).split(chunk):
        z = mu + eps * torch.exp(0.5 * logvar)
        logits = model.decoder(z)
        bce = functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
        found.append(_log_weights(mu, logvar, z, -bce.sum(-1)))
    return -(torch.logsumexp(torch.cat(found), 0) - math.log(k)).mean()


def _ours_evaluation(model: Any, x: Tensor) -> Tensor:
    return -model.log_marginal(x, k=1000).log_px.mean()


EVALUATION = Case(
    "log p(x), K=1000",
    {"batch": 16, "pixels": PIXELS, "hidden": 200, "latent": 50},
    {"batch": 4, "pixels": 12, "hidden": 9, "latent": 3},
    _build_evaluation, _eager_evaluation, _ours_evaluation, trains=False,
)  # fmt: skip


def _build_missing(batch: int, pixels: int, hidden: int, latent: int) -> tuple[nn.Module, Any]:
    body = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh())
    decoder = mlp(latent, hidden, pixels, activation=nn.Tanh)
    model = nn.ModuleDict({"encoder": Pair(body, hidden, latent), "decoder": decoder})
    return model, (_images(batch, pixels), torch.rand(batch, pixels) > 0.5)


def _eager_missing(model: Any, batch: Any, noise: Noise, k: int = 50) -> Tensor:
    x, mask = batch
    x = x * mask
    mu, logvar = model["encoder"](x)
    z = mu + noise(k, *mu.shape) * torch.exp(0.5 * logvar)
    logits = model["decoder"](z)
    bce = functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    log_w = _log_weights(mu, logvar, z, -(bce * mask).sum(-1))
    return -(torch.logsumexp(log_w, 0) - math.log(k)).mean()


def _ours_missing(model: Any, batch: Any) -> Tensor:
    x, mask = batch
    q = model["encoder"](torch.where(mask, x, 0))
    return -fastvae.iwae(x, q, model["decoder"], k=50, likelihood="bernoulli", mask=mask)


MISSING = Case(
    "missing pixels, K=50",
    {"batch": 16, "pixels": PIXELS, "hidden": 200, "latent": 50},
    {"batch": 4, "pixels": 12, "hidden": 9, "latent": 3},
    _build_missing, _eager_missing, _ours_missing,
)  # fmt: skip


# 10. Total correlation by minibatch-weighted sampling.

DATA_SET = 60_000


def _build_tc(batch: int, pixels: int, hidden: int, latent: int) -> tuple[nn.Module, Tensor]:
    encoder, decoder = mlp(pixels, hidden, 2 * latent), mlp(latent, hidden, pixels)
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder}), _images(batch, pixels)


def _eager_tc(model: Any, x: Tensor, noise: Noise) -> Tensor:
    mu, logvar = model["encoder"](x).chunk(2, 1)
    z = mu + noise(*mu.shape) * torch.exp(0.5 * logvar)
    bce = functional.binary_cross_entropy_with_logits(model["decoder"](z), x, reduction="none").sum(1)
    batch, latent = z.shape
    every = log_normal(z[:, None], mu[None], logvar[None])
    log_qz = torch.logsumexp(every.sum(2), 1) - math.log(batch * DATA_SET)
    log_product = (torch.logsumexp(every, 1) - math.log(batch * DATA_SET)).sum(1)
    log_q = log_normal(z, mu, logvar).sum(1)
    log_p = log_normal(z, 0.0, torch.zeros_like(z)).sum(1)
    return (bce + (log_q - log_qz) + 6 * (log_qz - log_product) + (log_product - log_p)).mean()


def _ours_tc(model: Any, x: Tensor) -> Tensor:
    options = {"beta": 6.0, "dataset_size": DATA_SET, "likelihood": "bernoulli"}
    return -fastvae.beta_tc(x, model["encoder"](x), model["decoder"], **options)


TC = Case(
    "β-TC",
    {"batch": 64, "pixels": PIXELS, "hidden": 400, "latent": 16},
    {"batch": 5, "pixels": 12, "hidden": 9, "latent": 3},
    _build_tc, _eager_tc, _ours_tc,
)  # fmt: skip


# 11. M2: labels for half of the batch, all classes enumerated for the other half.


def _build_m2(batch: int, pixels: int, hidden: int, latent: int, classes: int) -> tuple[nn.Module, Any]:
    model = nn.ModuleDict(
        {
            "classifier": mlp(pixels, hidden, classes),
            "encoder": mlp(pixels + classes, hidden, 2 * latent),
            "decoder": mlp(latent + classes, hidden, pixels),
        }
    )
    labels = torch.randint(classes, (batch // 2,))
    one_hot = functional.one_hot(labels, classes).float()
    return model, (_images(batch // 2, pixels), labels, one_hot, _images(batch - batch // 2, pixels))


ALPHA = 50.0


def _eager_m2(model: Any, batch: Any, noise: Noise) -> Tensor:
    labelled, labels, one_hot, x = batch
    classes = one_hot.shape[1]

    def negative_elbo(x: Tensor, y: Tensor) -> Tensor:
        mu, logvar = model["encoder"](torch.cat((x, y), 1)).chunk(2, 1)
        z = mu + noise(*mu.shape) * torch.exp(0.5 * logvar)
        logits = model["decoder"](torch.cat((z, y), 1))
        bce = functional.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
        return bce + standard_kl(mu, logvar) + math.log(classes)

    loss = negative_elbo(labelled, one_hot).mean()
    loss = loss + ALPHA * functional.cross_entropy(model["classifier"](labelled), labels)
    repeated = x.repeat_interleave(classes, 0)
    every = torch.eye(classes, device=x.device).repeat(len(x), 1)
    each = negative_elbo(repeated, every).view(len(x), classes)
    log_q = functional.log_softmax(model["classifier"](x), 1)
    return loss + (log_q.exp() * (each + log_q)).sum(1).mean()


def _ours_m2(model: Any, batch: Any) -> Tensor:
    labelled, labels, one_hot, x = batch
    classes = one_hot.shape[1]

    def decoder(z: Tensor, y: Tensor) -> Tensor:
        return model["decoder"](torch.cat((z, y), 1))

    def bound(x: Tensor, y: Tensor, reduction: str = "none") -> Tensor:
        q = model["encoder"](torch.cat((x, y), 1))
        return fastvae.elbo(x, q, decoder, likelihood="bernoulli", context=y, reduction=reduction)

    loss = math.log(classes) - bound(labelled, one_hot, "mean")
    loss = loss + ALPHA * functional.cross_entropy(model["classifier"](labelled), labels)
    return loss - fastvae.marginalize(x, bound, log_q=model["classifier"](x))


M2 = Case(
    "M2, semi-supervised",
    {"batch": 100, "pixels": PIXELS, "hidden": 500, "latent": 50, "classes": 10},
    {"batch": 7, "pixels": 12, "hidden": 9, "latent": 3, "classes": 4},
    _build_m2, _eager_m2, _ours_m2,
)  # fmt: skip


# 12. A mixture of the posteriors of learned pseudo-inputs as the prior.


def _build_vamp(batch: int, pixels: int, hidden: int, latent: int, pseudo: int) -> tuple[nn.Module, Tensor]:
    encoder, decoder = mlp(pixels, hidden, hidden, 2 * latent), mlp(latent, hidden, hidden, pixels)
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    model.pseudo_inputs = nn.Parameter(torch.rand(pseudo, pixels))
    return model, _images(batch, pixels)


def _eager_vamp(model: Any, x: Tensor, noise: Noise) -> Tensor:
    mu, logvar = model["encoder"](x).chunk(2, 1)
    z = mu + noise(*mu.shape) * torch.exp(0.5 * logvar)
    bce = functional.binary_cross_entropy_with_logits(model["decoder"](z), x, reduction="none").sum(1)
    means, logvars = model["encoder"](model.pseudo_inputs).chunk(2, 1)
    each = log_normal(z[:, None], means[None], logvars[None]).sum(2) - math.log(len(means))
    return (bce + log_normal(z, mu, logvar).sum(1) - torch.logsumexp(each, 1)).mean()


def _ours_vamp(model: Any, x: Tensor) -> Tensor:
    prior = fastvae.distributions.VampPrior(model["encoder"], model.pseudo_inputs)
    options = {"prior": prior, "kl": "mc", "likelihood": "bernoulli"}
    return -fastvae.elbo(x, model["encoder"](x), model["decoder"], **options)


VAMP = Case(
    "VampPrior, 500 pseudo-inputs",
    {"batch": 100, "pixels": PIXELS, "hidden": 300, "latent": 40, "pseudo": 500},
    {"batch": 5, "pixels": 12, "hidden": 9, "latent": 3, "pseudo": 6},
    _build_vamp, _eager_vamp, _ours_vamp,
)  # fmt: skip
