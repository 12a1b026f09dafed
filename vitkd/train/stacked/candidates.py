"""Which jobs of a multirun may train together: from what Hydra composed to the members of each stack."""

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from vitkd.cli.command import run_path
from vitkd.cli.console import Job
from vitkd.cli.jobs import as_job, overridden
from vitkd.config import Config, parse
from vitkd.config.roles import Separates, first_difference, relevant
from vitkd.runs.folder import RunFolder
from vitkd.runs.stack_folder import StackSlot, read_slot, release_slot, stacks_folder
from vitkd.train.compilation import check_compiler
from vitkd.train.fit import Machine, check_trainer
from vitkd.train.job import earlier_run
from vitkd.train.stacked.dropout import has_streams
from vitkd.train.stacked.grouping import in_stack_order, portions, shared_settings

log = logging.getLogger("vitkd")


@dataclass
class Candidate:
    """A job that may be stacked."""

    job: Job
    composed: DictConfig
    config: Config
    machine: Machine
    path: Path
    """where its run folder goes"""
    folder: RunFolder | None
    """that of an attempt that was cut off"""
    place: StackSlot | None
    """where that attempt is saved, if it was part of a stack"""
    result: float | None = None
    """what a sweeper may maximise"""

    @property
    def run(self) -> RunFolder:
        """Its run folder, claimed by now."""
        assert self.folder is not None
        return self.folder


def candidate(composed: DictConfig) -> Candidate | None:
    """The job as a member of some stack; None, with a line that says why, if it has to run by itself."""
    with as_job(composed) as own:
        job = Job(composed.hydra.job.num, overridden(), state="running")
        try:
            config = parse(own)
            machine = check_trainer(config.trainer)
            if config.compile:
                check_compiler(machine.device)
            path = run_path(config)
            earlier = earlier_run(path, config)
        except Exception:
            return None  # told of when its turn comes, and it alone
    folder = RunFolder(earlier.path) if earlier else None
    if earlier and folder and earlier.state in ("running", "done"):
        if earlier.state == "done":
            release_slot(folder, stacks_folder(config.paths.outputs))
        return None
    found = Candidate(job, composed, config, machine, path, folder, saved_place(config, folder))
    if reason := why_alone(found):
        log.info("job %d trains by itself: %s", job.number, reason)
        return None
    return found


def why_alone(found: Candidate) -> str | None:
    """What keeps a job from being stacked with any other, or None."""
    student, precision = found.config.student, str(found.config.trainer.get("precision"))
    if not student.stacks:
        return f"student={student}: its batch normalisation would mix the students of a stack"
    if found.config.method.trains_parameters:
        return "its method trains parameters of its own, which a stack does not"
    if found.machine.processes > 1:
        return f"it spreads over {found.machine.processes} processes"
    if precision in ("16-mixed", "16"):
        return f"under trainer.precision={precision} one student's overflow would hold all others back"
    if student.drops and not has_streams(found.machine.device):
        return f"its dropout masks need Triton on a GPU, and {found.machine.device} has none"
    if found.folder and found.folder.last.exists() and not found.place:
        return "it goes on from a checkpoint of its own"
    return None


def saved_place(config: Config, folder: RunFolder | None) -> StackSlot | None:
    """Where the stack that the run in `folder` was part of is saved, if there is anything saved."""
    place = read_slot(folder, stacks_folder(config.paths.outputs)) if folder else None
    return place if place and place.folder.is_saved else None


def without_twins(candidates: Iterable[Candidate]) -> list[Candidate]:
    """All but those that would do in the same place what another does; such a one runs after it."""
    first: dict[str, Candidate] = {}
    for found in candidates:
        settings = relevant(found.config.resolved, Separates.RUNS)
        first.setdefault(json.dumps([str(found.path), settings], sort_keys=True), found)
    return [*first.values()]


def stacks_of(candidates: Sequence[Candidate], most: int) -> list[list[Candidate]]:
    """The candidates by stack of at most so many, in stack order; says what keeps one stack from another."""
    groups: list[tuple[dict[str, Any], Path | None, list[Candidate]]] = []
    for member in candidates:
        # Of the method just that: a stack asks one teacher, or none.
        shared = shared_settings(member.config.resolved) | {"method": member.config.method.needs_teacher}
        saved = member.place.folder.path if member.place else None
        for other, other_saved, members in groups:
            if (shared, saved) == (other, other_saved):
                members.append(member)
                break
        else:
            groups.append((shared, saved, [member]))
    stacks = []
    for shared, _, members in groups:
        first = groups[0][2]
        alike = next(others for settings, _, others in groups if settings == shared)
        if alike is not members:
            why = "what was cut off goes on from where it was saved"
            log.info("%s cannot be stacked with %s: %s", told(members), told(alike), why)
        elif first is not members:
            difference = first_difference(groups[0][0], shared) or "paths"
            what = difference.removesuffix("._target_")
            log.info("%s cannot be stacked with %s: another %s", told(members), told(first), what)
        ordered = sorted(members, key=stack_position)
        cuts = portions(len(ordered), most)
        if len(cuts) > 1:
            log.info("%s make %d stacks of at most %d students", told(members), len(cuts), most)
        stacks += [ordered[cut.start : cut.stop] for cut in cuts]
    return stacks


def stack_position(member: Candidate) -> tuple[Any, ...]:
    """Sorts the members of one stack; one that goes on keeps its place."""
    return (member.place.student,) if member.place else in_stack_order(member.config.resolved)


def told(members: Sequence[Candidate]) -> str:
    """`jobs 0-3, 7`."""
    numbers = sorted(member.job.number for member in members)
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    spans = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return f"job{'s' if len(numbers) > 1 else ''} {spans}"
