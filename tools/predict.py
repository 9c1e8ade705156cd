"""``python -m tools.predict``: predicted time of a kernel on an absent GPU, from its machine code.

Triton's code for sm_90 is disassembled with its control codes (Huerta et al., Dissecting and modeling the
architecture of modern GPU cores, MICRO 2025, arXiv 2503.20481), and a quarter of a multiprocessor is
simulated instruction by instruction on one trace for all warps: the loop's body once per step of the launch,
or as ``TRIPS`` says.

Assumptions, each of them wrong somewhere:

- Each cycle one warp issues one instruction, the last warp again if it can; it then waits for the cycles and
  the barriers given by its control code.
- Pipes take a warp's instruction in 2 cycles (float, integer), 8 (special functions), 4 for each 128 bytes of
  shared or global memory; results of special functions arrive after 26 cycles, of shared memory after 32.
- Memory is one server with the bandwidth of a copy, evenly shared by multiprocessors, and a latency of 600
  cycles. Each tensor moves once, whatever the caches do; nothing waits for stores. Loads from a cache wait as
  long as those from memory: an aggregate posterior, which reads the same numbers many times with few warps,
  seems slower than it is.
- All alternative branches of a program are run: a sum of parts seems longer than it is.
- Warps start 150 cycles apart, and the next one when one ends. Programs in a last, partial wave take as long
  as in a full one. A launch in a graph adds 1.5 µs.
- The clock is 1.755 GHz.

``python -m tools.gpu`` measures a real GPU; its results in ``benchmarks/results``, if any, are printed
next to the predictions.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import os
import re
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import report
from benchmarks.measure import COPY, OURS

from . import kernels
from .kernels import tensor

GIGAHERTZ = 1.755
MULTIPROCESSORS = 132
LATENCY = 600
LAUNCH_SECONDS = 1.5e-6
# Bytes per second moved by a copy, read and written.
COPIED = {"H100": 3.0e12, "H200": 4.1e12}
SHARED_MEMORY, MOST_WARPS, MOST_PROGRAMS = 227 * 1024, 64, 32
# Simulated warps per warp resident in a quarter.
WAVES = 3
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

PIPES = [  # first match wins
    ("memory", r"LDG|STG|LDS|STS|ATOM|RED|SHFL|LDSM|STSM|LD\b|ST\b"),
    ("barrier", r"BAR|MEMBAR|WARPSYNC|DEPBAR|ERRBAR"),
    ("special", r"MUFU|I2F|F2I|F2F|I2FP|FRND|POPC|FLO|BREV"),
    ("wide", r"IMAD(?!\.MOV|\.SHL|\.IADD)|IDP"),
    ("float", r"FFMA|FMUL|FADD|IMAD\.(MOV|SHL|IADD)|HFMA2|HADD2|HMUL2"),
    ("uniform", r"U[A-Z]|R2UR|S2UR|LDC|ULDC"),
    ("control", r"BRA|EXIT|NOP|CALL|RET|BSSY|BSYNC|S2R|CS2R"),
    ("integer", r""),
]
BUSY = {"special": 8, "wide": 2, "float": 2, "integer": 2, "uniform": 2}
LATER = {"special": 26, "uniform": 30, "barrier": 30}


class Instruction(NamedTuple):
    """Instruction with its control code."""

    text: str
    stall: int  # cycles until this warp's next instruction
    wait: int  # bit mask of barriers to wait for
    write: int  # barrier released when the result is available; 7 for none
    read: int  # barrier released when the operands have been read; 7 for none

    pipe: str
    bytes: int  # bytes moved by a thread of a memory instruction

    @classmethod
    def of(cls, text: str, code: int) -> Instruction:
        """Build an instruction from its text and its control code of 21 bits."""
        found = re.search(r"\.(64|128|U16|U8|S16|S8)\b", text)
        width = {"64": 8, "128": 16, "U16": 2, "S16": 2, "U8": 1, "S8": 1}.get(found[1] if found else "", 4)
        pipe = next(name for name, pattern in PIPES if re.match(pattern, text))
        return cls(text, code & 15, code >> 11 & 63, code >> 5 & 7, code >> 8 & 7, pipe, width)


def disassembled(binary: bytes) -> tuple[list[Instruction], dict[str, int]]:
    """Return a cubin's instructions, and each label's index among them."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(binary)
        lines = kernels._output([knobs.nvidia.nvdisasm.path, "-hex", "-c", path]).splitlines()
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line, after in zip(lines, [*lines[1:], ""], strict=True):
        if m := re.match(r"\s*(\.L_x_\d+):", line):
            labels[m[1]] = len(instructions)
        elif m := re.match(kernels.NVIDIA[0] + r"\s*/\* 0x[0-9a-f]{16} \*/", line):
            # The upper half of the 128 bits; its bits from 41 on are the control code.
            word = re.search(r"/\* 0x([0-9a-f]{16}) \*/", after)
            code = int(word[1], 16) >> 41 if word else 0
            if not m[1].startswith("NOP"):
                instructions.append(Instruction.of(m[1], code))
    return instructions, labels


