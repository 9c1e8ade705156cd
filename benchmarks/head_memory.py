"""``python -m benchmarks head_memory``: draw docs/head.png: memory and time over K.

Peak growth of a process for the bound and all gradients, from the input of the decoder's last layer, and the
time it takes: each case in a separate process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch

from .head import eager, fused, inputs, stored
from .memory import peak_mib
from .report import processor

PICTURE = Path(__file__).parents[1] / "docs" / "head.png"
BATCH, HIDDEN, PIXELS = 100, 200, 784
SAMPLES = (10, 50, 200, 500, 1000, 2000)
FUSED = "fastvae, fused head"
IMPLEMENTATIONS = {
    FUSED: (fused, "#1f77b4"),
    "fastvae, output stored": (stored, "#7fb2d9"),
    "torch.compile": (eager, "#777777"),
    "eager PyTorch": (eager, "#bbbbbb"),
}


def child(which: str, k: int) -> None:
    """Print MiB and seconds of a step."""
    run, _ = IMPLEMENTATIONS[which]
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
        start = time.perf_counter()
        step(given)
        seconds.append(time.perf_counter() - start)
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


def draw(found: dict[str, dict[int, tuple[float, float]]]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for i, (ax, label) in enumerate(zip(axes, ("peak memory (MiB)", "seconds"), strict=True)):
        for which, by_k in found.items():
            color = IMPLEMENTATIONS[which][1]
            ax.plot(list(by_k), [v[i] for v in by_k.values()], "o-", color=color, label=which)
        ax.set(xscale="log", yscale="log", xlabel=f"K, samples of each of {BATCH} images", ylabel=label)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_title("Memory of the bound and its gradients", fontsize=10)
    axes[1].set_title("Time, forward + backward", fontsize=10)
    axes[0].legend(frameon=False, fontsize=8)
    note = f"last layer {HIDDEN} to {PIXELS}, Bernoulli; {processor()}, torch {torch.__version__}"
    figure.supxlabel(note, fontsize=7, x=0.99, ha="right")
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    description = __doc__.split("\n\n")[0]
    argparse.ArgumentParser(prog="python -m benchmarks head_memory", description=description).parse_args(
        arguments
    )
    draw(measured())
    print(f"wrote {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[2], int(sys.argv[3])) if sys.argv[1:2] == ["child"] else main())
