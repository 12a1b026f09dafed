"""What a command prints: the console may lose text, never a run."""

import codecs
import io
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

# What the commands print beyond ASCII; other characters are escaped.
SIMILAR = {
    **{"×": "x", "·": ".", "−": "-", "–": "-", "…": "...", "→": "->", "’": "'"},
    **{"±": "+-", "²": "^2", "≤": "<=", "≥": ">="},
}


class Unbreakable(io.FileIO):
    """A file descriptor that accepts everything: what a closed pipe or a full disk does not take is lost."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write what can be written; returns the length of `data`."""
        with suppress(OSError):
            return super().write(data) or len(data)  # None where the reader is slow and nobody may wait
        return len(data)


def protect_streams() -> None:
    """Make stdout and stderr accept whatever is printed."""
    codecs.register_error("similar", similar)
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets this number, else a file of the run would
    for name in ("stdout", "stderr"):
        setattr(sys, name, protected(getattr(sys, name)))


def protected(stream: TextIO | None) -> TextIO:
    """The stream, or one in its place that never raises."""
    if stream is None:
        return Path(os.devnull).open("w", encoding="utf-8")
    if not isinstance(stream, io.TextIOWrapper) or stream.errors == "similar":
        return stream  # a notebook's, a test's, or one of these
    try:
        file: Any = Unbreakable(stream.fileno(), "w", closefd=False)
    except OSError:
        stream.reconfigure(errors="similar")  # in memory
        return stream
    with suppress(OSError):
        stream.flush()
    lines, at_once = stream.line_buffering, stream.write_through
    return io.TextIOWrapper(io.BufferedWriter(file), stream.encoding, "similar", None, lines, at_once)


def similar(error: UnicodeError) -> tuple[str, int]:
    """For `codecs`: what to print instead of characters that an encoding lacks, and where to continue."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(SIMILAR.get(character) or ascii(character)[1:-1] for character in lacking), error.end
