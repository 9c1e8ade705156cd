"""Processes that share the work, and their communication."""

from __future__ import annotations

import contextlib
import signal
import threading
import warnings
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import distributed as dist
from torch import nn

from ..weights import Weights

_E = TypeVar("_E", bound=Exception)


class RankFailed(RuntimeError):
    """Error raised by the other ranks when one has failed."""


class Ranks:
    """Processes that share the work; a single one without torch.distributed.

    They exchange results, or the error of a rank that failed, which all others then raise.

    Args:
        shard: division of the work: "data", "samples", or "none": this process works alone, even under
            torch.distributed.
    """

    def __init__(self, shard: str):
        together = shard != "none" and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1
        self.by_samples = shard == "samples" and self.world > 1
        self._awaited = self.world > 1  # True if the others expect another exchange

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Send an error that leaves the block to the other ranks in their next exchange."""
        try:
            yield
        except BaseException as error:
            if self._awaited:
                self._tell(error)
            raise

    def _tell(self, error: BaseException) -> None:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        # The others may take long to arrive, and a failure here must not hide the original error.
        with contextlib.suppress(Exception):
            warnings.warn(
                f"fastvae.evaluate: rank {self.rank} failed ({said}); it waits to tell the other ranks",
                RuntimeWarning,
                stacklevel=2,
            )
        with contextlib.suppress(Exception):
            self._exchange(said, "", None)

    def unanimous(self, error: _E) -> _E:
        """Return an error that every rank raises at this point, so that it need not be sent."""
        self._awaited = False
        return error

    def _exchange(self, problem: str | None, what: str, value: Any) -> list[tuple[str | None, str, Any]]:
        found: list[Any] = [None] * self.world
        with _interrupts_after():
            self._awaited = False  # in case this fails
            dist.all_gather_object(found, (problem, what, value))
            self._awaited = all(p is None for p, _, _ in found)
        return found

    def gather(self, mine: Any, what: str) -> list[Any]:
        """Gather the objects of all ranks, in order; ``what`` names the current step.

        Raises:
            RankFailed: if a rank failed.
            ValueError: if a rank is at another step, because it has fewer batches.
        """
        if self.world == 1:
            return [mine]
        found = self._exchange(None, what, mine)
        for rank, (problem, _, _) in enumerate(found):
            if problem is not None:
                raise RankFailed(f"rank {rank} failed: {problem}")
        if len({place for _, place, _ in found}) > 1:
            raise self.data_differ()
        return [value for _, _, value in found]

    def data_differ(self) -> ValueError:
        """Return the error for data that differ, which every rank raises."""
        return self.unanimous(
            ValueError(
                "data differ between the ranks: each must iterate over the same batches, which evaluate "
                "divides among them (shuffle=False, no sampler that shards). To evaluate different data on "
                'each rank use shard="none"'
            )
        )

    def check_whole(self, modules: list[nn.Module]) -> None:
        """Validate that no rank needs the others to compute a module, since each has its own batches.

        Raises:
            ValueError: on every rank, if parameters are sharded.
        """
        if self.world > 1 and _are_sharded(modules):
            raise self.unanimous(
                ValueError(
                    "vae has parameters that are sharded over the ranks (FSDP, DTensor): all must call it "
                    'together, but they would evaluate different batches or draws. Pass shard="none" on '
                    "every rank, to evaluate all data on each"
                )
            )

    def first(self, value: Any) -> Any:
        """Return the value of rank 0."""
        return self.gather(value, "first")[0]

    def wait(self) -> None:
        self.gather(None, "wait")

    def takes(self, index: int) -> bool:
        """Return True if this rank evaluates this batch."""
        return self.by_samples or index % self.world == self.rank

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """Return the range of these draws assigned to this rank."""
        if not self.by_samples:
            return start, stop
        cuts = [start + (stop - start) * r // self.world for r in (self.rank, self.rank + 1)]
        return cuts[0], cuts[1]

    def merge(self, part: Weights | None, device: torch.device) -> Weights | None:
        """Merge the draws of all ranks, in order; None without draws."""
        if not self.by_samples:
            return part
        merged: Weights | None = None
        for values in self.gather(None if part is None else [v.cpu() for v in part.tensors], "draws"):
            if values is not None:
                its = Weights(*(v.to(device) for v in values))
                merged = its if merged is None else merged.merge(its)
        return merged


def _are_sharded(modules: list[nn.Module]) -> bool:
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    parts = [part for module in modules for part in module.modules()]
    return any(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in parts) or any(
        isinstance(p, DTensor) for m in parts for p in m.parameters(recurse=False)
    )


@contextlib.contextmanager
def _interrupts_after() -> Iterator[None]:
    """Defer Ctrl-C to the end of the block, since in an exchange it would leave the other ranks waiting."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *seen: pressed.append(seen))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            before(*pressed[0])
