"""Kernel launches with cached plans: a repeated call costs one key, its results and the launch.

An op describes a launch as a :class:`Call`, a function of the tensors' shapes, strides and dtypes and of its
settings. :func:`planned` computes it once for each of these and caches the compiled kernel with it; Triton's
own look-up would take longer than everything else.
"""

from __future__ import annotations

import contextlib
import math
import struct
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

from .common import INTERPRETED, LAUNCH, accumulator, cdiv, store, triton_dtype

# Maximum cached calls per op, and maximum specialisations of a kernel on fixed numbers.
MAX_CALLS = 4096
MAX_FIXED = 16
# Maximum split sums completed by one launch; maximum parts of each, summed by one thread, which loads PARTS
# at a time, as single loads would each wait for memory; elements per program.
MAX_SUMS, MAX_PARTS, SUM_BLOCK = 4, 64, 1024
PARTS = tl.constexpr(4)


class Result(NamedTuple):
    """Shape and dtype of a kernel's result, and the parts it is the sum of."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: int = 1  # the kernel writes [parts, *shape]; the result is their sum
    part: torch.dtype | None = None  # dtype of the parts, if not that of the sum


class Call(NamedTuple):
    """Launch of a kernel.

    Attributes:
        kernel: takes tensors, results, the integers that vary per call, numbers and constants.
        grid: number of programs along each axis.
        results: the kernel's results; None for those not needed.
        numbers: integer arguments, some of them compile-time constants (:func:`fixed`).
        constants: the named compile-time arguments.
        warps: warps per program.
        left_out: number of optional tensors, after the given ones, that are None. Default: 0.
    """

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    results: tuple[Result | None, ...]
    numbers: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    left_out: int = 0


def fixed(n: int) -> tl.constexpr:
    """Make a number known to the compiler, such as a row's length, to reveal aligned addresses.

    Not for batch sizes or sample counts, which change.
    """
    return tl.constexpr(n)


def bits_of(value: float) -> int:
    """Return a float64 as the integer of its bits: Triton passes floats as float32."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return value.bits(bits) if hasattr(value, "bits") else bits  # one of a recorded call, which varies


def described_in_python(tensors: Sequence[torch.Tensor | None]) -> tuple[Hashable, tuple[int | None, ...]]:
    """Return (everything a launch depends on, addresses) of tensors; csrc/launch_key.hpp has the C++ twin."""
    description: list[Any] = []
    addresses: list[int | None] = []
    for t in tensors:
        if t is None:
            description.append(None)
            addresses.append(None)
        else:
            address = t.data_ptr()
            # Programs are specialised on 16-byte alignment: chunk(2) of 100 columns is off by 8.
            description.append((t.dtype, t.get_device(), t.shape, t.stride(), address & 15))
            addresses.append(address)
    return tuple(description), tuple(addresses)


described = described_in_python
with contextlib.suppress(ImportError):  # omitted on purpose, or else the first op reports the error
    from fastvae._C import described  # type: ignore[no-redef] # noqa: F811


# Each op's cached calls; by kernel, the tuples of fixed numbers seen.
_caches: list[dict[Hashable, _PlannedCall]] = []
_known: dict[int, set[tuple[int, ...]]] = {}


def clear_caches() -> None:
    """Drop all cached plans and compiled kernels, in C++, too."""
    with contextlib.suppress(ImportError):
        from fastvae._C import forget

        forget()
    for calls in _caches:
        calls.clear()
    _known.clear()


def planned(plan: Callable[..., Call]) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    """Turn ``plan(*tensors, *settings)``, which returns a :class:`Call`, into a function that launches it.

    It takes the tensors, hashable settings and integers that vary per call, and returns the results.
    """
    calls: dict[Hashable, _PlannedCall] = {}

    def launch(
        tensors: tuple[torch.Tensor | None, ...],
        settings: tuple[Any, ...] = (),
        varying: tuple[int, ...] = (),
    ) -> tuple[torch.Tensor | None, ...]:
        description, addresses = described(tensors)
        key = (description, settings, *map(_width, varying)) if varying else (description, settings)
        if torch.version.hip:
            # On AMD, programs are specialised on whether 31 bits address the storage.
            key += tuple(t is not None and t.untyped_storage().nbytes() < 2**31 for t in tensors)
        ready = calls.get(key)
        if ready is None:
            if len(calls) >= MAX_CALLS:
                calls.clear()
            ready = calls[key] = _PlannedCall(plan(*tensors, *settings), tensors)
        return ready(tensors, addresses, varying)

    _caches.append(calls)
    return launch


def _width(number: int) -> bool:
    """Return True for an integer that has 32 bits in a program."""
    number = int.__int__(number)
    return -(2**31) <= number < 2**31


class _Recorder(threading.local):
    recording: Any = None


_recorder = _Recorder()


@contextlib.contextmanager
def recorded(recording: Any) -> Iterator[None]:
    """Launch through Triton in this thread, and note each launch (:mod:`.recording`)."""
    before, _recorder.recording = _recorder.recording, recording
    try:
        yield
    finally:
        _recorder.recording = before


