"""What a person sees: in characters that the terminal has; the work goes on when nobody looks any more."""

from __future__ import annotations

import os
import sys
from typing import Any, TextIO

# What a terminal without them shows for the characters that fastvae prints.
_PLAIN = {"±": "+-", "−": "-", "…": "..."}


def printable(text: str, stream: TextIO | None) -> str:
    """The text in characters that the stream can encode."""
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
    """Print. When the reader has left, as ``head`` does, the rest goes nowhere and the work goes on.

    Raises:
        SystemExit: if standard output cannot be written for another reason, such as a full disk.
    """
    try:
        print(printable(str(text), sys.stdout), flush=True)
    except OSError as error:
        # Python flushes what is left in the buffer when it ends, and would fail once more.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
        if not isinstance(error, BrokenPipeError):
            raise SystemExit(f"fastvae: standard output cannot be written: {error.strerror}") from None


class ProgressStream:
    """Standard error for a progress bar, whose failure to write is no reason to end the work."""

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
