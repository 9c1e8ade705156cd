"""``python -m benchmarks single_cell``: scvi-tools' model of counts against the same networks in fastvae.

One scvi.model.SCVI (negative binomial, a dispersion per gene, observed library sizes) on simulated counts.
Its encoder and decoder are used unchanged: by scvi-tools' own loss and ``get_marginal_ll``, and by
``fastvae.elbo`` and ``fastvae.evaluate``. Prints both values of the objective for the same z, the time of a
training step, and time, memory and value of log p(x). Needs ``pip install scvi-tools``.
"""

from __future__ import annotations

import argparse
import logging
import resource
import statistics
import sys
import time
import warnings
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import fastvae
from fastvae.likelihoods import NegativeBinomial

HIDDEN, LATENT, BATCH = 128, 10, 128


def counts(cells: int, genes: int, seed: int = 0) -> np.ndarray:
    """Draw negative binomial counts of three kinds of cells, nine in ten of them 0."""
    draw = np.random.default_rng(seed)
    kinds = draw.integers(3, size=cells)
    profile = np.exp(1.2 * draw.standard_normal((3, genes)))
    profile /= profile.sum(1, keepdims=True)
    size = np.exp(0.4 * draw.standard_normal((cells, 1))) * 0.22 * genes
    theta = np.exp(0.5 * draw.standard_normal(genes) - 0.3)
    mean = profile[kinds] * size
    return draw.poisson(draw.gamma(theta, mean / theta)).astype(np.float32)


class Encoder(nn.Module):
    """Encoder x [B, genes] -> (mu, logvar), by scvi-tools' networks."""

    def __init__(self, module: Any):
        super().__init__()
        self.body = module.z_encoder

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        body = self.body
        h = body.encoder(torch.log1p(x), torch.zeros(len(x), 1))
        return body.mean_encoder(h), torch.log(torch.exp(body.var_encoder(h)) + body.var_eps)


class Decoder(nn.Module):
    """Decoder z [N, latent] -> log shares of the genes, by scvi-tools' networks."""

    def __init__(self, module: Any):
        super().__init__()
        self.body = module.decoder

    def forward(self, z: Tensor) -> Tensor:
        h = self.body.px_decoder(z, torch.zeros(len(z), 1))
        return torch.log_softmax(self.body.px_scale_decoder[0](h), 1)


def build(cells: int, genes: int, epochs: int) -> tuple[Any, Tensor]:
    """Train scvi-tools' model for some epochs; return it and the counts."""
    import anndata
    import scvi

    logging.getLogger("scvi").setLevel(logging.ERROR)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    x = counts(cells, genes)
    data = anndata.AnnData(x)
    scvi.settings.seed = 0
    scvi.model.SCVI.setup_anndata(data)
    model = scvi.model.SCVI(
        data, n_hidden=HIDDEN, n_latent=LATENT, n_layers=1, dropout_rate=0.0, gene_likelihood="nb"
    )
    options = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu"}
    model.train(max_epochs=epochs, batch_size=BATCH, train_size=1.0, **options)
    return model, torch.from_numpy(x)


def likelihood(module: Any) -> NegativeBinomial:
    return NegativeBinomial(torch.exp(module.px_r))


def batch_of(x: Tensor) -> dict[str, Tensor]:
    """Return a batch as from scvi-tools' loader."""
    zeros = torch.zeros(len(x), 1, dtype=torch.long)
    return {"X": x, "batch": zeros, "labels": zeros}


def agree(model: Any, x: Tensor) -> float:
    """Return the largest relative difference of both libraries' log p(x|z) for the same z."""
    module = model.module.eval()
    with torch.no_grad():
        q = module.inference(x, torch.zeros(len(x), 1))
        theirs = module.generative(q["z"], q["library"], torch.zeros(len(x), 1))["px"].log_prob(x).sum(1)
        log_mean = Decoder(module)(q["z"])
        given = fastvae.core.nested.Conditioning(size_factor=x.sum(1))
        ours = likelihood(module).log_likelihood(x, log_mean, 1, given)[0]
    return float(((ours - theirs) / theirs).abs().max())


