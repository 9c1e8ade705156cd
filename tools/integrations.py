"""``python -m tools.integrations [ARGUMENTS]``: tests against the real libraries, in another environment.

The first use builds it from the extras of pyproject.toml, in the user's cache. Arguments are pytest's. The
extension is that of this checkout, which ``pip install -e .`` has built.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTRAS = ("demo", "scvi", "pythae", "diffusers", "pyro", "lightning")
TESTS = ("torch", "pytest", "pytest-xdist", "hypothesis", "scipy")
# Set in the tests' environment.
ACTIVE = "FASTVAE_INTEGRATIONS"


def is_active() -> bool:
    """Return True in the environment of the integrations."""
    return bool(os.environ.get(ACTIVE))


def requirements() -> list[str]:
    """Return the requirements of the extras, and those of the tests with their versions."""
    text = (ROOT / "pyproject.toml").read_text()
    tests = re.search(r"^test = \[(.*?)^\]", text, re.M | re.S)[1]  # type: ignore[index]
    every = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)[1]  # type: ignore[index]
    found = re.findall(r'"(.*?)"', every)
    for extra in EXTRAS:
        listed = re.search(rf"^{extra} = \[(.*?)\]", text, re.M | re.S)[1]  # type: ignore[index]
        found += re.findall(r'"(.*?)"', listed)
    return found + [re.search(rf'"({name}[=><][^"]*)"', tests)[1] for name in TESTS]  # type: ignore[index]


def environment() -> Path:
    """Return the Python of the environment, built if it is missing or out of date."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "fastvae")
    folder = cache / f"integrations-{sys.version_info.major}.{sys.version_info.minor}"
    stamp, python = folder / "integrations.txt", folder / "bin" / "python"
    text = "\n".join([sys.version, *requirements()])
    if not (stamp.exists() and stamp.read_text() == text):
        print(f"integrations: installing into {folder}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        subprocess.run([*pip, *requirements()], check=True)
        stamp.write_text(text)
    return python


def main() -> int:
    python = environment()
    # One thread each: small models on two threads wait for each other on two cores.
    variables = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg", ACTIVE: "1"}
    arguments = sys.argv[1:] or ["-n", "2", "tests/integrations"]
    command = [str(python), "-m", "pytest", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}).returncode


if __name__ == "__main__":
    sys.exit(main())
