"""Evaluation of trained models, one line each in a file of results."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import torch
from torch import Tensor

from .training import Trained

RESULTS = Path(__file__).parents[2] / "published.csv"
COLUMNS = (
    *("run", "epochs", "training seconds", "device", "images", "active units"),
    *("q: NLL", "q: stderr, images", "q: stderr, draws", "q: jackknife", "q: khat > 0.7 %", "q: seconds"),
    *("refined: images", "refined: NLL", "refined: stderr, draws", "refined: khat > 0.7 %"),
    *("q on these", "refined: seconds", "AIS: images", "AIS: NLL", "AIS: stderr", "refined on these"),
    "AIS: seconds",
)


def evaluated(name: str, run: Trained, test: Tensor, k: int, refined: int, annealed: int) -> dict[str, str]:
    """Return a line of the results: log p(x) by k draws of q, refined draws and annealing.

    Args:
        name: name of the run.
        run: its model.
        test: test images [N, pixels], all of them for q.
        k: draws per image.
        refined: number of images, the first ones, for the refined proposal.
        annealed: number of images for annealed importance sampling.
    """
    vae, device = run.vae, test.device
    noise = lambda: torch.Generator(device).manual_seed(0)  # noqa: E731
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times = [clock()]
    q = vae.evaluate(test, k=k, generator=noise(), progress=False)
    times.append(clock())
    better = vae.evaluate(test[:refined], k=k, proposal="refined", generator=noise(), progress=False)
    times.append(clock())
    ais = vae.ais(test[:annealed], steps=1000, k=16, generator=noise())
    times.append(clock())
    used = [f"{b - a:.0f}" for a, b in zip(times, times[1:], strict=False)]
    error = float(ais.log_px_stderr.square().sum().sqrt()) / annealed
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, one thread"
    values = (
        *(name, str(run.epochs), f"{run.seconds:.0f}", what, str(len(test)), str(q.active_units)),
        *(f"{q.nll:.3f}", f"{q.stderr:.3f}", f"{q.mc_stderr:.3f}", f"{q.nll_jackknife:.3f}"),
        *(f"{100 * q.untrusted:.1f}", used[0], str(refined), f"{better.nll:.3f}", f"{better.mc_stderr:.3f}"),
        *(f"{100 * better.untrusted:.1f}", f"{-float(q.log_px[:refined].mean()):.3f}", used[1]),
        *(str(annealed), f"{-float(ais.log_px.mean()):.3f}", f"{error:.3f}"),
        *(f"{-float(better.log_px[:annealed].mean()):.3f}", used[2]),
    )
    return dict(zip(COLUMNS, values, strict=True))


def write(line: dict[str, str], file: Path = RESULTS) -> None:
    """Write a line in place of the run's last one of as many epochs."""
    lines = [old for old in read(file) if (old["run"], old["epochs"]) != (line["run"], line["epochs"])]
    with file.open("w", newline="") as to:
        table = csv.DictWriter(to, COLUMNS, lineterminator="\n")
        table.writeheader()
        table.writerows(sorted([*lines, line], key=lambda entry: (entry["run"], int(entry["epochs"]))))


def read(file: Path = RESULTS) -> list[dict[str, str]]:
    """Return the lines of a file of results; none if it does not exist."""
    if not file.exists():
        return []
    with file.open(newline="") as source:
        return list(csv.DictReader(source))