def trace(
    instructions: list[Instruction], labels: dict[str, int], steps: float, trips: list[int] | None = None
) -> list[Instruction]:
    """Return the instructions one warp issues: the longest loop once per step of the launch.

    With ``trips`` each loop is repeated as often as its number says, in the order of the loops' beginnings.
    """
    loops = []
    for i, instruction in enumerate(instructions):
        m = re.match(r"BRA\S*.*?(\.L_x_\d+)", instruction.text)
        if m and labels.get(m[1], i) < i:
            loops.append((labels[m[1]], i + 1))
    if trips is not None:
        loops.sort(key=lambda loop: (loop[0], -loop[1]))
        if len(loops) != len(trips):
            raise ValueError(f"the code has {len(loops)} loops, and TRIPS {len(trips)}: {loops}, {trips}")
        return _repeated(instructions, list(zip(loops, trips, strict=True)), 0, len(instructions))
    if not loops:
        return instructions
    first, last = max(loops, key=lambda loop: loop[1] - loop[0])
    body = instructions[first:last] * max(1, round(steps))
    return instructions[:first] + body + instructions[last:]


def _repeated(
    instructions: list[Instruction], loops: list[tuple[tuple[int, int], int]], first: int, last: int
) -> list[Instruction]:
    """Return the instructions from ``first`` to ``last``, with the loops among them repeated."""
    issued: list[Instruction] = []
    for n, ((begin, end), trips) in enumerate(loops):
        if begin < first:  # inside a loop before
            continue
        issued += instructions[first:begin]
        inner = [loop for loop in loops[n + 1 :] if loop[0][0] < end]
        issued += _repeated(instructions, inner, begin, end) * trips
        first = end
    return issued + instructions[first:last]


def _of_classes(a: dict) -> list[int]:
    table = a.get("p_begins") is not None
    classes = a["C"] // a["P"] if table else a["C"]
    # Loops that run once, by their arguments, are none in the code.
    outer = [a["per_program"]] if a["per_program"] > 1 else []
    return [*outer, *[math.ceil(classes / a["BLOCK_C"])] * (table or classes > a["BLOCK_C"])]


def _of_parts(a: dict) -> list[int]:
    """Return the trips of the loops of several sums, of which a program runs one."""
    parts = [a[name] for name in sorted(a) if name.startswith("parts_") and a[name]]
    return [parts[0], *[0] * (len(parts) - 1)]


