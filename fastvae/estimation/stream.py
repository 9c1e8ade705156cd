"""Chunked draws of a batch in bounded memory, and streaming statistics of their log weights."""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..core.checks import SHARED, check_count, later_row
from ..core.nested import event_size
from ..distributions import Distribution, rsample_log_prob
from ..distributions.draws import draw_chunk, log_stratum_weights
from ..inputs.batch import Inputs
from ..likelihoods.declared import Declared
from ..random import randomisations_of
from .sums import GROUPS
from .weights import Weights


class Chunks:
    """Chunk size of draws.

    Args:
        k_chunk: draws per example and chunk. None chooses a decoder output that fits a CPU's caches and fills
            a GPU, or all draws in an exported program, whose batch may vary. Halved permanently when memory
            runs out.
        name: name of the user's argument, for messages. Default ``"k_chunk"``.
    """

    # Largest chunk of the decoder's output, in numbers and in rows; the CPU's are measured: docs/log.md. A
    # fused last layer stores its input alone.
    _CPU, _CPU_FUSED, _GPU = (2**22, 2**13), (2**20, 2**15), (2**26, 2**18)

    def __init__(self, k_chunk: int | None, name: str = "k_chunk"):
        if k_chunk is not None:
            k_chunk = check_count(name, k_chunk, "the samples drawn at a time")
        self.k_chunk, self.name = k_chunk, name
        self.most_rows: int | None = None
        # Decoder outputs per row, if they differ from x's size: classes, mixtures, several parts.
        self._width: int | None = None

    def draws(self, inputs: Inputs, batch: int, most: int) -> int:
        """Return the number of draws per example of a chunk of ``batch`` examples, at most ``most``."""
        size = self.k_chunk
        if torch.compiler.is_exporting():
            return most if size is None else min(size, most)
        if size is None:
            on_cpu, seen, event = inputs.device.type == "cpu", self._width, None
            if isinstance(inputs.likelihood, Declared):
                event = event_size(inputs.x)
            width = seen if event is None else event
            if width is None:
                return 1  # measures the width
            rows = self._rows(self._CPU if on_cpu else self._GPU, width)
            if event is not None and seen is not None and seen < event:
                rows = max(rows, self._rows(self._CPU_FUSED if on_cpu else self._GPU, seen))
            size = rows // max(1, batch)
        if self.most_rows is not None:
            size = min(size, self.most_rows // max(1, batch))
        return min(max(1, size), most)

    @staticmethod
    def _rows(limits: tuple[int, int], width: int) -> int:
        numbers, rows = limits
        return min(rows, numbers // max(1, width))

    def see(self, z: Tensor, outputs: list[Tensor]) -> None:
        """Record the number of decoder outputs per row of z."""
        self._width = sum(t.numel() for t in outputs) // max(1, z.shape[0])

    def halve(self, count: int, batch: int) -> None:
        """Halve the chunk size after memory ran out with ``count`` ≥ 2 draws of ``batch`` examples each."""
        half = count // 2
        self.most_rows = half * batch
        warnings.warn(
            f"fastvae: memory ran out with {count} draws of {batch} examples at a time; going on with "
            f"{half} ({self.name}={half} starts there)",
            RuntimeWarning,
            stacklevel=2,
        )


def stream(
    inputs: Inputs,
    seed: Tensor,
    start: int,
    stop: int,
    chunks: Chunks,
    *,
    row_offset: int = 0,
    rows: Tensor | None = None,
    ratio: bool = True,
) -> Iterator[Tensor]:
    """Yield log weights of draws ``start`` to ``stop``, [draws, B], chunk by chunk.

    Without ``ratio`` they are log-likelihoods. ``rows`` are the indices of the examples to draw for, default
    all; their noise does not depend on ``rows``.
    """
    data = inputs if rows is None else inputs.at(rows)
    # Posteriors to draw from, and the rows of each that are wanted.
    spans = spans_of(inputs, row_offset, rows)
    batch = sum(q.batch for q, _, _ in spans)

    def draw(count: int) -> Tensor:
        parts = []
        part: tuple[Tensor, ...]
        for q, offset, wanted in spans:
            if ratio:
                part = draw_chunk(q, inputs.prior, count, seed, start, offset)[:2]
            else:
                part = rsample_log_prob(q, count, seed, sample_offset=start, row_offset=offset)[:1]
                shares = log_stratum_weights(q, count, seed, start)
                if shares is not None:
                    part = part[0], shares.expand(count, q.batch)
            parts.append(part if wanted is None else tuple(v[:, wanted] for v in part))
        z, *term = parts[0] if len(parts) == 1 else map(torch.hstack, zip(*parts, strict=True))
        log_likelihood = data.log_likelihood(z, chunks.see)
        return log_likelihood + term[0] if term else log_likelihood

    while start < stop:
        count = chunks.draws(inputs, batch, stop - start)
        log_w = None
        with suppress_out_of_memory() if count > 1 else contextlib.nullcontext():
            log_w = draw(count)
        # Outside the exception handler, whose traceback would keep the failed chunk's tensors alive.
        if log_w is None:
            if inputs.device.type == "cuda":
                torch.cuda.empty_cache()
            chunks.halve(count, batch)
            continue
        yield log_w
        start += count


def spans_of(
    inputs: Inputs, row_offset: int, rows: Tensor | None
) -> list[tuple[Distribution, int, Tensor | None]]:
    """Return posteriors that cover the examples ``rows``, with row offset and wanted rows (None for all).

    One call per run of consecutive rows costs some 20 µs; drawing the whole batch wastes draws, 8192 B / A of
    them for A of B examples, about 20 µs for 250 rows.
    """
    if rows is None:
        return [(inputs.q, row_offset, None)]
    numbers = rows.tolist()
    if not inputs.prior.per_row and len(numbers) ** 2 < 16 * inputs.q.batch:
        cuts = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
        runs = [numbers[i:j] for i, j in pairwise([0, *cuts, len(numbers)])]
        parts: list[Any] = [inputs.q.rows(run[0], run[-1] + 1) for run in runs]
        if None not in parts:
            firsts = [later_row(row_offset, run[0]) for run in runs]
            return [(q, first, None) for q, first in zip(parts, firsts, strict=True)]
    return [(inputs.q, row_offset, rows)]


@contextlib.contextmanager
def suppress_out_of_memory() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        # Messages of the CPU allocator.
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise


def _log_sum(log_w: Tensor, before: Tensor | None) -> Tensor:
    total = torch.logsumexp(log_w.double(), 0)
    return total if before is None else torch.logaddexp(before, total)


# Log weights to fold at once, if available: a few megabytes, and on a GPU, where the number of launches
# counts, some tens.
_FOLDED, _FOLDED_ON_GPU = 2**20, 2**23


def weights(
    inputs: Inputs,
    seed: Tensor,
    start: int,
    stop: int,
    chunks: Chunks,
    tail: int,
    kept: list[Tensor] | None = None,
    looks: Sequence[int] = (),
    curve: list[Tensor] | None = None,
    **options: Any,
) -> Weights:
    """Fold draws ``start`` to ``stop`` into :class:`Weights`; options are those of :func:`stream`.

    The log weights of each chunk are appended to the list ``kept``, if given, and to ``curve`` the estimates
    [B] of log p(x) by the first draws, whose numbers are ``looks``, ascending.
    """
    groups = GROUPS if options.get("row_offset") == SHARED else 0
    total: Weights | None = None
    # One buffer: small tensors between the chunks' activations would fragment the heap, which grows with k.
    buffer, filled = None, 0

    log_sum: Tensor | None = None  # logarithm of the sum of the weights of all draws so far
    left = list(looks)

    def fold(log_w: Tensor) -> Weights:
        nonlocal log_sum
        begin = start - log_w.shape[0]
        while curve is not None and left and left[0] <= start:
            now = _log_sum(log_w[: left[0] - begin], log_sum)
            curve.append(now - math.log(left.pop(0)))
        log_sum = _log_sum(log_w, log_sum) if left else None
        part = Weights.of(log_w, tail, start - log_w.shape[0], randomisations_of(seed), groups)
        return part if total is None else total.merge(part)

    # A look ends a chunk.
    ends = [start, *(n for n in looks if start < n < stop), stop]
    streams = (stream(inputs, seed, *ends_of, chunks, **options) for ends_of in pairwise(ends))
    for log_w in itertools.chain.from_iterable(streams):
        count, batch = log_w.shape
        if buffer is not None and filled + count > buffer.shape[0]:
            # The first chunk, of one draw, may be far smaller than the others.
            total, buffer, filled = fold(buffer[:filled]), None, 0
        start += count
        if kept is not None:
            kept.append(log_w)
        # Folding takes some forty small ops: worthwhile for many draws, at least as many as the tail.
        most = _FOLDED_ON_GPU if log_w.is_cuda else _FOLDED
        enough = stop if torch.compiler.is_exporting() else max(tail, most // max(1, batch))
        if filled == 0 and (start == stop or count >= enough):
            total = fold(log_w)
            continue
        if buffer is None:
            buffer = log_w.new_empty(min(enough + count, count + stop - start), batch)
        buffer[filled : filled + count] = log_w
        filled += count
        if start == stop or filled >= enough:
            total, filled = fold(buffer[:filled]), 0
    assert total is not None
    return total
