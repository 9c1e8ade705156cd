"""Pictures of the demo.

They use matplotlib's Figure without pyplot, so that the user's backend and style do not change.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvae.distributions import StandardNormal

from ..distributions.words import known_mean
from . import latents
from .images import Images
from .training import TEST_SEED, Run

COLORS = ("tab:blue", "tab:orange")


def draw(runs: list[Run], images: Images, out: Path, eval_k: int) -> list[Path]:
    """Write the figures and return their paths."""
    from matplotlib.figure import Figure

    def pair(panel: Callable[..., None], title: str, size: tuple[float, float]) -> Figure:
        figure = Figure(figsize=size, layout="constrained")
        figure.suptitle(title)
        for axes, result in zip(figure.subplots(1, 2), runs, strict=True):
            panel(axes, result, images)
            axes.set_title(f"trained with {result.name}", fontsize="medium")
        return figure

    standard = _has_standard_prior(runs[0])
    draws, marginal = ("the same for both", "N(0, 1)") if standard else ("each model's own", "the prior")
    figures = {
        "samples": pair(_samples, f"Samples: mean of p(x|z) for z from the prior, {draws}", (9, 5)),
        "reconstructions": pair(
            _reconstructions,
            "Test images, and below each its reconstruction, the mean of p(x'|z) over p(z|x)",
            (9, 5),
        ),
    }
    if runs[0].architecture["latent"] == 2:
        figures["manifold"] = pair(
            _manifold, f"Latent plane: mean of p(x|z) at the quantiles of {marginal} along each axis", (11, 6)
        )
    if _has_classes(runs[0], images):
        figures["latents"] = pair(_scatter, "Means of q(z|x) of the test images, by class", (10, 5.4))
    figures["training"] = Figure(figsize=(9, 5), layout="constrained")
    _curves(figures["training"].subplots(), runs, eval_k)
    figures["overview"] = overview(runs, images, eval_k)

    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


def overview(runs: list[Run], images: Images, eval_k: int) -> Any:
    """Return the figure of the bounds of all models, and of the last one's latents, images and samples."""
    from matplotlib.figure import Figure

    best = runs[-1]
    panels = [(_scatter, "means of q(z|x), by class")] if _has_classes(best, images) else []
    panels += [(_reconstructions, "test images and reconstructions"), (_samples, "samples from the prior")]
    if best.architecture["latent"] == 2:
        marginal = "N(0, 1)" if _has_standard_prior(best) else "the prior"
        panels.append((_manifold, f"latent plane, quantiles of {marginal}"))
    figure = Figure(figsize=(12.5, 8.8), layout="constrained")
    mosaic = figure.subplot_mosaic("CCa;bcd")
    _curves(mosaic.pop("C"), runs, eval_k)
    for axes, (panel, title) in zip(mosaic.values(), panels, strict=False):
        panel(axes, best, images)
        axes.set_title(f"{best.name}: {title}", fontsize="medium")
    for axes in list(mosaic.values())[len(panels) :]:
        axes.remove()
    return figure


def _has_standard_prior(result: Run) -> bool:
    return bool(result.architecture.get("prior", latents.STANDARD) == latents.STANDARD)


def _has_classes(result: Run, images: Images) -> bool:
    return images.labels is not None and result.architecture["latent"] > 1


def draw_likelihood(result: Run, images: Images, out: Path) -> Path:
    """Write a figure of test data, draws of x, and means of x for the same z; return its path."""
    from matplotlib.figure import Figure

    device = images.test.device
    panels = {"test data": images.test[:100]}
    for title, mean in (("draws of x", False), ("means of x, of the same z", True)):
        noise = torch.Generator(device).manual_seed(TEST_SEED)
        panels[title] = result.model.sample(100, mean=mean, generator=noise).float()
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    figure.suptitle(f"{result.architecture['likelihood']}, trained with {result.name}: {images.says}")
    for axes, (title, values) in zip(figure.subplots(1, 3), panels.items(), strict=True):
        most = float(values.quantile(0.995)) if title.startswith("means") else float(images.test.amax())
        _show(axes, _tiles((values / most).clamp(0, 1), 10, 10, images.shape), _gap(images))
        axes.set_title(title, fontsize="medium")
    path = out / "likelihood.png"
    figure.savefig(path, dpi=110)
    return path


