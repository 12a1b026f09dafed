"""Where a stack of students is saved while it trains, and the note of it in each student's run folder."""

import json
import logging
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from vitkd.runs.checkpoints import previous
from vitkd.runs.files import read_mapping, read_plain, write_atomically
from vitkd.runs.folder import RunFolder

log = logging.getLogger("vitkd")


class StackFolder:
    """The folder of a stack in training: its checkpoint. Results go to the students' run folders."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last = path / "checkpoints" / "last.ckpt"
        self.best = path / "checkpoints" / "best.ckpt"
        self._runs = path / "runs.json"

    @property
    def is_saved(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return self.last.exists() or previous(self.last).exists()

    def assign(self, runs: Sequence[RunFolder]) -> None:
        """Record which runs' students are saved here, and in each run's folder where that is."""
        paths = [os.path.relpath(run.path, self.path) for run in runs]
        write_atomically(self._runs, json.dumps(paths) + "\n")
        for job, run in enumerate(runs):
            # A name, not a path: outputs may move, and only folders of stacks are ever removed.
            slot = {"stack": self.path.name, "job": job, "jobs": len(runs)}
            write_atomically(run.stack, json.dumps(slot) + "\n")

    def remove_if_unused(self) -> None:
        """Remove the folder unless some run still has its student here."""
        try:
            runs = [RunFolder(self.path / path) for path in read_plain(self._runs)]
        except (OSError, ValueError, TypeError):
            return
        slots = (read_slot(run, self.path.parent) for run in runs)
        if any(slot and slot.folder.path == self.path for slot in slots):
            return
        shutil.rmtree(self.path, ignore_errors=True)
        # It may hold other stacks, and other processes may add some or remove it at this moment.
        with suppress(OSError):
            self.path.parent.rmdir()


class StackSlot(NamedTuple):
    """Where the state of a job in training is saved."""

    folder: StackFolder
    job: int
    """its index in the stack"""
    jobs: int
    """how many the stack has"""


def stacks_folder(outputs: str | Path) -> Path:
    """Where stacks are saved while they train."""
    return Path(outputs, "stacks")


def read_slot(run: RunFolder, stacks: Path) -> StackSlot | None:
    """Where in one of the folders in `stacks` a run's student is saved; None if it is in none."""
    note = read_mapping(run.stack)
    name, job, jobs = str(note.get("stack")), note.get("job"), note.get("jobs")
    if not (type(job) is type(jobs) is int):
        return None
    is_name = Path(name).name == name and name not in ("", "..")
    # Path.is_dir raises for a name that is too long.
    is_slot = is_name and 0 <= job < jobs and os.path.isdir(stacks / name)  # noqa: PTH112
    return StackSlot(StackFolder(stacks / name), job, jobs) if is_slot else None


def release_slot(run: RunFolder, stacks: Path) -> None:
    """Delete the note of a run that is over, and the stack's folder after its last student."""
    slot = read_slot(run, stacks)
    run.stack.unlink(missing_ok=True)
    if slot:
        slot.folder.remove_if_unused()


def restart_alone(run: RunFolder, stacks: Path) -> None:
    """Restart by itself a run that was interrupted as part of a stack; other runs stay as they are."""
    if not run.stack.exists():
        return
    slot = read_slot(run, stacks)
    if slot and slot.folder.is_saved:
        log.info("%s: starting over: only hydra/launcher=stacked could resume its stack", run.path)
    # A stack leaves its students' weights only, which cannot be resumed from.
    shutil.rmtree(run.checkpoints, ignore_errors=True)
    release_slot(run, stacks)
