"""What every objective takes, read and checked, and its draws: all at once, or streamed in chunks."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops
from ._checks import check_count, check_data, check_result, check_same_device, on_same_device, shape_of
from ._glance import are_batch
from .distributions import (
    STANDARD,
    Distribution,
    as_posterior,
    as_prior,
    diagonal,
    draw_chunk,
    rsample,
)
from .likelihoods.base import SHARED, Declared, Likelihood, as_likelihood
from .ops.weigh import Weighing, weigh
from .weights import Weights


class Model(NamedTuple):
    """A batch and the three distributions that an objective is made of."""

    x: Tensor
    q: Distribution
    decoder: Callable[[Tensor], Any]
    likelihood: Likelihood
    prior: Distribution

    @classmethod
    def read(cls, x: Any, q: Any, decoder: Any, likelihood: Any, prior: Any) -> Model:
        """Read and check what the user gave."""
        # What is right at a glance is not asked one by one.
        if type(q) is tuple and len(q) == 2 and prior is None and not torch.compiler.is_compiling():
            known: Any = SHARED.get(likelihood) if type(likelihood) is str else None
            fits = known is not None and callable(decoder) and are_batch(x, *q)
            if fits and (known.differentiable or not x.requires_grad):
                return tuple.__new__(cls, (x, diagonal(*q), decoder, known, STANDARD))
        likelihood = as_likelihood(likelihood, shared=True)
        check_data(x, likelihood)
        q = as_posterior(q)
        if x.dim() == 0 or x.shape[0] != q.batch:
            raise ValueError(
                f"x has shape {shape_of(x)} but q has {q.batch} rows; the first axis of both must be the "
                "batch"
            )
        if not on_same_device(x.device, q.device):
            raise ValueError(f"x is on {x.device} but q is on {q.device}; move one of them")
        if not callable(decoder):
            raise TypeError(
                "decoder must be a callable z[N, D] -> parameters, such as an nn.Module; got "
                f"{type(decoder).__name__}. Pass the decoder itself, not its output"
            )
        return cls(x, q, decoder, likelihood, as_prior(prior))

    def bound(
        self, z: Tensor, term: Tensor, samples: int, beta: Tensor | None, how: Weighing, terms: bool
    ) -> tuple[Tensor, Tensor | None]:
        """What :func:`fastvae.ops.weigh.weigh` returns, of z [K·B, D] and a term of q and p."""
        parameters = self.decoder(z)
        takes_fused = beta is None or not beta.requires_grad
        fused = self.likelihood.fused(self.x, parameters, samples) if takes_fused else None
        if fused is not None:
            return weigh(*fused, term, beta, how, terms)
        return weigh_samples(self._log_prob(z, self.x, parameters, samples), term, beta, how)

    def log_likelihood(self, z: Tensor, x: Tensor | None = None) -> Tensor:
        """log p(x|z) [K, B] of z [K, B, D]: the decoder sees one batch axis, sample-major."""
        x = self.x if x is None else x
        z_rows = z.flatten(0, 1)
        parameters = self.decoder(z_rows)
        return self._log_prob(z_rows, x, parameters, z.shape[0])

    def _log_prob(self, z: Tensor, x: Tensor, parameters: Any, samples: int) -> Tensor:
        """log p(x|z) [K, B] of the decoder's output for z [K·B, D], checked."""
        batch, first = x.shape[0], _first_of(parameters)
        if type(self.likelihood).log_prob is Declared.log_prob:
            return self.likelihood.log_prob(x, parameters, samples)
        if isinstance(first, Tensor):
            check_same_device("the decoder's output", first, "x", x)
        value = self.likelihood.log_prob(x, parameters, samples)
        # One of the user's may have broadcast what fastvae's own refuse.
        if isinstance(first, Tensor) and first.shape[:1] != (samples * batch,):
            raise ValueError(
                f"the decoder returned {shape_of(first)} for z [{samples * batch}, {z.shape[1]}]; expected "
                f"K·B = {samples}·{batch} rows, one for each row of z"
            )
        check_result(
            self.likelihood, "log_prob", "log p(x|z)", value, "[K, B]", (samples, batch), z.device,
            "sum over the axes of the event, not over samples or batch",
        )  # fmt: skip
        return value


def _first_of(parameters: Any) -> Any:
    return parameters[0] if isinstance(parameters, (tuple, list)) and parameters else parameters


def weigh_samples(
    log_likelihood: Tensor, term: Tensor, beta: Tensor | None, how: Weighing
) -> tuple[Tensor, Tensor]:
    """What :func:`fastvae.ops.weigh.weigh` returns, of log-likelihoods [K, B] that no fused op makes."""
    mean = log_likelihood.mean(0)
    factor = how.coefficient if beta is None else how.coefficient * beta.to(term.dtype)
    if how.over == "mean":
        bound = mean + factor * (term if term.dim() == 1 else term.mean(0))
    else:
        bound = ops.log_mean_exp(log_likelihood + factor * term)
        mean = mean.detach()
    return bound if how.reduction == "none" else getattr(bound, how.reduction)(), mean


