"""Measurements: interleaved timing, allocations, and the machine's best speed."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import itertools
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

OURS = "fastvae"
COMPILE = "torch.compile"
FALLBACK = "torch.compile, fallback_random"
REDUCE_OVERHEAD = "torch.compile, reduce-overhead"
# Not a peer: the time to move as many bytes, measured with the others.
COPY = "a copy as large"
# Nor is this: autograd nodes that allocate an objective's results and do nothing.
EMPTY = "empty nodes"

# Works of more elements than this are run a few times only, and not checked: their checks passed at smaller
# sizes.
HUGE = 10**8


@dataclass
class Work:
    """Computation by several implementations.

    Attributes:
        group: the computation, such as ``"rsample_kl"``: a part of the table and a plot.
        case: its sizes, such as ``"8192×64"``.
        direction: ``"forward"``, ``"forward+backward"``, or, if not split, ``"step"`` or ``"evaluation"``.
        run: implementation → a function of no arguments that does the work once.
        check: implementation → a function that raises AssertionError if its result is wrong.
        bytes: minimum traffic between memory and processor: inputs once per pass, results once.
        operations: minimum arithmetic, counted by hand (a multiply-add is one).
        huge: run few rounds and no check.
        target: implementation → required speed-up of fastvae over it.
        graphs: implementations captured in a CUDA graph and timed by its replays.
        sets: number of input sets that implementations cycle through, so that they do not stay in a cache.
        part: implementation → fraction of the work it does, where all of it would take too long; its time is
            divided by the fraction.
        base: implementation whose median time is subtracted from the others'; it is not in the results.
        processor: count the processor's time of all threads, not the time on the wall.
        bits: implementation → a function that returns a number of all bits of its result.
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
    graphs: frozenset[str] = frozenset()
    sets: int = 1
    part: dict[str, float] = field(default_factory=dict)
    base: str = ""
    processor: bool = False
    bits: dict[str, Callable[[], str]] = field(default_factory=dict)


@dataclass
class Result:
    """Measurements of one implementation: seconds per run in each round, a run's allocations, the clock.

    ``bits`` is the number of its result's bits, where the work has one.
    """

    seconds: np.ndarray
    peak_bytes: int = 0
    allocations: int = 0
    wrong: str = ""
    clock: str = ""
    bits: str = ""


@dataclass
class Timed:
    """Timed function: ``launch`` does the work ``calls`` times, ``seconds(launch)`` times it by ``clock``."""

    launch: Callable[[], object]
    calls: int
    seconds: Callable[[Callable[[], object]], float]
    clock: str


class Host:
    """CPU that does the work, with its clock and memory.

    :class:`tools.device.Cuda` has the same methods. Without a GPU it stands in for one: a work that
    requests a CUDA graph gets a loop.
    """

    device = torch.device("cpu")

    def seconds(self, launch: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
        """Return the time from before the call until all its work is done."""
        before = clock()
        launch()
        return clock() - before

    def clock_of(self, work: Work) -> tuple[Callable[[Callable[[], object]], float], str]:
        """Return the function that times a work not captured in a graph, and its name."""
        if work.processor:
            return functools.partial(self.seconds, clock=time.process_time), "processor"
        return self.seconds, "host"

    def prepare(self, work: Work, name: str, once: float) -> Timed:
        """Return the timed function of a warmed-up implementation that takes ``once`` seconds."""
        return loop_of(work.run[name], once, *self.clock_of(work))

    def memory(self, run: Callable[[], object]) -> tuple[int, int]:
        """Return a run's peak bytes beyond those allocated before, and the number of allocations."""
        return allocations(run)

    def compile(self, function: Callable, **options) -> Callable:
        version = torch.compile(function, dynamic=False, **options)
        if options.get("mode") != "reduce-overhead":
            return version

        def call(*arguments):
            # Otherwise a forward pass without a backward pass keeps its CUDA graph from being used.
            torch.compiler.cudagraph_mark_step_begin()
            return version(*arguments)

        return call

    def sets(self, moved: int) -> int:
        """Return the number of input sets for a call that moves ``moved`` bytes.

        Here one, since caches are part of a CPU's speed.
        """
        return 1

    def check_usable(self, error: Exception) -> None:
        """Raise if no further work is possible here after this error."""


HOST = Host()


def loop_of(run: Callable[[], object], once: float, seconds: Callable, clock: str) -> Timed:
    """Return a loop of as many calls as take some milliseconds."""
    calls = max(1, int(5e-3 / max(once, 1e-7)))

    def launch():
        for _ in range(calls):
            run()

    return Timed(launch, calls, seconds, clock)


# torch.compile's versions of a function and their options. On a CPU its own random numbers are slow.
VERSIONS = {COMPILE: {}, FALLBACK: {"options": {"fallback_random": True}}}


@dataclass(frozen=True)
class Place:
    """Host and precision of works.

    Attributes:
        host: clock, memory and device.
        dtype: dtype of the inputs; whole steps are autocast to it.
        versions: compiled version → options of torch.compile.
        graphs: capture every implementation of an op in a CUDA graph, and cycle through several input sets.
        label: suffix of a work's case.
    """

    host: Host = HOST
    dtype: torch.dtype = torch.float32
    versions: Mapping[str, dict] = field(default_factory=lambda: VERSIONS)
    graphs: bool = False
    label: str = ""

    @property
    def device(self) -> torch.device:
        return self.host.device

    def sets_of(self, make: Callable[[], tuple[Tensor, ...]], moved: int) -> list[tuple[Tensor, ...]]:
        """Return the input sets, from seed 0, for a call that moves ``moved`` bytes."""
        torch.manual_seed(0)
        return [make() for _ in range(self.host.sets(moved) if self.graphs else 1)]

    def cast(self, function: Callable) -> Callable:
        """Return the function as training in this precision calls it: autocast, with float32 sums."""
        if self.dtype == torch.float32:
            return function

        def cast(*arguments):
            with torch.autocast(self.device.type, self.dtype):
                return function(*arguments)

        return cast

    def randn(self, *shape: int, requires_grad: bool = False) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device, requires_grad=requires_grad)


