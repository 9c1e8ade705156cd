"""Picture of an evaluation: the examples' log p(x) with their intervals, and Pareto k̂."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..estimates import UNTRUSTED
from .report import LEAST_FOR_KHAT

# Okabe and Ito's blue and vermilion, which the colour-blind can tell apart.
TRUSTED_COLOR, UNTRUSTED_COLOR = "#0072B2", "#D55E00"
_FEW = 60  # examples up to which each interval is a bar


class Picture(Figure):
    """Figure that a notebook shows, without pyplot and so without a change of the user's backend."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=110)
        return buffer.getvalue()


def plot(result: Any, axes: Any) -> Figure:
    """Return :meth:`Evaluation.plot`."""
    first, second = _pair(axes)
    values = {name: getattr(result, name).numpy() for name in ("log_px", "low", "high", "khat")}
    finite = np.isfinite(values["log_px"])
    n, drawn = len(finite), int(finite.sum())
    values = {name: v[finite] for name, v in values.items()}
    if drawn:
        _sorted(first, **values)
        _khat(second, values["log_px"], values["khat"], result.untrusted, int(result.k.max()))
    else:
        for panel in (first, second):
            _say(panel, f"log p(x) of all {n} examples is NaN or infinite")
    left_out = f", without {n - drawn} that are NaN or infinite" * (0 < drawn < n)
    first.set(title=f"log p(x) of {n} example{'s' * (n > 1)}{left_out}", ylabel="nats")
    first.set_xlabel("examples, sorted by log p(x)")
    second.set(title="Can log p(x) be trusted?", xlabel="log p(x), nats", ylabel="Pareto k-hat")
    for panel in (first, second):
        panel.title.set_fontsize("medium")
        panel.grid(alpha=0.3)
    root: Any = first.figure
    return root.figure  # type: ignore[no-any-return]  # also of axes in a SubFigure


def _pair(axes: Any) -> tuple[Axes, Axes]:
    if axes is None:
        first, second = Picture(figsize=(10, 3.8), layout="constrained").subplots(1, 2)
        return first, second
    try:
        given = list(np.ravel(np.asarray(axes, dtype=object)))
    except ValueError:
        given = []
    if len(given) != 2 or not all(isinstance(a, Axes) for a in given):
        kinds = ", ".join(type(a).__name__ for a in given[:3])
        raise TypeError(
            f"axes must be a pair of matplotlib Axes, got {len(given)} object{'s' * (len(given) != 1)} "
            f"({kinds}); such as figure, axes = plt.subplots(1, 2)"
        )
    return given[0], given[1]


def _sorted(panel: Axes, log_px: np.ndarray, low: np.ndarray, high: np.ndarray, khat: np.ndarray) -> None:
    """Plot log p(x) in rising order, with the interval from low to high of each example."""
    order = np.argsort(log_px, kind="stable")
    log_px, low, high, khat = (v[order] for v in (log_px, low, high, khat))
    place = np.arange(1, len(log_px) + 1)
    _set_range(panel, log_px, low, high)
    # An interval without an end leaves the panel; an unknown one is empty.
    bottom, top = panel.get_ylim()
    margin = 10 * (top - bottom)
    low, high = (
        np.clip(np.where(np.isnan(v), log_px, v), bottom - margin, top + margin) for v in (low, high)
    )
    bad = khat > UNTRUSTED
    if len(log_px) <= _FEW:
        for which, color in ((~bad, TRUSTED_COLOR), (bad, UNTRUSTED_COLOR)):
            panel.vlines(place[which], low[which], high[which], color=color, lw=2, alpha=0.4)
        panel.scatter(place[~bad], log_px[~bad], s=16, color=TRUSTED_COLOR, zorder=3)
        panel.scatter(place[bad], log_px[bad], s=24, color=UNTRUSTED_COLOR, marker="D", zorder=3)
        key = "point: log p(x)\nbar: 95 %\nover the draws"
        if bad.any():
            _label(panel, (0.98, 0.23), f"diamond:\nk-hat above {UNTRUSTED}", UNTRUSTED_COLOR)
    else:
        panel.fill_between(
            place, low, high, color=TRUSTED_COLOR, step="mid", lw=0, alpha=0.25, rasterized=True
        )
        panel.plot(place, log_px, lw=1.2, color=TRUSTED_COLOR, zorder=3)
        key = "line: log p(x)\nband: 95 %\nover the draws"
    panel.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    mean = float(log_px.mean())
    panel.axhline(mean, color="black", lw=0.8)
    _label(
        panel, (0.02, mean), f"mean {mean:.2f}".replace("-", "−"), "black", ("axes fraction", "data"), "left"
    )
    _label(panel, (0.98, 0.02), key, TRUSTED_COLOR)


