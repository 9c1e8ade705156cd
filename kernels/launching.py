"""How kernels are launched: a call whose like has been before costs a key, its results and the launch.

An op says what is to be launched as a :class:`Call`, a function of the tensors' shapes, strides and dtypes
and of its settings. It is computed once for each of these (:func:`planned`), and so is what Triton compiled
for it; to find that again by itself takes Triton longer than all the rest.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

from .common import INTERPRETED, LAUNCH, accumulator, cdiv, store, triton_dtype

# Calls that are remembered of one op, and programs of one kernel for numbers that are known to it.
MOST_CALLS = 4096
MOST_FIXED = 16
# Split sums that one launch completes, and parts of each that one thread adds, four of them read at once: one
# after another each would wait for the memory. Numbers of a program.
MOST_SUMS, MOST_PARTS, SUM_BLOCK = 4, 64, 1024
PARTS = tl.constexpr(4)


class Result(NamedTuple):
    """A tensor that a kernel writes, and what becomes of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: int = 1  # the kernel writes so many, [parts, *shape], of which this is the sum
    part: torch.dtype | None = None  # their dtype, if not that of the sum


class Call(NamedTuple):
    """One launch of a kernel.

    Attributes:
        kernel: takes the tensors, the results, what changes from call to call, the numbers and the constants.
        grid: of programs.
        results: what it writes; None for what it need not.
        numbers: among them what :func:`fixed` made.
        constants: the compile-time arguments.
        warps: of a program.
    """

    kernel: triton.JITFunction
    grid: tuple[int, ...]
    results: tuple[Result | None, ...]
    numbers: tuple[Any, ...]
    constants: dict[str, Any]
    warps: int
    left_out: int = 0  # tensors that the kernel takes, too, after those given: none


def fixed(n: int) -> tl.constexpr:
    """A number that the compiler is to know, such as a row's length: it then sees which addresses are
    aligned. A batch's or a number of samples' is none: they change.
    """
    return tl.constexpr(n)


def described_in_python(tensors: Sequence[torch.Tensor | None]) -> tuple[Hashable, tuple[int | None, ...]]:
    """(all that a launch depends on, addresses) of some tensors; csrc/glance.hpp has the same."""
    seen: list[Any] = []
    addresses: list[int | None] = []
    for t in tensors:
        if t is None:
            seen.append(None)
            addresses.append(None)
        else:
            address = t.data_ptr()
            # A program is for addresses divisible by 16, or not: chunk(2) of 100 columns is off by 8.
            seen.append((t.dtype, t.get_device(), t.shape, t.stride(), address & 15))
            addresses.append(address)
    return tuple(seen), tuple(addresses)


described = described_in_python
with contextlib.suppress(ImportError):  # left out on purpose, or else the first op says what is wrong
    from fastvae._C import described  # type: ignore[no-redef] # noqa: F811


# Of every op, what is remembered of its calls; by kernel, the numbers that were fixed.
_memories: list[dict[Hashable, _Ready]] = []
_known: dict[int, set[tuple[int, ...]]] = {}


def forget() -> None:
    """Plan and compile everything anew."""
    for calls in _memories:
        calls.clear()
    _known.clear()


def planned(plan: Callable[..., Call]) -> Callable[..., tuple[torch.Tensor | None, ...]]:
    """Make ``plan(*tensors, *settings)``, which says what is launched, a function that launches it.

    It takes the tensors, hashable settings, and numbers that change from call to call, and returns the
    results.
    """
    calls: dict[Hashable, _Ready] = {}

    def launch(
        tensors: tuple[torch.Tensor | None, ...], settings: tuple[Any, ...] = (), loose: tuple[int, ...] = ()
    ) -> tuple[torch.Tensor | None, ...]:
        seen, addresses = described(tensors)
        # A number beyond 2^31 has another type.
        key = (seen, settings, *[n >> 31 for n in loose]) if loose else (seen, settings)
        if torch.version.hip:
            # There a program is for memory that 31 bits address, or not.
            key += tuple(t is not None and t.untyped_storage().nbytes() < 2**31 for t in tensors)
        ready = calls.get(key)
        if ready is None:
            if len(calls) >= MOST_CALLS:
                calls.clear()
            ready = calls[key] = _Ready(plan(*tensors, *settings), tensors)
        return ready(tensors, addresses, loose)

    _memories.append(calls)
    return launch