class _PlannedCall:
    """Planned call, and its compiled program after the first launch."""

    def __init__(self, call: Call, tensors: tuple[torch.Tensor | None, ...]):
        self.call = _limit_specialisations(call)
        self.none = (None,) * call.left_out
        self.like = next(i for i, t in enumerate(tensors) if t is not None)
        like = tensors[self.like]
        self.device = like.get_device()
        self.allocations = [_allocation(r, like.dtype) for r in call.results]
        self.sums = any(r is not None and r.parts > 1 for r in call.results)
        self.program: Callable[..., object] | None = None

    def __call__(self, tensors, addresses, varying):
        like = tensors[self.like]
        results = [None if m is None else like.new_empty(m) if d is None else like.new_empty(m, dtype=d)
                   for m, d in self.allocations]  # fmt: skip
        call, recording = self.call, _recorder.recording
        if recording is not None:
            compiled = self._compile(tensors, results, [int.__int__(n) for n in varying])
            recording.note(self, compiled, tensors, results, varying)
        elif self.program is None or _is_watched(call.kernel):
            self._compile(tensors, results, varying)
        else:
            written = [None if r is None else r.data_ptr() for r in results]
            self.program(_stream_of(self.device), addresses, written, varying)
        return _summed(results, call.results) if self.sums else tuple(results)

    def _compile(self, tensors, results, varying) -> Any:
        """Launch through Triton; return the compiled program, and keep it unless the launch is watched."""
        kernel, grid, _, numbers, constants, warps, left_out = self.call
        # Contract a * b + c to an fma: Triton's default so far, which is about to change.
        options = {"num_warps": warps, "enable_fp_fusion": True}
        compiled = kernel[grid](*tensors, *self.none, *results, *varying, *numbers, **constants, **options)
        if compiled is None or _is_watched(kernel):
            return compiled
        x, y, z = (*grid, 1, 1)[:3]
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        none, count = self.none, len(tensors) + left_out + len(results) + len(varying) + len(numbers)
        last = (*numbers, *(constants[name] for name in kernel.arg_names[count:]))

        def program(stream, addresses, written, varying):
            # Passing addresses as integers avoids a driver query for each pointer.
            arguments = *addresses, *none, *written, *varying, *last
            run(x, y, z, stream, function, metadata, None, None, None, *arguments)

        self.program = program
        return compiled


def _allocation(
    result: Result | None, dtype: torch.dtype
) -> tuple[tuple[int, ...] | None, torch.dtype | None]:
    """Return the shape of a kernel's result, and its dtype if it differs from ``dtype``, else None.

    Passing ``dtype=`` to ``new_empty`` costs half as much as the allocation.
    """
    if result is None:
        return None, None
    shape = result.shape if result.parts == 1 else (result.parts, *result.shape)
    own = result.part if result.parts > 1 and result.part is not None else result.dtype
    return shape, None if own == dtype else own


def _summed(
    written: list[torch.Tensor | None], results: tuple[Result | None, ...]
) -> tuple[torch.Tensor | None, ...]:
    """Sum the parts of split results in a fixed order, several by one launch."""
    split = [i for i, r in enumerate(results) if r is not None and r.parts > 1]
    parts, size = max(results[i].parts for i in split), max(math.prod(results[i].shape) for i in split)
    if len(split) == 1 and parts <= MAX_PARTS and size < 2**31 - SUM_BLOCK:
        sums = _sum((written[split[0]],), (results[split[0]],))
    elif len(split) <= MAX_SUMS and parts <= MAX_PARTS and size < 2**31 - SUM_BLOCK:
        none = (None,) * (MAX_SUMS - len(split))
        sums = _sum_parts((*(written[i] for i in split), *none), (tuple(results[i] for i in split),))
    else:
        sums = [written[i].sum(0).to(results[i].dtype) for i in split]
    for i, total in zip(split, sums, strict=False):
        written[i] = total
    return tuple(written)


