"""Evaluation loop over batches: draws, stopping criterion, checks."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ...core.checks import check_choice, check_count, check_number, shape_of
from ...core.hints import teaches
from ...core.options import SHARDS, Noise, ProposalName, Shard
from ...core.terminal import ProgressStream
from ...distributions import STANDARD, Distribution, as_posterior, as_prior, closed_kl, is_conditional
from ...inputs.batch import Inputs
from ...inputs.modules import evaluating, modules_of, parameters_digest
from ...inputs.nested import Beside, called, each, event_size, tensors
from ...likelihoods.base import Likelihood, as_likelihood
from ...random import NOISES, RANDOMISATIONS, draw_seed, seed_of
from .. import stream as _stream
from ..proposals import Posterior, Proposal, as_proposal
from ..stream import Chunks
from ..weights import Weights, kept_draws
from .audit import Sample, probe, run_audit
from .checkpoint import Store
from .data import batches_of, data_of, length_of, place_of, unpacked
from .parts import Part
from .ranks import Ranks
from .result import Evaluation, combine

FIRST_LOOK = 100  # draws before the stopping criterion is first evaluated
# Default batch sizes. A GPU waits for the host if batches are small: docs/NOTES.md.
BATCH, BATCH_ON_GPU = 100, 500


@teaches
@torch.no_grad()
def evaluate(
    encoder: Callable[..., Any],
    decoder: Callable[..., Any],
    data: Tensor | np.ndarray | Mapping[str, Any] | Dataset[Any] | Iterable[Any],
    *,
    k: int | None = None,
    tol: float | None = None,
    k_chunk: int | None = None,
    noise: Noise = "philox",
    proposal: ProposalName | Proposal = "posterior",
    batch_size: int | None = None,
    likelihood: str | Likelihood = "gaussian",
    prior: Any = None,
    prepare_batch: Callable[[Any], Mapping[str, Any]] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    audit: int | None = None,
    shard: Shard = "data",
    progress: bool = True,
    generator: torch.Generator | None = None,
) -> Evaluation:
    r"""Estimate log p(x) of every example of a data set by importance sampling, with errors and diagnostics.

    .. math:: \mathrm{NLL} = -\frac{1}{N} \sum_{n=1}^{N} \log \hat p(x_n), \quad
              \log \hat p(x) = \log \frac{1}{K} \sum_{k=1}^{K} w_k

    Each batch is encoded once; its draws are streamed (:func:`fastvae.log_marginal`). Encoder and decoder,
    modules or methods of modules, are put into eval mode during the evaluation; the modules that another
    function reaches must be in eval mode already, or be named by a :class:`fastvae.VAE`. Batches are moved to
    the encoder's device and floating dtype; the likelihood gets integers unchanged, and float32 data of a
    model in half precision, too. Means are over examples, for any batches. No gradients are computed.

    Under ``torch.distributed`` (``torchrun``, gloo or nccl) the ranks share the work, and each returns the
    whole result; each must be given the whole data, in the same order. If a rank fails, the others raise an
    error at the next exchange of results. The noise is addressed by the example's index in the data and by
    the draw, so the result is the same for any number of ranks, any batch size and any ``k_chunk``, to
    rounding.

    Args:
        encoder: x [B, \*event] -> q, as in :func:`fastvae.elbo`; with a context, (x, context) -> q.
        decoder: z [N, D] -> parameters of the likelihood; with a context, (z, context) -> parameters. Shaped
            latents are passed as [N, C, H, W]; in the result they are flat, D = C·H·W.
        data: a tensor or array [N, \*event], a map-style Dataset, or an iterable of batches, tensors or
            arrays, such as a DataLoader; if a batch is a tuple or list, its first entry. For
            :class:`fastvae.likelihoods.Joint` a dict of tensors or arrays, or batches that are dicts.
        k: draws per example, default 5000. With ``tol`` the maximum, default 100 000.
        tol: draw 100, 200, 400, … until an example's standard error is at most tol nats, so that easy
            examples cost little. An example may stop before its largest weights are drawn, which biases log
            p(x) down: by up to half of tol for heavy-tailed weights, hardly for others (docs/NOTES.md).
            Finished examples are no longer decoded, so a row of the decoder's output must not depend on
            other rows; this is validated on the first batch. Default: None, k draws for each example.
        k_chunk: draws per chunk, as in :func:`fastvae.log_marginal`.
        noise: ``"philox"`` (default) or ``"qmc"``, as in :func:`fastvae.log_marginal`.
        proposal: distribution from which z is drawn, as in :func:`fastvae.log_marginal`. ``elbo`` uses the
            draws from q: with ``"adapted"`` the first 64; with the other proposals except ``"posterior"`` it
            is NaN.
        batch_size: examples per batch, for data not in batches. It does not change results. Default: 100, on
            a GPU 500.
        likelihood: name or object, as in :func:`fastvae.elbo`. Default ``"gaussian"``.
        prior: as in :func:`fastvae.elbo`. Default: N(0, I), or the hierarchy that produced q.
        prepare_batch: function of a batch that returns a dict with ``x`` and, optionally, ``mask``,
            ``size_factor`` and ``context`` (:func:`fastvae.elbo`), such as
            ``lambda batch: {"x": batch[0], "context": batch[1]}``. Default: the batch is x.
        checkpoint: file, such as ``"run.npz"``, to which results are written during the evaluation. If it
            exists, the evaluation resumes from it, with its seed. It is rejected for other parameters, data
            or settings. If it cannot be written, a warning is issued and the evaluation continues. Default:
            None.
        audit: number of examples, evenly spaced over the data, to estimate once more at the end by
            :func:`fastvae.audit.ais` with its default settings, which shows by how much the importance
            estimate may be low. As many simulated examples are bounded from both sides
            (:func:`fastvae.audit.bdmc`), which measures the error of the annealing. The result is ``audit``,
            :class:`~.audit.Audit`. Each example takes 8000 evaluations of the decoder with a gradient by z, a
            simulated one 14 400. It is not part of a checkpoint. Default: no audit.
        shard: division of the work under torch.distributed: ``"data"`` (default), by batches; ``"samples"``,
            by each example's draws, for few examples and a large k; or ``"none"``: this process evaluates
            alone, and others need not call evaluate.
        progress: show a progress bar with the current NLL. Default True.
        generator: source of the noise. Default: torch's global random state.

    Returns:
        :class:`Evaluation`.

    Raises:
        TypeError, ValueError: for invalid arguments, data without a batch, a checkpoint of another
            evaluation, and with ``tol`` for a decoder whose rows depend on each other.
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
    likelihood = as_likelihood(likelihood)
    # None may stand for the posterior's own prior.
    prior = prior if prior is None or is_conditional(prior) else as_prior(prior)
    if prepare_batch is not None and not callable(prepare_batch):
        raise TypeError(
            "prepare_batch must be a function of a batch, such as lambda batch: {'x': batch[0], 'context': "
            f"batch[1]}}; got {type(prepare_batch).__name__}"
        )
    for name, value in (("encoder", encoder), ("decoder", decoder)):
        if not callable(value):
            raise TypeError(f"{name} must be a module or another callable, got {type(value).__name__}")
    if k is not None:
        k = check_count("k", k, "the importance samples per example")
    if tol is not None and not (tol := check_number("tol", tol, "in nats")):
        raise ValueError("tol must be greater than 0, got 0: any finite number of draws has an error")
    check_choice("noise", noise, NOISES)
    if audit:
        audit = check_count("audit", audit, "the examples that are estimated once more")
    check_choice("shard", shard, SHARDS)
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size, "the examples of a batch")
    k = k or (5000 if tol is None else 100_000)
    ranks, proposal = Ranks(shard), as_proposal(proposal, noise)
    plan = _Plan(k, tol, Chunks(k_chunk), ranks, noise, proposal)
    with ranks.telling():
        device, dtype = place_of(encoder, decoder)
        place = device or getattr(data, "device", None)
        on_gpu = isinstance(place, torch.device) and place.type != "cpu"
        batches = batches_of(data, batch_size or (BATCH_ON_GPU if on_gpu else BATCH), shard)
        settings: dict[str, Any] = {"format": 2, "k": k, "tol": tol}
        if noise != "philox":  # the default, which checkpoints of older versions do not contain
            settings["noise"] = noise
        if proposal != Posterior():
            settings["proposal"] = repr(proposal)
        if checkpoint is not None:
            settings["parameters"] = parameters_digest(
                encoder, decoder, likelihood, STANDARD if prior is None else prior
            )
        asked = None if generator is None else int(draw_seed(generator.device, generator))
        settings["seed"] = ranks.first(asked)
        store = Store(checkpoint, settings, ranks)
        seed = ranks.first(int(draw_seed("cpu")) if store.seed is None else store.seed)
        store.begin(seed)

        def read(name: str, x: Any, beside: Beside | None) -> Inputs:
            def seen_by_modules(t: Tensor) -> Tensor:
                own = t.dtype if t.is_floating_point() else torch.get_default_dtype()
                return t.to(device or t.device, dtype or own)

            def moved(t: Tensor) -> Tensor:
                """Move data that the likelihood reads: half precision would round integers and float32."""
                t = t.to(device or t.device)
                if not t.is_floating_point() or dtype is None:
                    return t
                return t.to(dtype if dtype.itemsize > 2 or t.dtype.itemsize == 2 else torch.float32)

            seen, x = each(seen_by_modules, x), each(moved, x)
            context = None
            if beside is not None:
                context = each(
                    lambda t: seen_by_modules(t) if t.is_floating_point() else moved(t), beside.context
                )
                beside = Beside(each(moved, beside.mask), each(moved, beside.size_factor), context)
            try:
                q = as_posterior(called("encoder", encoder, seen, context))
            except Exception as error:
                if hasattr(error, "add_note"):  # Python 3.11
                    given = ", ".join(f"{shape_of(t)}, {t.dtype}" for t in tensors(seen))
                    error.add_note(
                        f"fastvae.evaluate gave the encoder {name}: {given}"
                        f"{'' if context is None else ' and the context'}"
                    )
                raise
            return Inputs.read(x, q, decoder, likelihood, prior, beside)

        def evaluate_batch(index: int, x: Any, beside: Beside | None, row: int, plan: _Plan) -> Part:
            inputs = read(f"batch {index}", x, beside)
            if sample.count and row == 0:
                probe(inputs)
            return _evaluate_batch(index, inputs, seed, row, plan)

        bar = tqdm(
            total=length_of(batches),
            desc="log p(x)",
            unit="batch",
            disable=not progress or ranks.rank != 0,
            file=ProgressStream(),
        )
        sample = Sample(audit or 0)
        modules = [m for f in (encoder, decoder, likelihood, prior) for m in modules_of(f)]
        with bar, evaluating(modules):
            if isinstance(prior, Distribution):
                prior = prior.prepared()
            try:
                row, axes, running, compared = 0, None, _Running(), False
                for index, batch in enumerate(batches):
                    batch, beside = unpacked(batch, prepare_batch)
                    x = data_of(batch, axes, likelihood)
                    examples = tensors(x)[0].shape[0]
                    row, start, axes = row + examples, row, [t.dim() for t in tensors(x)]
                    if examples == 0:
                        continue
                    sample.see(x, beside, start)
                    part = store.see(index, [*tensors(x), *(t for p in beside or () for t in tensors(p))])
                    if part is None and ranks.takes(index):
                        part = evaluate_batch(index, x, beside, start, plan)
                        store.add(part)
                    elif part is not None and not compared:
                        first = _Plan(1, None, plan.chunks, Ranks("none"), noise, proposal)
                        _check_first_draw(checkpoint, part, evaluate_batch(index, x, beside, start, first))
                        compared = True
                    bar.update()
                    if part is not None and not bar.disable:
                        bar.set_postfix_str(running.add(part))
            finally:
                store.save()
        parts = store.finish()
    if not parts:
        raise ValueError("data has no batches: there is nothing to evaluate")
    result = combine(parts, plan.looks)
    if sample.count:
        with ranks.telling(), evaluating(modules):
            shown = progress and ranks.rank == 0
            found = run_audit(sample, read, result.log_px, seed, ranks, shown)
        result = dataclasses.replace(result, audit=found)
    return result


