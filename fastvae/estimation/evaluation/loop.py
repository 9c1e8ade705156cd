"""Evaluation of a data set: the arguments, the loop over batches, and the audit."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...core.checks import check_choice, check_count
from ...core.hints import teaches
from ...core.options import SHARDS, Noise, ProposalName, Shard
from ...inputs.batch import Inputs
from ...inputs.modules import evaluating
from ...random import draw_seed
from ..proposals import Proposal
from .audit import Sample, probe, run_audit
from .batch import BatchEstimator
from .checkpoint import Store
from .data import Batch, Batches, check_prepare_batch
from .model import Model
from .plan import Plan
from .progress import progress_of
from .ranks import Ranks
from .result import Evaluation, combine


@teaches
@torch.no_grad()
def evaluate(
    vae: Any,
    data: Tensor | np.ndarray | Mapping[str, Any] | Dataset[Any] | Iterable[Any],
    *,
    k: int | None = None,
    tol: float | None = None,
    k_chunk: int | None = None,
    noise: Noise = "philox",
    proposal: ProposalName | Proposal = "posterior",
    batch_size: int | None = None,
    prepare_batch: Callable[[Any], Mapping[str, Any]] | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    audit: int | None = None,
    shard: Shard = "data",
    progress: bool = True,
    generator: torch.Generator | None = None,
    shared_noise: bool = False,
) -> Evaluation:
    r"""Estimate log p(x) of every example of a data set by importance sampling, with errors and diagnostics.

    .. math:: \mathrm{NLL} = -\frac{1}{N} \sum_{n=1}^{N} \log \hat p(x_n), \quad
              \log \hat p(x) = \log \frac{1}{K} \sum_{k=1}^{K} w_k

    Each batch is encoded once; its draws are streamed (:func:`fastvae.log_marginal`). The model is in eval
    mode during the evaluation. Batches are moved to its device and floating dtype; the likelihood gets
    integers unchanged, and float32 data of a model in half precision, too. Means are over examples, for any
    batches. No gradients are computed.

    Under ``torch.distributed`` (``torchrun``, gloo or nccl) the ranks share the work, and each returns the
    whole result; each must be given the whole data, in the same order. If a rank fails, the others raise an
    error at the next exchange of results. The noise is addressed by the example's index in the data and by
    the draw, so the result is the same for any number of ranks, any batch size and any ``k_chunk``, to
    rounding.

    Args:
        vae: the model, a :class:`fastvae.VAE`; ``vae.evaluate(data, ...)`` is the same call.
        data: a tensor or array [N, \*event], a map-style Dataset, or an iterable of batches, tensors or
            arrays, such as a DataLoader; if a batch is a tuple or list, its first entry. For
            :class:`fastvae.likelihoods.Joint` a dict of tensors or arrays, or batches that are dicts. Counts
            of a multinomial likelihood may be sparse matrices, COO or CSR, as a whole or in batches. The data
            set is never converted to a dense tensor, and the encoder gets sparse batches.
        k: draws per example, default 5000. With ``tol`` the maximum, default 100 000.
        tol: draw 100, 200, 400, … until an example's standard error is at most tol nats, so that easy
            examples cost little. An example may stop before its largest weights are drawn, which biases log
            p(x) down: by up to half of tol for heavy-tailed weights, hardly for others (docs/log.md).
            Finished examples are no longer decoded, so a row of the decoder's output must not depend on
            other rows; this is validated on the first batch. Default: None, k draws for each example.
        k_chunk: draws per chunk, which bounds memory and changes results only by rounding: the noise of draw
            k is the same in any chunk. Default: chunks whose decoder output has about 4 million numbers on a
            CPU (sized for its caches), 64 million elsewhere. Halved, with a warning, when memory runs out.
        noise: ``"philox"`` (default), independent draws, or ``"qmc"``: eight independently randomised
            quasi-Monte-Carlo point sets of k/8 draws each (:mod:`fastvae.random`). Their spread gives the
            standard error, and ``jackknife`` leaves out a point set at a time. The variance is smaller by 20
            to 300 times for two latents and light weights, by 2 to 3 for eight, and by 1.5 for fifty, from
            k=4096 on; below 1024 draws it may be larger (docs/log.md). Any k works; 4096, 8192 and other
            powers of 2 use the points best. ESS and k̂ still say how well q fits. Where k̂ is above 0 the
            standard error is too small: the points remove the variance of most draws, but not that of the
            rare large weights, which eight point sets seldom contain. The interval from low to high is then
            at least as wide as that of independent draws.
        proposal: distribution from which z is drawn, with weights relative to it: ``"posterior"`` (default),
            q; ``"adapted"``, fitted to each example during sampling, far better for k of some hundreds or
            more; ``"defensive"``; or an object of :mod:`fastvae.proposals`. ``elbo`` uses the draws from q:
            with ``"adapted"`` the first 64; with the other proposals except ``"posterior"`` it is NaN.
        batch_size: examples per batch, for data not in batches. It does not change results. Default: 100; on
            a GPU 500, or up to 2000 examples of together at most 2^21 numbers.
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
            :class:`~fastvae.estimation.evaluation.audit.Audit`. Each example takes 8000 evaluations of the
            decoder with a gradient by z, a simulated one 14 400. It is not part of a checkpoint. Default: no
            audit.
        shard: division of the work under torch.distributed: ``"data"`` (default), by batches; ``"samples"``,
            by each example's draws, for few examples and a large k; or ``"none"``: this process evaluates
            alone, and others need not call evaluate, unless parameters are sharded (FSDP): then all must.
        progress: show a progress bar with the current NLL if standard error is a terminal or in a notebook; a
            log file or pipe gets none. Default True.
        generator: source of the noise. Default: torch's global random state.
        shared_noise: give all examples the same noise, and so also another model's evaluation with a
            generator in the same state. Differences of log p(x), between similar examples or between models,
            then lose the noise they have in common: :meth:`Evaluation.delta` returns them with their own
            standard error. The error of the mean over examples is larger. Default False.

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
        >>> vae = fastvae.VAE(torch.nn.Linear(8, 4), torch.nn.Linear(2, 8), likelihood="bernoulli")
        >>> result = fastvae.evaluate(vae, torch.rand(16, 8), k=50, progress=False)
        >>> result.log_px.shape, result.kl_per_dim.shape
        (torch.Size([16]), torch.Size([2]))
    """
    model = Model.of(vae)
    check_prepare_batch(prepare_batch)
    plan = Plan.read(k, tol, k_chunk, noise, proposal, shared_noise)
    if audit:
        audit = check_count("audit", audit, "the examples that are estimated once more")
    check_choice("shard", shard, SHARDS)
    if batch_size is not None:
        batch_size = check_count("batch_size", batch_size, "the examples of a batch")
    ranks, sample = Ranks(shard), Sample(audit or 0)
    shown = progress and ranks.rank == 0
    with ranks.telling():
        ranks.check_whole(model.modules)
        batch_size = batch_size or model.batch_size(data)
        batches = Batches(data, batch_size, model.likelihood, prepare_batch, shard)
        settings = plan.settings()
        if checkpoint is not None:
            settings["parameters"] = model.digest()
        asked = None if generator is None else int(draw_seed(generator.device, generator))
        settings["seed"] = ranks.first(asked)
        store = Store(checkpoint, settings, ranks)
        seed = store.begin()
        with evaluating(model.modules):
            prepared = model.prepared()
            estimator = BatchEstimator(plan, ranks, seed)
            _evaluate_batches(batches, prepared, estimator, store, sample, shown)
        parts = store.finish()
    if not parts:
        raise ValueError("data has no batches: there is nothing to evaluate")
    result = combine(parts, plan.looks)
    if sample.count:
        with ranks.telling(), evaluating(model.modules):
            found = run_audit(sample, prepared.read_batch, result.log_px, seed, ranks, shown)
        result = dataclasses.replace(result, audit=found)
    return result


def _evaluate_batches(
    batches: Batches, model: Model, estimator: BatchEstimator, store: Store, sample: Sample, shown: bool
) -> None:
    """Evaluate this rank's batches that the checkpoint does not have, and add the results to the store.

    The first draw of one batch that it has is repeated and compared.
    """
    compared = False
    with progress_of(batches.number, shown) as progress:
        try:
            for batch in batches:
                sample.see(batch.x, batch.conditioning, batch.row)
                part = store.see(batch.index, batch.tensors)
                if part is None and store.ranks.takes(batch.index):
                    part = estimator.part(batch.index, _read(batch, model, sample), batch.row)
                    store.add(part)
                elif part is not None and not compared:
                    store.compare(part, estimator.first_draw(_read(batch, model, sample), batch.row))
                    compared = True
                progress.update(part)
        finally:
            store.save()


def _read(batch: Batch, model: Model, sample: Sample) -> Inputs:
    """Encode a batch; the first one is checked to be one that can be audited, if an audit follows."""
    inputs = model.read_batch(f"batch {batch.index}", batch.x, batch.conditioning)
    if sample.count and batch.row == 0:
        probe(inputs)
    return inputs
