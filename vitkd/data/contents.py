"""A hash of image files that reads only those that have changed."""

import hashlib
import json
from collections.abc import Iterable
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TypeAlias

from vitkd.errors import ConfigError

FileHashes: TypeAlias = dict[str, dict[str, list[int | str]]]
"""folder → relative path → [size in bytes, times of the last changes in ns …, SHA-256]"""


def hash_files(folder: Path, files: Iterable[Path], known: FileHashes) -> str:
    """A short hash of the names of `files`, relative to `folder`, and of all their bytes.

    `known` is updated: what it says of a file holds as long as the file's size and times are the same.
    Raises ConfigError if a file cannot be read.
    """
    names = sorted(file.relative_to(folder).as_posix() for file in files)
    before = known.get(place := str(folder.resolve()), {})
    with ThreadPool() as pool:  # hashing and waiting for a disk need no lock of Python's
        hashes = pool.map(lambda name: hash_file(folder / name, before.get(name, [])), names)
    known[place] = dict(zip(names, hashes, strict=True))
    facts = [(name, hashed[-1]) for name, hashed in known[place].items()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]


def hash_file(file: Path, before: list[int | str]) -> list[int | str]:
    """A file's entry in `FileHashes`: `before` if that still holds."""
    try:
        status = file.stat()
        # The time of a change of status as well: an archive may give all files one time of modification.
        now: list[int | str] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        if before[:-1] == now:
            return before
        with file.open("rb") as content:
            return [*now, hashlib.file_digest(content, "sha256").hexdigest()]
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); replace or remove the file") from error
