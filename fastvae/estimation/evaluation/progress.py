"""Progress bar of an evaluation, with the NLL so far."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from tqdm import tqdm

from ...core.terminal import progress_bar
from .parts import Part


class Progress:
    """Bar that counts batches, and shows the mean and standard error of the NLL of those seen."""

    def __init__(self, bar: tqdm):
        self._bar = bar
        # Sums relative to the first value.
        self._n, self._shift, self._first, self._second = 0, 0.0, 0.0, 0.0

    def update(self, part: Part | None) -> None:
        """Count a batch, whose results are None if another rank has them."""
        self._bar.update()
        if part is not None and not self._bar.disable:
            self._bar.set_postfix_str(self._running(part.examples.log_px.numpy()))

    def _running(self, log_px: np.ndarray) -> str:
        if not self._n:
            self._shift = log_px[0]
        values = log_px - self._shift
        self._n += len(values)
        self._first += values.sum()
        self._second += np.square(values).sum()
        variance = (self._second - self._first**2 / self._n) / max(self._n - 1, 1)
        nll = -self._shift - self._first / self._n
        return f"NLL {nll:.2f} ± {np.sqrt(variance / self._n):.2f}"


@contextlib.contextmanager
def progress_of(total: int | None, shown: bool) -> Iterator[Progress]:
    """Show the progress over a number of batches, None if it is unknown."""
    with progress_bar(shown, total=total, desc="log p(x)", unit="batch") as bar:
        yield Progress(bar)
