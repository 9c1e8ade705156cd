"""``python -m benchmarks head_memory``: write docs/head.csv: memory and time over K.

Peak growth of a process for the bound and all gradients, from the input of the decoder's last layer, and the
CPU time it takes on one thread: each case in a separate process. ``python -m docs.pictures head`` draws it.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from pathlib import Path

import torch

from .head import eager, fused, inputs, stored
from .memory import peak_mib
from .report import processor

TABLE = Path(__file__).parents[1] / "docs" / "head.csv"
BATCH, HIDDEN, PIXELS = 100, 200, 784
SAMPLES = (10, 50, 200, 500, 1000, 2000)
FUSED = "fastvae, fused head"
IMPLEMENTATIONS = {
    FUSED: fused,
    "fastvae, output stored": stored,
    "torch.compile": eager,
    "eager PyTorch": eager,
}


def child(which: str, k: int) -> None:
    """Print MiB and seconds of a step."""
    torch.set_num_threads(1)
    run = IMPLEMENTATIONS[which]
    if which == "torch.compile":
        run = torch.compile(run, dynamic=False)

    def step(given: tuple[torch.Tensor, ...]) -> None:
        torch.autograd.grad(run(*given), given[1:])

    given = inputs(k, BATCH, HIDDEN, PIXELS)
    # One-time costs: threads, the compiler's code.
    step(given if which == "torch.compile" else inputs(2, BATCH, HIDDEN, PIXELS))
    before = peak_mib(reset=True)
    step(given)
    grown, seconds = peak_mib() - before, []
    for _ in range(5):
        start = time.process_time()
        step(given)
        seconds.append(time.process_time() - start)
    print(grown, sorted(seconds)[2])


def measured() -> dict[str, dict[int, tuple[float, float]]]:
    """Return MiB and seconds by K."""
    found: dict[str, dict[int, tuple[float, float]]] = {which: {} for which in IMPLEMENTATIONS}
    for k in SAMPLES:
        for which, by_k in found.items():
            command = [sys.executable, "-m", "benchmarks.head_memory", "child", which, str(k)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            by_k[k] = tuple(map(float, out.split()))  # type: ignore[assignment]
            mib, seconds = by_k[k]
            ratios = " ".join(f"{a / b:.2f}" for a, b in zip(by_k[k], found[FUSED][k], strict=True))
            print(f"K={k:5} {which:24} {mib:8.0f} MiB {seconds * 1e3:9.1f} ms   ({ratios})", flush=True)
    return found


def write(found: dict[str, dict[int, tuple[float, float]]], path: Path) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["implementation", "K", "MiB", "seconds"])
        for which, by_k in found.items():
            rows.writerows([which, k, f"{mib:.1f}", f"{s:.6f}"] for k, (mib, s) in by_k.items())
        rows.writerow([f"machine: {processor()}; torch {torch.__version__}", "", "", ""])


def main(arguments: list[str] | None = None) -> int:
    description = __doc__.split("\n\n")[0]
    argparse.ArgumentParser(prog="python -m benchmarks head_memory", description=description).parse_args(
        arguments
    )
    write(measured(), TABLE)
    print(f"wrote {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[2], int(sys.argv[3])) if sys.argv[1:2] == ["child"] else main())