# Repetitions of the loops of kernels that do not run one loop over tiles, from a launch's arguments; in the
# order of the loops' beginnings, and divided by their unrolling.
TRIPS: dict[str, Callable[[dict], list[int]]] = {
    "positions_kernel": lambda a: [a["C"]],
    "positions_backward_kernel": lambda a: [a["C"]],
    "classes_kernel": _of_classes,
    "classes_backward_kernel": _of_classes,
    "aggregate_kernel": lambda a: [a["u_tiles"], a["D"] // 4],
    "aggregate_marginals_kernel": lambda a: [a["U"], math.ceil(a["U"] / 64), min(a["U"], 64)],
    "aggregate_shares_kernel": lambda a: [a["D"] // 4],
    "aggregate_rows_kernel": lambda a: [a["u_per_program"]],
    "aggregate_components_kernel": lambda a: [a["n_per_program"] // 2, a["n_per_program"] % 2],
    "sum_parts_kernel": _of_parts,
}


def simulate(issued: list[Instruction], warps: int, total: int, scale: float, bandwidth: float) -> int:
    """Return the cycles of a quarter of a multiprocessor.

    Args:
        issued: instructions issued by each warp.
        warps: warps resident at once.
        total: warps run in total.
        scale: factor from the bytes that the trace moves to those that must move.
        bandwidth: bytes per cycle.
    """
    end, free = len(issued), dict.fromkeys(("memory", "special", "wide", "float", "integer", "uniform"), 0)
    server = 0.0
    place, ready = [0] * warps, [150 * w for w in range(warps)]
    barriers = [[0] * 6 for _ in range(warps)]
    started, done, cycle, last = warps, 0, 0, 0
    while done < total:
        soonest, issue = 1 << 60, -1
        for n in range(warps):
            w = (last + n) % warps
            if place[w] < 0:
                continue
            at = ready[w]
            instruction = issued[place[w]]
            if instruction.wait:
                at = max(at, *(barriers[w][b] for b in range(6) if instruction.wait >> b & 1))
            pipe = instruction.pipe
            if pipe in free:
                # Either half of the lanes takes floats; integer products use one of them.
                at = max(at, min(free["float"], free["wide"]) if pipe == "float" else free[pipe])
            if at <= cycle:
                issue = w
                break
            soonest = min(soonest, at)
        if issue < 0:
            cycle = soonest
            continue
        w, last = issue, issue
        latency = LATER.get(pipe, 6)
        if pipe == "memory":
            busy = 4 * max(1, instruction.bytes // 4)
            if instruction.text.startswith("SHFL"):
                busy, latency = 4, 26
            elif instruction.text.startswith(("LDG", "STG")):
                server = max(server, cycle) + 32 * instruction.bytes * scale / bandwidth
                load = instruction.text.startswith("LDG")
                latency = int(LATENCY + server - cycle if load else max(40, server - cycle - 1500))
            else:
                latency = 32
            free["memory"] = cycle + busy
        elif pipe in free:
            half = "wide" if pipe == "float" and free["wide"] < free["float"] else pipe
            free[half] = cycle + BUSY[pipe]
        if instruction.write < 6:
            barriers[w][instruction.write] = cycle + latency
        if instruction.read < 6:
            store = instruction.text.startswith("STG")
            barriers[w][instruction.read] = cycle + (latency if store else min(latency, 40))
        ready[w] = cycle + max(1, instruction.stall)
        place[w] += 1
        if place[w] == end:
            done += 1
            place[w] = 0 if started < total else -1
            started += place[w] == 0
            ready[w], barriers[w] = cycle + 300, [0] * 6
        cycle += 1
    return cycle


@dataclass
class Predicted:
    """Prediction for one launch.

    Attributes:
        kernel: name of the kernel.
        registers: registers per thread.
        warps: warps resident in a quarter of a multiprocessor.
        instructions: instructions issued per warp.
        bytes: bytes that must move.
        seconds: predicted time by GPU.
    """

    kernel: str
    registers: int
    warps: int
    instructions: int
    bytes: int
    seconds: dict[str, float]


def of_launch(kernel: Any, arguments: dict, options: dict, grid: tuple[int, ...]) -> Predicted:
    code = kernels.compiled(kernel, arguments, options, "sm_90")
    instructions, labels = disassembled(code.asm["cubin"])
    registers, *_ = kernels._assembled(code.asm["ptx"], 90, False)
    of_program = options["num_warps"]
    threads = 32 * of_program
    _, steps, _, _ = kernels._tiling(arguments, grid, threads)
    fit = (
        kernels.REGISTERS // (threads * kernels._rounded(registers)),
        MOST_WARPS // of_program,
        SHARED_MEMORY // (code.metadata.shared + 1024),
        MOST_PROGRAMS,
    )
    # Programs per multiprocessor in total, and resident at once.
    given = math.prod(grid) / MULTIPROCESSORS
    resident = min(*fit, math.ceil(given))
    trips = TRIPS[kernel.__name__](arguments) if kernel.__name__ in TRIPS else None
    issued = trace(instructions, labels, steps, trips)
    moved = sum(t.numel() * t.element_size() for t in arguments.values() if isinstance(t, torch.Tensor))
    of_trace = sum(32 * i.bytes for i in issued if i.text.startswith(("LDG", "STG")))
    scale = moved / (math.prod(grid) * of_program * max(1, of_trace))
    warps = max(1, resident * of_program // 4)
    every = max(1, math.ceil(given) * of_program // 4)
    total = min(WAVES * warps, every)
    seconds = {}
    for card, copied in COPIED.items():
        bandwidth = copied / MULTIPROCESSORS / (GIGAHERTZ * 1e9) / 4
        cycles = simulate(issued, warps, total, scale, bandwidth)
        seconds[card] = cycles * every / total / (GIGAHERTZ * 1e9) + LAUNCH_SECONDS
    return Predicted(kernel.__name__, registers, warps, len(issued), moved, seconds)


# Predicted cases: (group, case, direction) as in ``python -m tools.gpu``, and the ops' calls.


def calls() -> Iterator[tuple[tuple[str, str, str], list[Callable[[], object]]]]:
    from fastvae.kernels import likelihood, logsumexp, normal_diagonal
    from fastvae.likelihoods.declared import DECLARED
    from fastvae.ops.normal_arguments import Draw

    seed, need = tensor(dtype=torch.int64), [True, True, False, False]
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype)[6:]
        for k, b, d, chunked in (
            (50, 1024, 50, True),
            (50, 8192, 10, True),
            (50, 4096, 64, False),
            (1, 65536, 256, False),
            (1, 65536, 50, True),
            (1, 4194304, 8, False),
        ):
            if chunked:
                q = tensor(b, 2 * d, dtype=dtype).chunk(2, dim=1)
            else:
                q = tensor(b, d, dtype=dtype), tensor(b, d, dtype=dtype)
            given = (*q, None, None, seed, Draw(k, 0, 0, -math.inf, math.inf))
            z = tensor(k, b, d, dtype=dtype)
            if k == 1:
                op, size = "rsample_kl", f"{b}×{d}"
                pair = [
                    lambda g=given: normal_diagonal.rsample_kl(*g, False),
                    lambda g=given, z=z, b=b: normal_diagonal.rsample_kl_backward(z, tensor(b), *g, need),
                ]
            else:
                op, size = "rsample_log_ratio", f"{k}×{b}×{d}"
                pair = [
                    lambda g=given: normal_diagonal.rsample_log_ratio(*g, "iwae"),
                    lambda g=given, z=z, k=k, b=b: normal_diagonal.rsample_log_ratio_backward(
                        z, tensor(k, b), None, *g, False, need
                    ),
                ]
            case = f"{size}, chunked, {name}" if chunked else f"{size}, {name}"
            yield (op, case, "forward"), pair[:1]
            yield (op, case, "forward+backward"), pair
        for family, *size in (
            ("bernoulli", 50, 1024, 784),
            ("gaussian", 50, 1024, 784),
            ("gaussian", 50, 4096, 100),
            ("bernoulli", 50, 65536, 8),
            ("gaussian", 50, 65536, 8),
            ("poisson", 50, 1024, 2000),
        ):
            found = kernels.of_likelihood(likelihood, DECLARED[family], dtype, size, size, [False])
            pair = [call for _, call in found]
            case = f"{'×'.join(map(str, size))}, {name}"
            yield (f"{family}_log_prob", case, "forward"), pair[:1]
            yield (f"{family}_log_prob", case, "forward+backward"), pair
    yield from _masked()
    # Classes of pixels, of tokens and of a table, counts, and aggregate posteriors.
    f32, bf16 = torch.float32, torch.bfloat16
    yield from _pairs([*kernels.softmax_launches((f32, bf16))])
    yield from _pairs([pair for pair in kernels.aggregate_launches((f32,)) if "5000" not in pair[0]])
    for k, n in ((50, 1048576), (5000, 16384)):
        log_w, column = tensor(k, n), tensor(n)
        pair = [
            lambda w=log_w: logsumexp.log_mean_exp(w),
            lambda w=log_w, c=column: logsumexp.log_mean_exp_backward(c, w, c, c),
        ]
        yield ("log_mean_exp", f"{k}×{n}, float32", "forward"), pair[:1]
        yield ("log_mean_exp", f"{k}×{n}, float32", "forward+backward"), pair


def _masked() -> Iterator[tuple[tuple[str, str, str], list[Callable[[], object]]]]:
    from fastvae.kernels import likelihood
    from fastvae.likelihoods.declared import DECLARED

    size = 50, 1024, 784
    for family in ("bernoulli", "gaussian"):
        found = kernels.of_likelihood(
            likelihood, DECLARED[family], torch.float32, size, size, [False], masked=True
        )
        pair = [call for _, call in found]
        case = f"{'×'.join(map(str, size))}, masked, float32"
        yield (f"{family}_log_prob", case, "forward"), pair[:1]
        yield (f"{family}_log_prob", case, "forward+backward"), pair


def _pairs(
    launches: list[tuple[str, Callable[[], object]]],
) -> Iterator[tuple[tuple[str, str, str], list[Callable[[], object]]]]:
    """Yield cases of labelled forward calls, each followed by its backward call."""
    for (label, forward), (_, backward) in zip(launches[::2], launches[1::2], strict=True):
        name, dtype, shape = label.split(" ", 2)
        group, case = f"{name.removesuffix('_log_prob')}_log_prob", f"{shape}, {dtype}"
        yield (group, case, "forward"), [forward]
        yield (group, case, "forward+backward"), [forward, backward]


def _predict(number: int) -> list[Predicted]:
    _, pair = list(calls())[number]
    return [of_launch(*launch) for call in pair for launch in kernels.recorded(call)]


COLUMNS = ("group", "case", "direction", "registers", "bytes", "h100_us", "h200_us", "of_copy_h100", "date")


def measured(path: Path) -> dict[tuple[str, str, str], tuple[float, float]]:
    """Return a GPU's measurements: (µs, fraction of an equally large copy)."""
    if not path.exists():
        return {}
    rows = report.read_csv(path)
    key = lambda r: (r["group"], r["case"], r["direction"])  # noqa: E731
    copies = {key(r): float(r["ratio"]) for r in rows if r["implementation"] == COPY and r["ratio"]}
    return {
        key(r): (float(r["p50_us"]), copies.get(key(r), math.nan))
        for r in rows
        if r["implementation"] == OURS and r["p50_us"]
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.predict",
        description="Predict the kernels' times on an H100 and an H200 from their machine code, without a "
        "GPU. Also prints the share of a copy's speed, and recorded measurements, if any.",
    )
    parser.add_argument("patterns", nargs="*", help='regular expressions that "op case direction" must match')
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table as CSV")
    parser.add_argument(
        "--jobs", type=int, help="number of processes; default: the number of processors, at most 8"
    )
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set, and interpreted kernels cannot be compiled: unset it")
    named = [name for name, _ in calls()]
    labels = [" ".join(name) for name in named]
    chosen = [n for n, label in enumerate(labels) if all(re.search(p, label) for p in options.patterns)]
    if not chosen:
        parser.error(f"nothing matches {' '.join(options.patterns)}")
    found = measured(RESULTS / "gpu-nvidia-h100-80gb-hbm3.csv")
    print(
        "predicted: µs on an H100 (% of an equally large copy), on an H200; measured: µs on an H100 "
        "(% of a copy); the model's error"
    )
    rows, errors = [], []
    today = datetime.date.today().isoformat()
    jobs = options.jobs or min(8, os.cpu_count() or 1)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for n, launches in zip(chosen, pool.map(_predict, chosen), strict=True):
            seconds = {card: sum(p.seconds[card] for p in launches) for card in COPIED}
            moved = sum(p.bytes for p in launches)
            share = moved / COPIED["H100"] / seconds["H100"]
            took = [1e6 * seconds[card] for card in COPIED]
            line = f"{labels[n]:66s} {took[0]:7.1f} ({share:4.0%}) {took[1]:7.1f}"
            if named[n] in found:
                really, of_copy = found[named[n]]
                errors.append(took[0] / really - 1)
                line += f"   {really:7.1f} ({of_copy:4.0%})  {errors[-1]:+.0%}"
            print(line, flush=True)
            values = [max(p.registers for p in launches), moved]
            values += [f"{t:.1f}" for t in took]
            rows.append(dict(zip(COLUMNS, [*named[n], *values, f"{share:.3f}", today], strict=True)))
    if errors:
        worst = max(errors, key=abs)
        typical = statistics.median(map(abs, errors))
        print(f"{len(errors)} of them measured: off by {typical:.0%} (median), {worst:+.0%} at worst")
    if options.out:
        with open(options.out, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
