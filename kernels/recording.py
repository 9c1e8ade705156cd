"""Recording of an op's launches, for their replay in C++ (csrc/replay.hpp).

A call is recorded if it consists of launches alone: every pointer is an argument's or a result's, every
number is a constant of the call's key or one of its varying arguments. Anything else (a torch op, arithmetic
on a varying number, a kernel that needs scratch memory) leaves the call to Python.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import launching

# In the order of enum Source in csrc/replay.hpp.
_TENSOR, _RESULT, _NUMBER, _CONSTANT = range(4)
_FORMATS = {
    "i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp32": "f", "fp64": "d",
}  # fmt: skip
_aten = torch.ops.aten
_CREATE = {_aten.new_empty.default, _aten.empty_like.default, _aten.empty.memory_format}
# Change no element if the address stays, as of a result in the caller's shape.
_RESHAPE = {
    _aten.view.default, _aten._unsafe_view.default, _aten.reshape.default, _aten.resize_.default,
    _aten.flatten.using_ints, _aten.unflatten.int, _aten.unsqueeze.default, _aten.squeeze.dim,
    _aten.expand.default, _aten.sum_to_size.default, _aten.contiguous.default, _aten.to.dtype,
    _aten.detach.default, _aten.alias.default,
}  # fmt: skip


class _NotRecordable(Exception):
    pass


class Recording(TorchDispatchMode):
    """The launches and tensors of one call, while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.created: list[torch.Tensor] = []
        self.launches: list[tuple[Any, ...]] = []
        self.obstacle: str | None = None

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _CREATE:
            self.created.append(out)
        elif func not in _RESHAPE or not args[0].data_ptr() == out.data_ptr() != 0:
            self.obstacle = str(func)
        return out

    def note(
        self, planned: Any, compiled: Any, tensors: Sequence[Any], results: Sequence[Any], varying: Any
    ) -> None:
        """Note a launch of a planned call."""
        self.launches.append((planned.call, compiled, tuple(tensors), tuple(results), tuple(varying)))


class _Varying:
    """A number that varies from call to call, and its place among those of the op."""

    place: int
    recording: Recording

    def bits(self, value: int) -> Any:
        """Return the bits of a real number, which vary with it."""
        return _varying(value, self.place, self.recording)


