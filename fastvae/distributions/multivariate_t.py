"""Multivariate Student t."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import random
from ..ops.op import accumulator
from .covariance import rows_times, triangular_solve
from .draws import Drawable


class MultivariateStudentT(Drawable):
    r"""Multivariate Student t, :math:`z = μ + L ε \sqrt{ν / χ^2_ν}`, with float64 parameters.

    Args:
        mu: μ [B, D].
        scale: L, lower triangular [B, D, D].
        df: ν.
        dtype: dtype of z.
    """

    def __init__(self, mu: Tensor, scale: Tensor, df: int, dtype: torch.dtype):
        super().__init__()
        self.mu, self.scale, self.df, self.dtype = mu, scale, df, dtype

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
    def batch(self) -> int:  # type: ignore[override]
        return self.mu.shape[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.mu.device

    def put(self, rows: Tensor, other: MultivariateStudentT) -> MultivariateStudentT:
        """Replace the parameters of the examples with indices ``rows``."""
        mu, scale = self.mu.index_copy(0, rows, other.mu), self.scale.index_copy(0, rows, other.scale)
        return MultivariateStudentT(mu, scale, self.df, self.dtype)

    def rows(self, start: int, stop: int) -> MultivariateStudentT:
        return MultivariateStudentT(self.mu[start:stop], self.scale[start:stop], self.df, self.dtype)

    def z(self, samples: int, seed: Tensor, sample_offset: int, row_offset: int) -> Tensor:
        d, place = self.mu.shape[1], {"sample_offset": sample_offset, "row_offset": row_offset}
        shape, dtype = (samples, self.batch, d + self.df), accumulator(self.dtype)
        normals = random.normal(seed, *shape, dtype=dtype, **place).double()  # type: ignore[arg-type]
        chi_square = normals[..., d:].square().sum(-1, keepdim=True)
        z = self.mu + rows_times(normals[..., :d] * (self.df / chi_square).sqrt(), self.scale.mT)
        return z.to(self.dtype)

    def log_prob(self, z: Tensor) -> Tensor:
        d, df = self.mu.shape[1], self.df
        square = triangular_solve(self.scale, z.double() - self.mu).square().sum(-1)
        constant = math.lgamma((df + d) / 2) - math.lgamma(df / 2) - 0.5 * d * math.log(df * math.pi)
        logs = self.scale.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        value = constant - logs - 0.5 * (df + d) * torch.log1p(square / df)
        return value.to(accumulator(z.dtype))
