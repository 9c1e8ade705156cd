"""Results of single batches: what an evaluation is put together from, saved, and exchanged between ranks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from .likelihoods import Likelihood
from .priors import Prior


class Part(NamedTuple):
    """One batch's results; the last axis of the second line's fields is its examples."""

    index: int  # of the batch
    digest: np.ndarray  # [16] bytes, of the data
    latent: np.ndarray  # [3, D]: posterior means' mean and sum of squared deviations, and the sum of the KL
    dims: int  # numbers in one example

    log_px: np.ndarray
    stderr: np.ndarray
    ess: np.ndarray
    khat: np.ndarray
    k: np.ndarray
    elbo: np.ndarray
    curve: np.ndarray  # [R, n]: the bound after each number of draws at which it is looked at


_PER_BATCH = ("index", "digest", "latent", "dims")


def pack(parts: list[Part]) -> dict[str, np.ndarray]:
    """As arrays that np.savez takes; parts must not be empty."""
    fields = {name: [getattr(p, name) for p in parts] for name in Part._fields}
    arrays = {name: np.stack([np.asarray(v) for v in fields.pop(name)]) for name in _PER_BATCH}
    arrays["sizes"] = np.array([len(p.log_px) for p in parts])
    return arrays | {name: np.concatenate(values, -1) for name, values in fields.items()}


def unpack(arrays: dict[str, np.ndarray]) -> list[Part]:
    """The parts again."""
    cuts = np.cumsum(arrays["sizes"])[:-1]
    fields = {
        name: list(arrays[name]) if name in _PER_BATCH else np.split(arrays[name], cuts, -1)
        for name in Part._fields
    }
    parts = [Part(*values) for values in zip(*fields.values(), strict=True)]
    return [p._replace(index=int(p.index), dims=int(p.dims)) for p in parts]


class Checkpoint:
    """A file of parts that is replaced as a whole, so that it is complete at any moment.

    Args:
        path: the file; other ranks write beside it.
        settings: what must be the same for the results to belong together.
        rank: this process's.
    """

    def __init__(self, path: str | os.PathLike, settings: dict[str, Any], rank: int):
        self.path = Path(path)
        self.settings = settings
        self.file = self.path if rank == 0 else self._beside(f"rank{rank}")
        self._saved = 0.0
        self._cost = 0.0
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint {self.path}: there is no folder {self.path.parent}")

    def _beside(self, mark: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.{mark}{self.path.suffix}")

    def files(self) -> list[Path]:
        """All that hold results of this evaluation."""
        return [
            p for p in (self.path, *sorted(self.path.parent.glob(self._beside("rank*").name))) if p.exists()
        ]

    def load(self) -> list[Part]:
        """The parts in :meth:`files`, refused if they were made with other settings."""
        parts: dict[int, Part] = {}
        for file in self.files():
            try:
                with np.load(file, allow_pickle=False) as data:
                    arrays = dict(data)
                made = json.loads(str(arrays.pop("settings")))
            except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
                raise ValueError(
                    f"checkpoint {file} is no checkpoint of fastvae.evaluate ({error}); give another name, "
                    f"or "
                    "delete it"
                ) from None
            self._compare(file, made)
            parts.update((p.index, p) for p in unpack(arrays))
        return list(parts.values())

    def _compare(self, file: Path, made: dict[str, Any]) -> None:
        for name in sorted(self.settings.keys() | made.keys()):
            was, now = made.get(name), self.settings.get(name)
            if name == "seed" and now is None:
                self.settings["seed"] = was
            elif was != now:
                values = "" if name == "weights" else f": {was!r} then, {now!r} now"
                raise ValueError(
                    f"checkpoint {file} was made with other {name}{values}. Give another name to start anew, "
                    f"or "
                    "delete it"
                )

    def save(self, parts: list[Part], *, now: bool = True) -> None:
        """Write the parts; without ``now`` only if saving has taken less than a twentieth of the time."""
        start = time.monotonic()
        if not parts or (not now and start - self._saved < 20 * self._cost):
            return
        handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.file.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, settings=json.dumps(self.settings), **pack(parts))
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, self.file)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise
        self._saved = time.monotonic()
        self._cost = self._saved - start


# What a callable is made of


def modules_of(function: Callable) -> list[nn.Module]:
    """The modules that a callable is, is a method of, holds as an attribute, or refers to by its closure or
    its globals.
    """
    found: dict[int, nn.Module] = {}

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            found[id(value)] = value
        elif isinstance(value, functools.partial):
            for v in (value.func, *value.args, *value.keywords.values()):
                visit(v, depth)
        elif inspect.ismethod(value):
            visit(value.__self__, depth)
        elif isinstance(value, (tuple, list, dict)) and depth:
            for v in value.values() if isinstance(value, dict) else value:
                visit(v, depth - 1)
        elif inspect.isfunction(value) and depth:
            with contextlib.suppress(ValueError):  # of a variable that is not set yet
                variables = inspect.getclosurevars(value)
                for v in (*variables.nonlocals.values(), *variables.globals.values()):
                    visit(v, depth - 1)
        elif depth and callable(value) and hasattr(value, "__dict__") and not inspect.isclass(value):
            visit(vars(value), depth)

    visit(function, 3)
    return list(found.values())


def digest(tensors: Iterable[Tensor]) -> np.ndarray:
    """[16] bytes that differ for other tensors."""
    found = hashlib.blake2b(digest_size=16)
    for t in tensors:
        t = t.detach().cpu().contiguous()
        found.update(f"{t.dtype}{tuple(t.shape)}".encode())
        found.update(t.reshape(-1).view(torch.uint8).numpy())
    return np.frombuffer(found.digest(), np.uint8).copy()


def weights_digest(*callables: Callable) -> str:
    """Of everything that the callables' modules keep."""
    tensors, names = [], []
    for function in callables:
        for module in modules_of(function):
            for path, part in module.named_modules():
                names.append(f"{path}:{type(part).__qualname__}")
                if isinstance(part, (Likelihood, Prior)):
                    # Such as a fixed scale.
                    plain = {k: v for k, v in vars(part).items() if isinstance(v, (int, float, str))}
                    names.append(str(sorted((k, v) for k, v in plain.items() if k != "training")))
            for name, value in (*module.named_parameters(), *module.named_buffers()):
                names.append(name)
                tensors.append(value)
    tensors.append(torch.frombuffer(bytearray("\n".join(names).encode() + b"."), dtype=torch.uint8))
    return digest(tensors).tobytes().hex()
