"""Tables: TVAE's columns of two kinds, and ten features of one kind with a small network."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastvae
from fastvae.likelihoods import Columns, Gaussian, Joint

from .case import LOG_2PI, Case, Noise, mlp, standard_kl
from .images import Pair

# 7. TVAE: numeric columns are Gaussian around a tanh, the others classes.


def _classes(columns: int) -> list[int]:
    return [2 + i for i in range(columns)]


def _build_tvae(
    batch: int, numeric: int, categorical: int, hidden: int, latent: int
) -> tuple[nn.Module, Any]:
    classes = _classes(categorical)
    width = numeric + sum(classes)
    body = nn.Sequential(mlp(width, hidden, hidden), nn.ReLU())
    named = Columns([(f"c{i}", "categorical", c) for i, c in enumerate(classes)])
    likelihood = Joint(numeric=Gaussian(torch.full((numeric,), 0.1), learned=True), classes=named)
    model = nn.ModuleDict(
        {
            "encoder": Pair(body, hidden, latent),
            "decoder": mlp(latent, hidden, hidden, width),
            "likelihood": likelihood,
        }
    )
    numbers, drawn = 2 * torch.rand(batch, numeric) - 1, [torch.randint(c, (batch,)) for c in classes]
    one_hot = [functional.one_hot(d, c).float() for d, c in zip(drawn, classes, strict=True)]
    return model, (torch.cat((numbers, *one_hot), 1), {"numeric": numbers, "classes": torch.stack(drawn, 1)})


def _eager_tvae(model: Any, batch: Any, noise: Noise) -> Tensor:
    x, columns = batch
    mu, logvar = model["encoder"](x)
    z = mu + noise(*mu.shape) * torch.exp(0.5 * logvar)
    recon = model["decoder"](z)
    log_sigma = model["likelihood"].parts["numeric"].log_scale
    numeric = log_sigma.shape[0]
    loss = []
    for i in range(numeric):
        error = x[:, i] - torch.tanh(recon[:, i])
        loss.append((error**2 / 2 / torch.exp(2 * log_sigma[i])).sum() + log_sigma[i] * len(x))
    start = numeric
    for c in _classes(columns["classes"].shape[1]):
        part = slice(start, start + c)
        loss.append(functional.cross_entropy(recon[:, part], x[:, part].argmax(-1), reduction="sum"))
        start += c
    return 2 * sum(loss) / len(x) + standard_kl(mu, logvar).mean()


def _ours_tvae(model: Any, batch: Any) -> Tensor:
    x, columns = batch
    numeric = columns["numeric"].shape[1]

    def decoder(z: Tensor) -> dict[str, Tensor]:
        recon = model["decoder"](z)
        return {"numeric": torch.tanh(recon[:, :numeric]), "classes": recon[:, numeric:]}

    options = {"likelihood": model["likelihood"], "beta": 0.5}
    return -2 * fastvae.elbo(columns, model["encoder"](x), decoder, **options)


TVAE = Case(
    "TVAE, 10 + 10 columns",
    {"batch": 500, "numeric": 10, "categorical": 10, "hidden": 128, "latent": 128},
    {"batch": 6, "numeric": 3, "categorical": 2, "hidden": 9, "latent": 4},
    _build_tvae, _eager_tvae, _ours_tvae, lambda batch: LOG_2PI * batch[1]["numeric"].shape[1],
)  # fmt: skip


# Ten features and a small network, where Python's own time counts.


def _build_small(likelihood: str, batch: int, features: int, hidden: int, latent: int) -> tuple[Any, Tensor]:
    outputs = 2 * features if likelihood == "gaussian" else features
    encoder, decoder = mlp(features, hidden, 2 * latent), mlp(latent, hidden, outputs)
    x = torch.randn(batch, features)
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    return model, (x > 0).float() if likelihood == "bernoulli" else x


def _eager_small(likelihood: str, model: Any, x: Tensor, noise: Noise) -> Tensor:
    mu, logvar = model["encoder"](x).chunk(2, 1)
    z = mu + noise(*mu.shape) * torch.exp(0.5 * logvar)
    output = model["decoder"](z)
    if likelihood == "gaussian":
        mean, spread = output.chunk(2, 1)
        loss = 0.5 * (math.log(2 * math.pi) + spread + (x - mean).pow(2) / spread.exp()).sum(1)
    elif likelihood == "MSE":
        loss = 0.5 * functional.mse_loss(output, x, reduction="none").sum(1)
    else:
        loss = functional.binary_cross_entropy_with_logits(output, x, reduction="none").sum(1)
    return (loss + standard_kl(mu, logvar)).mean()


UNIT = Gaussian(scale=1.0)


def _ours_small(likelihood: str, model: Any, x: Tensor) -> Tensor:
    decoder = model["decoder"]
    if likelihood == "gaussian":
        return -fastvae.elbo(x, model["encoder"](x), lambda z: decoder(z).chunk(2, 1))
    named = UNIT if likelihood == "MSE" else likelihood
    return -fastvae.elbo(x, model["encoder"](x), decoder, likelihood=named)


def _small(likelihood: str, batch: int, latent: int) -> Case:
    sizes = {"features": 10, "hidden": 32, "latent": latent}
    functions = [functools.partial(f, likelihood) for f in (_build_small, _eager_small, _ours_small)]
    name = f"ten features, {likelihood[0].upper() + likelihood[1:]}, batch {batch}"
    left_out = 0.5 * LOG_2PI * sizes["features"] if likelihood == "MSE" else 0.0
    return Case(name, {"batch": batch, **sizes}, {"batch": 7, **sizes}, *functions, lambda batch: left_out)


SMALL = [
    _small("gaussian", 64, 2),
    _small("bernoulli", 64, 2),
    _small("gaussian", 512, 5),
    _small("MSE", 64, 2),
]
