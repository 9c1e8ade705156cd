"""``python -m tools.fakecard [options] -- COMMAND``: run a command with the fake card."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from . import build


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fakecard",
        usage="python -m tools.fakecard [options] -- COMMAND ...",
        description="Run a command with torch's CUDA build on a machine without a card: stand-ins answer all "
        "that torch and Triton ask of CUDA, and kernels are counted instead of run. The first use builds the "
        "environment.",
        epilog="Example: python -m tools.fakecard -- python -m benchmarks frontend --device cuda --cpu",
    )
    parser.add_argument(
        "--dir", type=Path, help=f"folder of the environment (default {build.default_folder()})"
    )
    parser.add_argument("--devices", type=int, default=2, help="number of cards (default 2, at most 8)")
    parser.add_argument("--torch", default=build.TORCH, help=f"version of torch (default {build.TORCH})")
    parser.add_argument("--build", action="store_true", help="build the environment only")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="command to run, after --")
    options = parser.parse_args(arguments)
    if not 1 <= options.devices <= 8:
        parser.error(f"--devices is {options.devices}; expected a number from 1 to 8")
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command and not options.build:
        parser.error("a command is missing: give it after --, or --build to build the environment only")
    variables = build.build(options.dir or build.default_folder(), options.torch)
    if options.build:
        return 0
    environment = build.environment(variables, options.devices)
    sys.stdout.flush()
    os.execvpe(command[0], command, environment)
    raise AssertionError("unreachable")


if __name__ == "__main__":
    sys.exit(main())
