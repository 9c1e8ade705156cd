"""``python -m docs.pictures``: draw the documentation's pictures from the data files next to them.

Each picture has a light and a dark variant, ``head.png`` and ``head-dark.png``. With ``--measure`` the data
are measured first, which takes minutes: ``front.csv`` and ``head.csv`` by ``python -m benchmarks picture``
and ``head_memory``; ``demo.csv`` and ``demo.pt`` by training the demo's models, and ``evaluation.npz`` by
evaluating one. Proposals on MNIST: ``python -m docs.experiments.proposals --table docs/proposals.csv``;
published numbers: ``python -m docs.experiments.mnist``.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure

import fastvae
from fastvae.cli import evaluate, models, pictures, training
from fastvae.cli.images import digits

FOLDER = Path(__file__).parent
# Background and text of the site's dark theme.
DARK = {
    **dict.fromkeys(
        ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor"), "#131416"
    ),
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), "#d0d4d8"),
    **dict.fromkeys(("axes.edgecolor", "grid.color"), "#80858b"),
}
VARIANTS: dict[str, dict[str, Any]] = {"": {}, "-dark": DARK}
# Okabe & Ito's colours, which colour-blind readers can distinguish.
ORANGE, GREEN, GREY = "#e69f00", "#009e73", "#999999"
EVAL_K = 5000
ARCHITECTURE = {"pixels": 64, "hidden": 128, "latent": 2}


def blue() -> str:
    """Return the colour of fastvae, lighter on dark."""
    return "#0072b2" if matplotlib.rcParams["figure.facecolor"] == "white" else "#4aa8e8"


def read(name: str) -> list[dict[str, str]]:
    """Return the rows of a data file."""
    with (FOLDER / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def front() -> Figure:
    """Draw the overhead of an objective by case, and the memory of log p(x) over K."""
    rows = read("front")
    machine = next(row["case"] for row in rows if row["quantity"] == "machine")
    colors = {"fastvae": blue(), "torch.compile": ORANGE, "eager PyTorch": GREY}
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.6, 1))
    width = 0.27
    for i, (which, color) in enumerate(colors.items()):
        mine = [row for row in rows if row["quantity"] == "microseconds" and row["implementation"] == which]
        low, middle, high = ([float(row[n]) for row in mine] for n in list(mine[0])[3:])
        error = [
            [m - a for a, m in zip(low, middle, strict=True)],
            [b - m for m, b in zip(middle, high, strict=True)],
        ]
        at = [j + (i - 1) * width for j in range(len(mine))]
        edge = matplotlib.rcParams["text.color"]
        bars = left.bar(
            at, middle, width * 0.92, yerr=error, color=color, error_kw={"lw": 0.8, "ecolor": edge}
        )
        if which == "fastvae":
            left.bar_label(bars, [f"{m:.0f}" for m in middle], fontsize=7, padding=1)
            left.set_xticks(range(len(mine)), [row["case"].replace(", ", "\n") for row in mine], fontsize=8)
        left.text(
            0.01, 0.95 - 0.08 * i, which, color=color, fontweight="bold", transform=left.transAxes, va="top"
        )
        grown = [row for row in rows if row["quantity"] == "MiB" and row["implementation"] == which]
        if grown:
            draws, mib = [int(row["case"]) for row in grown], [float(row["median"]) for row in grown]
            right.plot(draws, mib, "o-", color=color)
            at_end, offset, align = (-1, (-8, 0), "right") if which != "fastvae" else (-3, (0, 8), "center")
            right.annotate(which, (draws[at_end], mib[at_end]), offset, textcoords="offset points", ha=align,
                           color=color, fontweight="bold")  # fmt: skip
    left.set_ylabel("CPU µs, forward + backward")
    left.set_title("Overhead of the objective, by batch × pixels (one thread)", fontsize=10)
    right.set(xscale="log", yscale="log", xlabel="K, draws per image", ylabel="peak memory (MiB)")
    right.set_title("log p(x) of 10 images, 784 pixels", fontsize=10)
    _finish(figure, machine)
    return figure


def head() -> Figure:
    """Draw memory and time of the bound and its gradients over K."""
    *rows, last = read("head")
    colors = {"fastvae, fused head": blue(), "fastvae, output stored": GREEN, "torch.compile": ORANGE}
    colors["eager PyTorch"] = GREY
    found: dict[str, dict[str, list[float]]] = {which: defaultdict(list) for which in colors}
    for row in rows:
        for column in ("K", "MiB", "seconds"):
            found[row["implementation"]][column].append(float(row[column]))
    draws, seconds = (found["fastvae, fused head"][column] for column in ("K", "seconds"))
    figure = Figure(figsize=(9.5, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for which, columns in found.items():
        left.plot(draws, columns["MiB"], "o-", color=colors[which])
        ratios = [a / b for a, b in zip(columns["seconds"], seconds, strict=True)]
        right.plot(draws, ratios, "o-", color=colors[which])
        columns["ratio"] = ratios
    left.set_yscale("log")
    left.set_ylabel("peak memory (MiB)")
    left.set_title("Memory of the bound and its gradients", fontsize=10)
    right.set_title("CPU time, as a multiple of the fused head's", fontsize=10)
    right.set_ylim(bottom=0.0)
    for axes, column in ((left, "MiB"), (right, "ratio")):
        _label_ends(axes, draws[-1], {which: columns[column][-1] for which, columns in found.items()}, colors)
        axes.set(
            xscale="log", xlabel="K, samples of each of 100 images", xlim=(draws[0] / 1.3, draws[-1] * 30)
        )
        axes.set_xticks([k for k in draws if k != 1000], [f"{k:.0f}" for k in draws if k != 1000])
        axes.minorticks_off()
    _finish(figure, "last layer 200 to 784, Bernoulli; " + last["implementation"].removeprefix("machine: "))
    return figure


def _label_ends(axes: Any, x: float, ends: dict[str, float], colors: dict[str, str]) -> None:
    """Write names at the right ends of lines, one line of text apart."""
    at, shift = -1e9, 0.0
    for which, y in sorted(ends.items(), key=lambda item: item[1]):
        place = axes.transData.transform((1.0, y))[1]
        shift = max(0.0, at + 15 - place)
        at = place + shift
        axes.annotate(which, (x, y), (6, 0.72 * shift), textcoords="offset points", color=colors[which],
                      fontweight="bold", fontsize=8.5, va="center")  # fmt: skip


def proposals() -> Figure:
    """Draw log p(x) by each proposal and by annealing against the time of an image."""
    # Text, index of the point it is written at, its offset in points, and its alignment.
    labels = {
        "posterior": ("draws from q", -1, (0, 8), "center", GREY),
        "adapted": ('"adapted"', 1, (10, -6), "left", ORANGE),
        "refined": ('"refined"', 0, (-8, 8), "right", blue()),
        "AIS": ("annealed importance\nsampling", -1, (0, 9), "center", GREEN),
    }
    rows = defaultdict(list)
    for method, count, seconds, log_px in (row.values() for row in read("proposals")):
        rows[method].append((1e3 * float(seconds), float(log_px), int(count)))
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, (text, index, offset, align, color) in labels.items():
        seconds, values, counts = zip(*rows[name], strict=True)
        axes.plot(seconds, values, "o-", color=color, lw=2, ms=5)
        bold = "bold" if name == "refined" else None
        axes.annotate(text, (seconds[index], values[index]), offset, textcoords="offset points", ha=align,
                      color=color, fontweight=bold)  # fmt: skip
        if name == "posterior":
            for s, v, count in zip(seconds, values, counts, strict=True):
                axes.annotate(
                    f"K = {count:,}", (s, v), (6, -10), textcoords="offset points", fontsize=8, alpha=0.75
                )
    axes.set_xscale("log")
    axes.margins(x=0.14, y=0.16)
    title = "log p(x) of 100 MNIST images, 50 latents: draws from q miss half a nat"
    axes.set(xlabel="CPU milliseconds per image", ylabel="mean log p(x), nats")
    axes.set_title(title, fontsize="medium")
    axes.grid(alpha=0.25)
    _finish(figure)
    return figure


def published() -> Figure:
    """Draw the signal-to-noise ratio of the encoder's gradient over K, and two trainings against time."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = {"iwae": ("IWAE", ORANGE), "stl": ("sticking the landing", GREY), "dreg": ("DReG", blue())}
    rows, ends, colors = read("published-noise"), {}, {}
    for estimator, (name, color) in names.items():
        mine = [row for row in rows if row["estimator"] == estimator]
        draws, ratios = ([float(row[n]) for row in mine] for n in ("K", "signal-to-noise"))
        left.plot(draws, ratios, "o-", color=color, lw=2, ms=5)
        ends[name], colors[name] = ratios[-1], color
        if estimator != "stl":
            power, text = (-0.5, "1/√K") if estimator == "iwae" else (0.5, "√K")
            line = [ratios[2] * (k / draws[2]) ** power for k in draws[2:]]
            left.plot(draws[2:], line, ":", color=matplotlib.rcParams["text.color"], lw=1)
            left.annotate(
                text, (draws[-1], line[-1]), (4, 0), textcoords="offset points", va="center", fontsize=8
            )
    left.set(xscale="log", yscale="log", xlabel="K", xlim=(0.8, 3e4))
    left.set_title("Signal-to-noise ratio of the encoder's gradient", fontsize=10)
    _label_ends(left, draws[-1] * 3, ends, colors)
    named = {"eager": ("eager PyTorch", GREY), "torch.compile": ("torch.compile", ORANGE)}
    named["fastvae"] = ("fastvae", blue())
    rows = [row for row in read("published-training") if row["K"] == "50"]
    for i, (by, (name, color)) in enumerate(named.items()):
        mine = [row for row in rows if row["by"] == by]
        seconds, bounds = ([float(row[n]) for row in mine] for n in ("CPU seconds", "bound"))
        right.plot(seconds, bounds, "o-", color=color, lw=2, ms=4)
        at = 0.98, 0.08 + 0.08 * i
        right.annotate(f"{name}, {seconds[-1]:.0f} s", at, xycoords="axes fraction", ha="right",
                       color=color, fontweight="bold")  # fmt: skip
    right.set(xlabel="CPU seconds", ylabel="IWAE-50 bound of the epoch, nats")
    right.set_title(f"The same {len(mine)} epochs, with the same noise", fontsize=10)
    _finish(figure)
    return figure


