"""Summary of a GPU run: a line per op and size, the steps, the losses, and plots."""

from __future__ import annotations

from pathlib import Path

from benchmarks import report
from benchmarks.measure import COMPILE, COPY, EMPTY, OURS
from benchmarks.report import Row

from . import gpu_first

SHARE_OF_COPY = 0.9
PREDICTED = Path(__file__).parent / "predicted-sm_90.csv"
BOTH_WAYS = "forward+backward"


def _of(rows: list[Row], **wanted: str) -> list[Row]:
    """Return the timed rows with the given values."""
    return [r for r in rows if r["p50_us"] and all(r[key] == value for key, value in wanted.items())]


def _bytes(row: Row) -> float:
    """Return the bytes that had to be moved, from the row's bandwidth and time."""
    return float(row["gb_per_s"]) * float(row["p50_us"]) * 1e3


def is_moving(row: Row) -> bool:
    """Return True if bandwidth limits this row: its bytes need more time than its operations."""
    by_bytes = _bytes(row) / 1e3 / max(float(row["copy_gb_per_s"]), float(row["read_gb_per_s"]))
    return by_bytes >= 0.95 * float(row["least_us"])


def _precision(row: Row) -> str:
    return "bfloat16" if ", bfloat16" in row["case"] else "float32"


def _short(direction: str) -> str:
    return "fwd+bwd" if direction == BOTH_WAYS else direction


def _percent(share: str) -> str:
    return f"{100 * float(share):.0f}%"


def text(rows: list[Row], dry_run: bool) -> str:
    """Return the final tables."""
    if not rows:
        return "nothing was measured"
    mark = (
        "DRY RUN: the following was computed on a CPU; its numbers mean nothing for a GPU\n"
        if dry_run
        else ""
    )
    row = next((r for r in rows if _precision(r) == "float32"), rows[0])
    speed = (
        f"speed of a copy in this run: {row['copy_gb_per_s']} GB/s; {row['device']}, {row['versions']}, "
        f"{row['time']}"
    )
    others = [r for r in rows if r["group"] not in gpu_first.TABLES]
    parts = [mark + _step_table(others), _evaluation_table(others), _call_table(others), _op_table(others)]
    parts += [speed, "not judged" if dry_run else report.summary(others) if others else ""]
    parts.append(predictions(others))
    # Last, where a terminal shows them.
    parts += [_first_table(rows, group) for group in gpu_first.TABLES]
    return "\n\n".join(p for p in parts if p)


def _first_table(rows: list[Row], group: str) -> str:
    """Return a table of ``--first``, a line per case, those in which fastvae loses most first."""
    cases: dict[str, list[Row]] = {}
    for r in rows:
        if r["group"] == group:
            cases.setdefault(r["case"], []).append(r)
    # The fastest of the others; only beyond the spread of its rounds is it a loss.
    best = {case: min(map(_against, part)) for case, part in cases.items()}
    lines = []
    for case in sorted(cases, key=best.__getitem__):
        cells = [_first_cell(r, cases[case]) for r in cases[case] if r["implementation"] != COPY]
        name = case.replace(", float32", " f32").replace(", bfloat16", " bf16")
        lines.append(f"{'◄' if best[case] < 1 else ' '} {name}: {' | '.join(cells)}")
    return "\n".join([f"{gpu_first.TABLES[group]}:", *lines]) if lines else ""


def _against(row: Row) -> float:
    """Return a row's ratio if it beats fastvae, else 1."""
    if row["implementation"] in (OURS, COPY, EMPTY) or not row.get("ratio"):
        return 1.0
    return float(row["ratio"]) if float(row["ratio_p80"]) < 1 else 1.0


def _first_cell(row: Row, rows: list[Row]) -> str:
    name = row["implementation"].removeprefix(f"{OURS}, ")
    if not row["p50_us"]:
        return f"{name} not timed: {row['wrong']}"
    cell = f"{name} {float(row['p50_us']):.1f}"
    if row["implementation"] != OURS and row["ratio"]:
        cell += f" {float(row['ratio']):.2f}×"
    if row["group"] == gpu_first.LAST_LAYER:
        cell += f" ({float(row['peak_mib']):.0f})"
    mine = next((r["bits"] for r in rows if r["implementation"] == OURS), "")
    return cell + (", other bits" if row["bits"] != mine else "")


def predictions(rows: list[Row], path: Path = PREDICTED) -> str:
    """Return the predictions of ``python -m tools.predict`` for this GPU next to the measurements."""
    device = next((r["device"] for r in rows), "")
    column = next((f"{card}_us" for card in ("h100", "h200") if card.upper() in device), "")
    if not column or not path.exists():
        return ""
    predicted = {(r["group"], r["case"], r["direction"]): r for r in report.read_csv(path)}
    lines = []
    for r in _of(rows, implementation=OURS):
        found = predicted.get((r["group"], r["case"], r["direction"]))
        if found is not None:
            took, expected = float(r["p50_us"]), float(found[column])
            name = f"{r['group']} {r['case']} {r['direction']}"
            lines.append(f"  {name:66s} {took:7.1f} {expected:7.1f} ({expected / took - 1:+.0%})")
    return "\n".join(["measured and previously predicted, µs:", *lines]) if lines else ""


def _ratio(mine: dict[str, Row], peer: str) -> str:
    ratio = mine.get(peer, {}).get("ratio")
    return f"{float(ratio):.2f}" if ratio else "-"


