"""The program itself, as a person calls it, in a process of its own."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def train_command(*overrides: str) -> list[str]:
    """The command line of `python -m vitkd.train` with these overrides."""
    return [sys.executable, "-m", "vitkd.train", *overrides]


def environment() -> dict[str, str]:
    """This process's environment, in which the checkout's own vitkd is imported from any folder."""
    others = [place for place in (os.environ.get("PYTHONPATH"),) if place]
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *others])}
