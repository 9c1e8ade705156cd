"""The fake card's command and build, without the environment itself, which tests/gpu_host runs in."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tools import fakecard, integrations
from tools.fakecard import __main__ as command
from tools.fakecard import build, libraries


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Record builds in place of building; a list of (folder, version of torch)."""
    calls = []

    def instead(folder, torch):
        calls.append((folder, torch))
        return {"PATH": os.environ["PATH"], fakecard.LIBRARIES: "libraries"}

    monkeypatch.setattr(build, "build", instead)
    return calls


def test_the_command_runs_in_the_environment(built, monkeypatch, tmp_path):
    ran = []
    monkeypatch.setattr(os, "execvpe", lambda *given: ran.append(given))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(AssertionError, match="unreachable"):
        command.main(["--dir", str(tmp_path), "--devices", "3", "--", "python", "-m", "pytest", "--build"])
    ((program, arguments, environment),) = ran
    assert (program, arguments) == ("python", ["python", "-m", "pytest", "--build"])
    assert environment[fakecard.DEVICES] == "3" and environment[fakecard.LIBRARIES] == "libraries"
    assert "TRITON_INTERPRET" not in environment and environment["OMP_NUM_THREADS"]
    assert built == [(tmp_path, build.TORCH)]


def test_building_only(built):
    assert command.main(["--build", "--torch", "2.11.0"]) == 0
    assert built == [(build.default_folder(), "2.11.0")]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "a command is missing: give it after --, or --build"),
        (["--devices", "9", "--", "true"], "--devices is 9; expected a number from 1 to 8"),
    ],
)
def test_mistakes(built, arguments, message, capsys):
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert message in capsys.readouterr().err and not built


def test_versions_are_those_of_the_tests():
    assert f"torch=={build.TORCH}" in (build.ROOT / "pyproject.toml").read_text()
    assert all(re.match(r"[\w-]+[=>]=\d", requirement) for requirement in build._pinned(build.TESTS))


def test_a_failed_compiler_is_quoted(tmp_path):
    with pytest.raises(RuntimeError, match="`false` failed with 1"):
        libraries._run("false")


def test_stubs_compile(tmp_path):
    """A stub of each kind is a shared library with the symbols' versions."""
    symbols = dict.fromkeys(
        ("cublasCreate_v2", "cublasSgemm_v2", "cublasLtMatmulAlgoGetHeuristic", "cublasGetStatusString",
         "cublasLtGetVersion", "cublasSetStream_v2"),
        "libcublas.so.13",
    )  # fmt: skip
    libraries._build_stub("libcublas.so.13", symbols, tmp_path)
    found = libraries._run("nm", "--dynamic", "--defined-only", tmp_path / "libcublas.so.13")
    assert set(symbols) == set(re.findall(r" T (\w+)@@libcublas\.so\.13", found))


def test_control_says_how_to_run_it(monkeypatch):
    monkeypatch.delenv(fakecard.LIBRARIES, raising=False)
    code = "from tools.fakecard import control; control.counts()"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=build.ROOT)
    assert "run this as `python -m tools.fakecard -- python ...`" in run.stderr


def test_the_environment_of_the_integrations_has_pinned_libraries(monkeypatch):
    """Every extra of a library and every tool of the tests is installed, with its version."""
    found = integrations.requirements()
    names = {re.split("[=><]", r)[0] for r in found}
    for name in ("torch", "numpy", "scvi-tools", "pythae", "diffusers", "pyro-ppl", "lightning", "pytest"):
        assert name in names
    assert all(
        "==" in r for r in found if re.match("scvi|pythae|diffusers|pyro|lightning|accelerate|pytest", r)
    )
