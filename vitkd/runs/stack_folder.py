"""Where a stack of students is saved while it trains, and what each student's run folder tells of that."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vitkd.runs.checkpoints import previous
from vitkd.runs.files import write_atomically
from vitkd.runs.folder import RunFolder

log = logging.getLogger("vitkd")


class StackFolder:
    """The folder of a stack under way: its checkpoint. What is to stay goes to the students' run folders."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = path / "checkpoints" / "last.ckpt"
        self.best = path / "checkpoints" / "best.ckpt"
        self._runs = path / "runs.json"

    @property
    def is_saved(self) -> bool:
        """Whether there is anything to go on from."""
        return self.last.exists() or previous(self.last).exists()

    def hold(self, runs: Sequence[RunFolder]) -> None:
        """Note whose students are saved here from now on, and tell each run its place."""
        paths = [os.path.relpath(run.path, self.path) for run in runs]
        write_atomically(self._runs, json.dumps(paths) + "\n")
        for student, run in enumerate(runs):
            # A name, not a path: outputs may move, and what is removed in the end lies among the stacks.
            place = {"stack": self.path.name, "student": student, "students": len(runs)}
            write_atomically(run.stack, json.dumps(place) + "\n")

    def remove_if_left(self) -> None:
        """Remove the folder unless some run still has its student here."""
        try:
            runs = [RunFolder(self.path / path) for path in json.loads(self._runs.read_text("utf-8"))]
        except (OSError, ValueError, TypeError):
            return
        places = (read_place(run, self.path.parent) for run in runs)
        if any(place and place.folder.path == self.path for place in places):
            return
        shutil.rmtree(self.path, ignore_errors=True)
        # Other stacks may lie there, and other processes put some there or remove it at this moment.
        with suppress(OSError):
            self.path.parent.rmdir()


class Place(NamedTuple):
    """Where a student's training is saved while it goes on."""

    folder: StackFolder
    student: int
    """its number there"""
    students: int
    """of the stack"""


def stacks_folder(outputs: str | Path) -> Path:
    """Where stacks are saved while they train."""
    return Path(outputs, "stacks")


def read_place(run: RunFolder, stacks: Path) -> Place | None:
    """The place of a run's student in one of the folders in `stacks`; None if it has none there."""
    try:
        told = json.loads(run.stack.read_text(encoding="utf-8"))
        name, student, students = str(told["stack"]), int(told["student"]), int(told["students"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_name = Path(name).name == name and name not in ("", "..")
    is_place = is_name and 0 <= student < students and (stacks / name).is_dir()
    return Place(StackFolder(stacks / name), student, students) if is_place else None


def leave_place(run: RunFolder, stacks: Path) -> None:
    """Forget where a run that is over was saved, and remove the stack's folder after its last student."""
    place = read_place(run, stacks)
    run.stack.unlink(missing_ok=True)
    if place:
        place.folder.remove_if_left()


def begin_alone(run: RunFolder, stacks: Path) -> None:
    """Let a run that was cut off as part of a stack begin anew by itself; other runs stay as they are."""
    if not run.stack.exists():
        return
    place = read_place(run, stacks)
    if place and place.folder.is_saved:
        log.info("%s: starting over: only hydra/launcher=stacked could resume its stack", run.path)
    # A stack leaves its students weights alone, nothing to go on from.
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    leave_place(run, stacks)