def steps(model: Any, x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Measure seconds of a training step, forward, backward and Adam, interleaved."""
    module = model.module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)
    encoder, decoder = Encoder(module), Decoder(module)
    generator = torch.Generator().manual_seed(1)

    def theirs(x: Tensor) -> Tensor:
        return module(batch_of(x), loss_kwargs={"kl_weight": 1.0})[2].loss

    def ours(x: Tensor) -> Tensor:
        options = {"likelihood": likelihood(module), "size_factor": x.sum(1)}
        return -fastvae.elbo(x, encoder(x), decoder, **options)

    times: dict[str, list[float]] = {"scvi-tools": [], "fastvae": []}
    for _ in range(rounds + 3):
        rows = x[torch.randperm(len(x), generator=generator)[:BATCH]]
        for name, loss in (("scvi-tools", theirs), ("fastvae", ours)):
            start = time.perf_counter()
            optimizer.zero_grad()
            loss(rows).backward()
            optimizer.step()
            times[name].append(time.perf_counter() - start)
    return {name: values[3:] for name, values in times.items()}


def marginal(
    who: str, cells: int, genes: int, epochs: int, k: int, threads: int
) -> tuple[float, float, float]:
    """Return mean log p(x), seconds, and the growth in MiB of this process, which does nothing else."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    model, x = build(cells, genes, epochs)
    module = model.module.eval()
    encoder, decoder = Encoder(module), Decoder(module)

    def run(k: int) -> float:
        if who == "scvi-tools":
            # Per cell: its own mean is that of batch means, and the last batch has fewer cells.
            each = model.get_marginal_ll(n_mc_samples=k, batch_size=BATCH, return_mean=False)
            return float(each.double().mean())
        vae = fastvae.VAE(encoder, decoder, likelihood=likelihood(module))
        result = fastvae.evaluate(
            vae, x, k=k, batch_size=BATCH, progress=False,
            prepare_batch=lambda rows: {"x": rows, "size_factor": rows.sum(1)},
        )  # fmt: skip
        return -result.nll

    with torch.no_grad():
        run(2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        value = run(k)
        seconds = time.perf_counter() - start
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return value, seconds, grown / 1024


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks single_cell", description=__doc__)
    parser.add_argument("--cells", type=int, default=2000)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument(
        "--epochs", type=int, default=5, help="epochs of training by scvi-tools beforehand (default: 5)"
    )
    parser.add_argument("--k", type=int, default=200, help="draws per example for log p(x) (default: 200)")
    parser.add_argument("--rounds", type=int, default=100, help="timed training steps (default: 100)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args(arguments)
    try:
        import scvi
    except ImportError:
        print("single_cell needs scvi-tools: pip install scvi-tools", file=sys.stderr)
        return 1
    warnings.simplefilter("ignore")
    torch.set_num_threads(args.threads)
    model, x = build(args.cells, args.genes, args.epochs)
    share = float((x == 0).float().mean())
    print(
        f"scvi-tools {scvi.__version__}, torch {torch.__version__}, {args.threads} threads; {args.cells} "
        f"cells of {args.genes} genes, {share:.0%} zeros; {HIDDEN} hidden, {LATENT} latent, batch {BATCH}"
    )
    print(f"log p(x|z) of the same z: largest relative difference {agree(model, x[:BATCH]):.1e}")
    times = steps(model, x, args.rounds)
    ratio = [a / b for a, b in zip(times["scvi-tools"], times["fastvae"], strict=True)]
    low, middle, high = np.percentile(ratio, (20, 50, 80))
    for name, values in times.items():
        print(f"training step, {name}: {1e3 * statistics.median(values):.2f} ms")
    print(f"  ratio {middle:.2f} (p20 {low:.2f}, p80 {high:.2f})")
    settings = args.cells, args.genes, args.epochs, args.k, args.threads
    for name in ("scvi-tools", "fastvae"):
        with get_context("spawn").Pool(1) as pool:
            value, seconds, grown = pool.apply(marginal, (name, *settings))
        print(f"log p(x), K={args.k}, {name}: {value:.2f} nats per cell, {seconds:.1f} s, + {grown:.0f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
