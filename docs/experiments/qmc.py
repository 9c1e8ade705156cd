"""``python -m docs.experiments.qmc``: errors of log p̂(x) by independent and by quasi-Monte-Carlo draws.

Uses linear-Gaussian models, whose log p(x) is known, and decoders trained on scikit-learn's digits, whose
log p(x) is a sum over a grid for two latents, and otherwise from 2^17 draws, for examples with k̂ below 0.7.
The ratios of mean squared errors, over all examples and of the median one, give the factor of independent
draws with the same error; ``covered`` is the fraction of log p(x) within the stated 95 % interval.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastvae
from fastvae.likelihoods import Gaussian

SIZES = 256, 1024, 4096, 8192
# Quantiles at 97.5 %: Student's with the randomisations' seven degrees of freedom, and the normal's.
QUANTILE = {"qmc": 2.3646, "philox": 1.96}


def linear(d: int, rows: int) -> tuple[Any, ...]:
    """Return x, q, decoder and log p(x) of a linear-Gaussian model of 8 features, with an inexact q."""
    g = torch.Generator().manual_seed(d)
    w = torch.randn(8, d, generator=g, dtype=torch.float64) / math.sqrt(d)
    scale = torch.linalg.cholesky(w @ w.mT + torch.eye(8, dtype=torch.float64))
    x = torch.randn(rows, 8, generator=g, dtype=torch.float64) @ scale.mT
    precision = torch.eye(d, dtype=torch.float64) + w.mT @ w
    mu = torch.linalg.solve(precision, w.mT @ x.mT).mT + 0.4 / math.sqrt(d)
    logvar = (-precision.diagonal().log() + 0.2).expand(rows, d)
    zero = torch.zeros(8, dtype=torch.float64)
    log_px = torch.distributions.MultivariateNormal(zero, scale_tril=scale).log_prob(x)
    return x.float(), (mu.float(), logvar.float()), lambda z: z @ w.mT.float(), log_px


def digits(d: int, epochs: int) -> tuple[fastvae.VAE, Tensor]:
    """Train a VAE on 1500 digits; return it and 50 others."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().data).float() / 16
    torch.manual_seed(d)
    train, test = images[:1500], torch.bernoulli(images[1500:1550])
    nn = torch.nn
    encoder = nn.Sequential(nn.Linear(64, 200), nn.Tanh(), nn.Linear(200, 2 * d))
    decoder = nn.Sequential(nn.Linear(d, 200), nn.Tanh(), nn.Linear(200, 64))
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli")
    adam = torch.optim.Adam(vae.parameters(), lr=2e-3)
    for _ in range(epochs):
        for batch in train[torch.randperm(len(train))].split(100):
            adam.zero_grad()
            (-vae.elbo(torch.bernoulli(batch))).backward()
            adam.step()
    return vae, test


def on_grid(vae: fastvae.VAE, x: Tensor) -> Tensor:
    """Compute log p(x) for two latents by the trapezoidal rule."""
    axis = torch.linspace(-7, 7, 701)
    z = torch.cartesian_prod(axis, axis)
    parts = []
    for some in z.split(2**15):
        logits = vae.decoder(some)
        log_p = x @ logits.mT - torch.nn.functional.softplus(logits).sum(1)
        parts.append((log_p - 0.5 * some.square().sum(1) - math.log(2 * math.pi)).double().logsumexp(1))
    return torch.stack(parts).logsumexp(0) + 2 * math.log(14 / 700)


def measure(name: str, log_marginal: Callable[..., fastvae.LogMarginal], log_px: Tensor, copies: int) -> None:
    """Print a row of the table for each number of draws; log_px is [copies · N]."""
    for k in SIZES:
        errors, results = {}, {}
        for noise in ("philox", "qmc"):
            start = time.perf_counter()
            found = log_marginal(k=k, noise=noise, generator=torch.Generator().manual_seed(k))
            seconds = time.perf_counter() - start
            error = found.log_px.double() - log_px
            covered = float((error.abs() <= QUANTILE[noise] * found.log_px_stderr).double().mean())
            errors[noise] = error.square().unflatten(0, (copies, -1)).mean(0)  # per example
            rms = float(errors[noise].mean().sqrt())
            results[noise] = f"{rms:.2e} | {100 * covered:.0f} % | {seconds:.2f} s"
        ratio = float(errors["philox"].mean() / errors["qmc"].mean())
        median = float((errors["philox"] / errors["qmc"]).median())
        print(
            f"| {name} | {k} | {results['philox']} | {results['qmc']} | {ratio:.3g} | {median:.3g} |",
            flush=True,
        )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.experiments.qmc", description=__doc__)
    parser.add_argument("--epochs", type=int, default=60, help="training epochs (default: %(default)s)")
    parser.add_argument(
        "--copies", type=int, default=16, help="copies of each example (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    copies = options.copies
    print("| model | K | philox: rms | covered | time | qmc: rms | covered | time | ratio of MSE | median |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    for d in (2, 8, 50):
        x, q, decoder, log_px = linear(d, 50)
        x, q = x.repeat(copies, 1), tuple(t.repeat(copies, 1) for t in q)
        exact = functools.partial(fastvae.log_marginal, x, q, decoder, likelihood=Gaussian(scale=1.0))
        measure(f"linear, D = {d}", exact, log_px.repeat(copies), copies)
    for d in (2, 8, 50):
        vae, x = digits(d, options.epochs)
        with torch.no_grad():
            truth = vae.log_marginal(x, k=2**17, noise="qmc", generator=torch.Generator().manual_seed(0))
            log_px = on_grid(vae, x) if d == 2 else truth.log_px.double()
        fine = truth.khat < 0.7
        trained = functools.partial(vae.log_marginal, x[fine].repeat(copies, 1))
        measure(f"digits, D = {d} ({int(fine.sum())})", trained, log_px[fine].repeat(copies), copies)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
