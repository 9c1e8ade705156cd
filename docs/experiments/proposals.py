"""``python -m docs.experiments.proposals --data FOLDER``: proposals on MNIST, for docs/proposals.md.

Trains models 784-200-200-50 by each objective, keeps them in ``--models`` so that an interrupted run goes on,
and estimates log p(x) of test images by each proposal and by annealed importance sampling.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import fastvae
from fastvae.cli.images import idx_folder

LATENTS, HIDDEN, BATCH, RATE = 50, 200, 100, 1e-3
OBJECTIVES: dict[str, Callable[[fastvae.VAE, Tensor], Tensor]] = {
    "elbo": lambda vae, x: vae.elbo(x),
    "iwae5": lambda vae, x: vae.iwae(x, k=5),
    "iwae50": lambda vae, x: vae.iwae(x, k=50, estimator="dreg"),
}
PROPOSALS = (("posterior", 5000), ("adapted", 5000), ("refined", 500), ("refined", 5000))


def network(*sizes: int) -> nn.Sequential:
    """Return linear layers with tanh between them."""
    layers: list[nn.Module] = []
    for first, last in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(first, last), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def trained(name: str, train: Tensor, epochs: int, folder: Path) -> fastvae.VAE:
    """Return a model trained by an objective, from its file if there is one."""
    torch.manual_seed(0)
    pixels = train.shape[1]
    encoder, decoder = network(pixels, HIDDEN, HIDDEN, 2 * LATENTS), network(LATENTS, HIDDEN, HIDDEN, pixels)
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli")
    file = folder / f"{name}-{epochs}.pt"
    if file.exists():
        vae.load_state_dict(torch.load(file))
        return vae.eval()
    optimizer = torch.optim.Adam(vae.parameters(), lr=RATE)
    for epoch in range(epochs):
        x = torch.bernoulli(train)
        for batch in x[torch.randperm(len(x))].split(BATCH):
            optimizer.zero_grad()
            loss = -OBJECTIVES[name](vae, batch)
            loss.backward()
            optimizer.step()
        print(f"{name}: epoch {epoch + 1}, {-float(loss):.2f} nats", file=sys.stderr)
    torch.save(vae.state_dict(), file)
    return vae.eval()


def report(name: str, vae: fastvae.VAE, x: Tensor, annealed: int) -> None:
    """Print a row for each proposal, and one by annealed importance sampling of the first examples."""
    for proposal, k in PROPOSALS:
        begin = time.process_time()
        noise = torch.Generator().manual_seed(0)
        r = vae.evaluate(x, k=k, proposal=proposal, generator=noise, progress=False)
        print(
            f"| {name} | `{proposal}`, {k} | {-r.nll:.3f} | {float(r.log_px_stderr.mean()):.3f} | "
            f"{100 * r.untrusted:.1f} % | {float(r.ess.median()):.0f} | {time.process_time() - begin:.1f} |"
        )
    begin = time.process_time()
    ais = vae.ais(x[:annealed], steps=1000, k=16, generator=torch.Generator().manual_seed(0))
    error = float(ais.log_px_stderr.square().sum().sqrt()) / annealed
    print(
        f"{name}: the first {annealed} by AIS {float(ais.log_px.mean()):.3f} ± {error:.3f} in "
        f"{time.process_time() - begin:.0f} s, by refined draws {float(r.log_px[:annealed].mean()):.3f}"
    )


# The picture's points: draws of each proposal, and steps of the annealing.
POINTS = {
    "posterior": (100, 500, 2000, 5000, 20_000),
    "adapted": (500, 2000, 5000, 20_000),
    "refined": (100, 500, 2000, 5000, 20_000),
    "AIS": (100, 300, 1000),
}


def measure(vae: fastvae.VAE, x: Tensor) -> list[tuple[str, int, float, float]]:
    """Return name, draws or steps, CPU seconds per example and mean log p(x) of each point."""
    found = []
    for name, counts in POINTS.items():
        for count in counts:
            noise, begin = torch.Generator().manual_seed(1), time.process_time()
            if name == "AIS":
                log_px = vae.ais(x, steps=count, k=16, generator=noise).log_px
            else:
                log_px = vae.log_marginal(x, k=count, proposal=name, generator=noise).log_px
            seconds = (time.process_time() - begin) / len(x)
            found.append((name, count, seconds, float(log_px.mean())))
            print(f"{name} {count}: {found[-1][3]:.3f} nats, {1e3 * seconds:.1f} ms", file=sys.stderr)
    return found


def write(points: list[tuple[str, int, float, float]], path: Path) -> None:
    """Write the numbers of the picture, which ``python -m docs.pictures proposals`` draws."""
    rows = ["method,draws or steps,CPU seconds per image,log p(x)"]
    rows += [f"{name},{count},{seconds:.6f},{value:.4f}" for name, count, seconds, value in points]
    path.write_text("\n".join(rows) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.experiments.proposals", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST's IDX files")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of trained models")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--images", type=int, default=300, help="test images")
    parser.add_argument("--annealed", type=int, default=300, help="test images for AIS")
    parser.add_argument("--drawn", type=int, default=100, help="test images for the picture")
    parser.add_argument("--table", type=Path, help="write this CSV file of the first objective instead")
    options = parser.parse_args()
    options.models.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    images = idx_folder(options.data)
    if options.table:
        vae = trained(options.objectives[0], images.train, options.epochs, options.models)
        write(measure(vae, images.test[: options.drawn]), options.table)
        return
    print("| trained by | proposal, draws | log p(x) | stderr, mean | k̂ > 0.7 | ESS, median | CPU s |")
    print("|---|---|---|---|---|---|---|")
    for name in options.objectives:
        vae = trained(name, images.train, options.epochs, options.models)
        report(name, vae, images.test[: options.images], options.annealed)


if __name__ == "__main__":
    main()
