"""``python -m benchmarks [module ...]``: measure, print, write CSV and plots."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

# Before torch is imported: silence the profiler.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

import torch  # noqa: E402

from . import report  # noqa: E402
from .measure import OURS, keep_memory, measure, measure_machine  # noqa: E402

MODULES = (
    "normal_diagonal",
    "normal_full",
    "likelihood",
    "components",
    "categorical",
    "multinomial",
    "mixture",
    "aggregate",
    "codebook",
    "logsumexp",
    "reduce",
    "objectives",
    "head",
)
# Subcommands, modules whose ``main`` takes the arguments after the name.
SUBCOMMANDS = {
    "head_memory": "docs/head.csv: memory and time over K, with the decoder's last layer fused",
    "frontend": "overhead of an objective, with a decoder that costs nothing",
    "single_cell": "scvi-tools' model of counts against the same networks in fastvae",
    "users": "training steps and an evaluation shaped like public codes",
    "picture": "docs/front.csv: the time of a call, and memory over K",
}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in SUBCOMMANDS:
        return importlib.import_module(f".{arguments[0]}", __package__).main(arguments[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measure fastvae, eager PyTorch, torch.compile, torch.distributions, Pyro and "
        "pythae (where installed), interleaved in one run; print a table, write CSV and plots.",
        epilog="Instead of modules, one of: "
        + "; ".join(f"{name} ({what})" for name, what in SUBCOMMANDS.items()),
    )
    parser.add_argument("modules", nargs="*", metavar="module", help=f"some of: {', '.join(MODULES)}")
    parser.add_argument("--out", type=Path, help="where CSV and plots go; default: benchmarks/results")
    parser.add_argument(
        "--budget", type=float, default=0.6, help="seconds of rounds per computation (default 0.6)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare the ratios with those recorded for this device, list regressions, and write nothing",
    )
    options = parser.parse_args(arguments)
    if unknown := [m for m in options.modules if m not in MODULES]:
        parser.error(f"unknown module {unknown[0]!r}; known: {', '.join(MODULES)}")
    warnings.filterwarnings("ignore")

    began = time.perf_counter()
    kept = keep_memory()
    machine = measure_machine()
    where = report.environment(machine)
    stem = (options.out or Path(__file__).parent / "results") / report.file_name(where)
    print(
        f"{where['device']}, {where['threads']} threads, {where['versions']}, {where['time']}\n"
        f"a copy moves {where['copy_gb_per_s']} GB/s, a sum reads {where['read_gb_per_s']} GB/s, a float32 "
        f"matrix product does "
        f"{where['gflop_per_s']} GFLOP/s; freed memory is "
        f"{'kept' if kept else 'NOT kept: allocations will cost page faults'}\n\n"
        "× fastvae: time / fastvae's in the same round. of copy: minimum traffic per second, relative "
        "to that of a copy.\nof least: minimum time for the bytes and operations, relative to time taken. "
        "MiB, allocs: per run.\n\n" + report.HEAD,
        flush=True,
    )
    if os.getloadavg()[0] > 0.5 * torch.get_num_threads():
        print(f"(this machine is busy, with a load of {os.getloadavg()[0]:.1f}: expect noisy ratios)")
    measured = []
    for module in options.modules or MODULES:
        for work in importlib.import_module(f".{module}", __package__).works():
            results = measure(work, options.budget)
            if results[OURS].wrong:
                print(f"fastvae's own result is wrong: {results[OURS].wrong}", file=sys.stderr)
            # Records kept until the end must not hold the tensors.
            measured.append((replace(work, run={}, check={}), results))
            print(report.table(report.rows_of(*measured[-1], machine, where)), flush=True)
        # Another process may have slowed the first measurement: take the best.
        machine = machine.best(measure_machine())
    where |= report.environment(machine) | {"time": where["time"]}
    rows = [row for work, results in measured for row in report.rows_of(work, results, machine, where)]
    print(f"\nbest speed: {where['copy_gb_per_s']} GB/s copied, {where['gflop_per_s']} GFLOP/s")
    print(report.summary(rows))
    print(f"{(time.perf_counter() - began) / 60:.1f} minutes")
    path = stem.with_suffix(".csv")
    if options.check:
        if not path.exists():
            print(f"nothing is recorded for this device: {path} is missing; run without --check first")
            return 2
        slower = report.got_slower(rows, report.read_csv(path))
        print("\n".join(["slower than recorded:", *slower]) if slower else "no regression")
        return 1 if slower else 0
    if options.modules and path.exists():
        groups = {r["group"] for r in rows}
        rows = [r for r in report.read_csv(path) if r["group"] not in groups] + rows
    report.write_csv(rows, path)
    for p in (path, *report.plots(report.read_csv(path), stem)):
        print(p)
    return 1 if any(r["wrong"] and r["implementation"] == OURS for r in rows) else 0


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(main())
