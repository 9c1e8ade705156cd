"""A GPU run in short: a line for each op and size, the steps, and every target beside what was measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from . import report
from .measure import COMPILE, COPY, OURS
from .report import Row

MANY_BYTES = 64 * 2**20
SHARE_OF_COPY = 0.9
EVALUATION_SECONDS = 5.0
BOTH_WAYS = "forward+backward"


@dataclass(frozen=True)
class Target:
    """A line of what was wanted.

    Attributes:
        what: the op, its direction and precision, and whom it is compared with.
        wanted: how much.
        measured: how much it is; None where nothing was measured.
        met: whether that is enough.
        where: at which size.
        excused: whether something else than what the target is about is the limit.
    """

    what: str
    wanted: str
    measured: str | None = None
    met: bool = False
    where: str = ""
    excused: bool = False

    def line(self, judge: bool = True) -> str:
        """``judge`` says whether the numbers are worth a word."""
        mark = "met" if self.met else "arithmetic" if self.excused else "MISSED"
        mark = "not measured" if self.measured is None else mark if judge else "-"
        return f"{mark:12s} {self.what:52s}{self.wanted:>8s}{self.measured or '':>8s}  {self.where}".rstrip()


def _of(rows: list[Row], **wanted: str) -> list[Row]:
    """The timed rows with these values."""
    return [r for r in rows if r["p50_us"] and all(r[key] == value for key, value in wanted.items())]


def _key(row: Row) -> tuple[str, ...]:
    return row["group"], row["case"], row["direction"]


def _bytes(row: Row) -> float:
    """What had to be moved, from the row's bandwidth and time."""
    return float(row["gb_per_s"]) * float(row["p50_us"]) * 1e3


def is_moving(row: Row) -> bool:
    """Whether the bytes of this row need more time than its operations, so that bandwidth is its limit."""
    by_bytes = _bytes(row) / 1e3 / max(float(row["copy_gb_per_s"]), float(row["read_gb_per_s"]))
    return by_bytes >= 0.95 * float(row["least_us"])


def _precision(row: Row) -> str:
    return "bfloat16" if ", bfloat16" in row["case"] else "float32"


def targets(rows: list[Row], many_bytes: int = MANY_BYTES) -> list[Target]:
    """Every target, line by line; of several sizes the worst counts.

    Args:
        rows: what was measured.
        many_bytes: from how many on bandwidth is asked for.
    """
    return [*_bandwidth(rows, many_bytes), *_ratios(rows), _evaluation(rows)]


def _bandwidth(rows: list[Row], many_bytes: int) -> list[Target]:
    large = [r for r in _of(rows, implementation=OURS) if r["gb_per_s"] and _bytes(r) >= many_bytes]
    # Of a copy as large, timed beside it; else of the largest.
    copies = {_key(r): r["ratio"] for r in _of(rows, implementation=COPY)}
    large = [{**r, "share_of_copy": copies.get(_key(r)) or r["share_of_copy"]} for r in large]
    lines = []
    for group in ("rsample_kl", "gaussian_log_prob", "bernoulli_log_prob", "log_mean_exp"):
        for precision in ("float32", "bfloat16"):
            # Log weights are sums: float32, whatever the decoder returns.
            if (group, precision) == ("log_mean_exp", "bfloat16"):
                continue
            for direction in ("forward", BOTH_WAYS):
                what = f"{group} {_short(direction)} {precision}, of a copy"
                mine = [r for r in _of(large, group=group, direction=direction) if _precision(r) == precision]
                moving = [r for r in mine if is_moving(r)]
                if not mine:
                    lines.append(Target(what, "≥ 90%"))
                    continue
                # Where no size is limited by its bytes the line is there to be seen.
                worst, best = (f(moving or mine, key=lambda r: float(r["share_of_copy"])) for f in (min, max))
                where = _size(worst)
                if best is not worst:
                    where += f"; {_percent(best['share_of_copy'])} at {_size(best)}"
                if not moving:
                    where += f"; {_percent(worst['share_of_least'])} of what arithmetic allows"
                share = float(worst["share_of_copy"])
                met = share >= SHARE_OF_COPY
                lines.append(Target(what, "≥ 90%", _percent(str(share)), met, where, not moving))
    return lines


