"""Results of single batches: what an evaluation is put together from, saved, and exchanged between ranks."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parameter import is_lazy

from .likelihoods import Likelihood
from .priors import Prior
from .weights import Weights


class Part(NamedTuple):
    """One batch's results; the last axis of the second group of fields is its examples."""

    index: int  # of the batch
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


class Ranks:
    """The processes that share the work; one, if torch.distributed was not started.

    Args:
        by_samples: whether they share each example's draws, not the batches.
        alone: this process by itself, whatever was started.
    """

    def __init__(self, *, by_samples: bool = False, alone: bool = False):
        together = not alone and dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if together else 0
        self.world = dist.get_world_size() if together else 1
        self.by_samples = by_samples and self.world > 1

    def gather(self, mine: Any) -> list[Any]:
        """Everyone's, in the order of ranks."""
        if self.world == 1:
            return [mine]
        found = [None] * self.world
        dist.all_gather_object(found, mine)
        return found

    def first(self, value: Any) -> Any:
        """Rank 0's."""
        return self.gather(value)[0]

    def wait(self) -> None:
        self.gather(None)

    def takes(self, index: int) -> bool:
        """Whether this rank evaluates this batch."""
        return self.by_samples or index % self.world == self.rank

    def share(self, start: int, stop: int) -> tuple[int, int]:
        """This rank's of these draws."""
        if not self.by_samples:
            return start, stop
        cuts = [start + (stop - start) * r // self.world for r in (self.rank, self.rank + 1)]
        return cuts[0], cuts[1]

    def merge(self, part: Weights | None, device: torch.device) -> Weights:
        """Everyone's draws together, in the order of ranks; None for none."""
        if not self.by_samples:
            return part
        merged: Weights | None = None
        for values in self.gather(None if part is None else [v.cpu() for v in part]):
            if values is not None:
                its = Weights(*(v.to(device) for v in values))
                merged = its if merged is None else merged.merge(its)
        return merged


class Store:
    """The parts of an evaluation: those of a checkpoint, and what this rank adds.

    A checkpoint is replaced as a whole, so that it is complete at any moment. Rank 0 writes the file itself,
    others beside it; in the end all is in the one file.

    Args:
        path: the checkpoint, or None for none.
        settings: what must be the same for results to belong together; a seed that is None may be any.
        ranks: who shares the work.

    Raises:
        ValueError: for a file of something else, on every rank.
    """

    def __init__(self, path: str | os.PathLike | None, settings: dict[str, Any], ranks: Ranks):
        self.path = None if path is None else Path(path)
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
            parts = self._load()
        except ValueError as error:
            problem = str(error)
        found = ranks.gather((parts, self.settings["seed"], problem))
        if problems := [p for _, _, p in found if p]:
            raise ValueError(problems[0])
        seeds = {s for _, s, _ in found if s is not None}
        if len(seeds) > 1:
            raise ValueError(
                f"checkpoint {self.path}: the ranks hold results of several runs; delete all but one of them"
            )
        self.done = {p.index: p for parts, _, _ in found for p in parts}
        self.settings["seed"] = next(iter(seeds), None)

    @property
    def seed(self) -> int | None:
        """The seed that the checkpoint was made with, or the one that was asked for."""
        return self.settings["seed"]

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
            raise ValueError(
                f"checkpoint {self.path} was made with other data: batch {index} differs. A loader must give "
                "the same batches every time (shuffle=False); for other data give another name"
            )
        return part

    def add(self, part: Part) -> None:
        """Keep the results of a batch that was seen."""
        mark = self._seen.get(part.index)
        self.mine.append(part if mark is None else part._replace(digest=np.frombuffer(mark, np.uint8)))
        # Saving shall not take more than a twentieth of the time.
        if time.monotonic() - self._saved >= 20 * self._cost:
            self.save()

    def finish(self) -> list[Part]:
        """Everyone's parts, in the order of the batches."""
        self._same_everywhere()
        everyone = [self.mine] if self.ranks.by_samples else self.ranks.gather(self.mine)
        found = self.done | {p.index: p for parts in everyone for p in parts}
        if self.path is not None:
            if extra := sorted(found.keys() - self._seen.keys()):
                raise ValueError(
                    f"checkpoint {self.path} was made with other data: it holds batch {extra[0]}, which "
                    "these data do not have. For other data give another name"
                )
            self._collect([found[i] for i in sorted(found)])
        return [found[i] for i in sorted(found)]

    def save(self) -> None:
        """Write this rank's parts."""
        if self.path is None or not self.mine or (self.ranks.by_samples and self.ranks.rank):
            return
        start = time.monotonic()
        file = self.path if self.ranks.rank == 0 else self._beside(f"rank{self.ranks.rank}")
        self._write(file, self.mine)
        self._saved = time.monotonic()
        self._cost = self._saved - start

    def _write(self, file: Path, parts: list[Part]) -> None:
        draft = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            with open(draft, "wb") as handle:
                np.savez(handle, settings=json.dumps(self.settings), **pack(parts))
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(draft, file)
        finally:
            draft.unlink(missing_ok=True)

    def _collect(self, parts: list[Part]) -> None:
        if self.path is None:
            return
        if self.ranks.rank == 0 and parts:
            self._write(self.path, parts)
        self.ranks.wait()
        if self.ranks.rank == 0:
            for other in self._files():
                if other != self.path:
                    other.unlink()
        self.ranks.wait()

    def _same_everywhere(self) -> None:
        if len(set(self.ranks.gather(hashlib.blake2b(b"".join(self._seen.values())).digest()))) > 1:
            raise ValueError(
                "data differ between the ranks: each must iterate over the same batches, of which evaluate "
                "gives every rank its own (shuffle=False, no sampler that shards)"
            )

    def _beside(self, mark: str) -> Path:
        return self.path.with_name(f"{self.path.stem}.{mark}{self.path.suffix}")

    def _files(self) -> list[Path]:
        if not self.path.parent.is_dir():
            raise ValueError(f"checkpoint {self.path}: there is no folder {self.path.parent}")
        ranks = re.compile(rf"{re.escape(self.path.stem)}\.rank\d+{re.escape(self.path.suffix)}")
        others = sorted(p for p in self.path.parent.iterdir() if ranks.fullmatch(p.name))
        return [p for p in (self.path, *others) if p.exists()]

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


def modules_of(function: Callable) -> list[nn.Module]:
    """The modules that a callable is, or reaches: as the object of a method, an attribute, an argument's
    default, a variable of its closure or a global that its code names; within three steps.
    """
    return reached(function, nn.Module)


def reached(function: Callable, kinds: type | tuple[type, ...]) -> list[Any]:
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
        found.update(t.reshape(-1).view(torch.uint8).numpy())
    return np.frombuffer(found.digest(), np.uint8).copy()


def weights_digest(*callables: Callable) -> str:
    """Of everything that the callables' modules keep, and of how they print."""
    tensors, names = [], []
    for function in callables:
        for module in modules_of(function):
            module = getattr(module, "_orig_mod", module)  # compiled or not
            names.append(repr(module))
            for part in module.modules():
                if isinstance(part, (Likelihood, Prior)):
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
