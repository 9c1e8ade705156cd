"""Command ``evaluate``: log p(x) of saved data under a saved model, with a figure."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import pickle
import tempfile
import time
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from ..core.terminal import discard, show
from ..estimation.estimates import UNTRUSTED
from ..estimation.evaluation.checkpoint import check_destination
from ..estimation.evaluation.ranks import RankFailed
from ..estimation.evaluation.result import Evaluation
from ..likelihoods import Bernoulli, DiscretizedLogistic, Likelihood
from ..vae import VAE
from . import models
from .images import digits, find_idx, idx_folder, read_idx


def run(args: argparse.Namespace) -> None:
    """Load, evaluate, save, print and plot, according to the command line."""
    plot = args.plot and (args.plot if isinstance(args.plot, Path) else _beside(args.out))
    if plot and find_spec("matplotlib") is None:
        raise SystemExit("fastvae evaluate: --plot needs matplotlib: pip install 'fastvae[demo]'")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("fastvae evaluate: --device cuda needs a GPU that PyTorch can use; there is none")
    with _ranks(args.device, args.shard) as (device, first):
        try:
            _check_paths(args.out, plot, args.checkpoint)
            model, architecture = load_model(args.model, args.trust)
            x = load_data(args.data, model.likelihood, architecture.get("likelihood", "bernoulli"))
            pixels = architecture.get("pixels")
            if pixels is not None and x[0].numel() == pixels:
                x = x.flatten(1)
            start = time.perf_counter()
            result = model.to(device).evaluate(
                x,
                k=args.k,
                tol=args.tol,
                k_chunk=args.k_chunk,
                noise=args.noise,
                proposal=args.proposal,
                batch_size=args.batch_size,
                checkpoint=args.checkpoint,
                audit=args.audit,
                shard=args.shard,
                progress=first and not args.quiet,
                generator=torch.Generator().manual_seed(args.seed),
            )
        except (OSError, RankFailed, TypeError, ValueError) as error:
            raise SystemExit(f"fastvae evaluate: {error}") from None
        except RuntimeError as error:
            if "shapes cannot be multiplied" not in str(error):
                raise
            raise SystemExit(
                f"fastvae evaluate: the model does not take data of shape {list(x.shape)}: {error}"
            ) from None
        if not first:
            return
        # Save first, so that results survive a failure of printing or plotting.
        took = time.perf_counter() - start
        saved, problem = _save(result, args.out) if args.out else (None, None)
        show(json.dumps(result.to_dict(), allow_nan=False) if args.json else result)
        chatter = discard if args.quiet or args.json else show
        chatter(f"{took:.1f} s on {device}, seed {args.seed}")
        if saved:
            chatter(saved)
        if plot:
            try:
                draw(result, plot, f"{args.model.name} on {args.data}")
            except OSError as error:
                problem = problem or f"{plot} cannot be written ({error.strerror or error})"
            else:
                chatter(plot)
        if problem:
            raise SystemExit(f"fastvae evaluate: {problem}")


def _save(result: Evaluation, out: Path) -> tuple[Path | None, str | None]:
    """Save the results to ``out``, or else to a temporary folder; return the path and the problem, if any."""
    try:
        result.save(out)
        return out, None
    except OSError as error:
        problem = f"{out} cannot be written ({error.strerror or error})"
    with contextlib.suppress(OSError):
        spare = Path(tempfile.mkdtemp(prefix="fastvae-")) / out.name
        result.save(spare)
        return spare, f"{problem}; the results are in {spare}"
    return None, problem


def _check_paths(out: Path | None, plot: Path | None, checkpoint: Path | None) -> None:
    """Validate output paths before the work starts."""
    for name, path in (("--out", out), ("--plot", plot), ("--checkpoint", checkpoint)):
        if path:
            check_destination(name, path)
    if out and out.suffix != ".npz":
        raise ValueError(f"--out {out} must end in .npz")
    if plot and plot.suffix not in (".png", ".pdf", ".svg"):
        raise ValueError(f"--plot {plot} must end in .png, .pdf or .svg")
    if out and checkpoint and out.resolve() == checkpoint.resolve():
        raise ValueError(f"--out and --checkpoint are both {out}: the results would overwrite the checkpoint")


def _beside(out: Path | None) -> Path:
    return Path("evaluation.png") if out is None else out.with_suffix(".png")


@contextlib.contextmanager
def _ranks(device: str, shard: str) -> Iterator[tuple[torch.device, bool]]:
    """Yield this process's device and True if it prints; under torchrun initialise the process group."""
    if shard == "none" or "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield torch.device(device), True
        return
    where = torch.device(device, int(os.environ.get("LOCAL_RANK", 0)) if device == "cuda" else None)  # type: ignore[arg-type]
    if device == "cuda":
        torch.cuda.set_device(where)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield where, dist.get_rank() == 0
    finally:
        dist.destroy_process_group()


