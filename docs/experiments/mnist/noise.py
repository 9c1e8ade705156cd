"""Signal-to-noise ratio of the encoder's gradient over K, on a trained model."""

from __future__ import annotations

import csv
import math
from pathlib import Path

from torch import Tensor

import fastvae

NOISE = Path(__file__).parents[2] / "published-noise.csv"
DRAWS = (1, 4, 16, 64, 256, 1024)
ESTIMATORS = ("iwae", "dreg", "stl")


def of_finite_variance(vae: fastvae.VAE, x: Tensor, khat: float, images: int) -> Tensor:
    """Return the first images whose Pareto k̂ of 4096 draws is below ``khat``.

    Below 1/n the weights have n finite moments.
    """
    return x[vae.evaluate(x, k=4096).khat < khat][:images]


def ratios(vae: fastvae.VAE, x: Tensor, evaluations: int) -> list[tuple[str, int, float, float]]:
    """Return estimator, K, the encoder's signal-to-noise ratio and the floor of pure noise, for a batch."""
    found = []
    for name in ESTIMATORS:
        for k in DRAWS:
            bound = lambda k=k, name=name: vae.iwae(x, k=k, estimator=name)  # noqa: E731
            snr = fastvae.diagnostics.gradient_snr(bound, vae, evaluations=evaluations)
            found.append((name, k, math.sqrt(max(0.0, snr.squared["encoder"])), snr.floor))
            print(f"{name}, K = {k}: {found[-1][2]:.4f}", flush=True)
    return found


def write(rows: list[tuple[str, int, float, float]], file: Path = NOISE) -> None:
    """Write the ratios to a file."""
    with file.open("w", newline="") as to:
        table = csv.writer(to, lineterminator="\n")
        table.writerow(("estimator", "K", "signal-to-noise", "floor"))
        table.writerows([(name, k, f"{value:.5f}", f"{floor:.5f}") for name, k, value, floor in rows])


def slope(rows: list[tuple[str, int, float, float]], name: str, first: int) -> float:
    """Return the exponent of K by least squares of the logarithms, from a number of draws on."""
    points = [(math.log(k), math.log(value)) for n, k, value, _ in rows if n == name and k >= first and value]
    mean = [sum(p[i] for p in points) / len(points) for i in (0, 1)]
    return sum((a - mean[0]) * (b - mean[1]) for a, b in points) / sum((a - mean[0]) ** 2 for a, _ in points)
