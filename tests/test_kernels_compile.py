"""Every Triton kernel, as it is launched, compiles for NVIDIA and AMD without a GPU, into lean code."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")
fcntl = pytest.importorskip("fcntl")

from tools import kernels  # noqa: E402

ROOT = pathlib.Path(__file__).parents[1]
# Compiling takes some minutes the first time.
pytestmark = pytest.mark.slow

# A separate process: the other tests import triton with TRITON_INTERPRET set, and then it cannot compile.
PLANTED = """
import dataclasses, json, sys, triton, triton.language as tl
from tools import kernels

@triton.jit
def spills(p_x, BLOCK: tl.constexpr):
    "Keeps 512 elements a thread, beyond any register file."
    o_x = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x)
    b_y = b_x
    for _ in range(8):
        b_y = b_y * b_x + tl.sum(b_y, axis=0)
    tl.store(p_x + o_x, b_y + b_x)

@triton.jit
def loads_scalars(p_x, p_y, stride, BLOCK: tl.constexpr):
    "Elements of which the compiler cannot see that they are neighbours."
    o_x = tl.arange(0, BLOCK) * stride
    tl.store(p_y + o_x, tl.load(p_x + o_x))

@triton.jit
def loads_rows(p_x, p_y, D, stride, BLOCK: tl.constexpr):
    "Rows of whose length and place the compiler knows nothing."
    o_b, o_d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(p_y + o_b * D + o_d, tl.load(p_x + o_b * stride + o_d, mask=o_d < D), mask=o_d < D)

@triton.jit
def loads_a_half(p_x, p_y, D: tl.constexpr, stride: tl.constexpr, BLOCK: tl.constexpr):
    "The same, but for where the first begins."
    o_b, o_d = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(p_y + o_b * D + o_d, tl.load(p_x + o_b * stride + o_d, mask=o_d < D), mask=o_d < D)

