"""Reports: measurements as rows; rows as a table, CSV, plots, and a comparison with recorded rows."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import platform
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from .measure import COPY, EMPTY, OURS, Machine, Result, Work

Row = dict[str, str]
FULL = ("forward+backward", "step", "evaluation")


def environment(machine: Machine, device: str = "", versions: Iterable[str] = ()) -> Row:
    """Return the entries common to all rows: where and when they were measured.

    Args:
        machine: the machine's speed.
        device: name of the device. Default: the processor's.
        versions: additional versions.
    """
    versions = [*versions_of("torch", "fastvae", "pyro-ppl", "pythae"), *versions]
    return {
        "device": device or processor(),
        "threads": str(torch.get_num_threads()),
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "time": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "copy_gb_per_s": f"{machine.copied / 1e9:.1f}",
        "read_gb_per_s": f"{machine.read / 1e9:.1f}",
        "gflop_per_s": f"{2 * machine.operations / 1e9:.0f}",
    }


def versions_of(*packages: str) -> list[str]:
    """Return the versions of the installed packages among ``packages``."""
    versions = []
    for package in packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def processor() -> str:
    """Return the processor's name."""
    try:
        names = re.findall(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        names = []
    return names[0].strip() if names else platform.processor() or platform.machine()


def rows_of(work: Work, results: dict[str, Result], machine: Machine, where: Row) -> list[Row]:
    """Return a row per implementation; ``ratio`` is its time divided by fastvae's, round by round."""
    ours = results[OURS].seconds
    least = machine.least_seconds(work)
    rows = []
    for name, result in results.items():
        row = {
            "group": work.group,
            "case": work.case,
            "direction": work.direction,
            "implementation": name,
            "rounds": str(len(result.seconds)),
            "wrong": result.wrong,
            "clock": result.clock,
            "bits": result.bits,
        }
        if len(result.seconds):
            p20, p50, p80 = np.percentile(result.seconds, (20, 50, 80))
            row |= {f"{key}_us": f"{v * 1e6:.1f}" for key, v in (("p20", p20), ("p50", p50), ("p80", p80))}
            if len(ours):
                r20, r50, r80 = np.percentile(result.seconds / ours, (20, 50, 80))
                row |= {"ratio": f"{r50:.3f}", "ratio_p20": f"{r20:.3f}", "ratio_p80": f"{r80:.3f}"}
            row |= {
                "gb_per_s": f"{work.bytes / p50 / 1e9:.2f}" if work.bytes else "",
                "share_of_copy": f"{work.bytes / p50 / machine.copied:.3f}" if work.bytes else "",
                "least_us": f"{least * 1e6:.1f}",
                "share_of_least": f"{least / p50:.3f}",
                "peak_mib": f"{result.peak_bytes / 2**20:.2f}",
                "allocations": str(result.allocations),
                "target": str(work.target.get(name, "")),
            }
        rows.append(row | where)
    return rows


COLUMNS = (
    *("group", "case", "direction", "implementation", "p20_us", "p50_us", "p80_us"),
    *("ratio", "ratio_p20", "ratio_p80", "target", "gb_per_s", "share_of_copy", "least_us", "share_of_least"),
    *("peak_mib", "allocations", "rounds", "clock", "bits", "wrong"),
    *("device", "threads", "versions", "time", "copy_gb_per_s", "read_gb_per_s", "gflop_per_s"),
)


def write_csv(rows: list[Row], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="")
        writer.writeheader()
        writer.writerows(rows)


def append_csv(rows: list[Row], path: Path) -> None:
    """Append rows to a file, which is created if missing."""
    if not path.exists():
        write_csv(rows, path)
        return
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS, restval="").writerows(rows)


def read_csv(path: Path) -> list[Row]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def file_name(where: Row) -> str:
    """Return the CSV's name without its ending: the device and the number of threads."""
    return f"cpu-{slug(where['device'])}-{where['threads']}-threads"


