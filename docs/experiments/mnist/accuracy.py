"""Error of estimates of log p(x) over their time, on a trained model."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import torch
from torch import Tensor

import fastvae

ACCURACY = Path(__file__).parents[2] / "published-accuracy.csv"
COLUMNS = ("proposal", "draws", "seconds", "bias", "rms error", "khat > 0.7 %")
# Proposals with their draws per image, or the tolerance that stops them. The truth is the refined proposal's
# with TRUTH draws.
METHODS: tuple[tuple[str, int | None, float | None], ...] = (
    *(("posterior", k, None) for k in (50, 500, 5000)),
    ("posterior", 5000, 0.1),
    ("defensive", 5000, None),
    *(("adapted", k, None) for k in (500, 5000)),
    *(("refined", k, None) for k in (50, 500, 5000)),
    ("refined", 5000, 0.1),
)
TRUTH = 50_000


def errors(vae: fastvae.VAE, test: Tensor, truth: int = TRUTH) -> list[tuple[str, ...]]:
    """Return a row for each of METHODS: bias and root mean squared error of log p(x), in nats per image.

    Args:
        vae: the model.
        test: images [N, pixels].
        truth: draws of the refined proposal, of other noise, whose estimates count as true.
    """

    def estimate(
        proposal: str, k: int | None, tol: float | None, seed: int
    ) -> tuple[float, fastvae.Evaluation]:
        begin = time.process_time()
        noise = torch.Generator(test.device).manual_seed(seed)
        found = vae.evaluate(test, k=k, tol=tol, proposal=proposal, generator=noise, progress=False)
        return time.process_time() - begin, found

    true = estimate("refined", truth, None, 1)[1].log_px
    rows = []
    for proposal, k, tol in METHODS:
        seconds, found = estimate(proposal, k, tol, 2)
        error = found.log_px - true
        numbers = float(error.mean()), float(error.square().mean().sqrt())
        drawn = f"{float(found.k.double().mean()):.0f}" + (f", tol={tol}" if tol else "")
        untrusted = f"{100 * found.untrusted:.0f}"
        rows.append((proposal, drawn, f"{seconds:.1f}", *(f"{n:.3f}" for n in numbers), untrusted))
    return rows


def write(rows: list[tuple[str, ...]], file: Path = ACCURACY) -> None:
    """Write the rows to a CSV file."""
    with file.open("w", newline="") as to:
        writer = csv.writer(to, lineterminator="\n")
        writer.writerows([COLUMNS, *rows])