class _Plan:
    """Number of draws, when to check convergence, and division of the work.

    ``looks`` are the counts of draws after which the bound is recorded; with ``tol``, from FIRST_LOOK on,
    finished examples are dropped.
    """

    def __init__(
        self, k: int, tol: float | None, chunks: Chunks, ranks: Ranks, noise: str, proposal: Proposal
    ):
        looks = {10**i for i in range(10)}
        if tol is not None:
            looks = {n for n in looks if n < FIRST_LOOK} | {FIRST_LOOK * 2**i for i in range(26)}
        self.k = k
        self.looks = [*sorted(n for n in looks if n < k), k]
        self.tol = tol
        self.leaving = tol is not None and k > FIRST_LOOK  # finished examples are no longer decoded
        self.proven = False  # True once it is validated that this does not change the remaining rows
        self.tail = kept_draws(k)
        self.chunks = chunks
        self.ranks = ranks
        self.noise = noise
        self.proposal = proposal


def _evaluate_batch(index: int, inputs: Inputs, seed: int, row: int, plan: _Plan) -> Part:
    device = inputs.q.device
    key = seed_of(plan.noise, torch.tensor(seed, dtype=torch.int64, device=device), RANDOMISATIONS)
    latent = _latent_statistics(inputs.q, inputs.prior)
    if plan.leaving and not plan.proven and inputs.q.batch > 1:
        _check_rows(inputs, key, row, plan)
        plan.proven = True
    ranks = plan.ranks if plan.ranks.by_samples else None
    draws = plan.proposal.draws(inputs, key, row, plan.k, plan.chunks, plan.tail, ranks)
    total: Weights | None = None
    rows: Tensor | None = None
    curve = []
    for start, stop in pairwise([0, *plan.looks]):
        part = plan.ranks.merge(draws.weights(start, stop, rows), device)
        assert part is not None  # some rank has draws
        if total is None:
            total = part
        elif rows is None:
            total = total.merge(part)
        else:
            total = total.put(rows, total.at(rows).merge(part))
        seen = draws.estimate(total)
        curve.append(seen.log_px)
        if plan.tol is not None and stop >= FIRST_LOOK:
            # More draws cannot change NaN and inf; while all weights are 0 the error is unknown.
            wanted = ~(seen.stderr <= plan.tol) & ~seen.log_px.isnan() & (seen.log_px != math.inf)
            rows = wanted.nonzero()[:, 0]
            if not len(rows):
                break
            rows = None if len(rows) == len(wanted) else rows
    assert total is not None
    curve += curve[-1:] * (len(plan.looks) - len(curve))
    values = (*seen.summary(), seen.count, draws.elbo(total), torch.stack(curve))
    return Part(
        index,
        np.zeros(16, np.uint8),
        latent,
        event_size(inputs.x),
        *(v.cpu().numpy() for v in values),
    )


