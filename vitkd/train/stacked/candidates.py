"""Which jobs of a multirun may train together: from what Hydra composed to the members of each stack."""

import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from omegaconf import DictConfig

from vitkd.cli.console import Job, names_of_jobs
from vitkd.cli.jobs import as_job, overridden
from vitkd.config.roles import Separates, first_difference, relevant
from vitkd.config.run import Config
from vitkd.runs.folder import RunFolder
from vitkd.runs.inputs import contents_of, known_inputs
from vitkd.runs.stack_folder import StackSlot, read_slot, release_slot, stacks_folder
from vitkd.train.plan import Plan, make_plan
from vitkd.train.stacked.dropout import has_streams

log = logging.getLogger("vitkd")

AnyJob = TypeVar("AnyJob")


@dataclass
class Candidate:
    """A job that may be stacked."""

    job: Job
    plan: Plan
    folder: RunFolder | None
    """of the interrupted attempt that it resumes, later of the run"""
    place: StackSlot | None
    """where that attempt is saved, if it was part of a stack"""
    result: float | None = None
    """what a sweeper may maximise"""

    @property
    def config(self) -> Config:
        """Its settings."""
        return self.plan.config

    @property
    def run(self) -> RunFolder:
        """Its run folder, claimed by now."""
        assert self.folder is not None
        return self.folder


def candidate(composed: DictConfig, contents: dict[str, str | None]) -> Candidate | None:
    """The job as a member of some stack; None, with a line that says why, if it has to run by itself.

    `contents` keeps what the jobs' data sets hold, for to look at all files takes a second.
    """
    with as_job(composed) as own:
        job = Job(composed.hydra.job.num, overridden(), state="running")
        try:
            plan = make_plan(own)
            images = json.dumps([plan.config.resolved["dataset"], plan.config.paths.data], sort_keys=True)
            if images not in contents:
                contents[images] = contents_of(plan.config)
            earlier = plan.earlier(known_inputs(plan.config, contents[images]))
        except Exception:
            return None  # the job fails with it when its turn comes, and reports it then
    folder = RunFolder(earlier.path) if earlier else None
    if earlier and folder and earlier.is_taken:
        if earlier.state == "done":
            release_slot(folder, stacks_folder(plan.config.paths.outputs))
        return None
    member = Candidate(job, plan, folder, saved_place(plan.config, folder))
    if reason := why_alone(member):
        log.info("job %d trains by itself: %s", job.number, reason)
        return None
    return member


def why_alone(member: Candidate) -> str | None:
    """What keeps a job from being stacked with any other, or None."""
    student, machine = member.config.student, member.plan.machine
    precision = str(member.config.trainer.get("precision"))
    if member.config.debug:
        return f"debug={member.config.debug} looks at one student"
    if student.why_alone:
        return f"student={student}: {student.why_alone}"
    if reason := member.config.method.why_alone or member.config.optimizer.why_alone:
        return reason
    if machine.processes > 1:
        return f"it uses {machine.processes} processes"
    if precision in ("16-mixed", "16"):
        return f"under trainer.precision={precision} one student's overflow would hold all others back"
    if student.drops and not has_streams(machine.device):
        return f"its dropout masks need Triton on a GPU, and {machine.device} has none"
    if member.folder and member.folder.last.exists() and not member.place:
        return "it resumes from a checkpoint of its own"
    return None


def saved_place(config: Config, folder: RunFolder | None) -> StackSlot | None:
    """Where the stack that the run in `folder` was part of is saved, if there is anything saved."""
    place = read_slot(folder, stacks_folder(config.paths.outputs)) if folder else None
    return place if place and place.folder.is_saved else None


def deduplicate(candidates: Iterable[Candidate]) -> list[Candidate]:
    """The first of all with the same settings and folder; its duplicates run later and find it done."""
    first: dict[str, Candidate] = {}
    for member in candidates:
        settings = relevant(member.config.resolved, Separates.RUNS)
        first.setdefault(json.dumps([str(member.plan.path), settings], sort_keys=True), member)
    return [*first.values()]


class Group(NamedTuple):
    """Candidates that may train as one stack."""

    shared: dict[str, Any]
    """the settings that they have in common"""
    saved: Path | None
    """where the stack is saved that they resume together, if they do"""
    members: list[Candidate]


