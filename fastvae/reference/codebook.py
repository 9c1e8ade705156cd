"""The nearest code of each row, in PyTorch; :mod:`fastvae.ops.codebook` is the mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

# Numbers of [N, U] that are made at a time: what a core's second-level cache, or a GPU's, holds.
NUMBERS_ON_CPU, NUMBERS_ELSEWHERE = 1 << 19, 1 << 23
# With fewer rows a product of matrices is slow.
FEWEST_ROWS = 16


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Indices [N] int64 of z [N, D] in codes [U, D], both of one dtype, float32 or float64."""
    rows, codes = len(z), len(codebook)
    centre = codebook.mean(0)
    codebook = codebook - centre
    half = 0.5 * codebook.square().sum(1)
    most = NUMBERS_ON_CPU if z.is_cpu else NUMBERS_ELSEWHERE
    size = min(rows, max(FEWEST_ROWS, most // codes))
    index = z.new_empty(rows, dtype=torch.int64)
    scores = z.new_empty(size, codes)
    for first in range(0, rows, max(size, 1)):
        part = slice(first, first + size)
        some = z[part] - centre
        # Told where to write, autocast leaves the product alone.
        score = torch.addmm(half, some, codebook.T, alpha=-1, out=scores[: len(some)])
        torch.argmin(score, 1, out=index[part])
    return index
