"""Command ``demo``: train a VAE with the ELBO and one with IWAE, and compare them on the same test images."""

from __future__ import annotations

import argparse
import contextlib
import gzip
import math
import struct
import zlib
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import fastvae
from fastvae.distributions import StandardNormal

from ..core.terminal import ProgressStream, show
from ..estimation.evaluation.checkpoint import check_destination
from . import latents
from .kinds import Outputs, kind_of

USUAL = {"likelihood": "bernoulli", "posterior": latents.DIAGONAL, "prior": latents.STANDARD}
BATCH = 100
LEARNING_RATE = 3e-3
# Fixed, so that runs with other seeds are evaluated on the same test images with the same noise.
DATA_SEED, TEST_SEED = 20, 21


class Images(NamedTuple):
    """Training images, from which each epoch draws new data, and test data, each [N, pixels]."""

    name: str
    train: Tensor
    test: Tensor
    shape: tuple[int, int]
    epochs: int
    says: str = "binarised"
    draw: Callable[[Tensor, torch.Generator], Tensor] = lambda x, g: torch.bernoulli(x, generator=g)


class Run(NamedTuple):
    """Trained model, its bounds per epoch in nats per image, and its results per test image, each [N]."""

    name: str
    model: fastvae.VAE
    architecture: dict[str, Any]
    train_curve: list[float]
    test_curve: list[float]
    elbo: Tensor
    log_px: Tensor
    ess: Tensor


