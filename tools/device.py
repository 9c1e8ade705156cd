"""Measurements on a CUDA device: events, graphs, peak memory. All uses of torch.cuda are here."""

from __future__ import annotations

import collections
import contextlib
import gc
import math
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from types import ModuleType

import torch

from benchmarks.measure import Host, Timed, Work, describe, loop_of, tuple_of
from benchmarks.report import processor, versions_of

from . import interpreter

# Duration of a graph's calls, long enough to make its launch negligible.
GRAPH_SECONDS = 2e-3
MOST_CALLS = 64
# Total size of a work's sets of inputs and results, in multiples of the L2 cache.
TIMES_THE_CACHE = 4
MOST_SETS = 64


class CaptureFailed(Exception):
    """Failed capture of a CUDA graph.

    It leaves torch in a state (the random generator and the allocator still in capture mode) in which the
    process cannot continue.
    """

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key}: {reason}")
        self.key, self.reason = key, reason


class DeviceLost(Exception):
    """Loss of the device, which accepts no more work from this process: illegal address, failed assertion."""


class Cuda(Host):
    """Current CUDA device.

    Everything runs on one stream other than the default, as a capture requires of its warm-up.

    Args:
        failed: work and implementation → reason of an earlier failed capture; timed without a graph.
        cuda: ``torch.cuda``, or a stand-in in a test.
        device: device of the tensors; a different one in a test.
    """

    def __init__(
        self,
        failed: dict[str, str] | None = None,
        cuda: ModuleType = torch.cuda,
        device: torch.device | None = None,
    ):
        self.cuda = cuda
        self.device = device or torch.device("cuda", cuda.current_device())
        self.properties = cuda.get_device_properties(cuda.current_device())
        self.failed = failed or {}
        self.stream = cuda.Stream()

    def active(self) -> AbstractContextManager:
        """Return a context in which work goes to the stream."""
        return self.cuda.stream(self.stream)

    @property
    def cache(self) -> int:
        """Size of the L2 cache in bytes."""
        return getattr(self.properties, "L2_cache_size", 0) or 2**26

    def seconds(self, launch: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
        """Measure by a clock of the host, from an idle device to an idle device."""
        self.cuda.synchronize()

        def launch_and_wait():
            launch()
            self.cuda.synchronize()

        return super().seconds(launch_and_wait, clock)

    def seconds_by_events(self, launch: Callable[[], object]) -> float:
        """Measure by the device's clock, with events in the stream before and after."""
        before, after = (self.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        launch()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def prepare(self, work: Work, name: str, once: float) -> Timed:
        run = work.run[name]
        if name not in work.graphs:
            return loop_of(run, once, *self.clock_of(work))
        key = f"{work.group}: {name}"
        # If a plain copy cannot be captured, nothing can.
        if reason := self.failed.get(key) or self.failed.get("machine: copy"):
            return loop_of(run, once, self.seconds_by_events, f"events: {reason}")
        # A step is one graph, as in training; an op's graph has many calls, to make its launch negligible.
        calls = 1 if work.direction == "step" else math.ceil(GRAPH_SECONDS / max(once, 1e-6))
        calls = max(work.sets, min(MOST_CALLS, calls))
        try:
            replay = self._capture(run, calls, work.sets)
        except Exception as error:
            raise CaptureFailed(key, describe(error)) from error
        timed = loop_of(replay, once * calls, self.seconds_by_events, "graph")
        return replace(timed, calls=timed.calls * calls)

    def _capture(self, run: Callable[[], object], calls: int, sets: int) -> Callable[[], object]:
        # A live autograd graph would tie the capture to tensors outside.
        gc.collect()
        for _ in range(max(3, sets)):
            run()
        self.cuda.synchronize()
        graph = self.cuda.CUDAGraph()
        # Results are kept as long as their inputs: freed at once, they would stay in the cache.
        kept = collections.deque(maxlen=sets)
        with self.cuda.graph(graph, stream=self.stream):
            for _ in range(calls):
                kept.append(_detached(run()))
        self.cuda.synchronize()
        return graph.replay

    def memory(self, run: Callable[[], object]) -> tuple[int, int]:
        self.cuda.synchronize()
        self.cuda.reset_peak_memory_stats()
        before, count = self.cuda.memory_allocated(), self._allocations()
        run()
        self.cuda.synchronize()
        return max(0, self.cuda.max_memory_allocated() - before), self._allocations() - count

    def _allocations(self) -> int:
        return self.cuda.memory_stats().get("allocation.all.allocated", 0)

    def sets(self, moved: int) -> int:
        return min(MOST_SETS, max(2, math.ceil(TIMES_THE_CACHE * self.cache / max(moved, 1))))

    def check_usable(self, error: Exception) -> None:
        if isinstance(error, CaptureFailed):
            raise error
        try:
            self.cuda.synchronize()
        except Exception as lost:
            raise DeviceLost(describe(lost)) from lost

    def release(self) -> None:
        """Return freed memory to the device."""
        gc.collect()
        self.cuda.empty_cache()

    def describe(self) -> tuple[str, list[str]]:
        """Return the GPU's name, and the versions recorded in every row."""
        runtime = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
        return self.properties.name, [*versions_of("triton", "numpy"), runtime, *_of_the_driver()]


def _detached(outputs: object) -> list[torch.Tensor]:
    return [] if outputs is None else [t.detach() for t in tuple_of(outputs)]


def _of_the_driver() -> list[str]:
    """Return the driver's version, and current and maximum clocks of multiprocessors and memory."""
    names = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem"
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        driver, *clocks = done.stdout.splitlines()[0].split(", ")
        return [f"driver {driver}", "clocks {} of {} MHz, memory {} of {} MHz".format(*clocks)]
    except (OSError, subprocess.SubprocessError, IndexError):
        return []


class StandIn(Host):
    """CPU stand-in for a GPU in a dry run: the same methods, a loop instead of a graph.

    Compiling takes seconds, so only the first functions are compiled.
    """

    COMPILED = 3
    cache = 2**10

    def __init__(self):
        self.compiled = 0

    def active(self) -> AbstractContextManager:
        interpreter.quicken()
        return contextlib.nullcontext()

    def prepare(self, work: Work, name: str, once: float) -> Timed:
        run = work.run[name]
        if name not in work.graphs:
            return Timed(run, 1, *self.clock_of(work))

        def launch():
            for _ in range(work.sets):
                _detached(run())

        return Timed(launch, work.sets, self.seconds, "stand-in for a graph")

    def compile(self, function: Callable, **options) -> Callable:
        self.compiled += 1
        return super().compile(function, **options) if self.compiled <= self.COMPILED else function

    def sets(self, moved: int) -> int:
        return 2

    def release(self) -> None:
        pass

    def describe(self) -> tuple[str, list[str]]:
        return f"DRY RUN without a GPU, {processor()}", versions_of("triton", "numpy")