def _set_range(panel: Axes, log_px: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """Show every estimate, and intervals as far as they leave the estimates legible."""
    ends = np.concatenate([low, high])
    ends = ends[np.isfinite(ends)]
    least, most = float(log_px.min()), float(log_px.max())
    spread = most - least
    if len(ends):
        widths = (high - low)[np.isfinite(high - low)]
        usual = float(np.quantile(widths, 0.9)) if len(widths) else 0.0
        reach = max(spread, usual)
        least, most = max(min(least, ends.min()), least - reach), min(max(most, ends.max()), most + reach)
    margin = 0.06 * (most - least) or 1.0
    panel.set_ylim(least - margin, most + margin)
    edge = 0.5 if len(log_px) <= _FEW else 0.01 * len(log_px)
    panel.set_xlim(1 - edge, len(log_px) + edge)


def _khat(panel: Axes, log_px: np.ndarray, khat: np.ndarray, untrusted: float, draws: int) -> None:
    """Plot k̂ against log p(x), with the limit of trust."""
    known = np.isfinite(khat)
    if not known.any():
        reason = f"; it takes {LEAST_FOR_KHAT} draws" * (draws < LEAST_FOR_KHAT)
        _say(panel, f"k-hat is unknown{reason}")
        return
    log_px, khat = log_px[known], khat[known]
    bad = khat > UNTRUSTED
    size = 16 if len(khat) <= _FEW else 5
    style: dict[str, Any] = {"alpha": 0.6, "lw": 0, "rasterized": True}
    panel.scatter(log_px[~bad], khat[~bad], s=size, color=TRUSTED_COLOR, **style)
    panel.scatter(log_px[bad], khat[bad], s=1.5 * size, color=UNTRUSTED_COLOR, marker="D", **style)
    panel.axhline(UNTRUSTED, color=UNTRUSTED_COLOR, lw=1)
    least, most = min(float(khat.min()), 0.0), max(float(khat.max()), UNTRUSTED)
    panel.set_ylim(least - 0.08 * (most - least), most + 0.25 * (most - least))
    share = f"above {UNTRUSTED}: {100 * untrusted:.1f} % of the examples,\nnot to be trusted"
    _label(panel, (0.02, 0.87), share if untrusted else f"none above {UNTRUSTED}", UNTRUSTED_COLOR, ha="left")


def _label(
    panel: Axes,
    at: tuple[float, float],
    text: str,
    color: str,
    where: Any = "axes fraction",
    ha: str = "right",
) -> None:
    """Write a label that stays legible on top of the data."""
    box = {"boxstyle": "square,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8}
    panel.annotate(
        text,
        at,
        xycoords=where,
        xytext=(0, 3),
        textcoords="offset points",
        ha=ha,
        va="bottom",
        color=color,
        fontsize="small",
        bbox=box,
        zorder=5,
    )


def _say(panel: Axes, text: str) -> None:
    panel.text(0.5, 0.5, text, transform=panel.transAxes, ha="center", fontsize="small")
