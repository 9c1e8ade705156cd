"""Mutation check: break one line of a kernel at a time, in a scratch copy, and see the tests notice.

``python -m tests.mutants [cpp|triton] [--jobs 2]`` prints a line per mutant, and fails if one survives. It is
no part of the test suite: it takes about half a minute a mutant.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    """One wrong line: ``old`` (its ``nth`` occurrence) becomes ``new`` in ``file``.

    ``tests`` are those that shall notice; default: TESTS of the mutant's backend.
    """

    what: str
    file: str
    old: str
    new: str
    nth: int = 0
    tests: tuple[str, ...] = ()


CPP = [
    Mutant(
        "z: sign of the noise", "csrc/latent.hpp", "v = q.mu[i] + C(2) * half;", "v = q.mu[i] - C(2) * half;"
    ),
    Mutant(
        "ratio: sign of the noise",
        "csrc/latent.hpp",
        "terms[i] = eps[i] * eps[i] - white",
        "terms[i] = eps[i] * eps[i] + white",
    ),
    Mutant(
        "KL: the mean's term dropped",
        "csrc/latent.hpp",
        "out[i] = white * white + expm1",
        "out[i] = expm1",
    ),
    Mutant(
        "KL: half its constant",
        "csrc/latent.hpp",
        "static_cast<C>(0.5 * kl_sum[r])",
        "static_cast<C>(0.25 * kl_sum[r])",
    ),
    Mutant("ratio: log variances dropped", "csrc/latent.hpp", "ratio_sum[k - k0][r] += constant[r];", ";"),
    Mutant(
        "ratio: samples and rows swapped",
        "csrc/latent.hpp",
        "C* out = to.log_ratio + k * a.rows + b;",
        "C* out = to.log_ratio + b * a.samples + k;",
    ),
    Mutant(
        "backward: the prior pushes", "csrc/latent.hpp", "C h = grad_z[i] - pull", "C h = grad_z[i] + pull"
    ),
    Mutant(
        "backward: DReG weight dropped",
        "csrc/latent.hpp",
        "h = weight[i] * (h + push",
        "h = (h + push",
    ),
    Mutant(
        "backward: half the entropy",
        "csrc/latent.hpp",
        "static_cast<C>(entropy[r])",
        "static_cast<C>(0.5 * entropy[r])",
    ),
    Mutant(
        "backward: entropy kept by stl",
        "csrc/latent.hpp",
        "            } else {\n              for (int r = 0; r < t.rows; ++r) entropy[r] +=",
        "            }\n            {\n              for (int r = 0; r < t.rows; ++r) entropy[r] +=",
    ),
    Mutant("backward: prior log variance", "csrc/latent.hpp", "part * white - ratio[i]", "part * white"),
    Mutant(
        "backward: gradient outside the clamp",
        "csrc/latent.hpp",
        "q.clamped[i] > q.logvar[i] ? C(0)",
        "q.clamped[i] > q.logvar[i] ? v",
    ),
    Mutant("noise: a key constant", "csrc/random.hpp", "0x9E3779B9u", "0x9E3779BAu"),
    Mutant(
        "noise: a quarter turn's sign", "csrc/random.hpp", "((turns + 0x40000000u) & sign)", "(turns & sign)"
    ),
    Mutant(
        "noise: rows and samples swapped",
        "csrc/random.hpp",
        "{pattern0 + blocks, pattern1 + rows, samples, zero}",
        "{pattern0 + blocks, samples, pattern1 + rows, zero}",
    ),
    Mutant(
        "noise: the chunk's offset dropped",
        "csrc/random.hpp",
        "static_cast<std::uint32_t>(sample + sample_offset_)",
        "static_cast<std::uint32_t>(sample)",
    ),
    Mutant("gaussian: log 2 pi dropped", "csrc/gaussian.hpp", "kLog2Pi * n + logvars", "logvars"),
    Mutant(
        "gaussian: constant once per row",
        "csrc/gaussian.hpp",
        "static_cast<double>(logvar) * n",
        "static_cast<double>(logvar)",
    ),
    Mutant("gaussian: sign of x's gradient", "csrc/gaussian.hpp", "-sum_x[i]", "sum_x[i]"),
    Mutant(
        "gaussian: twice a row's log variance", "csrc/gaussian.hpp", "sum[i] += C(0.5) * (g", "sum[i] += (g"
    ),
    Mutant("gaussian: last tile alone", "csrc/gaussian.hpp", "(column == 0 ? C(0) : place)", "C(0)"),
    Mutant(
        "gaussian: samples and rows swapped",
        "csrc/gaussian.hpp",
        "const i64 offset = (k * a.rows + b)",
        "const i64 offset = (b * a.samples + k)",
    ),
    Mutant(
        "bernoulli: wrong side", "csrc/bernoulli.hpp", "l > C(0) ? C(1) - v : v", "l > C(0) ? v : C(1) - v"
    ),
    Mutant(
        "bernoulli: 0 * inf",
        "csrc/bernoulli.hpp",
        "miss == C(0) ? C(0) : miss * magnitude",
        "miss * magnitude",
    ),
    Mutant("bernoulli: sigmoid of |l|", "csrc/bernoulli.hpp", "(l >= C(0) ? C(1) : e)", "C(1)"),
    Mutant(
        "bernoulli: range check",
        "csrc/bernoulli.hpp",
        "return low == C(0) && high == C(1);",
        "return high == C(1);",
    ),
    Mutant("importance: log K dropped", "csrc/importance.hpp", "- log_samples", ""),
    Mutant("importance: weights not divided", "csrc/importance.hpp", " / total[column + i];", ";"),
    Mutant("importance: denormal weights kept", "csrc/importance.hpp", "w < tiny || ", ""),
    Mutant(
        "importance: -inf minus -inf",
        "csrc/importance.hpp",
        "abs_(maximum) == infinity(C{}) ? C(0) : maximum",
        "maximum",
    ),
    Mutant(
        "half precision: no rounding",
        "csrc/common.hpp",
        "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16",
        "bits >> 16",
    ),
    Mutant(
        "noise: odd calls take the even words",
        "csrc/random.hpp",
        "(pattern0 >> 32) + blocks",
        "pattern0 + blocks",
    ),
    Mutant(
        "noise: planes in another order",
        "csrc/random.hpp",
        "high2[l] = low2[l] + (lanes > 2 ? lanes / 2 : 2);",
        "high2[l] = low2[l];",
    ),
    Mutant(
        "tile: its last rows", "csrc/random.hpp", "rows - row < height ? rows - row : height", "height - 1"
    ),
    Mutant("tile: the end of a row", "csrc/common.hpp", "mask > zero ?", "mask > zero + C(1) ?"),
    Mutant(
        "copy: the last vector",
        "csrc/common.hpp",
        "(to + n - step) = *reinterpret_cast<const Vector<C>*>(from + n - step)",
        "(to + n - step) = *reinterpret_cast<const Vector<C>*>(from)",
    ),
    Mutant(
        "slope: not halved",
        "csrc/latent.hpp",
        "if constexpr (kKeep) slope[i] = half;",
        "if constexpr (kKeep) slope[i] = C(2) * half;",
    ),
    Mutant(
        "backward: blocks of samples forgotten",
        "csrc/latent.hpp",
        "if (&sums == &block && last) total",
        "if (&sums == &block && last && k + 1 == a.samples) total",
    ),
    Mutant(
        "bernoulli: product of the pairs",
        "csrc/common.hpp",
        "e[i] += other[i] * (C(1) + e[i]);",
        "e[i] += other[i];",
    ),
    Mutant(
        "exp: large arguments",
        "csrc/common.hpp",
        "const float s = e.power(down - 64);",
        "const float s = e.power(down - 63);",
    ),
    Mutant(
        "gaussian: a tile's constant", "csrc/gaussian.hpp", "-0.5 * kLog2Pi * t.n", "-0.25 * kLog2Pi * t.n"
    ),
    Mutant("gaussian: a tile of another sample", "csrc/gaussian.hpp", "v.at(k, b), v.s1", "v.at(0, b), v.s1"),
    Mutant(
        "bernoulli: a tile's wrong side",
        "csrc/bernoulli.hpp",
        "l > C(0) ? C(1) - v : v",
        "l < C(0) ? C(1) - v : v",
        nth=1,
    ),
]

TRITON = [
    Mutant("z: sign of the noise", "kernels/latent.py", "b_z = b_mu + b_sigma", "b_z = b_mu - b_sigma"),
    Mutant(
        "KL: the mean's term dropped",
        "kernels/latent.py",
        "b_white * b_white + b_excess",
        "b_excess",
    ),
    Mutant("KL: padding counted", "kernels/latent.py", "tl.where(o_d < D, b_term, 0.0)", "b_term"),
    Mutant("ratio: half its constant", "kernels/latent.py", "return 0.5 * ((b_eps", "return 0.25 * ((b_eps"),
    Mutant(
        "ratio: rows and samples swapped",
        "kernels/latent.py",
        "o_ratio = (i_d_split.to(tl.int64) * K + o_k) * B + o_b",
        "o_ratio = (i_d_split.to(tl.int64) * B + o_b) * K + o_k",
    ),
    Mutant("backward: the prior pushes", "kernels/latent.py", "b_h -= b_pull", "b_h += b_pull"),
    Mutant("backward: DReG weight dropped", "kernels/latent.py", "b_h *= b_weight", "b_h *= 1.0"),
    Mutant(
        "backward: half the entropy",
        "kernels/latent.py",
        "b_out += 0.5 * tl.sum(s_entropy",
        "b_out += 0.25 * tl.sum(s_entropy",
    ),
    Mutant(
        "backward: prior log variance",
        "kernels/latent.py",
        "b_part * b_white - b_g), 0.0)",
        "b_part * b_white), 0.0)",
    ),
    Mutant(
        "backward: gradient outside the clamp",
        "kernels/latent.py",
        "b_out = tl.where(b_inside, b_out, 0.0)",
        "b_out = b_out",
    ),
    Mutant(
        "noise: rows and samples swapped",
        "kernels/random.py",
        "o_b.to(tl.uint32), o_k.to(tl.uint32)",
        "o_k.to(tl.uint32), o_b.to(tl.uint32)",
    ),
    Mutant(
        "noise: a quarter turn's sign", "kernels/random.py", "((b_n + 1) & 2) << 30", "((b_n + 2) & 2) << 30"
    ),
    Mutant("noise: the row's offset dropped", "kernels/latent.py", "o_b + row_offset", "o_b"),
    Mutant("gaussian: log 2 pi dropped", "kernels/gaussian.py", "LOG_2_PI + b_logvar", "b_logvar"),
    Mutant("gaussian: sign of x's gradient", "kernels/gaussian.py", "s_x -= tl.where", "s_x += tl.where"),
    Mutant(
        "gaussian: twice the log variance", "kernels/gaussian.py", "b_out = 0.5 * (b_part", "b_out = (b_part"
    ),
    Mutant(
        "gaussian: padding rows counted",
        "kernels/gaussian.py",
        "s_column += tl.where(m_row, b_out, 0.0)",
        "s_column += b_out",
    ),
    Mutant(
        "bernoulli: wrong side",
        "kernels/bernoulli.py",
        "tl.where(b_l > 0, 1.0 - b_x, b_x)",
        "tl.where(b_l > 0, b_x, 1.0 - b_x)",
    ),
    Mutant(
        "bernoulli: 0 * inf",
        "kernels/bernoulli.py",
        "tl.where(b_miss == 0, 0.0, b_miss * b_margin)",
        "b_miss * b_margin",
    ),
    Mutant(
        "bernoulli: sigmoid of |l|",
        "kernels/bernoulli.py",
        "tl.where(b_l > 0, (b_x - 1.0) + b_t, b_x - b_t)",
        "(b_x - 1.0) + b_t",
    ),
    Mutant(
        "importance: log K dropped",
        "kernels/importance.py",
        " - log(tl.zeros([BLOCK_N, 1], dtype=DTYPE) + count)",
        "",
    ),
    Mutant(
        "importance: rescaling dropped", "kernels/importance.py", "b_sum = b_sum * b_rescale", "b_sum = b_sum"
    ),
    Mutant("importance: denormal weights kept", "kernels/importance.py", "(b_weight < TINY) | ", ""),
    Mutant(
        "importance: -inf minus -inf",
        "kernels/importance.py",
        'tl.where(tl.abs(b_max) == float("inf"), 0.0, b_max)',
        "b_max",
    ),
    Mutant("bernoulli: a product's last term", "kernels/common.py", "b_s + (b_t + b_s * b_t)", "b_s + b_t"),
    Mutant(
        "bernoulli: log 1.5",
        "kernels/common.py",
        "tl.where(b_s < 0.5, log1p(b_s)",
        "tl.where(b_s < 2.5, log1p(b_s)",
    ),
    Mutant(
        "exp: the last step",
        "kernels/common.py",
        "(b_x - b_f * LOG_2_HIGH) - b_f * LOG_2_LOW",
        "b_x - b_f * LOG_2_HIGH",
    ),
    Mutant(
        "KL: a polynomial's range",
        "kernels/common.py",
        "tl.abs(b_x - 0.25) < 1.25",
        "tl.abs(b_x - 0.25) < 2.5",
    ),
    Mutant(
        "importance: a part's sum forgotten",
        "kernels/importance.py",
        "b_term *= load(p_part, o_k * N + o_n, mask, DTYPE)",
        "b_term *= 1.0",
        tests=("tests/test_shapes.py",),
    ),
    Mutant(
        "importance: a part of another split",
        "kernels/importance.py",
        "o_out = i_split.to(tl.int64) * N + o_n",
        "o_out = o_n",
        tests=("tests/test_shapes.py",),
    ),
    Mutant(
        "KL: a part of another split",
        "kernels/latent.py",
        "o_kl = i_d_split.to(tl.int64) * B + o_b",
        "o_kl = o_b",
        tests=("tests/test_shapes.py",),
    ),
    Mutant(
        "traffic: mu is read twice",
        "kernels/latent.py",
        "b_mu = load(p_mu, o_b * stride_mu_b + o_d * stride_mu_d, mask, DTYPE)",
        "b_mu = load(p_mu, o_b * stride_mu_b + o_d * stride_mu_d, mask, DTYPE)\n"
        "    b_mu = load(p_mu, o_b * stride_mu_b + o_d * stride_mu_d, mask, DTYPE)",
        tests=("tests/test_traffic.py",),
    ),
    Mutant(
        "traffic: logits are read twice",
        "kernels/bernoulli.py",
        "            b_l = load(p_logits, o_l, m_k & m_x, DTYPE)",
        "            b_l = load(p_logits, o_l, m_k & m_x, DTYPE)\n"
        "            b_l = load(p_logits, o_l, m_k & m_x, DTYPE)",
        tests=("tests/test_traffic.py",),
    ),
    Mutant(
        "traffic: a copy of the means",
        "kernels/gaussian.py",
        "        (x, mean, logvar, out),",
        "        (x, mean.clone(), logvar, out),",
        tests=("tests/test_traffic.py",),
    ),
    Mutant(
        "traffic: a result is written twice",
        "kernels/latent.py",
        "    store(p_z, (o_k * B + o_b) * D + o_d, b_z, (o_k < k_stop) & (o_b < B) & (o_d < D))",
        "    store(p_z, (o_k * B + o_b) * D + o_d, b_z, (o_k < k_stop) & (o_b < B) & (o_d < D))\n"
        "    store(p_z, (o_k * B + o_b) * D + o_d, b_z, (o_k < k_stop) & (o_b < B) & (o_d < D))",
        tests=("tests/test_traffic.py",),
    ),
    Mutant(
        "code: tiles that spill",
        "kernels/common.py",
        '"latent_backward": Launch(512, 128, 128, 64)',
        '"latent_backward": Launch(4096, 128, 128, 64)',
        tests=("tests/test_kernels_compile.py::test_nothing_spills",),
    ),
    Mutant(
        "code: rows not known to be aligned",
        "kernels/bernoulli.py",
        'do_not_specialize=["K", "B", "x_tiles"]',
        'do_not_specialize=["K", "B", "X", "x_tiles"]',
        tests=("tests/test_kernels_compile.py::test_loads_and_stores_are_wide",),
    ),
    Mutant(
        "offsets: int32 in the likelihoods",
        "kernels/common.py",
        "o_x = (start + tl.arange(0, BLOCK)).to(tl.int64)",
        "o_x = start + tl.arange(0, BLOCK)",
        tests=("tests/test_shapes.py",),
    ),
    Mutant(
        "offsets: int32 in the backward pass",
        "kernels/latent.py",
        "o_b = (i_b + tl.arange(0, BLOCK_B)).to(tl.int64)[None, :, None]",
        "o_b = (i_b + tl.arange(0, BLOCK_B))[None, :, None]",
        nth=2,
        tests=("tests/test_shapes.py",),
    ),
    Mutant(
        "launch: numbers in another order",
        "kernels/common.py",
        "run(*tensors, *loose, *numbers, *constants)",
        "run(*tensors, *numbers, *loose, *constants)",
        tests=("tests/test_launches.py",),
    ),
]

TESTS = [f"tests/test_{name}.py" for name in ("importance", "bernoulli", "gaussian", "latent", "random")]


def copy_to(folder: Path) -> None:
    """A copy of the project in the editable layout without an installation: the kernels are a subpackage."""
    left_out = (".git", ".venv*", "build", "demo", "*.so", ".hypothesis", "*.egg-info", "results")
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(*left_out))
    shutil.move(folder / "kernels", folder / "fastvae" / "kernels")


def build(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Compile the extension of a copy, with options of one's own."""
    import pybind11

    includes = [
        f"-I{folder / 'csrc'}",
        f"-I{pybind11.get_include()}",
        f"-I{sysconfig.get_paths()['include']}",
    ]
    target = folder / "fastvae" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = [
        "-O3",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-fopenmp",
        "-fvisibility=hidden",
        *options,
    ]
    command = ["c++", *flags, *includes, str(folder / "csrc/bindings.cpp"), "-o", str(target)]
    return subprocess.run(command, capture_output=True, text=True)


