"""Terminal output that survives missing characters and closed streams."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

from tqdm import tqdm

# ASCII substitutes for the special characters that fastvae prints.
_PLAIN = {"±": "+-", "−": "-", "…": "..."}


def printable(text: str, stream: TextIO | None) -> str:
    """Replace the characters that the stream cannot encode."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        text.encode(encoding)
        return text
    except UnicodeEncodeError:
        for sign, plain in _PLAIN.items():
            if sign.encode(encoding, "ignore").decode(encoding) != sign:
                text = text.replace(sign, plain)
        return text.encode(encoding, "backslashreplace").decode(encoding)


def show(text: Any) -> None:
    """Print; if the reader has closed the pipe, as ``head`` does, discard all further output.

    Raises:
        SystemExit: if standard output cannot be written for another reason, such as a full disk.
    """
    try:
        print(printable(str(text), sys.stdout), flush=True)
    except OSError as error:
        # Otherwise Python's flush at exit would fail again.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            raise SystemExit(f"fastvae: standard output cannot be written: {error.strerror}") from None


def discard(text: Any) -> None:
    """Print nothing, in place of :func:`show`."""


def has_reader(stream: Any) -> bool:
    """Return True if a stream is a terminal or a notebook's, where a progress bar can overwrite itself."""
    if type(stream).__module__.partition(".")[0] == "ipykernel":
        return True
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):  # None, a stream without isatty, or one that is closed
        return False


def progress_bar(shown: bool, **options: Any) -> tqdm:
    """Return a progress bar on standard error, which writes nothing unless ``shown`` and there is a reader.

    Args:
        shown: show the bar if standard error is a terminal or a notebook's; a log file gets nothing.
        options: keyword arguments of tqdm, such as ``total``, ``desc`` and ``unit``.
    """
    return tqdm(disable=not (shown and has_reader(sys.stderr)), file=ProgressStream(), **options)


class ProgressStream:
    """Standard error for a progress bar, where write errors are ignored."""

    def __init__(self) -> None:
        self._stream = sys.stderr

    def write(self, text: str) -> None:
        self._try(self._stream.write, printable(text, self._stream))

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, function: Any, *args: Any) -> None:
        try:
            function(*args)
        except OSError:
            self._stream = open(os.devnull, "w")  # noqa: SIM115 as long as the bar lives

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
