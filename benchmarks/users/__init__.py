"""``python -m benchmarks users``: training steps and an evaluation shaped like public codes.

zero_grad, forward, loss, backward and Adam: as the codes' authors write them, in eager PyTorch and under
torch.compile, and with fastvae. A step is not timed if its loss or a gradient differs from eager PyTorch's
for the same noise.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import torch

from .. import report
from ..measure import COMPILE, OURS, keep_memory, measure, measure_machine
from ..report import Row
from . import counts, images, sequences, tables
from .case import GROUP, Case, works

CASES: list[Case] = [
    *(images.BCE, images.CONV, images.IWAE, images.MISSING, counts.MULT, counts.REC, tables.TVAE),
    *(counts.CELLS, counts.TEXT, images.TC, images.M2, images.VAMP, *tables.SMALL, sequences.VRNN_CASE),
    images.EVALUATION,
]
HEADINGS = ("training step", "fastvae", "eager / fastvae", "torch.compile / fastvae", "MiB, fastvae / eager")


def table(rows: list[Row], markdown: bool = False) -> str:
    """Format a line for each case, those that lose to eager PyTorch first.

    Args:
        rows: measurements, of one number of threads.
        markdown: as a table for docs/benchmarks.md, with ratios below 1 in bold type.
    """
    cases: dict[str, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(row["case"], {})[row["implementation"]] = row

    def ratio(row: Row | None) -> str:
        if row is None or not row.get("ratio"):
            return ""
        value = f"{float(row['ratio']):.2f}"
        value = f"**{value}**" if markdown and float(row["ratio"]) < 1 else value
        return f"{value} ({float(row['ratio_p20']):.2f} to {float(row['ratio_p80']):.2f})"

    def cells(name: str) -> list[str]:
        of = cases[name]
        ours, eager = of[OURS], of.get("eager")
        if ours["wrong"] or not ours.get("p50_us"):
            return [name, f"not timed: {ours['wrong']}", "", "", ""]
        p20, p50, p80 = (float(ours[f"{p}_us"]) / 1e3 for p in ("p20", "p50", "p80"))
        memory = f"{float(ours['peak_mib']):.1f}"
        memory += f" / {float(eager['peak_mib']):.1f}" if eager and eager.get("peak_mib") else ""
        time = f"{p50:.2f} ms ({p20:.2f} to {p80:.2f})"
        return [name, time, ratio(eager), ratio(of.get(COMPILE)), memory]

    def order(name: str) -> float:
        return float(cases[name].get("eager", {}).get("ratio") or 0)

    lines = [list(HEADINGS), *map(cells, sorted(cases, key=order))]
    if markdown:
        lines.insert(1, ["---"] * len(HEADINGS))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)


def measured(cases: list[Case], budget: float, compiled: bool, tiny: bool) -> list[Row]:
    """Measure the cases with torch's current number of threads."""
    machine = measure_machine(numbers=2**22, size=512)
    where = report.environment(machine)
    print(f"{where['device']}, {where['threads']} threads, {where['versions']}, {where['time']}", flush=True)
    rows: list[Row] = []
    for work in works(cases, tiny, compiled):
        results = measure(work, budget)
        rows += report.rows_of(replace(work, run={}, check={}), results, machine, where)
        print(table(rows[-len(results) :]).splitlines()[-1], flush=True)
    return rows


def record(rows: list[Row], path: Path) -> None:
    """Write the rows into a device's CSV file, in place of those of the same cases."""
    cases = {r["case"] for r in rows}
    old = report.read_csv(path) if path.exists() else []
    kept = [r for r in old if not (r["group"] == GROUP and r["case"] in cases)]
    report.write_csv(kept + rows, path)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks users", description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="numbers of threads (default 1)")
    parser.add_argument("--cases", type=int, nargs="+", metavar="N", help="numbers of the cases, from 1")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of rounds per case (default 4)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "results", help="folder of the CSV"
    )
    parser.add_argument("--no-compile", action="store_true", help="skip torch.compile")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, a quick test; nothing is written")
    parser.add_argument("--markdown", action="store_true", help="print the table of docs/benchmarks.md")
    parser.add_argument("--recorded", action="store_true", help="print the recorded table")
    options = parser.parse_args(arguments)
    wanted = options.cases or range(1, len(CASES) + 1)
    if any(not 1 <= n <= len(CASES) for n in wanted):
        parser.error(f"cases are numbered from 1 to {len(CASES)}; got {options.cases}")
    cases = [CASES[n - 1] for n in wanted]
    warnings.filterwarnings("ignore")
    keep_memory()
    wrong = False
    for threads in options.threads:
        torch.set_num_threads(threads)
        path = options.out / (
            report.file_name({"device": report.processor(), "threads": str(threads)}) + ".csv"
        )
        if options.recorded:
            known = report.read_csv(path) if path.exists() else []
            rows = [r for r in known if r["group"] == GROUP]
            if not rows:
                print(f"nothing is recorded in {path}; run without --recorded first", file=sys.stderr)
                return 2
        else:
            rows = measured(cases, options.budget, not options.no_compile, options.tiny)
            if not options.tiny:
                record(rows, path)
        print(f"\n{threads} thread{'s' * (threads > 1)}, median (20th to 80th percentile)\n")
        print(table(rows, options.markdown))
        wrong |= any(r["wrong"] for r in rows if r["implementation"] == OURS)
    return int(wrong)