def load_model(path: Path, trust: bool) -> tuple[VAE, dict[str, Any]]:
    """Load a model of the demo, with its architecture, or a pickled VAE."""
    _check_archive(path)
    try:
        saved = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        # A complete archive of torch.save, or an old file in which torch.load found a class.
        if trust or not (zipfile.is_zipfile(path) or "GLOBAL" in str(error)):
            raise ValueError(f"{path} is damaged, or was not written by torch.save") from None
        raise ValueError(
            f"{path} holds a pickled object, and loading one runs code from the file. If you trust where it "
            "comes from, add --trust"
        ) from None
    except (AttributeError, ModuleNotFoundError) as error:
        raise ValueError(
            f"{path} needs a class that cannot be imported here ({error}); define the model's classes in a "
            "module, not in a script, and start this command where it can be found"
        ) from None
    except OSError:
        raise
    except Exception as error:  # torch.load may raise anything on arbitrary bytes
        raise ValueError(f"{path} cannot be read by torch.load: {_said(error)}") from None
    if isinstance(saved, dict) and {"architecture", "state_dict"} <= saved.keys():
        try:
            return models.of_checkpoint(saved), saved["architecture"]
        except (RuntimeError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not a complete checkpoint of the demo: {_said(error)}") from None
    if isinstance(saved, VAE):
        return saved, {}
    came = f"an object of {type(saved).__name__}"
    if isinstance(saved, dict):
        came = f"a dict with the keys {', '.join(map(repr, list(saved)[:4]))}"
    raise ValueError(
        f"{path} holds {came}; expected a model of the demo, or a whole fastvae.VAE written by "
        f"torch.save(vae, path)"
    )


def _check_archive(path: Path) -> None:
    """Reject a damaged .pt file, since torch.load does not verify the checksums of its entries."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"{path} is damaged: the checksum of its entry {damaged} does not match")


def load_data(name: str, likelihood: Likelihood, shown: str) -> Tensor:
    """Load test data [N, ...]: scikit-learn's digits, a folder of IDX files, or an array in a file.

    ``shown`` is the likelihood that the digits are data of.
    """
    path = Path(name).expanduser()
    if name == "digits" and not path.exists():
        return digits(shown).test
    if path.is_dir():
        if isinstance(likelihood, Bernoulli):
            return idx_folder(path).test
        return _scaled(torch.from_numpy(read_idx(find_idx(path, "t10k"))), likelihood)
    if path.suffix not in (".npy", ".npz", ".pt", ".pth"):
        raise ValueError(
            f"DATA {name} cannot be read: expected 'digits', a folder of IDX files, or a file "
            "that ends in .npy, .npz or .pt"
        )
    try:
        data = _read(path)
    except OSError:
        raise
    except Exception as error:  # numpy and torch may raise anything on arbitrary bytes
        raise ValueError(f"{path} cannot be read: {_said(error)}") from None
    if not isinstance(data, (np.ndarray, Tensor)):
        raise ValueError(f"{path} holds an object of {type(data).__name__}; expected an array")
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(data.astype(data.dtype.newbyteorder("="), copy=False))
    if data.dim() == 0 or len(data) == 0:
        raise ValueError(f"{path} holds {list(data.shape)} numbers; expected [N, ...] with N > 0")
    return _scaled(data, likelihood) if data.dtype == torch.uint8 else data


def _scaled(data: Tensor, likelihood: Likelihood) -> Tensor:
    """Scale bytes to [0, 1], or to the ends of a grid; those of a likelihood of integers stay as they are."""
    if likelihood.takes_integers:
        return data
    x = data.float() / 255
    return likelihood._of_unit(x) if isinstance(likelihood, DiscretizedLogistic) else x


def _read(path: Path) -> Any:
    if path.suffix == ".npy":
        return np.load(path, allow_pickle=False)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            names = list(arrays)
            if "x" not in names and len(names) != 1:
                raise ValueError(
                    f"it holds {', '.join(names) or 'nothing'}; call the data x, or save them alone"
                )
            return arrays["x" if "x" in names else names[0]]
    _check_archive(path)
    data = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(data, list):
        raise ValueError(
            f"it holds a list of {len(data)}; save one tensor [N, ...], such as torch.cat(batches)"
        )
    return data[0] if isinstance(data, tuple) and data else data


def _said(error: Exception) -> str:
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"


def draw(result: Evaluation, path: Path, title: str) -> None:
    """Plot the NLL against the number of draws, and histograms of log p(x) and k̂."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    figure.suptitle(title, fontsize="medium")
    curve, log_px, khat = figure.subplots(1, 3)

    k, nll, error = map(np.array, zip(*result.curve, strict=True))
    curve.set(xscale="log", xlabel="draws K", ylabel="nats per example", title="Minus the bound of K draws")
    finite = np.isfinite(nll)  # a bound of few draws may be infinite; a NaN example makes all NaN
    k, nll, error = k[finite], nll[finite], error[finite]
    if len(k):
        curve.plot(k, nll, marker="o", ms=4)
        curve.fill_between(
            k, nll - error, nll + error, alpha=0.2, lw=0, label="± standard error over examples"
        )
        where = {"xytext": (0, 8), "textcoords": "offset points", "ha": "center", "fontsize": "small"}
        curve.annotate(f"{nll[-1]:.2f}", (k[-1], nll[-1]), **where)
        curve.legend(fontsize="small")
    else:
        bad = int((~result.log_px.isfinite()).sum())
        where = {"transform": curve.transAxes, "ha": "center", "fontsize": "small"}
        curve.text(
            0.5, 0.5, f"not finite: {bad} of {len(result.log_px)} examples are NaN or infinite", **where
        )

    values = result.log_px[result.log_px.isfinite()].numpy()
    log_px.hist(values, bins="auto" if len(values) < 10_000 else 100, color="tab:blue")
    mean = float(values.mean()) if len(values) else math.nan
    log_px.axvline(
        mean, color=log_px.xaxis.label.get_color(), lw=1, label=f"mean {mean:.2f}".replace("-", "−")
    )
    log_px.set(xlabel="log p(x), nats", ylabel="examples", title="Examples")
    log_px.legend(fontsize="small")

    values = result.khat[result.khat.isfinite()].numpy()
    khat.hist(values, bins="auto" if len(values) < 10_000 else 100, color="tab:blue")
    share = (
        "" if math.isnan(result.untrusted) else f": {100 * result.untrusted:.1f} % of the examples are above"
    )
    khat.margins(y=0.2)  # room for the legend
    khat.axvline(UNTRUSTED, color="tab:red", lw=1, label=f"{UNTRUSTED}{share}")
    khat.set(xlabel="Pareto k̂", ylabel="examples", title="Can log p(x) be trusted?")
    khat.legend(fontsize="small")
    for axes in (curve, log_px, khat):
        axes.grid(alpha=0.3)
        axes.title.set_fontsize("medium")
    figure.savefig(path, dpi=110)
