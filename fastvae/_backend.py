"""Which implementation of the ops runs: the choice, and what is available here."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import os
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
    # Such a wheel is pure Python. In the folder of an editable install fastvae.egg-info comes first, and has
    # no such file.
    wheels = (d.read_text("WHEEL") for d in metadata.distributions(name="fastvae"))
    return "Root-Is-Purelib: true" in next(filter(None, wheels), "")


# Whether fastvae was installed with FASTVAE_NO_EXTENSION=1, that is without its C++, on purpose.
LEFT_OUT = _left_out()

# Of this thread or task; others have their own. A backward pass may run in a thread of autograd's: it is told
# what its forward pass ran on.
_choice: contextvars.ContextVar[str | None] = contextvars.ContextVar("fastvae_backend", default=None)


def _check(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source}: unknown backend {name!r}; known: {', '.join(map(repr, BACKENDS))}")
    return name


def chosen() -> str:
    """The backend in force: the innermost :func:`use_backend`, else ``FASTVAE_BACKEND``, else "native"."""
    return _choice.get() or _default()


@functools.cache
def _default() -> str:
    return _check(os.environ.get("FASTVAE_BACKEND") or "native", "FASTVAE_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    r"""Choose the implementation of every op within a ``with`` block, in this thread or task.

    The backward pass of an op runs on the backend of its forward pass, wherever autograd calls it.
    Compiled code reads the choice again in each pass. The process has one default: ``FASTVAE_BACKEND``.

    Args:
        name: ``"native"`` (the default: C++ for CPU tensors, Triton for GPU tensors, plain PyTorch
            elsewhere), ``"reference"`` (plain PyTorch everywhere), or ``"triton"`` (Triton everywhere: on CPU
            tensors this needs Triton's interpreter, that is ``TRITON_INTERPRET=1`` set before triton is
            imported).

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
        # Not by a token, which only the task that made it can hand back: an asynchronous generator may be
        # closed by another.
        _choice.set(previous)


def run_on(name: str, function: Callable[..., _T], *args: Any) -> _T:
    """Call on this backend, whatever is in force here."""
    if chosen() == name:
        return function(*args)
    with use_backend(name):
        return function(*args)


def has_triton() -> bool:
    """Whether triton can be imported (it is not imported to find out)."""
    return importlib.util.find_spec("triton") is not None


def layer(backend: str, op_module: str) -> ModuleType:
    """The module that implements ``op_module`` in the reference or in Triton, imported when first needed."""
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
    """The backend for CPU tensors: that chosen, where "native" is "reference" if the C++ was left out."""
    name = _choice.get() or _default()
    return "reference" if LEFT_OUT and name == "native" else name


def on_gpu(device: torch.device) -> str:
    """The backend for tensors of a GPU: "triton", or "reference" if that is chosen or Triton knows it not."""
    name = chosen()
    return _native_on_gpu(device.index) if name == "native" else name


def on_device(device: torch.device, function: Callable[..., _T], args: tuple[Any, ...]) -> _T:
    """Call with this GPU as the current device: Triton launches there, whatever the tensors say."""
    if device.index == torch.cuda.current_device():
        return function(*args)
    with torch.cuda.device(device):
        return function(*args)


@functools.cache
def _native_on_gpu(index: int) -> str:
    # Triton's own limit; AMD's cards have other numbers, and those it does not know it refuses by name.
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
    """The C++ extension; torch, imported before it, shares its OpenMP runtime with it."""
    if LEFT_OUT:
        raise RuntimeError(
            "fastvae: the C++ extension was left out on purpose, by FASTVAE_NO_EXTENSION=1; to have it, "
            "install fastvae again without that variable."
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
    """A function of the C++; where that cannot be had, one that says why when it is called."""
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
