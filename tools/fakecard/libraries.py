"""Stand-ins for NVIDIA's libraries: those of ``runtime.cpp``, and stubs of all others.

Torch links against them by name and version of every symbol, so the stubs are generated from what its own
libraries leave undefined. Creating a handle succeeds, a matrix product is counted as a launch, and everything
else returns 0, success.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

SOURCE = Path(__file__).with_name("runtime.cpp")
STUBBED = ("cublas", "cublasLt", "cudnn", "cufft", "cufile", "cupti", "curand", "cusolver", "cusparse",
           "cusparseLt", "nccl", "nvrtc", "nvshmem_host")  # fmt: skip
# Libraries whose symbols carry no version: they are known by their prefix.
PREFIXES = {
    "cublasLt": "cublasLt", "cufile": "cuFile", "cusparseLt": "cusparseLt", "nccl": "nccl", "nvrtc": "nvrtc",
    "nvshmem_host": "nvshmem",
}  # fmt: skip
# What cudnn and the like report; torch compares the major versions with those it was compiled with.
VERSION = 92000


def build(torch_libraries: Path, include: Path, out: Path) -> None:
    """Compile all stand-ins into a folder.

    Args:
        torch_libraries: folder of torch's own shared libraries.
        include: folder of CUDA's headers.
        out: folder for the results, which exists.
    """
    needed, symbols = _needs(torch_libraries)
    (runtime,) = (n for n in needed if n.startswith("libcudart.so"))
    _build_runtime(runtime, symbols, include, out)
    for library in sorted(needed):
        stem = library.partition(".")[0].removeprefix("lib")
        if stem in STUBBED:
            _build_stub(library, _own(library, stem, symbols), out)


def _needs(folder: Path) -> tuple[set[str], set[tuple[str, str]]]:
    """Return the libraries that torch's are linked against, and the undefined (symbol, version)."""
    needed: set[str] = set()
    symbols: set[tuple[str, str]] = set()
    for library in sorted(folder.glob("*.so*")):
        needed |= set(re.findall(r"NEEDED.*\[(.*)\]", _run("readelf", "--dynamic", library)))
        for line in _run("nm", "--dynamic", "--undefined-only", library).splitlines():
            name, _, version = line.split()[-1].partition("@")
            symbols.add((name, version.lstrip("@")))
    return needed, symbols


def _own(library: str, stem: str, symbols: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the symbols of one library, and each one's version."""
    prefix = PREFIXES.get(stem)
    return {
        name: version
        for name, version in sorted(symbols)
        if version == library
        or (stem == "nvshmem_host" and version == "NVSHMEM")
        or (not version and prefix and name.startswith(prefix))
    }


def _build_runtime(library: str, symbols: Iterable[tuple[str, str]], include: Path, out: Path) -> None:
    """Compile the runtime, with the driver in it, and an empty driver that links to it."""
    compiled = out / "runtime.o"
    _run("g++", "-std=c++17", "-O2", "-fPIC", "-c", f"-I{include}", SOURCE, "-o", compiled)
    defined = {
        line.split()[-1] for line in _run("nm", "--defined-only", "--extern-only", compiled).splitlines()
    }
    other = re.compile("|".join(f"cu{s[2:]}" for s in STUBBED if s.startswith("cu")) + "|cuFile")
    missing = {
        name
        for name, version in symbols
        if re.match(r"(__)?cuda[A-Z]|cu[A-Z]", name)
        and (version == library or (not version and not other.match(name)))
    }
    # Loud instead of silent: whoever meets one adds it to runtime.cpp.
    body = ["#include <stdio.h>"]
    for name in sorted(missing - defined):
        text = (
            f'fputs("fake card: {name} is not implemented; add it to tools/fakecard/runtime.cpp\\n", stderr)'
        )
        body.append(f"int {name}(void) {{ {text}; return 801; }}")
    (out / "missing.c").write_text("\n".join(body) + "\n")
    (out / "runtime.map").write_text(f"{library} {{ global: cuda*; __cuda*; cu*; fakecard_*; local: *; }};\n")
    _run("gcc", "-O1", "-fPIC", "-c", "-w", out / "missing.c", "-o", out / "missing.o")
    _run(
        "g++", "-shared", compiled, out / "missing.o", "-o", out / library, f"-Wl,-soname,{library}",
        f"-Wl,--version-script={out / 'runtime.map'}", "-ldl",
    )  # fmt: skip
    (out / "empty.c").write_text("")
    _run(
        "gcc", "-shared", "-fPIC", out / "empty.c", "-o", out / "libcuda.so.1", "-Wl,-soname,libcuda.so.1",
        "-Wl,--no-as-needed", f"-L{out}", f"-l:{library}",
    )  # fmt: skip
    (out / "libcuda.so").symlink_to("libcuda.so.1")
    (out / "libfakecard.so").symlink_to(library)


def _build_stub(library: str, symbols: dict[str, str], out: Path) -> None:
    body = ["#include <stddef.h>", "#include <string.h>", "int fakecard_library(const char*);"]
    body += [_stub(name) for name in symbols]
    source, script = out / f"{library}.c", out / f"{library}.map"
    source.write_text("\n".join(body) + "\n")
    versions = sorted({v for v in symbols.values() if v})
    script.write_text("".join(f"{v} {{ global: *; }};\n" for v in versions) or "{ global: *; };\n")
    _run(
        "gcc", "-O1", "-fPIC", "-w", "-shared", source, "-o", out / library, f"-Wl,-soname,{library}",
        f"-Wl,--version-script={script}", "-Wl,--allow-shlib-undefined",
    )  # fmt: skip


def _stub(name: str) -> str:
    """Return the C of one function."""
    if name == "cublasLtMatmulAlgoGetHeuristic":
        # One algorithm is found, which needs no workspace.
        given = (
            "void* a, void* b, void* c, void* d, void* e, void* f, void* g, int asked, char* found, int* n"
        )
        return f"int {name}({given}) {{ memset(found, 0, 64); *n = 1; return 0; }}"
    if re.search(r"Create(_v2)?$", name):
        return f"int {name}(void** handle) {{ if (handle) *handle = (void*)64; return 0; }}"
    if re.search(r"[Gg]em[mv]|cublasLtMatmul$|Ddot|Sdot|dotEx|DotEx", name):
        return f'int {name}(void) {{ return fakecard_library("{name}"); }}'
    if re.search(r"String|Name", name):
        return f'const char* {name}(int code) {{ return "fake card"; }}'
    if name == "ncclGetVersion":
        return f"int {name}(int* v) {{ *v = {VERSION}; return 0; }}"
    if re.search(r"[vV]ersion", name):
        return f"long {name}(void) {{ return {VERSION}; }}"
    return f"long {name}(void) {{ return 0; }}"


def _run(*command: object) -> str:
    run = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(
            f"fake card: `{' '.join(map(str, command))}` failed with {run.returncode}: {run.stderr[-2000:]}"
        )
    return run.stdout
