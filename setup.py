"""Build fastvae._C and install kernels/ as fastvae.kernels.

The extension is pybind11 and the C++ standard library, without libtorch. With FASTVAE_NO_EXTENSION=1 in the
environment it is left out; FASTVAE_JOBS limits the compilers that run at a time.
"""

import glob
import os
import re
import runpy
import shutil
import sys

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

# The instruction set is chosen at run time (see targets.hpp), so nothing here names one. No OpenMP runtime
# is linked: torch's serves (see parallel.hpp).
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-g0"]
# What some compilers refuse. -fschedule-insns spreads chains of operations that wait for each other: noise is
# made 20 % faster. -fno-thread-jumps keeps GCC from computing a clipped argument's two ends apart and
# blending the results: 5 to 20 instructions of a loop.
OPTIONAL_FLAGS = ["-fopenmp-simd", "-fschedule-insns", "-fno-thread-jumps", "--param=inline-unit-growth=1000"]


def stop(problem):
    sys.exit(
        f"fastvae: {problem} Or install fastvae without its C++, by FASTVAE_NO_EXTENSION=1 in this command's "
        "environment: plain PyTorch then computes on CPU tensors, correct and slower."
    )


class BuildExt(build_ext):
    """build_ext that leaves out flags unknown to the compiler and, for want of one, says what to install."""

    def build_extensions(self):
        if self.compiler.compiler_type == "msvc":
            stop("the CPU kernels use vector types of GCC and clang, which Microsoft's compiler lacks.")
        if self.compiler.compiler_type == "unix":
            # Older versions of setuptools compile C++ with the C compiler's command.
            compiler = getattr(self.compiler, "compiler_so_cxx", self.compiler.compiler_so)[0]
            for command in (compiler, self.compiler.compiler_cxx[0]):
                if shutil.which(command) is None:
                    stop(
                        f"no C++ compiler found (looked for {command!r}). fastvae's CPU kernels are C++17: "
                        "install one, for example `apt-get install g++` (Debian, Ubuntu), `dnf install "
                        "gcc-c++` (Fedora) or `conda install cxx-compiler`, or name yours in the environment "
                        "variables CC and CXX, and try again."
                    )
        from pybind11.setup_helpers import ParallelCompile, has_flag

        units = runpy.run_path("csrc/generate.py")["write"](self.build_temp)
        for extension in self.extensions:
            extension.extra_compile_args += [f for f in OPTIONAL_FLAGS if has_flag(self.compiler, f)]
            extension.include_dirs.append(self.build_temp)
            extension.sources += map(str, units)
        with ParallelCompile("FASTVAE_JOBS"):  # as many as there are processors, without this variable
            super().build_extensions()


def extensions():
    if os.environ.get("FASTVAE_NO_EXTENSION", "0") not in ("", "0"):
        return []
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        stop("pybind11 is needed to build the CPU kernels: `pip install pybind11`, and try again.")
    return [
        Pybind11Extension(
            "fastvae._C",
            ["csrc/bindings.cpp"],
            include_dirs=["csrc"],
            depends=sorted(glob.glob("csrc/**/*.hpp", recursive=True)),
            cxx_std=17,
            extra_compile_args=FLAGS,
        )
    ]


def read(name):
    with open(name, encoding="utf-8") as file:
        return file.read()


def description(version):
    """Return the README with the repository's files linked at the version's tag, for readers elsewhere.

    Variants of pictures for dark pages are left out, since the package index has light ones alone.
    """
    at = f"https://github.com/fastvae/fastvae/{{}}/v{version}/".format

    def absolute(link):
        return f"{link[1]}{at('raw' if link[2].endswith('.png') else 'blob')}{link[2]}{link[3]}"

    text = re.sub(r"^ *<source .*>\n", "", read("README.md"), flags=re.M)
    return re.sub(r"""(\]\(|src=")([\w./-]+\.(?:md|png|csv|cff)(?:#[\w-]*)?)(\)|")""", absolute, text)


# Stated there alone: an import needs no installed metadata, and names the code that runs.
VERSION = re.search(r'^__version__ = "(.+)"$', read("fastvae/__init__.py"), re.M)[1]

setup(
    version=VERSION,
    long_description=description(VERSION),
    long_description_content_type="text/markdown",
    # Not in pyproject.toml: no form of the field there is valid both before and after setuptools 77.
    license="MIT",
    packages=[
        *find_packages(include=["fastvae", "fastvae.*"], exclude=["fastvae.kernels", "fastvae.kernels.*"]),
        "fastvae.kernels",
        "fastvae.kernels.likelihoods",
    ],
    package_dir={"fastvae.kernels": "kernels"},
    package_data={"fastvae": ["py.typed", "ops/_declared.pyi"]},
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExt},
)
