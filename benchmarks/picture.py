"""``python -m benchmarks picture``: write docs/front.csv: time of a call, memory over K.

Time: overhead of an objective, CPU time of one thread (``python -m benchmarks frontend --cpu``). Memory: peak
growth of a process that estimates log p(x) with K draws, each case in a separate process. ``python -m
docs.pictures front`` draws it.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

import fastvae

from . import frontend
from .measure import keep_memory
from .memory import IMAGES, peak_mib
from .objectives import PIXELS, model_of
from .report import processor

TABLE = Path(__file__).parents[1] / "docs" / "front.csv"
DRAWS = (50, 200, 1000, 4000, 16_000, 64_000)
MOST_AT_ONCE = 16_000  # draws for which plain PyTorch needs 2.4 GB
IMPLEMENTATIONS = ("fastvae", "torch.compile", "eager PyTorch")


def times(rounds: int) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Return microseconds (20th, 50th, 80th percentile) of each case and implementation."""
    found = {}
    for likelihood in frontend.LIKELIHOODS:
        for case in frontend.CASES:
            inputs = frontend.make(case, likelihood)
            runs = frontend.implementations(case, likelihood, inputs, compiled=True)
            measured = frontend.measure(runs, rounds, clock=time.process_time_ns)
            compiled = min(
                (v for n, v in measured.items() if n.startswith("torch.compile")), key=statistics.median
            )
            bound = f"IWAE-{case.k}" if case.k else "ELBO"
            name = f"{bound}, {case.batch}×{case.pixels}, {likelihood}"
            shown = measured[frontend.OURS], compiled, measured["eager"]
            columns = dict(zip(IMPLEMENTATIONS, shown, strict=True))
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


def write(
    found: dict[str, dict[str, tuple[float, float, float]]], grown: dict[str, dict[int, float]], path: Path
) -> None:
    """Write microseconds of each case, and MiB of each number of draws, a row for each implementation."""
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["quantity", "case", "implementation", "20th percentile", "median", "80th percentile"])
        for case, columns in found.items():
            rows.writerows(["microseconds", case, n, *(f"{v:.2f}" for v in t)] for n, t in columns.items())
        for which, sizes in grown.items():
            rows.writerows(["MiB", k, which, "", f"{v:.1f}", ""] for k, v in sizes.items())
        rows.writerow(["machine", f"{processor()}, torch {torch.__version__}", "", "", "", ""])


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
        print(f"{case}: {row} µs", flush=True)
    grown = memory()
    for which, sizes in grown.items():
        print(f"{which}: " + ", ".join(f"K={k} {v:.0f} MiB" for k, v in sizes.items()), flush=True)
    write(found, grown, TABLE)
    print(f"wrote {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(child(sys.argv[2], int(sys.argv[3])) if sys.argv[1:2] == ["child"] else main())
