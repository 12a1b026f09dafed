"""What a file of a run may turn out to be: each entry puts something else in a file's place."""

import json
import os
from collections.abc import Callable
from pathlib import Path


def pipe(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    """Three times as many bytes as a machine has."""
    with path.open("wb") as file:
        file.truncate(1 << 40)


def text(content: str | bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content.encode() if isinstance(content, str) else content)


LISTS = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
MERGES = "m0: &m0 {x: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [*m{n - 1}, *m{n - 1}]}}\n" for n in range(1, 40))

NO_FILE = {
    "a pipe": pipe,
    "a device without end": lambda path: path.symlink_to("/dev/zero"),
    "a folder": lambda path: path.mkdir(),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}
NO_JSON = {
    "empty": text(""),
    "too long": sparse,
    "noise": text(bytes(range(256)) * 20),
    "deep": text("[" * 100_000),
    "deep and whole": text('{"a":' * 900 + "1" + "}" * 900),
    "a number of 401 digits": text('{"test/acc_last": 0.5, "wall_seconds": 1' + "0" * 400 + "}"),
    "a number of 5,000 digits": text('{"test/acc_last": ' + "1" * 5000 + "}"),
    "half a character": text('{"state": "\\ud800", "test/acc_last": 0.5}'),
    "very many values": text(json.dumps({"state": "done", "test/acc_last": 0.5, "x": [0] * 200_000})),
}
NO_YAML = {
    "lists that double": text(LISTS),
    "mappings that double": text(MERGES),
    "long texts many times": text("a: &a " + "x" * 500_000 + "\nb: [" + "*a," * 5000 + "]\n"),
    "a number to base 60": text("seed: " + ":".join(["1"] * 400_000)),
    "a hexadecimal number": text("seed: 0x" + "f" * 5000),
}
EVERY = NO_FILE | NO_JSON | NO_YAML


def replace(path: Path, become: Callable[[Path], object]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    become(path)
