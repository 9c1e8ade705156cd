"""``python -m docs.experiments.cells``: log p(x) of held-out cells under scvi-tools' model.

For docs/published.md. The cells come from a generator whose log p(x) is a sum: the truth. Each likelihood's
SCVI is trained by scvi-tools with the true depth as the size factor; log p(x) is estimated by scvi-tools'
``get_marginal_ll`` and by ``fastvae.integrations.scvi.evaluate``. Needs ``pip install scvi-tools``.
"""

from __future__ import annotations

import argparse
import csv
import logging
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae

RESULTS = Path(__file__).parents[1] / "published-cells.csv"
LIKELIHOODS = ("nb", "zinb", "poisson")
TYPES, LATENTS, THETA, SEED = 5, 4, 2.0, 0


class Cells(NamedTuple):
    """Counts [N, G], the depth [N] of sequencing, and the generator's log p(x) given it, [N]."""

    counts: Tensor
    depth: Tensor
    truth: Tensor


def simulated(cells: int, genes: int) -> Cells:
    """Draw negative binomial counts of a type of cell, an activity N(0, 1) and a depth."""
    profile = 1.2 * torch.randn(TYPES, genes) - 1.0
    response = 0.6 * torch.randn(genes) * (torch.rand(genes) < 0.3)
    shares = torch.softmax(0.5 * torch.randn(TYPES), 0)
    kind = torch.multinomial(shares, cells, replacement=True)
    depth = torch.exp(0.6 * torch.randn(cells))
    mean = depth[:, None] * torch.exp(profile[kind] + torch.randn(cells, 1) * response)
    theta = torch.tensor(THETA)
    counts = torch.poisson(mean * torch.distributions.Gamma(theta, theta).sample(mean.shape))
    # The sum over types, and the integral over activities by the trapezoidal rule, whose error is below 1e-6.
    grid = torch.linspace(-6, 6, 241)
    weight = torch.log_softmax(-0.5 * grid**2, 0) + shares.log()[:, None]
    log_mean = (profile[:, None] + grid[:, None] * response).flatten(0, 1)[:, None]
    truth = [
        torch.logsumexp(
            fastvae.ops.negative_binomial_log_prob(x, log_mean + d.log()[:, None], theta.log())
            + weight.flatten()[:, None],
            0,
        )
        for x, d in zip(counts.split(100), depth.split(100), strict=True)
    ]
    return Cells(counts, depth, torch.cat(truth))


def trained(cells: Cells, train: int, likelihood: str, epochs: int) -> Any:
    """Return scvi-tools' SCVI trained on the first cells."""
    import anndata
    import scvi

    data = anndata.AnnData(cells.counts.numpy())
    data.obs["depth"] = cells.depth.numpy()
    scvi.settings.seed = SEED
    scvi.model.SCVI.setup_anndata(data, size_factor_key="depth")
    model = scvi.model.SCVI(data, n_latent=LATENTS, gene_likelihood=likelihood)
    rows = torch.arange(len(cells.counts)).numpy()
    model.train(
        max_epochs=epochs,
        accelerator="cpu",
        datasplitter_kwargs={"external_indexing": [rows[:train], rows[train:]]},
        enable_progress_bar=False,
        logger=False,
        enable_checkpointing=False,
    )
    return model


def rows(cells: int, genes: int, train: int, epochs: int, k: int) -> list[dict[str, str]]:
    """Return a line for each likelihood."""
    from fastvae.integrations.scvi import evaluate

    torch.manual_seed(SEED)
    data = simulated(cells, genes)
    test = list(range(train, cells))
    truth = data.truth[train:]
    found = []
    for likelihood in LIKELIHOODS:
        model = trained(data, train, likelihood, epochs)
        line = {"likelihood": likelihood, "cells": str(len(test)), "draws": str(k)}
        line["truth"] = f"{truth.mean():.2f}"
        start = time.process_time()
        theirs = torch.as_tensor(
            model.get_marginal_ll(
                indices=test, n_mc_samples=k, n_mc_samples_per_pass=min(k, 100), return_mean=False
            )
        )
        line["get_marginal_ll"] = f"{theirs.mean():.2f}"
        line["get_marginal_ll: seconds"] = f"{time.process_time() - start:.0f}"
        for proposal in ("posterior", "adapted"):
            start = time.process_time()
            ours = evaluate(model, indices=test, k=k, proposal=proposal, progress=False)
            line[proposal] = f"{-ours.nll:.2f}"
            line[f"{proposal}: seconds"] = f"{time.process_time() - start:.0f}"
            line[f"{proposal}: stderr, draws"] = f"{ours.mc_stderr:.3f}"
            line[f"{proposal}: khat > 0.7 %"] = f"{100 * ours.untrusted:.1f}"
        gap = truth - ours.log_px
        line["below the truth"] = f"{gap.mean():.2f}"
        line["below the truth: stderr, cells"] = f"{gap.std() / len(gap) ** 0.5:.2f}"
        print(line, flush=True)
        found.append(line)
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.experiments.cells", description=__doc__)
    parser.add_argument("--cells", type=int, default=4500)
    parser.add_argument("--genes", type=int, default=200)
    parser.add_argument("--train", type=int, default=4000, help="training cells; the others are held out")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--draws", type=int, default=5000)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args(arguments)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    found = rows(options.cells, options.genes, options.train, options.epochs, options.draws)
    with options.results.open("w", newline="") as file:
        writer = csv.DictWriter(file, found[0])
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
