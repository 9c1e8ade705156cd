"""Draws in chunks whose activations are recomputed in the backward pass."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..core import backend as _backend
from ..core.nested import Conditioning, tensors
from ..core.torch_private import break_graph, changes_what_it_reads, functorch_is_active
from ..distributions.draws import draw_chunk
from ..inputs.batch import Inputs
from .recompute import repeatable

# Small tensors that a chunk leaves in the graph lie between its activations. Freed activations leave holes in
# the heap that are too small for the next chunk's, so the heap grows with k. Trimming every few chunks, in
# both passes, returns the pages of these holes to the system.
_CHUNKS_PER_TRIM = 8


def _trim(device: torch.device) -> None:
    if device.type == "cpu" and (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim, or None on other systems."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None


def chunked(
    inputs: Inputs,
    seed: Tensor,
    k: int,
    k_chunk: int,
    route: str,
    row_offset: int,
    seen: Callable[[Tensor, list[Tensor]], None] | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Compute log p(x|z) and log p(z) − log q(z|x), each [K, B], in chunks that recompute activations.

    The third result, [K, B] or None, receives the gradient for q in its backward pass.
    """
    if functorch_is_active():
        raise RuntimeError(
            "k_chunk does not work under torch.func transforms, which cannot drop activations; leave it out, "
            "or differentiate with backward() or torch.autograd.grad"
        )

    # checkpoint keeps the random state (used by dropout) only of devices on which it is passed a tensor.
    def draw(start: int, on_device: Tensor) -> list[Tensor]:
        if start // k_chunk % _CHUNKS_PER_TRIM == _CHUNKS_PER_TRIM - 1 and not torch.compiler.is_compiling():
            _trim(inputs.device)
        z, *drawn = draw_chunk(
            inputs.q, inputs.prior, min(k_chunk, k - start), seed, start, row_offset, route
        )
        return [inputs.log_likelihood(z, seen), *(t for t in drawn if t is not None)]

    # Filled when the first chunk runs, not while it is traced; both passes share it.
    protected: list[Callable[[int, Tensor], list[Tensor]]] = []

    def run(start: int, on_device: Tensor) -> list[Tensor]:
        # False after a graph break: checkpoint then runs its function as eager code.
        if torch.compiler.is_compiling():
            drawn = draw(start, on_device)
            # A graph's backward pass would recompute from the changed tensor.
            if torch.compiler.is_dynamo_compiling() and changes_what_it_reads():
                break_graph(
                    "with k_chunk, a decoder that reads a buffer and changes it in place runs as eager code"
                )
            return drawn
        if not protected:
            # Recomputation may run in an autograd thread, and must use the backend of the first pass.
            again = repeatable(draw, _read(inputs))
            protected.append(functools.partial(_backend.run_on, _backend.chosen(), again))
        return protected[0](start, on_device)

    on_device = tensors(inputs.x)[0]
    # The second pass runs to its end, to compare its results with the first's.
    parts = [
        checkpoint(run, start, on_device, use_reentrant=False, early_stop=False)
        for start in range(0, k, k_chunk)
    ]
    log_likelihood, log_ratio, *q_grad = (torch.cat(each) for each in zip(*parts, strict=True))
    return log_likelihood, log_ratio, q_grad[0] if q_grad else None


def _read(inputs: Inputs) -> dict[str, Any]:
    """Return what a chunk is computed from, by name."""
    aside = inputs.conditioning or Conditioning()
    return {
        "x": inputs.x, "q": inputs.q, "prior": inputs.prior, "decoder": inputs.decoder,
        "likelihood": inputs.likelihood, "mask": aside.mask, "size_factor": aside.size_factor,
        "context": aside.context,
    }  # fmt: skip
