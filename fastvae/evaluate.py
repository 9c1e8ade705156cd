"""log p(x) of whole data sets: streamed over draws, sharded over ranks, resumable, with its error."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from tqdm import tqdm

from . import _model
from ._checks import FLOATING, check_choice, check_count, check_data, check_number, shape_of
from ._model import Chunks, Model
from ._parts import Part, Ranks, Store, modules_of, weights_digest, write_arrays
from ._terminal import ProgressStream, printable
from .distributions import Distribution, as_posterior, as_prior, closed_kl
from .likelihoods.base import Likelihood, as_likelihood
from .random import draw_seed
from .weights import Weights, tail_length

__all__ = ["Evaluation", "evaluate"]

ACTIVE = 0.01  # variance of the posterior mean, Burda et al. 2016
UNTRUSTED = 0.7  # Pareto k̂, Vehtari et al. 2024
LEAST_FOR_KHAT = 21  # draws, for a tail of five
FIRST_LOOK = 100  # draws before the first question whether they are enough


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The result of :func:`evaluate`: numbers for the data set, and float64 tensors [N] for its examples, in
    their order. ``print`` it for a summary, :meth:`save` it to a file.
    """

    nll: float
    """Mean of −log p(x), in nats per example."""
    stderr: float
    """Standard error of nll over the choice of examples."""
    mc_stderr: float
    """Standard error of nll over the draws of z: what another seed would change."""
    bits_per_dim: float
    """nll / (X log 2) for X numbers in an example. For data that were dequantised from 2^b levels to [0, 1],
    add b."""
    log_px: Tensor
    """log p(x) of each example, in nats."""
    log_px_stderr: Tensor
    """Its standard error over the draws."""
    ess: Tensor
    """Effective sample size."""
    khat: Tensor
    """Pareto k̂: above 0.7 the example's log_px and its standard error are not to be trusted."""
    k: Tensor
    """Draws made, int64."""
    elbo: Tensor
    """Mean of the log weights: the bound of k=1."""
    active_units: int | None
    """Latents whose posterior mean has a variance above 0.01 over the data (Burda et al.); None where q has
    no ``mu``, or NaN in it."""
    kl_per_dim: Tensor | None
    """KL(q ‖ p) of each latent, averaged over the data [D]; None where q has no analytic KL."""
    curve: list[tuple[int, float, float]]
    """(draws, nll by so many draws of each example at most, its standard error over examples), rising
    draws."""
    dims: float
    """Numbers in an example, X; their mean where examples differ in size."""

    @property
    def ess_quantiles(self) -> tuple[float, float, float]:
        """5 %, 50 % and 95 % of the effective sample sizes."""
        values = self.ess[self.ess.isfinite()]
        if not len(values):
            return math.nan, math.nan, math.nan
        return tuple(torch.quantile(values, values.new_tensor([0.05, 0.5, 0.95])).tolist())

    @property
    def untrusted(self) -> float:
        """The share of the examples whose k̂ is above 0.7."""
        return float((self.khat > UNTRUSTED).double().mean())

    def __str__(self) -> str:
        n, fewest, most = len(self.log_px), int(self.k.min()), int(self.k.max())
        draws = f"{most} draw{'s' * (most > 1)} each"
        if fewest != most:
            draws = f"{fewest} to {most} draws, {float(self.k.double().mean()):.0f} on average"
        gap = float((self.log_px - self.elbo).mean())
        low, median, high = (f"{v:.1f}" if v < 10 else f"{v:.0f}" for v in self.ess_quantiles)
        error = f" ± {self.stderr:.2f}" * (n > 1)
        nll = f"{self.nll:.2f}{error} nats (± {self.mc_stderr:.2g} by the draws)"
        ess = f"median {median}; {low} to {high} for nine of ten examples" if n > 1 else median
        lines = [
            f"log p(x) of {n} example{'s' * (n > 1)}, {draws}",
            f"  NLL            {nll}",
            f"  bits           {self.bits_per_dim:.4f} per dimension, of {self.dims:g}",
            f"  ELBO           {float(self.elbo.mean()):.2f} nats, {gap:.2f} below log p(x)",
            f"  ESS            {ess}",
        ]
        if bool(self.khat.isnan().all()):
            lines.append(f"  Pareto k-hat   unknown; it takes {LEAST_FOR_KHAT} draws")
        else:
            share = f"above {UNTRUSTED} for {100 * self.untrusted:.1f} % of the examples"
            lines.append(f"  Pareto k-hat   median {float(self.khat.nanmedian()):.2f}; {share}")
            if self.untrusted:
                lines[-1] += ","
                lines.append("                 whose log p(x) is not to be trusted, and likely too low")
        if self.active_units is not None:
            total = kl = ""
            if self.kl_per_dim is not None:
                total = f" of {len(self.kl_per_dim)}"
                kl = f"; KL {float(self.kl_per_dim.sum()):.2f} nats"
            lines.append(f"  latents        {self.active_units}{total} active{kl}")
        if nan := int(self.log_px.isnan().sum()):
            lines.append(f"  NaN            {nan} example{'s' * (nan > 1)}")
        # A summary must not end a script whose output has no sign for ±.
        return printable("\n".join(lines), sys.stdout)

    __repr__ = __str__

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every field to an .npz file, for :meth:`load` and ``numpy.load``; what is None is left out.
        A file that is there is replaced when the new one is complete.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        arrays = {name: np.asarray(v) for name, v in values.items() if v is not None}
        write_arrays(Path(path).expanduser(), arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evaluation:
        """The result that :meth:`save` wrote.

        Raises:
            OSError: if the file cannot be read.
            ValueError: if it holds something else.

        Example:
            >>> import tempfile, torch, fastvae
            >>> def encoder(x):
            ...     return torch.zeros(len(x), 2), torch.zeros(len(x), 2)
            >>> decoder, x = torch.nn.Linear(2, 8), torch.rand(16, 8)
            >>> result = fastvae.evaluate(encoder, decoder, x, k=50, likelihood="bernoulli", progress=False)
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     result.save(f"{folder}/result.npz")
            ...     again = fastvae.Evaluation.load(f"{folder}/result.npz")
            >>> torch.equal(again.log_px, result.log_px)
            True
        """
        try:
            with np.load(Path(path).expanduser(), allow_pickle=False) as file:
                values = _fields_of(dict(file))
        except OSError:
            raise
        except Exception as error:  # whatever a file of something else brings about
            raise ValueError(
                f"{os.fspath(path)} holds no result that Evaluation.save wrote ({type(error).__name__}: "
                f"{error})"
            ) from None
        return cls(**values)


def _fields_of(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Of an Evaluation that was saved."""
    if "settings" in arrays:
        raise ValueError("it is a checkpoint; evaluate(..., checkpoint=path) returns the result")
    n = len(arrays["log_px"])
    values: dict[str, Any] = {}
    for field in fields(Evaluation):
        name, value = field.name, arrays.get(field.name)
        if value is None and field.type.endswith("| None"):
            values[name] = None
        elif value is None:
            raise ValueError(f"there is no {name}")
        elif name == "curve":
            values[name] = [(int(k), nll, error) for k, nll, error in value.tolist()]
        elif "Tensor" in field.type:
            if value.shape != (n,) and name != "kl_per_dim":
                raise ValueError(f"{name} has shape {list(value.shape)}; log_px has [{n}]")
            values[name] = torch.from_numpy(value)
        else:
            values[name] = value.item()
    return values


@torch.no_grad()
def evaluate(
    encoder: Callable[[Tensor], Any],
    decoder: Callable[[Tensor], Any],
    data: Tensor | np.ndarray | Dataset[Any] | Iterable[Any],
    *,
    k: int | None = None,
    tol: float | None = None,
    k_chunk: int | None = None,
    batch_size: int = 100,
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    shard: str = "data",
    progress: bool = True,
    generator: torch.Generator | None = None,
) -> Evaluation:
    r"""Estimate log p(x) of every example of a data set by importance sampling, with its error and
    diagnostics.

    .. math:: \mathrm{NLL} = -\frac{1}{N} \sum_{n=1}^{N} \log \hat p(x_n), \quad
              \log \hat p(x) = \log \frac{1}{K} \sum_{k=1}^{K} w_k

    Each batch is encoded once; its draws are streamed (:func:`fastvae.log_marginal`). Encoder and decoder,
    and the modules that they refer to, are put into eval mode and back; batches are moved to the encoder's
    device, and to its floating dtype (integers for the encoder alone: the likelihood has them as they are).
    Means are over examples, whatever the batches. No gradients.

    Under ``torch.distributed`` (``torchrun``, gloo or nccl) the ranks share the work, and each returns the
    whole result; each must be given the whole data, in the same order. When a rank fails, the others raise an
    error that says so when they next exchange results. The noise is addressed by the example's place in the
    data and by the draw, so the result is the same for any number of ranks, any batch size and any
    ``k_chunk``, to rounding.

    Args:
        encoder: x [B, \*event] -> q, what :func:`fastvae.elbo` takes.
        decoder: z [N, D] -> parameters of the likelihood.
        data: a tensor or array [N, \*event], a map-style Dataset, or an iterable of batches, tensors or
            arrays, such as a DataLoader; of a batch that is a tuple or list, the first entry.
        k: draws per example; default 5000. With ``tol`` it is the most, by default 100 000.
        tol: draw 100, 200, 400, … until an example's standard error is at most tol nats. Easy examples then
            cost little. An example may stop before its largest weights have come, which makes log p(x) low:
            by up to half of tol where weights are heavy-tailed, hardly where they are not (docs/NOTES.md).
            Examples that are done are no longer decoded, so a row of the decoder's output must not depend on
            the other rows; the first batch is asked whether it does.
        k_chunk: draws at a time, as in :func:`fastvae.log_marginal`.
        batch_size: of data that do not come in batches.
        likelihood, prior: as in :func:`fastvae.elbo`.
        checkpoint: a file, such as ``"run.npz"``, that gets the results as they come. If it exists, the work
            goes on where it stopped, with its seed. It is refused for other weights, data or settings. When
            it cannot be written, a warning says so and the work goes on.
        shard: under torch.distributed, what ranks share: ``"data"``, whole batches; ``"samples"``, each
            example's draws, for few examples and a large k; or ``"none"``, nothing: this process evaluates
            alone, and others need not call evaluate.
        progress: show a progress bar with the NLL so far.
        generator: source of the noise; default torch's own random state.

    Returns:
        :class:`Evaluation`.

    Raises:
        TypeError, ValueError: for arguments that do not fit, data without a batch, a checkpoint of something
            else, and with ``tol`` for a decoder whose rows depend on each other.
        RuntimeError: if another rank failed.

    References:
        Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016; Vehtari et al., Pareto Smoothed
        Importance Sampling, 2024.

    Example:
        >>> import torch, fastvae
        >>> encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
        >>> def q(x):
        ...     return encoder(x).chunk(2, dim=1)
        >>> x = torch.rand(16, 8)
        >>> result = fastvae.evaluate(q, decoder, x, k=50, likelihood="bernoulli", progress=False)
        >>> result.log_px.shape, result.kl_per_dim.shape
        (torch.Size([16]), torch.Size([2]))
    """
    likelihood, prior = as_likelihood(likelihood), as_prior(prior)
    for name, value in (("encoder", encoder), ("decoder", decoder)):
        if not callable(value):
            raise TypeError(f"{name} must be a module or another callable, got {type(value).__name__}")
    if k is not None:
        check_count("k", k, "the importance samples per example")
    if tol is not None and not (tol := check_number("tol", tol, "in nats")):
        raise ValueError("tol must be greater than 0: no finite number of draws has no error")
    check_choice("shard", shard, ("data", "samples", "none"))
    check_count("batch_size", batch_size, "the examples of a batch")
    k = k or (5000 if tol is None else 100_000)
    ranks = Ranks(shard)
    plan = _Plan(k, tol, Chunks(k_chunk), ranks)
    with ranks.telling():
        device, dtype = _place(encoder, decoder)
        batches = _batches(data, batch_size, shard)
        settings: dict[str, Any] = {"format": 1, "k": k, "tol": tol}
        if checkpoint is not None:
            settings["weights"] = weights_digest(encoder, decoder, likelihood, prior)
        asked = None if generator is None else int(draw_seed(generator.device, generator))
        settings["seed"] = ranks.first(asked)
        store = Store(checkpoint, settings, ranks)
        seed = ranks.first(int(draw_seed("cpu")) if store.seed is None else store.seed)
        store.begin(seed)

        def evaluate_batch(index: int, x: Tensor, row: int, plan: _Plan) -> Part:
            x = x.to(device or x.device)
            # Counts go to the likelihood as they are, and to the encoder as numbers of its own type.
            seen = x.to(dtype or x.dtype)
            x = seen if x.is_floating_point() else x
            try:
                q = as_posterior(encoder(seen))
            except Exception as error:
                if hasattr(error, "add_note"):  # Python 3.11
                    error.add_note(
                        f"fastvae.evaluate gave the encoder batch {index}: {shape_of(seen)}, {seen.dtype}"
                    )
                raise
            return _evaluate_batch(index, Model.read(x, q, decoder, likelihood, prior), seed, row, plan)

        bar = tqdm(
            total=_length(batches),
            desc="log p(x)",
            unit="batch",
            disable=not progress or ranks.rank != 0,
            file=ProgressStream(),
        )
        modules = [m for f in (encoder, decoder, likelihood, prior) for m in modules_of(f)]
        with bar, _evaluating(modules):
            try:
                row, axes, running, compared = 0, None, _Running(), False
                for index, batch in enumerate(batches):
                    x = _data_of(batch, axes, likelihood)
                    row, start, axes = row + x.shape[0], row, x.dim()
                    if x.shape[0] == 0:
                        continue
                    part = store.see(index, x)
                    if part is None and ranks.takes(index):
                        part = evaluate_batch(index, x, start, plan)
                        store.add(part)
                    elif part is not None and not compared:
                        first = _Plan(1, None, plan.chunks, Ranks("none"))
                        _check_weights(checkpoint, part, evaluate_batch(index, x, start, first))
                        compared = True
                    bar.update()
                    if part is not None and not bar.disable:
                        bar.set_postfix_str(running.add(part))
            finally:
                store.save()
        parts = store.finish()
    if not parts:
        raise ValueError("data has no batches: there is nothing to evaluate")
    return _combine(parts, plan.looks)


# One batch


class _Plan:
    """How many draws, when to look, and by whom.

    ``looks`` are the numbers of draws after which the bound is noted; with ``tol``, from FIRST_LOOK on,
    examples that are done leave.
    """

    def __init__(self, k: int, tol: float | None, chunks: Chunks, ranks: Ranks):
        looks = {10**i for i in range(10)}
        if tol is not None:
            looks = {n for n in looks if n < FIRST_LOOK} | {FIRST_LOOK * 2**i for i in range(26)}
        self.looks = [*sorted(n for n in looks if n < k), k]
        self.tol = tol
        self.leaving = tol is not None and k > FIRST_LOOK  # examples leave: rows are decoded without others
        self.proven = False  # that this does not change what the decoder makes of them
        self.tail = tail_length(k) + 1
        self.chunks = chunks
        self.ranks = ranks


def _evaluate_batch(index: int, model: Model, seed: int, row: int, plan: _Plan) -> Part:
    device = model.q.device
    key = torch.tensor(seed, dtype=torch.int64, device=device)
    latent = _latent_statistics(model.q, model.prior)
    if plan.leaving and not plan.proven and model.q.batch > 1:
        _check_rows(model, key, row, plan)
        plan.proven = True
    total: Weights | None = None
    rows: Tensor | None = None
    curve = []
    for start, stop in pairwise([0, *plan.looks]):
        share = plan.ranks.share(start, stop)
        part = None
        if share[0] < share[1]:
            part = _model.weights(model, key, *share, plan.chunks, plan.tail, row_offset=row, rows=rows)
        part = plan.ranks.merge(part, device)
        assert part is not None  # some rank has draws
        if total is None:
            total = part
        elif rows is None:
            total = total.merge(part)
        else:
            total = total.put(rows, total.at(rows).merge(part))
        curve.append(total.log_px)
        if plan.tol is not None and stop >= FIRST_LOOK:
            # NaN and inf stay what they are; while all weights are 0 their error is not known.
            wanted = ~(total.stderr <= plan.tol) & ~total.log_px.isnan() & (total.log_px != math.inf)
            rows = wanted.nonzero()[:, 0]
            if not len(rows):
                break
            rows = None if len(rows) == len(wanted) else rows
    assert total is not None
    curve += curve[-1:] * (len(plan.looks) - len(curve))
    values = (total.log_px, total.stderr, total.ess, total.khat, total.count, total.elbo, torch.stack(curve))
    return Part(
        index,
        np.zeros(16, np.uint8),
        latent,
        model.x.shape[1:].numel(),
        *(v.cpu().numpy() for v in values),
    )


def _check_rows(model: Model, key: Tensor, row: int, plan: _Plan) -> None:
    """That a row's log weight does not depend on which other rows are decoded with it.

    The upper half of the batch is decoded alone, upside down, so that a decoder that keeps something for each
    row of the batch meets other rows than its own, and not a multiple of them.

    Raises:
        ValueError: where it does.
    """
    assert plan.tol is not None
    batch, device = model.q.batch, model.q.device
    rows = torch.arange(batch - 1, (batch - 1) // 2, -1, device=device)

    def log_weights(draws: int, chunks: Chunks, rows: Tensor | None = None) -> Tensor:
        stream = _model.stream(model, key, 0, draws, chunks, row_offset=row, rows=rows)
        return torch.cat(list(stream))[0].double().cpu()

    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"tol={plan.tol:g} needs a model in which a row of the decoder's output depends on that row of z "
            f"alone, since examples that are done are no longer decoded. {reason}. A decoder that uses "
            "something of the batch beside z, such as labels, needs the whole batch: leave tol out and give "
            "k, or use batch_size=1"
        )

    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        whole = log_weights(2, plan.chunks)
        again = log_weights(1, Chunks(1))
        try:
            alone = log_weights(1, Chunks(1), rows)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            raise refuse(f"With {len(rows)} of {batch} rows of the first batch it raised {said}") from error
    whole_rows = whole[rows.cpu()]
    off = _distance(alone, whole_rows)
    # What the number of draws changes is rounding, or noise of the decoder's own, which cannot be judged.
    noise = _distance(again, whole).max()
    mean = model.x if model.q.mean is None else model.q.mean
    half = mean.dtype.itemsize == 2 or torch.is_autocast_enabled(device.type)
    rounding = 2e-3 if half else 1e-5
    largest = whole[whole.isfinite()].abs().amax() if bool(whole.isfinite().any()) else 0.0
    if float(off.max()) > max(10 * float(noise), 0.01 * plan.tol, rounding * float(largest)):
        n = int(off.argmax())
        raise refuse(
            f"Row {int(rows[n])} of the first batch has a log weight of {float(whole_rows[n]):.6g} in the "
            f"whole batch of {batch}, and of {float(alone[n]):.6g} where {len(rows)} of its rows are decoded"
        )


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """|a − b|, 0 for equal infinities and for NaN in both, else infinite for them."""
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=math.inf))


def _latent_statistics(q: Distribution, prior: Distribution) -> np.ndarray:
    """[3, D]: mean of the posterior means, the sum of their squared deviations, the sum of the KL; [2, D]
    where q has no analytic KL to this prior; [2, 0] where q has no means [B, D].
    """
    if q.mean is None or q.mean.dim() != 2:
        return np.zeros((2, 0))
    means = q.mean.double()
    mean = means.mean(0)
    statistics = [mean, (means - mean).square().sum(0)]
    kl = closed_kl(q, prior)
    if kl is not None and kl.shape == means.shape:
        statistics.append(kl.double().sum(0))
    return torch.stack(statistics).cpu().numpy()


# All batches


def _combine(parts: list[Part], looks: list[int]) -> Evaluation:
    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(p, name) for p in parts], -1))

    log_px, stderr, curve = joined("log_px"), joined("stderr"), joined("curve")
    n = len(log_px)
    total = sum(p.dims * len(p.log_px) for p in parts)
    advice = (
        ", and so are means over all; look at their x, q and decoder output, or take -result.log_px.nanmean()"
    )
    _warn_about("NaN", log_px.isnan(), advice)
    advice = ": every draw was impossible, so it takes more draws or another q"
    _warn_about("-inf", log_px == -math.inf, advice)
    nll = -float(log_px.mean())
    active, kl = _latents(parts)
    return Evaluation(
        nll=nll,
        stderr=_standard_error(log_px),
        mc_stderr=float(stderr.square().sum().sqrt()) / n,
        bits_per_dim=nll * n / (total * math.log(2)) if total else math.nan,
        log_px=log_px,
        log_px_stderr=stderr,
        ess=joined("ess"),
        khat=joined("khat"),
        k=joined("k"),
        elbo=joined("elbo"),
        active_units=active,
        kl_per_dim=kl,
        curve=[(k, -float(v.mean()), _standard_error(v)) for k, v in zip(looks, curve, strict=True)],
        dims=total / n,
    )


def _warn_about(what: str, which: Tensor, advice: str) -> None:
    if count := int(which.sum()):
        first = ", ".join(map(str, which.nonzero()[:5, 0].tolist())) + ", …" * (count > 5)
        warnings.warn(
            f"fastvae.evaluate: log p(x) is {what} for {count} of {len(which)} examples (number "
            f"{first}){advice}",
            RuntimeWarning,
            stacklevel=5,
        )


def _standard_error(values: Tensor) -> float:
    return float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else math.nan


def _latents(parts: list[Part]) -> tuple[int | None, Tensor | None]:
    """Active units and KL per dimension, by adding sums, and squared deviations about the common mean."""
    if not parts[0].latent.shape[1]:
        return None, None
    sizes = np.array([len(p.log_px) for p in parts], dtype=np.float64)[:, None]
    mean, deviations, *kl = np.stack([p.latent for p in parts], 1)  # each [parts, D]
    n = sizes.sum()
    common = (sizes * mean).sum(0) / n
    variance = (deviations + sizes * (mean - common) ** 2).sum(0) / max(n - 1, 1)
    active = None if np.isnan(variance).any() else int((variance > ACTIVE).sum())
    return active, torch.from_numpy(kl[0].sum(0) / n) if kl else None


class _Running:
    """The NLL of the parts so far, by sums about the first value."""

    def __init__(self) -> None:
        self.n, self.shift, self.first, self.second = 0, 0.0, 0.0, 0.0

    def add(self, part: Part) -> str:
        if not self.n:
            self.shift = part.log_px[0]
        values = part.log_px - self.shift
        self.n += len(values)
        self.first += values.sum()
        self.second += np.square(values).sum()
        variance = (self.second - self.first**2 / self.n) / max(self.n - 1, 1)
        return f"NLL {-self.shift - self.first / self.n:.2f} ± {np.sqrt(variance / self.n):.2f}"


# Data and modules


def _batches(data: Any, batch_size: int, shard: str) -> Iterable[Any]:
    if hasattr(data, "__array__") and not isinstance(data, Tensor):
        data = np.asarray(data)
    if isinstance(data, (Tensor, np.ndarray)):
        if data.ndim == 0:
            raise ValueError(f"data is a {type(data).__name__} of no dimensions; expected [N, *event]")
        return [data[i : i + batch_size] for i in range(0, len(data), batch_size)]
    if isinstance(data, Dataset) and not isinstance(data, IterableDataset):
        return DataLoader(data, batch_size)
    sampler = data.sampler if isinstance(data, DataLoader) else None
    if isinstance(sampler, DistributedSampler) and shard != "none":
        raise ValueError(
            "data has a DistributedSampler, but evaluate shares the batches among the ranks itself; give it "
            'a loader of the whole data set, or shard="none" to evaluate this rank\'s part alone'
        )
    if not isinstance(data, Iterable) or isinstance(data, (str, bytes)):
        raise TypeError(
            "data must be a tensor or array [N, *event], a Dataset, or an iterable of batches such as a "
            f"DataLoader; got {type(data).__name__}"
        )
    return data


def _length(batches: Iterable[Any]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # a generator, or a loader of one
        return None


def _data_of(batch: Any, axes: int | None, likelihood: Likelihood) -> Tensor:
    """x [B, *event] of a batch; ``axes`` is how many those before it had."""
    x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
    if isinstance(x, np.ndarray):
        with contextlib.suppress(TypeError):  # of strings or objects
            x = torch.from_numpy(x.astype(x.dtype.newbyteorder("="), order="C"))
    if not isinstance(x, Tensor):
        kind = f"{type(x).__name__} of {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
        came = f"a {kind}" if x is batch else f"a {type(batch).__name__} of {kind}"
        hint = ": (batch['x'] for batch in loader)" if isinstance(batch, dict) else " of tensors"
        raise TypeError(
            "a batch must be a tensor or array of numbers, or a tuple or list that begins with one; got "
            f"{came}. Give evaluate a generator{hint}"
        )
    if x.dim() == 0:
        raise ValueError("a batch of data is a tensor of no dimensions; expected [B, *event]")
    if axes not in (None, x.dim()):
        raise ValueError(
            f"data has a batch of shape {shape_of(x)} after batches of {axes} axes. A tuple or list is taken "
            "as batches: of (x, labels) give x alone"
        )
    return check_data(x, likelihood, "data")


def _place(
    encoder: Callable[..., Any], decoder: Callable[..., Any]
) -> tuple[torch.device | None, torch.dtype | None]:
    """Device and floating dtype of the encoder's modules, else the decoder's; None where they have none."""
    devices, dtypes = {}, []
    for name, function in (("encoder", encoder), ("decoder", decoder)):
        modules = modules_of(function)
        tensors = [t for m in modules for t in m.parameters()] + [t for m in modules for t in m.buffers()]
        if tensors:
            devices[name] = tensors[0].device
        dtypes += [t.dtype for t in tensors if t.dtype in FLOATING]
    if len(set(devices.values())) > 1:
        where = [f"the {name} is on {device}" for name, device in devices.items()]
        raise ValueError(f"{where[0]} but {where[1]}; move one of them")
    if any(d.type == "meta" for d in devices.values()):
        raise ValueError("encoder and decoder are on meta, a device without numbers; load their weights")
    return devices.get("encoder", devices.get("decoder")), dtypes[0] if dtypes else None


# Modules that are evaluated now: by how many, and the mode that each had before the first.
_evaluated: dict[nn.Module, tuple[int, bool]] = {}
_evaluated_lock = threading.Lock()


@contextlib.contextmanager
def _evaluating(modules: list[nn.Module]) -> Iterator[None]:
    """Every module in eval mode, and each back in its own when the last evaluation of it ends, in whatever
    thread.
    """
    # A frozen ScriptModule has no mode.
    parts = {m for module in modules for m in module.modules() if hasattr(m, "training")}
    with _evaluated_lock:
        for m in parts:
            count, mode = _evaluated.get(m, (0, m.training))
            _evaluated[m] = count + 1, mode
            m.training = False
    try:
        yield
    finally:
        with _evaluated_lock:
            for m in parts:
                count, mode = _evaluated.pop(m)
                if count > 1:
                    _evaluated[m] = count - 1, mode
                else:
                    m.training = mode


def _check_weights(checkpoint: Any, part: Part, again: Part) -> None:
    """The first draw once more: it also sees weights and code that no module holds."""
    if not np.allclose(part.curve[0], again.curve[0], rtol=1e-5, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"checkpoint {checkpoint} was made with another encoder or decoder: the same draw has other "
            "weights now. Give another name to start anew, or delete it"
        )
