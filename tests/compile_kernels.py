"""Compiles every Triton kernel as it is launched, without a GPU, and reports its registers and spills.

Run by test_kernels_compile.py in a process of its own, ``python -m tests.compile_kernels``: with
TRITON_INTERPRET set, as the other tests need it, nothing can be compiled. The ops are called on meta
tensors of realistic shapes, and a launch is recorded instead of made, so block sizes, flags and
specialisation are those of the launcher and there is no second table to keep. Prints one JSON object a
line. Arguments are regular expressions that all must match "target label", to look at some kernels only.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch

if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)

import triton
import triton.language as tl
from fastvae.kernels import bernoulli, gaussian, importance, latent, random
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import ASTSource

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


@triton.jit
def planted_spill(p_x, BLOCK: tl.constexpr):
    """Keeps 512 elements a thread, beyond any register file: what the checker must flag."""
    o_x = tl.arange(0, BLOCK)
    b_x = tl.load(p_x + o_x)
    b_y = b_x
    for _ in range(8):
        b_y = b_y * b_x + tl.sum(b_y, axis=0)
    tl.store(p_x + o_x, b_y + b_x)


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches() -> Iterator[tuple[str, object]]:
    """A label and a call for every kernel, in the configurations that matter: dtypes, flags, shapes."""
    infinity = float("inf")
    seed = tensor(dtype=torch.int64)
    address = (seed, 50, 0, 0)
    free, clamped = (-infinity, infinity), (-10.0, 4.0)
    f32, bf16, f64 = torch.float32, torch.bfloat16, torch.float64

    yield "normal", lambda: random.normal(seed, 50, 128, 64)
    yield "normal, float64", lambda: random.normal(seed, 50, 128, 64, dtype=f64)
    yield "words", lambda: random.words(seed, 50, 128, 64)
    for dtype, prior, limits in ((f32, False, free), (bf16, True, clamped), (f64, True, free)):
        shapes = {f32: ((128, 64), (4, 32), (64, 2048)), bf16: ((128, 64), (64, 2048)), f64: ((128, 64),)}[
            dtype
        ]
        for b, d in shapes:
            q = (tensor(b, d, dtype=dtype), tensor(b, d, dtype=dtype))
            p = q if prior else (None, None)
            wide = f64 if dtype == f64 else f32
            grad_z, grad_ratio = tensor(50, b, d, dtype=dtype), tensor(50, b, dtype=wide)
            grad_kl = tensor(b, dtype=wide)
            need = [True, True, prior, prior]
            arguments = (*q, *p, *address, *limits)
            label = f"{str(dtype)[6:]} [50, {b}, {d}]"
            yield f"rsample_kl {label}", lambda a=arguments: latent.rsample_kl(*a, False)
            yield f"rsample_log_ratio {label}", lambda a=arguments: latent.rsample_log_ratio(*a, "iwae")
            yield (
                f"rsample_kl_backward {label}",
                lambda a=arguments, n=need, z=grad_z, g=grad_kl: latent.rsample_kl_backward(z, g, *a, n),
            )
            for path, weight in ((False, None), (True, grad_ratio)):
                yield (
                    f"rsample_log_ratio_backward {label}, path={path}",
                    lambda a=arguments, n=need, z=grad_z, g=grad_ratio, w=weight, p=path: (
                        latent.rsample_log_ratio_backward(z, g, w, *a, p, n)
                    ),
                )
    q = (tensor(128, 64), tensor(128, 64))
    yield (
        "rsample_kl float32 [1, 128, 64], per dimension",
        lambda: latent.rsample_kl(*q, None, None, seed, 1, 0, 0, *free, True),
    )
    # A likelihood's log variance: one per element, per pixel or per row; the gradients that are asked for
    # with it.
    full, column, row = (lambda k, b, x: (k, b, x)), (lambda k, b, x: (1, 1, x)), (lambda k, b, x: (1, 1, 1))
    for dtype, size, layouts in (
        (f32, (50, 128, 784), (full, column, row)),
        (bf16, (50, 128, 784), (full, column, row)),
        (f64, (50, 128, 784), (full, column, row)),
        (f32, (1, 4096, 64), (full, row)),
        (f32, (1, 65536, 64), (column,)),
        (f32, (1, 8, 150528), (full,)),
    ):
        k, b, pixels = size
        x, mean = tensor(b, pixels), tensor(*size, dtype=dtype)
        grad = tensor(k, b, dtype=f64 if dtype == f64 else f32)
        label = f"{str(dtype)[6:]} {list(size)}"
        yield f"bernoulli_log_prob {label}", lambda x=x, m=mean: bernoulli.bernoulli_log_prob(x, m)
        for need in ([False, True], [True, True]):
            yield (
                f"bernoulli_log_prob_backward {label}, need={need}",
                lambda g=grad, x=x, m=mean, n=need: bernoulli.bernoulli_log_prob_backward(g, x, m, n),
            )
        for layout in layouts:
            logvar = tensor(*layout(*size), dtype=dtype)
            need = [layout is column, True, True]
            suffix = f"{label}, logvar {list(logvar.shape)}"
            yield (
                f"gaussian_log_prob {suffix}",
                lambda x=x, m=mean, v=logvar: gaussian.gaussian_log_prob(x, m, v),
            )
            yield (
                f"gaussian_log_prob_backward {suffix}, need={need}",
                lambda g=grad, x=x, m=mean, v=logvar, n=need: gaussian.gaussian_log_prob_backward(
                    g, x, m, v, n
                ),
            )
    for dtype in (f32, bf16, f64):
        for k, n in ((5000, 128), (50, 65536)):
            log_w, column = tensor(k, n, dtype=dtype), tensor(n, dtype=f64 if dtype == f64 else f32)
            label = f"{str(dtype)[6:]} [{k}, {n}]"
            yield f"log_mean_exp {label}", lambda w=log_w: importance.log_mean_exp(w)
            yield (
                f"log_mean_exp_backward {label}",
                lambda w=log_w, c=column: importance.log_mean_exp_backward(c, w, c, c),
            )
    yield "planted spill", lambda: planted_spill[(1,)](tensor(1 << 16), BLOCK=1 << 16, num_warps=4)


def recorded(call) -> list[tuple]:
    """The kernels that a call would launch: (kernel, arguments by name, options)."""
    found = []

    def run(self, *args, grid, warmup, **kwargs):
        names = self.arg_names
        options = {n: v for n, v in kwargs.items() if n not in names}
        found.append((self, {**dict(zip(names, args, strict=False)), **kwargs}, options))

    original = triton.JITFunction.run
    triton.JITFunction.run = run
    try:
        call()
    finally:
        triton.JITFunction.run = original
    return found


def source(kernel, arguments: dict) -> ASTSource:
    """What the launcher would compile: types, constants, and what is known to be divisible by 16."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, arguments[parameter.name]
        specialize = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialize and type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if specialize and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def resources(compiled, target: GPUTarget) -> dict:
    """Registers a thread and bytes or registers spilled, by the assembler's own account."""
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]
        field = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", text).group(1))  # noqa: E731
        return {
            "registers": field("vgpr_count"),
            "spills": field("vgpr_spill_count") + field("sgpr_spill_count"),
            "loads": sorted(set(re.findall(r"\b(?:global|buffer)_load_\w+", text))),
        }
    ptx = compiled.asm["ptx"]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        arch = sm_arch_from_capability(target.arch)
        command = [get_ptxas(target.arch).path, "-v", f"-arch={arch}", file.name, "-o", os.devnull]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", text).group(1)),
        "spills": sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", text)),
        "loads": sorted(set(re.findall(r"\bld\.global[\w.]*", ptx))),
    }


def measured(job: tuple[str, int]) -> list[dict]:
    """Compile what one labelled call launches, for one target."""
    target_name, index = job
    target = TARGETS[target_name]
    label, call = list(launches())[index]
    reports = []
    for kernel, arguments, options in recorded(call):
        compiled = triton.compile(source(kernel, arguments), target=target, options=options)
        reports.append(
            {
                "kernel": kernel.__name__,
                "launch": label,
                "target": target_name,
                "shared": compiled.metadata.shared,
                **resources(compiled, target),
            }
        )
    return reports


def main() -> None:
    chosen = [re.compile(p) for p in sys.argv[1:]]
    # float64 once is enough: its registers are those of pairs, and nobody tunes it.
    jobs = [
        (target, i)
        for target in TARGETS
        for i, (label, _) in enumerate(launches())
        if (target == "sm_90" or "float64" not in label)
        and all(p.search(f"{target} {label}") for p in chosen)
    ]
    with ProcessPoolExecutor(min(4, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        for reports in pool.map(measured, jobs):
            for report in reports:
                print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