def run(mutant: Mutant | None, backend: str) -> tuple[bool, str]:
    """Whether the tests fail on the mutant, and which test failed first; None runs the code as it is."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        copy_to(folder)
        if mutant is not None:
            path = folder / mutant.file.replace("kernels/", "fastvae/kernels/", 1)
            parts = path.read_text().split(mutant.old)
            if len(parts) < mutant.nth + 2:
                return False, f"NOT APPLIED: {mutant.old!r} does not occur in {mutant.file}"
            n = mutant.nth + 1
            path.write_text(mutant.old.join(parts[:n]) + mutant.new + mutant.old.join(parts[n:]))
        built = build(folder, "-DFASTVAE_BASE_ONLY")
        if built.returncode:
            return False, "DOES NOT COMPILE: " + built.stderr[-300:]
        environment = {
            **os.environ,
            "PYTHONPATH": str(folder),
            "FASTVAE_TEST_PROFILE": "mutants",
            "OMP_NUM_THREADS": "1",
        }
        # The tests of the mutant's own op first, as the run stops at the first failure.
        tests = sorted(TESTS, key=lambda t: mutant is not None and Path(mutant.file).stem not in t)
        chosen = "native" if backend == "cpp" else "triton"
        choice = ["-k", f"{chosen} or (cpp and not slow)", *tests]
        if mutant is not None and mutant.tests:
            choice = list(mutant.tests)
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "-p", "no:doctest",
             "-o", "addopts=", *choice],
            cwd=folder, env=environment, capture_output=True, text=True,
        )  # fmt: skip
        failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        return done.returncode == 1 and bool(failed), (failed or [done.stdout[-200:]])[0][:110]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("which", nargs="?", choices=["cpp", "triton"])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--only", default="", help="only mutants whose description has this text")
    arguments = parser.parse_args()
    survivors = 0
    for name, mutants in (("cpp", CPP), ("triton", TRITON)):
        if arguments.which not in (None, name):
            continue
        caught, message = run(None, name)
        print(f"{name}: unchanged code {'FAILS ' + message if caught else 'passes'}", flush=True)
        survivors += caught
        with ThreadPoolExecutor(arguments.jobs) as pool:
            mutants = [m for m in mutants if arguments.only in m.what]
            results = pool.map(lambda m, n=name: run(m, n), mutants)
            for mutant, (caught, message) in zip(mutants, results, strict=True):
                survivors += not caught
                print(f"{'caught  ' if caught else 'SURVIVED'} {name}: {mutant.what}: {message}", flush=True)
    print(f"{survivors} survived")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
