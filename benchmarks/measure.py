"""Measuring: interleaved timing, allocations, and what the machine can do at best."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

OURS = "fastvae"


@dataclass
class Work:
    """One thing to compute, by several implementations.

    Attributes:
        group: what is computed, such as ``"rsample_kl"``: a table and a plot each.
        case: its sizes, such as ``"8192×64"``.
        run: implementation → a function of no arguments that does the work once.
        check: implementation → a function that raises AssertionError if its result is wrong.
        direction: ``"forward"``, ``"forward+backward"``, or ``"step"`` for what cannot be split.
        bytes: the least that must move between memory and the processor: inputs once, results once.
        operations: the least number of arithmetic operations, counted by hand (a multiply-add is one).
        note: implementation → what a reader must know of it.
    """

    group: str
    case: str
    direction: str
    run: dict[str, Callable[[], object]]
    check: dict[str, Callable[[], None]] = field(default_factory=dict)
    bytes: int = 0
    operations: int = 0


@dataclass
class Result:
    """What was measured of one implementation: seconds per run in each round, and one run's allocations."""

    seconds: np.ndarray
    peak_bytes: int
    allocations: int
    wrong: str = ""


def measure(work: Work, budget: float = 1.5, least_rounds: int = 5) -> dict[str, Result]:
    """Run every implementation in turn, round after round, so that a busy machine slows them all alike.

    Args:
        work: what to run.
        budget: seconds to spend on the rounds.
        least_rounds: rounds to do even if they take longer; slow work (a round above ``budget``) gets 3.
    """
    results: dict[str, Result] = {}
    repeats, warm = {}, {}
    for name, run in work.run.items():
        try:
            if name in work.check:
                work.check[name]()
        except AssertionError as error:
            results[name] = Result(np.array([]), 0, 0, wrong=str(error).strip().splitlines()[0])
            continue
        run()
        peak, count = allocations(run)
        start = time.perf_counter()
        run()
        once = time.perf_counter() - start
        repeats[name] = max(1, int(5e-3 / max(once, 1e-7)))
        warm[name] = once < 0.1
        results[name] = Result(np.array([]), peak, count)
    names = list(repeats)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while True:
            # The order turns, so that nobody always comes after the same neighbour.
            for name in names[done % len(names) :] + names[: done % len(names)]:
                run, count = work.run[name], repeats[name]
                if warm[name]:
                    run()
                before = time.perf_counter()
                for _ in range(count):
                    run()
                times[name].append((time.perf_counter() - before) / count)
            done += 1
            spent = time.perf_counter() - start
            if spent > budget and done >= (3 if spent / done > budget else least_rounds):
                break
    finally:
        gc.enable()
    for name in names:
        results[name].seconds = np.array(times[name])
    return results


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """The most bytes that torch's allocator held at once for one run, beyond what it held before, and how
    often it was asked for memory.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        run()
    sizes = []
    stack = list(p.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.typed[0] == torch._C._profiler._EventType.Allocation:
            sizes.append((event.start_time_ns, event.typed[1].alloc_size))
    held = np.cumsum([size for _, size in sorted(sizes)] or [0])
    return int(max(held.max(), 0)), sum(size > 0 for _, size in sizes)


def differentiate(function: Callable, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> Callable:
    """A function of no arguments: ``function(*inputs)`` and the gradients of its inputs."""
    wanted = [t for t in inputs if t.requires_grad]

    def run():
        outputs = function(*inputs)
        return outputs, torch.autograd.grad(outputs, wanted, grads)

    return run


@dataclass
class Machine:
    """What this machine does at best, measured in this run."""

    copy_bytes_per_second: float
    operations_per_second: float


def measure_machine() -> Machine:
    """Memory bandwidth by copying 256 MiB (bytes read plus bytes written), and arithmetic by a float32 matrix
    product of 2048³ (a multiply-add counts as one), each the best of several.
    """
    source, target = torch.ones(2**26), torch.zeros(2**26)
    a, b, c = torch.rand(2048, 2048), torch.rand(2048, 2048), torch.empty(2048, 2048)

    def best(run):
        seconds = []
        for _ in range(8):
            before = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - before)
        return min(seconds)

    copy = best(lambda: target.copy_(source))
    product = best(lambda: torch.mm(a, b, out=c))
    return Machine(2 * source.nbytes / copy, 2048**3 / product)