def _ratios(rows: list[Row]) -> list[Target]:
    """Those that the works themselves name, by group, direction and peer."""
    named: dict[tuple[str, ...], list[Row]] = {}
    for r in rows:
        if r["target"] and r["ratio"]:
            what = r["group"] if r["group"] != "overhead" else f"overhead, {r['case'].split(' ')[0]}"
            key = (what, r["direction"], _precision(r), r["implementation"], r["target"])
            named.setdefault(key, []).append(r)
    lines = []
    for (what, direction, precision, peer, wanted), mine in named.items():
        worst = min(mine, key=lambda r: float(r["ratio"]))
        lines.append(
            Target(
                f"{what} {_short(direction)} {precision}, over {peer}",
                f"≥ {float(wanted):.1f} ×",
                f"{float(worst['ratio']):.2f} ×",
                not report.misses(worst),
                _size(worst),
            )
        )
    expected = {
        "rsample_kl": ("eager", COMPILE),
        "IWAE without networks": ("eager", COMPILE),
        "gaussian_log_prob": (COMPILE,),
        "bernoulli_log_prob": (COMPILE,),
        "overhead, rsample_kl": (COMPILE,),
        "overhead, bernoulli_log_prob": (COMPILE,),
    }
    for what, peers in expected.items():
        for peer in peers:
            if not any(key[0] == what and key[3] == peer for key in named):
                lines.append(Target(f"{what}, over {peer}", ""))
    return lines


def _evaluation(rows: list[Row]) -> Target:
    mine = _of(rows, group="evaluation", implementation=f"{OURS}, bfloat16")
    what, wanted = "evaluation, K=5000, 10 000 images, bfloat16", f"< {EVALUATION_SECONDS:g} s"
    if not mine:
        return Target(what, wanted)
    seconds = float(mine[0]["p50_us"]) / 1e6
    return Target(what, wanted, f"{seconds:.2f} s", seconds < EVALUATION_SECONDS, mine[0]["case"])


def _short(direction: str) -> str:
    return "fwd+bwd" if direction == BOTH_WAYS else direction


def _size(row: Row) -> str:
    """A case without what a line says elsewhere."""
    case = row["case"].replace(", bfloat16", "").replace(", float32", "")
    return case.partition(" ")[2] if row["group"] == "overhead" else case


def _percent(share: str) -> str:
    return f"{100 * float(share):.0f}%"


def text(rows: list[Row], dry_run: bool) -> str:
    """The tables that are printed last."""
    if not rows:
        return "nothing was measured"
    mark = (
        "DRY RUN: what follows was computed on a CPU, and no number says anything of a card\n"
        if dry_run
        else ""
    )
    row = next((r for r in rows if _precision(r) == "float32"), rows[0])
    speed = (
        f"a copy of this run: {row['copy_gb_per_s']} GB/s; {row['device']}, {row['versions']}, {row['time']}"
    )
    parts = [mark + _step_table(rows), _evaluation_table(rows), _call_table(rows), _op_table(rows), speed]
    if wrong := [r for r in rows if r["wrong"]]:
        lines = [
            f"  {r['group']} {r['case']} {r['direction']}, {r['implementation']}: {r['wrong']}" for r in wrong
        ]
        parts.append("\n".join([f"not timed: {len(wrong)}", *lines[:12]]))
    lines = targets(rows, 0 if dry_run else MANY_BYTES)
    met = "not judged" if dry_run else f"{sum(t.met for t in lines)} of {len(lines)} met"
    head = f"{mark}targets: {met}; the worst size counts"
    parts.append("\n".join([head, *(t.line(not dry_run) for t in lines)]))
    return "\n\n".join(p for p in parts if p)


def _ratio(mine: dict[str, Row], peer: str) -> str:
    ratio = mine.get(peer, {}).get("ratio")
    return f"{float(ratio):.2f}" if ratio else "-"


def _op_table(rows: list[Row]) -> str:
    """A line for each op and size."""
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
            "ops: forward | forward+backward: µs, GB/s, share of the copy below and of a copy as large, × of",
            "eager, torch.compile, torch.distributions | MiB at once, fastvae/eager; *: bound by arithmetic",
            f"{'':38s} |{head} |{head} | MiB",
            *lines,
        ]
    )


def _call_table(rows: list[Row]) -> str:
    mine = [r for r in rows if r["group"] == "overhead"]
    return _grid(mine, "overhead, µs a call by the host's clock", 1, 1)


def _step_table(rows: list[Row]) -> str:
    mine = [r for r in rows if r["direction"] == "step"]
    return _grid(mine, "IWAE training steps, ms (MiB at once)", 1e3, 3, memory=True)


def _evaluation_table(rows: list[Row]) -> str:
    mine = [r for r in rows if r["direction"] == "evaluation"]
    heading = "evaluation, s (MiB at once); a loop by hand does a part of the images, and its time is scaled"
    return _grid(mine, heading, 1e6, 3, memory=True)


def _grid(rows: list[Row], heading: str, unit: float, digits: int, memory: bool = False) -> str:
    """Implementations down, cases across."""
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
    """Three: bandwidth of the ops, how many times as long peers take, and the same of steps and overhead."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("no plots: matplotlib is not installed (`pip install matplotlib`)")
        return []
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
        ax.set_xlabel("bytes that must move, a second, in % of a copy's")
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
