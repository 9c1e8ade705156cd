"""CPU emulator of the PTX that Triton emits: tests the code a GPU receives instead of the interpreter.

All threads of a program run in lockstep, as numpy arrays with one entry per thread; where a branch parts
them, those behind run first. The hardware's approximate functions get a random error as large as NVIDIA
documents, so that passing does not depend on luck: relative, ex2 2^-22 (PTX ISA), but 2^-23 for arguments up
to a half, since CUDA's expf is built from these and documented with an ulp; rsqrt 2^-22.9; sqrt and rcp
2^-23; lg2 2^-22, and absolutely 2^-22 in (1/2, 2); sin and cos 2^-20.5 absolutely. Only the instructions that
the kernels use are implemented; any other fails by name.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator

import numpy as np
import torch
import triton

from tools import kernels

U16, U32, U64, F16, F32, F64 = np.uint16, np.uint32, np.uint64, np.float16, np.float32, np.float64
TYPES = {
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8, "b16": U16, "u16": U16, "s16": np.int16, "bf16": U16,
    "b32": U32, "u32": U32, "s32": np.int32, "f32": F32, "b64": U64, "u64": U64, "s64": np.int64,
    "f16": F16, "f64": F64,
}  # fmt: skip
REGISTERS = {"rd": U64, "rs": U16, "r": U32, "p": np.bool_, "SPL": U64, "SP": U64}
REGISTER = re.compile(r"%(?:(rd|rs|r|p)\d+|(SPL?))$")
# Types of two halves, by name, and that of each half.
PAIRS = {"bf16x2": "bf16", "f16x2": "f16"}
ERRORS = {
    "ex2": lambda x: np.where(np.abs(x) <= 0.51, 2.0**-23, 2.0**-22),
    "rsqrt": lambda x: 2.0**-22.9,
    "sqrt": lambda x: 2.0**-23,
    "rcp": lambda x: 2.0**-23,
}
ABSOLUTE_ERRORS = {
    "lg2": lambda x: 2.0**-22 * np.where((x > 0.5) & (x < 2), 1.0, np.abs(np.log2(x))),
    "sin": lambda x: 2.0**-20.5,
    "cos": lambda x: 2.0**-20.5,
}
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip


def _wide(bits: np.ndarray) -> np.ndarray:
    """Convert bfloat16 to float32."""
    return (bits.astype(U32) << U32(16)).view(F32)


def _narrow(x: np.ndarray) -> np.ndarray:
    """Convert float32 to bfloat16, rounding to nearest even."""
    bits = np.ascontiguousarray(x, F32).view(U32)
    rounded = (bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)
    return np.where(np.isnan(x), U32(0x7FC0), rounded).astype(U16)


def _read(bits: np.ndarray, half: str) -> np.ndarray:
    """Convert the bits of a half-precision type to float32."""
    return _wide(bits) if half == "bf16" else np.ascontiguousarray(bits).view(F16).astype(F32)


def _bits(x: np.ndarray, half: str) -> np.ndarray:
    """Round to a half-precision type, and return its bits."""
    return _narrow(x) if half == "bf16" else np.ascontiguousarray(x.astype(F16)).view(U16)


class Program:
    """PTX kernel: its parameters, instructions, labels, tables, and bytes of local memory per thread."""

    def __init__(self, text: str):
        self.tables = {
            name: np.array([int(n, 0) for n in values.split(",")], np.uint8)
            for name, values in re.findall(r"\.global \.align \d+ \.b8 (\w+)\[\d+\] = \{([^}]*)\}", text)
        }
        self.local = max((int(n) for n in re.findall(r"\.b8\s+__local_depot\d+\[(\d+)\]", text)), default=0)
        head, body = re.search(r"\.entry \w+\((.*?)\)(.*)", text, re.S).groups()
        self.parameters = re.findall(r"_param_(\d+)", head)
        self.instructions, self.labels = [], {}
        body = re.sub(r"//[^\n]*", "", body)
        # The unused half of a pair that is taken apart.
        body = re.sub(r"\{ \.reg \.b32 tmp; ([^}]*?)tmp([^}]*\}[^}]*;) \}", r"\1_\2", body)
        for line in body.replace("{\n", "\n").splitlines():
            line = line.strip()
            if label := re.match(r"(\$L__BB\d+_\d+):", line):
                self.labels[label[1]] = len(self.instructions)
            elif m := re.match(r"(?:@(!?)%(p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);$", line):
                self.instructions.append((m[1] == "!", m[2], m[3].split("."), _operands(m[4])))
            elif line and line[0] not in ".${}":
                # A call, say, which fails only where it is executed.
                self.instructions.append((False, None, ["unknown"], [line]))


def _operands(text: str) -> list[str]:
    """Split at the commas outside braces and brackets."""
    return [o.strip() for o in re.split(r",(?![^{\[]*[}\]])", text) if o.strip()]


class Threads:
    """Threads of one program, which execute instructions."""

    def __init__(
        self,
        count: int,
        memory: Memory,
        parameters: dict[str, int],
        place: tuple[int, ...],
        grid: tuple[int, ...],
        shared: int,
    ):
        self.count, self.memory, self.parameters = count, memory, parameters
        self.axes = {"ctaid": place, "nctaid": grid}
        self.registers: dict[str, np.ndarray] = {}
        self.shared = np.zeros(shared, np.uint8)
        self.local = np.zeros((count, 0), np.uint8)
        self.tables: dict[str, np.ndarray] = {}
        self.random = np.random.default_rng(7)

    def run(self, program: Program) -> None:
        end, steps = len(program.instructions), 0
        self.local, self.tables = np.zeros((self.count, program.local), np.uint8), program.tables
        # The next instruction of all threads, or of each where a branch parted them: the rearmost go first,
        # so that they meet again where their ways join.
        at, each = 0, None
        while at < end:
            here = None if each is None else each == at
            negated, predicate, op, operands = program.instructions[at]
            steps += 1
            assert steps < 10**6, "an endless loop"
            active = here
            if predicate is not None:
                active = self.registers[predicate] ^ negated
                active = active if here is None else active & here
            following = at + 1
            if op[0] in ("bra", "ret"):
                target = program.labels[operands[0]] if op[0] == "bra" else end
                if active is None or (here is None and active.all()):
                    following = target
                elif active.any():
                    each = np.full(self.count, at) if each is None else each
                    each = np.where(active, target, np.where(each == at, at + 1, each))
                    at = int(each.min())
                    continue
            else:
                getattr(self, "do_" + op[0], self.do_elementwise)(op, operands, active)
            if each is not None:
                each[each == at] = following
                following = int(each.min())
                each = None if (each == following).all() else each
            at = following

    def value(self, operand: str, dtype: type) -> np.ndarray:
        """Return an operand as an array of ``dtype``, by its bits."""
        operand = operand.strip()
        if m := REGISTER.match(operand):
            kind = m[1] or m[2]
            stored = self.registers.get(operand[1:])
            if stored is None:
                # Never written: all bits set, which as a float is NaN.
                stored = ~np.zeros(self.count, REGISTERS[kind])
            if kind == "p":
                return stored
            return stored.astype(f"u{np.dtype(dtype).itemsize}").view(dtype)
        if operand.startswith("%"):
            name, axis = operand[1:].split(".")
            if name == "tid":
                return np.arange(self.count, dtype=U32).view(np.int32).astype(dtype)
            return np.full(self.count, self.axes[name]["xyz".index(axis)], U32).astype(dtype)
        if operand.startswith("0f"):
            return np.full(self.count, int(operand[2:], 16), U32).view(F32)
        if operand.startswith("0d"):
            return np.full(self.count, int(operand[2:], 16), U64).view(F64)
        if operand in self.tables:
            return np.full(self.count, self.tables[operand].ctypes.data, U64).astype(dtype)
        if operand in ("global_smem", "_") or operand.startswith("__local_depot"):
            return np.zeros(self.count, dtype)
        number = int(operand.rstrip("U"), 0)
        size = np.dtype(dtype).itemsize
        if dtype is F32:
            return np.full(self.count, number & 0xFFFFFFFF, U32).view(F32)
        if dtype is np.bool_:
            return np.full(self.count, number != 0)
        return np.full(self.count, number & (256**size - 1), f"u{size}").view(dtype)

    def put(self, operand: str, value: np.ndarray, active: np.ndarray | None) -> None:
        operand = operand.strip()
        if operand == "_":
            return
        m = REGISTER.match(operand)
        kind = REGISTERS[m[1] or m[2]]
        if kind is not np.bool_:
            value = np.ascontiguousarray(value)
            value = value.view(f"u{value.dtype.itemsize}") if value.dtype != np.bool_ else value
            value = value.astype(kind)
        name = operand[1:]
        if active is not None:
            old = self.registers.get(name, np.zeros(self.count, kind))
            value = np.where(active, value, old)
        self.registers[name] = value

    # Memory

    def address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[] ").partition("+")
        return self.value(base, U64 if re.match("%rd|%SP", base) else U32).astype(np.int64) + int(
            offset or "0", 0
        )

    def do_ld(self, op, operands, active):
        dtype = TYPES[op[-1]]
        names = operands[0].strip("{} ").split(",")
        if op[1] == "param":
            number = self.parameters[re.search(r"_param_(\d+)", operands[1])[1]]
            size = np.dtype(dtype).itemsize
            self.put(names[0], np.full(self.count, number & (256**size - 1), f"u{size}"), active)
            return
        address, size = self.address(operands[1]), np.dtype(dtype).itemsize
        on = np.ones(self.count, bool) if active is None else active
        for i, name in enumerate(names):
            self.put(name, self._bytes(op[1], address + i * size, size, on).view(dtype).reshape(-1), active)

    def _bytes(self, space: str, address: np.ndarray, size: int, on: np.ndarray) -> np.ndarray:
        out = np.zeros((self.count, size), np.uint8)
        if space == "shared":
            out[on] = self.shared[address[on, None] + np.arange(size)]
        elif space == "local":
            out[on] = self.local[np.nonzero(on)[0][:, None], address[on, None] + np.arange(size)]
        elif table := self._table(address[on]):
            out[on] = table[0][(address[on] - table[1])[:, None] + np.arange(size)]
        else:
            self.memory.load(address, size, on, out)
        return out

    def _table(self, address: np.ndarray) -> tuple[np.ndarray, int] | None:
        """Return the program's table that the addresses lie in, and its own address."""
        for table in self.tables.values():
            first = table.ctypes.data
            if address.size and first <= address.min() and address.max() < first + table.size:
                return table, first
        return None

    def do_st(self, op, operands, active):
        dtype, size = TYPES[op[-1]], np.dtype(TYPES[op[-1]]).itemsize
        address, on = self.address(operands[0]), np.ones(self.count, bool) if active is None else active
        for i, name in enumerate(operands[1].strip("{} ").split(",")):
            value = np.ascontiguousarray(self.value(name, dtype)).view(np.uint8).reshape(self.count, size)
            if op[1] == "shared":
                self.shared[(address + i * size)[on, None] + np.arange(size)] = value[on]
            elif op[1] == "local":
                self.local[np.nonzero(on)[0][:, None], (address + i * size)[on, None] + np.arange(size)] = (
                    value[on]
                )
            else:
                self.memory.store(address + i * size, size, on, value)

    def do_atom(self, op, operands, active):
        """Add to an integer, one thread after the other; return what was there."""
        assert op[1] == "global" and op[-2:] == ["add", "u32"], f"unknown instruction {'.'.join(op)}"
        address, value, before = self.address(operands[1]), self.value(operands[2], U32), np.zeros(self.count)
        every = np.ones(self.count, bool) if active is None else active
        for i in np.nonzero(every)[0]:
            on = np.arange(self.count) == i
            old = self._bytes("global", address, 4, on).view(U32).reshape(-1)
            self.memory.store(address, 4, on, (old + value).view(np.uint8).reshape(-1, 4))
            before[i] = old[i]
        self.put(operands[0], before.astype(U32), active)

    def _matrix_rows(self, operand: str, count: int) -> np.ndarray:
        """Return shared addresses [warps, count, 8 rows]: threads 8 i to 8 i + 7 have those of matrix i."""
        return self.address(operand).reshape(-1, 32)[:, : 8 * count].reshape(-1, count, 8)

    def do_ldmatrix(self, op, operands, active):
        names = operands[0].strip("{} ").split(",")
        rows = self._matrix_rows(operands[1], len(names))
        cells = self.shared[rows[..., None] + np.arange(16)].reshape(*rows.shape, 16).view(U16)
        if "trans" in op:
            cells = np.ascontiguousarray(cells.swapaxes(-1, -2))
        # Thread t has cells 2 (t % 4) and 2 (t % 4) + 1 of row t / 4.
        pairs = np.ascontiguousarray(cells).view(U32).reshape(rows.shape[0], len(names), 32)
        for i, name in enumerate(names):
            self.put(name, pairs[:, i].reshape(-1), active)

    def do_stmatrix(self, op, operands, active):
        names = operands[1].strip("{} ").split(",")
        rows = self._matrix_rows(operands[0], len(names))
        for i, name in enumerate(names):
            cells = np.ascontiguousarray(self.value(name, U32)).reshape(-1, 8, 4).view(U16)
            if "trans" in op:
                cells = np.ascontiguousarray(cells.swapaxes(-1, -2))
            self.shared[rows[:, i, :, None] + np.arange(16)] = cells.view(np.uint8)

    def do_cp(self, op, operands, active):
        """Copy at once, though asynchronous; the last operand is the number of bytes read, the rest is 0."""
        if op[2] not in ("ca", "cg"):
            return
        size = int(operands[2], 0)
        on = np.ones(self.count, bool) if active is None else active
        read = self.value(operands[3], U32) if len(operands) > 3 else np.full(self.count, size)
        some = on & (read > 0)
        assert np.isin(read[on], (0, size)).all()
        values = self._bytes("global", self.address(operands[1]), size, some)
        self.shared[self.address(operands[0])[on, None] + np.arange(size)] = values[on]

    def do_mma(self, op, operands, active):
        """Multiply matrices of float64, whose cells lie in four threads for each row of eight."""
        assert op[3] == "m16n8k16" and op[-1] == "f64", f"unknown instruction {'.'.join(op)}"
        to, *factors = (o.strip("{} ").split(",") for o in operands)
        a, b, c = (np.stack([self.value(n, F64).reshape(-1, 32) for n in f], -1) for f in factors)
        lane = np.arange(32)
        group, inside = lane[:, None] // 4, lane[:, None] % 4
        a_i, b_i, c_i = np.arange(8), np.arange(4), np.arange(4)
        left, right, out = (np.zeros((a.shape[0], *shape)) for shape in ((16, 16), (16, 8), (16, 8)))
        left[:, group + 8 * (a_i % 2), 4 * (a_i // 2) + inside] = a
        right[:, 4 * b_i + inside, group] = b
        at = group + 8 * (c_i // 2), 2 * inside + c_i % 2
        out[(slice(None), *at)] = c
        result = (left @ right + out)[(slice(None), *at)]
        for i, name in enumerate(to):
            self.put(name, result[..., i].reshape(-1), active)

    def do_bar(self, op, operands, active):
        """Do nothing: the threads run in lockstep."""

    def do_cvta(self, op, operands, active):
        """Copy an address: only functions, which are never called, would use the generic one."""
        self.put(operands[0], self.value(operands[1], U64), active)

    def do_createpolicy(self, op, operands, active):
        """Do nothing: a cache's policy changes no value."""

    def do_shfl(self, op, operands, active):
        to, source, lane, *_ = operands
        warps, lane = self.value(source, U32).reshape(-1, 32), self.value(lane, U32).reshape(-1, 32)
        lanes = {"bfly": np.arange(32) ^ lane, "idx": lane}[op[2]].astype(np.int64)
        self.put(to, np.take_along_axis(warps, lanes, 1).reshape(-1), active)

    # Registers

    def do_mov(self, op, operands, active):
        to, source = operands
        if to.startswith("{"):  # unpack
            names = to.strip("{} ").split(",")
            parts = np.ascontiguousarray(self.value(source, TYPES[op[-1]]))
            size = parts.dtype.itemsize // len(names)
            for name, part in zip(names, parts.view(f"u{size}").reshape(self.count, -1).T, strict=True):
                self.put(name, part, active)
        elif source.startswith("{"):  # pack
            names = source.strip("{} ").split(",")
            size = np.dtype(TYPES[op[-1]]).itemsize // len(names)
            parts = np.stack([self.value(name, TYPES[f"b{8 * size}"]) for name in names], 1)
            self.put(to, np.ascontiguousarray(parts).view(TYPES[op[-1]]).reshape(-1), active)
        else:
            self.put(to, self.value(source, np.bool_ if op[-1] == "pred" else TYPES[op[-1]]), active)

    def do_setp(self, op, operands, active):
        to, a, b = operands
        kind = op[2]
        if half := PAIRS.get(kind):
            x, y = (np.ascontiguousarray(self.value(o, U32)).view(U16).reshape(-1, 2) for o in (a, b))
            for i, name in enumerate(to.split("|")):
                of_one = (_read(values[:, i].copy(), half) for values in (x, y))
                self.put(name, self._compared(op[1], *of_one), active)
            return
        x, y = self.value(a, TYPES[kind]), self.value(b, TYPES[kind])
        if kind == "bf16":
            x, y = _wide(x), _wide(y)
        self.put(to, self._compared(op[1], x, y), active)

    @staticmethod
    def _compared(how: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        if how in ("num", "nan"):
            unordered = np.isnan(x) | np.isnan(y)
            return unordered if how == "nan" else ~unordered
        if how in COMPARE:
            return COMPARE[how](x, y)
        # Unordered: true with NaN.
        return COMPARE[how[:-1]](x, y) | np.isnan(x) | np.isnan(y)

    def do_selp(self, op, operands, active):
        to, a, b, p = operands
        dtype = TYPES[op[1]]
        self.put(to, np.where(self.value(p, np.bool_), self.value(a, dtype), self.value(b, dtype)), active)

    def do_cvt(self, op, operands, active):
        to, *sources = operands
        kinds = [k for k in op[1:] if k in TYPES or k in PAIRS]
        target, source = kinds
        if half := PAIRS.get(target):
            high, low = (_bits(self.value(s, F32), half) for s in sources)
            self.put(to, (high.astype(U32) << U32(16)) | low, active)
            return
        x = self.value(sources[0], TYPES[source])
        if source == "bf16":
            x = _wide(x)
        for rounding in set(op) & ROUNDINGS.keys():
            x = ROUNDINGS[rounding](x)
        if "sat" in op and target[0] == "f":  # to [0, 1], NaN to 0
            x = np.fmin(np.fmax(x, 0), 1)
        self.put(to, _narrow(x) if target == "bf16" else x.astype(TYPES[target]), active)

    def do_unknown(self, op, operands, active):
        raise AssertionError(f"unknown instruction {operands[0]}")

    def do_elementwise(self, op, operands, active):
        to, *sources = operands
        name, kind = op[0], op[-1]
        if kind == "pred":
            values = [self.value(s, np.bool_) for s in sources]
            self.put(to, getattr(np, f"logical_{name}")(*values), active)
            return
        if kind in PAIRS and name == "abs":
            self.put(to, self.value(sources[0], U32) & U32(0x7FFF7FFF), active)
            return
        if half := PAIRS.get(kind):  # of each half separately
            words = [self.value(s, U32) for s in sources]
            low, high = (
                _bits(ELEMENTWISE[name](*(_read((w >> U32(shift)).astype(U16), half) for w in words)), half)
                for shift in (0, 16)
            )
            self.put(to, (high.astype(U32) << U32(16)) | low.astype(U32), active)
            return
        if kind == "f32x2":
            pairs = [np.ascontiguousarray(self.value(s, U64)).view(F32) for s in sources]
            self.put(to, ELEMENTWISE[name](*pairs).astype(F32).view(U64), active)
            return
        if kind == "bf16":  # d = a + c or a b + c with c, d in float32
            if op[-2] != "f32":  # or all of them in bfloat16
                assert name in ("abs", "max", "min"), f"unknown instruction {'.'.join(op)}"
                values = [_wide(self.value(s, U16)) for s in sources]
                self.put(to, _narrow(ELEMENTWISE[name](*values).astype(F32)), active)
                return
            values = [*(_wide(self.value(s, U16)) for s in sources[:-1]), self.value(sources[-1], F32)]
            self.put(to, ELEMENTWISE[name](*values).astype(F32), active)
            return
        dtype = TYPES[kind]
        if name in ("mul", "mad") and op[1] in ("wide", "hi"):
            a, b = (
                self.value(s, dtype).astype(np.uint64 if kind[0] == "u" else np.int64) for s in sources[:2]
            )
            if op[1] == "hi" and np.dtype(dtype).itemsize == 8:  # numpy has no integers of 128 bits
                out = ((a.astype(object) * b.astype(object)) >> 64).astype(dtype)
            else:
                out = a * b
                out = (out >> out.dtype.type(32)).astype(dtype) if op[1] == "hi" else out
            if name == "mad":
                out = out + self.value(sources[2], out.dtype.type)
            self.put(to, out, active)
            return
        if name in ("shl", "shr"):
            amount = self.value(sources[1], U32)
            size = 8 * np.dtype(dtype).itemsize
            x = self.value(sources[0], dtype)
            shifted = (x << amount.astype(dtype)) if name == "shl" else (x >> amount.astype(dtype))
            self.put(to, np.where(amount < size, shifted, 0).astype(dtype), active)
            return
        if name in ("bfe", "prmt"):
            self.put(to, getattr(self, name)(dtype, *sources), active)
            return
        function = ELEMENTWISE.get(name)
        if kind[0] in "us" and name in ("rem", "div"):
            x, y = (self.value(s, dtype).astype(object) for s in sources)
            # Towards 0.
            pairs = zip(x, y, strict=True)
            signed = [(abs(a) // abs(b), (a < 0) == (b < 0)) if b else (0, True) for a, b in pairs]
            quotient = np.array([q if same else -q for q, same in signed], object)
            self.put(to, (quotient if name == "div" else x - quotient * y).astype(dtype), active)
            return
        assert function is not None, f"unknown instruction {'.'.join(op)}"
        values = [self.value(s, dtype) for s in sources]
        if kind == "f16":  # every operation is exact in float64, then rounded
            values = [v.astype(F64) for v in values]
        out = function(*values)
        if name in ERRORS and "approx" in op:
            # rsqrt of all 64 bits is a routine of the assembler, and CUDA's own function.
            error = 2.0**-52 if kind == "f64" and "ftz" not in op else ERRORS[name](values[0])
            out = out * (1 + error * self.random.uniform(-1, 1, self.count))
        if name in ABSOLUTE_ERRORS:
            out = out + ABSOLUTE_ERRORS[name](values[0]) * self.random.uniform(-1, 1, self.count)
        if "rm" in op and dtype is F32:  # towards -inf
            nearest = out.astype(F32)
            out = np.where(nearest > out, np.nextafter(nearest, F32(-np.inf)), nearest)
        self.put(to, out.astype(dtype), active)

    def bfe(self, dtype, source, start, length):
        x, start, length = self.value(source, dtype), int(start), int(length)
        left = 8 * np.dtype(dtype).itemsize - start - length
        return (x << dtype(left)) >> dtype(left + start)

    def prmt(self, dtype, low, high, choice):
        both = (
            np.stack([self.value(low, U32), self.value(high, U32)], 1).view(np.uint8).reshape(self.count, 8)
        )
        picked = [int(choice.rstrip("U"), 0) >> 4 * i & 7 for i in range(4)]
        return np.ascontiguousarray(both[:, picked]).view(U32).reshape(-1)


def _of_all(function: Callable) -> Callable:
    """Extend a function of two arguments to two or three."""
    return lambda *values: functools.reduce(lambda a, b: function(a, b), values)


def _fma(a, b, c):
    if a.dtype == F32:
        # The product is exact in float64.
        return a.astype(F64) * b.astype(F64) + c.astype(F64)
    if a.dtype != F64:
        return a * b + c
    # The product and the sum, each with the error of its rounding (Dekker, Knuth).
    product, total = a * b, a * b + c
    halves = []
    for x in (a, b):
        high = x * 134217729.0 - (x * 134217729.0 - x)
        halves.append((high, x - high))
    (a_high, a_low), (b_high, b_low) = halves
    error = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    part = total - product
    error = error + ((product - (total - part)) + (c - part))
    return np.where(np.isfinite(error), total + error, total)


ROUNDINGS = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
ELEMENTWISE: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "fma": _fma, "mad": _fma, "min": _of_all(np.fmin),
    "max": _of_all(np.fmax), "abs": np.abs, "neg": np.negative, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor, "not": np.invert, "ex2": np.exp2, "sqrt": np.sqrt,
    "lg2": np.log2, "sin": np.sin, "cos": np.cos,
    "rsqrt": lambda x: 1 / np.sqrt(x.astype(np.float64)), "rcp": lambda x: 1 / x.astype(np.float64),
    "div": lambda a, b: a / b if a.dtype in (F32, F64) else (np.trunc(a / b)).astype(a.dtype),
    "copysign": lambda sign, x: np.copysign(x, sign),
}  # fmt: skip


class Memory:
    """Memory of a launch's tensors; any other address is an error."""

    def __init__(self, tensors: list[torch.Tensor]):
        self.regions = []
        for tensor in tensors:
            storage = tensor.untyped_storage()
            whole = torch.tensor([], dtype=torch.uint8).set_(storage)
            self.regions.append((storage.data_ptr(), whole.numpy()))

    def _region(self, address: np.ndarray, size: int) -> tuple[int, np.ndarray]:
        for first, data in self.regions:
            if first <= address.min() and address.max() + size <= first + data.size:
                return first, data
        raise AssertionError(f"address {address.min():#x} is in no tensor")

    def load(self, address: np.ndarray, size: int, on: np.ndarray, out: np.ndarray) -> None:
        if on.any():
            first, data = self._region(address[on], size)
            out[on] = data[(address[on] - first)[:, None] + np.arange(size)]

    def store(self, address: np.ndarray, size: int, on: np.ndarray, value: np.ndarray) -> None:
        if on.any():
            first, data = self._region(address[on], size)
            data[(address[on] - first)[:, None] + np.arange(size)] = value[on]


def in_any_order(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return a grid's places in an order that no kernel may depend on."""
    places = list(np.ndindex(*grid))
    return [places[i] for i in np.random.default_rng(len(places)).permutation(len(places))]


@contextlib.contextmanager
def emulated(target: str = "sm_90") -> Iterator[list[str]]:
    """Make launches compile their kernels and run the PTX on CPU tensors; yield the list of kernels run."""
    ran: list[str] = []
    programs: dict[str, tuple[Program, int]] = {}

    def run(self, *args, grid, warmup, **kwargs):
        given, options = kernels.named(self, args, kwargs)
        signature, constants, _ = kernels.specialisation(self, given)
        key = f"{self.__name__} {signature} {constants} {kernels.specialisation(self, given)[2]} {options}"
        if key not in programs:
            code = kernels.compiled(self, given, options, target)
            programs[key] = Program(code.asm["ptx"]), code.metadata.shared
        program, shared = programs[key]
        values = [given[n] for n in self.arg_names if n not in constants]
        numbers = [v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values]
        # The arguments are followed by addresses of scratch memory, which is absent here.
        numbers += [0] * (len(program.parameters) - len(numbers))
        parameters = dict(zip(program.parameters, numbers, strict=True))
        memory = Memory([v for v in values if isinstance(v, torch.Tensor)])
        with np.errstate(all="ignore"):
            grid = (*grid, 1, 1)[:3]
            for place in in_any_order(grid):
                threads = Threads(32 * options["num_warps"], memory, parameters, place, grid, shared)
                threads.run(program)
        ran.append(self.__name__)

    original = triton.JITFunction.run
    triton.JITFunction.run = run
    try:
        yield ran
    finally:
        triton.JITFunction.run = original
