"""Results of single batches: what an evaluation is put together from, saved, and exchanged between ranks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import re
import signal
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parameter import is_lazy

from .distributions import Distribution
from .likelihoods.base import Likelihood
from .weights import Weights

_E = TypeVar("_E", bound=Exception)


class Part(NamedTuple):
    """One batch's results; the last axis of the second group of fields is its examples."""

    index: int  # type: ignore[assignment] # of the batch
    digest: np.ndarray  # [16] bytes, of the data
    latent: (
        np.ndarray
    )  # [3, D]: posterior means' mean and sum of squared deviations, the KL's sum; [2, D] without KL
    dims: int  # numbers in one example

    log_px: np.ndarray
    stderr: np.ndarray
    ess: np.ndarray
    khat: np.ndarray
    k: np.ndarray
    elbo: np.ndarray
    curve: np.ndarray  # [R, n]: the bound after each number of draws at which it is looked at


_PER_BATCH = ("index", "digest", "latent", "dims")
# Kind and axes of each array of packed parts.
_PACKED = dict.fromkeys(Part._fields, ("f", 1)) | {
    "index": ("i", 1),
    "digest": ("u", 2),
    "latent": ("f", 3),
    "dims": ("i", 1),
    "k": ("i", 1),
    "curve": ("f", 2),
    "sizes": ("i", 1),
}


def pack(parts: list[Part]) -> dict[str, np.ndarray]:
    """As arrays that np.savez takes; parts must not be empty."""
    fields = {name: [getattr(p, name) for p in parts] for name in Part._fields}
    arrays = {name: np.stack([np.asarray(v) for v in fields.pop(name)]) for name in _PER_BATCH}
    arrays["sizes"] = np.array([len(p.log_px) for p in parts])
    return arrays | {name: np.concatenate(values, -1) for name, values in fields.items()}


def unpack(arrays: dict[str, np.ndarray]) -> list[Part]:
    """The parts again.

    Raises:
        KeyError, ValueError: for arrays that no parts were packed to.
    """
    for name, (kind, axes) in _PACKED.items():
        if arrays[name].dtype.kind != kind or arrays[name].ndim != axes:
            raise ValueError(f"{name} is of {arrays[name].dtype} with {arrays[name].ndim} axes")
    sizes = arrays["sizes"]
    for name in Part._fields:
        length = arrays[name].shape[0 if name in _PER_BATCH else -1]
        expected = len(sizes) if name in _PER_BATCH else sizes.sum()
        if length != expected or (sizes < 1).any():
            raise ValueError(f"sizes {sizes[:5].tolist()}… do not fit {name}, which has {length} entries")
    cuts = np.cumsum(sizes)[:-1]
    fields = {
        name: list(arrays[name]) if name in _PER_BATCH else np.split(arrays[name], cuts, -1)
        for name in Part._fields
    }
    parts = [Part(*values) for values in zip(*fields.values(), strict=True)]
    return [p._replace(index=int(p.index), dims=int(p.dims)) for p in parts]


# Files


def check_destination(name: str, path: Path) -> None:
    """That a file can be written there, before the work whose results it is to hold.

    Raises:
        ValueError: where it cannot.
    """
    if not path.parent.is_dir():
        raise ValueError(f"{name} {path}: there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError(f"{name} {path} is a folder; expected the name of a file")
    try:
        # Permissions alone do not tell: a file system may be read-only, or full.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} {path}: no file can be made in the folder {path.parent} ({error.strerror}); use another"
        ) from None


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """An .npz file, replaced as a whole: it is complete at any moment, and stays what it was if writing
    fails.
    """
    path = path.resolve()
    if path.exists() and not path.is_file():  # a device such as /dev/null, or a pipe
        with open(path, "wb") as handle:
            np.savez(handle, **arrays)
        return
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(draft, "wb") as handle:
            np.savez(handle, **arrays)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


class RankFailed(RuntimeError):
    """What the other ranks raise when one has failed."""