def _refuse(name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        # The plan would be for this value alone.
        self.recording.obstacle = f"{name} of a varying number"
        return getattr(type(self).__mro__[2], name)(self, *args)

    return method


_ARITHMETIC = [
    "__abs__", "__add__", "__and__", "__bool__", "__divmod__", "__eq__", "__float__", "__floordiv__",
    "__ge__", "__gt__", "__hash__", "__index__", "__int__", "__le__", "__lshift__", "__lt__", "__mod__",
    "__mul__", "__ne__", "__neg__", "__or__", "__pow__", "__radd__", "__rmul__", "__rshift__", "__rsub__",
    "__rtruediv__", "__sub__", "__truediv__", "__xor__",
]  # fmt: skip


def _kind(name: str, base: type) -> Any:
    methods = {n: _refuse(n) for n in _ARITHMETIC if hasattr(base, n)}
    return type(name, (_Varying, base), methods)


_Integer, _Real = _kind("_Integer", int), _kind("_Real", float)


def _varying(value: Any, place: int, recording: Recording) -> Any:
    number = (_Real if isinstance(value, float) else _Integer)(value)
    number.place, number.recording = place, recording
    return number


def record(
    function: Callable[..., Any], args: Sequence[Any], types: str
) -> tuple[Any, tuple[Any, ...] | None]:
    """Call a function, and describe its launches.

    Args:
        function: the op.
        args: its arguments: tensors or None, numbers, and at most one record, a NamedTuple.
        types: the letters of csrc/replay.hpp for the arguments, a record's field by field.

    Returns:
        The results, and a description for the C++, or None if the call cannot be replayed.
    """
    recording = Recording()
    places = iter(range(len(types)))
    letters = iter(types)

    def marked(value: Any) -> Any:
        letter = next(letters)
        if letter not in "nv":
            return value
        place = next(places)
        if letter == "n":
            return _varying(value, place, recording)
        value = float(value)
        # Special values have plans of their own.
        special = value in (0, 1, -1) or value - value != 0
        return value if special else _varying(value, place, recording)

    given = [
        type(a)(*map(marked, a)) if hasattr(a, "_fields") else marked(a)  # a record
        for a in args
    ]
    with launching.recorded(recording), recording:
        results = function(*given)
    try:
        return results, None if recording.obstacle else _described(recording, args, results)
    except _NotRecordable:
        return results, None


def _described(recording: Recording, args: Sequence[Any], results: Any) -> tuple[Any, ...] | None:
    inputs = [a for a in args if isinstance(a, torch.Tensor)]
    shown = results if isinstance(results, tuple) else (results,)
    # The first of those that share an address: the key knows which do.
    places = {t.data_ptr(): (_TENSOR, i) for i, t in reversed(list(enumerate(inputs)))}
    places |= {t.data_ptr(): (_RESULT, i) for i, t in enumerate(recording.created)}
    final = {r.data_ptr(): r for r in shown if r is not None}
    if not recording.launches or 0 in places or len(final) < sum(r is not None for r in shown):
        return None
    creations = []
    for t in recording.created:
        result = final.get(t.data_ptr(), t)
        if result.numel() != t.numel() or not result.is_contiguous() or result.dtype != t.dtype:
            return None
        creations.append((_like(result, inputs), tuple(result.shape), result.dtype))
    order = [-1 if r is None else _place(r.data_ptr(), places, _RESULT) for r in shown]
    launches = [_launch(*launch, places) for launch in recording.launches]
    programs = [compiled for _, compiled, *_ in recording.launches]
    return inputs[0].get_device(), creations, order, not isinstance(results, tuple), launches, programs


def _like(result: torch.Tensor, inputs: list[torch.Tensor]) -> int:
    """Return an input that a result can be allocated like, -1 for none."""
    for i, t in enumerate(inputs):
        if t.shape == result.shape and t.dtype == result.dtype and t.is_contiguous():
            return i
    return -1


def _place(address: int, places: dict[int, tuple[int, int]], wanted: int | None = None) -> Any:
    found = places.get(address)
    if found is None or wanted is not None and found[0] != wanted:
        raise _NotRecordable
    return found if wanted is None else found[1]


def _launch(
    call: Any, compiled: Any, tensors: Any, results: Any, varying: Any, places: dict[int, tuple[int, int]]
) -> tuple[Any, ...]:
    given = (*tensors, *(None,) * call.left_out, *results, *varying, *call.numbers)
    given += tuple(call.constants[name] for name in call.kernel.arg_names[len(given) :])
    kinds = list(compiled.src.signature.values())
    metadata = compiled.metadata
    if len(kinds) != len(given) or any(getattr(metadata, name, None) for name in _UNSUPPORTED):
        raise _NotRecordable
    if (
        tuple(getattr(metadata, "cluster_dims", (1, 1, 1))) != (1, 1, 1)
        or getattr(metadata, "num_ctas", 1) > 1
    ):
        raise _NotRecordable
    parameters = [_parameter(a, kind, places) for a, kind in zip(given, kinds, strict=True)]
    parameters = [p for p in parameters if p is not None]
    parameters += [(_CONSTANT, 0, 0)] * _scratch_pointers(compiled, len(parameters))
    x, y, z = (*call.grid, 1, 1)[:3]
    threads = metadata.target.warp_size * metadata.num_warps
    hooks = call.kernel.pre_run_hooks
    return compiled.function, (x, y, z), threads, metadata.shared, parameters, compiled.name, hooks


# Launches of these kinds are Triton's.
_UNSUPPORTED = ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid", "launch_pdl")


def _parameter(value: Any, kind: str, places: dict[int, tuple[int, int]]) -> tuple[int, int, int] | None:
    """Return (source, index, value) of a kernel's parameter, None for a constant of the program."""
    if kind == "constexpr":
        if isinstance(value, _Varying):
            raise _NotRecordable
        return None
    if kind.startswith("*"):
        return *_place(value.data_ptr(), places), 0
    if isinstance(value, _Varying):
        return _NUMBER, value.place, 0
    if kind not in _FORMATS:
        raise _NotRecordable
    word = struct.pack("<" + _FORMATS[kind], getattr(value, "value", value)).ljust(8, b"\0")
    return _CONSTANT, 0, int.from_bytes(word, "little")


def _scratch_pointers(compiled: Any, known: int) -> int:
    """Return the number of pointers to scratch memory, null here, that end a program's parameters."""
    text = compiled.asm.get("ptx")
    if text is None:  # AMD: as in the versions of Triton whose programs for NVIDIA have two
        return 2
    entry = re.search(r"\.entry [^(]*\((.*?)\)", text, re.DOTALL)
    more = len(re.findall(r"\.param", entry[1])) - known if entry else -1
    if more not in (0, 1, 2):
        raise _NotRecordable
    return more
