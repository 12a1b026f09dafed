"""The files of a run: written whole or not at all, and read whatever became of them.

Another program, a full disk or a stranger may have put anything in their place: a pipe, a device, a value
that grows when it is read. All that reads a run comes through here, so that nothing stops or hangs it.
"""

import csv
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

import yaml

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
MAX_BYTES, MAX_CSV_BYTES = 1 << 20, 1 << 30
"""Of a file of settings or metrics, and of curves."""
MAX_VALUES, MAX_DEPTH, MAX_BITS = 100_000, 50, 1023
"""Of a file of settings or metrics, which has some hundred values; a longer integer is no float."""

SURROGATES = re.compile("[\ud800-\udfff]")
# Its classes are chosen when PyYAML is built.
SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class PlainLoader(SafeLoader):
    """Reads what a run writes: no merge keys, no numbers to base 60, which take time without end."""

    def flatten_mapping(self, node: Any) -> None:
        """Leave merge keys as they are, which are then refused."""


PlainLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node)))


def parse_yaml(text: str) -> Any:
    """The values in a YAML file; ValueError if it is too deep."""
    depth = 0
    # Before they are built: libyaml's builder goes as deep as the file does, and Python ends with it.
    for event in yaml.parse(text, PlainLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise ValueError(f"deeper than {MAX_DEPTH}")
    return yaml.load(text, Loader=PlainLoader)


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read it; OSError for a pipe or a device, which may never end."""
    # Without a writer, a pipe would not even open.
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError(errno.EINVAL, "it is no regular file", str(path))
    return os.fdopen(number, "rb")


def file_digest(path: Path) -> str | None:
    """The SHA-256 of a file's content; None if there is none to read."""
    with suppress(OSError), open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
    return None


def read_limited(path: Path, limit: int = MAX_BYTES) -> bytes:
    """A file's content; OSError if it cannot be read, or is longer than `limit` bytes."""
    with open_regular(path) as file:
        # Systems that make a file as it is read do not know its size.
        size = os.fstat(file.fileno()).st_size
        content = file.read(limit + 1) if size <= limit else b""
    if max(size, len(content)) > limit:
        raise OSError(errno.EINVAL, f"it is longer than {limit:,} bytes", str(path))
    return content


def read_plain(path: Path, parse: Callable[[str], Any] = json.loads) -> Any:
    """The plain values that `parse` makes of a file, few and not too deep.

    Raises OSError if it cannot be read, ValueError if it holds something else.
    """
    content = read_limited(path)
    try:
        values = parse(content.decode())
    except Exception as error:  # foreign bytes make a parser raise almost anything
        raise ValueError(f"{path}: is cut or not vitkd's") from error
    if not is_bounded(values):
        raise ValueError(f"{path}: holds more than a run writes")
    return values


def write_problem(error: Exception, place: Path | None = None) -> str | None:
    """What keeps a file at `place` from being written, and how to fix it; None if `error` is another one."""
    if not isinstance(error, OSError) or error.errno not in NO_ROOM | NOT_WRITABLE:
        return None
    fix = "make room" if error.errno in NO_ROOM else "make that writable"
    file = os.fsdecode(error.filename or place or "the outputs' disk")
    return f"{file}: cannot be written ({error.strerror}); {fix}"


def read_mapping(path: Path, parse: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """As `read_plain`, but an empty mapping for a file that is absent or holds anything else."""
    content = None
    with suppress(OSError, ValueError):
        content = read_plain(path, parse)
    return content if isinstance(content, dict) else {}


def is_bounded(values: Any) -> bool:
    """Whether they are few, not deep, and can be computed with and written; aliases count each time."""
    stack, room = [(values, 0)], MAX_VALUES
    while stack:
        node, depth = stack.pop()
        room -= 1 + (len(node) // 64 if isinstance(node, str | bytes) else 0)
        if room < 0 or depth > MAX_DEPTH or (isinstance(node, int) and node.bit_length() > MAX_BITS):
            return False
        if isinstance(node, str) and not node.isascii() and SURROGATES.search(node):
            return False
        children = [*node, *node.values()] if isinstance(node, Mapping) else node
        stack += [(child, depth + 1) for child in children] if isinstance(children, list | set) else []
    return True


def read_rows(path: Path) -> tuple[list[dict[str, str]], int]:
    """The rows of a file of curves, column → text, and how many of its lines are none and were left out.

    What follows the last line break was being written when the process died; it is not counted. Raises
    OSError if the file cannot be read.
    """
    lines = read_limited(path, MAX_CSV_BYTES).decode(errors="replace").split("\n")[:-1]
    columns, *cells = [cells_of(line) for line in lines] or [[]]
    rows = [dict(zip(columns, row, strict=True)) for row in cells if len(row) == len(columns)]
    rows = [row for row in rows if is_row(row)]
    return rows, len(cells) - len(rows) + (len(lines) > 0 and "step" not in columns)


def cells_of(line: str) -> list[str]:
    """The cells of one line, which quotes never leave: a stray one does not take the next lines with it."""
    with suppress(csv.Error):
        return next(csv.reader([line.rstrip("\r")]), [])
    return []


def is_row(row: Mapping[str, str]) -> bool:
    """Whether it is a step and its numbers."""
    try:
        step, *_ = int(row["step"]), *(float(cell) for cell in row.values() if cell)
    except (KeyError, ValueError):
        return False
    return 0 <= step < 2**63


def write_atomically(
    path: Path, content: str | bytes, check: Callable[[Path], None] = lambda written: None
) -> None:
    """Write `content` to `path`, all of it or nothing; text as UTF-8, what is no text escaped.

    Before the file gets its name, `check` is called with where it is; if that raises, no file is left.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            force_to_disk(file)
        check(temporary)
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
