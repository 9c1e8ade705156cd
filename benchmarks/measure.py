"""Measuring: interleaved timing, allocations, and what the machine does at best."""

from __future__ import annotations

import ctypes
import gc
import math
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

OURS = "fastvae"
COMPILE = "torch.compile"
FALLBACK = "torch.compile, fallback_random"

# Work of more elements than this is run a few times only, and not checked again: its check passed at smaller
# sizes.
HUGE = 10**8


@dataclass
class Work:
    """One thing to compute, by several implementations.

    Attributes:
        group: what is computed, such as ``"rsample_kl"``: a part of the table and a plot.
        case: its sizes, such as ``"8192×64"``.
        direction: ``"forward"``, ``"forward+backward"``, or, for what is not split, ``"step"`` or
            ``"evaluation"``.
        run: implementation → a function of no arguments that does the work once.
        check: implementation → a function that raises AssertionError where its result is wrong.
        bytes: the least that must move between memory and the processor: inputs once a pass, results once.
        operations: the least arithmetic, counted by hand (a multiply-add is one).
        huge: whether to be content with few rounds and no check.
        target: implementation → how many times as fast as it fastvae shall be.
    """

    group: str
    case: str
    direction: str
    run: dict[str, Callable[[], object]]
    check: dict[str, Callable[[], None]] = field(default_factory=dict)
    bytes: int = 0
    operations: int = 0
    huge: bool = False
    target: dict[str, float] = field(default_factory=dict)


@dataclass
class Result:
    """What was measured of one implementation: seconds per run in each round, and one run's allocations."""

    seconds: np.ndarray
    peak_bytes: int = 0
    allocations: int = 0
    wrong: str = ""


def keep_memory(keep: bool = True) -> bool:
    """Make glibc keep freed memory, for every implementation alike, and say whether that worked.

    Otherwise whoever allocates after somebody else's memory went back to the system pays for its pages: that
    costs more than many a kernel here, and hits at random. Arrays of gigabytes are not kept: they would not
    fit beside each other.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        libc = ctypes.CDLL(None)
        kept = libc.mallopt(m_mmap_max, 0 if keep else 2**16) and libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.malloc_trim(0)
        return bool(kept)
    except (OSError, AttributeError):
        return False


def measure(work: Work, budget: float = 0.6) -> dict[str, Result]:
    """Run the implementations in turn, round after round, so that a busy machine slows them all alike.

    Each turn is one run that does not count, which brings an implementation's own memory back into the
    caches, and then as many as take some milliseconds. A wrong result is not timed.

    Args:
        work: what to run.
        budget: seconds to spend on the rounds; there are at least five, or two that are longer,
            or one of more than five seconds.
    """
    results: dict[str, Result] = {}
    repeats, warm = {}, {}
    for name, run in work.run.items():
        try:
            if name in work.check and not work.huge:
                work.check[name]()
            start = time.perf_counter()
            run()
            first = time.perf_counter() - start
        except Exception as error:  # one peer's failure is a row of the table, not the end of the run
            text = str(error).strip().splitlines() or [""]
            results[name] = Result(np.array([]), wrong=f"{type(error).__name__}: {text[0]}"[:120])
            continue
        peak, count = allocations(run)
        start = time.perf_counter()
        if first < 2:
            run()
        once = time.perf_counter() - start if first < 2 else first
        repeats[name] = max(1, int(5e-3 / max(once, 1e-7)))
        warm[name] = once < 0.1
        results[name] = Result(np.array([]), peak, count)
    names = list(repeats)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while names:
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
            # What takes long is run less often: five rounds, two above the budget, one above five seconds.
            if spent > budget and done >= (1 if spent / done > 5 else 2 if spent / done > budget else 5):
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


def tuple_of(outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def gradients(outputs, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(tuple_of(outputs), [t for t in inputs if t.requires_grad], grads)


def compiled(function: Callable, sampling: bool) -> dict[str, Callable]:
    """torch.compile's versions of a function, for one shape each; its own random numbers are slow."""
    versions = {COMPILE: torch.compile(function, dynamic=False)}
    if sampling:
        versions[FALLBACK] = torch.compile(function, dynamic=False, options={"fallback_random": True})
    return versions