def slug(name: str) -> str:
    """Convert a name to a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


HEAD = (
    f"{'':36s}{'p50':>9s}  {'p20 – p80':>19s}  {'× fastvae':>9s}  {'p20 – p80':>13s}"
    f"  {'GB/s':>6s} {'of copy':>7s} {'of least':>8s} {'MiB':>8s} {'allocs':>6s}"
)


def table(rows: Iterable[Row]) -> str:
    """Format the rows of one work as text; a peer that beats fastvae is marked."""
    rows = list(rows)
    lines = [f"{rows[0]['group']}  {rows[0]['case']}  {rows[0]['direction']}"]
    for row in rows:
        name = f"  {row['implementation']:34s}"
        if row["wrong"] or not row.get("p50_us"):
            lines.append(f"{name} not timed: {row['wrong']}")
            continue
        times = [_time(row[k]) for k in ("p50_us", "p20_us", "p80_us")]
        share = _percent(row.get("share_of_copy", ""))
        mark = "  ◄ faster than fastvae" if loses(row) else ""
        missed = f"  target {row['target']}×, not met" if misses(row) else ""
        without = "  (without a CUDA graph)" if row.get("clock", "").startswith("events") else ""
        spread = f"{_number(row.get('ratio_p20'))} – {_number(row.get('ratio_p80'))}"
        lines.append(
            f"{name}{times[0]:>9s}  {times[1]:>8s} – {times[2]:>8s}"
            f"  {_number(row.get('ratio')):>9s}  {spread:>13s}  {row['gb_per_s']:>6s} {share:>7s}"
            f" {_percent(row['share_of_least']):>8s} {float(row['peak_mib']):8.1f} {row['allocations']:>6s}"
            f"{mark}{missed}{without}"
        )
    return "\n".join(lines)


def _time(us: str) -> str:
    value = float(us)
    return (
        f"{value:.1f} µs"
        if value < 1e3
        else f"{value / 1e3:.2f} ms"
        if value < 1e6
        else f"{value / 1e6:.2f} s"
    )


def _number(text: str | None) -> str:
    return f"{float(text):.2f}" if text else ""


def _percent(text: str) -> str:
    return f"{100 * float(text):.0f} %" if text else ""


def loses(row: Row) -> bool:
    """Return True if this peer is faster than fastvae beyond the spread of its rounds."""
    name = row["implementation"]
    is_peer = name.split(",")[0] != OURS and name not in (COPY, EMPTY)
    return is_peer and bool(row.get("ratio")) and float(row["ratio_p80"]) < 1


def misses(row: Row) -> bool:
    return bool(row.get("target")) and bool(row.get("ratio")) and float(row["ratio"]) < float(row["target"])


def summary(rows: list[Row]) -> str:
    """Format the losing rows and the targets."""
    lines = []
    losing = [r for r in rows if loses(r)]
    lines.append(f"rows in which a peer is faster than fastvae: {len(losing)}")
    for r in losing:
        lines.append(
            f"  {r['group']} {r['case']} {r['direction']}: {r['implementation']}, {_number(r['ratio'])}×"
        )
    wanted = [r for r in rows if r.get("target") and r.get("ratio")]
    lines.append(f"targets met: {sum(not misses(r) for r in wanted)} of {len(wanted)}")
    for r in wanted:
        if misses(r):
            lines.append(
                f"  {r['group']} {r['case']}: {_number(r['ratio'])}× over {r['implementation']}, target "
                f"{_number(r['target'])}×"
            )
    wrong = [r for r in rows if r["wrong"]]
    for r in wrong:
        lines.append(
            f"  not timed: {r['group']} {r['case']} {r['direction']} {r['implementation']}: {r['wrong']}"
        )
    return "\n".join(lines)


def got_slower(rows: list[Row], recorded: list[Row], tolerance: float = 0.3) -> list[str]:
    """Return ratios that have fallen by more than the tolerance, and by more than either's spread."""
    key = lambda r: (r["group"], r["case"], r["direction"], r["implementation"])  # noqa: E731
    before = {key(r): r for r in recorded if r["ratio"]}
    lines = []
    for r in rows:
        old = before.get(key(r))
        if old is None or not r.get("ratio") or r["implementation"] == OURS:
            continue
        fell = float(r["ratio"]) < (1 - tolerance) * float(old["ratio"])
        if fell and float(r["ratio_p80"]) < float(old["ratio_p20"]):
            lines.append(f"{' '.join(key(r))}: {_number(r['ratio'])}×, recorded {_number(old['ratio'])}×")
    return lines