class _Ready:
    """A call that has been planned, and its program once that is compiled."""

    def __init__(self, call: Call, tensors: tuple[torch.Tensor | None, ...]):
        self.call = _without_too_many(call)
        self.none = (None,) * call.left_out
        self.like = next(i for i, t in enumerate(tensors) if t is not None)
        like = tensors[self.like]
        self.device = like.get_device()
        self.makers = [_maker(r, like.dtype) for r in call.results]
        self.sums = any(r is not None and r.parts > 1 for r in call.results)
        self.program: Callable[..., object] | None = None

    def __call__(self, tensors, addresses, loose):
        like = tensors[self.like]
        results = [None if m is None else like.new_empty(m) if d is None else like.new_empty(m, dtype=d)
                   for m, d in self.makers]  # fmt: skip
        call = self.call
        if self.program is None or _is_watched(call.kernel):
            self._compile(tensors, results, loose)
        else:
            written = [None if r is None else r.data_ptr() for r in results]
            self.program(_stream_of(self.device), addresses, written, loose)
        return _summed(results, call.results) if self.sums else tuple(results)

    def _compile(self, tensors, results, loose) -> None:
        """Launch by Triton's own way."""
        kernel, grid, _, numbers, constants, warps, left_out = self.call
        # a * b + c in one rounding: Triton's default so far, which is about to change.
        options = {"num_warps": warps, "enable_fp_fusion": True}
        compiled = kernel[grid](*tensors, *self.none, *results, *loose, *numbers, **constants, **options)
        if compiled is None or _is_watched(kernel):
            return
        x, y, z = (*grid, 1, 1)[:3]
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        none, count = self.none, len(tensors) + left_out + len(results) + len(loose) + len(numbers)
        last = (*numbers, *(constants[name] for name in kernel.arg_names[count:]))

        def program(stream, addresses, written, loose):
            # Where an address is a number, nobody asks the driver whose it is.
            arguments = *addresses, *none, *written, *loose, *last
            run(x, y, z, stream, function, metadata, None, None, None, *arguments)

        self.program = program


def _maker(result: Result | None, dtype: torch.dtype) -> tuple[tuple[int, ...] | None, torch.dtype | None]:
    """The shape of what a kernel writes, and its dtype if that is another; to say it costs half as much as
    the memory.
    """
    if result is None:
        return None, None
    shape = result.shape if result.parts == 1 else (result.parts, *result.shape)
    own = result.part if result.parts > 1 and result.part is not None else result.dtype
    return shape, None if own == dtype else own


def _summed(
    written: list[torch.Tensor | None], results: tuple[Result | None, ...]
) -> tuple[torch.Tensor | None, ...]:
    """The second stage of sums that were split, in a fixed order; several by one launch."""
    split = [i for i, r in enumerate(results) if r is not None and r.parts > 1]
    most = max(results[i].parts for i in split), max(math.prod(results[i].shape) for i in split)
    if 1 < len(split) <= MOST_SUMS and most[0] <= MOST_PARTS and most[1] < 2**31 - SUM_BLOCK:
        none = (None,) * (MOST_SUMS - len(split))
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
    ALIGN: tl.constexpr,  # what n_0 to n_3 are counted in
    BLOCK: tl.constexpr,
):
    """One program for a stretch of one tensor."""
    i = tl.program_id(1)
    if i == 0:
        _sum_one(p_0, p_out_0, parts_0, n_0 * ALIGN, DTYPE, BLOCK)
    if p_1 is not None:  # noqa: SIM102 (one is of compile time, the other of run time)
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
    none = (0,) * (MOST_SUMS - count)
    # Of 25000 numbers the compiler would not see that 16 bytes can be read at once.
    align = math.gcd(4, *sizes)
    return Call(
        sum_parts_kernel,
        (cdiv(max(sizes), SUM_BLOCK), count),
        tuple(Result(r.shape, r.dtype) for r in results) + (None,) * (MOST_SUMS - count),
        (*(r.parts for r in results), *none, *(n // align for n in sizes), *none),
        {"DTYPE": triton_dtype(accumulator(p_0)), "ALIGN": align, "BLOCK": SUM_BLOCK},
        LAUNCH["importance"].warps(torch.float32),
    )


def _without_too_many(call: Call) -> Call:
    """Of a kernel for which many numbers were fixed already, these are not: it would be compiled for each
    shape of data whose shapes change.
    """
    values = tuple(n.value for n in call.numbers if isinstance(n, tl.constexpr))
    known = _known.setdefault(id(call.kernel), set())
    if values in known or (len(known) < MOST_FIXED and not INTERPRETED.value):
        known.add(values)
        return call
    return call._replace(numbers=tuple(getattr(n, "value", n) for n in call.numbers))


def _stream_of(device: int) -> int:
    return driver.active.get_current_stream(device)


_runtime = triton.knobs.runtime
# What Triton calls around a launch: a chain, or in its place what somebody has set.
_chains = [getattr(_runtime, f"launch_{when}_hook", None) for when in ("enter", "exit")]


def _is_watched(kernel: triton.JITFunction) -> bool:
    """Whether a launch must be Triton's own: what is compiled depends on more, or more is called."""
    # What was set lies in the object's dictionary; to ask for each by name costs more than a launch.
    return bool(
        _runtime.__dict__
        or kernel.pre_run_hooks
        or any([getattr(chain, "calls", chain) for chain in _chains])
        or triton.knobs.compilation.__dict__
        or _WATCHED
    ) and _is_asked_to_watch(kernel)


def _is_asked_to_watch(kernel: triton.JITFunction) -> bool:
    hooks = _runtime.launch_enter_hook, _runtime.launch_exit_hook
    return bool(
        _runtime.debug
        or kernel.pre_run_hooks
        or any([getattr(hook, "calls", hook) for hook in hooks])
        # Not every version of Triton has these.
        or getattr(_runtime, "add_stages_inspection_hook", None)
        or getattr(triton.knobs.compilation, "instrumentation_mode", None)
    )


# By the environment, which is read once.
_WATCHED = bool(_runtime.debug or getattr(triton.knobs.compilation, "instrumentation_mode", None))
