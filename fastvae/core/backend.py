"""Selection of the ops' implementation (backend), and its availability."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib import metadata
from types import ModuleType
from typing import Any, TypeVar

import torch

_T = TypeVar("_T")

BACKENDS = ("native", "reference", "triton")


def _left_out() -> bool:
    if importlib.util.find_spec("fastvae._C") is not None:
        return False
    # A wheel built without the extension is pure Python. In the folder of an editable install
    # fastvae.egg-info is found first, and has no WHEEL file.
    wheels = (d.read_text("WHEEL") for d in metadata.distributions(name="fastvae"))
    return "Root-Is-Purelib: true" in next(filter(None, wheels), "")


# True for the pure-Python wheel, built with FASTVAE_NO_EXTENSION=1, deliberately without the C++ extension.
LEFT_OUT = _left_out()

_FASTER = (
    "For the C++ kernels, install a binary wheel (Linux on x86_64 or aarch64, macOS on arm64), or build from "
    "source with GCC or clang: `pip install --force-reinstall --no-deps --no-binary fastvae fastvae`, with "
    "FASTVAE_NO_EXTENSION unset."
)

# Local to a thread or task. A backward pass may run in an autograd thread, so ops pass it the backend of the
# forward pass.
_choice: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastvae_backend", default=None)


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; known: {', '.join(map(repr, BACKENDS))}")
    return name


def chosen() -> str:
    """Return the backend of the innermost :func:`use_backend`, else ``FASTVAE_BACKEND``, else "native"."""
    return _choice.get() or _default()


@functools.cache
def _default() -> str:
    return _check(os.environ.get("FASTVAE_BACKEND") or "native", "FASTVAE_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    r"""Choose the implementation of every op within a ``with`` block, in this thread or task.

    The backward pass of an op runs on the backend of its forward pass, whichever thread autograd uses.
    Compiled code reads the choice again in each pass. ``FASTVAE_BACKEND`` sets the default of the process.

    Args:
        name: ``"native"`` (the default: C++ for CPU tensors, Triton for GPU tensors, plain PyTorch
            elsewhere), ``"reference"`` (plain PyTorch everywhere), or ``"triton"`` (Triton everywhere: CPU
            tensors need Triton's interpreter, enabled by ``TRITON_INTERPRET=1`` before triton is imported).

    Raises:
        ValueError: for any other name.

    Example:
        >>> import torch, fastvae
        >>> mu, logvar = torch.zeros(2, 3), torch.zeros(2, 3)
        >>> with fastvae.use_backend("reference"):
        ...     z, kl = fastvae.ops.rsample_kl(mu, logvar)
        >>> kl
        tensor([0., 0.])
    """
    previous = _choice.get()
    _choice.set(_check(name, "use_backend"))
    try:
        yield
    finally:
        # Not by a token, which only the task that created it can reset: an asynchronous generator may be
        # closed by another task.
        _choice.set(previous)


def run_on(name: str, function: Callable[..., _T], *args: Any) -> _T:
    """Call a function with this backend, overriding the current choice."""
    if chosen() == name:
        return function(*args)
    with use_backend(name):
        return function(*args)


def has_triton() -> bool:
    """Return True if triton is installed, without importing it."""
    return importlib.util.find_spec("triton") is not None


def layer(backend: str, op_module: str) -> ModuleType:
    """Import the module that implements ``op_module`` in the reference or in Triton."""
    if backend == "reference":
        return importlib.import_module(f"fastvae.reference.{op_module}")
    if not has_triton():
        raise RuntimeError(
            "fastvae: these tensors are on a GPU, whose kernels need triton, which is not installed. "
            "Install it: `pip install 'fastvae[triton]'` (in fastvae's own folder: `pip install -e "
            "'.[triton]'`; on Windows: `pip install triton-windows`). Or run plain PyTorch instead: `with "
            "fastvae.use_backend('reference'):` or FASTVAE_BACKEND=reference."
        )
    return importlib.import_module(f"fastvae.kernels.{op_module}")


def on_cpu() -> str:
    """Return the backend for CPU tensors; "native" becomes "reference" without the C++ extension."""
    name = _choice.get() or _default()
    if not LEFT_OUT or name != "native":
        return name
    # Compiled code says it when it runs.
    if not torch.compiler.is_compiling():
        _warn_of_plain_pytorch()
    return "reference"


@functools.cache  # once a process
def _warn_of_plain_pytorch() -> None:
    warnings.warn(
        "fastvae: this is the pure-Python build, without the C++ extension, so plain PyTorch computes on CPU "
        f"tensors: correct, but slower. {_FASTER} FASTVAE_BACKEND=reference chooses plain PyTorch without "
        "this warning.",
        RuntimeWarning,
        stacklevel=_users_frame(),
    )


def _users_frame() -> int:
    """Return the ``stacklevel``, for the caller, of the innermost frame outside fastvae and torch."""
    folders = os.path.dirname(os.path.dirname(__file__)), os.path.dirname(torch.__file__)
    inside = tuple(folder + os.sep for folder in folders)
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level


def on_gpu(device: torch.device) -> str:
    """Return the backend for GPU tensors; "native" becomes "triton", or "reference" on an unsupported GPU."""
    name = chosen()
    return _native_on_gpu(device.index) if name == "native" else name


def is_native_on_gpu(device: torch.device) -> bool:
    """Return True if the native backend is in force, and is Triton on this GPU."""
    return (_choice.get() or _default()) == "native" and _native_on_gpu(device.index) == "triton"


def on_device(device: torch.device, function: Callable[..., _T], args: tuple[Any, ...]) -> _T:
    """Call with this GPU as the current device, where Triton launches regardless of the tensors' device."""
    if device.index == torch.cuda.current_device():
        return function(*args)
    with torch.cuda.device(device):
        return function(*args)


@functools.cache
def _native_on_gpu(index: int) -> str:
    # Triton's minimum. AMD GPUs are numbered differently, and Triton itself rejects unsupported ones.
    if torch.version.hip or torch.cuda.get_device_capability(index) >= (8, 0):
        return "triton"
    major, minor = torch.cuda.get_device_capability(index)
    warnings.warn(
        f"fastvae: {torch.cuda.get_device_name(index)} has compute capability {major}.{minor}, and Triton's "
        "kernels need 8.0 (A100, RTX 30) or newer: plain PyTorch is used there, which is slower. "
        "FASTVAE_BACKEND=reference chooses that without this warning.",
        RuntimeWarning,
        stacklevel=2,
    )
    return "reference"


@functools.cache
def extension() -> ModuleType:
    """Import the C++ extension, after torch, whose OpenMP runtime it shares."""
    if LEFT_OUT:
        raise RuntimeError(
            "fastvae: this is the pure-Python build (the py3-none-any wheel, or FASTVAE_NO_EXTENSION=1), "
            f"without the C++ extension. {_FASTER}"
        )
    try:
        return importlib.import_module("fastvae._C")
    except ImportError as error:
        raise RuntimeError(
            f"fastvae: the C++ extension fastvae._C could not be imported ({error}). Build it with `pip "
            "install -e .` in fastvae's folder (if fastvae is installed already, do not start Python in "
            "that folder), or run plain PyTorch instead: FASTVAE_BACKEND=reference."
        ) from error


def native(name: str) -> Callable[..., Any]:
    """Return a function of the C++ extension, or one that raises an explanation when called."""
    try:
        function: Callable[..., Any] = getattr(extension(), name)
        return function
    except (RuntimeError, AttributeError):
        return functools.partial(_call, name)


def _call(name: str, *args: Any) -> Any:
    function = getattr(extension(), name, None)
    if function is None:
        raise RuntimeError(
            f"fastvae: the C++ extension fastvae._C has no {name}: it was built from another version of "
            "fastvae. Build it again with `pip install -e .` in fastvae's folder."
        )
    return function(*args)