for target in kernels.TARGETS:
    x = kernels.tensor(1 << 16)
    half, rows = kernels.tensor(64, 100).chunk(2, dim=1)[1], kernels.tensor(64, 50)
    for call in (
        lambda: spills[(1,)](x, BLOCK=1 << 16, num_warps=128 // kernels.TARGETS[target][2]),
        lambda: loads_scalars[(1,)](x, kernels.tensor(1 << 16), 7, BLOCK=4096),
        lambda: loads_rows[(1,)](kernels.tensor(64, 50), rows, 50, 50, BLOCK=64),
        lambda: loads_a_half[(1,)](half, rows, 50, 100, BLOCK=64),
    ):
        (launch,) = kernels.recorded(call)
        print(json.dumps(dataclasses.asdict(kernels.report(*launch, target, "planted"))))
"""


def _run(*arguments: str, file: pathlib.Path | None = None) -> list[kernels.Report]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    run = subprocess.run(
        [sys.executable, *([file] if file else ["-m", "tools.kernels", "--json"]), *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [kernels.Report(**json.loads(line)) for line in run.stdout.splitlines()]


# Launches of a training step that read and write each element once.
ONCE = ("float32 [1, 65536, 64]", "float32 [1, 8192, 784]", "196608]")


@pytest.fixture(scope="module")
def kept(pytestconfig, tmp_path_factory):
    """Return the folder of cached reports, kept between runs if pytest has a cache."""
    cache = getattr(pytestconfig, "cache", None)
    return tmp_path_factory.mktemp("kernels") if cache is None else cache.mkdir("kernels")


@pytest.fixture(scope="module")
def reports(kept):
    return _reports(kept, "launches", "--count", f"sm_90.*({'|'.join(map(re.escape, ONCE))})")


@pytest.fixture(scope="module")
def planted(kept, tmp_path_factory):
    # Triton reads a kernel's source from its file.
    file = tmp_path_factory.mktemp("planted") / "planted.py"
    file.write_text(PLANTED)
    return _reports(kept, "planted", file=file)


def _reports(
    folder: pathlib.Path, name: str, *arguments: str, file: pathlib.Path | None = None
) -> list[kernels.Report]:
    """Return reports, computed once per code and compiler, also if several processes run the tests."""
    sources = [*sorted((ROOT / "kernels").rglob("*.py")), ROOT / "tools" / "kernels.py"]
    code = [triton.__version__, *arguments, *(f.read_text() for f in sources), PLANTED]
    key = hashlib.blake2b("\n".join(code).encode(), digest_size=8).hexdigest()
    found = folder / f"{name}-{key}.json"
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            made = json.dumps([dataclasses.asdict(r) for r in _run(*arguments, file=file)])
            for old in folder.glob(f"{name}-*.json"):
                old.unlink()
            found.write_text(made)
    return [kernels.Report(**r) for r in json.loads(found.read_text())]


def spilling(reports):
    return [f"{r.target}: {r.launch}: {r.spills}" for r in reports if r.spills]


# Small arguments compared with their summands: one number per row, per column, or for a few rows in all.
SUMS = {
    *("p_kl", "p_log_ratio", "p_grad_kl", "p_grad_log_ratio", "p_weight"),
    *("p_out", "p_grad", "p_bound", "p_maximum", "p_total", "p_log_q", "p_grad_log_q"),
}
# Products' tiles: loaded into registers via shared memory.
PRODUCTS = (
    "linear_log_prob_kernel",
    "chain_log_prob_kernel",
    "rsample_tril_kernel",
    "rsample_tril_backward_kernel",
)
FEW_ROWS = "[50, 4, 32]"
# Likelihoods with gamma functions, or with four exponentials.
HEAVY = ("negative_binomial", "beta_log_prob", "beta_bound", "discretized_logistic")
# One number per row, read by all lanes of the row at once; the stride is the row's length.
OF_A_ROW = {
    *(("mixture_kernel", "p_z"), ("mixture_shares_kernel", "p_z")),
    *(("mixture_rows_kernel", "p_share"), ("mixture_components_kernel", "p_share")),
    *(("prepare_kernel", "p_constant"), ("aggregate_kernel", "p_z"), ("aggregate_shares_kernel", "p_z")),
    # Of a batch, whose size is not known to the compiler: masked one by one.
    *(("aggregate_kernel", "p_constant"), ("aggregate_shares_kernel", "p_constant")),
    *(("aggregate_rows_kernel", "p_share"), ("aggregate_components_kernel", "p_share")),
    # Of a row: a bound's gradient, its weights, and the gradient of its term.
    *(("log_prob_flat_backward_kernel", f"p_{name}") for name in ("weights", "beta", "grad_term", "grad_kl")),
    # Of a position: its class, the logit of that class, and its log-sum.
    *(("classes_kernel", name) for name in ("p_x", "p_a", "p_normaliser")),
    *(("classes_backward_kernel", name) for name in ("p_x", "p_normaliser")),
    *(("multinomial_kernel", "p_coefficient"), ("multinomial_kernel", "p_normaliser")),
    ("multinomial_backward_kernel", "p_normaliser"),
    # Bytes, as many as a thread has numbers.
    *(("multinomial_kernel", "p_mask"), ("multinomial_backward_kernel", "p_mask")),
}
# Kernels of which a thread of a wavefront of 64 may take two numbers, or rows of 50, which allow 8 bytes.
FEW_LANES = (
    *("mixture_kernel", "mixture_shares_kernel", "mixture_rows_kernel"),
    *("aggregate_kernel", "aggregate_marginals_kernel"),
    *("aggregate_rows_kernel", "aggregate_components_kernel"),
)
# Ten components in two dimensions are fewer numbers than threads.
FEW_COMPONENTS = "[5000, 10, 2]"


def narrow(reports):
    """Return large arguments accessed by fewer bytes than their alignment allows, up to 16."""
    return [
        f"{r.target}: {r.launch}: {name}"
        for r in reports
        for name in r.narrow
        if name not in SUMS
        and FEW_ROWS not in r.launch
        # Parts of the sum over a tile's rows, one number per thread.
        and not (name in ("p_grad_p1", "p_grad_p2") and "[1, 1, 784]" in r.launch)
        # With the sums of a learned prior (which the chunked launches lack) four numbers per thread.
        and not (
            r.kernel == "rsample_backward_kernel"
            and ("bfloat16" in r.launch and "chunked" not in r.launch)
            and r.widths.get(name) == 8
        )
        and "float64" not in r.launch
        # Where a table's columns begin is not known to the compiler.
        and "of 20 columns" not in r.launch
        # Tiles of a product via shared memory: two numbers per thread or more.
        and not (r.kernel in PRODUCTS and r.widths.get(name) in (8, None))
        # Rows of a packed triangle are unaligned.
        and name not in ("p_tril", "p_grad_tril")
        and (r.kernel, name) not in OF_A_ROW
        and not (FEW_COMPONENTS in r.launch and r.kernel in ("prepare_kernel", "mixture_components_kernel"))
        # In a wavefront of 64 each thread has two of 128 components, or a row of two dimensions.
        and not (r.target == "gfx942" and r.kernel in FEW_LANES and r.widths.get(name) == 8)
        # The parts of one number, a batch's bound.
        and not (r.kernel == "sum_kernel" and r.launch.startswith("reduce "))
        # Bound by arithmetic, with two elements per thread.
        and not any(name in r.launch for name in HEAVY)
    ]


def test_a_planted_spill_is_flagged(planted):
    assert len(spilling(r for r in planted if r.kernel == "spills")) == len(kernels.TARGETS)


def test_a_planted_scalar_load_is_flagged(planted):
    scalar = [r for r in planted if r.kernel == "loads_scalars"]
    assert {r.target for r in scalar if narrow([r])} == set(kernels.TARGETS)
    assert all(set(r.widths.values()) == {4} for r in scalar)


def test_planted_scalar_loads_of_50_columns_are_flagged(planted):
    """Scalar loads are flagged for rows of 50, which allow 8 bytes, also in a half offset by 8 bytes."""
    rows, half = ([r for r in planted if r.kernel == name] for name in ("loads_rows", "loads_a_half"))
    assert {r.target for r in rows if narrow([r])} == set(kernels.TARGETS)
    for r in half:
        if r.target != "gfx942":  # for which only the widest access of all is reported
            assert r.widths == {"p_x": 4, "p_y": 8} and r.narrow == ["p_x"]


def test_no_kernel_spills(reports):
    assert not spilling(reports)


def test_loads_and_stores_are_wide(reports):
    """Rows are read and written by as many bytes as their alignment allows, per argument on NVIDIA."""
    assert not narrow(reports)


def test_every_kernel_is_compiled_for_every_target(reports):
    names = {
        line.split("(")[0].removeprefix("def ")
        for file in (ROOT / "kernels").glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
    }
    assert len(names) >= 10
    for target in kernels.TARGETS:
        assert names <= {r.kernel for r in reports if r.target == target}


def test_registers_allow_a_quarter_of_the_threads(reports):
    """Registers suffice for a quarter of a multiprocessor's threads."""
    for r in reports:
        # A product keeps tiles in registers and uses all of them.
        least = 0.125 if r.kernel in PRODUCTS else 0.25
        assert r.occupancy >= least or "float64" in r.launch, r


def test_draws_of_full_covariance_do_not_use_tf32():
    """No product uses TF32, as Triton 3.7 would for some on sm_100 in spite of "ieee"."""
    script = """
import torch
from tools import kernels
for label, call in kernels.full_launches((torch.float32, torch.bfloat16)):
    for kernel, arguments, options, _ in kernels.recorded(call):
        for target in ("sm_80", "sm_90", "sm_100"):
            print("tf32" in kernels.compiled(kernel, arguments, options, target).asm["ptx"], target, label)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    lines = run.stdout.splitlines()
    assert len(lines) > 50 and not [line for line in lines if line.startswith("True")]


def test_shared_memory_suffices(reports):
    assert not [r for r in reports if r.shared > kernels.SHARED[r.target]]


def test_arithmetic_is_not_the_limit(reports):
    """A training step's kernels issue fewer instructions than an H100 can while it copies as many bytes.

    132 multiprocessors × 128 lanes × 1.755 GHz, at 3 TB/s.
    """
    counted = [r for r in reports if r.target == "sm_90" and any(s in r.launch for s in ONCE)]
    assert len(counted) > 10
    for r in counted:
        # With one sample nothing amortises the functions of a count or of degrees of freedom, a logarithm and
        # Stirling's series; nor a softplus and its logarithm.
        costly = r.launch.startswith(("poisson_log_prob ", "student_t_log_prob ")) or ", softplus" in r.launch
        # Bound by arithmetic, as in plain PyTorch.
        most = 75 if any(name in r.launch for name in HEAVY) else 15 if costly else 9.9
        assert r.instructions < most * r.bytes, r


def test_one_program_for_every_batch():
    """A new B or K compiles nothing: programs differ only by alignment."""
    script = """
from tools import kernels
from fastvae.kernels import aggregate, normal_full, logsumexp, normal_diagonal, likelihood, mixture, reduce
from fastvae.likelihoods.declared import DECLARED
from fastvae.ops.normal_full import Draw as Place
from fastvae.ops.normal_arguments import Draw
from fastvae.ops.reduce import BoundReduction
how = BoundReduction(-1.0, "log_mean_exp", "mean")
seed = kernels.tensor(dtype=kernels.torch.int64)
found = {}
for b in range(2, 130):
    for k in (1, 2, 5, 16, 50, 51):
        for d in (64, 50):
            t = lambda *s: kernels.tensor(*s)
            a = t(b, d), t(b, d), None, None, seed, Draw(k, 0, 0, float("-inf"), float("inf"))
            need = [True, True, False, False]
            f = t(b, d), t(b, d * (d + 1) // 2), seed, Place(k, 0, 0)
            components = t(500, d), t(500, d), t(500)
            for call in (
                lambda: normal_full.rsample_tril(*f),
                lambda: normal_full.rsample_tril_backward(t(k, b, d), t(k, b), *f, [True, True]),
                lambda: normal_diagonal.rsample_kl(*a, False),
                lambda: normal_diagonal.rsample_log_ratio(*a, "iwae"),
                lambda: normal_diagonal.rsample_kl_backward(t(k, b, d), t(b), *a, need),
                lambda: normal_diagonal.rsample_log_ratio_backward(
                    t(k, b, d), t(k, b), None, *a, False, need
                ),
                *(
                    call
                    for name, declared in DECLARED.items()
                    for given in ([t(k, b, d)] * len(declared.outputs),)
                    for call in (
                        lambda l=declared, g=given: likelihood.log_prob(l, t(b, d), None, *g),
                        lambda l=declared, g=given: likelihood.log_prob_backward(
                            l, t(k, b), t(b, d), None, *g, [False] + [True] * len(g)
                        ),
                    )
                ),
                lambda: mixture.mixture_log_prob(t(k * b, d), *components),
                lambda: mixture.mixture_log_prob_backward(
                    *[t(k * b)] * 3, t(k * b, d), *components, [True] * 4
                ),
                lambda: aggregate.aggregate_log_prob(t(k * b, d), t(b, d), t(b, d), 200),
                lambda: aggregate.aggregate_log_prob_backward(
                    *[t(k * b), t(k * b, d)] * 2, t(k * b, d), t(b, d), t(b, d), 200, [True] * 3
                ),
                lambda: logsumexp.log_mean_exp(t(k, b)),
                lambda: reduce.reduce(t(k, b), t(k, b), None, how, True),
                lambda: reduce.reduce_backward(t(), None, t(k, b), None, how, k, b, 2),
            ):
                for kernel, arguments, options, _ in kernels.recorded(call):
                    blocks = tuple(v for n, v in arguments.items() if n.startswith("BLOCK"))
                    key = str(kernels.specialisation(kernel, arguments)) + str(options)
                    twin = str(arguments.get("VALUE", arguments.get("GRADIENT")))
                    found.setdefault((kernel.__name__, twin, d, blocks), set()).add(key)
for name, keys in sorted(found.items()):
    print(len(keys), *name)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-4000:]
    lines = run.stdout.splitlines()
    print(run.stdout)
    assert max(int(line.split()[0]) for line in lines) <= 4
