"""A whole training by plain PyTorch, eager and compiled, and by fastvae, with the same noise."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

import fastvae
from fastvae.random import draw_seed, normal

from .runs import RUNS, build

COMPARED = Path(__file__).parents[2] / "published-training.csv"
BATCH, RATE = 100, 1e-3
Loss = Callable[[fastvae.VAE, Tensor, int], Tensor]


def plain(vae: fastvae.VAE, x: Tensor, eps: Tensor) -> Tensor:
    """Return the loss as it is written without fastvae: IWAE; for one draw the ELBO, with the analytic KL."""
    mu, logvar = vae.encoder(x).chunk(2, 1)
    z = mu + (0.5 * logvar).exp() * eps
    logits = vae.decoder(z.flatten(0, 1)).unflatten(0, eps.shape[:2])
    log_p = -binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none").sum(-1)
    if len(eps) == 1:
        kl = 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)
        return (kl - log_p[0]).mean()
    log_w = log_p + 0.5 * (eps.square() + logvar - z.square()).sum(-1)
    return (math.log(len(eps)) - log_w.logsumexp(0)).mean()


def ours(vae: fastvae.VAE, x: Tensor, k: int) -> Tensor:
    """Return the loss by fastvae."""
    return -(vae.elbo(x) if k == 1 else vae.iwae(x, k=k))


def compared(train: Tensor, k: int, epochs: int) -> list[tuple[str, int, int, float, float]]:
    """Train three models alike; return name, K, epoch, CPU seconds so far and the epoch's mean bound."""
    compiled = torch.compile(plain, dynamic=False)

    def by(function: Callable[[fastvae.VAE, Tensor, Tensor], Tensor]) -> Loss:
        def loss(vae: fastvae.VAE, x: Tensor, k: int) -> Tensor:
            return function(vae, x, normal(draw_seed(), k, len(x), RUNS["vae-1"].latents))

        return loss

    losses: dict[str, Loss] = {"eager": by(plain), "torch.compile": by(compiled), "fastvae": ours}
    models, optimizers = {}, {}
    for name in losses:
        torch.manual_seed(0)
        models[name] = build(RUNS["vae-1"], train)
        optimizers[name] = torch.optim.Adam(models[name].parameters(), lr=RATE, fused=True)
    used, rows = dict.fromkeys(losses, 0.0), []
    losses["torch.compile"](models["torch.compile"], train[:BATCH].round(), k).backward()  # compiles
    optimizers["torch.compile"].zero_grad()
    # In turns, so that a busy machine slows all of them.
    for epoch in range(epochs):
        noise = torch.Generator().manual_seed(epoch)
        x = torch.bernoulli(train, generator=noise)
        order = torch.randperm(len(x), generator=noise).split(BATCH)
        for name, loss in losses.items():
            torch.manual_seed(epoch)
            vae, optimizer, total = models[name], optimizers[name], 0.0
            begin = time.process_time()
            for batch in order:
                optimizer.zero_grad()
                value = loss(vae, x[batch], k)
                value.backward()
                optimizer.step()
                total -= float(value.detach()) * len(batch)
            used[name] += time.process_time() - begin
            rows.append((name, k, epoch + 1, used[name], total / len(x)))
            print(
                f"{name}, K = {k}, epoch {epoch + 1}: {rows[-1][4]:.4f} nats, {used[name]:.1f} s", flush=True
            )
    return rows


def write(rows: list[tuple[str, int, int, float, float]], file: Path = COMPARED) -> None:
    """Write the curves to a file, in place of those of the same K."""
    found = [(n, str(k), str(e), f"{s:.2f}", f"{v:.5f}") for n, k, e, s, v in rows]
    if file.exists():
        with file.open(newline="") as source:
            old = [tuple(line) for line in csv.reader(source)][1:]
        found = [line for line in old if line[1] != found[0][1]] + found
    with file.open("w", newline="") as to:
        table = csv.writer(to, lineterminator="\n")
        table.writerow(("by", "K", "epoch", "CPU seconds", "bound"))
        table.writerows(found)
