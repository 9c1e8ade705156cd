"""``python -m benchmarks qmc``: errors of log p̂(x) by independent draws and by quasi-Monte-Carlo ones.

On linear-Gaussian models, whose log p(x) is known, and on decoders trained on scikit-learn's digits, whose log
p(x) is taken from 2^17 draws. The ratio of the mean squared errors says how many times as many independent
draws would do; ``covered`` is the share of log p(x) within the stated 95 % interval.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import fastvae

SIZES = 256, 1024, 4096, 8192
# Student's quantile at 97.5 %, of the randomisations' seven degrees of freedom, and the normal's.
QUANTILE = {"qmc": 2.3646, "philox": 1.96}


def linear(d: int, rows: int) -> tuple[Any, ...]:
    """x, q, decoder and log p(x) of a linear-Gaussian model of 8 numbers, q's mean and scales off."""
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
    """A VAE trained on 1500 digits, and 50 others."""
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().data).float() / 16
    train, test = images[:1500], (images[1500:1550] > 0.5).float()
    torch.manual_seed(d)
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


def measure(name: str, log_marginal: Callable[..., fastvae.LogMarginal], log_px: Tensor) -> None:
    """A row of the table for each number of draws."""
    for k in SIZES:
        errors, said = {}, {}
        for noise in ("philox", "qmc"):
            start = time.perf_counter()
            found = log_marginal(k=k, noise=noise, generator=torch.Generator().manual_seed(k))
            error = found.log_px.double() - log_px
            covered = float((error.abs() <= QUANTILE[noise] * found.stderr).double().mean())
            seconds = time.perf_counter() - start
            errors[noise] = float(error.square().mean().sqrt())
            said[noise] = f"{errors[noise]:.2e} | {100 * covered:.0f} % | {seconds:.2f} s"
        ratio = (errors["philox"] / errors["qmc"]) ** 2
        print(f"| {name} | {k} | {said['philox']} | {said['qmc']} | {ratio:.3g} |", flush=True)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks qmc", description=__doc__)
    parser.add_argument("--epochs", type=int, default=60, help="of training (default: %(default)s)")
    parser.add_argument("--copies", type=int, default=16, help="of each example (default: %(default)s)")
    options = parser.parse_args(arguments)
    print("| model | K | rms error, philox | covered | time | rms error, qmc | covered | time | ratio of MSE |")
    print("|---|---|---|---|---|---|---|---|---|")
    for d in (2, 8, 50):
        x, q, decoder, log_px = linear(d, 50 * options.copies)
        likelihood = fastvae.Gaussian(scale=1.0)

        def exact(x: Any = x, q: Any = q, decoder: Any = decoder, **kwargs: Any) -> fastvae.LogMarginal:
            return fastvae.log_marginal(x, q, decoder, likelihood=likelihood, **kwargs)  # noqa: B023

        measure(f"linear, D = {d}", exact, log_px)
    for d in (2, 8, 50):
        vae, test = digits(d, options.epochs)
        generator = torch.Generator().manual_seed(0)
        truth = vae.log_marginal(test, k=2**17, noise="qmc", generator=generator)
        x = test.repeat(options.copies, 1)

        def trained(vae: fastvae.VAE = vae, x: Tensor = x, **kwargs: Any) -> fastvae.LogMarginal:
            return vae.log_marginal(x, **kwargs)

        measure(f"digits, D = {d}", trained, truth.log_px.double().repeat(options.copies))
        median = float(truth.ess.median() / 2**17)
        print(f"<!-- D = {d}: ESS {100 * median:.0f} % of K, khat {float(truth.khat.median()):.2f} -->")
    return 0
