"""Control of the fake card, inside its environment: what was launched, errors to order, the host's time.

>>> from tools.fakecard import control                        # doctest: +SKIP
>>> with control.launches() as found:                         # doctest: +SKIP
...     fastvae.elbo(x, q, decoder).backward()
>>> [launch.name for launch in found]                         # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import LIBRARIES, is_active

# The order is that of runtime.cpp.
KINDS = ("runtime", "driver", "library", "graph", "malloc", "copy", "set")
LAUNCHES = KINDS[:4]


class Counts(NamedTuple):
    """Numbers of calls.

    Attributes:
        runtime: kernels of torch's own.
        driver: kernels of Triton's and of other code compiled at run time.
        library: kernels of NVIDIA's libraries, such as matrix products.
        graph: replays of CUDA graphs.
        malloc: allocations of device or pinned memory, of which the caching allocator makes few.
        copy: copies.
        set: sets of memory to a value.
    """

    runtime: int = 0
    driver: int = 0
    library: int = 0
    graph: int = 0
    malloc: int = 0
    copy: int = 0
    set: int = 0

    @property
    def launches(self) -> int:
        """Launches of kernels and graphs."""
        return self.runtime + self.driver + self.library + self.graph

    def since(self, before: Counts) -> Counts:
        return Counts(*(a - b for a, b in zip(self, before, strict=True)))


class Launch(NamedTuple):
    """Launch of a kernel or of a graph.

    Attributes:
        kind: ``"runtime"``, ``"driver"``, ``"library"`` or ``"graph"``, as in :class:`Counts`.
        name: the kernel's name.
        grid: number of programs along each axis.
        threads: threads per program.
        shared: bytes of dynamic shared memory.
        device: number of the card.
        stream: handle of the stream, the same for equal streams.
        captured: True if the launch went into a graph instead of running.
        function: the driver's handle of the function, for :func:`parameters` and :func:`image`; else None.
    """

    kind: str
    name: str
    grid: tuple[int, int, int]
    threads: int
    shared: int
    device: int
    stream: int
    captured: bool
    function: int | None


class _Record(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("stream", ctypes.c_void_p),
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("kind", ctypes.c_int),
        ("device", ctypes.c_int),
        ("captured", ctypes.c_int),
    )

    def launch(self) -> Launch:
        return Launch(
            KINDS[self.kind],
            _demangled(self.name),
            tuple(self.grid),
            self.threads,
            self.shared,
            self.device,
            self.stream,
            bool(self.captured),
            self.function,
        )


_PARAMETERS = ctypes.POINTER(ctypes.c_void_p)
_DEVICE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(_Record), _PARAMETERS)
_WORK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_long)


@functools.cache
def library() -> ctypes.CDLL:
    """Load the stand-in runtime, with the types of its controls."""
    if not is_active():
        raise RuntimeError(
            f"the fake card is not active: {LIBRARIES} is not set; run this as "
            "`python -m tools.fakecard -- python ...`"
        )
    found = ctypes.CDLL(str(Path(os.environ[LIBRARIES], "libfakecard.so")))
    c_int, c_long, pointer, size = ctypes.c_int, ctypes.c_long, ctypes.c_void_p, ctypes.c_size_t
    for name, result, *arguments in (
        ("count", c_long, c_int),
        ("record", None, c_int),
        ("recorded", c_long),
        ("get", None, c_long, ctypes.POINTER(_Record)),
        ("fail", None, c_int, c_int, c_long, c_long),
        ("device", None, _DEVICE),
        ("submit", c_int, pointer, _WORK, c_long),
        ("capturing", c_int, pointer),
        ("block", c_int, pointer, ctypes.POINTER(size), ctypes.POINTER(size)),
        ("parameters", c_int, pointer, ctypes.POINTER(ctypes.c_uint), c_int),
        ("image", pointer, pointer, ctypes.POINTER(size)),
        ("path", ctypes.c_char_p, pointer),
    ):
        function = getattr(found, f"fakecard_{name}")
        function.restype, function.argtypes = result, arguments
    return found


@functools.lru_cache(4096)
def _demangled(name: bytes) -> str:
    """Return a C++ name as it is written, other names as they are."""
    demangle = ctypes.CDLL("libstdc++.so.6").__cxa_demangle
    demangle.restype, demangle.argtypes = ctypes.c_void_p, [ctypes.c_char_p] + [ctypes.c_void_p] * 3
    found = demangle(name, None, None, None)
    return (ctypes.string_at(found) if found else name).decode()


# What happened


def counts() -> Counts:
    """Return the numbers of calls since the process began."""
    return Counts(*(library().fakecard_count(i) for i in range(len(KINDS))))


_recording = False


@contextlib.contextmanager
def launches() -> Iterator[list[Launch]]:
    """Record the launches within the block, of all threads; the list is filled at its end."""
    global _recording
    if _recording:
        raise RuntimeError(
            "launches() within launches(): one block records at a time; leave the outer one first"
        )
    found: list[Launch] = []
    _recording = True
    library().fakecard_record(1)
    try:
        yield found
    finally:
        record = _Record()
        for i in range(library().fakecard_recorded()):
            library().fakecard_get(i, ctypes.byref(record))
            if KINDS[record.kind] in LAUNCHES:
                found.append(record.launch())
        library().fakecard_record(0)
        _recording = False


# Errors to order


@contextlib.contextmanager
def failing(kind: str, code: int, skipped: int = 0, times: int = 1) -> Iterator[None]:
    """Make calls within the block fail.

    Args:
        kind: kind of the call, one of ``KINDS``.
        code: CUDA's number of the error, such as 2 (out of memory), 700 (illegal address) or 719 (launch
            failed).
        skipped: number of calls of this kind that succeed before. Default: 0.
        times: number of calls that fail. Default: 1.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(map(repr, KINDS))}")
    library().fakecard_fail(KINDS.index(kind), code, skipped, times)
    try:
        yield
    finally:
        library().fakecard_fail(KINDS.index(kind), 0, 0, 0)


