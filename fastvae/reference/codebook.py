"""Nearest code of each row, in PyTorch; :mod:`fastvae.ops.codebook` gives the mathematics."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of [N, U] computed at a time: the size of a core's second-level cache; on a GPU launches cost more.
NUMBERS_ON_CPU, NUMBERS_ELSEWHERE = 1 << 19, 1 << 25
# A matrix product of fewer rows is slow.
FEWEST_ROWS = 16


def nearest_code(z: Tensor, codebook: Tensor) -> Tensor:
    """Return the indices [N] int64 of the codes [U, D] nearest to z [N, D], in float32 or float64."""
    rows, codes = z.shape[0], codebook.shape[0]
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
        # Given out=, autocast does not change the product's dtype.
        score = torch.addmm(half, some, codebook.T, alpha=-1, out=scores[: some.shape[0]])
        torch.argmin(score, 1, out=index[part])
    return index
