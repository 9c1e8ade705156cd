"""Weights of the draws of a batch from a proposal, alone or shared among processes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..distributions import Distribution, rsample_log_prob
from ..inputs.batch import Inputs
from . import stream as _stream
from .stream import Chunks
from .weights import Weights


class Sharing(Protocol):
    """Processes that share the draws of each example, as :class:`~.evaluation.ranks.Ranks` does."""

    rank: int

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of these draws assigned to this process."""

    def gather(self, mine: Any, what: str) -> list[Any]:
        """Gather the objects of all processes, in the order of ranks."""


class Alone:
    """Single process that makes all draws."""

    rank = 0

    def share(self, start: int, stop: int) -> tuple[int, int]:
        return start, stop

    def gather(self, mine: Any, what: str) -> list[Any]:
        return [mine]


class Draws:
    """Weights of the draws of a batch from one proposal."""

    # q's ELBO [B] from separate draws, where those of the estimate are not from q.
    elbo_of_q: Tensor | None = None

    def __init__(
        self,
        inputs: Inputs,
        seed: Tensor,
        row_offset: int,
        chunks: Chunks,
        tail: int,
        ranks: Sharing,
        are_of_q: bool = True,
    ):
        self._inputs, self._seed, self._row_offset = inputs, seed, row_offset
        self._chunks, self._tail, self._ranks, self._are_of_q = chunks, tail, ranks, are_of_q

    def weights(self, start: int, stop: int, rows: Tensor | None = None) -> Weights | None:
        """Compute the weights of this process's part of draws ``start`` to ``stop``; None if it is empty.

        ``rows`` are the indices of the examples to draw for. Default: all.
        """
        return self.folded(start, stop, rows)

    def at_once(self, looks: Sequence[int]) -> tuple[Weights, list[Tensor]] | None:
        """Return the weights of all draws, and the estimate after each number of draws in ``looks``.

        None if processes share the draws.
        """
        if not isinstance(self._ranks, Alone):
            return None
        curve: list[Tensor] = []
        place: dict[str, Any] = {"row_offset": self._row_offset, "looks": looks[:-1], "curve": curve}
        total = _stream.weights(self._inputs, self._seed, 0, looks[-1], self._chunks, self._tail, **place)
        return total, [*curve, total.log_px]

    def folded(
        self, start: int, stop: int, rows: Tensor | None, kept: list[Tensor] | None = None
    ) -> Weights | None:
        start, stop = self._ranks.share(start, stop)
        if start == stop:
            return None
        place: dict[str, Any] = {"row_offset": self._row_offset, "rows": rows}
        return _stream.weights(
            self._inputs, self._seed, start, stop, self._chunks, self._tail, kept=kept, **place
        )

    def estimate(self, total: Weights) -> Weights:
        """Return the weights of all draws so far, adjusted for the estimate."""
        return total

    def elbo(self, total: Weights) -> Tensor:
        """Return the mean log weight under q [B]; NaN if the draws are not from q."""
        if self.elbo_of_q is not None:
            return self.elbo_of_q
        return total.elbo if self._are_of_q else torch.full_like(total.elbo, math.nan)


def with_latent_of(q: Distribution, r: Distribution) -> Distribution:
    """Give the proposal r the latent shape of q, and the dtype of the decoder's z."""
    if r is not q and q.latent is not None:
        r.__dict__["latent"] = q.latent
    if r is not q and q.z_dtype is not None:
        r.__dict__["z_dtype"] = q.z_dtype
    return r


def example_of(q: Distribution, row_offset: int = 0) -> Tensor:
    """Draw one z per example, [B, D], with a fixed seed; 0 where it is not finite."""
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    z = rsample_log_prob(q, 1, seed, row_offset=row_offset)[0][0]
    return torch.where(z.isfinite(), z, 0.0)
