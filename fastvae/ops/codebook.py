r"""The nearest code of each row, for the quantisation of a VQ-VAE.

With the codes' mean c, and the first code in a tie,

.. math:: k_n = \arg\min_u \tfrac12 \|e_u - c\|^2 - (z_n - c) \cdot (e_u - c)
    = \arg\min_u \|z_n - e_u\|^2

It is a matrix product and a minimum, over as many rows at a time as fit the cache: no tensor of size [N, U]
is stored. Subtracting the centre removes the codes' common part from the terms that cancel. The remaining
error is rounding of :math:`\tfrac12 \|e_u - c\|^2 + \|z_n - c\| \|e_u - c\|`, whatever the norms are.

It has no custom kernels: on a CPU the product alone is two thirds of the time. It is an op nevertheless,
because a compiler would unroll the loop.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..reference import codebook as reference
from .op import Op


class _NearestCode(Op):
    """Op for the indices [N] int64 of the codes [U, D] nearest to z [N, D]; it has no gradient."""

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
