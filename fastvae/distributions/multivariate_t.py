"""Multivariate Student t."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import random
from ..ops.op import accumulator
from .base import Located
from .covariance import rows_times, triangular_solve
from .draws import Drawable


class MultivariateStudentT(Drawable, Located):
    r"""Multivariate Student t, :math:`z = μ + L ε \sqrt{ν / χ^2_ν}`, with float64 parameters.

    Args:
        loc: μ [B, D].
        scale_tril: L, lower triangular [B, D, D].
        df: ν.
        dtype: dtype of z.
    """

    def __init__(self, loc: Tensor, scale_tril: Tensor, df: int, dtype: torch.dtype):
        super().__init__()
        self.loc, self.scale_tril, self.df, self.dtype = loc, scale_tril, df, dtype

    @classmethod
    def of(cls, mean: Tensor, covariance: Tensor, df: int, like: Tensor) -> MultivariateStudentT:
        """Build it from a mean and scale matrix; z has the dtype of ``like``, which floors the variances."""
        least = (torch.finfo(like.dtype).eps * mean.abs()).square() + torch.finfo(like.dtype).tiny
        sd = torch.maximum(covariance.diagonal(dim1=-2, dim2=-1), least).sqrt()
        correlation = covariance / (sd[:, :, None] * sd[:, None])
        root, info = torch.linalg.cholesky_ex(
            correlation + 1e-12 * torch.eye(sd.shape[1], dtype=sd.dtype, device=sd.device)
        )
        # NaN moments stem from a NaN q, so any finite fit will do.
        good = (info == 0) & root.isfinite().all(-1).all(-1) & mean.isfinite().all(-1)
        scale = torch.where(
            good[:, None, None],
            sd[..., None] * root,
            torch.eye(sd.shape[1], dtype=sd.dtype, device=sd.device),
        )
        return cls(torch.where(good[:, None], mean, 0.0), scale, df, like.dtype)

    @property
    def mean(self) -> Tensor:
        return self.loc

    @property
    def variance(self) -> Tensor:
        factor = self.df / (self.df - 2) if self.df > 2 else math.inf if self.df > 1 else math.nan
        return factor * self.scale_tril.square().sum(-1)

    def put(self, rows: Tensor, other: MultivariateStudentT) -> MultivariateStudentT:
        """Replace the parameters of the examples with indices ``rows``."""
        loc = self.loc.index_copy(0, rows, other.loc)
        scale_tril = self.scale_tril.index_copy(0, rows, other.scale_tril)
        return MultivariateStudentT(loc, scale_tril, self.df, self.dtype)

    def rows(self, start: int, stop: int) -> MultivariateStudentT:
        return MultivariateStudentT(self.loc[start:stop], self.scale_tril[start:stop], self.df, self.dtype)

    def draw(self, samples: int, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
        d, place = self.loc.shape[1], {"sample_offset": sample_offset, "row_offset": row_offset}
        shape, dtype = (samples, self.batch, d + self.df), accumulator(self.dtype)
        normals = random.normal(seed, *shape, dtype=dtype, **place).double()  # type: ignore[arg-type]
        chi_square = normals[..., d:].square().sum(-1, keepdim=True)
        z = self.loc + rows_times(normals[..., :d] * (self.df / chi_square).sqrt(), self.scale_tril.mT)
        return z.to(self.dtype)

    def log_prob(self, z: Tensor) -> Tensor:
        d, df = self.loc.shape[1], self.df
        square = triangular_solve(self.scale_tril, z.double() - self.loc).square().sum(-1)
        constant = math.lgamma((df + d) / 2) - math.lgamma(df / 2) - 0.5 * d * math.log(df * math.pi)
        logs = self.scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        value = constant - logs - 0.5 * (df + d) * torch.log1p(square / df)
        return value.to(accumulator(z.dtype))
