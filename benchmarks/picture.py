"""``python -m benchmarks picture``: draw docs/front.png: time of a call, memory over K.

Left: overhead of an objective (``python -m benchmarks frontend``, one thread). Right: peak growth of a
process that estimates log p(x) with K draws, each case in a separate process.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import fastvae

from . import frontend
from .measure import keep_memory
from .memory import IMAGES, peak_mib
from .objectives import PIXELS, model_of
from .report import processor

PICTURE = Path(__file__).parents[1] / "docs" / "front.png"
DRAWS = (50, 200, 1000, 4000, 16_000, 64_000)
MOST_AT_ONCE = 16_000  # draws for which plain PyTorch needs 2.4 GB
COLORS = {"fastvae": "#1f77b4", "eager PyTorch": "#bbbbbb", "torch.compile": "#777777"}


def times(rounds: int) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return microseconds (20th, 50th, 80th percentile) of each case and implementation."""
    found = {}
    for likelihood in frontend.LIKELIHOODS:
        for case in frontend.CASES:
            inputs = frontend.make(case, likelihood)
            runs = frontend.implementations(case, likelihood, inputs, compiled=True)
            measured = frontend.measure(runs, rounds)
            compiled = min(
                (v for n, v in measured.items() if n.startswith("torch.compile")), key=statistics.median
            )
            bound = f"IWAE-{case.k}" if case.k else "ELBO"
            name = f"{bound}\n{case.batch}×{case.pixels}\n{likelihood}"
            columns = dict(zip(COLORS, (measured[frontend.OURS], measured["eager"], compiled), strict=True))
            found[name] = {
                n: (statistics.quantiles(v, n=5)[0], statistics.median(v), statistics.quantiles(v, n=5)[3])
                for n, v in columns.items()
            }
    return found


def child(which: str, draws: int) -> None:
    """Print the growth in MiB over the process's memory after the same call with few draws."""
    model = model_of((200,), 50)
    x = torch.rand(IMAGES, PIXELS).round()
    q = model["encoder"](x).chunk(2, dim=1)

    @torch.no_grad()
    def call(k: int) -> None:
        if which == "fastvae":
            fastvae.log_marginal(x, q, model["decoder"], k=k, likelihood="bernoulli")
            return
        mu, logvar = q
        eps = torch.randn(k, *mu.shape)
        z = mu + torch.exp(0.5 * logvar) * eps
        logits = model["decoder"](z)
        terms = -torch.nn.functional.binary_cross_entropy_with_logits(
            logits, x.expand_as(logits), reduction="none"
        )
        torch.logsumexp(terms.sum(-1) + 0.5 * (eps.square() - z.square() + logvar).sum(-1), 0)

    call(10)
    before = peak_mib(reset=True)
    call(draws)
    print(peak_mib() - before)


def memory() -> dict[str, dict[int, float]]:
    """Return MiB by the number of draws."""
    found: dict[str, dict[int, float]] = {"fastvae": {}, "eager PyTorch": {}}
    for which, sizes in found.items():
        for draws in DRAWS:
            if which != "fastvae" and draws > MOST_AT_ONCE:
                continue
            command = [sys.executable, "-m", "benchmarks.picture", "child", which, str(draws)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            sizes[draws] = float(out)
    return found


def draw(found: dict[str, dict[str, tuple[float, float, float]]], grown: dict[str, dict[int, float]]) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12.5, 4.2), width_ratios=(2.6, 1), layout="constrained"
    )
    width = 0.27
    for i, (which, color) in enumerate(COLORS.items()):
        low, middle, high = zip(*(case[which] for case in found.values()), strict=True)
        at = [j + (i - 1) * width for j in range(len(found))]
        error = torch.tensor([low, high]).sub(torch.tensor(middle)).abs().numpy()
        bars = left.bar(at, middle, width * 0.92, yerr=error, color=color, label=which, error_kw={"lw": 0.8})
        if which == "fastvae":
            left.bar_label(bars, [f"{m:.0f}" for m in middle], fontsize=7, padding=1)
    left.set_xticks(range(len(found)), list(found), fontsize=8)
    left.set_ylabel("µs, forward + backward")
    left.set_title("Overhead of the objective, by batch × pixels (one thread)", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    for which, sizes in grown.items():
        right.plot(list(sizes), list(sizes.values()), "o-", color=COLORS[which], label=which)
    right.set(xscale="log", yscale="log", xlabel="K, draws per image", ylabel="peak memory (MiB)")
    right.set_title(f"log p(x) of {IMAGES} images, 784 pixels", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"{processor()}, torch {torch.__version__}", fontsize=7, x=0.99, ha="right")
    figure.savefig(PICTURE, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks picture", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=400, help="rounds per implementation (default 400)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    keep_memory()
    found = times(options.rounds)
    for case, columns in found.items():
        row = ", ".join(f"{n} {m:.0f} ({a:.0f} to {b:.0f})" for n, (a, m, b) in columns.items())
        print(f"{case.replace(chr(10), ', ')}: {row} µs", flush=True)
    grown = memory()
    for which, sizes in grown.items():
        print(f"{which}: " + ", ".join(f"K={k} {v:.0f} MiB" for k, v in sizes.items()), flush=True)
    draw(found, grown)
    print(f"wrote {PICTURE}")
    return 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[2], int(sys.argv[3])) if sys.argv[1:2] == ["child"] else main())