# What runs


@contextlib.contextmanager
def device(run: Callable[[Launch, list[bytes]], object]) -> Iterator[None]:
    """Call a function at each launch by the driver within the block, in place of the device.

    A captured launch calls it at each replay, with the parameters' values at the capture. If the function
    raises, the launch fails, and the block raises that exception at its end.

    Args:
        run: ``run(launch, parameters)`` with the bytes of each parameter's value.
    """
    errors: list[BaseException] = []

    def call(record: Any, parameters: Any) -> int:
        try:
            launch = record.contents.launch()
            sizes = parameter_sizes(launch.function or 0)
            run(launch, [ctypes.string_at(parameters[i], n) for i, n in enumerate(sizes)])
        except BaseException as error:  # noqa: BLE001 (it may not cross the driver's frames)
            errors.append(error)
            return 719
        return 0

    called = _DEVICE(call)
    library().fakecard_device(called)
    try:
        yield
    except Exception:
        if errors:
            raise errors[0] from None
        raise
    finally:
        library().fakecard_device(_DEVICE())
    if errors:
        raise errors[0]


_numbers = itertools.count()
_submitted: dict[int, Callable[[], object]] = {}


def submit(work: Callable[[], object], stream: int) -> None:
    """Do something in the order of a stream: at once, or under capture at each replay of the graph.

    Args:
        work: function of no arguments.
        stream: handle of the stream, as of ``torch.cuda.current_stream().cuda_stream``.
    """
    if not is_capturing(stream):
        work()
        return
    number = next(_numbers)
    _submitted[number] = work
    library().fakecard_submit(stream, _run_submitted, number)


def _run_numbered(number: int) -> int:
    _submitted[number]()
    return 0


_run_submitted = _WORK(_run_numbered)


def is_capturing(stream: int) -> bool:
    """Return True if a graph is being captured on the stream."""
    return bool(library().fakecard_capturing(stream))


# What functions and memory are


@functools.cache
def parameter_sizes(function: int) -> tuple[int, ...]:
    """Return the size in bytes of each parameter of a function, given by the driver's handle."""
    most = 4096  # bytes of parameters, of one byte at least
    sizes = (ctypes.c_uint * most)()
    count = library().fakecard_parameters(function, sizes, most)
    return tuple(sizes[:count])


def image(function: int) -> bytes:
    """Return the compiled code that a function was loaded from."""
    size = ctypes.c_size_t()
    return ctypes.string_at(library().fakecard_image(function, ctypes.byref(size)), size.value)


def block(address: int) -> tuple[int, int] | None:
    """Return the first address and the size of the allocated block that an address lies in, or None."""
    first, size = ctypes.c_size_t(), ctypes.c_size_t()
    if not library().fakecard_block(address, ctypes.byref(first), ctypes.byref(size)):
        return None
    return first.value, size.value


# What the host takes


def cpu_microseconds(
    function: Callable[[], object], *, calls: int = 100, blocks: int = 30, warmup: int = 20
) -> float:
    """Return the processor's time per call, of all threads: the median of blocks of calls.

    Other processes disturb it less than the wall clock, and kernels take none of it.

    Args:
        function: function of no arguments.
        calls: calls per block. Default: 100.
        blocks: number of blocks. Default: 30.
        warmup: calls before the first block. Default: 20.
    """
    for _ in range(warmup):
        function()
    times = []
    for _ in range(blocks):
        before = time.process_time_ns()
        for _ in range(calls):
            function()
        times.append((time.process_time_ns() - before) / (1e3 * calls))
    return statistics.median(times)