def plots(rows: list[Row], stem: Path, group_of: Callable[[Row], str] | None = None) -> list[Path]:
    """Draw one plot per group: each peer's time relative to fastvae's, with p20 to p80.

    Args:
        rows: the measurements.
        stem: stem of the file names.
        group_of: maps a row to its plot. Default: its op's, or that of the objectives.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    timed = [r for r in rows if r["ratio"] and r["direction"] in FULL]
    peers = list(dict.fromkeys(r["implementation"] for r in timed if r["implementation"] != OURS))
    styles = {name: {"color": f"C{i % 10}", "fmt": "os"[i // 10 % 2]} for i, name in enumerate(peers)}
    paths = []
    group_of = group_of or _plot_group
    for group in dict.fromkeys(map(group_of, timed)):
        part = [r for r in timed if group_of(r) == group]
        labels = list(dict.fromkeys(_label(r, group) for r in part))
        used = [p for p in peers if any(r["implementation"] == p for r in part)]
        fig, ax = plt.subplots(figsize=(8.5, 1.6 + 0.62 * len(labels)))
        for i, name in enumerate(used):
            mine = [r for r in part if r["implementation"] == name]
            y = [
                labels.index(_label(r, group)) + 0.62 * (i - (len(used) - 1) / 2) / max(len(used), 1)
                for r in mine
            ]
            x = np.array([float(r["ratio"]) for r in mine])
            low, high = (np.array([float(r[k]) for r in mine]) for k in ("ratio_p20", "ratio_p80"))
            ax.errorbar(x, y, xerr=[x - low, high - x], ms=5, capsize=2, label=name, **styles[name])
        ours = [r for r in part if r["implementation"] == OURS]
        bound = [min(1.0, float(r["share_of_least"])) for r in ours]
        ax.plot(
            *(bound, [labels.index(_label(r, group)) for r in ours]),
            *("|",), ms=16, mew=2, color="0.4", label="minimum for the bytes and operations",
        )  # fmt: skip
        ax.axvline(1, color="k", lw=1)
        ax.set_xscale("log")
        ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if ax.get_xlim()[0] <= t <= ax.get_xlim()[1]]
        ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
        ax.minorticks_off()
        ax.set_yticks(range(len(labels)), labels)
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.grid(axis="x", alpha=0.3)
        ax.set_xlabel("time / fastvae's time: right of the line fastvae is faster")
        r = part[0]
        torch_version = re.search(r"torch [\d.]+", r["versions"])
        version = torch_version[0] if torch_version else ""
        where = f"{r['device']}, {r['threads']} threads, {version}, {r['time'][:10]}"
        ax.set_title(f"{group}\n{where}", fontsize=10)
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        path = stem.with_name(f"{stem.name}-{slug(group)}.png")
        fig.savefig(path, dpi=110, bbox_inches="tight")
        plt.close(fig)
        paths.append(path)
    return paths


def _plot_group(row: Row) -> str:
    if row["direction"] in ("step", "evaluation"):
        return "objectives"
    return row["group"]


def _label(row: Row, group: str) -> str:
    return row["case"] if group == row["group"] else f"{row['group']}\n{row['case']}"