def stacks_of(
    candidates: Sequence[Candidate], most: int, most_jobs: float = math.inf
) -> list[list[Candidate]]:
    """The candidates by stack of at most so many students; logs what keeps one stack from another.

    A stack has no more than `most_jobs` either, unless these share one student.
    """
    groups = grouped(candidates)
    stacks = []
    for group in groups:
        if reason := why_apart(group, groups):
            log.info("%s cannot be stacked with %s: %s", job_names(group.members), *reason)
        students = by_student(group.members)
        count = math.ceil(len(students) / most)
        while count < len(students) and max(map(len, split(students, count))) > most_jobs:
            count += 1
        if count > 1:
            log.info("%s make %d stacks of at most %d students", job_names(group.members), count, most)
        stacks += split(students, count)
    return stacks


def by_student(members: Iterable[Candidate]) -> list[list[Candidate]]:
    """The members of one stack, in stack order, by the student that they train.

    Those of one list would become the same student, so only its first trains.
    """
    students: dict[Any, list[Candidate]] = {}
    for member in sorted(members, key=stack_position):
        students.setdefault(what_trains(member.config), []).append(member)
    return [*students.values()]


def what_trains(config: Config) -> tuple[Any, ...]:
    """Equal for jobs of one stack whose students become the same, since all of their gradients are equal."""
    if not config.weighting.distils(config.alpha):
        # All settings but those that say what to learn from a teacher.
        alone = relevant(config.resolved, Separates.RUNS | Separates.EXPERIMENTS)
        return json.dumps(alone, sort_keys=True), config.resolved["seed"]
    ignored, loss = (*config.method.ignores, "loss"), config.loss.gradient_key
    if "loss" in config.method.ignores:
        loss = ()
    elif config.granularity.is_matched:
        # Heads are matched by the loss's value.
        loss = type(config.loss), *loss
    settings = {
        name: value
        for name, value in relevant(config.resolved, Separates.RUNS).items()
        if not any(name == setting or name.startswith(f"{setting}.") for setting in ignored)
    }
    return json.dumps(settings, sort_keys=True), loss


def in_stack_order(students: Sequence[Sequence[AnyJob]]) -> tuple[list[AnyJob], list[int]]:
    """The jobs by student as one list, the first of every student before all others, and each one's student.

    Those of one place are neighbours: they learn alike, as a stack likes its jobs.
    """
    places = zip_longest(*students)
    pairs = [(job, student) for place in places for student, job in enumerate(place) if job is not None]
    return [job for job, _ in pairs], [student for _, student in pairs]


def split(students: Sequence[Sequence[Candidate]], count: int) -> list[list[Candidate]]:
    """The candidates by student as so many stacks, whose numbers of students differ by one at most."""
    cuts = pairwise(stack * len(students) // count for stack in range(count + 1))
    return [[*chain.from_iterable(students[start:stop])] for start, stop in cuts]


def grouped(candidates: Sequence[Candidate]) -> list[Group]:
    """The candidates by what a stack shares."""
    groups: list[Group] = []
    for member in candidates:
        # Of the method only that: a stack has one teacher, or none.
        shared = relevant(member.config.resolved, Separates.STACKS) | {
            "method": member.config.method.needs_teacher
        }
        saved = member.place.folder.path if member.place else None
        for group in groups:
            if (shared, saved) == (group.shared, group.saved):
                group.members.append(member)
                break
        else:
            groups.append(Group(shared, saved, [member]))
    return groups


def why_apart(group: Group, groups: Sequence[Group]) -> tuple[str, str] | None:
    """Which jobs the group is not stacked with, and why; None if it is the first of `groups`."""
    first = groups[0]
    similar = next(other for other in groups if other.shared == group.shared)
    if similar is not group:
        return job_names(similar.members), "interrupted runs resume where they were saved"
    if group is first:
        return None
    difference = first_difference(first.shared, group.shared) or "paths"
    return job_names(first.members), f"different {difference.removesuffix('._target_')}"


def start_over(members: Sequence[Candidate], inputs: Mapping[str, Any]) -> None:
    """Let interrupted members that had another teacher than this one, or other images, start over."""
    for member in members:
        if member.folder:
            member.folder = RunFolder.latest(member.plan.path, member.config.resolved, inputs)
    if not all(member.folder for member in members):
        for member in members:
            member.place = None  # a stack resumes as a whole


def stack_position(member: Candidate) -> tuple[Any, ...]:
    """Sorts the members of one stack; one that resumes keeps its place.

    Those of equal method, granularity, weighting and loss are neighbours, alpha = 1 last.
    """
    if member.place:
        return (member.place.job,)
    config = member.config.resolved
    # The loss last: those that differ in their temperature alone are compared in one go.
    groups = ("method", "granularity", "weighting", "loss")
    texts = [json.dumps(config[group], sort_keys=True) for group in groups]
    return (config["alpha"] == 1, *texts, config["seed"])


def job_names(members: Sequence[Candidate]) -> str:
    """`jobs 0-3, 7`."""
    return names_of_jobs(member.job.number for member in members)
