"""The fake card's environment: a virtual environment with torch's CUDA build, and the stand-in libraries."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from . import DEVICES, LIBRARIES, libraries

ROOT = Path(__file__).parents[2]
TORCH = "2.13.0"
# What torch, the tests and the benchmarks import; torch brings its own Triton's version. The tests' tools are
# those of pyproject.toml.
PACKAGES = ("filelock", "fsspec", "jinja2", "matplotlib", "networkx", "numpy", "pybind11",
            "setuptools>=77.0.3", "sympy", "tqdm", "typing_extensions")  # fmt: skip
TESTS = ("pytest", "pytest-xdist", "hypothesis", "scipy")


def default_folder() -> Path:
    """Return the folder that is built in where none is given, in the user's cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastvae", "fakecard")


def build(folder: Path, torch: str = TORCH) -> dict[str, str]:
    """Build what is missing or out of date, and return the environment's variables for a command.

    Args:
        folder: folder of all environments; half a minute and 2.3 GB for each version of torch.
        torch: version of torch. Default: that of the tests.
    """
    for program in ("gcc", "g++", "nm", "readelf"):
        if shutil.which(program) is None:
            raise RuntimeError(f"fake card: {program} was not found; install GCC and binutils, and try again")
    own = folder.resolve() / f"torch-{torch}"
    own.mkdir(parents=True, exist_ok=True)
    with _locked(own / "lock"):
        python = _virtual_environment(own / "venv", torch)
        found = _stand_ins(own, _headers(own / "headers", python))
        _extension(python)
    return _variables(own, found)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one process at a time build."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _virtual_environment(folder: Path, torch: str) -> Path:
    """Return the Python of a virtual environment with torch's CUDA build and without NVIDIA's packages."""
    wanted = [*PACKAGES, *_pinned(TESTS)]
    stamp, python = folder / "fakecard.txt", folder / "bin" / "python"
    text = "\n".join([sys.version, torch, *wanted])
    if stamp.exists() and stamp.read_text() == text:
        return python
    _say(f"installing torch {torch} into {folder}")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = _pip(python)
    # Three `=`: with two, a CPU build of the same version (2.13.0+cpu), where an index has one, wins.
    subprocess.run([*pip, "--no-deps", f"torch==={torch}"], check=True)
    (requirement,) = re.findall(r"^Requires-Dist: (triton==[\w.]+)", _metadata(folder), re.M)
    subprocess.run([*pip, "--no-deps", requirement], check=True)
    # It would warn that NVIDIA's packages, which torch requires, are missing.
    subprocess.run([*pip, "--no-warn-conflicts", *wanted], check=True)
    stamp.write_text(text)
    return python


def _pip(python: Path) -> list[str]:
    return [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]


def _pinned(names: tuple[str, ...]) -> list[str]:
    """Return the requirements of these names in pyproject.toml, with their versions."""
    text = (ROOT / "pyproject.toml").read_text()
    return [re.search(rf'"({re.escape(name)}[=><][^"]*)"', text)[1] for name in names]  # type: ignore[index]


def _site(folder: Path) -> Path:
    (site,) = folder.glob("lib/python*/site-packages")
    return site


def _metadata(folder: Path) -> str:
    (path,) = _site(folder).glob("torch-*.dist-info/METADATA")
    return path.read_text()


def _headers(folder: Path, python: Path) -> Path:
    """Return the folder of CUDA's headers, of the version that torch was compiled with.

    They are not in the virtual environment: torch would load the runtime that comes with them.
    """
    (version,) = re.findall(
        r"^Requires-Dist: cuda-toolkit\[.*?\]==(\d+\.\d+)", _metadata(python.parents[1]), re.M
    )
    if not folder.exists():
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        packages = [f"nvidia-cuda-{name}=={version}.*" for name in ("runtime", "crt")]
        subprocess.run([*_pip(python), "--no-deps", "--target", str(unfinished), *packages], check=True)
        unfinished.rename(folder)
    (include,) = folder.glob("nvidia/*/include")
    return include


def _stand_ins(own: Path, include: Path) -> Path:
    """Return the folder of the stand-ins of these sources; other checkouts' lie next to it."""
    sources = Path(libraries.__file__), libraries.SOURCE
    digest = hashlib.sha256(b"".join(p.read_bytes() for p in sources)).hexdigest()[:12]
    folder = own / f"lib-{digest}"
    if not folder.exists():
        _say(f"compiling the stand-ins into {folder}")
        site, unfinished = _site(own / "venv"), own / f"lib-{digest}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        libraries.build(site / "torch" / "lib", include, unfinished)
        unfinished.rename(folder)
    return folder


def _extension(python: Path) -> None:
    """Build the checkout's fastvae._C in place, as an editable install does, if Python finds none."""
    suffix = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    if not (ROOT / "fastvae" / f"_C{suffix}").exists():
        _say("compiling fastvae's own C++")
        subprocess.run(
            [python, "setup.py", "--quiet", "build_ext", "--inplace"], cwd=ROOT, check=True, stdout=sys.stderr
        )
    kernels = ROOT / "fastvae" / "kernels"
    if not kernels.exists():
        kernels.symlink_to(Path("..", "kernels"))


def _variables(own: Path, found: Path) -> dict[str, str]:
    (runtime,) = found.glob("libcudart.so.*")
    return {
        LIBRARIES: str(found),
        # Before torch's libraries: its own copies of NVIDIA's, if any, are not looked for.
        "LD_PRELOAD": f"{runtime}:{found / 'libcuda.so.1'}",
        "LD_LIBRARY_PATH": str(found),
        "TRITON_LIBCUDA_PATH": str(found),
        # Inductor decides on padding by timing products, which a card that is not there does not compute; the
        # timing crashes.
        "TORCHINDUCTOR_SHAPE_PADDING": "0",
        # Compiled kernels stay with the environment.
        "TRITON_CACHE_DIR": str(own / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(own / "inductor"),
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
        "PATH": os.pathsep.join([str(own / "venv" / "bin"), os.environ.get("PATH", os.defpath)]),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "VIRTUAL_ENV": str(own / "venv"),
    }


def environment(variables: dict[str, str], devices: int = 1) -> dict[str, str]:
    """Return the whole environment of a command, from this process's and the variables of :func:`build`."""
    left_out = ("PYTHONHOME", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
    kept = {name: value for name, value in os.environ.items() if name not in left_out}
    return {"OMP_NUM_THREADS": "1", **kept, **variables, DEVICES: str(devices)}


def _say(what: str) -> None:
    print(f"fake card: {what}", file=sys.stderr, flush=True)