def _check_rows(inputs: Inputs, key: Tensor, row: int, plan: _Plan) -> None:
    """Validate that a row's log weight does not depend on the other rows decoded with it.

    The second half of the batch is decoded alone, in reverse order, so that a decoder that stores data for
    each row of the batch gets wrong rows, and not a multiple of the batch.

    Raises:
        ValueError: if it does.
    """
    assert plan.tol is not None
    batch, device = inputs.q.batch, inputs.q.device
    rows = torch.arange(batch - 1, (batch - 1) // 2, -1, device=device)

    def log_weights(draws: int, chunks: Chunks, rows: Tensor | None = None) -> Tensor:
        stream = _stream.stream(inputs, key, 0, draws, chunks, row_offset=row, rows=rows)
        return torch.cat(list(stream))[0].double().cpu()

    def refuse(reason: str) -> ValueError:
        return ValueError(
            f"tol={plan.tol:g} needs a model in which a row of the decoder's output depends on that row of z "
            f"alone, since examples that are done are no longer decoded. {reason}. A decoder that uses "
            "batch data other than z, such as labels, must be given them as context (see prepare_batch=); or "
            "leave tol out and give k, or use batch_size=1"
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
    # Differences due to the number of draws are rounding, or the decoder's own noise, and set the tolerance.
    noise = _distance(again, whole).max()
    mean = tensors(inputs.x)[0] if inputs.q.mean is None else inputs.q.mean
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
    """Compute |a − b|, with 0 for equal infinities and for NaN in both, else infinity for these."""
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=math.inf))


def _latent_statistics(q: Distribution, prior: Distribution) -> np.ndarray:
    """Return [3, D]: mean of the posterior means, sum of their squared deviations, sum of the KL.

    It is [2, D] if q has no analytic KL to this prior, and [2, 0] if q has no means [B, D].
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


class _Running:
    """Running NLL of the parts, by sums relative to the first value."""

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


def _check_first_draw(checkpoint: Any, part: Part, again: Part) -> None:
    """Compare the first draw with the checkpoint's, which also detects changed weights and code."""
    if not np.allclose(part.curve[0], again.curve[0], rtol=1e-5, atol=1e-3, equal_nan=True):
        raise ValueError(
            f"checkpoint {checkpoint} was made with another encoder or decoder: the same draw now has "
            "different weights. Use another file name to start over, or delete the file"
        )
