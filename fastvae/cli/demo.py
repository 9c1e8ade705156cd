"""Command ``demo``: train a VAE with the ELBO and one with IWAE, and compare them on the same test images."""

from __future__ import annotations

import argparse
import json
import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastvae

from ..core.json_values import json_value
from ..core.terminal import discard, show
from ..estimation.evaluation.checkpoint import check_destination
from . import latents
from .images import Images, digits, idx_folder
from .kinds import kind_of
from .pictures import draw, draw_likelihood
from .training import Run, threads, train

USUAL = {"likelihood": "bernoulli", "posterior": latents.DIAGONAL, "prior": latents.STANDARD}


def run(args: argparse.Namespace) -> None:
    """Train, evaluate, print and plot, according to the command line."""
    _check_environment(args)
    images = _images_of(args)
    pixels = images.train.shape[1]
    architecture: dict[str, Any]
    architecture = {"pixels": pixels, "hidden": min(2 * pixels, 200), "latent": args.latent}
    asked = {option: getattr(args, option) for option in USUAL}
    architecture |= {option: name for option, name in asked.items() if name != USUAL[option]}
    named = [f", {name} {architecture[name]}" for name in ("posterior", "prior") if name in architecture]
    epochs = args.epochs or images.epochs
    chatter = discard if args.quiet or args.json else show
    chatter(
        f"{images.name}: {len(images.train)} training and {len(images.test)} test images of "
        f"{images.shape[0]}x{images.shape[1]} pixels, {images.says}\n"
        f"{args.latent} latent dimension{'s' * (args.latent > 1)}{''.join(named)}, "
        f"{architecture['hidden']} hidden units, {epochs} epoch{'s' * (epochs > 1)}, seed {args.seed}, "
        f"on {args.device}"
    )
    images = images._replace(train=images.train.to(args.device), test=images.test.to(args.device))
    with threads(1 if pixels <= 64 else torch.get_num_threads()):
        runs = [
            train(name, k, images, architecture, epochs, args.eval_k, args.seed, progress=not args.quiet)
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
        if args.json:
            show(json.dumps({**settings, "eval_k": args.eval_k, "models": figures(runs, paths)}))
        else:
            show(table(runs, args.eval_k) if args.quiet else "\n" + table(runs, args.eval_k) + "\n")
    if args.likelihood != "bernoulli":
        drawn = [draw_likelihood(runs[-1], images, args.out)]
    else:
        drawn = draw(runs, images, args.out, args.eval_k)
    for path in paths + drawn:
        chatter(path)
    if args.latent != 2 and args.likelihood == "bernoulli":
        chatter(f"no manifold.png: it shows a latent plane, which needs --latent 2, not {args.latent}")


def _check_environment(args: argparse.Namespace) -> None:
    """Exit if a package is missing, or if the device or the backend cannot be used."""
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


def _images_of(args: argparse.Namespace) -> Images:
    """Read the images, and exit early if an option is invalid or the results could not be written."""
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
    return images


def figures(runs: list[Run], paths: list[Path]) -> list[dict[str, Any]]:
    """Return the test results of the models, in nats per image, for JSON."""
    found = []
    for r, path in zip(runs, paths, strict=True):
        numbers = {
            "elbo": r.elbo.double().mean(),
            "elbo_stderr": _standard_error(r.elbo),
            "log_px": r.log_px.double().mean(),
            "log_px_stderr": _standard_error(r.log_px),
            "median_ess": r.ess.median(),
        }
        found.append({"objective": r.name, "file": str(path), **json_value(numbers)})
    return found


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
