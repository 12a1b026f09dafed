"""Files that are complete or not there: writing them so, and reading those that are not."""

import csv
import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import yaml

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
MAX_BYTES = 4 << 20
"""Of a file that is read as a mapping."""


def write_problem(error: Exception, place: Path | None = None) -> str | None:
    """What keeps a file at `place` from being written, and how to fix it; None if `error` is another one."""
    if not isinstance(error, OSError) or error.errno not in NO_ROOM | NOT_WRITABLE:
        return None
    fix = "make room" if error.errno in NO_ROOM else "make that writable"
    file = os.fsdecode(error.filename or place or "the outputs' disk")
    return f"{file}: cannot be written ({error.strerror}); {fix}"


def read_mapping(path: Path, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """What `parse` makes of a file; an empty mapping if it is absent, too large, cut or something else."""
    try:
        content = parse(path.read_text(encoding="utf-8")) if path.stat().st_size <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    return content if isinstance(content, dict) else {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a CSV file: column → text."""
    content = path.read_bytes()
    # What follows the last line break was being written when the process died.
    complete = content[: content.rfind(b"\n") + 1].decode()
    return [*csv.DictReader(io.StringIO(complete, newline=""))]


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, all of it or nothing; text as UTF-8, other bytes of names escaped."""
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            force_to_disk(file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def force_names_to_disk(folder: Path) -> None:
    """Wait until the names in `folder` would outlive a power cut, where that can be asked for."""
    if hasattr(os, "O_DIRECTORY"):
        number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def force_to_disk(file: IO[Any]) -> None:
    """Wait until what was written to `file` would outlive a power cut."""
    file.flush()
    os.fsync(file.fileno())
