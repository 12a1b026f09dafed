"""Writing files so that a reader always sees either the old one or the complete new one."""

import errno
import os
from pathlib import Path
from typing import IO, Any

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`, all of it or nothing; text as UTF-8."""
    data = content.encode() if isinstance(content, str) else content
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