def _finish(figure: Figure, note: str = "") -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    if note:
        figure.supxlabel(note, fontsize=7, x=0.99, ha="right")


def demo() -> Figure:
    """Draw the demo's overview from the curves of both models and the second one's parameters."""
    rows = read("demo")
    runs = []
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = [row for row in rows if row["model"] == name]
        curves = ([float(row[c]) for row in mine] for c in ("training bound", "test bound"))
        log_px = torch.tensor([float(mine[0]["log p(x)"])])
        model = models.load(FOLDER / "demo.pt")
        runs.append(training.Run(name, model, ARCHITECTURE, *curves, log_px, log_px, log_px))
    return pictures.overview(runs, digits(), EVAL_K)


def measure_demo() -> None:
    """Train the demo's two models, and evaluate the second one."""
    images = digits()
    with training.threads(1):
        runs = [
            training.train(name, k, images, ARCHITECTURE, images.epochs, EVAL_K, 0)
            for name, k in (("ELBO", None), ("IWAE-50", 50))
        ]
        with (FOLDER / "demo.csv").open("w", encoding="utf-8", newline="") as file:
            rows = csv.writer(file, lineterminator="\n")
            rows.writerow(["model", "epoch", "training bound", "test bound", "log p(x)"])
            for run in runs:
                log_px = f"{run.log_px.double().mean():.4f}"
                for epoch, values in enumerate(zip(run.train_curve, run.test_curve, strict=True), 1):
                    rows.writerow([run.name, epoch, *(f"{v:.4f}" for v in values), log_px])
        torch.save(
            {"architecture": ARCHITECTURE, "state_dict": runs[-1].model.state_dict()}, FOLDER / "demo.pt"
        )
        noise = torch.Generator().manual_seed(0)
        result = runs[-1].model.evaluate(images.test, k=EVAL_K, proposal="adapted", audit=50, generator=noise)
    result.save(FOLDER / "evaluation.npz")