def op_works(
    group: str,
    case: str,
    inputs: tuple[Tensor, ...],
    functions: dict[str, Callable],
    exact: Callable,
    *,
    sampling: bool,
    elements: int,
    moved: tuple[int, int],
    operations: tuple[int, int],
    target: dict[str, float] | None = None,
) -> Iterator[Work]:
    """The works of one op at one size: forward (recording for backward), and forward and backward.

    Args:
        functions: implementation → a function of ``inputs``; ``"eager"`` is compiled, too.
        exact: ``exact(outputs, *inputs)`` in float64: what the outputs should be, with gradients; it may take
            the noise from the outputs.
        sampling: whether the functions draw random numbers.
        elements: how many numbers the largest tensor has.
        moved, operations: the least bytes and operations of forward, and of forward and backward.
        target: for forward and backward.
    """
    huge = elements > HUGE
    # The most that a peer here holds at once is eleven tensors.
    if huge and (needed := 44 * elements / 2**30) > (there := _available_gib()):
        print(f"{group} {case}: left out; it takes about {needed:.0f} GiB, and there are {there:.0f}")
        return
    keep_memory(not huge)
    functions = {**functions, **compiled(functions["eager"], sampling)}
    with torch.no_grad():
        grads = tuple(torch.randn_like(t) for t in tuple_of(functions[OURS](*inputs)))

    def check(function):
        outputs = tuple_of(function(*inputs))
        wide = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
        expected = tuple_of(exact(tuple(o.detach().double() for o in outputs), *wide))
        for got, want in zip(outputs, expected, strict=True):
            assert_near(got, want)
        got = gradients(outputs, inputs, grads)
        want = gradients(expected, wide, tuple(g.double() for g in grads))
        for a, b in zip(got, want, strict=True):
            assert_near(a, b)

    checks = {name: lambda f=f: check(f) for name, f in functions.items()}
    forward = {name: lambda f=f: f(*inputs) for name, f in functions.items()}
    both = {name: lambda f=f: gradients(f(*inputs), inputs, grads) for name, f in functions.items()}
    if not huge:
        yield Work(group, case, "forward", forward, checks, moved[0], operations[0])
    yield Work(
        group,
        case,
        "forward+backward",
        both,
        checks if huge else {},
        moved[1],
        operations[1],
        huge,
        target or {},
    )
    torch._dynamo.reset()


def assert_near(got: Tensor, want: Tensor) -> None:
    """A thousandth of the largest element: this refuses what is wrong; accuracy is for the tests."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = float((got.double() - want).abs().amax())
    scale = float(want.abs().amax())
    assert error <= 1e-3 * scale, f"an error of {error:.3g} at a scale of {scale:.3g}"


def _available_gib() -> float:
    """Memory that can still be had; infinite where nobody tells."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return math.inf
    return int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) / 2**20


@dataclass
class Machine:
    """What this machine does at best, per second: bytes copied (in and out), bytes read, multiply-adds."""

    copied: float
    read: float
    operations: float

    def best(self, other: Machine) -> Machine:
        """The better of two measurements, figure by figure."""
        names = ("copied", "read", "operations")
        return Machine(*(max(getattr(self, n), getattr(other, n)) for n in names))

    def least_seconds(self, work: Work) -> float:
        """The time that the bytes and the operations of a work need at least."""
        return max(work.bytes / max(self.copied, self.read), work.operations / self.operations)


def measure_machine() -> Machine:
    """Copying 256 MiB, adding them up, and a float32 matrix product of 2048³; each the best of eight."""
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
    return Machine(2 * source.nbytes / copy, source.nbytes / best(source.sum), 2048**3 / product)
