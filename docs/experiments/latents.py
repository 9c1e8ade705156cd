"""``python -m docs.experiments.latents``: the demo with each posterior and each prior, for docs/latents.md.

Every posterior with a standard normal prior, and every prior with a diagonal posterior: the demo's two models
of scikit-learn's digits, trained with the ELBO and with IWAE-50. Prints log p(x) of the test images, its
difference from the first row's image by image, and the gap, log p(x) − ELBO: of the model itself; then, with
the first row's decoder frozen, of an encoder trained for it, and of each test image's own q, fitted without
an encoder. Each run's results are kept in a folder, so that an interrupted table can be resumed, and seeds
added.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastvae
from fastvae.cli import models, training
from fastvae.cli.images import Images, digits
from fastvae.cli.latents import DIAGONAL, LADDER, POSTERIORS, PRIORS, STANDARD, elbo_options

EVAL_K, K = 5000, 50
PAIRS = [(q, STANDARD) for q in POSTERIORS] + [(DIAGONAL, p) for p in PRIORS if p != STANDARD]
COLUMNS = (
    *("posterior", "prior", "ELBO: log p(x)", "to the first"),
    *("gap", "gap, first's decoder", "gap, each image's own q", "tighter by"),
    *("IWAE-50: log p(x)", "to the first"),
)
STEPS, RATE, SAMPLES = 300, 0.01, 10  # for fitting each image's own q


def own_elbo(model: fastvae.VAE, x: Tensor) -> Tensor:
    """Return the ELBO [N] with separate parameters of q for each x, initialised by the encoder."""
    encoder = model.encoder
    with torch.no_grad():
        h = encoder.body(x)
        parameters = [nn.Parameter(encoder.get_submodule(name)(h)) for name in encoder.outputs]
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    noise = torch.Generator().manual_seed(training.TEST_SEED)
    options = {"likelihood": model.likelihood, "prior": model.prior, "generator": noise}
    options |= elbo_options(model, x[:1], SAMPLES)
    for step in range(STEPS):
        if step == STEPS // 2:
            optimizer.param_groups[0]["lr"] = RATE / 5
        bound = fastvae.elbo(x, encoder.q(*parameters), model.decoder, reduction="sum", **options)
        optimizer.zero_grad()
        (-bound).backward()
        optimizer.step()
    with torch.no_grad():
        options |= elbo_options(model, x[:1], 10 * SAMPLES)
        q = encoder.q(*parameters)
        value: Tensor = fastvae.elbo(x, q, model.decoder, reduction="none", **options)
    return value


def train(images: Images, pair: tuple[str, str], settings: Any, seed: int, how: str) -> dict[str, Any]:
    """Return the results of one run; if ``how`` is "fixed", with the first pair's decoder."""
    posterior, prior = pair
    architecture = {"pixels": 64, "hidden": 128, "latent": settings.latent}
    architecture |= {"posterior": posterior, "prior": prior}
    title = f"{posterior}, {prior}, {how}, {seed}"
    if how != "fixed":
        k = K if how == "iwae" else None
        run = training.train(title, k, images, architecture, settings.epochs, EVAL_K, seed)
        return {"log_px": run.log_px, "elbo": run.elbo, "decoder": run.model.decoder.state_dict()}
    first = result(images, PAIRS[0], settings, seed, "elbo")
    torch.manual_seed(seed)
    model = models.build(architecture)
    model.decoder.load_state_dict(first["decoder"])
    model.decoder.requires_grad_(False)
    run = training.fit(title, None, images, model, architecture, settings.epochs, 1, seed)
    return {"log_px": first["log_px"], "elbo": run.elbo, "own": own_elbo(model, images.test)}


def result(images: Images, pair: tuple[str, str], settings: Any, seed: int, how: str) -> dict[str, Any]:
    """Return bounds and log p(x) of each test image [N], computed or read from the cache."""
    path = settings.out / f"{'-'.join(pair)}-{settings.latent}-{settings.epochs}-{seed}-{how}.pt"
    return kept(path, lambda: train(images, pair, settings, seed, how))


def kept(path: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Load a file; if it is missing, compute its content with one thread, the same on any machine."""
    if not path.exists():
        with training.threads(1):
            torch.save(make(), path)
    found: dict[str, Any] = torch.load(path)
    return found


def cell(values: Tensor, sign: str = "") -> str:
    """Format the mean of [seeds, N] and its standard error over the images."""
    of_each = values.double().mean(0)
    error = (of_each.std() / math.sqrt(len(of_each))).item()
    return f"{of_each.mean().item():{sign}.2f} ± {error:.2f}".replace("-", "−")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m docs.experiments.latents", description=__doc__)
    parser.add_argument("--latent", type=int, default=2, help="latent dimensions (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="default: %(default)s")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="seeds to average over (default: 0)"
    )
    parser.add_argument("--names", nargs="+", help="rows other than the first, by name; default: all")
    parser.add_argument("--out", type=Path, default=Path("demo-latents"), help="folder for the results")
    settings = parser.parse_args(arguments)
    settings.out.mkdir(parents=True, exist_ok=True)
    images = digits()
    first: dict[str, Tensor] = {}
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    for pair in PAIRS:
        if settings.names and pair != PAIRS[0] and not {*pair} & {*settings.names}:
            continue
        cells = [f"`{name}`" for name in pair]
        for how in ("elbo", "fixed", "iwae"):
            # With the first row's decoder, only posteriors that share its prior are compared.
            if how == "fixed" and (pair[1] != STANDARD or pair[0] == LADDER):
                cells += ["", "", ""]
                continue
            runs = [result(images, pair, settings, seed, how) for seed in settings.seeds]
            of = {name: torch.stack([run[name] for run in runs]) for name in runs[0] if name != "decoder"}
            log_px = of.pop("log_px")
            if how != "fixed":
                cells.append(cell(log_px))
                cells.append(cell(log_px - first[how], "+") if how in first else "")
                first.setdefault(how, log_px)
            if how != "iwae":
                cells += [cell(log_px - bound) for bound in of.values()]
            if how == "fixed":
                cells.append(cell(of["own"] - first["own"], "+") if "own" in first else "")
                first.setdefault("own", of["own"])
        print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
