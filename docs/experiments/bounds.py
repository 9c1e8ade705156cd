"""``python -m docs.experiments.bounds``: the demo's digits, trained with each bound, for docs/bounds.md.

One model (64-128-128-8 and back, binarised anew in each pass), 64 samples per example in each step for every
bound, on several seeds. Prints, for the test images and over the seeds, the IWAE-64 bound, log p(x) with 5000
draws, and the gaps of the bound and of the ELBO, which measure the distance of the encoder from the
posterior; each with the standard deviation over the seeds. Each run's results are kept in a folder, so that
an interrupted table can be resumed, and seeds added.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvae
from fastvae.cli import training
from fastvae.cli.images import Images, digits
from fastvae.objectives.bounds import CIWAE, IWAE, TVO, Jackknife, UStatistic, WakePhi

from .latents import kept

EVAL_K, K = 5000, 64
# Objective and encoder's bound, by the papers' names: (M, K) of MIWAE and PIWAE.
METHODS: dict[str, dict[str, Any]] = {
    "VAE": {"objective": IWAE(groups=64)},
    "IWAE": {"objective": IWAE()},
    "IWAE, DReG": {"objective": IWAE(estimator="dreg")},
    "IWAE, STL": {"objective": IWAE(estimator="stl")},
    "MIWAE(4, 16)": {"objective": IWAE(groups=4)},
    "MIWAE(8, 8)": {"objective": IWAE(groups=8)},
    "PIWAE(4, 16)": {"objective": IWAE(), "q_objective": IWAE(groups=4)},
    "PIWAE(8, 8)": {"objective": IWAE(), "q_objective": IWAE(groups=8)},
    "CIWAE(0.05)": {"objective": CIWAE(0.05)},
    "CIWAE(0.5)": {"objective": CIWAE(0.5)},
    "VR-IWAE(0.5)": {"objective": IWAE(alpha=0.5)},
    "VR-IWAE(0.5), DReG": {"objective": IWAE(alpha=0.5, estimator="dreg")},
    "U-statistic of 8": {"objective": UStatistic(8, permutations=8)},
    "jackknife, DReG": {"objective": Jackknife("dreg")},
    "TVO": {"objective": TVO()},
    "wake–wake": {"objective": IWAE(), "q_objective": WakePhi()},
}


def result(images: Images, name: str, settings: Any, seed: int) -> dict[str, Tensor]:
    """Return bounds and log p(x) of each test image [N], computed or read from the cache."""

    def train() -> dict[str, Tensor]:
        architecture = {"pixels": 64, "hidden": 128, "latent": settings.latent}
        bound = functools.partial(fastvae.bound, k=K, **METHODS[name])
        title = f"{name}, {seed}"
        run = training.train(title, K, images, architecture, settings.epochs, EVAL_K, seed, bound)
        iwae = training.bound_on_test(run.model, images.test, K)
        return {"log_px": run.log_px, "elbo": run.elbo, "iwae": iwae}

    file = f"{name.replace(' ', '')}-{settings.latent}-{settings.epochs}-{seed}.pt"
    return kept(settings.out / file, train)


def cell(values: Tensor) -> str:
    """Format the mean over seeds and the standard deviation."""
    spread = f" ± {values.std().item():.2f}" if len(values) > 1 else ""
    return f"{values.mean().item():.2f}{spread}".replace("-", "−")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.experiments.bounds", description=__doc__)
    parser.add_argument("--latent", type=int, default=8, help="latent dimensions (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=60, help="default: %(default)s")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--names", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("demo-bounds"), help="folder for the results")
    settings = parser.parse_args(arguments)
    settings.out.mkdir(parents=True, exist_ok=True)
    images = digits()
    columns = "bound", "IWAE-64", f"log p(x), K={EVAL_K}", "IWAE-64 − log p(x)", "ELBO − log p(x)"
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for name in settings.names:
        runs = [result(images, name, settings, seed) for seed in settings.seeds]
        iwae, log_px, elbo = (
            torch.stack([run[n].double().mean() for run in runs]) for n in ("iwae", "log_px", "elbo")
        )
        cells = [name, *(cell(v) for v in (iwae, log_px, iwae - log_px, elbo - log_px))]
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