def measure(name: str) -> None:
    """Measure the data of a picture."""
    if name == "front":
        from benchmarks import picture

        picture.main([])
    elif name == "head":
        from benchmarks import head_memory

        head_memory.main([])
    elif name == "demo":
        measure_demo()


def save(name: str, folder: Path) -> list[Path]:
    """Draw a picture's variants; return their paths."""
    paths = []
    for suffix, style in VARIANTS.items():
        paths.append(folder / f"{name}{suffix}.png")
        with matplotlib.rc_context(style):
            if name == "evaluation":
                result = fastvae.Evaluation.load(FOLDER / "evaluation.npz")
                evaluate.draw(result, paths[-1], "demo/iwae.pt on digits")
            else:
                DRAWN[name]().savefig(paths[-1], dpi=150 if name == "proposals" else 110)
    return paths


DRAWN = {"front": front, "head": head, "proposals": proposals, "demo": demo, "published": published}
NAMES = (*DRAWN, "evaluation")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.pictures", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"some of: {', '.join(NAMES)} (default: all)"
    )
    parser.add_argument("--measure", action="store_true", help="measure what takes minutes, first")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the pictures (default: docs)")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(NAMES):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; choose some of {', '.join(NAMES)}")
    for name in options.names or NAMES:
        if options.measure:
            measure(name)
        for path in save(name, options.out):
            print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