CPU = Place()


def keep_memory(keep: bool = True) -> bool:
    """Make glibc keep freed memory, for every implementation alike; return True if that worked.

    Otherwise an allocation after another implementation's memory was returned to the system pays for page
    faults, which cost more than many kernels here, at random. Arrays of gigabytes are not kept: several would
    not fit at once.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        libc = ctypes.CDLL(None)
        kept = libc.mallopt(m_mmap_max, 0 if keep else 2**16) and libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.malloc_trim(0)
        return bool(kept)
    except (OSError, AttributeError):
        return False


def measure(work: Work, budget: float = 0.6, host: Host = HOST) -> dict[str, Result]:
    """Run the implementations in interleaved rounds, so that a busy machine slows them all alike.

    Each turn is one uncounted run, which brings the implementation's own memory back into the caches, and
    then as many as take some milliseconds. A wrong result is not timed.

    Args:
        work: the work to run.
        budget: seconds to spend on the rounds; there are at least five, or two if a round exceeds the budget,
            or one if it exceeds five seconds. Default: 0.6.
        host: machine and clock. Default: the CPU.
    """
    results: dict[str, Result] = {}
    timed: dict[str, Timed] = {}
    warm = {}
    for name, run in work.run.items():
        try:
            if name in work.check and not work.huge:
                work.check[name]()
            bits = work.bits[name]() if name in work.bits else ""
            first = host.seconds(run)
            peak, count = host.memory(run)
            once = host.seconds(run) if first < 2 else first
            timed[name] = host.prepare(work, name, once)
        except Exception as error:  # a peer's failure becomes a row of the table, and does not end the run
            host.check_usable(error)
            results[name] = Result(np.array([]), wrong=describe(error))
            continue
        warm[name] = once < 0.1
        results[name] = Result(np.array([]), peak, count, clock=timed[name].clock, bits=bits)
    names = list(timed)
    times: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while names:
            # The order rotates, so that predecessors vary.
            for name in names[done % len(names) :] + names[: done % len(names)]:
                if warm[name]:
                    work.run[name]()
                seconds = timed[name].seconds(timed[name].launch)
                times[name].append(seconds / timed[name].calls / work.part.get(name, 1))
            done += 1
            spent = time.perf_counter() - start
            # Long works run fewer rounds: five, two above the budget, one above five seconds.
            if spent > budget and done >= (1 if spent / done > 5 else 2 if spent / done > budget else 5):
                break
    finally:
        gc.enable()
    for name in names:
        results[name].seconds = np.array(times[name])
    if work.base:
        base = np.median(results.pop(work.base).seconds)
        for result in results.values():
            result.seconds = result.seconds - base
    return results


def bits_of(run: Callable[[], object], calls: int = 1) -> str:
    """Return a number of all bits of a run's results, summed over as many calls as it has sets of inputs."""
    total = 0
    for _ in range(calls):
        for t in tuple_of(run()):
            words = t.detach().contiguous().view(WORDS[t.element_size()]).flatten()
            # A sum of integers has no order, and odd factors lose no bit.
            total += int((words * torch.arange(1, 2 * len(words), 2, device=t.device)).sum())
    return f"{total % 2**64:016x}"


WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def describe(error: BaseException) -> str:
    """Format an error for a line of the table."""
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0]}"[:120]


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """Return a run's peak bytes in torch's allocator beyond those before, and the number of allocations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as p:
        run()
    sizes = []
    stack = list(p.profiler.kineto_results.experimental_event_tree())
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.typed[0] == torch._C._profiler._EventType.Allocation:
            sizes.append((event.start_time_ns, event.typed[1].alloc_size))
    allocated = np.cumsum([size for _, size in sorted(sizes)] or [0])
    return int(max(allocated.max(), 0)), sum(size > 0 for _, size in sizes)


def tuple_of(outputs) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def gradients(outputs, inputs: tuple[Tensor, ...], grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(tuple_of(outputs), [t for t in inputs if t.requires_grad], grads)


def compiled(function: Callable, sampling: bool, place: Place = CPU) -> dict[str, Callable]:
    """Return torch.compile's versions of a function for one shape; ``fallback_random`` if it samples."""
    return {
        name: place.host.compile(function, **options)
        for name, options in place.versions.items()
        if sampling or name != FALLBACK
    }


def op_works(
    group: str,
    case: str,
    make: Callable[[], tuple[Tensor, ...]],
    functions: dict[str, Callable],
    exact: Callable,
    *,
    sampling: bool,
    elements: int,
    moved: tuple[int, int],
    operations: tuple[int, int],
    target: dict[str, float] | None = None,
    place: Place = CPU,
    tolerance: float | None = None,
) -> Iterator[Work]:
    """Yield the works of one op at one size: forward (recording for backward), and forward and backward.

    Args:
        group: name of the op.
        case: label of the size.
        make: returns the inputs.
        functions: implementation → a function of the inputs; ``"eager"`` is compiled too.
        exact: ``exact(outputs, *inputs)`` in float64: the expected outputs, with gradients; it may take the
            noise from the outputs.
        sampling: True if the functions draw random numbers.
        elements: number of elements of the largest tensor.
        moved: minimum bytes of forward, and of forward and backward.
        operations: minimum operations of forward, and of forward and backward.
        target: required speed-ups for forward and backward.
        place: host and precision; fastvae takes its tensors as they are, peers run under autocast.
        tolerance: tolerance of the check. Default: that of the precision.
    """
    tolerance = tolerance or TOLERANCE[place.dtype]
    on_cpu = place.device.type == "cpu"
    huge = on_cpu and elements > HUGE
    # Peers have at most eleven tensors in memory at once.
    if huge and (needed := 44 * elements / 2**30) > (there := _available_gib()):
        print(f"{group} {case}: skipped; it needs about {needed:.0f} GiB, and {there:.0f} are available")
        return
    if on_cpu:
        keep_memory(not huge)
    functions = {name: f if name == OURS else place.cast(f) for name, f in functions.items()}
    functions |= compiled(functions["eager"], sampling, place)
    sets = place.sets_of(make, moved[0])
    with torch.no_grad():
        grads = tuple(torch.randn_like(t) for t in tuple_of(functions[OURS](*sets[0])))
    # A peer may return another dtype, whose upstream gradient must be prepared.
    ready = {(i, d): g.to(d) for i, g in enumerate(grads) for d in (g.dtype, torch.float32, place.dtype)}

    def gradients_of(outputs, inputs):
        return gradients(outputs, inputs, tuple(ready[i, o.dtype] for i, o in enumerate(tuple_of(outputs))))

    def check(name):
        inputs = sets[-1]
        with poisoned() if name == OURS else contextlib.nullcontext():
            outputs = tuple_of(functions[name](*inputs))
            got_gradients = gradients_of(outputs, inputs)
        wide = tuple(t.detach().double().requires_grad_(t.requires_grad) for t in inputs)
        expected = tuple_of(exact(tuple(o.detach().double() for o in outputs), *wide))
        for got, want in zip(outputs, expected, strict=True):
            assert_near(got, want, tolerance)
        want = gradients(expected, wide, tuple(g.double() for g in grads))
        for a, b in zip(got_gradients, want, strict=True):
            assert_near(a, b, tolerance)

    found: dict[str, Exception | None] = {}

    def check_once(name):
        if name not in found:
            try:
                check(name)
                found[name] = None
            except Exception as error:
                # A traceback would keep the tensors alive.
                found[name] = error.with_traceback(None)
        if found[name] is not None:
            raise found[name]

    def each(call):
        """Return a function of no arguments that takes the next set of inputs at every call."""
        if len(sets) == 1:
            return lambda: call(sets[0])
        turn = itertools.cycle(sets)
        return lambda: call(next(turn))

    checks = {name: lambda name=name: check_once(name) for name in functions}
    forward = {name: each(lambda inputs, f=f: f(*inputs)) for name, f in functions.items()}
    both = {name: each(lambda inputs, f=f: gradients_of(f(*inputs), inputs)) for name, f in functions.items()}
    shared = {"graphs": frozenset((*functions, COPY)) if place.graphs else frozenset(), "sets": len(sets)}
    case += place.label
    if not huge:
        run = forward | copies(moved[0], place)
        yield Work(group, case, "forward", run, checks, moved[0], operations[0], **shared)
    yield Work(
        group,
        case,
        "forward+backward",
        both | copies(moved[1], place),
        checks,
        moved[1],
        operations[1],
        huge,
        target or {},
        **shared,
    )
    torch._dynamo.reset()