class Encoder(nn.Module):
    """Encoder x [B, pixels] -> q(z|x), by default a pair (mu, logvar), each [B, latent]."""

    def __init__(
        self,
        pixels: int,
        hidden: int,
        latent: int,
        likelihood: str = "bernoulli",
        posterior: str = latents.DIAGONAL,
    ):
        super().__init__()
        self.seen = kind_of(likelihood).seen
        self.body = nn.Sequential(nn.Linear(pixels, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh())
        widths, self.q = latents.POSTERIORS[posterior](latent)
        self.outputs = tuple(widths)
        for name, width in widths.items():
            self.add_module(name, nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Any:
        h = self.body(self.seen(x))
        return self.q(*(self.get_submodule(name)(h) for name in self.outputs))


class Decoder(nn.Sequential):
    """Decoder z [N, latent] -> logits [N, pixels], or the parameters of another likelihood."""

    def __init__(self, pixels: int, hidden: int, latent: int, likelihood: str = "bernoulli"):
        last = (
            nn.Linear(hidden, pixels) if likelihood == "bernoulli" else Outputs(hidden, kind_of(likelihood))
        )
        super().__init__(nn.Linear(latent, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), last)


def build(architecture: dict[str, Any]) -> fastvae.VAE:
    """Build the demo's model from an architecture, as stored in a checkpoint.

    It has the sizes pixels, hidden and latent, and the names of a non-default likelihood, posterior or prior.
    """
    sizes = dict(architecture)
    posterior, prior = sizes.pop("posterior", latents.DIAGONAL), sizes.pop("prior", latents.STANDARD)
    latents.check(posterior, prior, sizes["latent"])
    encoder, decoder = Encoder(**sizes, posterior=posterior), Decoder(**sizes)
    return fastvae.VAE(
        encoder,
        decoder,
        likelihood=kind_of(sizes.get("likelihood", "bernoulli")).likelihood(),
        prior=latents.prior_of(posterior, prior, encoder, sizes["pixels"], sizes["latent"]),
        latent_dim=sizes["latent"],
    )


def load(path: str | Path) -> fastvae.VAE:
    """Load the model from a checkpoint file that the demo wrote."""
    return of_checkpoint(torch.load(path, map_location="cpu", weights_only=True))


def of_checkpoint(checkpoint: dict[str, Any]) -> fastvae.VAE:
    """Build the model of a checkpoint, with its parameters."""
    model = build(checkpoint["architecture"])
    model.load_state_dict(checkpoint["state_dict"])
    return model


def run(args: argparse.Namespace) -> None:
    """Train, evaluate, print and plot, according to the command line."""
    missing = [name for name in ("sklearn", "matplotlib") if find_spec(name) is None]
    if missing:
        raise SystemExit(
            f"fastvae demo: {' and '.join(missing)} cannot be imported; the demo needs "
            "pip install 'fastvae[demo]' (in fastvae's own folder: pip install -e '.[demo]')"
        )
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "fastvae demo: --device cuda needs a GPU that PyTorch can use, and torch.cuda.is_available() "
            "is False; leave --device out to run on the CPU"
        )
    try:
        # Fail early, not in the first step, if the selected backend cannot run.
        fastvae.random.normal(0, 1, 1, 1, device=args.device)
    except (RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from None
    try:
        kind_of(args.likelihood)
        latents.check(args.posterior, args.prior, args.latent)
        if args.data is not None and args.likelihood != "bernoulli":
            raise ValueError(
                f"--likelihood {args.likelihood} is shown on scikit-learn's digits; leave --data out"
            )
        images = digits(args.likelihood) if args.data is None else idx_folder(args.data)
        args.out.mkdir(parents=True, exist_ok=True)
        check_destination("--out", args.out / "elbo.pt")
    except (OSError, ValueError) as error:
        raise SystemExit(f"fastvae demo: {error}") from None

    pixels = images.train.shape[1]
    architecture: dict[str, Any]
    architecture = {"pixels": pixels, "hidden": min(2 * pixels, 200), "latent": args.latent}
    asked = {option: getattr(args, option) for option in USUAL}
    architecture |= {option: name for option, name in asked.items() if name != USUAL[option]}
    named = [f", {name} {architecture[name]}" for name in ("posterior", "prior") if name in architecture]
    epochs = args.epochs or images.epochs
    show(
        f"{images.name}: {len(images.train)} training and {len(images.test)} test images of "
        f"{images.shape[0]}x{images.shape[1]} pixels, {images.says}\n"
        f"{args.latent} latent dimension{'s' * (args.latent > 1)}{''.join(named)}, "
        f"{architecture['hidden']} hidden units, {epochs} epoch{'s' * (epochs > 1)}, seed {args.seed}, "
        f"on {args.device}"
    )
    images = images._replace(train=images.train.to(args.device), test=images.test.to(args.device))
    with threads(1 if pixels <= 64 else torch.get_num_threads()):
        runs = [
            train(name, k, images, architecture, epochs, args.eval_k, args.seed)
            for name, k in (("ELBO", None), (f"IWAE-{args.k}", args.k))
        ]
    settings = {
        "data": images.name,
        "epochs": epochs,
        "k": args.k,
        "seed": args.seed,
        "shape": list(images.shape),
    }
    paths = [args.out / "elbo.pt", args.out / "iwae.pt"]
    try:
        for result, path in zip(runs, paths, strict=True):
            state = {key: value.cpu() for key, value in result.model.state_dict().items()}
            torch.save(
                {
                    "architecture": architecture,
                    "settings": settings,
                    "objective": result.name,
                    "state_dict": state,
                },
                path,
            )
    finally:
        show("\n" + table(runs, args.eval_k) + "\n")
    if args.likelihood != "bernoulli":
        drawn = [draw_likelihood(runs[-1], images, args.out)]
    else:
        drawn = draw(runs, images, args.out, args.eval_k)
    for path in paths + drawn:
        show(path)
    if args.latent != 2 and args.likelihood == "bernoulli":
        show(f"no manifold.png: it shows a latent plane, which needs --latent 2, not {args.latent}")


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads within a ``with`` block.

    Small matrices, such as those of the digits, gain little from a second thread, and wait long for it if
    another process occupies its core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    name: str,
    k: int | None,
    images: Images,
    architecture: dict[str, Any],
    epochs: int,
    eval_k: int,
    seed: int,
    bound: Callable[..., Tensor] | None = None,
) -> Run:
    """Build and train a model with the ELBO, IWAE (if k is given) or ``bound``, and evaluate it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(architecture).to(images.train.device)
    latents.start(model, images.train)
    return fit(name, k, images, model, architecture, epochs, eval_k, seed, bound)


def fit(
    name: str,
    k: int | None,
    images: Images,
    model: fastvae.VAE,
    architecture: dict[str, Any],
    epochs: int,
    eval_k: int,
    seed: int,
    bound: Callable[..., Tensor] | None = None,
) -> Run:
    """Train this model, and evaluate it on the test images.

    ``bound`` takes (x, q, decoder) and the model's options, and replaces the ELBO or, with ``k``, IWAE.
    """
    device = images.train.device
    encoder, decoder = model.encoder, model.decoder
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any]
    options = {"likelihood": model.likelihood, "prior": model.prior, "generator": generator}
    if bound is None:
        options |= latents.elbo_options(model, images.train[:1]) if k is None else {"k": k}
    objective = bound or (fastvae.elbo if k is None else fastvae.iwae)

    train_curve, test_curve = [], []
    steps = math.ceil(len(images.train) / BATCH)
    beta = latents.beta_of(model, epochs * steps) if k is None and bound is None else None
    with tqdm(total=epochs * steps, desc=f"{name:8}", unit="step", file=ProgressStream()) as bar:
        for _ in range(epochs):
            total = torch.zeros((), device=device)
            order = torch.randperm(len(images.train), generator=generator, device=device)
            for rows in order.split(BATCH):
                x = images.draw(images.train[rows], generator)
                if beta is not None:
                    options["beta"] = beta(bar.n)
                value = objective(x, encoder(x), decoder, **options)
                optimizer.zero_grad()
                (-value).backward()
                optimizer.step()
                total += value.detach() * len(x)
                bar.update()
                if bar.n % 50 == 0:
                    bar.set_postfix(bound=f"{value.item():.2f}")
            train_curve.append(total.item() / len(images.train))
            test_curve.append(bound_on_test(model, images.test, k).mean().item())
            bar.set_postfix(train=f"{train_curve[-1]:.2f}", test=f"{test_curve[-1]:.2f}")

    noise = torch.Generator(device).manual_seed(TEST_SEED)
    result = model.evaluate(images.test, k=eval_k, batch_size=BATCH, generator=noise)
    elbo = bound_on_test(model, images.test, None, samples=100).cpu()
    return Run(name, model, architecture, train_curve, test_curve, elbo, result.log_px, result.ess)


@torch.no_grad()
def bound_on_test(model: fastvae.VAE, test: Tensor, k: int | None, samples: int = 1) -> Tensor:
    """Compute the ELBO, or the IWAE bound if k is given, of each test image [N], with fixed noise."""
    noise = torch.Generator(test.device).manual_seed(TEST_SEED)
    options: dict[str, Any] = {"reduction": "none", "generator": noise}
    return torch.cat(
        [
            model.elbo(x, **latents.elbo_options(model, x, samples), **options)
            if k is None
            else model.iwae(x, k, **options)
            for x in test.split(BATCH)
        ]
    )


def table(runs: list[Run], eval_k: int) -> str:
    """Format the test results of the two models, with a sentence on which is better."""
    log_px = f"log p(x), K={eval_k}"
    lines = [
        f"nats per test image, mean over {len(runs[0].log_px)} images ± its standard error",
        f"  {'trained with':<14}{'ELBO':>18}{log_px:>22}{'median ESS':>14}",
    ]
    lines += [
        f"  {r.name:<14}{_mean(r.elbo):>18}{_mean(r.log_px):>22}{r.ess.median().item():>14.0f}" for r in runs
    ]
    base, other = runs
    difference = other.log_px.double() - base.log_px.double()
    gain, error = difference.mean().item(), _standard_error(difference)
    best, worst = (other, base) if gain > 0 else (base, other)
    verdict = (
        f"{best.name} is better than {worst.name} by {abs(gain):.2f} nats per image "
        f"(± {error:.2f}, compared image by image)"
    )
    if not abs(gain) > 2 * error:
        verdict += ": within two standard errors, so no clear difference"
    lines.append(verdict)
    if any(r.ess.median() < 10 for r in runs):
        lines.append(
            "an effective sample size this small means that log p(x) is underestimated: raise --eval-k"
        )
    return "\n".join(lines)


def _mean(values: Tensor) -> str:
    return f"{values.double().mean().item():.2f} ± {_standard_error(values):.2f}"


def _standard_error(values: Tensor) -> float:
    return (values.double().std() / math.sqrt(len(values))).item()


# Data


def digits(likelihood: str = "bernoulli") -> Images:
    """Load scikit-learn's handwritten digits, 1797 images of 8x8 pixels, 0 to 16, as data of a likelihood."""
    from sklearn.datasets import load_digits

    kind = kind_of(likelihood)
    data = torch.tensor(load_digits().data, dtype=torch.float32)
    generator = torch.Generator().manual_seed(DATA_SEED)
    data = data[torch.randperm(len(data), generator=generator)]
    if likelihood == "bernoulli":
        data = data / 16
        return Images("digits", data[:1400], torch.bernoulli(data[1400:], generator=generator), (8, 8), 100)
    test = kind.data(data[1400:], generator)
    # Decoders of classes or components have many outputs, and are slower.
    epochs = 20 if likelihood in ("categorical", "discretized_logistic_mixture") else 40
    return Images("digits", data[:1400], test, (8, 8), epochs, f"as {kind.says}", kind.data)


def idx_folder(folder: Path) -> Images:
    """Load MNIST, Fashion-MNIST or another data set with their file names from a folder."""
    train, test = (read_idx(find_idx(folder, part)) for part in ("train", "t10k"))
    if train.shape[1:] != test.shape[1:]:
        sizes = ["x".join(map(str, part.shape[1:])) for part in (train, test)]
        raise ValueError(f"{folder}: training images have {sizes[0]} pixels but test images {sizes[1]}")
    train_images, test_images = (
        torch.from_numpy(part.reshape(len(part), -1)).float() / 255 for part in (train, test)
    )
    generator = torch.Generator().manual_seed(DATA_SEED)
    binary = torch.bernoulli(test_images, generator=generator)
    return Images(folder.resolve().name, train_images, binary, train.shape[1:], 10)


def find_idx(folder: Path, part: str) -> Path:
    """Find the images file of a part, "train" or "t10k", under any of its usual names."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--data {folder}: there is no such folder (looked at {folder.resolve()})")
    names = [f"{part}-images{dot}idx3-ubyte{end}" for dot in "-." for end in ("", ".gz")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {part} images in {folder.resolve()}: looked for {', '.join(names)}")


def read_idx(path: Path) -> np.ndarray:
    """Read the images of an IDX file, uint8 [N, height, width]; decompress if the name ends in .gz."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            return _read_idx(path, file)  # type: ignore[arg-type]
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not a whole gzip file: {error}") from None


def _read_idx(path: Path, file: BinaryIO) -> np.ndarray:
    """Read only the number of bytes in the header, even if a compressed file would expand to more."""
    header = file.read(16)
    if len(header) < 16:
        raise ValueError(f"{path} has {len(header)} bytes; an IDX file of images has a header of 16")
    magic, count, height, width = struct.unpack(">4I", header)
    if magic != 0x803:
        raise ValueError(
            f"{path} starts with {magic:#010x}; an IDX file of images starts with 0x00000803 "
            "(unsigned bytes, 3 axes)"
        )
    if count == 0 or height == 0 or width == 0:
        raise ValueError(f"{path} holds no pixels: its header says {count} images of {height}x{width}")
    says = f"its header says {count} images of {height}x{width}, which make {16 + count * height * width}"
    data, left = bytearray(), count * height * width
    # In pieces, so that a wrong header does not cause a large allocation.
    while piece := file.read(min(left, 2**20)) if left else b"":
        data += piece
        left -= len(piece)
    if left:
        raise ValueError(f"{path} has {16 + len(data)} bytes; {says}: is it cut off?")
    if file.read(1):
        raise ValueError(f"{path} goes on after {16 + len(data)} bytes, but {says}: is it another file?")
    return np.frombuffer(data, np.uint8).reshape(count, height, width)


# Figures, by matplotlib's Figure without pyplot, so that the user's backend and style do not change.

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

    standard = runs[0].architecture.get("prior", latents.STANDARD) == latents.STANDARD
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
    figures["training"] = Figure(figsize=(9, 5), layout="constrained")
    _curves(figures["training"].subplots(), runs, eval_k)

    best = runs[-1]
    panels = [(_reconstructions, "test images and reconstructions"), (_samples, "samples from the prior")]
    if "manifold" in figures:
        panels.append((_manifold, f"latent plane, quantiles of {marginal}"))
    figures["overview"] = Figure(figsize=(10, 9.6), layout="constrained")
    first, *rest = figures["overview"].subplots(2, 2).flat
    _curves(first, runs, eval_k)
    first.set_box_aspect(1)
    for axes, (panel, title) in zip(rest, panels, strict=False):
        panel(axes, best, images)
        axes.set_title(f"{best.name}: {title}", fontsize="medium")
    for axes in rest[len(panels) :]:
        axes.remove()

    paths = []
    for name, figure in figures.items():
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


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
    above, below = (_tiles(v, rows, columns, images.shape) for v in (x, posterior_mean(result.model, x)))
    gap = _gap(images)
    above = np.pad(above, ((0, 0), (0, 0), (0, gap), (0, 0)), constant_values=np.nan)
    _show(axes, np.concatenate([above, below], 2), 2 * gap)


@torch.no_grad()
def posterior_mean(model: fastvae.VAE, x: Tensor, k: int = 1000) -> Tensor:
    """Estimate the mean of p(x'|z) over the posterior p(z|x), by k importance samples from q(z|x).

    After training with IWAE, q is a proposal that covers p(z|x): q's mean may lie where p(z|x) is small.
    """
    noise = torch.Generator(x.device).manual_seed(TEST_SEED)
    decoded: list[Tensor] = []

    def decoder(z: Tensor) -> Tensor:
        decoded.append(model.decoder(z))
        return decoded[-1]

    parts = fastvae.log_weights(
        x, model.encoder(x), decoder, k=k, likelihood=model.likelihood, prior=model.prior, generator=noise
    )
    weights = torch.softmax(parts.log_likelihood + parts.log_ratio, dim=0)
    return torch.einsum("kb,kbx->bx", weights, torch.sigmoid(decoded[0]).unflatten(0, weights.shape))


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
            bbox={"boxstyle": "square,pad=0.1", "fc": "white", "ec": "none", "alpha": 0.8},
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
