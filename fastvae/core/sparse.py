"""Sparse matrices of data, COO and CSR: their parts, and their rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .checks import shape_of

_LAYOUTS = (torch.sparse_coo, torch.sparse_csr)
_OTHERS = (torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)


def is_sparse(x: object) -> bool:
    """Return True for a sparse tensor, COO or CSR."""
    return isinstance(x, Tensor) and x.layout in _LAYOUTS


def check_matrix(name: str, x: Tensor) -> None:
    """Validate that a tensor is dense, or a sparse matrix, COO or CSR."""
    if x.layout in _OTHERS:
        own = "it" if " " in name else name
        raise TypeError(
            f"{name} has layout {x.layout}; expected a sparse matrix in COO or CSR, or a dense tensor: pass "
            f"{own}.to_sparse() or {own}.to_dense()"
        )
    if is_sparse(x) and (x.dim() != 2 or x.dense_dim()):
        raise ValueError(f"{name} is sparse with shape {shape_of(x)}; expected a matrix [B, X]")


def csr_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return values, begins of rows and columns of a sparse matrix [B, X].

    They are detached: where a compiled graph breaks, Dynamo asks for the strides of the matrix that views of
    it come from.
    """
    if x.layout == torch.sparse_csr:
        parts = x.values(), x.crow_indices().long(), x.col_indices().long()
    else:
        x = x.coalesce()
        rows, columns = x.indices()
        begins = torch.bincount(rows + 1, minlength=x.shape[0] + 1).cumsum(0)
        parts = x.values(), begins, columns.contiguous()
    values, begins, columns = (t.detach() for t in parts)
    return values, begins, columns


def at_rows(x: Tensor, rows: Tensor) -> Tensor:
    """Return the rows with these indices, of a dense tensor or of a sparse matrix in its layout.

    For a sparse matrix the cost is that of the selected entries, if a COO matrix is coalesced.
    """
    if not is_sparse(x):
        return x[rows]
    if x.layout == torch.sparse_csr:
        first, last = x.crow_indices()[rows].long(), x.crow_indices()[rows + 1].long()
        columns, values = x.col_indices(), x.values()
    else:
        x = x.coalesce()
        numbers, columns = x.indices()
        values = x.values()
        numbers = numbers.contiguous()
        first, last = torch.searchsorted(numbers, rows), torch.searchsorted(numbers, rows, right=True)
    count = last - first
    places = torch.repeat_interleave(first - count.cumsum(0) + count, count)
    places = places + torch.arange(places.shape[0], device=places.device)
    return _built(x, count, columns[places], values[places])


def span(x: Any, start: int, stop: int) -> Any:
    """Return the rows from ``start`` to ``stop`` of an array, a dense tensor or a sparse matrix."""
    if is_sparse(x):
        return at_rows(x, torch.arange(start, min(stop, x.shape[0]), device=x.device))
    return x[start:stop]


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate dense tensors, or sparse matrices of one layout, along the rows."""
    if not any([is_sparse(x) for x in parts]):
        return torch.cat(tuple(parts))
    values, begins, columns = zip(*map(csr_parts, parts), strict=True)
    counts = torch.cat([b.diff() for b in begins])
    return _built(parts[0], counts, torch.cat(columns), torch.cat(values))


def _built(like: Tensor, counts: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """Return a sparse matrix of rows of ``counts`` entries, in the layout and width of ``like``."""
    shape = counts.shape[0], like.shape[1]
    if like.layout == torch.sparse_csr:
        begins = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        kind = like.crow_indices().dtype
        return torch.sparse_csr_tensor(
            begins.to(kind), columns.to(kind), values, shape, check_invariants=False
        )
    rows = torch.repeat_interleave(counts)
    indices = torch.stack([rows, columns.to(rows.dtype)])
    return torch.sparse_coo_tensor(indices, values, shape, is_coalesced=True, check_invariants=False)
