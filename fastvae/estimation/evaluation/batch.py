"""Estimates of a batch: its draws, their stopping, and their statistics."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ...inputs.batch import Inputs
from ...random import RANDOMISATIONS, seed_of
from ..draws import Draws
from ..sums import kept_draws
from ..weights import Weights
from .latents import latent_statistics
from .parts import Examples, Part
from .plan import FIRST_LOOK, Plan
from .ranks import Ranks
from .rows import check_rows


class BatchEstimator:
    """Estimator of log p(x) of batches, according to a plan.

    Args:
        plan: number of draws, and when they stop.
        ranks: processes that share the work.
        seed: seed of the noise, the same for all batches.
    """

    def __init__(self, plan: Plan, ranks: Ranks, seed: int):
        self._plan, self._ranks, self._seed = plan, ranks, seed
        self._rows_checked = not plan.drops_rows

    def part(self, index: int, inputs: Inputs, row: int) -> Part:
        """Evaluate the batch with this index, whose first example has index ``row`` in the data."""
        latent = latent_statistics(inputs.q, inputs.prior)
        plan, tol = self._plan, self._plan.tol
        row = plan.row(row)
        if not self._rows_checked and tol is not None and inputs.q.batch > 1:
            check_rows(inputs, self._key(inputs), row, plan.chunks, tol)
            self._rows_checked = True
        ranks = self._ranks if self._ranks.by_samples else None
        draws = plan.proposal.draws(inputs, self._key(inputs), row, plan.k, plan.chunks, plan.tail, ranks)
        total, curve = self._drawn(draws, inputs.q.device)
        estimated = draws.estimate(total)
        estimates = {name: v.cpu() for name, v in vars(estimated.summary()).items()}
        return Part(
            index=index,
            digest=np.zeros(16, np.uint8),
            latent=latent,
            dims=inputs.observed,
            curve=torch.stack(curve).cpu().numpy(),
            left_out=estimated.left_out.cpu().numpy(),
            examples=Examples(**estimates, k=estimated.count.cpu(), elbo=draws.elbo(total).cpu()),
        )

    def first_draw(self, inputs: Inputs, row: int) -> np.ndarray:
        """Return the log weights of the batch's first draw [B], by this process alone."""
        plan = self._plan
        place = plan.row(row)
        draws = plan.proposal.draws(inputs, self._key(inputs), place, 1, plan.chunks, kept_draws(1))
        total = draws.weights(0, 1)
        assert total is not None
        return draws.estimate(total).log_px.cpu().numpy()

    def _key(self, inputs: Inputs) -> Tensor:
        seed = torch.tensor(self._seed, dtype=torch.int64, device=inputs.q.device)
        return seed_of(self._plan.noise, seed, RANDOMISATIONS)

    def _drawn(self, draws: Draws, device: torch.device) -> tuple[Weights, list[Tensor]]:
        """Draw until the plan is fulfilled; return all weights, and the bound [B] after each look."""
        if self._plan.tol is None and (found := draws.at_once(self._plan.looks)) is not None:
            return found
        total: Weights | None = None
        rows: Tensor | None = None  # examples that are still drawn, None for all
        curve = []
        for start, stop in pairwise([0, *self._plan.looks]):
            part = self._ranks.merge(draws.weights(start, stop, rows), device)
            assert part is not None  # some rank has draws
            if total is None:
                total = part
            elif rows is None:
                total = total.merge(part)
            else:
                total = total.put(rows, total.at(rows).merge(part))
            seen = draws.estimate(total)
            curve.append(seen.log_px)
            if self._plan.tol is not None and stop >= FIRST_LOOK:
                wanted = _unfinished(seen, self._plan.tol)
                rows = wanted.nonzero()[:, 0]
                if not len(rows):
                    break
                rows = None if len(rows) == len(wanted) else rows
        assert total is not None
        return total, curve + curve[-1:] * (len(self._plan.looks) - len(curve))


def _unfinished(seen: Weights, tol: float) -> Tensor:
    """Return True for the examples that need more draws [B].

    More draws cannot change NaN and inf; while all weights are 0 the error is unknown.
    """
    log_px = seen.log_px
    return ~(seen.log_px_stderr <= tol) & ~log_px.isnan() & (log_px != torch.inf)
