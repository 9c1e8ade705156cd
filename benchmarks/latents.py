"""``python -m benchmarks latents``: the demo with each posterior and each prior, for docs/latents.md.

Every posterior with a standard normal prior, and every prior with a diagonal posterior: the demo's two models
of scikit-learn's digits, trained with the ELBO and with IWAE-50. Printed are log p(x) of the test images, the
difference to the first row image by image, and the gap, log p(x) − ELBO. Results of each run are kept in a
folder, so that a table that was interrupted goes on, and seeds can be added.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae.cli import demo
from fastvae.cli.latents import DIAGONAL, POSTERIORS, PRIORS, STANDARD

EVAL_K, K = 5000, 50
PAIRS = [(q, STANDARD) for q in POSTERIORS] + [(DIAGONAL, p) for p in PRIORS if p != STANDARD]
HEAD = """\
| posterior | prior | ELBO: log p(x) | to the first | gap | IWAE-50: log p(x) | to the first | gap |
|---|---|---|---|---|---|---|---|"""


def result(folder: Path, images: demo.Images, objective: int | None, **settings: Any) -> dict[str, Tensor]:
    """Bounds and log p(x) of each test image [N], made now or kept from before."""
    name = "-".join(str(v) for v in (*settings.values(), objective or "elbo"))
    path = folder / f"{name}.pt"
    if not path.exists():
        architecture = {"pixels": 64, "hidden": 128, "latent": settings["latent"]}
        architecture |= {name: settings[name] for name in ("posterior", "prior")}
        began = time.perf_counter()
        run = demo.train(name, objective, images, architecture, settings["epochs"], EVAL_K, settings["seed"])
        train = torch.tensor(run.train_curve[-1])
        seconds = torch.tensor(time.perf_counter() - began)
        found = {"log_px": run.log_px, "elbo": run.elbo, "ess": run.ess, "train": train, "seconds": seconds}
        torch.save(found, path)
    return torch.load(path)


def said(values: Tensor, sign: str = "") -> str:
    """Mean and standard error over the images of [seeds, N]."""
    of_each = values.double().mean(0)
    error = (of_each.std() / math.sqrt(len(of_each))).item()
    return f"{of_each.mean().item():{sign}.2f} ± {error:.2f}".replace("-", "−")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks latents", description=__doc__)
    parser.add_argument("--latent", type=int, default=2, help="latent dimensions (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="means are over these (default: 0)")
    parser.add_argument("--names", nargs="+", help="some of the rows, by posterior or prior; default: all")
    parser.add_argument("--out", type=Path, default=Path("demo-latents"), help="where results are kept")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    images, first = demo.digits(), None
    print(HEAD, flush=True)
    for posterior, prior in PAIRS:
        chosen = options.names is None or (posterior, prior) == PAIRS[0]
        if not chosen and not {posterior, prior} & {*options.names} - {DIAGONAL, STANDARD}:
            continue
        cells, values = [f"`{posterior}`", f"`{prior}`"], []
        for number, objective in enumerate((None, K)):
            with demo.threads(1):
                runs = [
                    result(
                        options.out, images, objective, posterior=posterior, prior=prior,
                        latent=options.latent, epochs=options.epochs, seed=seed,
                    )
                    for seed in options.seeds
                ]  # fmt: skip
            log_px, elbo = (torch.stack([r[name] for r in runs]) for name in ("log_px", "elbo"))
            values.append(log_px)
            cells += [said(log_px), "" if first is None else said(log_px - first[number], "+")]
            cells.append(said(log_px - elbo))
        first = values if first is None else first
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0