def _op_table(rows: list[Row]) -> str:
    """Return a table with a line per op and size."""
    lines = []
    cases = dict.fromkeys((r["group"], r["case"]) for r in rows if r["gb_per_s"] and r["group"] != "overhead")
    for group, case in cases:
        line = f"{group} {case.replace('float32', 'f32').replace('bfloat16', 'bf16')}"
        cells = [f"{line:38s}"]
        for direction in ("forward", BOTH_WAYS):
            mine = {r["implementation"]: r for r in _of(rows, group=group, case=case, direction=direction)}
            if OURS not in mine:
                cells.append("not timed")
                continue
            ours = mine[OURS]
            limit = "" if is_moving(ours) else "*"
            copy = mine.get(COPY, {}).get("ratio")
            peers = [_ratio(mine, peer) for peer in ("eager", COMPILE, "torch.distributions")]
            share = f"{_percent(ours['share_of_copy'])}{limit}"
            cells.append(
                f"{float(ours['p50_us']):7.1f}{float(ours['gb_per_s']):5.0f}{share:>6s}"
                f"{_percent(copy) if copy else '':>5s}{''.join(f'{p:>6s}' for p in peers)}"
            )
        ours, eager = (
            next(iter(_of(rows, group=group, case=case, direction=BOTH_WAYS, implementation=name)), None)
            for name in (OURS, "eager")
        )
        memory = "/".join(f"{float(r['peak_mib']):.0f}" if r else "-" for r in (ours, eager))
        lines.append(f"{' |'.join(cells)} | {memory}")
    if not lines:
        return ""
    head = "     µs GB/s  copy same eager  comp distr"
    return "\n".join(
        [
            "ops: forward | forward+backward: µs, GB/s, % of the copy speed below and of an equal copy, × of",
            "eager, torch.compile, torch.distributions | peak memory (MiB), fastvae/eager; *: compute-bound",
            f"{'':38s} |{head} |{head} | MiB",
            *lines,
        ]
    )


def _call_table(rows: list[Row]) -> str:
    mine = [r for r in rows if r["group"] == "overhead"]
    return _grid(mine, "overhead, µs per call by the host's clock", 1, 1)


def _step_table(rows: list[Row]) -> str:
    mine = [r for r in rows if r["direction"] == "step"]
    return _grid(mine, "IWAE training steps, ms (peak memory, MiB)", 1e3, 3, memory=True)


def _evaluation_table(rows: list[Row]) -> str:
    mine = [r for r in rows if r["direction"] == "evaluation"]
    heading = "evaluation, s (peak memory, MiB); hand-written loops take some images, their times are scaled"
    return _grid(mine, heading, 1e6, 3, memory=True)


def _grid(rows: list[Row], heading: str, unit: float, digits: int, memory: bool = False) -> str:
    """Return a table of implementations (rows) and cases (columns)."""
    columns = list(dict.fromkeys((r["case"], r["direction"]) for r in rows))
    if not columns:
        return ""
    found = {(r["implementation"], r["case"], r["direction"]): r for r in rows}
    lines = [heading + ":"]
    for i, (case, direction) in enumerate(columns):
        case = case.replace(", float32", " f32").replace(", bfloat16", " bf16")
        lines.append(f"  [{i + 1}] {case}" + ("" if memory else f" {_short(direction)}"))
    width = 18 if memory else 11
    lines.append(f"{'':34s}" + "".join(f"{f'[{i + 1}]':>{width}s}" for i in range(len(columns))))

    def cell(row):
        if row is None or not row["p50_us"]:
            return "-"
        text = f"{float(row['p50_us']) / unit:.{digits}f}"
        return f"{text} ({float(row['peak_mib']):.0f})" if memory else text

    for name in dict.fromkeys(r["implementation"] for r in rows):
        cells = [cell(found.get((name, *column))) for column in columns]
        lines.append(f"  {name:32s}" + "".join(f"{c:>{width}s}" for c in cells))
    return "\n".join(lines)


def plots(rows: list[Row], stem: Path) -> list[Path]:
    """Draw three plots: the ops' bandwidth, peers' times over fastvae's, and these for steps and overhead."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no plots: matplotlib is not installed (`pip install matplotlib`)")
        return []
    rows = [r for r in rows if r["group"] not in gpu_first.TABLES]
    kind = lambda r: "ops" if r["gb_per_s"] and r["group"] != "overhead" else "steps and calls"  # noqa: E731
    return [*_bandwidth_plot(rows, stem), *report.plots(rows, stem, kind)]


def _bandwidth_plot(rows: list[Row], stem: Path) -> list[Path]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = (OURS, COMPILE, "eager")
    part = [
        r for r in rows if r["share_of_copy"] and r["group"] != "overhead" and r["implementation"] in names
    ]
    labels = list(dict.fromkeys((r["group"], r["case"]) for r in part))
    if not labels:
        return []
    figure, axes = plt.subplots(1, 2, figsize=(12, 1.5 + 0.36 * len(labels)), sharey=True)
    for ax, direction in zip(axes, ("forward", BOTH_WAYS), strict=True):
        for i, name in enumerate(names):
            mine = [r for r in part if (r["implementation"], r["direction"]) == (name, direction)]
            at = [labels.index((r["group"], r["case"])) + 0.26 * (i - 1) for r in mine]
            ax.barh(at, [100 * float(r["share_of_copy"]) for r in mine], 0.26, label=name, color=f"C{i}")
        ax.axvline(100 * SHARE_OF_COPY, color="k", lw=0.8, ls="--")
        ax.set_title(direction, fontsize=10)
        ax.set_xlabel("minimum traffic per second, % of a copy's")
        ax.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(labels)), [f"{group} {case}" for group, case in labels], fontsize=8)
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    axes[1].legend(fontsize=8)
    row = part[0]
    figure.suptitle(f"{row['device']}, a copy moves {row['copy_gb_per_s']} GB/s, {row['time']}", fontsize=10)
    path = stem.with_name(f"{stem.name}-bandwidth.png")
    figure.savefig(path, dpi=90, bbox_inches="tight")
    plt.close(figure)
    return [path]