class Ranks:
    """The processes that share the work; one, if torch.distributed was not started.

    What they exchange are results, or the error of a rank that failed, which all others then raise.

    Args:
        shard: what they share: "data", "samples", or "none": this process works by itself, whatever was
            started.
    """

    def __init__(self, shard: str):
        together = shard != "none" and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1
        self.by_samples = shard == "samples" and self.world > 1
        self._awaited = self.world > 1  # whether the others will listen once more

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """An error that leaves the block reaches the other ranks in their next exchange."""
        try:
            yield
        except BaseException as error:
            if self._awaited:
                self._tell(error)
            raise

    def _tell(self, error: BaseException) -> None:
        said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        # The others may be long in coming; and what goes wrong here must not hide the error.
        with contextlib.suppress(Exception):
            warnings.warn(
                f"fastvae.evaluate: rank {self.rank} failed ({said}); it waits to tell the other ranks",
                RuntimeWarning,
                stacklevel=2,
            )
        with contextlib.suppress(Exception):
            self._exchange(said, "", None)

    def unanimous(self, error: _E) -> _E:
        """An error that every rank raises at this point, so that none need be told."""
        self._awaited = False
        return error

    def _exchange(self, problem: str | None, what: str, value: Any) -> list[tuple[str | None, str, Any]]:
        found: list[Any] = [None] * self.world
        with _interrupts_after():
            self._awaited = False  # if this fails
            dist.all_gather_object(found, (problem, what, value))
            self._awaited = all(p is None for p, _, _ in found)
        return found

    def gather(self, mine: Any, what: str) -> list[Any]:
        """Everyone's, in the order of ranks; ``what`` names the place in the work.

        Raises:
            RankFailed: if one of them failed.
            ValueError: if one of them is at another place, since it has fewer batches.
        """
        if self.world == 1:
            return [mine]
        found = self._exchange(None, what, mine)
        for rank, (problem, _, _) in enumerate(found):
            if problem is not None:
                raise RankFailed(f"rank {rank} failed: {problem}")
        if len({place for _, place, _ in found}) > 1:
            raise self.data_differ()
        return [value for _, _, value in found]

    def data_differ(self) -> ValueError:
        """Every rank raises it."""
        return self.unanimous(
            ValueError(
                "data differ between the ranks: each must iterate over the same batches, of which evaluate "
                "gives every rank its own (shuffle=False, no sampler that shards). To evaluate other data on "
                'each rank use shard="none"'
            )
        )

    def first(self, value: Any) -> Any:
        """Rank 0's."""
        return self.gather(value, "first")[0]

    def wait(self) -> None:
        self.gather(None, "wait")

    def takes(self, index: int) -> bool:
        """Whether this rank evaluates this batch."""
        return self.by_samples or index % self.world == self.rank

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This rank's of these draws."""
        if not self.by_samples:
            return start, stop
        cuts = [start + (stop - start) * r // self.world for r in (self.rank, self.rank + 1)]
        return cuts[0], cuts[1]

    def merge(self, part: Weights | None, device: torch.device) -> Weights | None:
        """Everyone's draws together, in the order of ranks; None for none."""
        if not self.by_samples:
            return part
        merged: Weights | None = None
        for values in self.gather(None if part is None else [v.cpu() for v in part], "draws"):
            if values is not None:
                its = Weights(*(v.to(device) for v in values))
                merged = its if merged is None else merged.merge(its)
        return merged


@contextlib.contextmanager
def _interrupts_after() -> Iterator[None]:
    """Ctrl-C waits for the end of the block: in the middle of an exchange it would leave the others there."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    pressed: list[tuple[Any, ...]] = []
    signal.signal(signal.SIGINT, lambda *seen: pressed.append(seen))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if pressed:
            before(*pressed[0])


class Store:
    """The parts of an evaluation: those of a checkpoint, and what this rank adds.

    Rank 0 writes the checkpoint itself, others beside it; in the end all is in the one file. Where it cannot
    be written, as on a full disk, the results stay in memory, with a warning.

    Args:
        path: the checkpoint, or None for none.
        settings: what must be the same for results to belong together; a seed that is None may be any.
        ranks: who shares the work.

    Raises:
        ValueError: for a file of something else, on every rank.
    """

    def __init__(self, path: str | os.PathLike[str] | None, settings: dict[str, Any], ranks: Ranks):
        self.path = None if path is None else Path(path).expanduser()
        self.settings = settings
        self.ranks = ranks
        self.done: dict[int, Part] = {}
        self.mine: list[Part] = []
        self._seen: dict[int, bytes] = {}
        self._saved = self._cost = 0.0
        if self.path is None:
            return
        parts, problem = [], None
        try:
            if self._writes:
                check_destination("checkpoint", self.path)
            parts = self._load()
        except ValueError as error:
            problem = str(error)
        found = ranks.gather((parts, self.settings["seed"], problem), "checkpoint")
        if problems := [p for _, _, p in found if p]:
            raise ranks.unanimous(ValueError(problems[0]))
        seeds = {s for _, s, _ in found if s is not None}
        if len(seeds) > 1:
            raise ranks.unanimous(
                ValueError(
                    f"checkpoint {self.path}: the ranks hold results of several runs; delete all but one of "
                    "them"
                )
            )
        self.done = {p.index: p for parts, _, _ in found for p in parts}
        self.settings["seed"] = next(iter(seeds), None)

    @property
    def seed(self) -> int | None:
        """The seed that the checkpoint was made with, or the one that was asked for."""
        seed: int | None = self.settings["seed"]
        return seed

    def begin(self, seed: int) -> None:
        """Before the first batch: what is done lies in rank 0's file, whoever made it."""
        self.settings["seed"] = seed
        if self.ranks.rank == 0:
            self.mine = list(self.done.values())
        self._collect(self.mine)

    def see(self, index: int, x: Tensor) -> Part | None:
        """Take note of a batch; its results if they are there.

        Raises:
            ValueError: if it is not the batch that they are of, or not that of the other ranks.
        """
        if self.path is None and self.ranks.world == 1:
            return None
        found = digest([x])
        first = not self._seen
        self._seen[index] = found.tobytes()
        if first:
            self._same_everywhere()
        part = self.done.get(index)
        if part is not None and not np.array_equal(part.digest, found):
            was, now = len(part.log_px), x.shape[0]
            if was != now:
                raise ValueError(
                    f"checkpoint {self.path} was made with other batches: batch {index} had {was} examples "
                    f"then and has {now} now. Use the same batch_size or loader, or give another name to "
                    "start anew"
                )
            raise ValueError(
                f"checkpoint {self.path} was made with other data: batch {index} differs. A loader must give "
                "the same batches every time (shuffle=False); for other data give another name"
            )
        return part

    def add(self, part: Part) -> None:
        """Keep the results of a batch that was seen."""
        mark = self._seen.get(part.index)
        self.mine.append(part if mark is None else part._replace(digest=np.frombuffer(mark, np.uint8)))
        # Saving is to take no more than a twentieth of the time.
        if time.monotonic() - self._saved >= 20 * self._cost:
            self.save()

    def finish(self) -> list[Part]:
        """Everyone's parts, in the order of the batches."""
        self._same_everywhere()
        everyone = [self.mine] if self.ranks.by_samples else self.ranks.gather(self.mine, "parts")
        found = self.done | {p.index: p for parts in everyone for p in parts}
        if self.path is not None:
            if extra := sorted(found.keys() - self._seen.keys()):
                raise self.ranks.unanimous(
                    ValueError(
                        f"checkpoint {self.path} was made with other data: it holds batch {extra[0]}, which "
                        "these data do not have. For other data give another name"
                    )
                )
            self._collect([found[i] for i in sorted(found)])
        return [found[i] for i in sorted(found)]

    def save(self) -> None:
        """Write this rank's parts."""
        if self.path is None or not self.mine or not self._writes:
            return
        start = time.monotonic()
        self._write(self.path if self.ranks.rank == 0 else self._beside(f"rank{self.ranks.rank}"), self.mine)
        self._saved = time.monotonic()
        self._cost = self._saved - start

    @property
    def _writes(self) -> bool:
        return self.ranks.rank == 0 or not self.ranks.by_samples

    def _write(self, file: Path, parts: list[Part]) -> bool:
        """Whether it could be done."""
        try:
            write_arrays(file, {"settings": json.dumps(self.settings), **pack(parts)})
        except OSError as error:
            warnings.warn(
                f"fastvae.evaluate: checkpoint {file} cannot be written ({error.strerror or error}). The "
                "results stay in memory; each later save tries again",
                RuntimeWarning,
                stacklevel=2,
            )
            return False
        return True

    def _collect(self, parts: list[Part]) -> None:
        if self.path is None:
            return
        done = self.ranks.rank == 0 and bool(parts) and self._write(self.path, parts)
        self.ranks.wait()
        if done:
            for other in [*self._files(), *self._drafts()]:
                if other != self.path:
                    other.unlink(missing_ok=True)
        self.ranks.wait()

    def _same_everywhere(self) -> None:
        mine = hashlib.blake2b(b"".join(self._seen.values())).digest()
        if len(set(self.ranks.gather(mine, "data"))) > 1:
            raise self.ranks.data_differ()

    def _beside(self, mark: str) -> Path:
        assert self.path is not None
        return self.path.with_name(f"{self.path.stem}.{mark}{self.path.suffix}")

    def _files(self) -> list[Path]:
        assert self.path is not None
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint {self.path}: there is no folder {self.path.parent}")
        ranks = re.compile(rf"{re.escape(self.path.stem)}\.rank\d+{re.escape(self.path.suffix)}")
        others = sorted(p for p in self.path.parent.iterdir() if ranks.fullmatch(p.name))
        return [p for p in (self.path, *others) if p.exists()]

    def _drafts(self) -> list[Path]:
        """What a process that was killed while it wrote has left."""
        assert self.path is not None
        name = rf"\.{re.escape(self.path.stem)}(\.rank\d+)?{re.escape(self.path.suffix)}\.\d+"
        return [p for p in self.path.parent.iterdir() if re.fullmatch(name, p.name)]

    def _load(self) -> list[Part]:
        parts: dict[int, Part] = {}
        for file in self._files():
            try:
                with np.load(file, allow_pickle=False) as data:
                    arrays = dict(data)
                made = dict(json.loads(str(arrays.pop("settings"))))
                found = unpack(arrays)
            except Exception as error:  # whatever a file of something else brings about
                raise ValueError(
                    f"checkpoint {file} is no checkpoint of fastvae.evaluate ({type(error).__name__}: "
                    f"{error}); give another name, or delete it"
                ) from None
            self._compare(file, made)
            parts.update((p.index, p) for p in found)
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
                    "or delete it"
                )


