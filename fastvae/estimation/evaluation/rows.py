"""Validation that a decoder's rows are independent, so that finished examples may be left out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.nested import tensors
from ...distributions.words import known_mean
from ...inputs.batch import Inputs
from .. import stream as _stream
from ..stream import Chunks


def check_rows(inputs: Inputs, key: Tensor, row: int, chunks: Chunks, tol: float) -> None:
    """Validate that a row's log weight does not depend on the other rows decoded with it.

    The second half of the batch is decoded alone, in reverse order, so that a decoder that stores data for
    each row of the batch gets wrong rows, and not a multiple of the batch.

    Raises:
        ValueError: if it does.
    """
    batch, device = inputs.q.batch, inputs.q.device
    rows = torch.arange(batch - 1, (batch - 1) // 2, -1, device=device)

    def log_weights(draws: int, chunks: Chunks, rows: Tensor | None = None) -> Tensor:
        stream = _stream.stream(inputs, key, 0, draws, chunks, row_offset=row, rows=rows)
        return torch.cat(list(stream))[0].double().cpu()

    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        whole = log_weights(2, chunks)
        again = log_weights(1, Chunks(1))
        try:
            alone = log_weights(1, Chunks(1), rows)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            reason = f"With {len(rows)} of {batch} rows of the first batch it raised {said}"
            raise _refused(tol, reason) from error
    whole_rows = whole[rows.cpu()]
    off = _distance(alone, whole_rows)
    # Differences due to the number of draws are rounding, or the decoder's own noise, and set the tolerance.
    noise = float(_distance(again, whole).max())
    if float(off.max()) > max(10 * noise, 0.01 * tol, _rounding(inputs) * _largest(whole)):
        n = int(off.argmax())
        raise _refused(
            tol,
            f"Row {int(rows[n])} of the first batch has a log weight of {float(whole_rows[n]):.6g} in the "
            f"whole batch of {batch}, and of {float(alone[n]):.6g} where {len(rows)} of its rows are decoded",
        )


def _refused(tol: float, reason: str) -> ValueError:
    return ValueError(
        f"tol={tol:g} needs a model in which a row of the decoder's output depends on that row of z "
        f"alone, since finished examples are no longer decoded. {reason}. A decoder that uses "
        "batch data other than z, such as labels, must be given them as context (see prepare_batch=); or "
        "leave tol out and give k, or use batch_size=1"
    )


def _rounding(inputs: Inputs) -> float:
    """Return the relative rounding error of log weights."""
    mean = known_mean(inputs.q)
    mean = tensors(inputs.x)[0] if mean is None else mean
    half = mean.dtype.itemsize == 2 or torch.is_autocast_enabled(inputs.q.device.type)
    return 2e-3 if half else 1e-5


def _largest(values: Tensor) -> float:
    """Return the largest finite magnitude, or 0."""
    finite = values[values.isfinite()].abs()
    return float(finite.amax()) if len(finite) else 0.0


def _distance(a: Tensor, b: Tensor) -> Tensor:
    """Compute |a − b|, with 0 for equal infinities and for NaN in both, else infinity for these."""
    same = (a == b) | (a.isnan() & b.isnan())
    return torch.where(same, 0.0, (a - b).abs().nan_to_num(nan=math.inf))
