"""The fake card computes: Triton's kernels by an emulator of PTX, torch's own ops on the CPU.

Device memory is the host's, so both work on the very addresses that were launched with. A launch of Triton's
is run by ``tests/ptx.py``, one program after another, from the PTX compiled for it: small shapes take
milliseconds. Torch's kernels exist as machine code only, so every op that torch registers for CUDA gets a
kernel that calls the CPU's on the same memory. Random numbers of torch's ops are those of the CPU's
generators.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests import ptx

from . import control

# Ops that allocate, make views, change a tensor's shape or read a number: torch's own are right.
_OWN = re.compile(
    r"aten::(empty|empty_strided|resize_?|set_|record_stream|is_pinned|_?pin_memory|_local_scalar_dense|"
    r"is_set_to|_efficientzerotensor|.*cudnn.*|.*miopen.*|_cslt.*|_flash.*|_efficient_attention.*)(\.|$)"
)


@contextlib.contextmanager
def computing() -> Iterator[list[control.Launch]]:
    """Compute within the block; yields the launches that were emulated, as they come."""
    ran: list[control.Launch] = []

    def run(launch: control.Launch, parameters: list[bytes]) -> None:
        emulate(launch, parameters)
        ran.append(launch)

    with _torch_on_the_cpu(), control.device(run):
        yield ran


# Triton's kernels


class Memory(ptx.Memory):
    """Memory of the card; an address outside every allocated block is an error."""

    def __init__(self) -> None:
        super().__init__([])

    def _region(self, address: np.ndarray, size: int) -> tuple[int, np.ndarray]:
        found = control.block(int(address.min()))
        if found is None or address.max() + size > sum(found):
            raise AssertionError(
                f"addresses {address.min():#x} to {address.max():#x} are in no allocated block"
            )
        first, count = found
        return first, np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(first))


def emulate(launch: control.Launch, parameters: list[bytes]) -> None:
    """Run a launch of a kernel that Triton compiled.

    Args:
        launch: the launch.
        parameters: bytes of each parameter.
    """
    program = _program(launch.function, launch.name)
    if len(program.parameters) != len(parameters):
        raise AssertionError(
            f"{launch.name}: the machine code has {len(parameters)} parameters, its PTX "
            f"{len(program.parameters)}: the file found is of another kernel"
        )
    numbers = (int.from_bytes(p, "little") for p in parameters)
    given = dict(zip(program.parameters, numbers, strict=True))
    x, y, z = launch.grid
    with np.errstate(all="ignore"):
        for place in ptx.in_any_order((x, y, z)):
            ptx.Threads(launch.threads, Memory(), given, place, (x, y, z), launch.shared).run(program)


@functools.cache
def _program(function: int, name: str) -> ptx.Program:
    """Return the PTX of a function, which lies in Triton's cache next to the machine code."""
    code = control.image(function)
    for path in Path(os.environ["TRITON_CACHE_DIR"]).glob(f"*/{name}.cubin"):
        if path.stat().st_size >= len(code) and path.read_bytes()[: len(code)] == code:
            return ptx.Program(path.with_suffix(".ptx").read_text())
    raise AssertionError(f"{name}: its machine code is in no file of Triton's cache (TRITON_CACHE_DIR)")


# Torch's kernels


@contextlib.contextmanager
def _torch_on_the_cpu() -> Iterator[None]:
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for op in _overridden():
                library.impl(op, functools.partial(_on_the_cpu, op), "CUDA", allow_override=True)
        yield
    finally:
        library._destroy()


@functools.cache
def _overridden() -> tuple[torch._ops.OpOverload, ...]:
    """Return the ops that have a CUDA kernel of torch."""
    names = [*torch._C._dispatch_get_registrations_for_dispatch_key("CUDA"), "aten::copy_"]
    ops = []
    for full in names:
        if not full.startswith("aten::") or _OWN.match(full):
            continue
        name, _, overload = full.removeprefix("aten::").partition(".")
        op = getattr(getattr(torch.ops.aten, name, None), overload or "default", None)
        if op is not None and not _is_view(op):
            ops.append(op)
    return tuple(ops)


def _is_view(op: torch._ops.OpOverload) -> bool:
    """Return True if a result shares memory with an argument that is not written."""
    aliases = [r.alias_info for r in op._schema.returns]
    return any(a is not None and not a.is_write for a in aliases)