def _show(axes: Any, tiles: np.ndarray, gap: int) -> None:
    """Show tiles [rows, columns, height, width] in [0, 1] as one image, separated by ``gap`` pixels."""
    framed = np.pad(tiles, ((0, 0), (0, 0), (gap, 0), (gap, 0)), constant_values=np.nan)
    rows, columns, height, width = framed.shape
    picture = framed.transpose(0, 2, 1, 3).reshape(rows * height, columns * width)
    picture = np.pad(picture, ((0, gap), (0, gap)), constant_values=np.nan)
    axes.set_facecolor("#cfd8e3")
    axes.imshow(np.ma.masked_invalid(picture), cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _gap(images: Images) -> int:
    return max(1, images.shape[0] // 12)


def _tiles(values: Tensor, rows: int, columns: int, shape: tuple[int, int]) -> np.ndarray:
    return values.detach().cpu().numpy().reshape(rows, columns, *shape)


def _samples(axes: Any, result: Run, images: Images) -> None:
    noise = torch.Generator(images.test.device).manual_seed(TEST_SEED)
    _show(
        axes, _tiles(result.model.sample(100, mean=True, generator=noise), 10, 10, images.shape), _gap(images)
    )


def _reconstructions(axes: Any, result: Run, images: Images) -> None:
    columns = min(10, len(images.test))
    rows = min(5, len(images.test) // columns)
    x = images.test[: rows * columns]
    # After training with IWAE, q covers p(z|x): its mean may lie where p(z|x) is small.
    noise = torch.Generator(x.device).manual_seed(TEST_SEED)
    mean = result.model.reconstruct(x, k=1000, generator=noise)
    above, below = (_tiles(v, rows, columns, images.shape) for v in (x, mean))
    gap = _gap(images)
    above = np.pad(above, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=np.nan)
    _show(axes, np.concatenate([above, below], 2), 2 * gap)


@torch.no_grad()
def _manifold(axes: Any, result: Run, images: Images) -> None:
    side = 20
    device = images.test.device
    shares = (torch.arange(side, device=device) + 0.5) / side
    if result.model.prior.family is StandardNormal:
        first = second = torch.special.ndtri(shares)
    else:
        noise = torch.Generator(device).manual_seed(TEST_SEED)
        draws = result.model.prior.sample(10_000, dim=2, device=device, generator=noise)
        first, second = torch.quantile(draws, shares, dim=0).unbind(1)
    # Rows are drawn from the top, so z2 decreases.
    z2, z1 = torch.meshgrid(second.flip(0), first, indexing="ij")
    z = torch.stack([z1, z2], -1).reshape(-1, 2)
    _show(axes, _tiles(torch.sigmoid(result.model.decoder(z)), side, side, images.shape), _gap(images))
    axes.set_xlabel("z₁: 2.5 % to 97.5 %")
    axes.set_ylabel("z₂: 2.5 % to 97.5 %")


@torch.no_grad()
def _scatter(axes: Any, result: Run, images: Images) -> None:
    """Plot the posterior means, of more than two latents the principal plane; label each class's centroid."""
    from matplotlib import colormaps

    assert images.labels is not None
    q = result.model.posterior(images.test)
    noise = torch.Generator(images.test.device).manual_seed(TEST_SEED)
    mean = known_mean(q)
    mean = (q.sample(100, generator=noise).mean(0) if mean is None else mean).float().cpu()
    if mean.shape[1] > 2:
        mean = mean - mean.mean(0)
        mean = mean @ torch.linalg.svd(mean, full_matrices=False).Vh[:2].T
    axes.set(xlabel="z₁", ylabel="z₂")
    for label in images.labels.unique().tolist():
        mine, color = mean[images.labels == label], colormaps["tab10"](label % 10)
        axes.scatter(*mine.T, s=12, color=color, alpha=0.6, linewidths=0)
        text = axes.text(*mine.mean(0), str(label), fontsize=15, fontweight="bold", ha="center", va="center")
        text.set_bbox({"boxstyle": "circle,pad=0.1", "fc": axes.get_facecolor(), "ec": color, "alpha": 0.8})


def _curves(axes: Any, runs: list[Run], eval_k: int) -> None:
    """Plot the bounds per epoch and the test log-likelihood."""
    final = [r.log_px.mean().item() for r in runs]
    for result, log_px, color in zip(runs, final, COLORS, strict=True):
        epochs = range(1, len(result.train_curve) + 1)
        marker = "." if len(epochs) == 1 else None
        axes.plot(
            epochs, result.train_curve, ":", marker=marker, color=color, label=f"{result.name}, training"
        )
        axes.plot(epochs, result.test_curve, marker=marker, color=color, label=f"{result.name}, test")
        axes.axhline(log_px, ls="--", lw=1, color=color)
        upper = log_px == max(final)
        axes.annotate(
            f"{result.name} model: test log p(x) = −{abs(log_px):.2f}, K={eval_k}",
            (1, log_px),
            xycoords=("axes fraction", "data"),
            xytext=(-4, 3 if upper else -3),
            textcoords="offset points",
            ha="right",
            va="bottom" if upper else "top",
            color=color,
            fontsize="small",
            # Legible where a curve passes behind it.
            bbox={"boxstyle": "square,pad=0.1", "fc": axes.get_facecolor(), "ec": "none", "alpha": 0.8},
        )
    # The first tenth of the curves may leave the plot below, so that the rest is legible.
    later = [v for r in runs for c in (r.train_curve, r.test_curve) for v in c[len(c) // 10 :]]
    low, high = min(later), max(*later, *final)
    margin = 0.08 * (high - low) or 1
    axes.set_ylim(low - margin, high + margin)
    axes.set(
        xlabel="epoch", ylabel="nats per image", title="Bounds in training, and the log-likelihood they bound"
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.title.set_fontsize("medium")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", loc="lower right", title="bound", title_fontsize="small")