@triton.jit
def _sum_one(p_parts, p_out, parts, n, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_sum = tl.zeros([BLOCK], dtype=DTYPE)
    for i in range(0, parts, PARTS):
        o_part = (i + tl.arange(0, PARTS)).to(tl.int64)[:, None]  # [PARTS, 1]
        mask = (o_part < parts) & (o_n < n)[None, :]
        b_sum += tl.sum(tl.load(p_parts + o_part * n + o_n[None, :], mask=mask, other=0.0), axis=0)
    store(p_out, o_n, b_sum, o_n < n)


@triton.jit(do_not_specialize=["parts", "n"])
def sum_kernel(
    p_parts,  # [parts, n] contiguous
    p_out,  # [n] out, their sum
    parts,
    n,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,  # unit of n
    BLOCK: tl.constexpr,
):
    """Sum the parts of a tensor; one program per block of it."""
    _sum_one(p_parts, p_out, parts, n * ALIGN, DTYPE, BLOCK)


@planned
def _sum(p_parts, result) -> Call:
    size = math.prod(result.shape)
    align = math.gcd(4, size)
    return Call(
        sum_kernel,
        (cdiv(size, SUM_BLOCK),),
        (Result(result.shape, result.dtype),),
        (result.parts, size // align),
        {"DTYPE": triton_dtype(accumulator(p_parts)), "ALIGN": align, "BLOCK": SUM_BLOCK},
        LAUNCH["logsumexp"].warps(torch.float32),
    )


@triton.jit(do_not_specialize=["parts_0", "parts_1", "parts_2", "parts_3"])
def sum_parts_kernel(
    p_0,  # [parts, n] each, contiguous, or None
    p_1,
    p_2,
    p_3,
    p_out_0,  # [n] out, their sums
    p_out_1,
    p_out_2,
    p_out_3,
    parts_0,
    parts_1,
    parts_2,
    parts_3,
    n_0,
    n_1,
    n_2,
    n_3,
    DTYPE: tl.constexpr,
    ALIGN: tl.constexpr,  # unit of n_0 to n_3
    BLOCK: tl.constexpr,
):
    """Sum the parts of up to four tensors; one program per block of one tensor."""
    i = tl.program_id(1)
    if i == 0:
        _sum_one(p_0, p_out_0, parts_0, n_0 * ALIGN, DTYPE, BLOCK)
    if p_1 is not None:  # noqa: SIM102 (compile-time condition outside, run-time condition inside)
        if i == 1:
            _sum_one(p_1, p_out_1, parts_1, n_1 * ALIGN, DTYPE, BLOCK)
    if p_2 is not None:  # noqa: SIM102
        if i == 2:
            _sum_one(p_2, p_out_2, parts_2, n_2 * ALIGN, DTYPE, BLOCK)
    if p_3 is not None:  # noqa: SIM102
        if i == 3:
            _sum_one(p_3, p_out_3, parts_3, n_3 * ALIGN, DTYPE, BLOCK)


@planned
def _sum_parts(p_0, p_1, p_2, p_3, results) -> Call:
    count = len(results)
    sizes = [math.prod(r.shape) for r in results]
    none = (0,) * (MAX_SUMS - count)
    # Passed in units of ALIGN, so that the compiler sees that 16-byte loads are possible (25000, say).
    align = math.gcd(4, *sizes)
    return Call(
        sum_parts_kernel,
        (cdiv(max(sizes), SUM_BLOCK), count),
        tuple(Result(r.shape, r.dtype) for r in results) + (None,) * (MAX_SUMS - count),
        (*(r.parts for r in results), *none, *(n // align for n in sizes), *none),
        {"DTYPE": triton_dtype(accumulator(p_0)), "ALIGN": align, "BLOCK": SUM_BLOCK},
        LAUNCH["logsumexp"].warps(torch.float32),
    )


def _limit_specialisations(call: Call) -> Call:
    """Return the call with its numbers no longer fixed if the kernel has many specialisations already.

    Otherwise data of varying shapes would compile the kernel for each shape. The interpreter needs none.
    """
    values = tuple(n.value for n in call.numbers if isinstance(n, tl.constexpr))
    known = _known.setdefault(id(call.kernel), set())
    if values in known or (len(known) < MAX_FIXED and not INTERPRETED.value):
        known.add(values)
        return call
    return call._replace(numbers=tuple(getattr(n, "value", n) for n in call.numbers))


def _stream_of(device: int) -> int:
    return driver.active.get_current_stream(device)


_runtime = triton.knobs.runtime
# Triton's launch hooks: a chain, or a function set in its place.
_chains = [getattr(_runtime, f"launch_{when}_hook", None) for when in ("enter", "exit")]


def _is_watched(kernel: triton.JITFunction) -> bool:
    """Return True if Triton itself must launch: hooks, debugging or instrumentation are set."""
    # Knobs that were set lie in the object's dictionary; reading each by name costs more than a launch.
    return bool(
        _runtime.__dict__
        or kernel.pre_run_hooks
        or any([getattr(chain, "calls", chain) for chain in _chains])
        or triton.knobs.compilation.__dict__
        or _WATCHED
    ) and _is_asked_to_watch(kernel)


def watched() -> list[Any] | None:
    """Return dictionaries and lists that are empty while nothing is watched; None if something always is."""
    chains = [getattr(chain, "calls", None) for chain in _chains]
    found = [_runtime.__dict__, triton.knobs.compilation.__dict__, *chains]
    return None if _WATCHED or not all(type(c) in (dict, list) for c in found) else found


def _is_asked_to_watch(kernel: triton.JITFunction) -> bool:
    hooks = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(
        _runtime.debug
        or kernel.pre_run_hooks
        or any([getattr(hook, "calls", hook) for hook in hooks])
        # Absent in some versions of Triton.
        or getattr(_runtime, "add_stages_inspection_hook", None)
        or getattr(triton.knobs.compilation, "instrumentation_mode", None)
    )


# Debugging or instrumentation set by the environment, which is read once.
_WATCHED = bool(_runtime.debug or getattr(triton.knobs.compilation, "instrumentation_mode", None))
