"""Checkpoints of an evaluation, from which an interrupted one resumes."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ...core.digest import digest
from ...random import draw_seed
from .parts import Part, pack, unpack
from .ranks import Ranks


def check_destination(name: str, path: Path) -> None:
    """Validate that a file can be written at ``path``, before the work whose results it will contain.

    Raises:
        ValueError: if it cannot.
    """
    try:
        resolved = _resolved(path)
        os.stat(resolved.parent)
        with contextlib.suppress(FileNotFoundError):
            os.stat(resolved)
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{name} {_brief(path)}: there is no folder {_brief(path.parent)}") from None
    except OSError as error:  # a loop of links, a name that is too long, a folder that may not be entered
        raise ValueError(f"{name} {_brief(path)}: {error.strerror}; use another name") from None
    if not resolved.parent.is_dir():
        raise ValueError(f"{name} {path}: there is no folder {path.parent}")
    if resolved.is_dir():
        raise ValueError(f"{name} {path} is a folder; expected the name of a file")
    try:
        # Permissions are not sufficient: the file system may be read-only, or full.
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{name} {path}: no file can be created in the folder {path.parent} ({error.strerror}); "
            "use another"
        ) from None


def _brief(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 200 else f"{text[:100]}…{text[-50:]}"


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Write an .npz file atomically: it is complete at any moment, and unchanged if writing fails."""
    path = _resolved(path)
    if path.exists() and not path.is_file():  # a device such as /dev/null, or a pipe
        with open(path, "wb") as handle:
            np.savez(handle, **arrays)
        return
    # An unpredictable name and a new file: others with access to the folder could place a link there.
    draft = path.with_name(f"{_draft_of(path)}{secrets.token_hex(8)}")
    try:
        with open(draft, "xb") as handle:
            np.savez(handle, **arrays)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def _draft_of(path: Path) -> str:
    """Return the name prefix of a file's drafts, equal for all ranks; a short hash, as names may be long."""
    name = re.sub(r"\.rank\d+(?=(\.[^.]*)?$)", "", path.name)
    return f".fastvae-{hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()}-"


def _resolved(path: Path) -> Path:
    """Resolve the links of a path."""
    try:
        return path.resolve()
    except RuntimeError:  # a loop of links, before Python 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path)) from None


# Defaults of settings that are written only if they differ.
_UNSAID = {"noise": "philox", "proposal": "Posterior()", "shared_noise": False}


class Store:
    """Parts of an evaluation, from a checkpoint and from this rank.

    Rank 0 writes the checkpoint, other ranks write files next to it, and the end merges all into the
    checkpoint. If it cannot be written, as on a full disk, the results stay in memory, with a warning.

    Args:
        path: the checkpoint, or None.
        settings: settings that must agree for results to be combined; a seed of None matches any.
        ranks: processes that share the work.

    Raises:
        ValueError: for a file of another evaluation, on every rank.
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
        """Seed of the checkpoint, or else the requested one."""
        seed: int | None = self.settings["seed"]
        return seed

    def begin(self) -> int:
        """Agree on the seed, and collect all ranks' earlier results in rank 0's file, before the first batch.

        Returns:
            The seed, which is drawn if neither the checkpoint nor the user has one.
        """
        seed: int = self.ranks.first(int(draw_seed("cpu")) if self.seed is None else self.seed)
        self.settings["seed"] = seed
        if self.ranks.rank == 0:
            self.mine = list(self.done.values())
        self._collect(self.mine)
        return seed

    def see(self, index: int, tensors: list[Tensor]) -> Part | None:
        """Register a batch, and return its results from the checkpoint, or None.

        Raises:
            ValueError: if the batch differs from the checkpoint's, or from that of the other ranks.
        """
        if self.path is None and self.ranks.world == 1:
            return None
        found = digest(tensors)
        first = not self._seen
        self._seen[index] = found.tobytes()
        if first:
            self._same_everywhere()
        part = self.done.get(index)
        if part is not None and not np.array_equal(part.digest, found):
            was, now = len(part), len(tensors[0])
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

    def compare(self, part: Part, first_draw: np.ndarray) -> None:
        """Compare a saved batch's first draw with a new one, which also detects changed weights and code.

        Raises:
            ValueError: if they differ.
        """
        if not np.allclose(part.curve[0], first_draw, rtol=1e-5, atol=1e-3, equal_nan=True):
            raise ValueError(
                f"checkpoint {self.path} was made with another encoder or decoder: the same draw now has "
                "different weights. Use another file name to start over, or delete the file"
            )

    def add(self, part: Part) -> None:
        """Add the results of a registered batch."""
        mark = self._seen.get(part.index)
        self.mine.append(part if mark is None else replace(part, digest=np.frombuffer(mark, np.uint8)))
        # Saving takes at most a twentieth of the time.
        if time.monotonic() - self._saved >= 20 * self._cost:
            self.save()

    def finish(self) -> list[Part]:
        """Gather the parts of all ranks, in the order of the batches."""
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
        """Write this rank's parts to its file."""
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
        """Write parts to a file; return False, with a warning, if that fails."""
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
        """Return the drafts left by processes that were killed while writing."""
        assert self.path is not None
        path = _resolved(self.path)
        return [p for p in path.parent.iterdir() if p.name.startswith(_draft_of(path))]

    def _load(self) -> list[Part]:
        parts: dict[int, Part] = {}
        for file in self._files():
            try:
                with np.load(file, allow_pickle=False) as data:
                    arrays = dict(data)
                made = dict(json.loads(str(arrays.pop("settings"))))
            except Exception as error:  # reading an arbitrary file may raise anything
                raise _unreadable(file, error) from None
            self._compare(file, made)
            try:
                found = unpack(arrays)
            except Exception as error:
                raise _unreadable(file, error) from None
            parts.update((p.index, p) for p in found)
        return list(parts.values())

    def _compare(self, file: Path, made: dict[str, Any]) -> None:
        for name in sorted(self.settings.keys() | made.keys(), key=lambda name: (name != "format", name)):
            was, now = (settings.get(name, _UNSAID.get(name)) for settings in (made, self.settings))
            if name == "seed" and now is None:
                self.settings["seed"] = was
            elif was != now:
                values = "" if name == "parameters" else f": {was!r} then, {now!r} now"
                raise ValueError(
                    f"checkpoint {file} was made with other {name}{values}. Use another name to start over, "
                    "or delete it"
                )


def _unreadable(file: Path, error: Exception) -> ValueError:
    return ValueError(
        f"checkpoint {file} is not a checkpoint of fastvae.evaluate ({type(error).__name__}: {error}); give "
        "another name, or delete it"
    )