def copies(moved: int, place: Place) -> dict[str, Callable[[], object]]:
    """Return a copy of half as many bytes, as it reads and writes: the GPU's limit at this size."""
    if not place.graphs:
        return {}
    pairs = itertools.cycle(
        [
            (source, torch.empty_like(source))
            for source in (
                torch.rand(max(1, moved // 8), device=place.device) for _ in range(place.host.sets(moved))
            )
        ]
    )

    def run():
        source, target = next(pairs)
        return target.copy_(source)

    return {COPY: run}


# A thousandth of the largest element; two hundredths where z and products are rounded to eight bits.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fill uninitialised memory with NaN, so that elements no kernel writes are detected.

    A compiled function would be recompiled.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def assert_near(got: Tensor, want: Tensor, tolerance: float = 1e-3) -> None:
    """Assert agreement to a fraction of the largest element, to detect errors; the tests check accuracy."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, expected {tuple(want.shape)}"
    error = float((got.detach().double() - want.detach()).abs().amax())
    scale = float(want.detach().abs().amax())
    assert error <= tolerance * scale, f"an error of {error:.3g} at a scale of {scale:.3g}"


def _available_gib() -> float:
    """Return the available memory; infinite if unknown."""
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return math.inf
    return int(re.search(r"MemAvailable:\s+(\d+)", text)[1]) / 2**20


@dataclass
class Machine:
    """Best speed of a machine, per second: bytes copied (in and out), bytes read, multiply-adds."""

    copied: float
    read: float
    operations: float

    def best(self, other: Machine) -> Machine:
        """Return the better of two measurements, figure by figure."""
        names = ("copied", "read", "operations")
        return Machine(*(max(getattr(self, n), getattr(other, n)) for n in names))

    def least_seconds(self, work: Work) -> float:
        """Return the minimum time for a work's bytes and operations."""
        return max(work.bytes / max(self.copied, self.read), work.operations / self.operations)


def measure_machine(
    host: Host = HOST, numbers: int = 2**26, size: int = 2048, dtype: torch.dtype = torch.float32
) -> Machine:
    """Measure copying and summing ``numbers`` float32, and a matrix product of size³; the best of each."""
    source = torch.rand(numbers, device=host.device)
    target = torch.zeros_like(source)
    a, b, c = (torch.rand(size, size, device=host.device).to(dtype) for _ in range(3))
    run = {
        "copy": lambda: target.copy_(source),
        "sum": source.sum,
        "product": lambda: torch.mm(a, b, out=c),
    }
    results = measure(Work("machine", "", "", run, graphs=frozenset(run)), budget=1.0, host=host)
    if wrong := [f"{name}: {r.wrong}" for name, r in results.items() if r.wrong]:
        raise RuntimeError(f"the machine's own speed could not be measured: {wrong[0]}")
    copy, read, product = (float(r.seconds.min()) for r in results.values())
    return Machine(2 * source.nbytes / copy, source.nbytes / read, size**3 / product)