class Chunks:
    """How many draws are made at a time.

    Args:
        k_chunk: draws per example; None chooses as many as give the decoder's output a size that stays in a
            CPU's caches and fills a GPU. Halved for good when memory runs out.
    """

    # Numbers of the decoder's output at a time, and rows of it; the CPU's are measured: docs/NOTES.md.
    _CPU, _GPU = (2**22, 2**13), (2**26, 2**18)

    def __init__(self, k_chunk: int | None):
        if k_chunk is not None:
            check_count("k_chunk", k_chunk, "the samples drawn at a time")
        self.k_chunk = k_chunk
        self.most_rows: int | None = None

    def draws(self, x: Tensor, batch: int) -> int:
        """For each of ``batch`` examples like those of x."""
        size = self.k_chunk
        if size is None:
            numbers, rows = self._CPU if x.device.type == "cpu" else self._GPU
            size = min(rows, numbers // max(1, x.shape[1:].numel())) // max(1, batch)
        if self.most_rows is not None:
            size = min(size, self.most_rows // max(1, batch))
        return max(1, size)

    def halve(self, count: int, batch: int) -> None:
        """After memory ran out with ``count`` draws of each of ``batch`` examples, two draws or more."""
        half = count // 2
        self.most_rows = half * batch
        warnings.warn(
            f"fastvae: memory ran out with {count} draws of {batch} examples at a time; going on with "
            f"{half} (k_chunk={half} starts there)",
            RuntimeWarning,
            stacklevel=2,
        )


def stream(
    model: Model,
    seed: Tensor,
    start: int,
    stop: int,
    chunks: Chunks,
    *,
    row_offset: int = 0,
    rows: Tensor | None = None,
    ratio: bool = True,
) -> Iterator[Tensor]:
    """Log weights of draws ``start`` to ``stop``, [draws, B], chunk by chunk; without ``ratio``
    log-likelihoods.

    ``rows`` are the examples whose draws are wanted, if not all; the noise is that of their place in the
    batch.
    """
    x = model.x if rows is None else model.x[rows]
    # Examples drawn for at once, and those of them that are wanted.
    spans = [(model.q, row_offset, rows)] if rows is None else _spans(model, row_offset, rows)
    batch = sum(q.batch for q, _, _ in spans)

    def draw(count: int) -> Tensor:
        parts = []
        part: tuple[Tensor, ...]
        for q, offset, wanted in spans:
            if ratio:
                part = draw_chunk(q, model.prior, count, seed, start, offset)[:2]
            else:
                part = rsample(q, count, seed, sample_offset=start, row_offset=offset)[:1]
            parts.append(part if wanted is None else tuple(v[:, wanted] for v in part))
        z, *log_ratio = parts[0] if len(parts) == 1 else map(torch.hstack, zip(*parts, strict=True))
        log_likelihood = model.log_likelihood(z, x)
        return log_likelihood + log_ratio[0] if ratio else log_likelihood

    while start < stop:
        count = min(chunks.draws(x, batch), stop - start)
        log_w = None
        with _spared_memory_errors() if count > 1 else contextlib.nullcontext():
            log_w = draw(count)
        # Not in a handler of the error, whose traceback would keep the tensors alive that did not fit.
        if log_w is None:
            if x.device.type == "cuda":
                torch.cuda.empty_cache()
            chunks.halve(count, batch)
            continue
        yield log_w
        start += count


def _spans(model: Model, row_offset: int, rows: Tensor) -> list[tuple[Distribution, int, Tensor | None]]:
    """Posteriors to draw some examples from, each with the address of its first row, and which of its rows
    are wanted.

    A call for every run of neighbours costs some 20 µs; the whole batch costs draws that nobody needs, 8192 B
    / A of them for A of B examples, 20 µs for 250 rows or so.
    """
    numbers = rows.tolist()
    if not model.prior.per_row and len(numbers) ** 2 < 16 * model.q.batch:
        cuts = [i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1]
        runs = [numbers[i:j] for i, j in pairwise([0, *cuts, len(numbers)])]
        parts: list[Any] = [model.q.rows(run[0], run[-1] + 1) for run in runs]
        if None not in parts:
            return [(q, row_offset + run[0], None) for q, run in zip(parts, runs, strict=True)]
    return [(model.q, row_offset, rows)]


@contextlib.contextmanager
def _spared_memory_errors() -> Iterator[None]:
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        pass
    except RuntimeError as error:
        # What the CPU's allocator says.
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise


# Log weights that are folded at once, if so many come: a few megabytes.
_FOLDED = 2**20


def weights(
    model: Model, seed: Tensor, start: int, stop: int, chunks: Chunks, tail: int, **options: Any
) -> Weights:
    """Draws ``start`` to ``stop`` folded into :class:`Weights`; options are those of :func:`stream`."""
    total: Weights | None = None
    # What is kept between chunks must not lie between their activations in the heap, which would grow with k.
    buffer, filled = None, 0

    def fold(log_w: Tensor) -> Weights:
        part = Weights.of(log_w, tail)
        return part if total is None else total.merge(part)

    for log_w in stream(model, seed, start, stop, chunks, **options):
        count, batch = log_w.shape
        start += count
        # To fold is some forty small ops: worth their while for many draws, and as many new as are kept.
        enough = max(tail, _FOLDED // max(1, batch))
        if filled == 0 and (count >= enough or start == stop):
            total = fold(log_w)
            continue
        if buffer is None:
            buffer = log_w.new_empty(min(enough + count, count + stop - start), batch)
        buffer[filled : filled + count] = log_w
        filled += count
        if filled >= enough or start == stop:
            total, filled = fold(buffer[:filled]), 0
    assert total is not None
    return total