def _on_the_cpu(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """Compute an op by the CPU's kernel, on the card's memory."""
    given: list[tuple[Tensor, Tensor]] = []  # of the card, the same on the CPU
    args = tuple(_moved(a, given) for a in args)
    kwargs = {name: _moved(a, given) for name, a in kwargs.items()}
    arguments = op._schema.arguments
    # Numbers may stand for tensors here; the overload that takes them is another.
    numbers = (isinstance(a, (int, float)) and isinstance(s.type, torch.TensorType)
               for a, s in zip(args, arguments, strict=False))  # fmt: skip
    compute = functools.partial(op.overloadpacket if any(numbers) else op, *args, **kwargs)
    device = next((t.device for t, _ in given), torch.device("cuda", torch.cuda.current_device()))
    stream = torch.cuda.current_stream(device).cuda_stream
    if not control.is_capturing(stream):
        return _shown(compute(), given, device)
    if op._schema.is_mutable:
        control.submit(compute, stream)
        named = dict(zip((s.name for s in arguments), args, strict=False)) | kwargs
        written = [named[s.name] for s in arguments if s.alias_info is not None and s.alias_info.is_write]
        count = len(op._schema.returns)
        return _shown(written[0] if count == 1 else tuple(written[:count]) or None, given, device)
    # Computed now for the results' shapes, from whatever lies there, and again at each replay.
    shown = _shown(compute(), given, device)
    places = [_same_memory(t) for t in _tensors_in(shown)]

    def again() -> None:
        for place, value in zip(places, _tensors_in(compute()), strict=True):
            place.copy_(value)

    control.submit(again, stream)
    return shown


def _moved(value: Any, given: list[tuple[Tensor, Tensor]]) -> Any:
    """Return an argument on the CPU, and add its tensors to ``given``."""
    if isinstance(value, Tensor) and value.is_cuda:
        given.append((value, _same_memory(value)))
        return given[-1][1]
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(v, given) for v in value)
    if isinstance(value, torch.Generator):
        return _generator_of(value)
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _shown(results: Any, given: list[tuple[Tensor, Tensor]], device: torch.device) -> Any:
    """Return results on the card: the arguments that they are, or else new tensors."""

    def of_card(result: Tensor) -> Tensor:
        for t, same in given:
            if result is same:
                if t.shape != same.shape:  # an `out` of another shape
                    t.resize_(same.shape)
                    _same_memory(t).copy_(same)
                return t
        new = torch.empty_strided(result.shape, result.stride(), dtype=result.dtype, device=device)
        _same_memory(new).copy_(result)
        return new

    return _each(results, of_card)


def _each(results: Any, function: Callable[[Tensor], Any]) -> Any:
    if isinstance(results, Tensor):
        return function(results)
    if isinstance(results, (list, tuple)):
        return type(results)(_each(r, function) for r in results)
    return results


def _tensors_in(results: Any) -> list[Tensor]:
    found: list[Tensor] = []
    _each(results, found.append)
    return found


def _same_memory(t: Tensor) -> Tensor:
    """Return a tensor of the CPU with the memory of one of the card."""
    storage = t.untyped_storage()
    size = storage.nbytes()
    bytes_ = torch.empty(0, dtype=torch.uint8)
    if size:
        bytes_ = torch.frombuffer((ctypes.c_uint8 * size).from_address(storage.data_ptr()), dtype=torch.uint8)
    return torch.empty(0, dtype=t.dtype).set_(
        bytes_.untyped_storage(), t.storage_offset(), t.shape, t.stride()
    )


_generators: dict[int, tuple[torch.Generator, torch.Generator]] = {}  # by the id of the first, which is kept


def _generator_of(generator: torch.Generator) -> torch.Generator:
    """Return the CPU's generator in place of one of the card, with the same seed."""
    if generator.device.type != "cuda":
        return generator
    known = _generators.get(id(generator))
    if known is not None and torch.cuda.is_current_stream_capturing():
        return known[1]
    # The card's own offset tells whether it was seeded since, which sets it to 0.
    if known is None or generator.get_offset() == 0:
        known = _generators[id(generator)] = (
            generator,
            torch.Generator().manual_seed(generator.initial_seed()),
        )
        generator.set_offset(4)
    return known[1]
