"""``python -m benchmarks.memory``: peak memory of large K, each case in a separate process.

Prints the growth of the process's peak resident memory over that after the same call with few samples, so
that libraries and models are excluded.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import torch

import fastvae

from .objectives import PIXELS, model_of

IMAGES = 16
CASES = {
    "log_marginal, K=200": ("evaluate", 200, None),
    "log_marginal, K=100 000": ("evaluate", 100_000, None),
    "iwae step, K=4000": ("train", 4000, None),
    "iwae step, K=4000, k_chunk=20": ("train", 4000, 20),
}


def peak_mib(reset: bool = False) -> float:
    """Return the peak resident memory in MiB since the last reset; Linux only."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _call(what: str, k: int, k_chunk: int | None) -> None:
    model = model_of((200,), 50)
    x = torch.rand(IMAGES, PIXELS).round()
    q = model["encoder"](x).chunk(2, dim=1)
    options = {"k": k, "k_chunk": k_chunk, "likelihood": "bernoulli"}
    if what == "evaluate":
        fastvae.log_marginal(x, q, model["decoder"], **options)
    else:
        fastvae.iwae(x, q, model["decoder"], **options).backward()


def _child(case: str) -> None:
    what, k, k_chunk = CASES[case]
    _call(what, 20, None if k_chunk is None else 10)
    before = peak_mib(reset=True)
    start = time.perf_counter()
    _call(what, k, k_chunk)
    print(peak_mib() - before, time.perf_counter() - start)


def main() -> int:
    torch.set_num_threads(torch.get_num_threads())
    grown = {}
    print(f"784-200-50, {IMAGES} images, {torch.get_num_threads()} threads, torch {torch.__version__}")
    for case in CASES:
        command = [sys.executable, "-m", "benchmarks.memory", case]
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        grown[case], seconds = map(float, out.split())
        print(f"{case:32} + {grown[case]:7.1f} MiB   {seconds:6.2f} s", flush=True)
    few, many, whole, chunked = grown.values()
    print(f"log_marginal, from K=200 to K=100 000: + {many - few:.1f} MiB (target: less than 50)")
    print(f"iwae step by chunks: 1/{whole / chunked:.0f} of the memory (target: less than 1/20)")
    return 0 if many - few < 50 and whole / chunked > 20 else 1


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1]) if len(sys.argv) > 1 else main())
