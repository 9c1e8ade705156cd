r"""The code that is nearest to each row, what a VQ-VAE quantizes by.

With the codes' mean c, and the first of those that are equally near,

.. math:: k_n = \arg\min_u \tfrac12 \|e_u - c\|^2 - (z_n - c) \cdot (e_u - c)
    = \arg\min_u \|z_n - e_u\|^2

A product of matrices and a minimum, of as many rows at a time as fit the cache: nothing of the size [N, U] is
kept. The centre takes what all codes have in common out of the terms that cancel. What is left is off by
roundings of :math:`\tfrac12 \|e_u - c\|^2 + \|z_n - c\| \|e_u - c\|`, whatever the norms are.

It has no kernels of its own: on a CPU the product alone is two thirds of the time. An op it is all the same,
because a compiler would write the loop out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference import codebook as reference
from .op import Op


class _NearestCode(Op):
    """Indices [N] int64 of z [N, D] in codes [U, D], of one dtype, float32 or float64; it has no gradient."""

    module = "codebook"
    name = "nearest_code"
    schema = "(Tensor z, Tensor codebook) -> Tensor"

    def native(self, z, codebook):
        return reference.nearest_code(z, codebook)

    def composed(self, backend):
        return reference.nearest_code

    def check(self, z, codebook):
        self.contract.expect("z", z, torch.float64 if z.dtype == torch.float64 else torch.float32, (-1, -1))
        self.contract.expect("codebook", codebook, z.dtype, (-1, z.shape[1]))
        self.contract.expect_count("the number of codes", codebook.shape[0])

    def fake(self, z, codebook):
        return z.new_empty(z.shape[0], dtype=torch.int64)


nearest_code: Callable[[Tensor, Tensor], Tensor] = _NearestCode()