# What a callable is made of


def modules_of(function: Callable[..., Any]) -> list[nn.Module]:
    """The modules that a callable is, or reaches: as the object of a method, an attribute, an argument's
    default, a variable of its closure or a global that its code names; within three steps.
    """
    return reached(function, nn.Module)


def reached(function: Callable[..., Any], kinds: type | tuple[type, ...]) -> list[Any]:
    """What a callable is, or reaches in this way, of these kinds; no farther than to one of them."""
    found: dict[int, Any] = {}
    seen: dict[int, int] = {}

    def visit(value: Any, depth: int) -> None:
        if isinstance(value, kinds):
            found[id(value)] = value
        elif seen.get(id(value), 0) < depth and not isinstance(value, (type, ModuleType, Tensor)):
            seen[id(value)] = depth
            for part in _reached(value):
                visit(part, depth - (not inspect.ismethod(value)))

    visit(function, 4)
    return list(found.values())


def _reached(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from list(value.values())[:1000]
    elif isinstance(value, (tuple, list)):
        yield from value[:1000]
    elif isinstance(value, functools.partial):
        yield from (value.func, value.args, value.keywords)
    elif inspect.ismethod(value):
        yield from (value.__self__, value.__func__)
    elif isinstance(value, FunctionType):
        yield from (value.__defaults__, value.__kwdefaults__)
        for cell in value.__closure__ or ():
            with contextlib.suppress(ValueError):  # of a variable that is not set yet
                yield cell.cell_contents
        yield from (value.__globals__[n] for n in _names(value.__code__) if n in value.__globals__)
        yield getattr(value, "__wrapped__", None)
    elif hasattr(value, "__dict__"):
        yield vars(value)
        yield inspect.getattr_static(type(value), "__call__", None)


def _names(code: CodeType) -> set[str]:
    """What a function's code, and that of the functions in it, may call globals or attributes."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if isinstance(c, CodeType)))


def digest(tensors: Iterable[Tensor]) -> np.ndarray:
    """[16] bytes that differ for other tensors."""
    found = hashlib.blake2b(digest_size=16)
    for t in tensors:
        t = t.detach().cpu().contiguous()
        found.update(f"{t.dtype}{tuple(t.shape)}".encode())
        found.update(t.reshape(-1).view(torch.uint8).numpy().data)
    return np.frombuffer(found.digest(), np.uint8).copy()


def weights_digest(*callables: Callable[..., Any]) -> str:
    """Of everything that the callables' modules keep, and of how they print."""
    tensors, names = [], []
    for function in callables:
        for module in modules_of(function):
            module = getattr(module, "_orig_mod", module)  # compiled or not
            names.append(repr(module))
            for part in module.modules():
                if isinstance(part, (Likelihood, Distribution)):
                    # Such as a fixed scale, or a tensor that a network computed.
                    plain = {k: v for k, v in sorted(vars(part).items()) if k != "training"}
                    names += [f"{k}={v}" for k, v in plain.items() if isinstance(v, (int, float, str))]
                    tensors += [v for v in plain.values() if isinstance(v, Tensor)]
            for name, value in (*module.named_parameters(), *module.named_buffers()):
                if not is_lazy(value):
                    names.append(name.replace("_orig_mod.", ""))
                    tensors.append(value)
    tensors.append(torch.tensor(list("\n".join(names).encode()), dtype=torch.uint8))
    return digest(tensors).tobytes().hex()
