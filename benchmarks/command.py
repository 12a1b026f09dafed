"""The program itself, as a person calls it, in a process of its own."""

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def train_command(*overrides: str) -> list[str]:
    """The command line of `python -m vitkd.train` with these overrides."""
    return [sys.executable, "-m", "vitkd.train", *overrides]


def as_typed(module: str, argv: Sequence[str] | None) -> str:
    """The command line of a benchmark that was called with `argv`, or by the command line."""
    return f"python -m {module} {shlex.join(sys.argv[1:] if argv is None else argv)}"


def environment() -> dict[str, str]:
    """This process's environment, in which the checkout's own vitkd is imported from any folder."""
    others = [place for place in (os.environ.get("PYTHONPATH"),) if place]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *others])}
